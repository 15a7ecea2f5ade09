//! What `configure` changed on this node, kept until it is taken back: one file per `hosts.toml`, written before that
//! is touched. So there is never a change that is not on record, whenever the process ends.
//!
//! It lies in the data folder, not beside the `hosts.toml`: folders of hosts are rebuilt by some distributions.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{self, Access, Content, Disk, DiskError};
use super::{Error, Mirror, Mode};
use crate::oci::Digest;

/// Version of the format. A higher one is refused, unknown keys are ignored.
const VERSION: u32 = 1;

/// One `hosts.toml` that Peili is in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Record {
    pub(super) version: u32,
    /// The file, as the host names it.
    pub(super) path: PathBuf,
    /// The registry, or `_default`.
    pub(super) target: String,
    pub(super) mirror: Mirror,
    pub(super) mode: Mode,
    /// What was there before; `None`: no file.
    pub(super) original: Option<Original>,
    /// What was written in its place.
    pub(super) written: String,
    /// What was there when that was written, if it was Peili's too: between record and file lies a moment.
    pub(super) before: Option<String>,
    /// The file's folder was made for it.
    pub(super) folder: bool,
    /// Folders above that were made for it, the outermost first.
    pub(super) made: Vec<PathBuf>,
}

/// A file before Peili.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Original {
    pub(super) text: String,
    #[serde(flatten)]
    pub(super) access: Access,
}

/// The records.
pub(super) struct Journal<'a> {
    folder: PathBuf,
    disk: &'a Disk,
    /// Held for as long as something may be written.
    lock: Option<File>,
}

impl<'a> Journal<'a> {
    /// The records in this folder, for reading.
    pub(super) fn new(folder: PathBuf, disk: &'a Disk) -> Self {
        Self { folder, disk, lock: None }
    }

    /// Lets records be written: makes the folder, and keeps others from doing the same.
    pub(super) fn lock(&mut self) -> Result<(), Error> {
        let fail = |action, source| DiskError { action, path: self.folder.clone(), source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(|source| fail("make", source))?;
        let path = self.folder.join("lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|source| DiskError { action: "open", path: path.clone(), source })?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => self.lock = Some(file),
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy(path)),
            Err(error) => return Err(fail("lock", error.into()).into()),
        }
        Ok(())
    }

    /// Removes records that were not finished.
    pub(super) fn repair(&self) -> Result<(), Error> {
        let fail = |source| DiskError { action: "read", path: self.folder.clone(), source };
        for entry in std::fs::read_dir(&self.folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".peili-")) {
                self.disk.remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// The record of a file.
    pub(super) fn get(&self, path: &Path) -> Result<Option<Record>, Error> {
        self.read(&self.file(path))
    }

    /// All records, by path.
    pub(super) fn all(&self) -> Result<Vec<Record>, Error> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(DiskError { action: "read", path: self.folder.clone(), source }.into()),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry =
                entry.map_err(|source| DiskError { action: "read", path: self.folder.clone(), source })?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            if !name.starts_with('.') && name.ends_with(".json") {
                records.extend(self.read(&entry.path())?);
            }
        }
        records.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(records)
    }

    /// Writes a record. Only then may its file be changed.
    pub(super) fn save(&self, record: &Record) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(record)
            .map_err(|error| Error::State { path: self.file(&record.path), reason: error.to_string() })?;
        Ok(self.disk.replace(&self.file(&record.path), &text, Some(self.access()?))?)
    }

    /// Forgets a file that is as it was.
    pub(super) fn remove(&self, path: &Path) -> Result<(), Error> {
        Ok(self.disk.remove_file(&self.file(path))?)
    }

    /// Keeps what cannot be put back; returns where.
    pub(super) fn keep(&self, record: &Record, text: &str) -> Result<PathBuf, Error> {
        let path = self.kept(record);
        self.disk.replace(&path, text, Some(self.access()?))?;
        Ok(path)
    }

    /// Where [`Self::keep`] puts it.
    pub(super) fn kept(&self, record: &Record) -> PathBuf {
        self.folder.join(format!("{}-hosts.toml", record.target.replace(['/', ':'], "_")))
    }

    /// Read by its owner only: a hosts.toml may hold a password.
    fn access(&self) -> Result<Access, Error> {
        let fail = |source| DiskError { action: "read", path: self.folder.clone(), source };
        let metadata = std::fs::metadata(&self.folder).map_err(fail)?;
        Ok(Access { mode: 0o600, uid: metadata.uid(), gid: metadata.gid() })
    }

    fn file(&self, path: &Path) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        let name = Digest::sha256(path.as_os_str().as_bytes()).hex();
        self.folder.join(format!("{}.json", &name[..16]))
    }

    fn read(&self, path: &Path) -> Result<Option<Record>, Error> {
        let Some(Content { text, .. }) = disk::read(path)? else { return Ok(None) };
        let wrong = |reason: String| Error::State { path: path.to_owned(), reason };
        let record: Record = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if record.version > VERSION {
            return Err(wrong(format!("it is of version {}, this program reads {VERSION}", record.version)));
        }
        Ok(Some(record))
    }
}

impl Drop for Journal<'_> {
    fn drop(&mut self) {
        // Closing is not enough while a process that another thread starts has a copy of the descriptor.
        if let Some(lock) = &self.lock {
            let _ = rustix::fs::flock(lock, rustix::fs::FlockOperation::Unlock);
        }
    }
}

impl Record {
    /// A record of a change that is about to be made.
    pub(super) fn new(path: PathBuf, target: String, mirror: Mirror, mode: Mode, written: String) -> Self {
        let (original, before) = (None, None);
        Self {
            version: VERSION,
            path,
            target,
            mirror,
            mode,
            original,
            written,
            before,
            folder: false,
            made: Vec::new(),
        }
    }

    /// Whether a run of `configure` left the file so.
    pub(super) fn wrote(&self, text: &str) -> bool {
        self.written == text || self.before.as_deref() == Some(text)
    }
}

impl From<Content> for Original {
    fn from(content: Content) -> Self {
        Self { text: content.text, access: content.access }
    }
}
