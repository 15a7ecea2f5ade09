//! What a guest finds around it: a bound of its memory, a log that takes few lines, and the files that it is given.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use wasmtime::ResourceLimiter;

use super::Files;
use super::v0_1::{data, logging};
use crate::policy::text::clean;

/// Longest line of a guest in the log, in bytes (`wit/policy.wit`).
const LINE: usize = 1024;
/// Lines that one call may write; what is more is dropped.
const LINES: u32 = 8;
/// Lines that all calls of a policy may write at once.
const BURST: u32 = 32;
/// Elements of all tables of an instance.
const TABLE: usize = 10_000;

/// A policy's place in the log.
#[derive(Debug)]
pub(super) struct Voice {
    policy: Arc<str>,
    /// How long a line takes to be given back; `None`: it may write none.
    refill: Option<Duration>,
    /// Lines that may still be written, as of then.
    left: Mutex<(u32, Instant)>,
}

/// What belongs to one instance.
pub(in crate::policy) struct Host {
    voice: Arc<Voice>,
    data: Files,
    limit: usize,
    memory: usize,
    was_refused: bool,
    lines: u32,
    /// Handles of stubs that it holds.
    pub(super) handles: u32,
}

impl Voice {
    /// `lines`: a second.
    pub(super) fn new(policy: Arc<str>, lines: u32) -> Self {
        let refill = Duration::from_secs(1).checked_div(lines);
        Self { policy, refill, left: Mutex::new((BURST, Instant::now())) }
    }

    fn may_speak(&self, now: Instant) -> bool {
        let Some(refill) = self.refill else { return false };
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let given = now.saturating_duration_since(left.1).as_nanos() / refill.as_nanos();
        if given > 0 {
            *left = (left.0.saturating_add(u32::try_from(given).unwrap_or(u32::MAX)).min(BURST), now);
        }
        let may = left.0 > 0;
        left.0 = left.0.saturating_sub(1);
        may
    }
}

impl Host {
    pub(super) fn new(voice: Arc<Voice>, limit: usize, data: Files) -> Self {
        Self { voice, data, limit, memory: 0, was_refused: false, lines: 0, handles: 0 }
    }

    /// A call begins.
    pub(super) fn begin(&mut self) {
        self.lines = 0;
    }

    /// What the instance has now, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// Whether the instance has grown so much that a new one is better.
    pub(super) fn is_large(&self) -> bool {
        self.memory > self.limit / 2
    }

    /// Whether it wanted more than it may have.
    pub(super) fn was_refused(&self) -> bool {
        self.was_refused
    }
}

impl ResourceLimiter for Host {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let all = self.memory.saturating_add(desired.saturating_sub(current));
        if all > self.limit {
            self.was_refused = true;
            return Ok(false);
        }
        self.memory = all;
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE)
    }

    /// A component has a few beside the guest's own.
    fn instances(&self) -> usize {
        32
    }

    fn memories(&self) -> usize {
        4
    }

    fn tables(&self) -> usize {
        16
    }
}

impl data::Host for Host {
    fn names(&mut self) -> Vec<String> {
        self.data.keys().cloned().collect()
    }

    fn read(&mut self, name: String) -> Option<Vec<u8>> {
        self.data.get(&name).map(|bytes| bytes.to_vec())
    }
}

impl logging::Host for Host {
    fn log(&mut self, level: logging::Level, message: String) {
        self.lines += 1;
        if self.lines > LINES || !self.voice.may_speak(Instant::now()) {
            return;
        }
        let message = clean(&message, LINE);
        let policy = &*self.voice.policy;
        match level {
            logging::Level::Trace | logging::Level::Debug => tracing::debug!(policy, "{message}"),
            logging::Level::Info => tracing::info!(policy, "{message}"),
            logging::Level::Warn => tracing::warn!(policy, "{message}"),
            logging::Level::Error => tracing::error!(policy, "{message}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards that what an operator says of the log counts: that many lines a second after the burst, or none at all.
    #[test]
    fn lines_come_back_at_their_rate() {
        let now = Instant::now();
        for (rate, after, lines) in [(10, 1, BURST + 10), (100, 0, BURST), (2, 3, BURST + 6), (0, 60, 0)] {
            let voice = Voice::new("a".into(), rate);
            let said = |at: Instant| (0..1000).take_while(|_| voice.may_speak(at)).count();
            let all = said(now + Duration::from_millis(1)) + said(now + Duration::from_secs(after));
            assert!(all.abs_diff(lines as usize) <= 1, "{rate} a second, {after} s later: {all}");
        }
    }
}
