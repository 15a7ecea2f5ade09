//! Clocks that run too fast, too slowly, or not at all.

use peili::election::lease::Ms;

/// Microseconds of true time, which nobody in the simulation can read.
pub(super) type Micros = u64;

const MILLION: u128 = 1_000_000;

/// The boot-time clock of one machine.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    /// Millionths.
    rate: u64,
    /// It showed `base` (in its own microseconds) at `from`.
    base: u64,
    from: Micros,
}

impl Clock {
    pub(super) fn new(rate: u64, base: u64) -> Self {
        Self { rate, base, from: 0 }
    }

    /// What it shows.
    pub(super) fn at(&self, now: Micros) -> Ms {
        self.micros(now) / 1_000
    }

    /// The first moment at which it shows that.
    pub(super) fn when(&self, shows: Ms) -> Micros {
        let missing = u128::from((shows * 1_000).saturating_sub(self.base));
        let needed = (missing * MILLION).div_ceil(u128::from(self.rate));
        self.from.saturating_add(u64::try_from(needed).unwrap_or(u64::MAX))
    }

    /// It stood still from `start` to `end`, as under a hypervisor that suspends the machine.
    pub(super) fn stood_still(&mut self, start: Micros, end: Micros) {
        self.base = self.micros(start);
        self.from = end;
    }

    fn micros(&self, now: Micros) -> u64 {
        let passed = u128::from(now.saturating_sub(self.from)) * u128::from(self.rate) / MILLION;
        self.base.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_is_the_first_moment() {
        for rate in [900_000, 1_000_000, 1_100_000, 1_043_211] {
            let mut clock = Clock::new(rate, 77_123_456);
            clock.stood_still(1_000_000, 5_000_000);
            for shows in [78_300, 80_000, 99_999] {
                let when = clock.when(shows);
                assert!(clock.at(when) >= shows && clock.at(when - 1) < shows, "{rate} {shows}");
            }
        }
    }
}
