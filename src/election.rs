//! Who does for all nodes what one of them should do: roles, and who holds them.
//!
//! Advisory roles are held by rendezvous over the membership: each node computes the same owners from the same facts, asks nobody, and
//! needs no API server. Where views differ, two nodes do the work of one, and nothing else. Knows no network and no clock of its
//! own: `app` brings the members and the time, policies come as a trait of `policy`.
//!
//! The strict role has its core in [`lease`]: pure, proved by simulation, and without a driver yet, so that no node leads by it so far.

pub mod lease;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Labels of one node, and the longest key or value in bytes.
pub const LABELS: usize = 8;
/// Longest key or value of a label, in bytes.
pub const LABEL_LIMIT: usize = 63;
/// Bytes of all labels of a node: its record has little room.
pub const LABELS_LIMIT: usize = 192;
/// Nodes that `election.nodes` may name.
pub const NODES: usize = 64;
/// Most introducers.
pub const INTRODUCERS: u32 = 16;

/// Who does for all nodes what one of them should do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// How roles are given.
    pub backend: Backend,
    /// With `backend: static`: the names of the nodes (`node.name`) that hold the roles, the first ones first. At most 64.
    pub nodes: Vec<String>,
    /// How many nodes newcomers are sent to first: 1 to 16.
    pub introducers: u32,
    /// Labels of this node that policies of elections see, besides its zone: at most 8, together at most 192 bytes.
    pub labels: BTreeMap<String, String>,
}

/// How roles are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// By the best that there is: without a Kubernetes API, as `gossip`.
    #[default]
    Auto,
    /// By each node's view of the members.
    Gossip,
    /// To the nodes that are named.
    Static,
    /// To nobody: each node for itself.
    Off,
}

impl Default for Config {
    fn default() -> Self {
        Self { backend: Backend::Auto, nodes: Vec::new(), introducers: 3, labels: BTreeMap::new() }
    }
}
