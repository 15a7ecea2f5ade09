//! What the runtime asked for and got.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use serde::{Deserialize, Serialize};

use crate::mirror::Source;

/// The registry's metrics; clones are the same ones.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    local: Counter,
    peers: Counter,
    upstream: Counter,
    until_header: Family<DurationLabels, Histogram, fn() -> Histogram>,
    pub(super) in_flight: Gauge,
    pub(super) refused: Counter,
    totals: std::sync::Arc<Totals>,
}

/// What the runtime was served since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Served {
    /// From this node's store.
    pub local: Amount,
    /// From peers.
    pub peers: Amount,
    /// From upstreams of the configuration.
    pub upstream: Amount,
    /// Requests that went on to the next host.
    pub not_here: u64,
}

/// Requests and the bytes of their answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Amount {
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    kind: &'static str,
    method: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    kind: &'static str,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BytesLabels {
    source: &'static str,
}

#[derive(Debug, Default)]
struct Totals {
    local: AtomicU64,
    peers: AtomicU64,
    upstream: AtomicU64,
    not_here: AtomicU64,
}

/// How a request ended, as its labels say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    pub(super) kind: &'static str,
    pub(super) method: &'static str,
    /// `local`, `peers`, `upstream`, `range`, or the cause of not serving.
    pub(super) outcome: &'static str,
    /// `local`, `peers`, `upstream` or `none`.
    pub(super) source: &'static str,
}

pub(super) const fn source(source: Source) -> &'static str {
    match source {
        Source::Local => "local",
        Source::Peers => "peers",
        Source::Upstream => "upstream",
    }
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let requests = Family::default();
        registry.register(
            "requests",
            "Requests of the runtime by kind (manifest, blob, other), method (GET, HEAD, other) and outcome: local, \
             peers and upstream were served from there, range was unsatisfiable, all others name why the runtime was sent to its \
             next host",
            requests.clone(),
        );
        let bytes = Family::<BytesLabels, Counter>::default();
        registry.register_with_unit(
            "sent",
            "Bytes of answers to the runtime by source (local, peers, upstream)",
            Unit::Bytes,
            bytes.clone(),
        );
        let until_header: Family<DurationLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(histogram);
        registry.register_with_unit(
            "header_duration",
            "Time from a request's head to its answer's by kind and source (local, peers, upstream, none)",
            Unit::Seconds,
            until_header.clone(),
        );
        let in_flight = Gauge::default();
        registry.register("in_flight", "Requests whose answers are not complete", in_flight.clone());
        let refused = Counter::default();
        registry.register(
            "connections_refused",
            "Connections that were closed before a request, since they do not come from this node (`registry.clients`)",
            refused.clone(),
        );
        Self {
            requests,
            local: bytes.get_or_create_owned(&BytesLabels { source: "local" }),
            peers: bytes.get_or_create_owned(&BytesLabels { source: "peers" }),
            upstream: bytes.get_or_create_owned(&BytesLabels { source: "upstream" }),
            until_header,
            in_flight,
            refused,
            totals: std::sync::Arc::default(),
        }
    }

    /// What was served since the start.
    pub fn served(&self) -> Served {
        use std::sync::atomic::Ordering::Relaxed;
        let Totals { local, peers, upstream, not_here } = &*self.totals;
        Served {
            local: Amount { requests: local.load(Relaxed), bytes: self.local.get() },
            peers: Amount { requests: peers.load(Relaxed), bytes: self.peers.get() },
            upstream: Amount { requests: upstream.load(Relaxed), bytes: self.upstream.get() },
            not_here: not_here.load(Relaxed),
        }
    }

    pub(super) fn sent(&self, source: Source) -> Counter {
        match source {
            Source::Local => self.local.clone(),
            Source::Peers => self.peers.clone(),
            Source::Upstream => self.upstream.clone(),
        }
    }

    pub(super) fn finish(&self, outcome: Outcome, seconds: f64) {
        let Outcome { kind, method, outcome, source } = outcome;
        self.requests.get_or_create(&RequestLabels { kind, method, outcome }).inc();
        self.until_header.get_or_create(&DurationLabels { kind, source }).observe(seconds);
        let total = match (kind, outcome) {
            (_, "peers") => &self.totals.peers,
            (_, "upstream") => &self.totals.upstream,
            (_, "range") | ("other", "local") => return,
            (_, "local") => &self.totals.local,
            _ => &self.totals.not_here,
        };
        total.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// 0.1 ms (a lookup) to 3.3 s (above the longest default deadline), each three times the one before.
fn histogram() -> Histogram {
    Histogram::new([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.3])
}
