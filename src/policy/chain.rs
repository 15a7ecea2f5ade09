//! A chain of policies and its ruling: all are asked within one deadline, and what one does wrong stays its own.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Failure;
use super::config::{Failing, Mode};
use super::metrics::PolicyMetrics;
use super::registry::{Merge, Request, Ruling, Verdict};

/// What all policies of a chain may take together (DESIGN.md, "Policies").
pub(super) const DEADLINE: Duration = Duration::from_millis(10);
/// Distinct inputs on which a policy must trap until those that did are held.
const INPUTS: usize = 3;
/// Traps further apart than this have nothing to do with each other.
const WINDOW: Duration = Duration::from_secs(60);
/// Inputs that are remembered.
const REMEMBERED: usize = 1024;
/// How long a policy is not asked again about an input that made it trap.
const RETRY: Duration = Duration::from_secs(1);

/// What answers one request.
pub(super) trait Answers: Send + Sync {
    /// The verdict, until `deadline`.
    fn decide(&self, request: &Request, deadline: Instant) -> Result<Verdict, Failure>;
}

/// Policies in their order.
pub(super) struct Chain {
    entries: Vec<Entry>,
    hasher: RandomState,
}

/// One policy in its place.
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) mode: Mode,
    pub(super) failing: Failing,
    pub(super) policy: Box<dyn Answers>,
    pub(super) metrics: PolicyMetrics,
    pub(super) quarantine: Quarantine,
}

/// Keeps a policy that traps again and again from costing each request its deadline. Only inputs that made it trap are held,
/// and get the failure verdict that they had before; all others are asked about, so that no crafted name is an off switch.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// Whether there is anything in `traps`.
    has_trapped: AtomicBool,
    /// When which input, by its hash, made it trap.
    traps: Mutex<HashMap<u64, Instant>>,
}

impl Chain {
    pub(super) fn new(mut entries: Vec<Entry>) -> Self {
        // Those that are only watched take nothing from those that count.
        entries.sort_by_key(|entry| entry.mode == Mode::Monitor);
        Self { entries, hasher: RandomState::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Asks all.
    pub(super) fn decide(&self, request: &Request) -> Ruling {
        let deadline = Instant::now() + DEADLINE;
        let mut merge = Merge::default();
        // Needed after a trap only.
        let input = || {
            let asked = format!("{:?}", (&request.requester, request.operation, &request.reference));
            self.hasher.hash_one((&request.name, asked))
        };
        for (place, entry) in self.entries.iter().enumerate() {
            let began = Instant::now();
            // One that takes all of its share leaves the others theirs.
            let left = u32::try_from(self.entries.len() - place).unwrap_or(u32::MAX);
            let share = began + deadline.saturating_duration_since(began) / left;
            let answer = entry.ask(request, share, input);
            entry.metrics.asked(began.elapsed(), &answer);
            let verdict = answer.unwrap_or_else(|failure| {
                tracing::debug!(policy = %entry.name, name = %request.name, %failure, "a policy failed");
                Verdict::failed(entry.failing)
            });
            if entry.mode == Mode::Enforce {
                merge.add(&entry.name, verdict);
            }
        }
        merge.ruling()
    }
}

impl Entry {
    fn ask(&self, request: &Request, deadline: Instant, input: impl Fn() -> u64) -> Result<Verdict, Failure> {
        if self.quarantine.holds(&input, Instant::now()) {
            return Err(Failure::Quarantined);
        }
        let answer = self.policy.decide(request, deadline);
        match &answer {
            Err(failure) if failure.is_trap() && self.quarantine.trapped(input(), Instant::now()) => {
                tracing::warn!(
                    policy = %self.name, %failure,
                    "a policy failed on several inputs; about those it is asked once a second"
                );
            }
            Ok(_) => self.quarantine.answered(input),
            Err(_) => {}
        }
        answer
    }
}

impl Quarantine {
    /// Whether the policy is not to be asked about this input now.
    fn holds(&self, input: impl Fn() -> u64, now: Instant) -> bool {
        if !self.has_trapped.load(Ordering::Relaxed) {
            return false;
        }
        let traps = self.traps();
        traps.len() >= INPUTS
            && traps.get(&input()).is_some_and(|at| now.saturating_duration_since(*at) < RETRY)
    }

    /// Notes a trap; tells whether the quarantine begins with it.
    fn trapped(&self, input: u64, now: Instant) -> bool {
        let mut traps = self.traps();
        self.has_trapped.store(true, Ordering::Relaxed);
        traps.retain(|_, at| now.saturating_duration_since(*at) < WINDOW);
        let before = traps.len();
        if before < REMEMBERED || traps.contains_key(&input) {
            traps.insert(input, now);
        }
        before < INPUTS && traps.len() == INPUTS
    }

    /// It answers about an input that may have made it trap before.
    fn answered(&self, input: impl Fn() -> u64) {
        if self.has_trapped.load(Ordering::Relaxed) {
            let mut traps = self.traps();
            traps.remove(&input());
            self.has_trapped.store(!traps.is_empty(), Ordering::Relaxed);
        }
    }

    fn traps(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.traps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
