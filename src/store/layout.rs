//! OCI image layouts, folders and archives, as stores: the way to seed an air-gapped cluster from one node.
//!
//! A folder is watched by looking every half second at `index.json` and the folders of blobs: that works on every file
//! system and needs none of the kernel's few inotify watches. Content is shown once it is complete: as long as its
//! descriptor says, or, for what no tree reaches, unchanged since the last look. Bytes of blobs are not hashed here;
//! whoever reads them verifies them. Only manifests are, since they decide what belongs to whom.
//!
//! An archive (`.tar`) is indexed once for each version of the file; its content is read in place.
//!
//! The layout is never changed. Unfinished downloads of `peili pull` in its `ingest` folder are the pull's own.

mod archive;
mod folder;
mod index;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::content::within;
use super::{Content, Error, Health, Provider, View, Watch, Watcher};
use crate::oci::{Digest, Name, ReferenceError, Registry};

use archive::Archive;
use scan::{Found, Scanner};

/// How often the layout is looked at.
const POLL: Duration = Duration::from_millis(500);

/// How long a look or an opening may take before the layout counts as hanging (a dead network file system).
const HANG: Duration = Duration::from_secs(5);

/// `layout:PATH[,name=REGISTRY/REPOSITORY]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Folder or archive.
    pub path: PathBuf,
    /// The repository of images that have no full name of their own.
    pub name: Option<Name>,
}

/// Why a text is not a layout's specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Another kind of store.
    #[error("`{0}` is not of the form layout:PATH[,name=REGISTRY/REPOSITORY]")]
    Form(String),
    /// No path.
    #[error("`layout:` needs the path of a folder or of a .tar file")]
    Path,
    /// A comma that begins no option.
    #[error(
        "`{0}` after the comma is not an option; the only one is name=..., and a path must not have a comma"
    )]
    Option(String),
    /// More than one name.
    #[error("name= is given twice")]
    Twice,
    /// The name has no registry.
    #[error("name=`{0}` must begin with a registry, as in name=registry.example/team/app")]
    Registry(String),
    /// The name is none.
    #[error("name=: {0}")]
    Name(#[from] ReferenceError),
    /// Compressed archives cannot be read in place.
    #[error("`{0}` is compressed; unpack it to a .tar file, of which blobs can be served in place")]
    Compressed(String),
}

/// A layout as a store. Dropping it ends its task.
#[derive(Debug)]
pub struct LayoutStore {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    view: View,
    /// The archive, if the layout is one.
    archive: Mutex<Option<Arc<Archive>>>,
    /// Content was taken out of the view since the last look began, whatever that look found.
    doubt: AtomicBool,
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let short = |text: &str| text.chars().take(80).collect::<String>();
        let rest = text.strip_prefix("layout:").ok_or_else(|| SpecError::Form(short(text)))?;
        let mut parts = rest.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(SpecError::Path)?;
        if [".gz", ".tgz", ".zst", ".xz", ".bz2"].iter().any(|suffix| path.ends_with(suffix)) {
            return Err(SpecError::Compressed(short(path)));
        }
        let mut name = None;
        for part in parts {
            let Some(value) = part.strip_prefix("name=") else {
                return Err(SpecError::Option(short(part)));
            };
            if name.is_some() {
                return Err(SpecError::Twice);
            }
            if !value.split_once('/').is_some_and(|(host, _)| Registry::is_host(host)) {
                return Err(SpecError::Registry(short(value)));
            }
            name = Some(value.parse()?);
        }
        Ok(Self { path: path.into(), name })
    }
}

impl LayoutStore {
    /// Begins to watch a layout. It may be absent or broken: the health says so until it is there.
    ///
    /// Must be called within a tokio runtime.
    pub fn start(spec: Spec) -> Self {
        Self::start_polling(spec, POLL)
    }

    pub(crate) fn start_polling(spec: Spec, poll: Duration) -> Self {
        let shared = Arc::new(Shared {
            path: spec.path.clone(),
            view: View::new(),
            archive: Mutex::default(),
            doubt: AtomicBool::new(false),
        });
        let task = tokio::spawn(watch_layout(Arc::clone(&shared), Scanner::new(spec), poll)).abort_handle();
        Self { shared, task }
    }
}

impl Drop for LayoutStore {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch_layout(shared: Arc<Shared>, scanner: Scanner, poll: Duration) {
    let mut interval = tokio::time::interval(poll);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut scanner = Some(scanner);
    loop {
        interval.tick().await;
        let path = shared.path.clone();
        let mut current = scanner.take().unwrap_or_else(|| Scanner::new(Spec { path, name: None }));
        if shared.doubt.swap(false, Ordering::Acquire) {
            current.doubt();
        }
        let mut look = tokio::task::spawn_blocking(move || {
            let found = current.scan();
            (current, found)
        });
        let outcome = match timeout(HANG, &mut look).await {
            Ok(outcome) => outcome,
            Err(_) => {
                shared.degrade(&format!("reading {} takes more than {HANG:?}", shared.path.display()));
                look.await
            }
        };
        match outcome {
            Ok((current, found)) => {
                scanner = Some(current);
                shared.apply(found);
            }
            // Only a panic or the end of the runtime comes here; neither leaves a scanner to go on with.
            Err(error) => {
                shared.degrade(&format!("the watch has ended: {error}"));
                return;
            }
        }
    }
}

impl Shared {
    fn apply(&self, found: Found) {
        if let Some(archive) = found.archive {
            *self.archive.lock().unwrap_or_else(PoisonError::into_inner) = archive;
        }
        if let Some(snapshot) = found.snapshot {
            self.view.replace(snapshot);
        }
        match found.cause {
            Some(cause) => self.degrade(&cause),
            None => {
                if self.view.set_health(Health::Ready) {
                    tracing::info!(path = %self.path.display(), "layout is read");
                }
            }
        }
    }

    fn degrade(&self, cause: &str) {
        if self.view.set_health(Health::Degraded(cause.to_owned())) {
            tracing::warn!(cause, "cannot keep up with the layout");
        }
    }
}

#[async_trait]
impl Provider for LayoutStore {
    fn view(&self) -> &View {
        &self.shared.view
    }

    async fn open(&self, digest: &Digest, offset: u64) -> Result<Content, Error> {
        let size = self.shared.view.check_open(digest, offset)?.descriptor.size;
        let archive = self.shared.archive.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(archive) = archive {
            return archive.open(digest, size, offset);
        }
        let (path, digest) = (self.shared.path.clone(), *digest);
        let open = move || {
            let file = folder::open_blob(&path, &digest).map_err(io::Error::other)?;
            file.map(|file| Ok::<_, io::Error>((file.metadata()?.len(), file))).transpose()
        };
        let (stored, file) = match within(HANG, open).await {
            Ok(Some(opened)) => opened,
            Ok(None) => {
                self.shared.view.remove(&digest);
                self.shared.doubt.store(true, Ordering::Release);
                return Err(Error::NotFound(digest));
            }
            Err(error) => return Err(Error::Unavailable(error.to_string())),
        };
        if stored != size {
            let reason = format!("it has {stored} bytes, its descriptor says {size}");
            return Err(Error::Corrupt { digest, reason });
        }
        Ok(Content::file(file, size, offset))
    }

    /// Nothing: a layout has no runtime's downloads.
    async fn discard_ingests(&self, _digest: &Digest) -> Result<usize, Error> {
        Ok(0)
    }

    /// Nothing, likewise.
    async fn discard_stuck(&self, _digest: &Digest) -> Result<bool, Error> {
        Ok(false)
    }
}

impl Watcher for LayoutStore {
    fn watch(&self) -> Watch {
        self.shared.view.watch()
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.shared.view.health()
    }
}
