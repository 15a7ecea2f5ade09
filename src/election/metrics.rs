//! Counters of elections. Labels are names of roles and modes.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::roles::{Fallback, Role};
use super::status::Status;
use super::table::{Mode, Table};

/// Upper bounds in seconds: a few members take microseconds, 5,000 with policies some milliseconds.
const BUCKETS: [f64; 8] = [64e-6, 250e-6, 1e-3, 4e-3, 16e-3, 64e-3, 250e-3, 1.0];

/// The counters. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    mode: Family<ModeLabels, Gauge>,
    held: Family<RoleLabels, Gauge>,
    transitions: Family<RoleLabels, Counter>,
    members: Gauge,
    carry: Gauge,
    compared: Family<ComparedLabels, Gauge>,
    seconds: Histogram,
    fallbacks: Family<FallbackLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ComparedLabels {
    what: &'static str,
    with: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FallbackLabels {
    role: &'static str,
    reason: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            mode: Family::default(),
            held: Family::default(),
            transitions: Family::default(),
            members: Gauge::default(),
            carry: Gauge::default(),
            compared: Family::default(),
            seconds: Histogram::new(BUCKETS),
            fallbacks: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("mode", "1 for how roles are given now", metrics.mode.clone());
        registry.register(
            "role_held",
            "1 if this node holds the role, or some of its keys",
            metrics.held.clone(),
        );
        registry.register(
            "transitions",
            "Times that others held the role than before",
            metrics.transitions.clone(),
        );
        registry.register(
            "members",
            "Live members that take part, this node included",
            metrics.members.clone(),
        );
        registry.register(
            "policy_agreement",
            "Members that carry the same policies as this node",
            metrics.carry.clone(),
        );
        registry.register(
            "compared",
            "Neighbours by what they saw when views were compared last: candidates or owners, the same as here or other ones",
            metrics.compared.clone(),
        );
        registry.register(
            "evaluation_seconds",
            "What it took to find who holds what",
            metrics.seconds.clone(),
        );
        registry.register(
            "fallbacks",
            "Times that the built-in began to rank for a role where there are policies, by why",
            metrics.fallbacks.clone(),
        );
        for role in Role::ALL.map(Role::name) {
            drop(metrics.transitions.get_or_create(&RoleLabels { role }));
            for reason in Fallback::ALL.map(Fallback::name) {
                drop(metrics.fallbacks.get_or_create(&FallbackLabels { role, reason }));
            }
        }
        metrics
    }

    /// Takes a new table; `before`: the last one.
    pub(super) fn table(&self, table: &Table, before: Option<&Table>, changed: &[Role], took: Duration) {
        self.seconds.observe(took.as_secs_f64());
        for mode in Mode::NAMES {
            self.mode.get_or_create(&ModeLabels { mode }).set((mode == table.mode().name()).into());
        }
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.members.set(count(table.members()));
        self.carry.set(count(table.carry()));
        for role in Role::ALL {
            let labels = RoleLabels { role: role.name() };
            self.held.get_or_create(&labels).set(table.holds(role).into());
            if changed.contains(&role) {
                self.transitions.get_or_create(&labels).inc();
            }
            let fallback = table.fallback(role);
            if let Some(reason) =
                fallback.filter(|_| before.is_none_or(|before| before.fallback(role) != fallback))
            {
                let labels = FallbackLabels { role: role.name(), reason: reason.name() };
                self.fallbacks.get_or_create(&labels).inc();
            }
        }
    }

    /// Takes what neighbours see.
    pub(super) fn compared(&self, status: &Status) {
        for (what, compared) in [("candidates", status.views), ("owners", status.owners)] {
            for (with, count) in [("same", compared.same), ("other", compared.other)] {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.compared.get_or_create(&ComparedLabels { what, with }).set(count);
            }
        }
    }
}
