//! The OCI distribution API for this node's own runtime: translates HTTP to `mirror` and back.
//!
//! To the runtime every "cannot serve" is 404, so that it goes to its next host; never 401, 405, 408, 429 or 5xx. The
//! cause stands in the body's `detail` and, since runtimes show nothing but the status line, in the reason phrase.
//! Credentials in a request are dropped unread. It decides nothing about content: that is [`Backend`], the mirror.
//!
//! `handler` carries a request through, `route` reads what it asks for, `respond` writes what the runtime gets, `lists`
//! answers for registries that cannot be reached.

mod handler;
mod lists;
mod metrics;
mod respond;
mod route;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::FutureExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::listener::{self, Admission, Clients, Limits, NotLoopback, Sockets};
use crate::mirror::{Answer, BlobRequest, Mirror, NotHere, Refusal, Target};
use crate::oci::{self, Digest, Name, Tag};
use crate::telemetry::Causes;
use crate::watchdog::Watchdog;

pub use lists::Referrer;
pub use metrics::{Amount, Metrics, Served};

/// The setting that names the addresses, as messages name it.
const LISTEN: &str = "registry.listen";

/// Connections at once. A runtime opens a few per pull, parallel fetches some dozens; each costs a descriptor and at
/// most some 100 KiB.
const CONNECTIONS: usize = 1024;

/// What answers the runtime: the mirror, or a twin in tests.
#[async_trait]
pub trait Backend: Send + Sync {
    /// How long an answer may take at most, where that is longer than the limit of the configuration.
    fn allowance(&self) -> Duration {
        Duration::ZERO
    }

    /// Answers a request for a manifest in `limit`, or in [`Backend::allowance`].
    async fn manifest(
        &self,
        name: &Name,
        target: &Target,
        head: bool,
        limit: Duration,
    ) -> Result<Answer, Refusal>;

    /// Answers a request for a blob in `limit`, or in [`Backend::allowance`].
    async fn blob(&self, request: BlobRequest, limit: Duration) -> Result<Answer, Refusal>;

    /// The tags of `name` that are held here, in any order. Asked only with [`Lists::Held`]. Must not block.
    fn tags(&self, name: &Name) -> Vec<Tag>;

    /// The manifests held here under `name` that are about `digest`, or why they are not told. Asked only with
    /// [`Lists::Held`].
    async fn referrers(&self, name: &Name, digest: &Digest) -> Result<Vec<Referrer>, NotHere>;
}

#[async_trait]
impl Backend for Mirror {
    fn allowance(&self) -> Duration {
        self.allowance()
    }

    async fn manifest(
        &self,
        name: &Name,
        target: &Target,
        head: bool,
        limit: Duration,
    ) -> Result<Answer, Refusal> {
        self.manifest(name, target, head, limit).await
    }

    async fn blob(&self, request: BlobRequest, limit: Duration) -> Result<Answer, Refusal> {
        self.blob(request, limit).await
    }

    fn tags(&self, name: &Name) -> Vec<Tag> {
        self.tags(name)
    }

    async fn referrers(&self, name: &Name, digest: &Digest) -> Result<Vec<Referrer>, NotHere> {
        let held = self.referrers(name, digest).await?.into_iter();
        Ok(held.filter_map(|(descriptor, manifest)| Referrer::parse(descriptor, &manifest)).collect())
    }
}

/// Where and how the runtime is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses that the runtime asks. Loopback stops pods without host networking; others need other `clients`.
    pub listen: Vec<SocketAddr>,
    /// Who may connect: who does reads every image that this node and its peers hold.
    pub clients: Clients,
    /// The registry of a request that names none (neither `ns` nor a host in its path).
    pub default_registry: String,
    /// Tag lists and referrers: `upstream` answers 404 so that the runtime asks upstream, `held` lists what is held
    /// here, for registries that cannot be reached.
    pub lists: Lists,
    /// A manifest request without a header after this time is answered 404: 10ms to 1m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub manifest_deadline: Duration,
    /// A blob request without a header after this time is answered 404: 10ms to 1m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub blob_deadline: Duration,
}

/// How lists are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Lists {
    /// 404: upstream has the whole list.
    Upstream,
    /// What is held here.
    Held,
}

/// A value that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An address that others reach, without leave.
    #[error(transparent)]
    NotLoopback(#[from] NotLoopback),
    /// `default-registry` is no registry.
    #[error("`registry.default-registry`: {0}")]
    DefaultRegistry(oci::ReferenceError),
    /// A deadline outside of its bounds.
    #[error("`registry.{setting}`: {value:?} is not between 10ms and 1m")]
    Deadline {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: Duration,
    },
}

/// The running registry.
pub struct Server {
    listener: listener::Server,
    settings: Arc<ArcSwap<handler::Settings>>,
    admission: Admission,
}

impl Config {
    /// Checks the values; logs the risk of addresses that are not loopback.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.clients.check(
            &self.listen,
            (LISTEN, "registry.clients"),
            "whoever reaches it reads every image that this node and its peers hold, without a password",
        )?;
        handler::Settings::new(self).map(drop)
    }

    /// Whether going from this configuration to `new` needs a restart; all else is applied live.
    pub fn needs_restart(&self, new: &Self) -> bool {
        self.listen != new.listen || self.clients != new.clients
    }

    /// Binds the configured addresses. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub fn bind(&self) -> Result<Sockets, listener::BindError> {
        Sockets::bind(LISTEN, &self.listen)
    }
}

impl Server {
    /// Serves `backend` on `sockets`. Its accept loops are hearts of `watchdog`.
    ///
    /// # Errors
    /// A value of `config` that cannot be.
    pub fn start(
        sockets: Sockets,
        config: &Config,
        backend: Arc<dyn Backend>,
        metrics: Metrics,
        causes: Arc<Causes>,
        watchdog: Option<&Watchdog>,
    ) -> Result<Self, ConfigError> {
        let settings = Arc::new(ArcSwap::from_pointee(handler::Settings::new(config)?));
        let admission = config.clients.admission(metrics.refused.clone());
        let handler =
            Arc::new(handler::Handler { settings: Arc::clone(&settings), backend, metrics, causes });
        let handler: listener::Handler =
            Arc::new(move |request| Arc::clone(&handler).answer(request).boxed());
        let mut limits = Limits::new(admission.clone(), CONNECTIONS);
        limits.malformed = Some(respond::malformed());
        let listener = listener::Server::start(sockets, limits, &handler, "registry accept", watchdog);
        Ok(Self { listener, settings, admission })
    }

    /// The addresses that are bound, with their real ports.
    pub fn addresses(&self) -> &[SocketAddr] {
        self.listener.addresses()
    }

    /// Who may connect, and who was turned away.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Applies what can be changed while running: all but `listen` and `clients`.
    ///
    /// # Errors
    /// A value that cannot be; the old ones stay.
    pub fn apply(&self, config: &Config) -> Result<(), ConfigError> {
        self.settings.store(Arc::new(handler::Settings::new(config)?));
        Ok(())
    }

    /// Stops accepting and lets answers end for at most `limit`; whether all of them did.
    pub async fn drain(self, limit: Duration) -> bool {
        self.listener.drain(limit).await
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![([127, 0, 0, 1], 5000).into(), (std::net::Ipv6Addr::LOCALHOST, 5000).into()],
            clients: Clients::Loopback,
            default_registry: "docker.io".into(),
            lists: Lists::Upstream,
            manifest_deadline: Duration::from_secs(1),
            blob_deadline: Duration::from_secs(3),
        }
    }
}

#[cfg(test)]
mod tests;
