//! Who belongs to the cluster: this node's membership certificate, and the judgement of those that peers show.
//!
//! A node that has the cluster key makes a certificate for its own peer ID and shows it; one that has the same key
//! judges it. Nothing is asked of anybody, so there is no authority that could be absent, and whoever has the key is a
//! full member until it is replaced on all nodes. Who was admitted is kept by [`Members`], which `trust` implements; what
//! that is worth is decided there. How a certificate travels is the business of who calls [`Admission::admit`].
//!
//! ```text
//!   key files --look, each second--> keys --> own certificate --> control plane, peer port
//!                                     |
//!   a peer's certificate --admit------+--> Members (trust's table, until the certificate's end)
//! ```

#[doc(hidden)]
pub mod certificate;
mod files;
pub mod key;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::Zeroizing;

use self::certificate::{Certificate, DecodeError, LIFE};
use self::files::Files;
use self::key::Key;
use super::Config;
use super::metrics::{Judged, Metrics};
use crate::oci::{KeyId, Members, PeerId};

/// Between two looks at the key files and at the time.
const INTERVAL: Duration = Duration::from_secs(1);
/// The time of day may be set back so far without a new certificate.
const STEP: Duration = Duration::from_secs(60);

/// What every surface says of an open network.
pub const OPEN: &str = "the network is open: neither `network.cluster-key` nor `network.peers` is set, so that whoever \
                        reaches the ports gets content from this node and gives it to it, but no tags; set one of them";

/// Who is admitted, by what is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Whoever comes, for `blobs`: neither a key nor a list is configured.
    Open,
    /// The listed peers.
    List,
    /// Whoever shows a certificate by the cluster key, and the listed peers.
    Key,
}

/// This node's part in the admission of members. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Admission {
    shared: Arc<Shared>,
}

/// A snapshot for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who is admitted.
    pub mode: Mode,
    /// Name of the cluster in certificates.
    pub cluster: String,
    /// IDs of the cluster keys in force; the first one signs.
    pub keys: Vec<String>,
    /// Unix seconds at which this node's own certificate ends; `None`: it has none.
    pub certificate_until: Option<u64>,
}

/// Why a peer was not admitted. Continues a sentence about that peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// This node cannot judge certificates.
    #[error("this node has no cluster key that it could be judged by")]
    NoKey,
    /// It shows nothing.
    #[error("it shows no membership certificate: has it the cluster key?")]
    Missing,
    /// What it shows is no certificate.
    #[error("its certificate cannot be read: {0}")]
    Malformed(DecodeError),
    /// A certificate of another version.
    #[error("its certificate is of version {0}, this node knows version 1: one of the two must be updated")]
    Version(u32),
    /// Of another cluster.
    #[error(
        "its certificate was made for the cluster `{theirs}`, this node is of `{ours}` (`network.cluster`)"
    )]
    Cluster {
        /// The certificate's.
        theirs: String,
        /// This node's.
        ours: String,
    },
    /// It shows what was made for somebody else.
    #[error("its certificate was made for another peer, {0}")]
    OtherPeer(PeerId),
    /// Signed by a key that this node has not got.
    #[error(
        "its certificate was signed by the key {0}, which this node does not have: is the key being replaced, or is one \
         of the two files wrong?"
    )]
    Key(KeyId),
    /// Forged or damaged.
    #[error("the signature of its certificate is wrong")]
    Signature,
    /// Its time is over.
    #[error(
        "its certificate expired {} ago: is this node's clock or that one's wrong?", humantime::format_duration(*ago)
    )]
    Expired {
        /// For how long.
        ago: Duration,
    },
    /// Nobody makes a certificate for so long.
    #[error(
        "its certificate ends in {}, and none is made for more than 24h: is this node's clock or that one's wrong?",
        humantime::format_duration(*ahead)
    )]
    TooLong {
        /// Until its end.
        ahead: Duration,
    },
    /// The certificate is right and the peer is denied by name.
    #[error("it is denied by `network.deny`")]
    Denied,
}

struct Shared {
    /// This node, and who takes note of others; `None`: it takes no part.
    node: Option<(PeerId, Arc<dyn Members>)>,
    metrics: Metrics,
    /// The time of day in Unix seconds.
    clock: Clock,
    /// Read by all; written under the lock of `files`.
    state: ArcSwap<State>,
    files: Mutex<Files>,
}

type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

struct State {
    mode: Mode,
    cluster: String,
    /// The first one signs.
    keys: Vec<Arc<Key>>,
    own: Option<Own>,
    problems: Vec<String>,
}

/// The certificate that this node shows.
#[derive(Clone)]
struct Own {
    bytes: Bytes,
    not_after: u64,
    made: Instant,
}

/// What is legal and should be known about a configuration, one line each. Blocks on the disk.
pub fn warnings(config: &Config) -> Vec<String> {
    let open = (config.admission() == Mode::Open).then(|| OPEN.to_owned());
    open.into_iter().chain(Files::open(&config.cluster_key).problems()).collect()
}

impl Config {
    /// Who is admitted.
    pub fn admission(&self) -> Mode {
        match (self.cluster_key.is_empty(), self.peers.is_empty()) {
            (false, _) => Mode::Key,
            (true, false) => Mode::List,
            (true, true) => Mode::Open,
        }
    }
}

impl Admission {
    /// Reads the key files; one that cannot be read is a problem in the status, and is waited for. Blocks on the disk.
    /// `peer` is this node.
    pub fn new(peer: PeerId, config: &Config, members: Arc<dyn Members>, metrics: Metrics) -> Self {
        let admission = Self::with(Some((peer, members)), config, metrics, Box::new(unix_time));
        admission.log(&[], &[]);
        admission
    }

    /// Admits nobody and shows nothing.
    pub fn off() -> Self {
        Self::with(None, &Config::default(), Metrics::default(), Box::new(unix_time))
    }

    fn with(
        node: Option<(PeerId, Arc<dyn Members>)>,
        config: &Config,
        metrics: Metrics,
        clock: Clock,
    ) -> Self {
        let files = Files::open(&config.cluster_key);
        let (keys, cluster) = (files.keys(), config.cluster.clone());
        let own = mint(&keys, &cluster, node.as_ref().map(|(peer, _)| peer), clock());
        let state = State { mode: config.admission(), cluster, keys, own, problems: files.problems() };
        metrics.admission_is(state.mode == Mode::Open, state.keys.len(), state.problems.len());
        let state = ArcSwap::from_pointee(state);
        let shared = Shared { node, metrics, clock, state, files: Mutex::new(files) };
        Self { shared: Arc::new(shared) }
    }

    /// As it would be at another time of day.
    #[cfg(test)]
    pub(crate) fn at(
        peer: PeerId,
        config: &Config,
        members: Arc<dyn Members>,
        clock: impl Fn(u64) -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self::with(Some((peer, members)), config, Metrics::default(), Box::new(move || clock(unix_time())))
    }

    /// The certificate to show; `None`: there is no key, or none yet.
    pub fn own(&self) -> Option<Bytes> {
        self.shared.state.load().own.as_ref().map(|own| own.bytes.clone())
    }

    /// Whether peers may prove themselves by a certificate here.
    pub fn by_key(&self) -> bool {
        self.shared.state.load().mode == Mode::Key
    }

    /// Whether anybody may come.
    pub fn is_open(&self) -> bool {
        self.shared.state.load().mode == Mode::Open
    }

    /// Judges what `peer` shows, and admits it until the certificate's end. The caller knows that it is `peer`: by the
    /// connection, or by its signature over the record in which the certificate came.
    ///
    /// # Errors
    /// Why not. Nothing is changed then: who was admitted before stays so until its end.
    pub fn admit(&self, peer: &PeerId, certificate: &[u8]) -> Result<(), Refused> {
        let admitted = self.judge(peer, certificate);
        self.shared.metrics.admission(match &admitted {
            Ok(()) => Judged::Admitted,
            Err(refused) => refused.outcome(),
        });
        admitted
    }

    fn judge(&self, peer: &PeerId, certificate: &[u8]) -> Result<(), Refused> {
        let state = self.shared.state.load();
        let Some(members) = self.members().filter(|_| !state.keys.is_empty()) else {
            return Err(Refused::NoKey);
        };
        if certificate.is_empty() {
            return Err(Refused::Missing);
        }
        let certificate = certificate::decode(certificate).map_err(|error| match error {
            DecodeError::Version(version) => Refused::Version(version),
            error => Refused::Malformed(error),
        })?;
        let keys = state.keys.iter().map(AsRef::as_ref);
        let time = certificate.verify(keys, &state.cluster, peer, (self.shared.clock)())?;
        if members.admit(peer, certificate.key, time) { Ok(()) } else { Err(Refused::Denied) }
    }

    /// Puts a changed configuration in force; `true`: the own certificate is another one, or members were dropped. Blocks
    /// on the disk.
    pub fn reconfigure(&self, config: &Config) -> bool {
        let mut files = self.files();
        files.configure(&config.cluster_key);
        let moved = self.shared.state.load().cluster != config.cluster;
        if moved && let Some(members) = self.members() {
            // They proved to be members of another cluster.
            members.sweep(&[]);
        }
        self.renew(&files, config.admission(), &config.cluster) || moved
    }

    /// Follows the key files and the time, and calls `changed` when the own certificate is another one or members were
    /// dropped: then certificates must be shown again, and the gate must be asked again about live connections.
    pub async fn follow(self, changed: impl Fn() + Send) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let admission = self.clone();
            // A look that panics is one that found nothing; the next one may.
            if tokio::task::spawn_blocking(move || admission.look()).await.unwrap_or(false) {
                changed();
            }
        }
    }

    /// What all members with this node's first cluster key know and nobody else; `None`: there is none.
    pub fn secret(&self) -> Option<Zeroizing<[u8; 32]>> {
        self.shared.state.load().keys.first().map(|key| key.secret())
    }

    /// For people.
    pub fn status(&self) -> Status {
        let state = self.shared.state.load();
        Status {
            mode: state.mode,
            cluster: state.cluster.clone(),
            keys: state.keys.iter().map(|key| key.id().to_string()).collect(),
            certificate_until: state.own.as_ref().map(|own| own.not_after),
        }
    }

    /// What is wrong, one line each, with what to do about it.
    pub fn problems(&self) -> Vec<String> {
        let state = self.shared.state.load();
        let open = (state.mode == Mode::Open && self.shared.node.is_some()).then(|| OPEN.to_owned());
        open.into_iter().chain(state.problems.iter().cloned()).collect()
    }

    /// One look at the files and at the time. Blocks on the disk.
    fn look(&self) -> bool {
        let mut files = self.files();
        files.look();
        let (mode, cluster) = {
            let state = self.shared.state.load();
            (state.mode, state.cluster.clone())
        };
        self.renew(&files, mode, &cluster)
    }

    /// Puts keys, mode and cluster in force, makes a new certificate where the present one is not right, and drops those
    /// whose time is over or whose key is gone.
    fn renew(&self, files: &Files, mode: Mode, cluster: &str) -> bool {
        let old = self.shared.state.load_full();
        let (keys, problems) = (files.keys(), files.problems());
        let (old_ids, ids) = (ids(&old.keys), ids(&keys));
        let stays = old_ids == ids && old.cluster == cluster && !self.is_due(&old);
        if !stays || old.mode != mode || old.problems != problems {
            let own = if stays {
                old.own.clone()
            } else {
                mint(&keys, cluster, self.peer(), (self.shared.clock)())
            };
            self.shared.metrics.admission_is(mode == Mode::Open, keys.len(), problems.len());
            let state = State { mode, cluster: cluster.to_owned(), keys, own, problems };
            self.shared.state.store(Arc::new(state));
            self.log(&old_ids, &old.problems);
        }
        let swept = self.members().is_some_and(|members| members.sweep(&ids));
        if swept {
            tracing::info!("members were dropped: their certificates ended, or their key is gone");
        }
        !stays || swept
    }

    /// Whether a new certificate is wanted: half of the present one's life is over, by either clock, or the time of day was
    /// set back, so that others would find it too long.
    fn is_due(&self, state: &State) -> bool {
        let Some(own) = &state.own else { return !state.keys.is_empty() };
        let left = own.not_after.saturating_sub((self.shared.clock)());
        own.made.elapsed() >= LIFE / 2 || left <= LIFE.as_secs() / 2 || left > (LIFE + STEP).as_secs()
    }

    /// Tells what is another than before.
    fn log(&self, old: &[KeyId], problems: &[String]) {
        let state = self.shared.state.load();
        for problem in state.problems.iter().filter(|problem| !problems.contains(problem)) {
            tracing::warn!(%problem, "the admission of members is degraded");
        }
        for problem in problems.iter().filter(|problem| !state.problems.contains(problem)) {
            tracing::info!(%problem, "no longer");
        }
        let keys = ids(&state.keys);
        if keys != old {
            tracing::info!(?keys, cluster = state.cluster, "cluster keys in force; the first one signs");
        }
    }

    fn peer(&self) -> Option<&PeerId> {
        self.shared.node.as_ref().map(|(peer, _)| peer)
    }

    fn members(&self) -> Option<&Arc<dyn Members>> {
        self.shared.node.as_ref().map(|(_, members)| members)
    }

    fn files(&self) -> std::sync::MutexGuard<'_, Files> {
        self.shared.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Refused {
    fn outcome(&self) -> Judged {
        match self {
            Self::NoKey => Judged::NoKey,
            Self::Missing => Judged::Missing,
            Self::Malformed(_) | Self::Version(_) => Judged::Malformed,
            Self::Cluster { .. } => Judged::Cluster,
            Self::OtherPeer(_) => Judged::OtherPeer,
            Self::Key(_) => Judged::UnknownKey,
            Self::Signature => Judged::Signature,
            Self::Expired { .. } | Self::TooLong { .. } => Judged::Time,
            Self::Denied => Judged::Denied,
        }
    }
}

/// A certificate for `peer` by the first key.
fn mint(keys: &[Arc<Key>], cluster: &str, peer: Option<&PeerId>, now: u64) -> Option<Own> {
    let not_after = now.saturating_add(LIFE.as_secs());
    let certificate = Certificate::new(keys.first()?, cluster, peer?, not_after);
    Some(Own { bytes: certificate.encode().into(), not_after, made: Instant::now() })
}

fn ids(keys: &[Arc<Key>]) -> Vec<KeyId> {
    keys.iter().map(|key| key.id()).collect()
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
