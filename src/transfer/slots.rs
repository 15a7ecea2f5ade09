//! Who may upload now: a number of slots in all and per peer, and a fair, bounded queue before them.
//!
//! Peers with waiting requests take turns, so that one request of a peer is not behind a hundred of another. A full
//! queue drops the youngest request of the peer that has the most in it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::oci::PeerId;

/// Slots of one content: a peer asks for the next segment before the last one ends.
const SEGMENTS: usize = 2;

/// The slots.
pub(super) struct Slots {
    limits: Limits,
    state: Mutex<State>,
}

/// Numbers of requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) total: usize,
    pub(super) per_peer: usize,
    pub(super) queue: usize,
}

/// No slot came free in time; this many requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy(pub(super) u32);

/// The right to one upload; dropping it passes it on.
pub(super) struct Slot {
    slots: Arc<Slots>,
    peer: PeerId,
}

#[derive(Default)]
struct State {
    used: usize,
    /// Uploads by peer; no zeros.
    active: HashMap<PeerId, usize>,
    /// Waiting requests by peer, oldest first; no empty ones.
    waiting: HashMap<PeerId, VecDeque<Waiting>>,
    /// The keys of `waiting`, the next one to be served first.
    turns: VecDeque<PeerId>,
    queued: usize,
    next_id: u64,
}

struct Waiting {
    id: u64,
    /// How many its peer may have.
    most: usize,
    granted: oneshot::Sender<()>,
}

/// A request in the queue; dropping it takes it out, or gives back what it was granted.
struct Waiter<'a> {
    slots: &'a Arc<Slots>,
    peer: &'a PeerId,
    id: u64,
    granted: oneshot::Receiver<()>,
    done: bool,
}

impl Slots {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, state: Mutex::default() })
    }

    /// Waits for a slot, at most `limit`. `at_once`: contents that may go to `peer`, if not as many as
    /// to others.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        peer: &PeerId,
        at_once: Option<u32>,
        limit: Duration,
    ) -> Result<Slot, Busy> {
        let most = at_once.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
        let most = most.saturating_mul(SEGMENTS);
        let most = most.min(self.limits.per_peer);
        let mut waiter = {
            let mut state = self.lock();
            if state.used < self.limits.total && state.active_of(peer) < most {
                state.take(peer);
                return Ok(Slot { slots: Arc::clone(self), peer: peer.clone() });
            }
            if state.queued >= self.limits.queue && !state.displace(peer) {
                return Err(Busy(saturate(state.queued)));
            }
            let (id, granted) = state.enqueue(peer, most);
            Waiter { slots: self, peer, id, granted, done: false }
        };
        if let Ok(Ok(())) = tokio::time::timeout(limit, &mut waiter.granted).await {
            waiter.done = true;
            return Ok(Slot { slots: Arc::clone(self), peer: peer.clone() });
        }
        drop(waiter);
        Err(Busy(self.queued()))
    }

    /// How many hundredths of the slots are taken.
    pub(super) fn load(&self) -> u32 {
        saturate(self.lock().used.saturating_mul(100) / self.limits.total.max(1))
    }

    /// Requests that wait.
    pub(super) fn queued(&self) -> u32 {
        saturate(self.lock().queued)
    }

    fn release(&self, peer: &PeerId) {
        let mut state = self.lock();
        state.give_back(peer);
        state.dispatch(&self.limits);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn active_of(&self, peer: &PeerId) -> usize {
        self.active.get(peer).copied().unwrap_or(0)
    }

    fn take(&mut self, peer: &PeerId) {
        self.used += 1;
        *self.active.entry(peer.clone()).or_default() += 1;
    }

    fn give_back(&mut self, peer: &PeerId) {
        self.used -= 1;
        if let Some(active) = self.active.get_mut(peer) {
            *active -= 1;
            if *active == 0 {
                self.active.remove(peer);
            }
        }
    }

    fn enqueue(&mut self, peer: &PeerId, most: usize) -> (u64, oneshot::Receiver<()>) {
        let id = self.next_id;
        self.next_id += 1;
        let (sender, receiver) = oneshot::channel();
        let waiting = self.waiting.entry(peer.clone()).or_default();
        if waiting.is_empty() {
            self.turns.push_back(peer.clone());
        }
        waiting.push_back(Waiting { id, most, granted: sender });
        self.queued += 1;
        (id, receiver)
    }

    /// Makes room in a full queue for a request of `peer`, unless it has the most there itself.
    fn displace(&mut self, peer: &PeerId) -> bool {
        let own = self.waiting.get(peer).map_or(0, VecDeque::len);
        let most = self.waiting.iter().max_by_key(|(_, waiting)| waiting.len());
        let Some((greedy, youngest)) = most
            .filter(|(_, waiting)| waiting.len() > own + 1)
            .and_then(|(id, w)| Some((id.clone(), w.back()?.id)))
        else {
            return false;
        };
        // Dropping its sender tells it.
        self.remove(&greedy, youngest)
    }

    /// Takes a request out of the queue; `false`: it is not there (any more).
    fn remove(&mut self, peer: &PeerId, id: u64) -> bool {
        let Some(waiting) = self.waiting.get_mut(peer) else { return false };
        let Some(index) = waiting.iter().position(|waiting| waiting.id == id) else { return false };
        waiting.remove(index);
        self.queued -= 1;
        if waiting.is_empty() {
            self.waiting.remove(peer);
            self.turns.retain(|turn| turn != peer);
        }
        true
    }

    /// Grants free slots, one per peer and turn.
    fn dispatch(&mut self, limits: &Limits) {
        while self.used < limits.total {
            let most = |peer| self.waiting.get(peer)?.front().map(|waiting: &Waiting| waiting.most);
            let eligible =
                self.turns.iter().position(|peer| most(peer).is_none_or(|most| self.active_of(peer) < most));
            let Some(peer) = eligible.and_then(|index| self.turns.remove(index)) else { return };
            let Some(waiting) = self.waiting.get_mut(&peer) else { continue };
            let next = waiting.pop_front();
            if waiting.is_empty() {
                self.waiting.remove(&peer);
            } else {
                self.turns.push_back(peer.clone());
            }
            let Some(next) = next else { continue };
            self.queued -= 1;
            if next.granted.send(()).is_ok() {
                self.take(&peer);
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.release(&self.peer);
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut state = self.slots.lock();
        if !state.remove(self.peer, self.id) && self.granted.try_recv().is_ok() {
            state.give_back(self.peer);
            state.dispatch(&self.slots.limits);
        }
    }
}

fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: usize) -> PeerId {
        format!("{}{}", "1".repeat(44), ["a", "b", "c", "d"][number]).parse().unwrap()
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn limits_in_all_and_per_peer() {
        let slots = Slots::new(Limits { total: 2, per_peer: 1, queue: 0 });
        let first = slots.acquire(&peer(0), None, LONG).await.ok();
        assert!(first.is_some());
        assert_eq!(slots.acquire(&peer(0), None, LONG).await.err(), Some(Busy(0)), "per peer");
        let _second = slots.acquire(&peer(1), None, LONG).await.ok().unwrap();
        assert_eq!(slots.acquire(&peer(2), None, LONG).await.err(), Some(Busy(0)), "in all");
        drop(first);
        assert!(slots.acquire(&peer(2), None, LONG).await.is_ok());
    }

    /// Guards the limit of one peer, for those that wait too.
    #[tokio::test]
    async fn a_peer_may_have_less_than_others() {
        let slots = Slots::new(Limits { total: 8, per_peer: 8, queue: 8 });
        let acquire = async |limit| slots.acquire(&peer(0), Some(1), limit).await;
        let held = [acquire(LONG).await.ok(), acquire(LONG).await.ok()];
        assert_eq!(acquire(Duration::from_millis(20)).await.err(), Some(Busy(0)));
        let waits = {
            let slots = Arc::clone(&slots);
            tokio::spawn(async move { slots.acquire(&peer(0), Some(1), LONG).await.map(drop) })
        };
        while slots.queued() == 0 {
            tokio::task::yield_now().await;
        }
        drop(slots.acquire(&peer(1), None, LONG).await.ok().unwrap());
        assert_eq!(slots.queued(), 1, "a slot that others gave back is not its own");
        drop(held);
        waits.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn waiting_is_bounded_and_leaves_nothing_behind() {
        let slots = Slots::new(Limits { total: 1, per_peer: 1, queue: 1 });
        let held = slots.acquire(&peer(0), None, LONG).await.ok();
        assert_eq!(slots.acquire(&peer(1), None, Duration::from_millis(20)).await.err(), Some(Busy(0)));
        assert_eq!(slots.queued(), 0);
        drop(held);
        assert!(slots.acquire(&peer(1), None, LONG).await.is_ok());
        assert_eq!(slots.lock().used, 0);
        assert!(slots.lock().active.is_empty() && slots.lock().turns.is_empty());
    }

    /// One peer with many requests, another with one: they take turns.
    #[tokio::test]
    async fn peers_take_turns() {
        let slots = Slots::new(Limits { total: 1, per_peer: 1, queue: 8 });
        let held = slots.acquire(&peer(0), None, LONG).await.ok();
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut tasks = tokio::task::JoinSet::new();
        for id in [peer(0), peer(0), peer(0), peer(0), peer(1), peer(2)] {
            let (slots, sender) = (Arc::clone(&slots), sender.clone());
            let before = slots.queued();
            tasks.spawn({
                let slots = Arc::clone(&slots);
                async move {
                    let slot = slots.acquire(&id, None, LONG).await.ok().unwrap();
                    sender.send(id).unwrap();
                    drop(slot);
                }
            });
            while slots.queued() == before {
                tokio::task::yield_now().await;
            }
        }
        drop((held, sender));
        let mut got = Vec::new();
        while let Some(id) = order.recv().await {
            got.push(id);
        }
        assert_eq!(got, [peer(0), peer(1), peer(2), peer(0), peer(0), peer(0)]);
    }

    #[tokio::test]
    async fn a_full_queue_drops_of_the_greediest() {
        let slots = Slots::new(Limits { total: 1, per_peer: 1, queue: 3 });
        let held = slots.acquire(&peer(0), None, LONG).await.ok();
        let wait = |id: PeerId| {
            let slots = Arc::clone(&slots);
            tokio::spawn(async move { slots.acquire(&id, None, LONG).await.map(drop) })
        };
        let mut greedy: Vec<_> = (0..3).map(|_| wait(peer(0))).collect();
        while slots.queued() < 3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(
            slots.acquire(&peer(0), None, Duration::from_millis(100)).await.err(),
            Some(Busy(3)),
            "the greedy one cannot displace"
        );
        let modest = wait(peer(1));
        let youngest = tokio::time::timeout(Duration::from_secs(10), greedy.pop().unwrap()).await;
        let youngest = youngest.expect("it is displaced").unwrap();
        assert!(youngest.is_err());
        drop(held);
        assert!(modest.await.unwrap().is_ok());
        for task in greedy {
            assert!(task.await.unwrap().is_ok());
        }
    }
}
