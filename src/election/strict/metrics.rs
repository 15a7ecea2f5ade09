//! Counters of the lease. The two without a prefix of Peili are those of Kubernetes' own electors, for dashboards that know them.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::election::lease::{Answer, Loss, Ms, Request};

/// The name of the election in the compatible metrics.
const NAME: NameLabels = NameLabels { name: "peili" };

/// Locks, as metrics see them.
const LEASE: &str = "lease";
const CONFIGMAP: &str = "configmap";

/// The counters. Clones share them.
#[derive(Clone, Debug)]
pub struct LeaseMetrics {
    /// Of which lock requests are counted.
    lock: &'static str,
    master: Family<NameLabels, Gauge>,
    slow_path: Family<NameLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    terms: Counter,
    losses: Family<LossLabels, Counter>,
    age: Gauge<f64, AtomicU64>,
    without: Counter<f64, AtomicU64>,
    fenced: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabels {
    name: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    lock: &'static str,
    verb: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LossLabels {
    reason: &'static str,
}

impl Default for LeaseMetrics {
    fn default() -> Self {
        Self {
            lock: LEASE,
            master: Family::default(),
            slow_path: Family::default(),
            requests: Family::default(),
            terms: Counter::default(),
            losses: Family::default(),
            age: Gauge::default(),
            without: Counter::default(),
            fenced: Counter::default(),
        }
    }
}

impl LeaseMetrics {
    /// The same, for a ConfigMap in the place of the Lease.
    #[must_use]
    pub fn of_configmap(&self) -> Self {
        Self { lock: CONFIGMAP, ..self.clone() }
    }

    /// For a ConfigMap beside the Lease: of its requests alone, since who leads is counted by the Lease.
    #[must_use]
    pub(super) fn beside(&self) -> Self {
        Self { lock: CONFIGMAP, requests: self.requests.clone(), ..Self::default() }
    }

    /// Registers them with a registry without a prefix.
    pub fn register(all: &mut Registry) -> Self {
        let metrics = Self::default();
        metrics.register_with(all);
        metrics
    }

    fn register_with(&self, all: &mut Registry) {
        all.register(
            "leader_election_master_status",
            "1 if this process leads, as Kubernetes' own electors have it",
            self.master.clone(),
        );
        all.register(
            "leader_election_slowpath",
            "Times that a leader had to read its lease, as Kubernetes' own electors have it",
            self.slow_path.clone(),
        );
        let own = all.sub_registry_with_prefix("peili_election");
        own.register("lease_requests", "Requests about the lease", self.requests.clone());
        own.register("lease_terms", "Terms that this process began", self.terms.clone());
        own.register("lease_losses", "Terms of this process that ended, by why", self.losses.clone());
        own.register(
            "lease_age_seconds",
            "How long ago the holder was last seen to renew the lease",
            self.age.clone(),
        );
        own.register(
            "without_leader_seconds",
            "How long this node saw nobody hold the lease, or could not tell",
            self.without.clone(),
        );
        own.register(
            "fenced_effects",
            "Effects that did not happen, since the term was over or another one had begun",
            self.fenced.clone(),
        );
        self.leads(false);
        drop(self.slow_path.get_or_create(&NAME));
        for verb in ["get", "create", "update"] {
            for outcome in ["ok", "absent", "conflict", "rejected", "unknown"] {
                drop(self.requests.get_or_create(&RequestLabels { lock: self.lock, verb, outcome }));
            }
        }
        for reason in Loss::ALL.map(loss) {
            drop(self.losses.get_or_create(&LossLabels { reason }));
        }
    }

    pub(super) fn leads(&self, leads: bool) {
        self.master.get_or_create(&NAME).set(leads.into());
    }

    pub(super) fn begun(&self) {
        self.terms.inc();
    }

    pub(super) fn lost(&self, why: Loss) {
        self.losses.get_or_create(&LossLabels { reason: loss(why) }).inc();
    }

    /// A leader reads.
    pub(super) fn read_as_leader(&self) {
        self.slow_path.get_or_create(&NAME).inc();
    }

    pub(super) fn answered(&self, verb: &'static str, answer: &Answer) {
        let outcome = match answer {
            Answer::Object(_) => "ok",
            Answer::Absent => "absent",
            Answer::Conflict => "conflict",
            Answer::Rejected(_) => "rejected",
            Answer::Unknown => "unknown",
        };
        self.requests.get_or_create(&RequestLabels { lock: self.lock, verb, outcome }).inc();
    }

    pub(super) fn seen(&self, age: Option<Ms>) {
        self.age.set(age.map_or(-1.0, |age| age as f64 / 1_000.0));
    }

    pub(super) fn without(&self, time: Ms) {
        self.without.inc_by(time as f64 / 1_000.0);
    }

    /// An effect did not happen.
    pub fn fenced(&self) {
        self.fenced.inc();
    }
}

/// The verb of a request, as RBAC has it.
pub(super) const fn verb(request: &Request) -> &'static str {
    match request {
        Request::Get => "get",
        Request::Create(_) => "create",
        Request::Put(_) => "update",
    }
}

/// Why a term ended, for metrics and people.
pub(super) const fn loss(loss: Loss) -> &'static str {
    match loss {
        Loss::Expired => "expired",
        Loss::Foreign => "another-holder",
        Loss::Deleted => "deleted",
        Loss::Replaced => "replaced",
        Loss::Preferred => "preferred-holder",
        Loss::Yielded => "yielded",
    }
}
