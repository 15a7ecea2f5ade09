//! Joins elections with the rest: the network's members are the candidates, and who leads is told to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::cluster::{Api, Coordinator, Fleet, Kind, Node, ObjectLock};
use crate::config::Config;
use crate::election::strict::{self, Beside, BootClock, LeaseMetrics, Strict};
use crate::election::{self, Alone, Backend, Election, Facts, Hold, Mark, Member, Metrics, Table, World};
use crate::network;
use crate::network::admission::Admission;
use crate::network::facts::{self, ApiServer};
use crate::network::swarm::{First, SwarmNetwork};
use crate::oci::PeerId;
use crate::policy::Policies;
use crate::policy::election::{ElectionPolicy, Reachability};

/// The members as candidates.
pub(super) struct Nodes {
    pub(super) network: SwarmNetwork,
    /// Hundredths of the upload slots that are taken.
    pub(super) load: Box<dyn Fn() -> u32 + Send + Sync>,
    /// Whether the configuration says where others may be.
    pub(super) looks: Arc<AtomicBool>,
}

/// Whether the configuration says where others may be.
pub(super) fn looks(config: &network::Config) -> bool {
    !config.dns.is_empty() || config.peers.iter().any(|peer| !peer.addresses.is_empty())
}

/// Whom a node dials first that was started again.
pub(super) fn first(here: &PeerId, config: &election::Config) -> First {
    let (here, config) = (here.clone(), config.clone());
    Box::new(move |members| {
        election::remembered(members.into_iter().map(candidate).collect(), &here, &config)
    })
}

/// Elections over these nodes.
pub(super) fn elections(
    config: &election::Config,
    policies: &Arc<Policies>,
    admission: &Admission,
    nodes: Nodes,
    strict: Option<Strict>,
    metrics: Metrics,
) -> Election {
    let here = nodes.network.peer_id().clone();
    let hash = {
        let (policies, admission) = (Arc::clone(policies), admission.clone());
        move || {
            let secret = admission.secret();
            policies.hash(secret.as_ref().map(|secret| secret.as_slice()))
        }
    };
    Election::new(
        here,
        config,
        Arc::clone(policies) as Arc<dyn ElectionPolicy>,
        hash,
        Arc::new(nodes),
        strict,
        metrics,
    )
}

/// Drives the strict role. Ends never.
type Driving = BoxFuture<'static, ()>;

/// The strict role, who drives it, and its work, where there is a Kubernetes API.
pub(super) fn strict(
    config: &Config,
    network: &SwarmNetwork,
    metrics: LeaseMetrics,
) -> Option<(Strict, (Driving, Arc<Coordinator>))> {
    if !config.kubernetes.is_in_cluster() {
        return None;
    }
    let api = || Api::new(&config.kubernetes);
    let election::Config { backend, lease, configmap, .. } = &config.election;
    let old = config.election.configmap_name();
    let lock = |kind, name: &str| Arc::new(ObjectLock::new(kind, Arc::new(api()), name));
    let hold = (*backend == Backend::ConfigMap).then_some(configmap.hold);
    let (kind, name, metrics) = match hold {
        Some(Hold::Sole) => (Kind::ConfigMap, old, metrics.of_configmap()),
        Some(Hold::Both | Hold::Observe) | None => (Kind::Lease, lease.name.as_str(), metrics),
    };
    let here = if config.node.name.is_empty() { network.peer_id().as_str() } else { &config.node.name };
    let fleet = Arc::new(Members(network.clone()));
    let clock = Arc::new(BootClock);
    let duty =
        Coordinator::new(api(), &lease.name, (kind, name), here, fleet, clock.clone(), metrics.clone());
    let duty = Arc::new(duty);
    let parts =
        strict::Parts { lock: lock(kind, name), clock, duty: duty.clone(), metrics, seed: rand::random() };
    let identity = election::identity::identity(&config.node.name, network.peer_id(), rand::random());
    let settings = lease.times.settings();
    let beside = match hold {
        Some(Hold::Both) => Some(Beside::Held),
        Some(Hold::Observe) => Some(Beside::Observed),
        Some(Hold::Sole) | None => None,
    };
    let (strict, driving) = match beside {
        Some(beside) => {
            let old = lock(Kind::ConfigMap, old);
            let (strict, pair) = Strict::beside(&identity, &settings, beside, old, parts);
            (strict, pair.run().boxed())
        }
        None => {
            let (strict, driver) = Strict::new(&identity, &settings, parts);
            (strict, driver.run().boxed())
        }
    };
    Some((strict, (driving, duty)))
}

/// The members as the coordinator tells of them.
struct Members(SwarmNetwork);

impl Fleet for Members {
    fn members(&self) -> Vec<Node> {
        let node = |member: network::Member| {
            let Member { id, name, version, facts, .. } = candidate(member);
            let reached = match facts.api_server {
                Reachability::Unknown => None,
                Reachability::Reachable => Some(true),
                Reachability::Unreachable => Some(false),
            };
            Node { id, name, version, reached, policy: facts.policy.to_string() }
        };
        self.0.members().into_iter().map(node).collect()
    }
}

impl World for Nodes {
    fn members(&self) -> Vec<Member> {
        self.network.members().into_iter().map(candidate).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.network.changes()
    }

    fn is_complete(&self) -> bool {
        self.network.is_complete()
    }

    fn alone(&self) -> Alone {
        let looks = self.looks.load(Ordering::Relaxed) || !self.network.known_peers().is_empty();
        if looks || self.network.is_hinted() { Alone::Unreached } else { Alone::NoBootstrapSource }
    }

    fn load(&self) -> u32 {
        (self.load)()
    }

    fn known(&self) -> usize {
        self.network.known_peers().len() + 1
    }

    fn tell(&self, facts: Facts) {
        self.network.set_facts(facts::Facts {
            policy: facts.policy.0,
            api_server: match facts.api_server {
                Reachability::Unknown => ApiServer::Unknown,
                Reachability::Reachable => ApiServer::Reachable,
                Reachability::Unreachable => ApiServer::Unreachable,
            },
            load: facts.load,
            uptime: facts.uptime,
            labels: facts.labels.into_iter().collect(),
        });
    }

    fn lead(&self, table: &Table) {
        let (candidates, leaders) = table.opinion();
        self.network.set_opinion(candidates, leaders);
        self.network.dial_first(&table.introducers());
    }

    fn records(&self, peers: &[PeerId]) -> Vec<Vec<u8>> {
        self.network.records(peers)
    }

    fn hint(&self, book: &[Vec<u8>]) {
        self.network.hint(book);
    }

    fn opinions(&self) -> Vec<(u32, u32)> {
        self.network.opinions()
    }
}

fn candidate(member: network::Member) -> Member {
    let network::Member { peer, facts, suspected } = member;
    Member {
        id: peer.id.clone(),
        name: peer.node.clone(),
        zone: peer.zone.clone(),
        version: peer.version.clone(),
        facts: Facts {
            policy: Mark(facts.policy),
            api_server: match facts.api_server {
                ApiServer::Unknown => Reachability::Unknown,
                ApiServer::Reachable => Reachability::Reachable,
                ApiServer::Unreachable => Reachability::Unreachable,
            },
            load: facts.load,
            uptime: facts.uptime,
            labels: facts.labels.into_iter().collect(),
        },
        suspected,
    }
}
