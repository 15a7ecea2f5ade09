//! Counters of the upstreams of the configuration. Their names are the operator's, so that their number is bounded.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

use super::FetchError;

/// The counters. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    bytes: Family<UpstreamLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    upstream: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

impl Metrics {
    /// Counters that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "requests",
            "Requests to the upstreams of the configuration by name and outcome: answered, not-found, held (not sent, since \
             it failed a moment ago), refused, failed, range",
            metrics.requests.clone(),
        );
        registry.register_with_unit(
            "received",
            "Bytes of content that came from upstreams, by name",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        metrics
    }

    pub(super) fn asked<T>(&self, upstream: &str, result: &Result<T, FetchError>) {
        let outcome = match result {
            Ok(_) => "answered",
            Err(FetchError::NotFound) => "not-found",
            Err(FetchError::Held) => "held",
            Err(FetchError::Refused(_)) => "refused",
            Err(FetchError::Failed(_)) => "failed",
            Err(FetchError::Range) => "range",
            // Of no upstream.
            Err(FetchError::Unknown) => return,
        };
        self.requests.get_or_create(&RequestLabels { upstream: upstream.to_owned(), outcome }).inc();
    }

    pub(super) fn bytes(&self, upstream: &str) -> Counter {
        self.bytes.get_or_create(&UpstreamLabels { upstream: upstream.to_owned() }).clone()
    }
}
