//! Counters of the mirror. All labels are from closed sets; no image, repository or peer is named.

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
    Upstream,
    Known,
    Unknown,
    Disputed,
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
        metrics
    }

    /// Requests of peers that were served, and the bytes that were read for them.
    pub fn to_peers(&self) -> (u64, u64) {
        (self.served.get(), self.bytes_to_peers.get())
    }

    pub(crate) fn fetched(&self, outcome: Outcome) {
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
        self.fetches.get_or_create(&FetchLabels { result }).inc();
    }

    pub(crate) fn failover(&self, reason: Failover) {
        let reason = match reason {
            Failover::Stalled => "stalled",
            Failover::Broken => "broken",
        };
        self.failovers.get_or_create(&FailoverLabels { reason }).inc();
    }

    pub(crate) fn verified(&self, verdict: Verification) {
        let verdict = match verdict {
            Verification::Right => "right",
            Verification::Mismatch => "mismatch",
            Verification::Unverified => "unverified",
        };
        self.verifications.get_or_create(&VerificationLabels { verdict }).inc();
    }

    pub(crate) fn tag(&self, answer: TagAnswer) {
        let answer = match answer {
            TagAnswer::Upstream => "upstream",
            TagAnswer::Known => "known",
            TagAnswer::Unknown => "unknown",
            TagAnswer::Disputed => "disputed",
        };
        self.tags.get_or_create(&TagLabels { answer }).inc();
    }
}
