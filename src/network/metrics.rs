//! Counters of the control plane.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::gossip::Counts;

/// What the network counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) peers: Gauge,
    pub(super) refused: Family<RefusedLabels, Counter>,
    pub(super) dial_failures: Counter,
    pub(super) frames_sent: Counter,
    pub(super) frames_received: Counter,
    gossip: Family<GossipLabels, Gauge>,
    pub(super) broken: Counter,
    pub(super) tags: Family<TagLabels, Counter>,
    admissions: Family<AdmissionLabels, Counter>,
    open: Gauge,
    cluster_keys: Gauge,
    cluster_key_errors: Gauge,
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Refused {
    /// The peer is not trusted.
    Peer,
    /// Too many connections.
    Limit,
    /// No identity was proved in time.
    Handshake,
    /// It did not prove in time to be a member.
    Proof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RefusedLabels {
    pub reason: Refused,
}

/// What the gossip counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Event {
    Fresh,
    Duplicate,
    Refused,
    Excess,
    Graft,
    Refutation,
    Difference,
    Introduced,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GossipLabels {
    event: Event,
}

/// How this node answered a peer's question about a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Answer {
    Found,
    Unknown,
    Denied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TagLabels {
    pub answer: Answer,
}

/// How the judgement of a certificate ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Judged {
    Admitted,
    NoKey,
    Missing,
    Malformed,
    Cluster,
    OtherPeer,
    UnknownKey,
    Signature,
    /// It expired, or ends too late.
    Time,
    Denied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdmissionLabels {
    outcome: Judged,
}

/// Registers the network's metrics.
pub fn register(registry: &mut Registry) -> Metrics {
    let metrics = Metrics::default();
    registry.register("peers", "Peers with a proved connection", metrics.peers.clone());
    registry.register(
        "refused_connections",
        "Connections of the control plane that were refused, by reason: peer (not trusted), limit, handshake, proof (no member)",
        metrics.refused.clone(),
    );
    registry.register(
        "dial_failures",
        "Attempts to reach a peer's control plane that failed",
        metrics.dial_failures.clone(),
    );
    registry.register("gossip_frames_sent", "Frames sent to neighbours", metrics.frames_sent.clone());
    registry.register("gossip_frames_received", "Frames of neighbours", metrics.frames_received.clone());
    registry.register(
        "gossip_events",
        "What the gossip has met so far: fresh and duplicate news, refused records, excess over a limit, grafts, refutations \
         of this node, comparisons with a difference, introducers that were dialled first",
        metrics.gossip.clone(),
    );
    registry.register("broken_messages", "Messages of peers that could not be read", metrics.broken.clone());
    registry.register(
        "tag_answers",
        "Answers given to peers that asked about a tag: found, unknown, denied",
        metrics.tags.clone(),
    );
    registry.register(
        "admissions",
        "Judgements of membership certificates that peers showed, by how they ended",
        metrics.admissions.clone(),
    );
    registry.register("open", "1 if whoever comes is admitted: no key and no list", metrics.open.clone());
    registry.register("cluster_keys", "Cluster keys in force", metrics.cluster_keys.clone());
    registry.register(
        "cluster_key_errors",
        "Files of cluster keys that cannot be used",
        metrics.cluster_key_errors.clone(),
    );
    metrics.start_at_zero();
    metrics
}

impl Metrics {
    /// Shows what the gossip has counted.
    pub(super) fn gossip(&self, counts: &Counts) {
        for (event, count) in [
            (Event::Fresh, counts.fresh),
            (Event::Duplicate, counts.duplicate),
            (Event::Refused, counts.refused),
            (Event::Excess, counts.excess),
            (Event::Graft, counts.grafts),
            (Event::Refutation, counts.refuted),
            (Event::Difference, counts.differences),
            (Event::Introduced, counts.introduced),
        ] {
            self.gossip.get_or_create(&GossipLabels { event }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub(super) fn admission(&self, outcome: Judged) {
        self.admissions.get_or_create(&AdmissionLabels { outcome }).inc();
    }

    pub(super) fn admission_is(&self, open: bool, keys: usize, errors: usize) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.open.set(open.into());
        self.cluster_keys.set(count(keys));
        self.cluster_key_errors.set(count(errors));
    }

    /// Shows all labels from the start, so that what never happened is 0 and not missing.
    fn start_at_zero(&self) {
        for reason in [Refused::Peer, Refused::Limit, Refused::Handshake, Refused::Proof] {
            drop(self.refused.get_or_create(&RefusedLabels { reason }));
        }
        self.gossip(&Counts::default());
        for answer in [Answer::Found, Answer::Unknown, Answer::Denied] {
            drop(self.tags.get_or_create(&TagLabels { answer }));
        }
        for outcome in [
            Judged::Admitted,
            Judged::NoKey,
            Judged::Missing,
            Judged::Malformed,
            Judged::Cluster,
            Judged::OtherPeer,
            Judged::UnknownKey,
            Judged::Signature,
            Judged::Time,
            Judged::Denied,
        ] {
            drop(self.admissions.get_or_create(&AdmissionLabels { outcome }));
        }
    }
}
