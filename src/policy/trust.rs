//! The trust world: how far a peer is trusted. Requests, verdicts, and how verdicts become one ruling.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::world::World;
use super::{Config, Failing, Failure, Node, Plugin, Reason, Said, describe, least};
use crate::oci::Level;

/// Longest time that a grant stands (`wit/policy.wit`).
pub const TTL_LIMIT: Duration = Duration::from_mins(5);
/// Least rate of a grant, in bytes a second: below it a puller takes the peer for one that stalls.
pub const RATE_MIN: u64 = 256 << 10;
/// Shortest: what a policy costs is bounded by it.
pub const TTL_MIN: Duration = Duration::from_secs(1);

/// What was checked about a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Evidence {
    /// How it proved it.
    pub method: Method,
    /// What that says of it.
    pub claims: Vec<(Claim, String)>,
}

/// How a peer proves that it belongs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// It has the cluster key.
    ClusterKey,
    /// Its ID is on the operator's list.
    PeerIdList,
}

/// What a proof says of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Claim {
    /// Which cluster key it has.
    KeyId,
}

impl Method {
    /// Its name in the contract.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterKey => "cluster-key",
            Self::PeerIdList => "peer-id-list",
        }
    }
}

impl Claim {
    /// Its name in the contract.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KeyId => "key-id",
        }
    }
}

/// What this node has seen of a peer since it met it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conduct {
    /// Bytes that came from it.
    pub bytes: u64,
    /// Contents with a wrong digest that it had a part in.
    pub digest_mismatches: u32,
    /// Requests that it did not answer in time, or in mid-body no more.
    pub timeouts: u32,
    /// Answers that break the protocol.
    pub protocol_errors: u32,
    /// Since the last of these three.
    pub since_last_fault: Option<Duration>,
}

/// One peer, as policies see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What it says of itself; its ID is proved.
    pub peer: Node,
    /// Where its connections come from.
    pub observed: Vec<IpAddr>,
    /// Where it says that it is reached, as multiaddrs.
    pub announced: Vec<String>,
    /// What was checked.
    pub evidence: Vec<Evidence>,
    /// How it behaved.
    pub conduct: Conduct,
    /// The level in force; none for a newcomer.
    pub level: Level,
    /// The time of day.
    pub now: SystemTime,
}

/// What a peer may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What is believed and fetched from it.
    pub level: Level,
    /// Whether content held here is served to it.
    pub serve: bool,
    /// Contents that are sent to it at once.
    pub max_uploads: Option<u32>,
    /// Bytes a second that are sent to it.
    pub max_upload_rate: Option<u64>,
    /// How long this stands.
    pub ttl: Duration,
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// None.
    Abstain,
    /// Trusted so.
    Allow(Grant),
    /// Refused, for so long.
    Deny(Duration),
}

/// What one policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its decision.
    pub decision: Decision,
    /// Why.
    pub reason: Option<Reason>,
}

/// What all policies together say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruling {
    /// What is to be done.
    pub way: Way,
    /// The policy that decided; none where all abstained.
    pub by: Option<Arc<str>>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// All abstain: admission alone decides.
    BuiltIn,
    /// Trusted so.
    Allow(Grant),
    /// Refused, for so long.
    Deny(Duration, Reason),
    /// One did not answer: the last grant stands, and who has none gets nothing.
    Failed(Failure),
}

/// Answers how far a peer is trusted. It may take 10 ms, and does not wait for anything but its own work.
pub trait TrustPolicy: Send + Sync {
    /// Whether there is any policy.
    fn is_active(&self) -> bool;

    /// Whether the verdict of one counts; without one they are watched only.
    fn enforces(&self) -> bool;

    /// Another number whenever other policies are in force.
    fn generation(&self) -> i64;

    /// The ruling.
    fn evaluate(&self, request: &Request) -> Ruling;

    /// The ruling, and what each policy said; it counts nowhere.
    fn explain(&self, request: &Request) -> (Ruling, Vec<Said>) {
        (self.evaluate(request), Vec::new())
    }
}

/// The world.
pub(super) struct Trust;

/// What a chain says so far. Any denial wins, then any failure; grants are merged to the strictest.
#[derive(Debug)]
pub(super) struct Merge(Ruling);

impl Default for Merge {
    fn default() -> Self {
        Self(Ruling { way: Way::BuiltIn, by: None })
    }
}

impl World for Trust {
    const NAME: &'static str = "trust";
    const OUTCOMES: &'static [&'static str] = &["abstain", "allow", "deny"];

    type Request = Request;
    type Verdict = Verdict;
    type Ruling = Ruling;
    type Merge = Merge;

    fn input(request: &Request) -> impl std::hash::Hash {
        request.peer.id.clone()
    }

    fn check(_: &Request, _: &Verdict) -> Result<(), String> {
        Ok(())
    }

    fn outcome(verdict: &Verdict) -> usize {
        match verdict.decision {
            Decision::Abstain => 0,
            Decision::Allow(_) => 1,
            Decision::Deny(_) => 2,
        }
    }

    fn describe(verdict: &Verdict) -> String {
        let decision = match &verdict.decision {
            Decision::Abstain => "abstain".into(),
            Decision::Allow(grant) => format!("allow {grant}"),
            Decision::Deny(time) => format!("deny for={}s", time.as_secs()),
        };
        describe(&decision, verdict.reason.as_ref())
    }

    fn add(merge: &mut Merge, policy: &Arc<str>, answer: Result<Verdict, Failure>, _: Failing) {
        let way = match (&merge.0.way, answer) {
            (Way::Deny(..), _) | (_, Ok(Verdict { decision: Decision::Abstain, .. })) => return,
            (_, Ok(Verdict { decision: Decision::Deny(time), reason })) => {
                let reason = reason.unwrap_or_else(|| Reason {
                    code: "denied".into(),
                    message: format!("the policy `{policy}` denies it"),
                });
                Way::Deny(time, reason)
            }
            (Way::Failed(_), _) => return,
            (_, Err(failure)) => Way::Failed(failure),
            (Way::BuiltIn, Ok(Verdict { decision: Decision::Allow(grant), .. })) => Way::Allow(grant),
            (Way::Allow(grant), Ok(Verdict { decision: Decision::Allow(more), .. })) => {
                merge.0.way = Way::Allow(grant.merged(more));
                return;
            }
        };
        merge.0 = Ruling { way, by: Some(Arc::clone(policy)) };
    }

    fn ruling(merge: Merge) -> Ruling {
        merge.0
    }

    fn plugins(config: &Config) -> &[Plugin] {
        &config.trust
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level={} serve={}", self.level, if self.serve { "yes" } else { "no" })?;
        if let Some(most) = self.max_uploads {
            write!(f, " max-uploads={most}")?;
        }
        if let Some(rate) = self.max_upload_rate {
            write!(f, " max-upload-rate={rate}")?;
        }
        write!(f, " ttl={}s", self.ttl.as_secs())
    }
}

impl fmt::Display for Ruling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::BuiltIn => f.write_str("as admission says"),
            Way::Allow(grant) => write!(f, "allow {grant}"),
            Way::Deny(time, reason) => write!(f, "deny for={}s ({reason})", time.as_secs()),
            Way::Failed(failure) => write!(f, "failed: {failure}"),
        }
    }
}

impl Grant {
    /// The strictest of both.
    fn merged(self, other: Self) -> Self {
        Self {
            level: self.level.min(other.level),
            serve: self.serve && other.serve,
            max_uploads: least(self.max_uploads, other.max_uploads),
            max_upload_rate: least(self.max_upload_rate, other.max_upload_rate),
            ttl: self.ttl.min(other.ttl),
        }
    }
}
