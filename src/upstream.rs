//! Registries: does one answer (an anonymous `GET /v2/` to the hosts that the runtime would ask next), and content from those
//! that the operator configured by name, which the mirror itself fetches where a policy says so.

pub mod credentials;
pub mod endpoint;
pub mod health;
pub mod hosts;
pub mod memory;
pub mod metrics;
pub mod named;
mod origin;
pub mod probe;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::oci::{ByteRange, Descriptor, Digest, Name, Registry, Repository, Tag};

pub use health::State;

/// Tells whether registries answer.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// Whether a host that the runtime would ask after this node answers for `registry`: status below 500, not 429.
    /// From a cache of 10 s; takes at most 300 ms.
    async fn answers(&self, registry: &Registry) -> bool;

    /// Whether the runtime has another host for `registry` than this node, by its configuration. Asks nobody.
    async fn is_open(&self, registry: &Registry) -> bool;

    /// What a tag stands for at its registry, asked as anybody may, without a password. Takes some seconds at most.
    ///
    /// # Errors
    /// Why it does not say.
    async fn resolve(&self, name: &Name, tag: &Tag) -> Result<Descriptor, FetchError>;
}

/// Whoever panicked with it has left nothing half done: each change is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fetches from the upstreams of the configuration.
#[async_trait]
pub trait Upstreams: Send + Sync {
    /// Whether there are none.
    fn is_empty(&self) -> bool;

    /// All of them, as they are now. Must not block.
    fn known(&self) -> Arc<[Known]>;

    /// What a tag stands for.
    ///
    /// # Errors
    /// Why it does not say.
    async fn resolve(&self, route: &Route, tag: &Tag) -> Result<Descriptor, FetchError>;

    /// A part of a content. Verifies nothing.
    ///
    /// # Errors
    /// Why there is none of it.
    async fn fetch(&self, route: &Route, want: &Want) -> Result<Fetched, FetchError>;

    /// Notes that an upstream sent what it should not: it is left alone for a while.
    fn blame(&self, upstream: &str, problem: &str);
}

/// An upstream, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// Prefixes of the repositories that may be taken from it.
    pub repositories: Arc<[String]>,
    /// How it does.
    pub state: State,
}

/// A repository at an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The upstream's name.
    pub upstream: Arc<str>,
    /// As it is called there.
    pub repository: Repository,
}

/// A part of a content that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The content.
    pub digest: Digest,
    /// It is asked for as a manifest, and not as a blob.
    pub is_manifest: bool,
    /// The first byte.
    pub start: u64,
    /// The offset after the last byte; `None`: to the end.
    pub end: Option<u64>,
    /// Only its size and type.
    pub head: bool,
}

/// A part of a content that comes.
pub struct Fetched {
    /// The whole, by the upstream's word.
    pub descriptor: Descriptor,
    /// What `body` carries, within what was wanted.
    pub range: ByteRange,
    /// The bytes, or an error where they end early or stop coming; never more than `range`. Empty for [`Want::head`].
    pub body: BoxStream<'static, io::Result<Bytes>>,
}

/// Why an upstream gives nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// It has not got it.
    #[error("has not got it")]
    NotFound,
    /// It failed a moment ago, or has asked for a pause.
    #[error("is left alone for a while")]
    Held,
    /// It does not let this node have it.
    #[error("refuses it: {0}")]
    Refused(String),
    /// It cannot be reached, or broke off.
    #[error("{0}")]
    Failed(String),
    /// The range begins after the end.
    #[error("has no such range")]
    Range,
    /// No upstream of this name is configured, or not for this repository.
    #[error("is not configured for this repository")]
    Unknown,
}

/// Where the runtime's registry hosts are configured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// containerd's `config_path`: folders with one `hosts.toml` per registry.
    pub hosts_dirs: Vec<PathBuf>,
    /// How long one answer of a registry is believed.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub cache: Duration,
    /// How long a registry may take to answer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub limit: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hosts_dirs: vec!["/etc/containerd/certs.d".into()],
            cache: Duration::from_secs(10),
            limit: Duration::from_millis(300),
        }
    }
}
