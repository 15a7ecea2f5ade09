//! Local content: what this node holds, under which names and repositories, and how to read it.
//!
//! Two seams. A [`Provider`] answers for content that is here now; a [`Watcher`] tells what is here and what changes.
//! Both answer from a view in memory ([`View`]), so that neither blocks: the adapters keep their view right in the
//! background and say by [`Health`] when they cannot. One conformance suite (`conformance`) runs against all of them.
//!
//! A store never asks another machine, never decides who may read what, and changes nothing, but for one thing: it
//! discards a poisoned download ([`Provider::discard_ingests`], [`Provider::discard_stuck`]).

mod content;
mod view;

pub mod conformance;
pub mod containerd;
pub mod layout;
pub mod memory;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};

use crate::oci::{Descriptor, Digest, Name, Reference};

pub use content::Content;
pub use view::{Counts, Held, Image, Snapshot, Source, View};

/// Answers for content that this node holds.
#[async_trait]
pub trait Provider: Send + Sync {
    /// What is held, under which names; kept right by the adapter.
    fn view(&self) -> &View;

    /// The descriptor that `name` stands for here. A reference with a digest is looked up by the digest, and only
    /// answers if this node knows the digest under that repository.
    fn resolve(&self, name: &Reference) -> Option<Descriptor> {
        self.view().resolve(name)
    }

    /// What is known about `digest`. `None`: not held here, or not listed by a configured namespace.
    fn describe(&self, digest: &Digest) -> Option<Arc<Blob>> {
        self.view().describe(digest)
    }

    /// Opens content at `offset`, which may be at its end but not after it. An open content can be read to its end
    /// even if it is deleted meanwhile, where the adapter reads files.
    async fn open(&self, digest: &Digest, offset: u64) -> Result<Content, Error>;

    /// Discards unfinished downloads of `digest` that began before this call: the runtime would otherwise resume on
    /// top of a wrong prefix. Returns how many. Stores without unfinished downloads have nothing to do.
    async fn discard_ingests(&self, digest: &Digest) -> Result<usize, Error>;

    /// Watches unfinished downloads of `digest`, of which a part may be wrong, for about a minute, longer while one
    /// grows, and discards one that is complete and wrong: the runtime would try to commit it for ever and ask nobody
    /// again. Whether it discarded one; `false` also if the content came to be held, or nobody downloads it, or a later
    /// call for the digest goes on with the watch.
    async fn discard_stuck(&self, digest: &Digest) -> Result<bool, Error>;
}

/// Tells what is held here and how that changes.
pub trait Watcher: Send + Sync {
    /// All that is held now, and then the changes, with no gap between the two.
    fn watch(&self) -> Watch;

    /// Whether the view can be kept right, and why not.
    fn health(&self) -> watch::Receiver<Health>;

    /// What goes worse than it could and says nothing against the view; `None`: nothing.
    fn problem(&self) -> Option<String> {
        None
    }

    /// Whether the task that keeps the view right still runs, or says of its end in the health.
    fn is_running(&self) -> bool {
        true
    }
}

/// A snapshot and the changes after it.
#[derive(Debug)]
pub struct Watch {
    /// Digests held when the watch began.
    pub held: Vec<Digest>,
    /// Changes since. A receiver that lags watches anew.
    pub changes: broadcast::Receiver<Change>,
}

/// One change of what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Complete and readable.
    Added(Digest),
    /// Gone, or no longer listed.
    Removed(Digest),
}

/// What is known about content that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Digest, size, and the media type by its parent or by the image record.
    pub descriptor: Descriptor,
    /// Repositories that this node knows it under: from the trees of image records, else from labels. Empty: unknown.
    pub repositories: Vec<Name>,
    /// Those of them whose registry may have any port: a label names it without, and no image record tells.
    pub portless: Vec<Name>,
}

/// Whether a store can keep its view right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet read for the first time.
    Starting,
    /// The view is right within the adapter's freshness.
    Ready,
    /// The view may be old; the reason, one line, names the cause.
    Degraded(String),
}

/// Why content cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not held here, or deleted since it was described.
    #[error("{0} is not held here")]
    NotFound(Digest),
    /// After the end of the content.
    #[error("offset {offset} is after the end of {digest}, which has {size} bytes")]
    Offset {
        /// The content.
        digest: Digest,
        /// What was asked for.
        offset: u64,
        /// Bytes that it has.
        size: u64,
    },
    /// The store cannot answer now: containerd is down or hangs, a disk fails.
    #[error("the store cannot answer: {0}")]
    Unavailable(String),
    /// What is stored is not what it should be: another size than described.
    #[error("{digest} is damaged in the store: {reason}")]
    Corrupt {
        /// The content.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
}

/// Where this node's content is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// `containerd`, or `layout:PATH[,name=REGISTRY/REPOSITORY]` for an OCI image layout folder or archive.
    pub source: String,
    /// containerd's socket.
    pub socket: PathBuf,
    /// containerd namespaces whose content is served.
    pub namespaces: Vec<String>,
    /// containerd's content root (`.../io.containerd.content.v1.content`) as mounted here. Absent: containerd is asked
    /// where it is; where it is not mounted, content is read over containerd's API.
    pub content_root: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            source: "containerd".into(),
            socket: "/run/containerd/containerd.sock".into(),
            namespaces: vec!["k8s.io".into()],
            content_root: None,
        }
    }
}
