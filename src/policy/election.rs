//! The election world: who leads. Views, rankings, and how rankings become one.
//!
//! It knows nothing of leases and memberships: who calls builds the view from facts that all nodes have alike, and does with
//! the ranking what its role needs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Reason, Said};

/// Largest weight that one policy gives (`wit/policy.wit`).
pub const WEIGHT_MAX: u16 = 1000;
/// Largest view, in bytes of its texts and of what each candidate takes beside them (`wit/policy.wit`).
pub const VIEW_LIMIT: usize = 4 << 20;
/// Longest text of a view, in bytes (`wit/policy.wit`).
pub const TEXT_LIMIT: usize = 1024;

/// How a role is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoleKind {
    /// Under a lease: the ranking only delays campaigns.
    Strict,
    /// By rendezvous over the membership.
    Advisory,
}

/// How weights make a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// By weight, ties by rendezvous hash.
    Ranked,
    /// Each key's rendezvous hash is weighted.
    Proportional,
}

/// What is led.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Role {
    /// `coordinator`, `introducers`, `tag-home`.
    pub name: String,
    /// How it is held.
    pub kind: RoleKind,
    /// How weights make a leader.
    pub selection: Selection,
    /// How many lead at once.
    pub seats: u32,
}

/// Whether a candidate reaches the API server, by its own signed word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reachability {
    /// It has not said.
    #[default]
    Unknown,
    /// It does.
    Reachable,
    /// It does not.
    Unreachable,
}

/// A node that may lead, with facts that all nodes have alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Its Kubernetes name; empty: unknown.
    pub name: String,
    /// Its version of Peili.
    pub version: String,
    /// Its zone.
    pub zone: Option<String>,
    /// Its labels; the order is theirs, so that it is the same everywhere.
    pub labels: BTreeMap<String, String>,
    /// Tenths of its capacity; more than 10 is 10.
    pub load: u8,
    /// How long it runs; policies see it rounded down to a power of two of milliseconds.
    pub uptime: Duration,
    /// Whether it reaches the API server.
    pub api_server: Reachability,
}

/// Who leads, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tenure {
    /// Index of the candidate.
    pub candidate: usize,
    /// How long it leads; rounded as [`Candidate::uptime`] is.
    pub duration: Duration,
}

/// What a ranking is made of. Whoever has the same policies and the same view gets the same ranking.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// What is led.
    pub role: Role,
    /// Live admitted members, sorted by peer ID.
    pub candidates: Vec<Candidate>,
    /// Who leads now.
    pub holder: Option<Tenure>,
}

/// When a leader makes room for a better candidate; the most reluctant first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Handover {
    /// It does not.
    Never,
    /// Once it has nothing to do.
    Idle,
    /// At once.
    Now,
}

/// What one policy says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranking {
    /// One for each candidate in order: 0 is ineligible, else 1 to [`WEIGHT_MAX`]. Empty: it abstains.
    pub weights: Vec<u16>,
    /// How long a leader stays before a better one may follow it.
    pub min_tenure: Option<Duration>,
    /// When it makes room for a better one.
    pub handover: Option<Handover>,
    /// Why.
    pub reason: Option<Reason>,
}

/// What all policies together say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranked {
    /// One for each candidate in order, and not all of them 0, which is ineligible; none: the built-in ranking, in which all
    /// candidates are equal.
    pub weights: Option<Vec<u32>>,
    /// The longest that any policy wants; none: the role's own.
    pub min_tenure: Option<Duration>,
    /// The most reluctant that any policy wants; none: the role's own.
    pub handover: Option<Handover>,
    /// How this came about.
    pub why: Why,
}

/// How a ranking came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Why {
    /// There is no policy whose ranking counts.
    #[default]
    NoPolicy,
    /// All abstain from weights.
    Abstained,
    /// These gave weights, in their order.
    Policies(Vec<Arc<str>>),
    /// One failed, so the built-in ranks.
    Failed(Arc<str>, Failure),
    /// Each candidate is excluded by one policy or another, so the built-in ranks.
    AllExcluded,
    /// The view is none that policies get, so the built-in ranks.
    View(&'static str),
}

/// Tells sets of policies apart that may rank the same view differently. It is the same on all nodes with the same contract,
/// engine, components and settings, and says nothing of them to who has not got the cluster key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EffectiveHash(pub [u8; 32]);

impl EffectiveHash {
    /// Of who ranks by the built-in: without a policy, or because its last ranking failed.
    pub const BUILT_IN: Self = Self([0; 32]);
}

impl fmt::Display for EffectiveHash {
    /// In hexadecimal; `builtin` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::BUILT_IN {
            return f.write_str("builtin");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Answers who is to lead. A ranking may take 20 ms of the caller's thread, ten times that where code must be interpreted, and
/// does not wait for anything but its own work; it always has an answer.
pub trait ElectionPolicy: Send + Sync {
    /// Whether there is any policy: without one a view need not be made.
    fn is_active(&self) -> bool;

    /// Another number whenever other policies are in force.
    fn generation(&self) -> i64;

    /// The ranking.
    fn rank(&self, view: &View) -> Ranked;

    /// The ranking, and what each policy said; it counts nowhere.
    fn explain(&self, view: &View) -> (Ranked, Vec<Said>) {
        (self.rank(view), Vec::new())
    }

    /// What the policies in force are; [`EffectiveHash::BUILT_IN`] without one whose ranking counts, and while the last ranking
    /// of any role failed. `key`: the cluster key, or none in an open cluster.
    fn hash(&self, key: Option<&[u8]>) -> EffectiveHash;
}

/// No policies.
#[derive(Clone, Copy, Debug)]
pub struct NoRanking;

impl ElectionPolicy for NoRanking {
    fn is_active(&self) -> bool {
        false
    }

    fn generation(&self) -> i64 {
        0
    }

    fn rank(&self, _: &View) -> Ranked {
        Ranked::default()
    }

    fn hash(&self, _: Option<&[u8]>) -> EffectiveHash {
        EffectiveHash::BUILT_IN
    }
}

impl Why {
    /// Whether something is wrong that an operator should see.
    pub fn is_fault(&self) -> bool {
        matches!(self, Self::Failed(..) | Self::AllExcluded | Self::View(_))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicy => f.write_str("no policy"),
            Self::Abstained => f.write_str("all policies abstain"),
            Self::Policies(names) => write!(f, "by {}", names.join(", ")),
            Self::Failed(policy, failure) => write!(f, "the policy `{policy}` failed: {failure}"),
            Self::AllExcluded => f.write_str("the policies together exclude each candidate"),
            Self::View(fault) => f.write_str(fault),
        }
    }
}

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Idle => "idle",
            Self::Now => "now",
        })
    }
}
