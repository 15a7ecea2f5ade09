//! Counters of the mirror. All labels are from closed sets; no image, repository or peer is named.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::peers::Outcome;

/// The mirror's counters. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Requests to peers by outcome.
    fetches: Family<FetchLabels, Counter>,
    /// Second requests because the first one was slow.
    pub(crate) hedges: Counter,
    /// Parts that were fetched anew because a peer failed in mid-body, by reason.
    failovers: Family<FailoverLabels, Counter>,
    /// Contents by verdict.
    verifications: Family<VerificationLabels, Counter>,
    /// Tags by how they were answered.
    tags: Family<TagLabels, Counter>,
    /// Unfinished downloads of the runtime that were discarded since their prefix was wrong.
    pub(crate) discarded: Counter,
    /// Bytes of content that came from peers.
    pub(crate) bytes_from_peers: Counter,
    /// Requests of peers that were served.
    pub(crate) served: Counter,
    /// Bytes of content read for peers.
    pub(crate) bytes_to_peers: Counter,
    /// Bytes of content read for the runtime from the store.
    pub(crate) bytes_local: Counter,
}

/// Why a part is fetched anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failover {
    Stalled,
    Broken,
    /// It is not trusted any more.
    Distrusted,
}

/// What became of content from peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verification {
    Right,
    Mismatch,
    /// Only a part was asked for, or verification is off.
    Unverified,
}

/// How a tag was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TagAnswer {
    /// Left to its registry.
    Upstream,
    /// By an upstream of the configuration.
    Resolved,
    /// By its home node.
    Home,
    Known,
    Unknown,
    Disputed,
    /// Known, and older than a policy lets it be.
    TooOld,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FetchLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailoverLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerificationLabels {
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TagLabels {
    answer: &'static str,
}

impl Metrics {
    /// Counters that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("fetches", "Requests to peers by outcome", metrics.fetches.clone());
        registry.register(
            "hedges",
            "Requests to a second peer since the first was slow",
            metrics.hedges.clone(),
        );
        registry.register(
            "failovers",
            "Parts fetched anew after a peer failed in mid-body",
            metrics.failovers.clone(),
        );
        registry.register("verifications", "Contents from peers by verdict", metrics.verifications.clone());
        registry.register("tags", "Tags by how they were answered", metrics.tags.clone());
        registry.register(
            "discarded_ingests",
            "Poisoned downloads of the runtime that were discarded",
            metrics.discarded.clone(),
        );
        registry.register(
            "peer_bytes",
            "Bytes of content that came from peers",
            metrics.bytes_from_peers.clone(),
        );
        registry.register("served", "Requests of peers that were served", metrics.served.clone());
        registry.register("served_bytes", "Bytes of content read for peers", metrics.bytes_to_peers.clone());
        registry.register(
            "local_bytes",
            "Bytes of content read for the runtime from the store",
            metrics.bytes_local.clone(),
        );
        metrics.start_at_zero();
        metrics
    }

    /// Shows all labels from the start, so that what never happened is 0 and not missing.
    fn start_at_zero(&self) {
        let outcomes = [Outcome::FirstByte(Duration::ZERO), Outcome::Miss, Outcome::Busy(0)];
        let failures = [Outcome::Failed, Outcome::Stranger, Outcome::Broken];
        for outcome in outcomes.into_iter().chain([Outcome::Slow, Outcome::Queued]).chain(failures) {
            drop(self.fetches.get_or_create(&outcome.into()));
        }
        for reason in [Failover::Stalled, Failover::Broken, Failover::Distrusted] {
            drop(self.failovers.get_or_create(&reason.into()));
        }
        for verdict in [Verification::Right, Verification::Mismatch, Verification::Unverified] {
            drop(self.verifications.get_or_create(&verdict.into()));
        }
        let known = [TagAnswer::Known, TagAnswer::Unknown, TagAnswer::Disputed, TagAnswer::TooOld];
        for answer in [TagAnswer::Upstream, TagAnswer::Resolved, TagAnswer::Home].into_iter().chain(known) {
            drop(self.tags.get_or_create(&answer.into()));
        }
    }

    /// Requests of peers that were served, and the bytes that were read for them.
    pub fn to_peers(&self) -> (u64, u64) {
        (self.served.get(), self.bytes_to_peers.get())
    }

    pub(crate) fn fetched(&self, outcome: Outcome) {
        self.fetches.get_or_create(&outcome.into()).inc();
    }

    pub(crate) fn failover(&self, reason: Failover) {
        self.failovers.get_or_create(&reason.into()).inc();
    }

    pub(crate) fn verified(&self, verdict: Verification) {
        self.verifications.get_or_create(&verdict.into()).inc();
    }

    pub(crate) fn tag(&self, answer: TagAnswer) {
        self.tags.get_or_create(&answer.into()).inc();
    }
}

impl From<Outcome> for FetchLabels {
    fn from(outcome: Outcome) -> Self {
        let result = match outcome {
            Outcome::FirstByte(_) => "first-byte",
            Outcome::Miss => "miss",
            Outcome::Busy(_) => "busy",
            Outcome::Slow => "slow",
            Outcome::Queued => "queued",
            Outcome::Stranger => "stranger",
            Outcome::Failed => "failed",
            Outcome::Broken => "broken",
        };
        Self { result }
    }
}

impl From<Failover> for FailoverLabels {
    fn from(reason: Failover) -> Self {
        let reason = match reason {
            Failover::Stalled => "stalled",
            Failover::Broken => "broken",
            Failover::Distrusted => "distrusted",
        };
        Self { reason }
    }
}

impl From<Verification> for VerificationLabels {
    fn from(verdict: Verification) -> Self {
        let verdict = match verdict {
            Verification::Right => "right",
            Verification::Mismatch => "mismatch",
            Verification::Unverified => "unverified",
        };
        Self { verdict }
    }
}

impl From<TagAnswer> for TagLabels {
    fn from(answer: TagAnswer) -> Self {
        let answer = match answer {
            TagAnswer::Upstream => "upstream",
            TagAnswer::Resolved => "resolved",
            TagAnswer::Known => "known",
            TagAnswer::Unknown => "unknown",
            TagAnswer::Disputed => "disputed",
            TagAnswer::Home => "home",
            TagAnswer::TooOld => "too-old",
        };
        Self { answer }
    }
}
