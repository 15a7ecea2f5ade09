//! A chain of policies and its ruling: all are asked within one deadline, and what one does wrong stays its own.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::config::{Failing, Mode};
use super::metrics::PolicyMetrics;
use super::record::said;
use super::world::World;
use super::{Failure, Said};

/// Distinct inputs on which a policy must trap until those that did are held.
const INPUTS: usize = 3;
/// Traps further apart than this have nothing to do with each other.
const WINDOW: Duration = Duration::from_secs(60);
/// Inputs that are remembered.
const REMEMBERED: usize = 1024;
/// How long a policy is not asked again about an input that made it trap.
const RETRY: Duration = Duration::from_secs(1);

/// How often a policy whose time is up is asked about a request from before.
const TRIES: u32 = 3;

/// What answers one request.
pub(super) trait Answers<W: World>: Send + Sync {
    /// The verdict, until `deadline`.
    fn decide(&self, request: &W::Request, deadline: Instant) -> Result<W::Verdict, Failure>;

    /// Lets go of what it keeps between requests, so that the next one is its first; how much memory that had, in bytes.
    fn cool(&self) -> usize {
        0
    }
}

/// Policies in their order.
pub(super) struct Chain<W: World> {
    entries: Vec<Entry<W>>,
    hasher: RandomState,
    /// How many times its deadline the chain gets: code that is interpreted takes longer.
    pace: u32,
}

/// One policy in its place.
pub(super) struct Entry<W: World> {
    pub(super) name: Arc<str>,
    pub(super) mode: Mode,
    pub(super) failing: Failing,
    /// The most that one answer may take.
    pub(super) time: Option<Duration>,
    pub(super) policy: Box<dyn Answers<W>>,
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

impl<W: World> Default for Chain<W> {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl<W: World> Chain<W> {
    pub(super) fn new(mut entries: Vec<Entry<W>>) -> Self {
        // Those that are only watched take nothing from those that count.
        entries.sort_by_key(|entry| entry.mode == Mode::Monitor);
        Self { entries, hasher: RandomState::new(), pace: 1 }
    }

    /// With a deadline that is so many times as long.
    pub(super) fn paced(self, pace: u32) -> Self {
        Self { pace, ..self }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the verdict of one counts.
    pub(super) fn enforces(&self) -> bool {
        self.entries.iter().any(|entry| entry.mode == Mode::Enforce)
    }

    /// Lets all go of what they keep between requests; the most memory that one of them had, in bytes.
    pub(super) fn cool(&self) -> usize {
        self.entries.iter().map(|entry| entry.policy.cool()).max().unwrap_or(0)
    }

    /// Asks all; `see` is told what each said.
    pub(super) fn decide(
        &self,
        request: &W::Request,
        mut see: impl FnMut(&Entry<W>, Duration, &Result<W::Verdict, Failure>),
    ) -> W::Ruling {
        self.ask(request, |entry, took, answer| {
            entry.metrics.asked(took, answer.as_ref().map(W::outcome));
            if let Err(failure) = answer {
                tracing::debug!(policy = %entry.name, world = W::NAME, %failure, "a policy failed");
            }
            see(entry, took, answer);
        })
    }

    /// Asks all, counts nothing, and tells what each said.
    pub(super) fn explain(&self, request: &W::Request) -> (W::Ruling, Vec<Said>) {
        let mut all = Vec::new();
        let ruling = self.ask(request, |entry, took, answer| {
            all.push(said::<W>(&entry.name, entry.mode, took, answer.as_ref()));
        });
        (ruling, all)
    }

    /// What all say of a request from before; `see` is told of each. It counts nowhere, not even for the quarantine. `limit`: for
    /// each try of each policy.
    pub(super) fn replay(
        &self,
        request: &W::Request,
        limit: Duration,
        mut see: impl FnMut(&Entry<W>, Duration, &Result<W::Verdict, Failure>),
    ) -> W::Ruling {
        let mut merge = W::Merge::default();
        for entry in &self.entries {
            let began = Instant::now();
            let ask = || entry.policy.decide(request, Instant::now() + limit * self.pace);
            // That the machine is busy is not the policy's fault.
            let answer = (1..TRIES).fold(ask(), |answer, _| match answer {
                Err(Failure::Time) => ask(),
                answer => answer,
            });
            see(entry, began.elapsed(), &answer);
            if entry.mode == Mode::Enforce {
                W::add(&mut merge, &entry.name, answer, entry.failing);
            }
        }
        W::ruling(merge)
    }

    fn ask(
        &self,
        request: &W::Request,
        mut see: impl FnMut(&Entry<W>, Duration, &Result<W::Verdict, Failure>),
    ) -> W::Ruling {
        // The clock is looked at as seldom as can be: of what a warm call takes, one look is a fiftieth.
        let mut began = Instant::now();
        let deadline = began + W::DEADLINE * self.pace;
        let mut merge = W::Merge::default();
        let input = || self.hasher.hash_one(W::input(request));
        for (place, entry) in self.entries.iter().enumerate() {
            if place > 0 {
                began = Instant::now();
            }
            // One that takes all of its share leaves the others theirs.
            let left = u32::try_from(self.entries.len() - place).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(began) / left;
            let share = entry.time.map_or(share, |time| share.min(time * self.pace));
            let answer = entry.ask(request, began + share, input);
            see(entry, began.elapsed(), &answer);
            if entry.mode == Mode::Enforce {
                W::add(&mut merge, &entry.name, answer, entry.failing);
            }
        }
        W::ruling(merge)
    }
}

impl<W: World> Entry<W> {
    fn ask(
        &self,
        request: &W::Request,
        deadline: Instant,
        input: impl Fn() -> u64,
    ) -> Result<W::Verdict, Failure> {
        if self.quarantine.has_trapped() && self.quarantine.holds(&input, Instant::now()) {
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
    /// Whether there is any input that made the policy trap.
    fn has_trapped(&self) -> bool {
        self.has_trapped.load(Ordering::Relaxed)
    }

    /// Whether the policy is not to be asked about this input now.
    fn holds(&self, input: impl Fn() -> u64, now: Instant) -> bool {
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
        if self.has_trapped() {
            let mut traps = self.traps();
            traps.remove(&input());
            self.has_trapped.store(!traps.is_empty(), Ordering::Relaxed);
        }
    }

    fn traps(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.traps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
