//! What policies are told about peers: what the network knows of them, and for trust also how they behaved as sources.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use crate::mirror::{self, Mirror};
use crate::network::swarm::SwarmNetwork;
use crate::network::{KnownPeer, Peer};
use crate::oci::PeerId;
use crate::policy::trust::Conduct;
use crate::policy::{self, Node, Provenance};
use crate::trust::{Fact, Facts};

/// Facts about the peers of this node.
pub(super) struct PeerFacts {
    pub(super) network: SwarmNetwork,
    pub(super) mirror: Mirror,
}

impl Facts for PeerFacts {
    fn facts(&self) -> Vec<Fact> {
        let conduct = self.mirror.conduct();
        let fact = |KnownPeer { peer, observed }: KnownPeer| Fact {
            id: peer.id.clone(),
            node: node(&peer),
            observed,
            announced: peer.transfer.iter().map(multiaddr).collect(),
            conduct: conduct.get(&peer.id).map(self::conduct).unwrap_or_default(),
        };
        self.network.known_peers().into_iter().map(fact).collect()
    }
}

/// Who asks for content, by the network's knowledge; it serves before there is a network.
#[derive(Clone, Default)]
pub(super) struct PeerBook(Arc<OnceLock<SwarmNetwork>>);

impl PeerBook {
    pub(super) fn open(&self, network: SwarmNetwork) {
        // An error is one that is open already.
        let _ = self.0.set(network);
    }
}

impl mirror::Callers for PeerBook {
    fn node(&self, peer: &PeerId) -> Node {
        let known = self.0.get().and_then(|network| network.known_peer(peer));
        known.map_or_else(|| Node { id: peer.to_string(), ..Node::default() }, |peer| node(&peer))
    }
}

/// All of it is the peer's own word but its ID.
fn node(peer: &Peer) -> Node {
    Node {
        id: peer.id.to_string(),
        name: peer.node.clone(),
        name_provenance: Provenance::Claimed,
        version: peer.version.clone(),
        labels: policy::zone(&peer.zone, Provenance::Claimed),
    }
}

fn conduct(seen: &mirror::Conduct) -> Conduct {
    let mirror::Faults { digest_mismatches, timeouts, protocol_errors, since } = seen.faults;
    Conduct { bytes: seen.bytes, digest_mismatches, timeouts, protocol_errors, since_last_fault: since }
}

fn multiaddr(address: &SocketAddr) -> String {
    let kind = if address.is_ipv4() { "ip4" } else { "ip6" };
    format!("/{kind}/{}/tcp/{}", address.ip(), address.port())
}
