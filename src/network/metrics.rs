//! Counters of the control plane.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What the network counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) peers: Gauge,
    pub(super) refused: Family<RefusedLabels, Counter>,
    pub(super) dial_failures: Counter,
    pub(super) inventory: Family<InventoryLabels, Counter>,
    pub(super) broken: Counter,
    pub(super) tags: Family<TagLabels, Counter>,
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RefusedLabels {
    pub reason: Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Direction {
    Sent,
    Received,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Kind {
    /// A page of a whole inventory.
    Whole,
    /// A change.
    Change,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct InventoryLabels {
    pub direction: Direction,
    pub kind: Kind,
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

/// Registers the network's metrics.
pub fn register(registry: &mut Registry) -> Metrics {
    let metrics = Metrics::default();
    registry.register("peers", "Peers with a proved connection", metrics.peers.clone());
    registry.register(
        "refused_connections",
        "Connections of the control plane that were refused, by reason: peer (not trusted), limit, handshake",
        metrics.refused.clone(),
    );
    registry.register(
        "dial_failures",
        "Attempts to reach a peer's control plane that failed",
        metrics.dial_failures.clone(),
    );
    registry.register(
        "inventory_messages",
        "Inventory messages by direction and kind (whole: one page of all, change: a difference)",
        metrics.inventory.clone(),
    );
    registry.register("broken_messages", "Messages of peers that could not be read", metrics.broken.clone());
    registry.register(
        "tag_answers",
        "Answers given to peers that asked about a tag: found, unknown, denied",
        metrics.tags.clone(),
    );
    metrics.start_at_zero();
    metrics
}

impl Metrics {
    /// Shows all labels from the start, so that what never happened is 0 and not missing.
    fn start_at_zero(&self) {
        for reason in [Refused::Peer, Refused::Limit, Refused::Handshake] {
            drop(self.refused.get_or_create(&RefusedLabels { reason }));
        }
        for direction in [Direction::Sent, Direction::Received] {
            for kind in [Kind::Whole, Kind::Change] {
                drop(self.inventory.get_or_create(&InventoryLabels { direction, kind }));
            }
        }
        for answer in [Answer::Found, Answer::Unknown, Answer::Denied] {
            drop(self.tags.get_or_create(&TagLabels { answer }));
        }
    }
}
