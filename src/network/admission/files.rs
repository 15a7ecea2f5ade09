//! The files of the cluster keys, followed while the node runs. What cannot be read keeps the key that it gave last.
//!
//! A mounted Secret is replaced by a swap of symbolic links, so the file that a path leads to is looked at each second. A
//! change counts once it has stood for two looks: half a key that is being written is another key.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::key::{Key, KeyError};

/// All of them, in the order of the configuration.
pub(super) struct Files(Vec<File>);

struct File {
    path: PathBuf,
    /// As it was when it was read last.
    read: Stamp,
    /// As it was at the last look.
    seen: Stamp,
    key: Option<Arc<Key>>,
    error: Option<KeyError>,
}

/// What tells one state of a file from another; `None`: it is not there.
type Stamp = Option<(u64, u64, u64, i64, i64, i64, i64)>;

impl Files {
    /// Reads all that can be read.
    pub(super) fn open(paths: &[PathBuf]) -> Self {
        Self(paths.iter().map(|path| File::open(path)).collect())
    }

    /// Follows these from now on; those that were followed before keep what they gave.
    pub(super) fn configure(&mut self, paths: &[PathBuf]) {
        let mut before = std::mem::take(&mut self.0);
        self.0 = paths
            .iter()
            .map(|path| {
                let known = before.iter().position(|file| file.path == *path);
                known.map_or_else(|| File::open(path), |index| before.swap_remove(index))
            })
            .collect();
    }

    /// Reads what has changed, and again what could not be read.
    pub(super) fn look(&mut self) {
        for file in &mut self.0 {
            let now = stamp(&file.path);
            let settled = now == file.seen;
            file.seen = now;
            if settled && (now != file.read || file.error.is_some()) {
                file.read = now;
                file.read();
            }
        }
    }

    /// The keys that there are, each once.
    pub(super) fn keys(&self) -> Vec<Arc<Key>> {
        let mut keys: Vec<Arc<Key>> = Vec::new();
        for key in self.0.iter().filter_map(|file| file.key.as_ref()) {
            if keys.iter().all(|other| other.id() != key.id()) {
                keys.push(Arc::clone(key));
            }
        }
        keys
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let problem = |file: &File| {
            let error = file.error.as_ref()?;
            let until = if file.key.is_some() {
                "the key that it gave before stays in force"
            } else {
                "until it is right, nobody is admitted by it"
            };
            Some(format!("cluster key {}: {error}; {until}", file.path.display()))
        };
        self.0.iter().filter_map(problem).collect()
    }
}

impl File {
    fn open(path: &Path) -> Self {
        let stamp = stamp(path);
        let mut file = Self { path: path.to_owned(), read: stamp, seen: stamp, key: None, error: None };
        file.read();
        file
    }

    fn read(&mut self) {
        match Key::read(&self.path) {
            Ok(key) => {
                self.error = None;
                if self.key.as_ref().is_none_or(|old| old.id() != key.id()) {
                    self.key = Some(Arc::new(key));
                }
            }
            Err(error) => self.error = Some(error),
        }
    }
}

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        // Also moves when only the mode changes, which may be what kept the file from being read.
        metadata.ctime(),
        metadata.ctime_nsec(),
    ))
}
