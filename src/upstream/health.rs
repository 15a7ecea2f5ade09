//! How an upstream does, by what its last requests came to; pure, with the time told.
//!
//! One that failed is left alone for a second, then twice as long each time up to half a minute, and is tried by one request
//! after each pause. A dead upstream so costs a node one connect limit per pause, and not one per layer.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// First pause after a failure, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// How long the one request after a pause may take to come to something before the next one is let through.
const TRIAL: Duration = Duration::from_secs(5);
/// Pause where an upstream says "too many requests" and not for how long, and the longest that it may ask for.
const LIMITED: Duration = Duration::from_secs(10);
const LIMITED_LONGEST: Duration = Duration::from_secs(300);
/// Weight of the newest latency in the average, as 1 of this.
const SMOOTH: u32 = 4;

/// How an upstream does (`health` of the contract).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// It was not asked yet.
    #[default]
    Unknown,
    /// Its last request was answered.
    Healthy,
    /// It answers, but not as it should.
    Degraded,
    /// It asked for a pause.
    RateLimited,
    /// It cannot be reached.
    Unreachable,
}

/// What is known of an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How it does.
    pub health: Health,
    /// From a request to the head of its answer, smoothed.
    pub latency: Option<Duration>,
    /// What is wrong.
    pub problem: Option<String>,
    failures: u32,
    /// It is left alone until then.
    until: Option<Instant>,
}

impl State {
    /// Whether it is left alone now.
    pub fn is_held(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Whether a request may go to it. After a pause this is so for one.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        if self.is_held(now) {
            return false;
        }
        if self.until.is_some() {
            self.until = Some(now + TRIAL);
        }
        true
    }

    /// The head of an answer came after `took`.
    pub(super) fn answered(&mut self, took: Duration) {
        let latency = self.latency.map_or(took, |known| known - known / SMOOTH + took / SMOOTH);
        *self = Self { health: Health::Healthy, latency: Some(latency), ..Self::default() };
    }

    /// It answered, but with a refusal or not to the end, which is no reason to leave it alone.
    pub(super) fn refused(&mut self, problem: String) {
        let latency = self.latency;
        *self = Self { health: Health::Degraded, latency, problem: Some(problem), ..Self::default() };
    }

    /// It asked for a pause.
    pub(super) fn limited(&mut self, pause: Option<Duration>, now: Instant) {
        self.health = Health::RateLimited;
        let pause = pause.unwrap_or(LIMITED).clamp(PAUSE, LIMITED_LONGEST);
        self.problem = Some(format!("it asks for a pause of {} s", pause.as_secs()));
        self.until = Some(now + pause);
    }

    /// It failed: as `health` says it is reachable or not.
    pub(super) fn failed(&mut self, health: Health, problem: String, now: Instant) {
        let pause = PAUSE.saturating_mul(1 << self.failures.min(8)).min(LONGEST);
        self.failures += 1;
        self.health = health;
        self.problem = Some(problem);
        self.until = Some(now + pause);
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
        state.answered(Duration::from_millis(80));
        assert!(state.admit(now) && state.admit(now));
        assert_eq!((state.health, &state.problem), (Health::Healthy, &None));
        state.failed(Health::Degraded, "503".into(), now);
        assert!(state.admit(now + PAUSE), "the first pause again");
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
            state.answered(Duration::from_millis(millis));
        }
        assert_eq!(state.latency, Some(Duration::from_micros(143_750)));
    }
}
