//! The state of a node, as `/status` gives it and `peili status` reads it.

use serde::{Deserialize, Serialize};

use crate::election;
use crate::network;
use crate::oci;
use crate::policy;
use crate::registry::{self, Amount};
use crate::store::Health;
use crate::telemetry::Cause;

/// The state of a node. Fields are only ever added; a change of meaning is a new version.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// [`Status::VERSION`].
    pub version: u32,
    /// Who it is.
    pub node: Node,
    /// What it holds.
    pub store: Store,
    /// Whom it knows.
    pub network: network::Status,
    /// The policies in force, in their order.
    pub policies: Vec<policy::Loaded>,
    /// Why those that are configured are not; empty: they are, or are waited for.
    pub policies_refused: String,
    /// Who does what for all nodes.
    pub election: election::Status,
    /// The upstreams of the configuration, in their order.
    pub upstreams: Vec<Upstream>,
    /// Registries whose tags were asked for lately, and whether they answer this node; the latest first.
    pub registries: Vec<AskedRegistry>,
    /// What it gave, and where that came from.
    pub served: Served,
    /// What this node found when it last looked why its elections are degraded.
    pub diagnosis: Diagnosis,
    /// What is wrong now, one line each, with what to do about it.
    pub problems: Vec<String>,
    /// Why it did not serve, the latest first.
    pub causes: Vec<Cause>,
}

/// Who a node is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Peer ID.
    pub peer_id: String,
    /// Kubernetes node name; empty: unknown.
    pub name: String,
    /// Zone; empty: unknown.
    pub zone: String,
    /// Why its identity ends with the process; empty: it does not.
    pub identity_problem: String,
    /// Why its data folder could not be written to at its start; empty: it could.
    pub data_problem: String,
    /// Peili's version.
    pub version: String,
    /// Seconds since its start.
    pub uptime_seconds: u64,
}

/// What a node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// Where it comes from: `containerd`, `layout:PATH`.
    pub source: String,
    /// Whether the view of it is right.
    pub health: StoreHealth,
    /// Image names.
    pub images: u64,
    /// Digests.
    pub digests: u64,
    /// Bytes of all digests, where that is known.
    pub bytes: Option<u64>,
}

/// [`Health`] as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum StoreHealth {
    /// Not yet read for the first time.
    #[default]
    Starting,
    /// Right.
    Ready,
    /// It may be old.
    Degraded {
        /// Why.
        reason: String,
    },
}

/// A registry that policies may name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Upstream {
    /// Its name.
    pub name: String,
    /// How it does.
    pub health: oci::Health,
    /// Milliseconds from a request to the head of its answer, smoothed.
    pub latency_millis: Option<u64>,
}

/// A registry of the runtime's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AskedRegistry {
    /// Its host, as images name it.
    pub name: String,
    /// Whether one of the hosts that stand for it answered the last probe.
    pub answers: bool,
}

/// What a node found when it looked for what is wrong, as `peili doctor` does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Diagnosis {
    /// How long ago it looked; `None`: nothing is wrong, or it did not look yet.
    pub age_seconds: Option<u64>,
    /// For how long it has not reached the API server; `None`: it does, or it is not known.
    pub unreached_seconds: Option<u64>,
    /// Other members that say that they reach it.
    pub members_reach: usize,
    /// Other members that say that they do not.
    pub members_lack: usize,
    /// What it found, the worst first.
    pub verdicts: Vec<Verdict>,
}

/// One thing that is wrong, as docs/doctor.md has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verdict {
    /// `api-blocked`
    pub code: String,
    /// `problem`, `warning`, `note`.
    pub severity: String,
    /// `high`, `medium`, `low`.
    pub confidence: String,
    /// In one sentence.
    pub text: String,
    /// What was seen.
    pub evidence: Vec<String>,
    /// What else it could be.
    pub other_causes: Vec<String>,
    /// What to do.
    pub fix: String,
}

/// What a node gave, and where that came from, since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Served {
    /// To its runtime, from its own store.
    pub local: Amount,
    /// To its runtime, from peers.
    pub from_peers: Amount,
    /// To its runtime, from upstreams of the configuration.
    pub from_upstreams: Amount,
    /// To peers.
    pub to_peers: Amount,
    /// Requests of its runtime that went on to the next host.
    pub not_here: u64,
}

impl Status {
    /// The version of what is written here.
    pub const VERSION: u32 = 1;
}

impl Node {
    /// What of it is wrong for as long as the process runs, one line each.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        [&self.data_problem, &self.identity_problem].into_iter().filter(|problem| !problem.is_empty())
    }
}

impl Served {
    /// What the registry served, and what went to peers.
    pub fn new(runtime: &registry::Served, to_peers: Amount) -> Self {
        Self {
            local: runtime.local,
            from_peers: runtime.peers,
            from_upstreams: runtime.upstream,
            to_peers,
            not_here: runtime.not_here,
        }
    }
}

impl From<Health> for StoreHealth {
    fn from(health: Health) -> Self {
        match health {
            Health::Starting => Self::Starting,
            Health::Ready => Self::Ready,
            Health::Degraded(reason) => Self::Degraded { reason },
        }
    }
}
