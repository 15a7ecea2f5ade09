//! Counters of policies. The names are those of the configuration; what a policy says is in no label.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::Failure;
use super::registry::{Decision, Verdict};

/// Upper bounds in seconds: a warm call takes microseconds, the deadline is 10 ms.
const BUCKETS: [f64; 10] = [2e-6, 4e-6, 8e-6, 16e-6, 32e-6, 64e-6, 250e-6, 1e-3, 4e-3, 16e-3];

/// The counters. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    decisions: Family<DecisionLabels, Counter>,
    failures: Family<FailureLabels, Counter>,
    seconds: Family<PolicyLabels, Histogram, fn() -> Histogram>,
    /// Number of the generation in force; 0: none.
    pub(super) generation: Gauge,
    /// Generations that were refused.
    pub(super) refused: Counter,
}

/// The counters of one policy, looked up once.
#[derive(Clone, Debug)]
pub(super) struct PolicyMetrics {
    metrics: Metrics,
    policy: String,
    seconds: Histogram,
    abstain: Counter,
    mirror: Counter,
    bypass: Counter,
    deny: Counter,
    failed: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    world: &'static str,
    policy: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    policy: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabels {
    policy: String,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            decisions: Family::default(),
            failures: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            generation: Gauge::default(),
            refused: Counter::default(),
        }
    }
}

impl Metrics {
    /// Counters that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("decisions", "Verdicts by policy and outcome", metrics.decisions.clone());
        registry.register(
            "failures",
            "Requests that a policy did not answer, by kind",
            metrics.failures.clone(),
        );
        registry.register("decision_seconds", "What a policy took for one request", metrics.seconds.clone());
        registry.register("generation", "Number of the policies in force", metrics.generation.clone());
        registry.register(
            "refused_generations",
            "Policies that were not taken over",
            metrics.refused.clone(),
        );
        metrics
    }

    /// The counters of a policy of the registry world, from 0 on.
    pub(super) fn of(&self, policy: &str) -> PolicyMetrics {
        let policy = policy.to_owned();
        let decided = |outcome| {
            let labels = DecisionLabels { world: "registry", policy: policy.clone(), outcome };
            self.decisions.get_or_create(&labels).clone()
        };
        PolicyMetrics {
            metrics: self.clone(),
            seconds: self.seconds.get_or_create(&PolicyLabels { policy: policy.clone() }).clone(),
            abstain: decided("abstain"),
            mirror: decided("mirror"),
            bypass: decided("bypass"),
            deny: decided("deny"),
            failed: decided("failed"),
            policy,
        }
    }
}

impl PolicyMetrics {
    /// Counts an answer.
    pub(super) fn asked(&self, took: Duration, answer: &Result<Verdict, Failure>) {
        self.seconds.observe(took.as_secs_f64());
        let counter = match answer {
            Err(failure) => {
                let labels = FailureLabels { policy: self.policy.clone(), kind: failure.label() };
                self.metrics.failures.get_or_create(&labels).inc();
                &self.failed
            }
            Ok(verdict) => match verdict.decision {
                Decision::Abstain => &self.abstain,
                Decision::Mirror(_) => &self.mirror,
                Decision::Bypass => &self.bypass,
                Decision::Deny => &self.deny,
            },
        };
        counter.inc();
    }
}
