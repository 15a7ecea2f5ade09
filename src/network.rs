//! Who is there and who holds what: the node's identity, its peers, and their inventories.
//!
//! Every node holds a full view, so [`Network::holders`] is a read of a map in memory and so is "nobody has it".
//! `gossip` keeps the views the same, as a pure state machine; `swarm` (libp2p) is its connections; `admission` says who
//! may be a member. No content travels here, only who has it, and what a tag means ([`Network::resolve`]).
//!
//! Enforces the [`Gate`](crate::oci::Gate): connections, records and tags of peers below the level that they need are refused here.

pub mod admission;
mod claim;
#[cfg(test)]
pub(crate) mod conformance;
pub mod facts;
pub mod gossip;
pub mod identity;
pub mod memory;
pub mod metrics;
pub mod swarm;
pub mod versions;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::oci::{Descriptor, Digest, PeerId, Reference};

/// The view of the other nodes, and the way to be seen by them.
#[async_trait]
pub trait Network: Send + Sync {
    /// Live and trusted peers that say that they hold `digest`, in no order; never this node. Must not block.
    fn holders(&self, digest: &Digest) -> Vec<Arc<Peer>>;

    /// The same, where this node's view is not complete yet: then a member whose view is is asked, for at most `limit`.
    async fn find(&self, digest: &Digest, limit: Duration) -> Vec<Arc<Peer>> {
        let _ = limit;
        self.holders(digest)
    }

    /// Live peers that are trusted for tags, in no order. Must not block.
    fn tag_peers(&self) -> Vec<Arc<Peer>>;

    /// Tells the peers of a change in what this node holds. Coalesced and sent in the background.
    fn advertise(&self, change: Advertisement);

    /// Asks `peer` what a tag means to it; `Ok(None)`: it does not know.
    async fn resolve(
        &self,
        peer: &PeerId,
        question: &TagQuestion,
        limit: Duration,
    ) -> Result<Option<Tagged>, ResolveError>;

    /// A snapshot for people and metrics.
    fn status(&self) -> Status;
}

/// A question about a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagQuestion {
    /// The tag, with its repository.
    pub name: Reference,
    /// Who is asked is the tag's home: it asks the registry, unless it did within this time.
    pub home: Option<Duration>,
}

/// What a tag means to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged {
    /// The manifest that it stands for.
    pub target: Descriptor,
    /// Since its registry said so; `None`: that is not known.
    pub age: Option<Duration>,
}

/// What a peer may ask of this node over the control plane; implemented by `mirror`, which knows what may be told to whom.
#[async_trait]
pub trait TagSource: Send + Sync {
    /// What `name` means here, if `peer` may know. Must not block.
    fn tag(&self, peer: &PeerId, name: &Reference) -> Option<Tagged>;

    /// The same, by its registry's word if what is known here is older than `fresh`. `None` also where this node has no right
    /// to ask there: the peer does it itself.
    async fn home_tag(&self, peer: &PeerId, name: &Reference, fresh: Duration) -> Option<Tagged> {
        let _ = fresh;
        self.tag(peer, name)
    }
}

/// Another node, as far as others need to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Proved by the connection over which the rest came.
    pub id: PeerId,
    /// Where its peer port listens: the address that it was reached at first, then those that it claims.
    pub transfer: Vec<SocketAddr>,
    /// Kubernetes node name, claimed; empty: unknown.
    pub node: String,
    /// Zone, claimed; empty: unknown.
    pub zone: String,
    /// Peili's version, claimed.
    pub version: String,
}

/// A peer that said who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPeer {
    /// What it said.
    pub peer: Arc<Peer>,
    /// Where its live connections come from, or the last ones came from; none: it was met through others.
    pub observed: Vec<std::net::IpAddr>,
}

/// A live member, this node among them, as elections see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who it is.
    pub peer: Arc<Peer>,
    /// What it says of itself.
    pub facts: facts::Facts,
    /// For how long it is silent, if it is suspected.
    pub suspected: Option<Duration>,
}

/// What changed in what this node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advertisement {
    /// All that is held; replaces what was told before.
    All(Vec<Digest>),
    /// Held from now on.
    Added(Digest),
    /// No longer held.
    Removed(Digest),
}

/// A snapshot of the view.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// This node's peer ID.
    pub id: String,
    /// Addresses that the control plane listens at.
    pub listening: Vec<String>,
    /// Peers that are or were known, by ID.
    pub peers: Vec<PeerStatus>,
    /// Digests that this node advertises.
    pub advertised: usize,
    /// Live members that it knows, itself included.
    #[serde(default)]
    pub members: usize,
    /// Whether it knows all that a member knows who knows all: until then it asks where it does not know.
    #[serde(default)]
    pub complete: bool,
    /// Who is admitted, and this node's own proof.
    #[serde(default)]
    pub admission: Option<admission::Status>,
    /// What bootstrap cannot reach, and why; one line each.
    pub problems: Vec<String>,
}

/// One peer in a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Peer ID.
    pub id: String,
    /// Claimed node name.
    pub node: String,
    /// Claimed zone.
    pub zone: String,
    /// Claimed version.
    pub version: String,
    /// Whether a proved connection to it is up.
    pub connected: bool,
    /// How it is by the word of the members; `None`: it is none of them.
    #[serde(default)]
    pub state: Option<MemberState>,
    /// For how long.
    #[serde(default)]
    pub seconds: u64,
    /// Whether this node gossips with it.
    #[serde(default)]
    pub neighbour: bool,
    /// Level in force.
    pub level: crate::oci::Level,
    /// By what it has that level: `listed`, `key <ID>`, `open`, `denied`; empty: by nothing.
    #[serde(default)]
    pub proof: String,
    /// Digests that it says it holds.
    pub holds: usize,
    /// Peer port addresses.
    pub transfer: Vec<SocketAddr>,
    /// Why it is not connected; empty if it is.
    pub problem: String,
}

/// How a member is by the word of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// This node knew it before it was started again, and has not heard of it since.
    Remembered,
    /// It lives.
    Alive,
    /// It is silent, and has a second to say that it lives.
    Suspected,
    /// It is gone.
    Dead,
    /// It said that it goes.
    Left,
}

/// Why a peer did not say what a tag means.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Not connected, or the connection failed.
    #[error("the peer cannot be reached: {0}")]
    Unreachable(String),
    /// No answer within the limit.
    #[error("the peer did not answer in time")]
    Timeout,
    /// It may not be asked, or it refused.
    #[error("the peer is not trusted for tags")]
    Denied,
}

/// How this node finds its peers and is found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses of the control plane. Port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// `address:port` of the control plane as peers reach it, where that differs from what it listens at.
    pub advertise: Vec<SocketAddr>,
    /// Names of a headless service with the control plane's port, `peili-peers.peili.svc:5001`; resolved again and again.
    pub dns: Vec<String>,
    /// Peers by identity: these are trusted, and all others are not unless they prove themselves by the cluster key.
    pub peers: Vec<PeerConfig>,
    /// Files with the cluster key, at least 32 random bytes (`peili cluster-key generate`): whoever has it is a member.
    /// Two while the key is replaced: the first one signs, both count. Read again when they change. With neither this nor
    /// `peers` the network is open: whoever comes may give and get blobs, but no tags.
    pub cluster_key: Vec<PathBuf>,
    /// Name of the cluster, the same on all of its nodes: 1 to 63 letters, digits, `.`, `_` and `-`.
    pub cluster: String,
    /// Peer IDs that are refused, whatever they show and whoever lists them.
    #[schemars(with = "Vec<String>")]
    pub deny: Vec<PeerId>,
}

/// One peer by identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PeerConfig {
    /// Its peer ID, as `peili identity` prints it there.
    #[schemars(with = "String")]
    pub id: PeerId,
    /// `host:port` of its control plane. None: it is found by DNS, or it connects here.
    #[serde(default)]
    pub addresses: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![([0, 0, 0, 0], 5001).into(), (std::net::Ipv6Addr::UNSPECIFIED, 5001).into()],
            advertise: Vec::new(),
            dns: Vec::new(),
            peers: Vec::new(),
            cluster_key: Vec::new(),
            cluster: "default".into(),
            deny: Vec::new(),
        }
    }
}
