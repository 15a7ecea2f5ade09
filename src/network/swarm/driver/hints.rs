//! Dials by the word of a lease, where this node has no neighbour.

use std::net::SocketAddr;

use libp2p::PeerId as P2pId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use tokio::time::Instant;

use super::super::bootstrap::Target;
use super::{Driver, dialing};

impl Driver {
    fn hints_flying(&self) -> usize {
        self.dials.values().filter(|(target, _)| *target == Target::Hint).count()
    }

    /// When a hint may be followed.
    pub(super) fn hint_due(&self, now: Instant) -> Option<Instant> {
        if !self.neighbours.is_empty() {
            return None;
        }
        let due = self.shared.book().due(self.hints_flying(), now)?;
        // Who is connected and no neighbour yet is not dialled again.
        Some(due.max(self.next_hint))
    }

    /// Follows hints.
    pub(super) fn follow_hints(&mut self, now: Instant) {
        if !self.neighbours.is_empty() || now < self.next_hint {
            return;
        }
        while let Some((peer, address)) = self.next_hint(now) {
            tracing::debug!(%peer, %address, "dialling somebody whom the lease names");
            let options = DialOpts::peer_id(peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(vec![dialing::multiaddr(address)])
                .allocate_new_port()
                .build();
            self.dial(Target::Hint, Some(address), options, now);
        }
        self.next_hint = now + super::RETRY;
    }

    fn next_hint(&self, now: Instant) -> Option<(P2pId, SocketAddr)> {
        self.shared.book().next(self.hints_flying(), |peer| self.links.contains_key(peer), now)
    }
}
