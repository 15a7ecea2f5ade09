//! How an upstream does, by what its last requests came to; pure, with the time told.
//!
//! One that failed is left alone for a second, then twice as long each time up to half a minute, and is tried by one request
//! after each pause. A dead upstream so costs a node one connect limit per pause, and not one per layer.

use std::time::Duration;

use tokio::time::Instant;

use crate::oci::Health;

/// First pause after a failure, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// How long the one request after a pause may take to come to something before the next one is let through.
const TRIAL: Duration = Duration::from_secs(5);
/// Pause where an upstream says "too many requests" and not for how long, and the longest that it may ask for.
const LIMITED: Duration = Duration::from_secs(10);
const LIMITED_LONGEST: Duration = Duration::from_secs(300);
/// How long a problem is told that was seen once.
const FORGET: Duration = Duration::from_secs(60);
/// Weight of the newest latency in the average, as 1 of this.
const SMOOTH: u32 = 4;

/// What is known of an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How it does.
    pub health: Health,
    /// From a request to the head of its answer, smoothed.
    pub latency: Option<Duration>,
    /// What is wrong.
    pub problem: Option<String>,
    /// When that was seen.
    seen: Option<Instant>,
    /// Pauses in a row.
    failures: u32,
    /// It is left alone until then.
    until: Option<Instant>,
    /// When its pause began. What was asked before tells nothing about the time after.
    paused: Option<Instant>,
    /// The one request after a pause is on its way.
    is_trial: bool,
}

impl State {
    /// Whether it is left alone now.
    pub fn is_held(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// As it counts now: once a pause is over, or some time after a problem, nobody knows until it is asked, and it should be.
    pub(super) fn now(&self, now: Instant) -> Self {
        let is_old = self.seen.is_some_and(|seen| now.duration_since(seen) >= FORGET);
        let is_over = self.until.is_some_and(|until| now >= until);
        if self.problem.is_some() && !self.is_held(now) && (is_old || is_over) {
            let health = if self.health == Health::Healthy { Health::Healthy } else { Health::Unknown };
            return Self { health, problem: None, ..self.clone() };
        }
        self.clone()
    }

    /// Whether a request may go to it. After a pause this is so for one.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        if self.is_held(now) {
            return false;
        }
        if self.until.is_some() {
            self.until = Some(now + TRIAL);
            self.is_trial = true;
        }
        true
    }

    /// The head of an answer to what was asked at `began` came after `took`.
    pub(super) fn answered(&mut self, took: Duration, began: Instant) {
        let latency = self.latency.map_or(took, |known| known - known / SMOOTH + took / SMOOTH);
        self.latency = Some(latency);
        if self.paused.is_none_or(|paused| began >= paused) {
            *self = Self { health: Health::Healthy, latency: self.latency, ..Self::default() };
        }
    }

    /// It refused what was asked at `began`, or answered oddly, which says nothing about all else that it has.
    pub(super) fn refused(&mut self, problem: String, took: Duration, began: Instant) {
        self.answered(took, began);
        if !self.is_held(began + took) {
            self.noted(problem, began + took);
        }
    }

    /// Something is wrong, and no reason to leave it alone.
    pub(super) fn noted(&mut self, problem: String, now: Instant) {
        self.problem = Some(problem);
        self.seen = Some(now);
    }

    /// It asked for a pause.
    pub(super) fn limited(&mut self, pause: Option<Duration>, now: Instant) {
        let pause = pause.unwrap_or(LIMITED).clamp(PAUSE, LIMITED_LONGEST);
        self.noted(format!("it asks for a pause of {} s", pause.as_secs()), now);
        self.health = Health::RateLimited;
        self.until = self.until.max(Some(now + pause));
        (self.paused, self.is_trial) = (Some(now), false);
    }

    /// It failed: as `health` says it is reachable or not. Requests that fail together are one failure.
    pub(super) fn failed(&mut self, health: Health, problem: String, now: Instant) {
        let is_known = self.is_held(now) && !self.is_trial;
        self.noted(problem, now);
        self.health = health;
        if is_known {
            return;
        }
        let pause = PAUSE.saturating_mul(1 << self.failures.min(8)).min(LONGEST);
        self.failures += 1;
        self.until = Some(now + pause);
        (self.paused, self.is_trial) = (Some(now), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_with_one_trial() {
        let (mut state, mut now) = (State::default(), Instant::now());
        assert!(state.admit(now) && state.admit(now), "nothing is wrong yet");
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            state.failed(Health::Unreachable, "refused".into(), now);
            let pause = Duration::from_secs(seconds);
            assert!(!state.admit(now + pause - Duration::from_millis(1)), "{seconds}");
            now += pause;
            assert!(state.admit(now), "{seconds}");
            assert!(!state.admit(now), "one is enough");
        }
        // One that comes to nothing is followed by another.
        assert!(state.admit(now + TRIAL));
        state.answered(Duration::from_millis(80), now + TRIAL);
        now += TRIAL;
        assert!(state.admit(now) && state.admit(now));
        assert_eq!((state.health, &state.problem), (Health::Healthy, &None));
        state.failed(Health::Degraded, "503".into(), now);
        assert!(state.admit(now + PAUSE), "the first pause again");
    }

    /// Guards that what was on its way when it failed neither makes it worse nor well again.
    #[test]
    fn requests_that_fail_together_are_one_failure() {
        let (mut state, now) = (State::default(), Instant::now());
        for _ in 0..6 {
            state.failed(Health::Unreachable, "reset".into(), now);
        }
        state.answered(Duration::from_secs(1), now - Duration::from_secs(1));
        state.refused("403".into(), Duration::from_secs(1), now - Duration::from_secs(1));
        assert_eq!(state.health, Health::Unreachable);
        assert!(!state.admit(now + PAUSE - Duration::from_millis(1)) && state.admit(now + PAUSE));
    }

    /// Guards that one that was left alone is asked again by whoever asks those first that are well.
    #[test]
    fn after_its_pause_nobody_knows() {
        let (mut state, now) = (State::default(), Instant::now());
        state.failed(Health::Unreachable, "refused".into(), now);
        assert_eq!(state.now(now).health, Health::Unreachable);
        let after = state.now(now + PAUSE);
        assert_eq!((after.health, after.problem), (Health::Unknown, None));
        let mut state = State::default();
        state.answered(Duration::ZERO, now);
        state.refused("answers 403 Forbidden for a/b".into(), Duration::ZERO, now);
        assert_eq!(
            state.now(now).health,
            Health::Healthy,
            "what one repository is refused is no fault of the others"
        );
        assert!(state.now(now).problem.is_some() && state.now(now + FORGET).problem.is_none());
    }

    #[test]
    fn a_pause_is_what_it_asks_for() {
        let (mut state, now) = (State::default(), Instant::now());
        state.limited(Some(Duration::from_secs(20)), now);
        assert!(!state.admit(now + Duration::from_secs(19)) && state.admit(now + Duration::from_secs(20)));
        state.limited(Some(Duration::from_secs(1_000_000)), now);
        assert!(state.admit(now + LIMITED_LONGEST), "within reason");
    }

    #[test]
    fn latency_is_smoothed() {
        let mut state = State::default();
        for millis in [100, 200, 200] {
            state.answered(Duration::from_millis(millis), Instant::now());
        }
        assert_eq!(state.latency, Some(Duration::from_micros(143_750)));
    }
}
