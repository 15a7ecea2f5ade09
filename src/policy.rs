//! Policies: WebAssembly components that decide, where the mirror has something to decide.
//!
//! Owns plain types of requests and verdicts, one trait for each world, the rules by which the verdicts of a chain become one
//! ruling, and the generation of policies in force. It reads component files and nothing else of the system. It does not know
//! who asks, nor what is done with an answer. wasmtime stays in `engine`.
//!
//! A policy can decide and nothing more: it has bounded time and memory, and whatever it does instead of answering becomes
//! its failure verdict for that request alone.

pub mod cases;
mod chain;
mod config;
pub mod election;
mod engine;
mod files;
mod generation;
mod load;
mod loader;
pub mod metrics;
mod record;
pub mod registry;
mod shadow;
mod text;
pub mod trust;
mod world;

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use config::{Config, DATA_FILES, Data, Decisions, Failing, Limits, Lines, Mode, Plugin, Startup};
pub use engine::{EMBEDDED_LIMIT, Embedded, Facts, Noop, SIZE_LIMIT, compile_time, facts, world};
pub use files::component as read;
pub use generation::{Loaded, Policies};
pub use load::{LoadError, Stage};
pub use record::{LINE_LIMIT, Record};
pub use text::clean;

/// What a policy is told about a node, its own or a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its peer ID; always proved.
    pub id: String,
    /// Its Kubernetes name; empty: unknown.
    pub name: String,
    /// Where the name is from.
    pub name_provenance: Provenance,
    /// Its version of Peili.
    pub version: String,
    /// What it is labelled with.
    pub labels: Vec<Label>,
}

/// Where a fact about a node is from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provenance {
    /// The node says so.
    #[default]
    Claimed,
    /// Evidence was checked here.
    Verified,
    /// This node's configuration says so.
    Configured,
}

/// A label of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Such as [`ZONE_LABEL`].
    pub key: String,
    /// Its value.
    pub value: String,
    /// Where it is from.
    pub provenance: Provenance,
}

/// The label that says a node's zone (Kubernetes).
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The label of a zone; none where it is empty, which is unknown.
pub fn zone(zone: &str, provenance: Provenance) -> Vec<Label> {
    let label = |value: &str| Label { key: ZONE_LABEL.into(), value: value.into(), provenance };
    if zone.is_empty() { Vec::new() } else { vec![label(zone)] }
}

/// Why a verdict is what it is, in words that can be shown as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Kebab-case, at most 64 bytes.
    pub code: String,
    /// At most 256 bytes, escaped.
    pub message: String,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// What one policy said of one question, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Its name in the configuration.
    pub policy: String,
    /// Whether it counts.
    pub mode: Mode,
    /// What it took, in microseconds.
    pub micros: u64,
    /// Its verdict in one line.
    pub verdict: String,
}

/// A policy that did not answer, or whose answer is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Its time was up.
    #[error("its time was up")]
    Time,
    /// Its instructions were used up.
    #[error("its instructions were used up")]
    Fuel,
    /// It wanted more memory than it may have.
    #[error("it wanted more memory than it may have")]
    Memory,
    /// It called itself too often.
    #[error("its stack was full")]
    Stack,
    /// It panicked, or did what a component must not.
    #[error("it trapped: {0}")]
    Trap(String),
    /// Its answer breaks the contract.
    #[error("its verdict is invalid: {0}")]
    Invalid(String),
    /// It trapped on this input and others, and is asked about it once a second.
    #[error("it trapped on this before and is asked again in a second")]
    Quarantined,
    /// It could not be loaded, and there is nothing older.
    #[error("it is not loaded")]
    Absent,
}

impl Failure {
    /// Label in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Fuel => "fuel",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::Trap(_) => "trap",
            Self::Invalid(_) => "invalid",
            Self::Quarantined => "quarantined",
            Self::Absent => "absent",
        }
    }

    /// Whether the instance that failed is good for nothing more.
    fn is_trap(&self) -> bool {
        matches!(self, Self::Time | Self::Fuel | Self::Memory | Self::Stack | Self::Trap(_))
    }
}

/// The stricter of two limits; `None` is no limit.
fn least<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// A verdict in one line.
fn describe(decision: &str, reason: Option<&Reason>) -> String {
    reason.map_or_else(|| decision.to_owned(), |reason| format!("{decision} ({reason})"))
}
