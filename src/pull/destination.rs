//! The layout folder that a pull writes: blobs by temporary file and rename, `index.json` under a lock.
//!
//! Several pulls, of several processes, may write one layout: each unfinished blob is locked by the pull that fetches
//! it, the others wait and then find it whole. Locks are `flock`s, which end with their process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use super::Error;
use crate::oci::{Descriptor, Digest, Reference};

/// Largest `index.json`; the layout store refuses larger ones too.
const INDEX_LIMIT: u64 = 4 << 20;

/// How often a lock is tried.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// How long a pull waits for another one's lock while the locked file does not grow.
const LOCK_LIMIT: Duration = Duration::from_secs(60);

/// Bytes read at once when content that is there is hashed.
const CHUNK: usize = 1 << 20;

/// A link in the place of a file is not followed: opening it fails with [`LOOP`]. Nor is a pipe waited for.
const NO_FOLLOW: i32 = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits().cast_signed();
const LOOP: i32 = Errno::LOOP.raw_os_error();

/// Pulls of one process that make the same layout at once write files of their own.
static ATTEMPTS: AtomicU32 = AtomicU32::new(0);

/// The annotation by which containerd names images in a layout.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// The tag (image specification, "Pre-Defined Annotation Keys").
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A layout folder.
pub(super) struct Folder {
    path: PathBuf,
}

/// An unfinished blob, locked until it is dropped.
pub(super) struct Partial {
    pub(super) file: File,
    /// Bytes that an earlier pull left.
    pub(super) length: u64,
    path: PathBuf,
    target: PathBuf,
}

impl Folder {
    /// Opens a layout, or makes one. A folder that holds something else is refused.
    pub(super) async fn open(path: PathBuf) -> Result<Self, Error> {
        blocking(path.clone(), move || {
            fs::create_dir_all(&path).map_err(io_error(&path))?;
            let marker = path.join("oci-layout");
            match fs::read(&marker) {
                Ok(content) => check_marker(&marker, &content)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    refuse_foreign(&path)?;
                    let (process, attempt) = (std::process::id(), ATTEMPTS.fetch_add(1, Ordering::Relaxed));
                    let temporary = path.join(format!("oci-layout.{process}-{attempt}"));
                    fs::write(&temporary, r#"{"imageLayoutVersion":"1.0.0"}"#)
                        .and_then(|()| fs::rename(&temporary, &marker))
                        .map_err(io_error(&marker))?;
                }
                Err(error) => return Err(io_error(&marker)(error)),
            }
            for folder in ["blobs/sha256", "blobs/sha512", "ingest"] {
                let folder = path.join(folder);
                fs::create_dir_all(&folder).map_err(io_error(&folder))?;
            }
            Ok(Self { path })
        })
        .await
    }

    /// Whether the content is there, whole and right. What is wrong is removed.
    pub(super) async fn has(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let (path, descriptor) = (self.blob(&descriptor.digest), descriptor.clone());
        blocking(path.clone(), move || {
            let right = match OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(&path) {
                Ok(file) => is_right(file, &descriptor).map_err(io_error(&path))?,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                // A link: what it leads to is not the layout's.
                Err(error) if error.raw_os_error() == Some(LOOP) => false,
                Err(error) => return Err(io_error(&path)(error)),
            };
            if !right {
                fs::remove_file(&path).map_err(io_error(&path))?;
            }
            Ok(right)
        })
        .await
    }

    /// The content of a manifest that [`Self::has`].
    pub(super) async fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let (path, size) = (self.blob(&descriptor.digest), descriptor.size);
        blocking(path.clone(), move || {
            let mut content = Vec::new();
            File::open(&path)
                .and_then(|file| file.take(size).read_to_end(&mut content))
                .map_err(io_error(&path))?;
            Ok(content)
        })
        .await
    }

    /// The unfinished file of a blob, or `None` if the blob is there by the time that its lock is free.
    pub(super) async fn partial(&self, descriptor: &Descriptor) -> Result<Option<Partial>, Error> {
        let digest = &descriptor.digest;
        let path = self.path.join("ingest").join(format!(
            "{}-{}.partial",
            digest.algorithm().as_str(),
            digest.hex()
        ));
        loop {
            let file = lock(&path).await?;
            if self.has(descriptor).await? {
                // A blob that came by another way leaves its partial file without use; one that another pull just
                // finished has none any more.
                remove_if_same(&path, &file).map_err(io_error(&path))?;
                return Ok(None);
            }
            if !is_same(&path, &file).map_err(io_error(&path))? {
                continue;
            }
            let mut length = file.metadata().map_err(io_error(&path))?.len();
            if length > descriptor.size {
                file.set_len(0).map_err(io_error(&path))?;
                length = 0;
            }
            return Ok(Some(Partial { file, length, path, target: self.blob(digest) }));
        }
    }

    /// Puts content that is verified already into its place.
    pub(super) async fn put(&self, descriptor: &Descriptor, content: Vec<u8>) -> Result<(), Error> {
        let Some(mut partial) = self.partial(descriptor).await? else { return Ok(()) };
        let path = partial.path.clone();
        blocking(path.clone(), move || {
            partial
                .file
                .set_len(0)
                .and_then(|()| partial.file.write_all(&content))
                .and_then(|()| partial.commit())
                .map_err(io_error(&path))
        })
        .await
    }

    /// Names `target` in `index.json`. An image of the same name is replaced, all others stay.
    pub(super) async fn record(&self, reference: &Reference, target: &Descriptor) -> Result<(), Error> {
        let held = lock(&self.path.join("ingest/index.lock")).await?;
        let (path, folder) = (self.path.join("index.json"), self.path.clone());
        let name = reference.to_string();
        let mut annotations = json!({ IMAGE_NAME: name });
        if let Some(tag) = &reference.tag {
            annotations[REF_NAME] = json!(tag.as_str());
        }
        let entry = json!({
            "mediaType": &*target.media_type,
            "digest": target.digest.to_string(),
            "size": target.size,
            "annotations": annotations,
        });
        blocking(path.clone(), move || {
            let mut index = read_index(&path)?;
            let images = index.entry("manifests").or_insert_with(|| json!([]));
            let Some(images) = images.as_array_mut() else {
                return Err(destination(&path, "its `manifests` is not a list"));
            };
            images.retain(|image| image["annotations"][IMAGE_NAME] != *name);
            images.push(entry);
            let text = serde_json::to_vec_pretty(&index).map_err(|e| io_error(&path)(e.into()))?;
            if text.len() as u64 > INDEX_LIMIT {
                return Err(destination(&path, "it would be larger than 4 MiB"));
            }
            let temporary = folder.join("ingest/index.json.partial");
            File::create(&temporary)
                .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_data()))
                .and_then(|()| fs::rename(&temporary, &path))
                .map_err(io_error(&path))?;
            drop(held);
            Ok(())
        })
        .await
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }
}

impl Partial {
    /// Puts the file into its place, on disk before it has its name.
    pub(super) fn commit(&self) -> io::Result<()> {
        self.file.sync_data()?;
        fs::rename(&self.path, &self.target)?;
        // The name too, before `index.json` leads to it.
        self.target.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

/// Opens and locks a file. Waits while another pull holds it and makes progress.
async fn lock(path: &Path) -> Result<File, Error> {
    let mut seen = 0;
    let mut since = Instant::now();
    loop {
        let opened = path.to_owned();
        match blocking(path.to_owned(), move || try_lock(&opened).map_err(io_error(&opened))).await? {
            Ok(file) => return Ok(file),
            Err(length) if length != seen => (seen, since) = (length, Instant::now()),
            Err(_) if since.elapsed() > LOCK_LIMIT => {
                return Err(destination(path, "another pull has locked it and makes no progress"));
            }
            Err(_) => {}
        }
        sleep(LOCK_POLL).await;
    }
}

/// The locked file, or its length if another pull holds it.
fn try_lock(path: &Path) -> io::Result<Result<File, u64>> {
    loop {
        // Whoever may write to the folder could plant a link to a file that only this process may write to.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(NO_FOLLOW);
        let file = options.open(path)?;
        match file.try_lock() {
            // The one who held it may have renamed or removed it since it was opened here.
            Ok(()) if !is_same(path, &file)? => {}
            Ok(()) => return Ok(Ok(file)),
            Err(fs::TryLockError::WouldBlock) => return Ok(Err(file.metadata()?.len())),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Whether `path` still is the file that was opened.
fn is_same(path: &Path, file: &File) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove_if_same(path: &Path, file: &File) -> io::Result<()> {
    if is_same(path, file)? { fs::remove_file(path) } else { Ok(()) }
}

fn is_right(mut file: File, descriptor: &Descriptor) -> io::Result<bool> {
    if file.metadata()?.len() != descriptor.size {
        return Ok(false);
    }
    let mut hasher = descriptor.digest.hasher();
    let mut buffer = vec![0; usize::try_from(descriptor.size).unwrap_or(CHUNK).clamp(1, CHUNK)];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish() == descriptor.digest),
            count => hasher.update(&buffer[..count]),
        }
    }
}

fn check_marker(path: &Path, content: &[u8]) -> Result<(), Error> {
    let marker: Value =
        serde_json::from_slice(content).map_err(|error| destination(path, &format!("not JSON: {error}")))?;
    match marker["imageLayoutVersion"].as_str() {
        Some(version) if version.starts_with("1.") => Ok(()),
        _ => Err(destination(path, "not an image layout of version 1")),
    }
}

/// A folder without `oci-layout` is made a layout only if it holds nothing else.
fn refuse_foreign(path: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(path).map_err(io_error(path))? {
        let name = entry.map_err(io_error(path))?.file_name();
        let name = name.to_string_lossy();
        // A pull that makes the same layout at this moment has made these.
        let ours = matches!(&*name, "blobs" | "ingest" | "index.json") || name.starts_with("oci-layout");
        if !ours {
            return Err(destination(path, &format!("not an OCI image layout, and not empty: it has {name}")));
        }
    }
    Ok(())
}

fn read_index(path: &Path) -> Result<Map<String, Value>, Error> {
    let mut content = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(INDEX_LIMIT + 1).read_to_end(&mut content).map_err(io_error(path))?,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let empty = json!({ "schemaVersion": 2, "mediaType": crate::oci::MANIFEST_MEDIA_TYPES[0] });
            return Ok(empty.as_object().cloned().unwrap_or_default());
        }
        Err(error) => return Err(io_error(path)(error)),
    };
    if content.len() as u64 > INDEX_LIMIT {
        return Err(destination(path, "larger than 4 MiB"));
    }
    serde_json::from_slice(&content).map_err(|error| destination(path, &format!("not JSON: {error}")))
}

/// Runs file work off the executor.
async fn blocking<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Io { path, source: io::Error::other(error) }),
    }
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path: path.clone(), source }
}

fn destination(path: &Path, reason: &str) -> Error {
    Error::Destination { path: path.to_owned(), reason: reason.into() }
}
