//! What `/status` says of this node: each part is asked, and nothing is kept.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::admin::{self, Status};
use crate::cluster::Coordinator;
use crate::election::Election;
use crate::listener::Admission;
use crate::mirror::{self, Mirror};
use crate::network::Network as _;
use crate::network::swarm::SwarmNetwork;
use crate::policy::Policies;
use crate::registry::{self, Amount};
use crate::store::{Health, Watcher};
use crate::telemetry::Causes;
use crate::trust::PinnedTrust;
use crate::upstream::named::Named;
use crate::upstream::probe::Prober;
use crate::upstream::{self, Upstreams as _};

use super::diagnosing::Diagnosing;
use super::zone::Zone;

/// Registries that `/status` names, and for how long after they were asked for.
const REGISTRIES: usize = 16;
const ASKED: Duration = Duration::from_secs(600);

/// For so long `/status` names who was turned away by the registry.
const STRANGERS: Duration = Duration::from_secs(600);

/// What is wrong beside what the parts say of themselves.
#[derive(Debug, Default)]
pub(super) struct Problems {
    configuration: Mutex<Option<String>>,
}

/// Where `/status` comes from.
pub(super) struct Report {
    pub(super) node: admin::Node,
    pub(super) zone: Arc<Zone>,
    pub(super) started: tokio::time::Instant,
    pub(super) source: String,
    pub(super) watcher: Arc<dyn Watcher>,
    pub(super) mirror: Mirror,
    pub(super) network: SwarmNetwork,
    pub(super) served: registry::Metrics,
    pub(super) to_peers: mirror::Metrics,
    pub(super) causes: Arc<Causes>,
    pub(super) clients: Admission,
    pub(super) policies: Arc<Policies>,
    pub(super) election: Election,
    pub(super) coordinator: Option<Arc<Coordinator>>,
    pub(super) diagnosing: Arc<Diagnosing>,
    pub(super) upstreams: Named,
    pub(super) prober: Arc<Prober>,
    pub(super) gate: Arc<PinnedTrust>,
    pub(super) problems: Arc<Problems>,
}

impl Report {
    /// Asks the parts.
    pub(super) fn status(&self) -> Status {
        let health = self.watcher.health().borrow().clone();
        let counts = self.mirror.counts();
        let network = self.network.status();
        let (requests, bytes) = self.to_peers.to_peers();
        let mut problems: Vec<_> = self.node.problems().cloned().collect();
        problems.extend(self.problems.configuration());
        if let Health::Degraded(reason) = &health {
            problems.push(format!("store: {reason}"));
        }
        problems.extend(self.watcher.problem().map(|problem| format!("store: {problem}")));
        problems.extend(self.policies.problems().into_iter().map(|problem| format!("policies: {problem}")));
        problems.extend(self.zone.problem());
        problems.extend(self.election.problems());
        problems.extend(self.diagnosing.problems());
        problems.extend(self.coordinator.iter().flat_map(|coordinator| coordinator.problems()));
        problems
            .extend(self.policies.unrecorded().map(|problem| format!("policies: not recorded: {problem}")));
        problems.extend(self.gate.problems());
        problems.extend(network.problems.iter().map(|problem| format!("network: {problem}")));
        problems.extend(self.mirror.advisory_denials());
        if let (count, Some(from)) = self.clients.strangers(STRANGERS) {
            problems.push(format!(
                "registry: closed {count} connections that do not come from this node, the last from {from} (`registry.clients`)"
            ));
        }
        let known = self.upstreams.known();
        problems.extend(known.iter().filter_map(|known| {
            let problem = known.state.problem.as_ref()?;
            Some(format!("upstream {}: {problem}", known.name))
        }));
        for (peer, conduct) in self.mirror.conduct() {
            if conduct.digest_mismatches > 0 {
                let count = conduct.digest_mismatches;
                problems.push(format!("peer {peer} had a part in {count} contents with a wrong digest"));
            }
            if conduct.suspected {
                problems.push(format!("peer {peer} is suspected: its last requests failed"));
            }
        }
        Status {
            version: Status::VERSION,
            node: admin::Node {
                zone: self.zone.now(),
                uptime_seconds: self.started.elapsed().as_secs(),
                ..self.node.clone()
            },
            store: admin::Store {
                source: self.source.clone(),
                health: health.into(),
                images: counts.tags as u64,
                digests: counts.digests as u64,
                bytes: Some(counts.bytes),
            },
            network,
            policies: self.policies.loaded(),
            policies_refused: self.policies.refused().unwrap_or_default(),
            election: self.election.status(),
            registries: self
                .prober
                .asked(ASKED, REGISTRIES)
                .into_iter()
                .map(|(registry, answers)| admin::AskedRegistry { name: registry.to_string(), answers })
                .collect(),
            upstreams: known.iter().map(upstream_status).collect(),
            served: admin::Served::new(&self.served.served(), Amount { requests, bytes }),
            diagnosis: self.diagnosing.status(),
            problems,
            causes: self.causes.last(),
        }
    }
}

fn upstream_status(known: &upstream::Known) -> admin::Upstream {
    admin::Upstream {
        name: known.name.to_string(),
        health: known.state.health,
        latency_millis: known.state.latency.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
    }
}

impl Problems {
    fn configuration(&self) -> Option<String> {
        self.configuration.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why the configuration that was read last does not count; `None`: it does.
    pub(super) fn set_configuration(&self, problem: Option<String>) {
        *self.configuration.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}
