//! Reads the files of a generation, those of one folder from one state of it.
//!
//! Who publishes files at once swaps a symbolic link: `..data` in a folder that kubelet fills, or one that leads to the folder.
//! So each folder is resolved once for a generation and read through that handle; a swap in between gives the old files or
//! the new ones, and never some of both. Nothing is read that is not beneath a root, is no regular file, or is too large.
//! What the files are is not known here.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, open, openat, openat2, readlinkat};
use rustix::io::Errno;

use super::engine::SIZE_LIMIT;

/// All files of a generation, in bytes: 16 of the largest components. ConfigMaps have 1 MiB.
const TOTAL: u64 = 64 << 20;
/// How often a generation is begun anew because its folders were swapped while it was read.
const TRIES: usize = 8;
/// Symbolic links on the way to one file, where this process follows them itself.
const LINKS: usize = 8;

/// A file that is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) path: &'a Path,
    /// In bytes. Of what is longer, one byte more is read, so that it is seen to be longer.
    pub(super) limit: u64,
}

/// Why not all files were read.
#[derive(Debug)]
pub(super) struct Unread {
    /// The first that was not.
    pub(super) path: PathBuf,
    pub(super) error: io::Error,
    /// It is not there.
    pub(super) is_absent: bool,
    pub(super) hint: Option<&'static str>,
}

/// The folders of one generation.
#[derive(Default)]
struct Folders {
    /// By path, with what tells whether the path leads there still.
    open: HashMap<PathBuf, (OwnedFd, [u64; 2])>,
}

/// Reads all, each file once; whoever publishes meanwhile makes it begin anew.
pub(super) fn read(roots: &[PathBuf], wanted: &[Wanted<'_>]) -> Result<HashMap<PathBuf, Vec<u8>>, Unread> {
    let mut tries = 0;
    loop {
        tries += 1;
        let mut folders = Folders::default();
        match folders.read(roots, wanted) {
            // Kubelet removes the old folder as soon as the new one is in its place.
            Err(_) if tries < TRIES && folders.were_swapped(roots) => {}
            result => return result,
        }
    }
}

/// A component that is no part of a generation, with one byte of what is larger than [`SIZE_LIMIT`]. A pipe in its place is not waited
/// for.
///
/// # Errors
/// It cannot be read, or is no regular file.
pub fn component(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty())?;
    whole(&File::from(file), SIZE_LIMIT)
}

/// Where files are read from if nobody says so: their folders, without those that are beneath another.
pub(super) fn roots<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<PathBuf> {
    let mut folders: Vec<&Path> = paths.filter_map(Path::parent).collect();
    folders.sort_unstable();
    let mut roots: Vec<PathBuf> = Vec::new();
    for folder in folders {
        if !roots.iter().any(|root| folder.starts_with(root)) {
            roots.push(folder.to_owned());
        }
    }
    roots
}

impl Folders {
    fn read(
        &mut self,
        roots: &[PathBuf],
        wanted: &[Wanted<'_>],
    ) -> Result<HashMap<PathBuf, Vec<u8>>, Unread> {
        let mut files = HashMap::new();
        let mut left = TOTAL;
        for Wanted { path, limit } in wanted {
            if files.contains_key(*path) {
                continue;
            }
            let bytes = self.file(roots, path).and_then(|file| Ok(whole(&file, (*limit).min(left))?));
            let bytes = bytes.map_err(|fault| fault.of(path))?;
            let Some(rest) = left.checked_sub(bytes.len() as u64) else {
                let text = "the files of all policies have more than 64 MiB together";
                return Err(Fault::from(io::Error::other(text)).of(path));
            };
            left = rest;
            files.insert((*path).to_owned(), bytes);
        }
        Ok(files)
    }

    fn file(&mut self, roots: &[PathBuf], path: &Path) -> Result<File, Fault> {
        let root = root_of(roots, path).ok_or(Fault::Outside)?;
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Fault::Outside);
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = beneath(self.folder(root, folder)?, name.as_ref(), flags)?;
        Ok(file.into())
    }

    /// The folder `path`, at or beneath `root`; where kubelet fills it, the state that it published last.
    fn folder(&mut self, root: &Path, path: &Path) -> Result<&OwnedFd, Fault> {
        if !self.open.contains_key(path) {
            let folder = self.open_folder(root, path)?;
            self.open.insert(path.to_owned(), folder);
        }
        Ok(&self.open[path].0)
    }

    fn open_folder(&mut self, root: &Path, path: &Path) -> Result<(OwnedFd, [u64; 2]), Fault> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let folder = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if path != root => {
                beneath(self.folder(root, parent)?, name.as_ref(), flags)?
            }
            _ => open(path, flags | OFlags::CLOEXEC, Mode::empty())?,
        };
        let data = || beneath(&folder, Path::new("..data"), flags);
        let is_link = || readlinkat(&folder, "..data", Vec::new()).is_ok();
        let mut found = data();
        // It leads to a state that was taken away since it was looked at: by its name alone each file could be of another state.
        for _ in 0..TRIES {
            if !(matches!(found, Err(Errno::NOENT)) && is_link()) {
                break;
            }
            found = data();
        }
        let folder = match found {
            Ok(data) => data,
            Err(Errno::NOENT) if !is_link() => folder,
            Err(error) => return Err(error.into()),
        };
        let stat = fstat(&folder)?;
        Ok((folder, [stat.st_dev, stat.st_ino]))
    }

    /// Whether a path leads to another folder now.
    fn were_swapped(&self, roots: &[PathBuf]) -> bool {
        let mut now = Self::default();
        self.open.iter().any(|(path, (_, known))| {
            root_of(roots, path)
                .is_some_and(|root| now.folder(root, path).is_ok() && now.open[path].1 != *known)
        })
    }
}

/// The outermost root of a path, so that all that is beneath it is of one state.
fn root_of<'a>(roots: &'a [PathBuf], path: &Path) -> Option<&'a PathBuf> {
    roots.iter().filter(|root| path.starts_with(root)).min_by_key(|root| root.as_os_str().len())
}

/// Opens the entry `name` of a folder, or what it leads to as long as that is beneath the folder.
fn beneath(folder: &OwnedFd, name: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match openat2(folder, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
        // Kernels before 5.6, and sandboxes that do not know the call.
        Err(Errno::NOSYS | Errno::PERM) => walk(folder, name, flags | OFlags::CLOEXEC, LINKS),
        result => result,
    }
}

/// The same in steps, each of which follows no link by itself.
fn walk(folder: &OwnedFd, path: &Path, flags: OFlags, links: usize) -> Result<OwnedFd, Errno> {
    let mut at = folder.as_fd().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
    let mut names = path.components().filter(|part| *part != Component::CurDir).peekable();
    while let Some(part) = names.next() {
        let Component::Normal(name) = part else { return Err(Errno::XDEV) };
        let is_last = names.peek().is_none();
        let flags = if is_last { flags } else { OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC };
        at = match readlinkat(&at, name, Vec::new()) {
            Ok(_) if links == 0 => return Err(Errno::LOOP),
            Ok(target) => {
                walk(&at, Path::new(std::ffi::OsStr::from_bytes(target.as_bytes())), flags, links - 1)?
            }
            // It is no link.
            Err(Errno::INVAL) => openat(&at, name, flags | OFlags::NOFOLLOW, Mode::empty())?,
            Err(error) => return Err(error),
        };
    }
    Ok(at)
}

/// The whole of a regular file of bounded size. A pipe in its place is not waited for.
fn whole(file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let before = file.metadata()?;
    if !before.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    let after = file.metadata()?;
    // Not by the time of change: that its name goes away is none of its content.
    let state = |of: &fs::Metadata| (of.len(), of.mtime(), of.mtime_nsec());
    if state(&before) != state(&after) {
        return Err(io::Error::other("it was written to while it was read"));
    }
    Ok(bytes)
}

enum Fault {
    /// Beneath no root.
    Outside,
    Io(io::Error),
}

impl Fault {
    fn of(self, path: &Path) -> Unread {
        let path = path.to_owned();
        let escape = "it leads out of its folder";
        let (error, hint) = match self {
            Self::Outside => (
                io::Error::other("it is beneath none of policies.roots"),
                Some("add its folder to policies.roots, or move the file"),
            ),
            Self::Io(error) if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) => (
                io::Error::other(escape),
                Some(
                    "a symbolic link may lead only to what is beneath the folder that it is in; let `path` name the \
                     file itself",
                ),
            ),
            Self::Io(error) => (error, None),
        };
        let is_absent = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
        Unread { path, error, is_absent, hint }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Fault {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A file's device, number, size and times.
pub(super) type Stamp = [u64; 7];

/// What tells one state of a file from another; `None`: it is not there.
pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    Some([
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime().cast_unsigned(),
        metadata.mtime_nsec().cast_unsigned(),
        metadata.ctime().cast_unsigned(),
        metadata.ctime_nsec().cast_unsigned(),
    ])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What old kernels get is what the call of new ones gives, but for links upwards that stay beneath.
    #[test]
    fn steps_lead_where_the_call_does() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/deep")).unwrap();
        for file in ["secret", "root/file", "root/deep/file"] {
            fs::write(dir.path().join(file), file).unwrap();
        }
        for (target, link) in [
            ("file", "link"),
            ("./deep/file", "down"),
            ("deep", "folder"),
            ("../secret", "up"),
            ("/etc/hostname", "absolute"),
            ("up", "twice"),
            ("loop", "loop"),
        ] {
            symlink(target, dir.path().join("root").join(link)).unwrap();
        }
        let root = open(dir.path().join("root"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let text = |fd: OwnedFd| String::from_utf8(whole(&fd.into(), 100).unwrap()).unwrap();
        for name in ["file", "link", "down", "folder/file", "up", "absolute", "twice", "loop", "absent"] {
            let called = beneath(&root, Path::new(name), flags).map(text);
            assert_eq!(walk(&root, Path::new(name), flags, LINKS).map(text), called, "{name}");
        }
    }

    /// Guards that half of one state and half of another are not taken for a file.
    #[test]
    fn what_is_written_to_meanwhile_is_not_taken() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let written = std::sync::atomic::AtomicBool::new(false);
        let refused = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !written.load(std::sync::atomic::Ordering::Relaxed) {
                    file.as_file().write_all_at(b"x", 0).unwrap();
                }
            });
            let ends = std::time::Instant::now() + std::time::Duration::from_secs(10);
            let mut refused = None;
            while refused.is_none() && std::time::Instant::now() < ends {
                refused = whole(&File::open(file.path()).unwrap(), 4 << 20).err();
            }
            written.store(true, std::sync::atomic::Ordering::Relaxed);
            refused
        });
        assert!(refused.unwrap().to_string().contains("was written to"));
        assert_eq!(whole(&File::open(file.path()).unwrap(), 4 << 20).unwrap().len(), 4 << 20);
    }
}
