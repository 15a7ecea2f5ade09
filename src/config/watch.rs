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
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Inputs, Loaded};

/// Between two looks at the file.
const INTERVAL: Duration = Duration::from_secs(1);

/// Configurations as they come. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    receiver: mpsc::Receiver<Result<Loaded, Error>>,
    _task: AbortOnDropHandle<()>,
}

/// What tells one state of a file from another; `None`: it is not there.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// Begins to watch. What `loaded` was made of is read again after a change of its file and after SIGHUP. Must be called
/// within a runtime; an error means that signals cannot be received.
pub fn watch(loaded: &Loaded) -> io::Result<Watch> {
    let signal = signal(SignalKind::hangup())?;
    let (sender, receiver) = mpsc::channel(1);
    let inputs = loaded.inputs.clone();
    Ok(Watch { receiver, _task: AbortOnDropHandle::new(tokio::spawn(follow(inputs, signal, sender))) })
}

impl Watch {
    /// The next configuration, or why the changed one cannot be used. Cancel safe. `None` never comes while the runtime
    /// lives.
    pub async fn next(&mut self) -> Option<Result<Loaded, Error>> {
        self.receiver.recv().await
    }
}

async fn follow(inputs: Inputs, mut signal: Signal, sender: mpsc::Sender<Result<Loaded, Error>>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = look(inputs.path().to_owned()).await;
    let mut last = known;
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
        let load = inputs.clone();
        let Ok(result) = tokio::task::spawn_blocking(move || load_present(&load, now)).await else { return };
        if sender.send(result).await.is_err() {
            return;
        }
    }
}

/// A file that was there and is gone is an error, although none is needed at the start: it takes all settings with it.
fn load_present(inputs: &Inputs, stamp: Stamp) -> Result<Loaded, Error> {
    match stamp {
        Some(_) => inputs.load(),
        None => Err(Error::Read { path: inputs.path().to_owned(), source: io::ErrorKind::NotFound.into() }),
    }
}

async fn look(path: PathBuf) -> Stamp {
    tokio::task::spawn_blocking(move || stamp(&path)).await.unwrap_or_default()
}

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}
