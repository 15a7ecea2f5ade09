//! A limit on the bytes per second that all uploads together take.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

/// Bytes of a tenth of a second go out at once, but not less than this.
const LEAST_PIECE: u64 = 16 << 10;
/// Timers are late by a millisecond or more: so much unused time is made up for.
const SLACK: Duration = Duration::from_millis(10);

/// Lets bytes pass, those of one upload after those of another.
pub(super) struct Rate {
    per_second: u64,
    /// Held by whose bytes go next; those who wait come in the order in which they asked.
    turn: Semaphore,
    /// When all that has passed so far has gone.
    free_at: Mutex<Instant>,
}

impl Rate {
    /// `None`: no limit.
    pub(super) fn new(per_second: u64) -> Option<Self> {
        let (turn, free_at) = (Semaphore::new(1), Mutex::new(Instant::now()));
        (per_second > 0).then_some(Self { per_second, turn, free_at })
    }

    /// Most bytes to pass at once, so that uploads share the rate evenly.
    pub(super) fn piece(&self) -> usize {
        usize::try_from((self.per_second / 10).max(LEAST_PIECE)).unwrap_or(usize::MAX)
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
        let nanoseconds = bytes as u128 * 1_000_000_000 / u128::from(self.per_second);
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 4));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = (*free_at).max(now.checked_sub(SLACK).unwrap_or(now)) + time;
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
