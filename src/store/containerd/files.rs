//! containerd's blob files, read straight from its content root where that is mounted.
//!
//! A disk may hang. Whatever asks it runs where it may block, within a limit, so that this ends as a call to containerd
//! that gets no answer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::Shared;
use super::api::{Api, ApiError};
use crate::oci::{Digest, MANIFEST_LIMIT};
use crate::store::Error;
use crate::store::content::within;

/// What a disk may take to open a file, to list a folder, or to read a small file; beyond it the disk hangs.
pub(super) const DISK: Duration = Duration::from_secs(5);

/// The content root, if it is a content root that can be read here.
pub(super) async fn find_root(shared: &Shared, api: &Api) -> Result<Option<PathBuf>, ApiError> {
    let root = match &shared.configured_root {
        Some(root) => Some(root.clone()),
        None => api.content_root().await?,
    };
    let Some(root) = root else { return Ok(None) };
    let list = |path: PathBuf| disk(move || std::fs::read_dir(path).map(drop));
    let mut readable = list(root.join("blobs")).await?;
    if readable.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        // A containerd that never held anything has not made the folder yet. One that is not mounted has no parent here;
        // of a configured path, which may be a mount right below `/`, the parent says nothing.
        let parent = root.parent().filter(|_| shared.configured_root.is_none());
        readable = list(parent.unwrap_or(&root).to_owned()).await?;
    }
    match readable {
        Ok(()) => Ok(Some(root)),
        Err(error) => {
            tracing::debug!(path = %root.display(), %error, "containerd's content root cannot be read here");
            Ok(None)
        }
    }
}

pub(super) fn blob_path(root: &Path, digest: &Digest) -> PathBuf {
    root.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
}

/// Opens a blob file and checks that it is one; `None`: there is none, or it may not be read.
pub(super) async fn open_file(path: PathBuf, digest: &Digest, size: u64) -> Result<Option<File>, Error> {
    const FLAGS: OFlags =
        OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);
    // What the kernel has cached opens without a wait; only a path that needs the disk goes to the blocking pool.
    let cached = rustix::fs::openat2(CWD, &path, FLAGS, Mode::empty(), ResolveFlags::CACHED);
    let opened = match cached {
        Ok(file) => Ok(File::from(file)),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(_) => {
            let open = move || Ok(File::from(rustix::fs::open(&path, FLAGS, Mode::empty())?));
            within(DISK, open).await
        }
    };
    let file = match opened {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::Unavailable(format!("cannot open the file of {digest}: {error}"))),
    };
    let metadata = file
        .metadata()
        .map_err(|error| Error::Unavailable(format!("cannot read the size of {digest}: {error}")))?;
    if !metadata.is_file() || metadata.file_type().is_socket() {
        return Err(Error::Corrupt { digest: *digest, reason: "it is not a file".to_owned() });
    }
    if metadata.len() != size {
        return Err(wrong_size(digest, metadata.len(), size));
    }
    Ok(Some(file))
}

/// A small blob file whole; `None`: there is none of this size, or it cannot be read.
pub(super) async fn read_file(root: &Path, digest: &Digest, size: u64) -> Option<Vec<u8>> {
    let mut content = open_file(blob_path(root, digest), digest, size).await.ok()??;
    let read = within(DISK, move || {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&mut content, MANIFEST_LIMIT), &mut bytes)?;
        Ok(bytes)
    });
    read.await.ok().filter(|bytes| bytes.len() as u64 == size)
}

/// Asks the disk; fails as a call to containerd does if it hangs.
pub(super) async fn disk<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<io::Result<T>, ApiError> {
    match within(DISK, work).await {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(ApiError::Failed(error.to_string())),
        answer => Ok(answer),
    }
}

pub(super) fn wrong_size(digest: &Digest, stored: u64, described: u64) -> Error {
    Error::Corrupt {
        digest: *digest,
        reason: format!("{stored} bytes are stored, {described} are described"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_checked_before_they_are_served() {
        let folder = tempfile::tempdir().unwrap();
        let digest = Digest::sha256(b"blob");
        let path = blob_path(folder.path(), &digest);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let open = |size| open_file(path.clone(), &digest, size);
        assert!(matches!(open(4).await, Ok(None)));
        std::fs::write(&path, "blob").unwrap();
        assert!(matches!(open(4).await, Ok(Some(_))));
        assert!(matches!(open(5).await, Err(Error::Corrupt { .. })));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(open(4).await, Err(Error::Unavailable(_))), "links are not followed");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(open(4).await, Err(Error::Corrupt { .. })));
    }
}
