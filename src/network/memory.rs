//! The in-memory twin: networks that share a [`Hub`] see each other at once, under the same rules of trust.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use super::identity::Identity;
use super::{
    Advertisement, MemberState, Network, Peer, PeerStatus, ResolveError, Status, TagQuestion, TagSource,
    Tagged,
};
use crate::oci::{Action, Digest, Gate, PeerId};

/// Joins networks.
#[derive(Clone, Default)]
pub struct Hub {
    nodes: Arc<Mutex<BTreeMap<PeerId, Node>>>,
}

/// One node's network.
pub struct MemoryNetwork {
    hub: Hub,
    id: PeerId,
}

struct Node {
    peer: Arc<Peer>,
    gate: Arc<dyn Gate>,
    tags: Arc<dyn TagSource>,
    held: HashSet<Digest>,
    connected: bool,
}

impl Hub {
    /// A hub without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new node under `id`, with its peer port at `transfer`; replaces one with the same ID.
    pub fn join(
        &self,
        id: PeerId,
        transfer: Vec<SocketAddr>,
        gate: Arc<dyn Gate>,
        tags: Arc<dyn TagSource>,
    ) -> Arc<MemoryNetwork> {
        let peer = Peer {
            id: id.clone(),
            transfer,
            node: id.short().to_owned(),
            zone: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let node = Node { peer: Arc::new(peer), gate, tags, held: HashSet::new(), connected: true };
        self.lock().insert(id.clone(), node);
        Arc::new(MemoryNetwork { hub: self.clone(), id })
    }

    /// Cuts a node off, or joins it again.
    pub fn set_connected(&self, id: &PeerId, connected: bool) {
        if let Some(node) = self.lock().get_mut(id) {
            node.connected = connected;
        }
    }

    /// Lets a node claim what it has not.
    pub fn claim(&self, id: &PeerId, digest: Digest) {
        if let Some(node) = self.lock().get_mut(id) {
            node.held.insert(digest);
        }
    }

    /// Lets a node claim to be in a zone.
    pub fn set_zone(&self, id: &PeerId, zone: &str) {
        if let Some(node) = self.lock().get_mut(id) {
            node.peer = Arc::new(Peer { zone: zone.to_owned(), ..Peer::clone(&node.peer) });
        }
    }

    /// A peer ID as a new node would have it.
    pub fn new_id() -> PeerId {
        Identity::generate().peer_id().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerId, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the two are connected: both are there, and each allows the other.
fn linked(one: &Node, other: &Node) -> bool {
    let allows = |gate: &Arc<dyn Gate>, peer: &Peer| gate.allows(&peer.id, Action::Connect);
    one.connected
        && other.connected
        && one.peer.id != other.peer.id
        && allows(&one.gate, &other.peer)
        && allows(&other.gate, &one.peer)
}

impl MemoryNetwork {
    /// This node's peer ID.
    pub fn peer_id(&self) -> &PeerId {
        &self.id
    }

    fn peers(&self, wanted: impl Fn(&Node, &Node) -> bool) -> Vec<Arc<Peer>> {
        let nodes = self.hub.lock();
        let Some(own) = nodes.get(&self.id) else { return Vec::new() };
        let others = nodes.values().filter(|node| linked(own, node) && wanted(own, node));
        others.map(|node| Arc::clone(&node.peer)).collect()
    }
}

#[async_trait]
impl Network for MemoryNetwork {
    fn holders(&self, digest: &Digest) -> Vec<Arc<Peer>> {
        self.peers(|own, other| {
            // It tells whom it would serve; who believes it decides here.
            other.held.contains(digest)
                && own.gate.allows(&other.peer.id, Action::Believe)
                && other.gate.allows(&own.peer.id, Action::Serve)
        })
    }

    fn tag_peers(&self) -> Vec<Arc<Peer>> {
        self.peers(|own, other| own.gate.allows(&other.peer.id, Action::Tags))
    }

    fn advertise(&self, change: Advertisement) {
        if let Some(node) = self.hub.lock().get_mut(&self.id) {
            match change {
                Advertisement::All(digests) => node.held = digests.into_iter().collect(),
                Advertisement::Added(digest) => {
                    node.held.insert(digest);
                }
                Advertisement::Removed(digest) => {
                    node.held.remove(&digest);
                }
            }
        }
    }

    async fn resolve(
        &self,
        peer: &PeerId,
        question: &TagQuestion,
        limit: Duration,
    ) -> Result<Option<Tagged>, ResolveError> {
        let tags = {
            let nodes = self.hub.lock();
            let unreachable = || ResolveError::Unreachable("it is not connected".into());
            let own = nodes.get(&self.id).ok_or_else(unreachable)?;
            if !own.gate.allows(peer, Action::Tags) {
                return Err(ResolveError::Denied);
            }
            let other = nodes.get(peer).filter(|other| linked(own, other)).ok_or_else(unreachable)?;
            if !other.gate.allows(&self.id, Action::Tags) {
                return Err(ResolveError::Denied);
            }
            Arc::clone(&other.tags)
        };
        match question.home {
            None => Ok(tags.tag(&self.id, &question.name)),
            Some(fresh) => timeout(limit, tags.home_tag(&self.id, &question.name, fresh))
                .await
                .map_err(|_| ResolveError::Timeout),
        }
    }

    fn status(&self) -> Status {
        let nodes = self.hub.lock();
        let Some(own) = nodes.get(&self.id) else { return Status::default() };
        let others = nodes
            .iter()
            .filter(|(id, node)| **id != self.id && own.gate.allows(&node.peer.id, Action::Connect));
        let peers: Vec<PeerStatus> = others
            .map(|(id, node)| PeerStatus {
                id: id.to_string(),
                node: node.peer.node.clone(),
                zone: node.peer.zone.clone(),
                version: node.peer.version.clone(),
                connected: linked(own, node),
                state: Some(if linked(own, node) { MemberState::Alive } else { MemberState::Dead }),
                seconds: 0,
                neighbour: linked(own, node),
                level: own.gate.level(id, Action::Connect),
                proof: own.gate.proof(id).to_string(),
                holds: node.held.len(),
                transfer: node.peer.transfer.clone(),
                problem: if linked(own, node) { String::new() } else { format!("peer {id}: disconnected") },
            })
            .collect();
        let problems =
            peers.iter().map(|peer| peer.problem.clone()).filter(|text| !text.is_empty()).collect();
        let advertised = own.held.len();
        Status { id: self.id.to_string(), peers, advertised, problems, ..Status::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::conformance::{Cluster, Controls, check_all};

    struct Twin {
        hub: Hub,
        nodes: Vec<(Arc<MemoryNetwork>, Controls)>,
    }

    #[async_trait]
    impl Cluster for Twin {
        async fn start(count: usize) -> Self {
            let hub = Hub::new();
            let nodes = (0..count).map(|n| {
                let controls = Controls::default();
                let transfer = vec![SocketAddr::from(([10, 0, 0, u8::try_from(n).unwrap()], 5002))];
                let network = hub.join(
                    Hub::new_id(),
                    transfer,
                    Arc::clone(&controls.gate) as _,
                    Arc::clone(&controls.tags) as _,
                );
                (network, controls)
            });
            Self { nodes: nodes.collect(), hub }
        }

        fn network(&self, node: usize) -> Arc<dyn Network> {
            Arc::clone(&self.nodes[node].0) as _
        }

        fn id(&self, node: usize) -> PeerId {
            self.nodes[node].0.peer_id().clone()
        }

        fn controls(&self, node: usize) -> &Controls {
            &self.nodes[node].1
        }

        fn recheck(&self, _: usize) {}

        async fn kill(&mut self, node: usize) {
            self.hub.set_connected(&self.id(node), false);
        }
    }

    #[tokio::test]
    async fn conforms() {
        check_all::<Twin>().await;
    }
}
