//! What is done to the disk, one step at a time: files appear whole or not at all, and stay after a power cut.
//!
//! A file is written beside its place, flushed, renamed over it, and its folder flushed. A process that is killed
//! between two steps leaves at most a file or folder under a name that nobody reads ([`temporary`]); the next run
//! replaces or removes it. It decides nothing.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Largest `hosts.toml`, state or configuration file that is read; real ones have a few KiB.
const FILE_LIMIT: u64 = 1 << 20;

/// Who may do what with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Access {
    /// Permission bits.
    pub(super) mode: u32,
    /// User ID.
    pub(super) uid: u32,
    /// Group ID.
    pub(super) gid: u32,
}

impl Access {
    /// Of a file that this process makes.
    pub(super) fn of_new() -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { mode: 0o644, uid, gid }
    }
}

/// A file as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) text: String,
    pub(super) access: Access,
}

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct DiskError {
    /// What was tried.
    pub action: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

/// Does the steps. Tests end it, or fill it, at any of them.
#[derive(Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) fault: Option<Box<dyn Fn(&'static str) -> io::Result<()>>>,
}

impl Disk {
    /// Puts a whole file into its place. Its folder must be there. Nobody ever sees a part of it.
    pub(super) fn replace(&self, path: &Path, text: &str, access: Option<Access>) -> Result<(), DiskError> {
        let new = temporary(path);
        self.write(&new, text, access)?;
        self.step("replace", path, || fs::rename(&new, path)).inspect_err(|_| {
            let _ = self.step("remove", &new, || fs::remove_file(&new));
        })?;
        self.flush_folder_of(path)
    }

    /// Puts a folder with one file into its place, so that the folder is never seen without the file. Its parent must
    /// be there, and the folder must not.
    pub(super) fn place_folder(
        &self,
        folder: &Path,
        name: &str,
        text: &str,
        access: Option<Access>,
    ) -> Result<(), DiskError> {
        let new = temporary(folder);
        self.remove_temporary(folder)?;
        self.make_folder(&new)?;
        let done = self
            .write(&new.join(name), text, access)
            .and_then(|()| self.flush_folder_of(&new.join(name)))
            .and_then(|()| self.step("make", folder, || fs::rename(&new, folder)));
        done.inspect_err(|_| {
            let _ = self.remove_temporary(folder);
        })?;
        self.flush_folder_of(folder)
    }

    /// Takes a folder away whose only content is the file `name`, so that it is never seen without the file. `false`:
    /// there is more in it.
    pub(super) fn take_folder(&self, folder: &Path, name: &str) -> Result<bool, DiskError> {
        let mut entries = fs::read_dir(folder).map_err(|source| error("read", folder, source))?;
        let is_alone = entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == name));
        if !is_alone {
            return Ok(false);
        }
        self.remove_temporary(folder)?;
        let aside = temporary(folder);
        self.step("remove", folder, || fs::rename(folder, &aside))?;
        self.remove_temporary(folder)?;
        self.flush_folder_of(folder)?;
        Ok(true)
    }

    /// Makes one folder.
    pub(super) fn make_folder(&self, folder: &Path) -> Result<(), DiskError> {
        self.step("make", folder, || {
            DirBuilder::new().mode(0o755).create(folder)?;
            // Whatever the umask is, who runs containerd must get in.
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
        })?;
        self.flush_folder_of(folder)
    }

    /// Removes a file; one that is not there is removed already.
    pub(super) fn remove_file(&self, path: &Path) -> Result<(), DiskError> {
        self.step("remove", path, || absent_is_fine(fs::remove_file(path)))?;
        self.flush_folder_of(path)
    }

    /// Removes a folder if nothing is in it; whether it is gone.
    pub(super) fn remove_empty_folder(&self, folder: &Path) -> Result<bool, DiskError> {
        match fs::read_dir(folder) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Ok(false);
                }
            }
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(source) => return Err(error("read", folder, source)),
        }
        self.step("remove", folder, || absent_is_fine(fs::remove_dir(folder)))?;
        Ok(true)
    }

    /// Removes what a run that was killed left beside `path`.
    pub(super) fn remove_temporary(&self, path: &Path) -> Result<(), DiskError> {
        let left = temporary(path);
        match fs::symlink_metadata(&left) {
            Ok(metadata) if metadata.is_dir() => self.step("remove", &left, || fs::remove_dir_all(&left)),
            Ok(_) => self.step("remove", &left, || fs::remove_file(&left)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(error("read", &left, source)),
        }
    }

    fn write(&self, path: &Path, text: &str, access: Option<Access>) -> Result<(), DiskError> {
        self.remove_left_file(path)?;
        let mode = access.map_or(0o644, |access| access.mode);
        let written = self
            .step("write", path, || {
                // Not readable by others before it has its mode: a hosts.toml may hold a password.
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
            })
            .and_then(|mut file| {
                self.step("write", path, || file.write_all(text.as_bytes()))?;
                self.step("write", path, || {
                    if let Some(Access { uid, gid, .. }) = access {
                        let made = file.metadata()?;
                        if (made.uid(), made.gid()) != (uid, gid) {
                            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
                        }
                    }
                    file.set_permissions(fs::Permissions::from_mode(mode))?;
                    file.sync_all()
                })
            });
        written.inspect_err(|_| {
            let _ = self.step("remove", path, || absent_is_fine(fs::remove_file(path)));
        })
    }

    fn remove_left_file(&self, path: &Path) -> Result<(), DiskError> {
        match fs::symlink_metadata(path) {
            Ok(_) => self.step("remove", path, || fs::remove_file(path)),
            Err(_) => Ok(()),
        }
    }

    fn flush_folder_of(&self, path: &Path) -> Result<(), DiskError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        self.step("flush", folder, || match File::open(folder).and_then(|folder| folder.sync_all()) {
            // Some network file systems cannot flush a folder.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => Ok(()),
            result => absent_is_fine(result),
        })
    }

    fn step<T>(
        &self,
        action: &'static str,
        path: &Path,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, DiskError> {
        #[cfg(test)]
        if let Some(fault) = &self.fault {
            fault(action).map_err(|source| error(action, path, source))?;
        }
        operation().map_err(|source| error(action, path, source))
    }
}

/// Where a file or a folder is made before it gets its name: beside it, under a name that containerd never looks for.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = OsString::from(".peili-");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// A file's text; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<Content>, DiskError> {
    let fail = |source| error("read", path, source);
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(fail(source)),
    };
    let invalid = |text: &str| fail(io::Error::new(io::ErrorKind::InvalidData, text));
    // Opening a pipe would wait for its other end.
    if !metadata.is_file() {
        return Err(invalid("not a regular file"));
    }
    if metadata.len() > FILE_LIMIT {
        return Err(invalid("larger than 1 MiB"));
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(fail(source)),
    };
    let text = String::from_utf8(bytes).map_err(|_| invalid("not UTF-8 text"))?;
    let access = Access { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() };
    Ok(Some(Content { text, access }))
}

/// Whether there is something at `path`; what cannot be looked at is an error, as it is to containerd.
pub(super) fn exists(path: &Path) -> Result<bool, DiskError> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(error("read", path, source)),
    }
}

/// The path without `..`, by the text alone, as Go's `filepath.Join` makes it.
pub(super) fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        if component == std::path::Component::ParentDir {
            clean.pop();
        } else {
            clean.push(component);
        }
    }
    clean
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn error(action: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError { action, path: path.to_owned(), source }
}
