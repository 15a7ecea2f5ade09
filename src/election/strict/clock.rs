//! The clock of strict leadership. It goes on while the machine is suspended, as the monotonic clock of Linux, and `Instant`, do not.

use crate::election::lease::Ms;

/// Tells the time.
pub trait Clock: Send + Sync {
    /// Milliseconds since some moment. Never goes back.
    fn now(&self) -> Ms;
}

/// The boot-time clock of Linux.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Ms {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let (seconds, nanoseconds) = (time.tv_sec.max(0).unsigned_abs(), time.tv_nsec.max(0).unsigned_abs());
        seconds * 1_000 + nanoseconds / 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let clock = BootClock;
        let before = clock.now();
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        assert!((before as f64 / 1_000.0 - uptime).abs() < 5.0, "{before} {uptime}");
        assert!(clock.now() >= before);
    }
}
