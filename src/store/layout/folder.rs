//! Files of a layout folder, opened without ever following a symbolic link within it.
//!
//! Whoever can write into the layout must not make Peili serve other files of the node. The path of the layout itself
//! is the operator's and may be a link.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::oci::{Algorithm, Digest};

/// Blobs in one layout.
const BLOBS_LIMIT: usize = 100_000;

/// What tells that a file or folder has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) size: u64,
    pub(super) place: (u64, u64),
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

/// An open layout folder.
pub(super) struct Root(OwnedFd);

/// Why a layout cannot be opened.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It is not there.
    Gone(String),
    /// It cannot be read now.
    Unreadable(String),
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self, Unusable> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(root) => Ok(Self(root)),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                Err(Unusable::Gone(format!("there is no layout at {}", path.display())))
            }
            Err(error) => Err(Unusable::Unreadable(format!("cannot open {}: {error}", path.display()))),
        }
    }

    /// A file at the root and its mark; `None` if it is not there.
    pub(super) fn file(&self, name: &str) -> Result<Option<(File, Mark)>, String> {
        let Some(file) = open_file(&self.0, name)? else { return Ok(None) };
        let mark = Mark::of_file(&file).map_err(|error| format!("{name}: {error}"))?;
        Ok(Some((file, mark)))
    }

    /// The folder of an algorithm's blobs and its mark; `None` if it is not there.
    pub(super) fn blobs(&self, algorithm: Algorithm) -> Result<Option<(OwnedFd, Mark)>, String> {
        let Some(blobs) = open_folder(&self.0, "blobs")? else { return Ok(None) };
        let Some(folder) = open_folder(&blobs, algorithm.as_str())? else { return Ok(None) };
        let stat =
            rustix::fs::fstat(&folder).map_err(|error| format!("blobs/{}: {error}", algorithm.as_str()))?;
        Ok(Some((folder, Mark::of_stat(&stat))))
    }

    pub(super) fn blob(&self, digest: &Digest) -> Result<Option<File>, String> {
        match self.blobs(digest.algorithm())? {
            Some((folder, _)) => open_file(&folder, &digest.hex()),
            None => Ok(None),
        }
    }
}

/// Opens a blob; `None` if it is not there.
pub(super) fn open_blob(path: &Path, digest: &Digest) -> Result<Option<File>, String> {
    match Root::open(path) {
        Ok(root) => root.blob(digest),
        Err(Unusable::Gone(_)) => Ok(None),
        Err(Unusable::Unreadable(reason)) => Err(reason),
    }
}

/// Adds the blobs of a folder. Names that are no digest (files on their way) and what is no file are left out.
pub(super) fn list(
    folder: &OwnedFd,
    algorithm: Algorithm,
    blobs: &mut HashMap<Digest, Mark>,
) -> Result<(), String> {
    let describe = |error: Errno| format!("blobs/{}: {error}", algorithm.as_str());
    for entry in Dir::read_from(folder).map_err(describe)? {
        let entry = entry.map_err(describe)?;
        let name = entry.file_name();
        let Ok(Ok(digest)) = name.to_str().map(|hex| format!("{}:{hex}", algorithm.as_str()).parse()) else {
            continue;
        };
        let stat = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(describe(error)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            continue;
        }
        if blobs.len() == BLOBS_LIMIT {
            return Err(format!("the layout has more than {BLOBS_LIMIT} blobs"));
        }
        blobs.insert(digest, Mark::of_stat(&stat));
    }
    Ok(())
}

/// Reads a whole file of at most `limit` bytes.
pub(super) fn read(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
    }
    Ok(content)
}

fn open_folder(folder: &impl AsFd, name: &str) -> Result<Option<OwnedFd>, String> {
    open_at(folder, name, OFlags::DIRECTORY)
}

/// A regular file; anything else that may stand there is not opened for long (a pipe would block).
fn open_file(folder: &impl AsFd, name: &str) -> Result<Option<File>, String> {
    let Some(file) = open_at(folder, name, OFlags::NONBLOCK)? else { return Ok(None) };
    let file = File::from(file);
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(Some(file)),
        Ok(_) => Err(format!("{name} is not a file")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn open_at(folder: &impl AsFd, name: &str, flags: OFlags) -> Result<Option<OwnedFd>, String> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::LOOP) => Err(format!("{name} is a symbolic link, which is not followed")),
        // What the kernel says of a link where a folder must be.
        Err(Errno::NOTDIR) => Err(format!("{name} is not a folder, or a symbolic link to one")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

impl Mark {
    /// By the file system's clock, which may be another one than this machine's.
    pub(super) fn was_modified_before(&self, time: SystemTime) -> bool {
        let seconds = u64::try_from(self.modified.0).unwrap_or_default();
        let modified = Duration::new(seconds, u32::try_from(self.modified.1).unwrap_or_default());
        SystemTime::UNIX_EPOCH.checked_add(modified).is_some_and(|modified| modified < time)
    }

    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            size: metadata.len(),
            place: (metadata.dev(), metadata.ino()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    #[expect(
        clippy::unnecessary_cast,
        clippy::cast_possible_wrap,
        reason = "the types of these fields differ between architectures"
    )]
    fn of_stat(stat: &Stat) -> Self {
        Self {
            size: stat.st_size as u64,
            place: (stat.st_dev as u64, stat.st_ino as u64),
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }
}
