//! Counters of the peer port and of fetches from peers.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// What transfer counts. Cheap to clone; all clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) requests: Family<RequestLabels, Counter>,
    pub(super) upload_bytes: Counter,
    pub(super) uploads: Gauge,
    pub(super) connections: Gauge,
    pub(super) handshakes: Family<HandshakeLabels, Counter>,
    pub(super) accept_errors: Counter,
    pub(super) fetches: Family<FetchLabels, Counter>,
    pub(super) fetch_bytes: Counter,
    pub(super) connects: Family<ConnectLabels, Counter>,
    pub(super) drained_bytes: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RequestLabels {
    outcome: Answered,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HandshakeLabels {
    outcome: Handshake,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FetchLabels {
    outcome: Fetched,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ConnectLabels {
    outcome: Connected,
}

/// How a request of a peer was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Answered {
    Served,
    NotFound,
    Denied,
    Busy,
    Failed,
    Invalid,
}

/// How a handshake at the peer port ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Handshake {
    Accepted,
    Failed,
    Timeout,
    Displaced,
    Denied,
    Full,
}

/// How a fetch ended, up to the answer's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Fetched {
    Content,
    NotFound,
    Busy,
    Queued,
    Slow,
    Unreachable,
    Identity,
    Protocol,
}

/// How a connection for a fetch was got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Connected {
    Reused,
    New,
    Failed,
}

impl Metrics {
    /// Registers all; the caller gives the prefix.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let it = metrics.clone();
        registry.register(
            "requests",
            "Requests of peers for content, by how they were answered",
            it.requests,
        );
        registry.register_with_unit("upload", "Content bytes handed to peers", Unit::Bytes, it.upload_bytes);
        registry.register("uploads_active", "Uploads to peers that run now", it.uploads);
        registry.register(
            "connections_active",
            "Connections of proved peers to the peer port",
            it.connections,
        );
        registry.register("handshakes", "Handshakes at the peer port, by how they ended", it.handshakes);
        registry.register(
            "accept_errors",
            "Failures to accept a connection at the peer port",
            it.accept_errors,
        );
        registry.register("fetches", "Requests to peers for content, by how they ended", it.fetches);
        registry.register_with_unit("fetch", "Content bytes that peers sent", Unit::Bytes, it.fetch_bytes);
        registry.register("connects", "Connections for requests to peers, by how they were got", it.connects);
        registry.register_with_unit(
            "drained",
            "Content bytes that peers sent after nobody wanted them any more",
            Unit::Bytes,
            it.drained_bytes,
        );
        metrics
    }

    pub(super) fn answered(&self, outcome: Answered) {
        self.requests.get_or_create(&RequestLabels { outcome }).inc();
    }

    pub(super) fn handshake(&self, outcome: Handshake) {
        self.handshakes.get_or_create(&HandshakeLabels { outcome }).inc();
    }

    pub(super) fn fetched(&self, outcome: Fetched) {
        self.fetches.get_or_create(&FetchLabels { outcome }).inc();
    }

    pub(super) fn connected(&self, outcome: Connected) {
        self.connects.get_or_create(&ConnectLabels { outcome }).inc();
    }
}

#[cfg(test)]
impl Metrics {
    /// Handshakes that were accepted.
    pub(super) fn accepted(&self) -> u64 {
        self.ended(Handshake::Accepted)
    }

    /// Handshakes that ended so.
    pub(super) fn ended(&self, outcome: Handshake) -> u64 {
        self.handshakes.get_or_create(&HandshakeLabels { outcome }).get()
    }
}
