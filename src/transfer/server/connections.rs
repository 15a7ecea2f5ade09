//! Which connections there are, so that their number is bounded and a changed level closes them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::oci::PeerId;

/// Handshakes at once. The oldest gives way to a new one: a real handshake takes milliseconds, so that a flood of
/// half-open connections ends its own and not those of peers.
const HANDSHAKES: usize = 256;
/// Connections in all: as many peers as a cluster of a thousand nodes has.
const CONNECTIONS: usize = 1024;
/// Connections of one peer: twice what its client opens at once.
const CONNECTIONS_PER_PEER: usize = 64;

/// The handshakes in progress.
#[derive(Default)]
pub(super) struct Handshakes(Arc<Mutex<VecDeque<CancellationToken>>>);

/// One handshake in progress, until it is dropped.
pub(super) struct Ticket {
    token: CancellationToken,
    all: Arc<Mutex<VecDeque<CancellationToken>>>,
}

/// The connections of proved peers.
pub(super) struct Connections {
    state: Mutex<State>,
    active: Gauge,
}

/// One connection, until it is dropped.
pub(super) struct Entry {
    connections: Arc<Connections>,
    id: u64,
    close: CancellationToken,
}

#[derive(Default)]
struct State {
    next_id: u64,
    entries: HashMap<u64, (PeerId, CancellationToken)>,
    /// No zeros.
    by_peer: HashMap<PeerId, usize>,
}

impl Handshakes {
    pub(super) fn enter(&self) -> Ticket {
        let token = CancellationToken::new();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= HANDSHAKES
            && let Some(oldest) = all.pop_front()
        {
            oldest.cancel();
        }
        all.push_back(token.clone());
        Ticket { token, all: Arc::clone(&self.0) }
    }
}

impl Ticket {
    /// Returns when a newer handshake takes its place.
    pub(super) fn displaced(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|token| *token != self.token);
    }
}

impl Connections {
    pub(super) fn new(active: Gauge) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), active })
    }

    /// `None`: there are too many.
    pub(super) fn enter(self: &Arc<Self>, peer: &PeerId) -> Option<Entry> {
        let mut state = self.lock();
        let of_peer = state.by_peer.get(peer).copied().unwrap_or(0);
        if state.entries.len() >= CONNECTIONS || of_peer >= CONNECTIONS_PER_PEER {
            return None;
        }
        let (id, close) = (state.next_id, CancellationToken::new());
        state.next_id += 1;
        state.entries.insert(id, (peer.clone(), close.clone()));
        state.by_peer.insert(peer.clone(), of_peer + 1);
        self.active.inc();
        Some(Entry { connections: Arc::clone(self), id, close })
    }

    /// Closes the connections whose peer is not `allowed`.
    pub(super) fn close_unless(&self, allowed: impl Fn(&PeerId) -> bool) {
        for (peer, close) in self.lock().entries.values() {
            if !allowed(peer) {
                close.cancel();
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().entries.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Returns when the connection has to be closed.
    pub(super) fn closed(&self) -> WaitForCancellationFuture<'_> {
        self.close.cancelled()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.connections.lock();
        let Some((peer, _)) = state.entries.remove(&self.id) else { return };
        if let Some(count) = state.by_peer.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                state.by_peer.remove(&peer);
            }
        }
        self.connections.active.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: char) -> PeerId {
        format!("{}{last}", "1".repeat(44)).parse().unwrap()
    }

    #[test]
    fn handshakes_are_bounded_by_dropping_the_oldest() {
        let handshakes = Handshakes::default();
        let mut tickets: Vec<_> = (0..HANDSHAKES).map(|_| handshakes.enter()).collect();
        tickets.pop();
        let last = handshakes.enter();
        assert!(tickets.iter().all(|ticket| !ticket.token.is_cancelled()));
        let _one_more = handshakes.enter();
        let displaced = tickets.iter().filter(|ticket| ticket.token.is_cancelled()).count();
        assert!(displaced == 1 && tickets[0].token.is_cancelled() && !last.token.is_cancelled());
        assert_eq!(handshakes.0.lock().unwrap().len(), HANDSHAKES);
    }

    #[test]
    fn connections_are_bounded_per_peer_and_in_all() {
        let connections = Connections::new(Gauge::default());
        let mut entries: Vec<_> = (0..CONNECTIONS_PER_PEER).map(|_| connections.enter(&peer('a'))).collect();
        assert!(entries.iter().all(Option::is_some) && connections.enter(&peer('a')).is_none());
        for c in ('A'..='Z').chain('b'..='z').filter(|c| !matches!(c, 'I' | 'O' | 'l')) {
            entries.extend((0..CONNECTIONS_PER_PEER).map(|_| connections.enter(&peer(c))));
        }
        assert_eq!(connections.len(), CONNECTIONS);
        drop(entries);
        assert_eq!((connections.len(), connections.active.get()), (0, 0));
        assert!(connections.lock().by_peer.is_empty());
    }

    #[test]
    fn closes_who_is_not_allowed() {
        let connections = Connections::new(Gauge::default());
        let (a, b) = (connections.enter(&peer('a')).unwrap(), connections.enter(&peer('b')).unwrap());
        connections.close_unless(|id| *id == peer('a'));
        assert!(!a.close.is_cancelled() && b.close.is_cancelled());
    }
}
