//! Waiting for a condition instead of for a time.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// Between two looks: as much as a twentieth of what was waited already. A look at a node costs both sides about a millisecond of a core
/// (debug), and dozens of waits go on at once.
const LOOK: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_millis(100);

/// Asks `condition` until it gives a value, seldom where that lasts ([`LOOK`]); fails after `limit`, naming `what` was waited for.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        let waited = began.elapsed();
        if waited >= limit {
            bail!("{what}: not within {limit:?}");
        }
        tokio::time::sleep((waited / 20).clamp(*LOOK.start(), *LOOK.end())).await;
    }
}
