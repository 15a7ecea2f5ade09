//! Follows the configuration file while the process runs.
//!
//! The file that the path leads to is looked at each second, so that a ConfigMap's swap of symbolic links is seen
//! without a watch on each folder. A change counts once it has stood for a second: an editor empties a file before it
//! writes it, and an empty file is a valid configuration. SIGHUP reads at once. Errors are given out too; it is for
//! the receiver to keep what it has.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Inputs, Loaded};

/// Between two looks at the file.
const INTERVAL: Duration = Duration::from_secs(1);

/// Configurations as they come. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    receiver: mpsc::Receiver<Result<Loaded, Error>>,
    task: AbortOnDropHandle<()>,
}

/// What tells one state of a file from another; `None`: it is not there.
pub(super) type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// Begins to watch. What `loaded` was made of is read again after a change of its file and after SIGHUP. Must be called
/// within a runtime; an error means that signals cannot be received.
pub fn watch(loaded: &Loaded) -> io::Result<Watch> {
    let signal = signal(SignalKind::hangup())?;
    let (sender, receiver) = mpsc::channel(1);
    let following = follow(loaded.inputs.clone(), loaded.stamp, signal, sender);
    Ok(Watch { receiver, task: AbortOnDropHandle::new(tokio::spawn(following)) })
}

impl Watch {
    /// The next configuration, or why the changed one cannot be used. Cancel safe. `None` never comes while the runtime
    /// lives.
    pub async fn next(&mut self) -> Option<Result<Loaded, Error>> {
        self.receiver.recv().await
    }

    /// The task that watches, to be looked at.
    pub fn task(&self) -> AbortHandle {
        self.task.abort_handle()
    }
}

/// `known` is from before the configuration in force was read, so that no change after it is missed.
async fn follow(
    inputs: Inputs,
    mut known: Stamp,
    mut signal: Signal,
    sender: mpsc::Sender<Result<Loaded, Error>>,
) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = known;
    let mut was_there = known.is_some();
    loop {
        let hangup = tokio::select! {
            _ = ticks.tick() => false,
            _ = signal.recv() => true,
        };
        let now = look(inputs.path().to_owned()).await;
        let settled = now == last && now != known;
        last = now;
        if !(hangup || settled) {
            continue;
        }
        known = now;
        was_there |= now.is_some();
        let load = inputs.clone();
        let result = off_executor(inputs.path(), move || load_present(&load, was_there)).await;
        if sender.send(result).await.is_err() {
            return;
        }
    }
}

/// A file that was there and is gone is an error, although none is needed at the start: it takes all settings with it.
fn load_present(inputs: &Inputs, was_there: bool) -> Result<Loaded, Error> {
    match inputs.load() {
        Ok(Loaded { file: None, .. }) if was_there => {
            Err(Error::Read { path: inputs.path().to_owned(), source: io::ErrorKind::NotFound.into() })
        }
        result => result,
    }
}

/// A load that panics is a configuration that cannot be used, not the end of the watch.
async fn off_executor(
    path: &Path,
    load: impl FnOnce() -> Result<Loaded, Error> + Send + 'static,
) -> Result<Loaded, Error> {
    let read = |error| Error::Read { path: path.to_owned(), source: io::Error::other(error) };
    tokio::task::spawn_blocking(load).await.unwrap_or_else(|error| Err(read(error)))
}

async fn look(path: PathBuf) -> Stamp {
    tokio::task::spawn_blocking(move || stamp(&path)).await.unwrap_or_default()
}

pub(super) fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longest wait for two looks at the file.
    const LIMIT: Duration = Duration::from_secs(20);

    async fn next(watch: &mut Watch) -> Result<Loaded, Error> {
        tokio::time::timeout(LIMIT, watch.next()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_change_between_the_load_and_the_first_look_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        fs::write(&path, "log: {level: info}").unwrap();
        let loaded = Inputs { path: Some(path.clone()), ..Inputs::default() }.load().unwrap();
        fs::write(&path, "log: {level: debug}").unwrap();
        let mut watch = watch(&loaded).unwrap();
        assert_eq!(next(&mut watch).await.unwrap().config.log.level, "debug");
    }

    /// The default file may be absent: from the start that is no error, once it was there it is.
    #[test]
    fn only_a_file_that_was_there_is_missed() {
        let absent = Inputs { set: vec!["log.level=debug".into()], ..Inputs::default() };
        if absent.path().exists() {
            return;
        }
        assert_eq!(load_present(&absent, false).unwrap().config.log.level, "debug");
        assert!(matches!(load_present(&absent, true), Err(Error::Read { .. })));
        let named = Inputs { path: Some("/no/such/file".into()), ..Inputs::default() };
        assert!(matches!(load_present(&named, false), Err(Error::Read { .. })));
    }

    #[tokio::test]
    async fn a_load_that_panics_is_an_error() {
        let error = off_executor(Path::new("/x.yaml"), || panic!("a fault of the parser")).await.unwrap_err();
        assert!(error.to_string().contains("/x.yaml") && error.to_string().contains("panic"), "{error}");
    }
}
