//! A layout in a tar file: indexed once, read in place.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use tar::EntryType;

use super::super::{Content, Error};
use super::folder::Mark;
use super::index::INDEX_LIMIT;
use super::scan::marker;
use crate::oci::Digest;

/// Members of one archive.
const MEMBERS_LIMIT: usize = 100_000;

/// Longest name of a member: `blobs/sha512/` and 128 digits take 141.
const NAME_LIMIT: usize = 1024;

/// Bytes that one member's headers may take. The tar format lets a long name be as long as the file.
const HEADERS_LIMIT: u64 = 64 << 10;

/// `oci-layout` has 30 bytes.
const MARKER_LIMIT: u64 = 4096;

/// An indexed archive. The open file outlives its name.
pub(super) struct Archive {
    file: Arc<File>,
    pub(super) index_json: Vec<u8>,
    blobs: HashMap<Digest, Member>,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    offset: u64,
    size: u64,
}

/// Reads headers within a budget, so that no header can make the reader keep more than that.
struct Headers {
    file: File,
    left: Rc<Cell<u64>>,
}

impl Archive {
    /// The mark of the file, if the layout is one.
    pub(super) fn mark(path: &Path) -> Option<Mark> {
        // Asked before it is opened: a pipe must not be.
        if !fs::metadata(path).ok()?.is_file() {
            return None;
        }
        Mark::of_file(&File::open(path).ok()?).ok()
    }

    /// Reads the headers of all members.
    pub(super) fn index(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        refuse_compressed(&file)?;
        let left = Rc::new(Cell::new(HEADERS_LIMIT));
        let headers =
            Headers { file: file.try_clone().map_err(|error| error.to_string())?, left: Rc::clone(&left) };
        let mut archive = tar::Archive::new(headers);
        let mut blobs = HashMap::new();
        let (mut index, mut layout) = (None, None);
        let unreadable = |error: io::Error| format!("not a readable tar file: {error}");
        for (count, entry) in archive.entries_with_seek().map_err(unreadable)?.enumerate() {
            let entry = entry.map_err(unreadable)?;
            left.set(HEADERS_LIMIT);
            if count == MEMBERS_LIMIT {
                return Err(format!("the archive has more than {MEMBERS_LIMIT} members"));
            }
            let name = entry.path_bytes();
            if name.len() > NAME_LIMIT {
                return Err(format!("a member's name is longer than {NAME_LIMIT} bytes"));
            }
            let Ok(name) = std::str::from_utf8(&name) else { continue };
            let name = name.strip_prefix("./").unwrap_or(name);
            let digest = name.strip_prefix("blobs/").and_then(|rest| rest.replacen('/', ":", 1).parse().ok());
            if digest.is_none() && !matches!(name, "index.json" | "oci-layout") {
                continue;
            }
            let kind = entry.header().entry_type();
            if !matches!(kind, EntryType::Regular | EntryType::Continuous) {
                return Err(format!(
                    "the member {name} is a {}, only plain files can be served",
                    describe(kind)
                ));
            }
            let member = Member { offset: entry.raw_file_position(), size: entry.size() };
            if member.offset.checked_add(member.size).is_none_or(|end| end > length) {
                return Err(format!("the archive ends within {name}"));
            }
            match (name, digest) {
                ("index.json", _) => index = Some(member),
                ("oci-layout", _) => layout = Some(member),
                // Of two members with one name, the last counts.
                (_, Some(digest)) => drop(blobs.insert(digest, member)),
                (_, None) => {}
            }
        }
        let layout = layout.ok_or("not an OCI image layout: oci-layout is missing")?;
        marker(read(&file, layout, MARKER_LIMIT))?;
        let index = index.ok_or("index.json is missing")?;
        let index_json = read(&file, index, INDEX_LIMIT).map_err(|error| format!("index.json: {error}"))?;
        Ok(Self { file: Arc::new(file), index_json, blobs })
    }

    /// All blobs, each marked by its place.
    pub(super) fn blobs(&self) -> HashMap<Digest, Mark> {
        let mark = |member: &Member| Mark {
            size: member.size,
            place: (0, member.offset),
            modified: (0, 0),
            changed: (0, 0),
        };
        self.blobs.iter().map(|(digest, member)| (*digest, mark(member))).collect()
    }

    /// A small blob.
    pub(super) fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, String> {
        let member = self.blobs.get(digest).ok_or_else(|| format!("{digest} has gone"))?;
        read(&self.file, *member, limit).map_err(|error| format!("{digest}: {error}"))
    }

    /// A blob from `offset`.
    pub(super) fn open(&self, digest: &Digest, size: u64, offset: u64) -> Result<Content, Error> {
        let member = *self.blobs.get(digest).ok_or(Error::NotFound(*digest))?;
        if member.size != size {
            let reason = format!("it has {} bytes, its descriptor says {size}", member.size);
            return Err(Error::Corrupt { digest: *digest, reason });
        }
        Ok(Content::part(Arc::clone(&self.file), member.offset, size, offset))
    }
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Archive").field("blobs", &self.blobs.len()).finish_non_exhaustive()
    }
}

impl Read for Headers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left.get()).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 && !buffer.is_empty() {
            return Err(io::Error::other(format!(
                "a member's headers are larger than {HEADERS_LIMIT} bytes"
            )));
        }
        let count = self.file.read(&mut buffer[..wanted])?;
        self.left.set(self.left.get() - count as u64);
        Ok(count)
    }
}

impl Seek for Headers {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// The magic numbers of gzip, zstd, xz and bzip2.
fn refuse_compressed(file: &File) -> Result<(), String> {
    let mut start = [0; 6];
    let count = file.read_at(&mut start, 0).map_err(|error| error.to_string())?;
    let magics: [&[u8]; 4] =
        [&[0x1f, 0x8b], &[0x28, 0xb5, 0x2f, 0xfd], &[0xfd, b'7', b'z', b'X', b'Z', 0], b"BZh"];
    if magics.iter().any(|magic| start[..count].starts_with(magic)) {
        return Err(
            "the archive is compressed; unpack it to a .tar file, of which blobs can be served in place"
                .into(),
        );
    }
    Ok(())
}

fn read(file: &File, member: Member, limit: u64) -> io::Result<Vec<u8>> {
    if member.size > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
    }
    let mut content = vec![0; usize::try_from(member.size).map_err(io::Error::other)?];
    file.read_exact_at(&mut content, member.offset)?;
    Ok(content)
}

fn describe(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Link => "hard link",
        EntryType::Symlink => "symbolic link",
        EntryType::Directory => "folder",
        EntryType::GNUSparse => "sparse file",
        _ => "special file",
    }
}
