//! Counters of policies. The names are those of the configuration; what a policy says is in no label.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::world::World;
use super::{Failure, Stage};

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
    refused: Family<StageLabels, Counter>,
    /// Whether what is configured now is refused, so that others are in force, or none.
    pub(super) is_refused: Gauge,
    /// Whether files are waited for that match their pins.
    pub(super) pending: Gauge,
    /// Whether no machine code can be made here.
    pub(super) interpreted: Gauge,
    recorded: Family<RecordLabels, Counter>,
}

/// What became of the decisions that were to be recorded.
#[derive(Clone, Debug, Default)]
pub(super) struct Recorded {
    pub(super) written: Counter,
    pub(super) dropped: Counter,
}

/// The counters of one policy, looked up once.
#[derive(Clone, Debug)]
pub(super) struct PolicyMetrics {
    metrics: Metrics,
    labels: PolicyLabels,
    seconds: Histogram,
    /// In the order of the world's outcomes.
    decided: Vec<Counter>,
    failed: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RecordLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    world: &'static str,
    policy: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    world: &'static str,
    policy: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabels {
    world: &'static str,
    policy: String,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            decisions: Family::default(),
            failures: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            generation: Gauge::default(),
            refused: Family::default(),
            is_refused: Gauge::default(),
            pending: Gauge::default(),
            interpreted: Gauge::default(),
            recorded: Family::default(),
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
            "Policies that were not taken over, by the stage that refused them",
            metrics.refused.clone(),
        );
        registry.register(
            "refused",
            "1 while the policies that are configured are refused",
            metrics.is_refused.clone(),
        );
        registry.register(
            "pending",
            "1 while files are waited for that match their pins",
            metrics.pending.clone(),
        );
        registry.register(
            "interpreted",
            "1 where policies are interpreted, because no machine code can be made",
            metrics.interpreted.clone(),
        );
        registry.register(
            "recorded_decisions",
            "Decisions that were to be recorded, by what became of them",
            metrics.recorded.clone(),
        );
        metrics
    }

    /// The counters of the decision log.
    pub(super) fn recorded(&self) -> Recorded {
        let of = |outcome| self.recorded.get_or_create(&RecordLabels { outcome }).clone();
        Recorded { written: of("written"), dropped: of("dropped") }
    }

    /// Counts policies that were not taken over.
    pub(super) fn refused(&self, stage: Stage) {
        self.refused.get_or_create(&StageLabels { stage: stage.to_string() }).inc();
    }

    /// The counters of a policy of this world, from 0 on.
    pub(super) fn of<W: World>(&self, policy: &str) -> PolicyMetrics {
        let labels = PolicyLabels { world: W::NAME, policy: policy.to_owned() };
        let decided = |outcome: &'static str| {
            let labels = DecisionLabels { world: W::NAME, policy: policy.to_owned(), outcome };
            self.decisions.get_or_create(&labels).clone()
        };
        PolicyMetrics {
            metrics: self.clone(),
            seconds: self.seconds.get_or_create(&labels).clone(),
            decided: W::OUTCOMES.iter().map(|outcome| decided(outcome)).collect(),
            failed: decided("failed"),
            labels,
        }
    }
}

impl PolicyMetrics {
    /// Counts an answer: which of the world's outcomes it is.
    pub(super) fn asked(&self, took: Duration, answer: Result<usize, &Failure>) {
        self.seconds.observe(took.as_secs_f64());
        let counter = match answer {
            Err(failure) => {
                let PolicyLabels { world, policy } = self.labels.clone();
                let labels = FailureLabels { world, policy, kind: failure.label() };
                self.metrics.failures.get_or_create(&labels).inc();
                &self.failed
            }
            Ok(outcome) => &self.decided[outcome],
        };
        counter.inc();
    }
}
