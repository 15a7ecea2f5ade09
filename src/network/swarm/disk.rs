//! The view on disk, so that a node that starts again knows at once what it knew, and whom to ask. Written now and then and at
//! the end; a file that is cut short, damaged, too old or of another version costs nothing but its use.
//!
//! The file holds [`HEADER`], the time (seconds since 1970, eight bytes, little-endian), the view's parts as frames of the
//! gossip, each after its length (four bytes, big-endian), and the SHA-256 of all that. Blocks on the disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::super::gossip::wire::{self, Bulk, Frame};
use super::super::gossip::{FORGET, Ms};
use crate::network::identity::open;
use crate::oci::Digest;

/// Name of the file within the state folder.
const FILE: &str = "view";
/// Begins the file; the number is the version of the format.
const HEADER: &[u8] = b"peili-view 1\n";
const DIGEST: usize = 32;
/// Ten times the view of 5,000 nodes.
const SIZE_LIMIT: u64 = 128 << 20;
/// A view of this age is taken as it is: the others remember for twice as long who has died since.
const FRESH: Duration = Duration::from_millis(FORGET as Ms / 2);

/// A view that was kept.
pub(super) struct Kept {
    pub(super) parts: Vec<Bulk>,
    /// Seconds.
    pub(super) age: u64,
    /// See [`crate::network::gossip::Gossip::restore`].
    pub(super) is_fresh: bool,
}

/// Why there is none, although there is a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is larger than {} MiB", SIZE_LIMIT >> 20)]
    TooLarge,
    #[error("it is of another version of Peili")]
    Version,
    #[error("it is damaged or cut short")]
    Damaged,
}

pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// The bytes of the file.
pub(super) fn encode(parts: impl Iterator<Item = Bulk>, now: SystemTime) -> Vec<u8> {
    let mut bytes = [HEADER, &seconds(now).to_le_bytes()].concat();
    for part in parts {
        let frame = wire::encode(&Frame { bulk: Some(part), ..Frame::default() });
        bytes.extend((frame.len() as u32).to_be_bytes());
        bytes.extend(frame);
    }
    let digest = Digest::sha256(&bytes);
    bytes.extend(digest.as_bytes());
    bytes
}

/// Writes the file, whole or not at all.
pub(super) fn write(folder: &Path, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(io::Error::other(format!("it would have {} MiB", bytes.len() >> 20)));
    }
    let temporary = folder.join(format!(".{FILE}.new"));
    // Its digest tells whether all of it reached the disk before the machine stopped.
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&temporary, path(folder)));
    if written.is_err() {
        // The error that matters is the first one; what stays is replaced by the next attempt.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Reads the file; `None`: there is none.
pub(super) fn read(folder: &Path, now: SystemTime) -> Result<Option<Kept>, ReadError> {
    let file = match open(&path(folder)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file").into());
    }
    let mut bytes = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(ReadError::TooLarge);
    }
    decode(bytes, now).map(Some)
}

fn decode(bytes: Vec<u8>, now: SystemTime) -> Result<Kept, ReadError> {
    if bytes.starts_with(b"peili-view ") && !bytes.starts_with(HEADER) && bytes.len() >= HEADER.len() {
        return Err(ReadError::Version);
    }
    let bytes = bytes::Bytes::from(bytes);
    let content = bytes.len().checked_sub(DIGEST).filter(|length| *length >= HEADER.len() + 8);
    let content = bytes.slice(..content.ok_or(ReadError::Damaged)?);
    if Digest::sha256(&content).as_bytes()[..] != bytes[content.len()..] || !content.starts_with(HEADER) {
        return Err(ReadError::Damaged);
    }
    let (written, mut rest) = content[HEADER.len()..].split_first_chunk::<8>().ok_or(ReadError::Damaged)?;
    let mut parts = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let frame = after.get(..length).ok_or(ReadError::Damaged)?;
        let frame = wire::decode(content.slice_ref(frame)).map_err(|_| ReadError::Damaged)?;
        parts.extend(frame.bulk);
        rest = &after[length..];
    }
    // A time that is still to come says nothing.
    let age = seconds(now).checked_sub(u64::from_le_bytes(*written));
    let is_fresh = age.is_some_and(|age| age < FRESH.as_secs());
    Ok(Kept { parts, age: age.unwrap_or(0), is_fresh })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::super::gossip::wire::BulkMember;
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn parts() -> Vec<Bulk> {
        let members = vec![BulkMember { record: vec![1; 200].into(), epoch: 1, version: 2 }];
        let one = Bulk { members, ..Bulk::default() };
        let other = Bulk { holdings: vec![7; 5000].into(), last: true, ..Bulk::default() };
        vec![one, other]
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path(), at(0)).unwrap().is_none());
        for _ in 0..2 {
            write(folder.path(), &encode(parts().into_iter(), at(1000))).unwrap();
        }
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [FILE]);
        for (now, age, is_fresh) in [(1000, 0, true), (1299, 299, true), (1300, 300, false), (999, 0, false)]
        {
            let kept = read(folder.path(), at(now)).unwrap().unwrap();
            assert_eq!((kept.parts, kept.age, kept.is_fresh), (parts(), age, is_fresh));
        }
    }

    #[test]
    fn what_is_cut_short_or_changed_is_not_taken() {
        let good = encode(parts().into_iter(), at(1000));
        for length in 0..good.len() {
            assert!(matches!(decode(good[..length].to_vec(), at(1000)), Err(ReadError::Damaged)), "{length}");
        }
        for place in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[place] ^= 0x10;
            assert!(decode(bad, at(1000)).is_err(), "{place}");
        }
        let other = [b"peili-view 2\n", &good[HEADER.len()..]].concat();
        assert!(matches!(decode(other, at(1000)), Err(ReadError::Version)));
        // A digest is easily made; what it is of is looked at all the same.
        let mut bytes = [HEADER, &[0; 8], &100_u32.to_be_bytes(), b"short"].concat();
        bytes.extend(Digest::sha256(&bytes).as_bytes());
        assert!(matches!(decode(bytes, at(0)), Err(ReadError::Damaged)));
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(path(folder.path())).unwrap();
        assert!(matches!(read(folder.path(), at(0)), Err(ReadError::Io(_))));
        assert!(write(folder.path(), b"x").is_err());
        fs::remove_dir(path(folder.path())).unwrap();
        symlink("/dev/zero", path(folder.path())).unwrap();
        assert!(matches!(read(folder.path(), at(0)), Err(ReadError::Io(_))));
        assert!(write(Path::new("/nonexistent"), b"x").is_err());
    }
}
