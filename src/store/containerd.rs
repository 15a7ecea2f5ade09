//! containerd's content store, by its gRPC API and its files: 1.6, 1.7 and 2.x.
//!
//! ```text
//! containerd --events, lists, infos--> synchronizer --model--> View --> Provider, Watcher
//!     ^                                     (one task)           |
//!     +---- blob files, or Read where they are not mounted ------+--> open
//! ```
//!
//! Construction never fails and nothing here ends the process: while containerd is absent, hangs or restarts, the
//! last view stands, its files stay readable, and [`Health`] names the cause. Only content that a configured
//! namespace lists is opened, although the files are shared by all namespaces.
//!
//! It changes nothing but one thing: it aborts ingests that are poisoned (`ingests`, `stuck`).

mod api;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod faults;
mod files;
mod ingests;
mod model;
mod stuck;
mod synchronizer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{Config, Content, Error, Health, Provider, View, Watch, Watcher};
use crate::oci::Digest;

use api::{Api, ApiError};
use files::{blob_path, open_file, wrong_size};
use synchronizer::Synchronizer;

/// Digests whose listing turned out to be old, on their way to the synchronizer. More are found by the next
/// reconciliation.
const RECHECKS: usize = 256;

/// The store of a running, or absent, containerd. Dropping it ends its tasks.
#[derive(Debug)]
pub struct ContainerdStore {
    shared: Arc<Shared>,
    rechecks: mpsc::Sender<Digest>,
    discards: ingests::Following,
    watches: ingests::Following,
    synchronizer: AbortOnDropHandle<()>,
}

/// What the synchronizer finds out and readers use.
#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    namespaces: Vec<String>,
    /// From the configuration: wins over what containerd says.
    configured_root: Option<PathBuf>,
    view: View,
    /// `None`: not connected.
    api: ArcSwapOption<Api>,
    /// The content root, if it can be read here.
    root: ArcSwapOption<PathBuf>,
}

impl ContainerdStore {
    /// Begins to follow the containerd of this configuration. Must be called in a tokio runtime.
    pub fn new(config: &Config) -> Self {
        let (namespaces, invalid): (Vec<_>, Vec<_>) =
            config.namespaces.iter().cloned().partition(|namespace| is_namespace(namespace));
        for namespace in invalid {
            tracing::error!(namespace, "not the name of a containerd namespace: left out");
        }
        let shared = Arc::new(Shared {
            socket: config.socket.clone(),
            namespaces,
            configured_root: config.content_root.clone(),
            view: View::new(),
            api: ArcSwapOption::empty(),
            root: ArcSwapOption::empty(),
        });
        let (rechecks, received) = mpsc::channel(RECHECKS);
        let synchronizer = tokio::spawn(Synchronizer::new(Arc::clone(&shared), received).run());
        Self {
            shared,
            rechecks,
            discards: ingests::Following::default(),
            watches: ingests::Following::default(),
            synchronizer: AbortOnDropHandle::new(synchronizer),
        }
    }

    /// Where blob files are read from; `None`: content is read over the API.
    pub fn content_root(&self) -> Option<PathBuf> {
        self.shared.root.load().as_deref().cloned()
    }

    /// Opens by the API in the first namespace that has it.
    async fn open_by_api(&self, digest: &Digest, size: u64, offset: u64) -> Result<Content, Error> {
        let api = self.shared.connected().map_err(|error| Error::Unavailable(error.to_string()))?;
        for namespace in &self.shared.namespaces {
            let found = api.info(namespace, digest).await;
            let read = match found {
                Ok(Some(entry)) if entry.size != size => return Err(wrong_size(digest, entry.size, size)),
                Ok(Some(_)) if offset == size => Ok(futures::stream::empty().boxed()),
                Ok(Some(_)) => api.read(namespace, digest, offset).await,
                Ok(None) => Err(ApiError::NotFound),
                Err(error) => Err(error),
            };
            match read {
                Ok(stream) => return Ok(Content::stream(stream, size, offset)),
                Err(ApiError::NotFound) => {}
                Err(ApiError::Failed(reason)) => return Err(Error::Unavailable(reason)),
            }
        }
        Err(Error::NotFound(*digest))
    }
}

#[async_trait]
impl Provider for ContainerdStore {
    fn view(&self) -> &View {
        &self.shared.view
    }

    async fn open(&self, digest: &Digest, offset: u64) -> Result<Content, Error> {
        let size = self.shared.view.check_open(digest, offset)?.descriptor.size;
        let root = self.shared.root.load_full();
        let opened = match &root {
            Some(root) => open_file(blob_path(root, digest), digest, size).await,
            None => Ok(None),
        };
        if let Some(file) = opened? {
            return Ok(Content::file(file, size, offset));
        }
        let content = self.open_by_api(digest, size, offset).await;
        match content {
            // The listing is old. A full queue is no loss: the next reader, or reconciliation, finds it too.
            Err(Error::NotFound(_)) => {
                if let Ok(recheck) = self.rechecks.try_reserve() {
                    self.shared.view.remove(digest);
                    recheck.send(*digest);
                }
                Err(Error::NotFound(*digest))
            }
            // No file where the files are, and nobody to ask: it was deleted.
            Err(Error::Unavailable(_)) if root.is_some() && self.shared.api.load().is_none() => {
                Err(Error::NotFound(*digest))
            }
            other => other,
        }
    }

    async fn discard_ingests(&self, digest: &Digest) -> Result<usize, Error> {
        let discard = || ingests::Discard::new(&self.shared, digest);
        let outcome = match self.discards.run(digest, |first| discard().follow(first)) {
            // It ends without an answer if a later call for the digest took over, or the store is gone.
            Some(first) => first.await.unwrap_or(Ok(0)),
            None => discard().run().await,
        };
        outcome.map_err(|error| Error::Unavailable(error.to_string()))
    }

    async fn discard_stuck(&self, digest: &Digest) -> Result<bool, Error> {
        let watch = stuck::Watch::new(&self.shared, digest);
        let outcome = match self.watches.run(digest, |outcome| watch.follow(outcome)) {
            Some(outcome) => outcome.await.unwrap_or(Ok(false)),
            None => {
                tracing::warn!(%digest, "too many downloads are watched: this one is not");
                Ok(false)
            }
        };
        outcome.map_err(|error| Error::Unavailable(error.to_string()))
    }
}

impl Watcher for ContainerdStore {
    fn watch(&self) -> Watch {
        self.shared.view.watch()
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.shared.view.health()
    }

    fn problem(&self) -> Option<String> {
        let goes_by_api = self.shared.api.load().is_some() && self.shared.root.load().is_none();
        goes_by_api.then(|| {
            "content comes over containerd's API, and not at all while that hangs, since containerd's content folder cannot be read here: mount it, \
             at its own path or at `store.content-root`"
                .to_owned()
        })
    }

    fn is_running(&self) -> bool {
        !self.synchronizer.is_finished()
    }
}

impl Shared {
    fn connected(&self) -> Result<Arc<Api>, ApiError> {
        self.api.load_full().ok_or_else(|| ApiError::Failed(self.cause()))
    }

    /// Why containerd cannot be asked now.
    fn cause(&self) -> String {
        match &*self.view.health().borrow() {
            Health::Degraded(reason) => reason.clone(),
            Health::Starting | Health::Ready => "not connected to containerd".to_owned(),
        }
    }
}

/// The version of the containerd that answers at a socket.
///
/// # Errors
/// Why none does, in one line.
pub async fn version(socket: &Path) -> Result<String, String> {
    Api::connect(socket).await.map(|(_, version)| version).map_err(|error| error.to_string())
}

/// containerd's grammar of identifiers: `[A-Za-z0-9]+([._-][A-Za-z0-9]+)*`, at most 76 characters. What does not keep
/// to it could end a filter's quotes.
pub fn is_namespace(text: &str) -> bool {
    let parts = |text: &str| text.split(['.', '_', '-']).all(|part| !part.is_empty());
    text.len() <= 76 && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c)) && parts(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_keep_to_the_grammar() {
        for name in ["k8s.io", "moby", "default", "a-b_c.d"] {
            assert!(is_namespace(name), "{name}");
        }
        for name in ["", ".", "a..b", "a b", r#"x",topic~="."#, "-a", "ü", &"a".repeat(77)] {
            assert!(!is_namespace(name), "{name}");
        }
    }

    #[tokio::test]
    async fn an_absent_containerd_is_named_and_nothing_is_served() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("containerd.sock");
        let store = ContainerdStore::new(&Config { socket: socket.clone(), ..Config::default() });
        let mut health = store.health();
        let degraded = health.wait_for(|health| matches!(health, Health::Degraded(_))).await.unwrap().clone();
        let expected = format!(
            "cannot connect to {}: No such file or directory; is the socket mounted?",
            socket.display()
        );
        assert_eq!(degraded, Health::Degraded(expected.clone()));
        let digest = Digest::sha256(b"");
        assert!(matches!(store.open(&digest, 0).await, Err(Error::NotFound(_))));
        match store.discard_ingests(&digest).await {
            Err(Error::Unavailable(reason)) => assert_eq!(reason, expected),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_socket_that_accepts_and_says_nothing_is_a_hang() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("containerd.sock");
        let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let store = ContainerdStore::new(&Config { socket, ..Config::default() });
        let mut health = store.health();
        let degraded = health.wait_for(|health| matches!(health, Health::Degraded(_))).await.unwrap().clone();
        let Health::Degraded(reason) = degraded else { unreachable!("waited for") };
        assert!(reason.starts_with("containerd does not answer ("), "{reason}");
    }
}
