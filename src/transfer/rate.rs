//! Limits on the bytes per second that all uploads together take, and those to one peer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::oci::PeerId;

/// Bytes of a tenth of a second go out at once, but not less than this.
const LEAST_PIECE: u64 = 16 << 10;
/// Timers are late by a millisecond or more: so much unused time is made up for.
const SLACK: Duration = Duration::from_millis(10);

/// Lets bytes pass, those of one upload after those of another.
pub(super) struct Rate {
    per_second: AtomicU64,
    /// Held by whose bytes go next; those who wait come in the order in which they asked.
    turn: Semaphore,
    /// When all that has passed so far has gone.
    free_at: Mutex<Instant>,
}

impl Rate {
    /// `None`: no limit.
    pub(super) fn new(per_second: u64) -> Option<Self> {
        let (turn, free_at) = (Semaphore::new(1), Mutex::new(Instant::now()));
        (per_second > 0).then_some(Self { per_second: AtomicU64::new(per_second), turn, free_at })
    }

    /// Most bytes to pass at once, so that uploads share the rate evenly.
    pub(super) fn piece(&self) -> usize {
        usize::try_from((self.per_second() / 10).max(LEAST_PIECE)).unwrap_or(usize::MAX)
    }

    fn per_second(&self) -> u64 {
        self.per_second.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` may go. Who is dropped before that has taken nothing from the others.
    pub(super) async fn pass(self: Arc<Self>, bytes: usize) {
        // An error is a closed semaphore; this one never is.
        let _turn = self.turn.acquire().await;
        let free_at = *self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        if free_at > Instant::now() {
            sleep_until(free_at).await;
        }
        let now = Instant::now();
        let nanoseconds = bytes as u128 * 1_000_000_000 / u128::from(self.per_second());
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 4));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = (*free_at).max(now.checked_sub(SLACK).unwrap_or(now)) + time;
    }
}

/// The rates of the peers that have one of their own, as long as an upload to them runs.
#[derive(Default)]
pub(super) struct PeerRates(Mutex<HashMap<PeerId, Weak<Rate>>>);

impl PeerRates {
    /// The rate that all uploads to `peer` share, which is `per_second` from now on.
    pub(super) fn of(&self, peer: &PeerId, per_second: u64) -> Option<Arc<Rate>> {
        let mut rates = self.lock();
        if let Some(rate) = rates.get(peer).and_then(Weak::upgrade) {
            rate.per_second.store(per_second.max(1), Ordering::Relaxed);
            return Some(rate);
        }
        rates.retain(|_, rate| rate.strong_count() > 0);
        let rate = Arc::new(Rate::new(per_second)?);
        rates.insert(peer.clone(), Arc::downgrade(&rate));
        Some(rate)
    }

    /// Gives uploads that run the rates of `limit`; those that have none any more keep the one they have.
    pub(super) fn update(&self, limit: impl Fn(&PeerId) -> Option<u64>) {
        for (peer, rate) in &*self.lock() {
            if let (Some(rate), Some(per_second)) = (rate.upgrade(), limit(peer)) {
                rate.per_second.store(per_second.max(1), Ordering::Relaxed);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Weak<Rate>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn bytes_take_their_time() {
        assert!(Rate::new(0).is_none());
        let rate = Arc::new(Rate::new(10 << 20).unwrap());
        let start = Instant::now();
        for _ in 0..4 {
            Arc::clone(&rate).pass(1 << 20).await;
        }
        assert!(start.elapsed() >= Duration::from_millis(300) - SLACK, "{:?}", start.elapsed());
        *rate.free_at.lock().unwrap() = start - Duration::from_secs(60);
        Arc::clone(&rate).pass(1 << 20).await;
        assert!(Arc::clone(&rate).pass(1).now_or_never().is_none(), "no burst for idle time");
    }

    /// Guards that all uploads to one peer share its rate, and that a change is theirs at once.
    #[tokio::test]
    async fn uploads_to_one_peer_share_its_rate() {
        let rates = PeerRates::default();
        let peer: PeerId = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".parse().unwrap();
        let first = rates.of(&peer, 1 << 20).unwrap();
        let second = rates.of(&peer, 2 << 20).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(first.per_second(), 2 << 20);
        rates.update(|_| Some(1 << 10));
        assert_eq!(second.per_second(), 1 << 10);
        rates.update(|_| None);
        assert_eq!(second.per_second(), 1 << 10);
        drop((first, second));
        assert_eq!(rates.of(&peer, 5 << 20).unwrap().per_second(), 5 << 20);
    }

    /// Guards that time is taken when bytes go, not when they are announced.
    #[tokio::test]
    async fn who_gives_up_takes_nothing() {
        let rate = Arc::new(Rate::new(1 << 20).unwrap());
        Arc::clone(&rate).pass(100 << 10).await;
        let mut waiting: Vec<_> = (0..100).map(|_| Box::pin(Arc::clone(&rate).pass(1 << 20))).collect();
        for pass in &mut waiting {
            assert!(pass.now_or_never().is_none());
        }
        let honest = Arc::clone(&rate).pass(1);
        drop(waiting);
        tokio::time::timeout(Duration::from_secs(5), honest).await.expect("its turn is next");
    }
}
