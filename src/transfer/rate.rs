//! A limit on the bytes per second that all uploads together take.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Bytes of a tenth of a second go out at once, but not less than this.
const LEAST_PIECE: u64 = 16 << 10;

/// Hands out the time at which bytes may go.
pub(super) struct Rate {
    per_second: u64,
    /// When all that was handed out so far has gone.
    free_at: Mutex<Instant>,
}

impl Rate {
    /// `None`: no limit.
    pub(super) fn new(per_second: u64) -> Option<Self> {
        (per_second > 0).then(|| Self { per_second, free_at: Mutex::new(Instant::now()) })
    }

    /// Most bytes to reserve at once, so that uploads share the rate evenly.
    pub(super) fn piece(&self) -> usize {
        usize::try_from((self.per_second / 10).max(LEAST_PIECE)).unwrap_or(usize::MAX)
    }

    /// When the next `bytes` may go. Time that nobody used is not saved up.
    pub(super) fn reserve(&self, bytes: usize) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now().max(*free_at);
        let nanoseconds = bytes as u128 * 1_000_000_000 / u128::from(self.per_second);
        *free_at = start + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 4));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time() {
        assert!(Rate::new(0).is_none());
        let rate = Rate::new(1 << 20).unwrap();
        let start = rate.reserve(1 << 20);
        assert_eq!(rate.reserve(1 << 19), start + Duration::from_secs(1));
        let idle = Rate { per_second: 1 << 20, free_at: Mutex::new(start - Duration::from_secs(60)) };
        let first = idle.reserve(1 << 20);
        assert!(first >= start, "no burst for idle time");
        assert_eq!(idle.reserve(1), first + Duration::from_secs(1));
    }
}
