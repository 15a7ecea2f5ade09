//! The times of an election, and the rules that the core is compiled with.

use super::Ms;

/// Rates of clocks are believed to be right to so many thousandths.
const RATE_ERROR: Ms = 100;
/// Taken off each validity, for what arithmetic does not see: the time between a check and its effect.
const MARGIN: Ms = 250;
/// No duration is longer, and whatever a record says, nobody waits longer.
pub(super) const LONGEST: Ms = 3_600_000;
/// A holder that does not say when it stops (client-go's elector counts from the response, which may take ten seconds).
pub(super) const FOREIGN: Ms = 10_000;

/// The times of an election.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// For how long a record holds, as it is published (D); an hour at most.
    pub duration: Ms,
    /// Between two renewals.
    pub renew: Ms,
    /// Candidates of rank r wait r times as long after the lease is free.
    pub step: Ms,
    /// The longest pause between two tries of one that does not lead.
    pub pause: Ms,
    /// Whether pauses are drawn. Off in the model, which tries all of them.
    pub jitter: bool,
}

impl Settings {
    /// 6 s: a strict leader again within 8 s.
    pub const FAST: Self = Self::new(6_000, 1_500);
    /// The times of Kubernetes' own components.
    pub const COMPAT: Self = Self::new(15_000, 2_000);
    /// Rides out a minute without the API server.
    pub const TOLERANT: Self = Self::new(137_000, 26_000);

    /// By the duration and the time between renewals. Candidates are few, so that they may try again soon.
    pub const fn new(duration: Ms, renew: Ms) -> Self {
        let third = duration / 3;
        let pause = if third < 1_000 {
            1_000
        } else if third > 30_000 {
            30_000
        } else {
            third
        };
        Self { duration, renew, step: 300, pause, jitter: true }
    }

    /// With a duration that others wait for, too.
    pub(super) fn bounded(mut self) -> Self {
        self.duration = self.duration.min(LONGEST);
        self
    }

    /// How long an answer is waited for.
    pub const fn attempt(&self) -> Ms {
        let sixth = self.duration / 6;
        if sixth < MARGIN { MARGIN } else { sixth }
    }
}

/// For how long the sender of a write with this duration may act, by its own clock, from before the sending on.
///
/// The others count the whole duration from a later moment on. The two clocks may differ by the error of both.
pub const fn validity(duration: Ms) -> Ms {
    (duration.saturating_mul(1_000 - RATE_ERROR) / (1_000 + RATE_ERROR)).saturating_sub(MARGIN)
}

/// What the core keeps to. The program has [`Shipped`] only; the simulation breaks one rule at a time, to see that it
/// would find out. All are constants, so that the program carries none of the other ways.
pub trait Rules: Clone {
    /// A validity counts from before the request leaves. (The others count from when the write is seen.)
    const STAMPS_AT_SEND: bool = true;
    /// Both clocks may be wrong.
    const BOTH_CLOCKS: bool = true;
    /// Writes name the object's uid. (Without it a write re-creates an object that was deleted.)
    const SENDS_UID: bool = true;
    /// Each write changes something, and counts only if the object's version is a newer one.
    const RENEWS_VISIBLY: bool = true;
    /// A validity shrinks before the shorter duration is sent, and not when that is confirmed.
    const SHRINKS_FIRST: bool = true;
    /// A lease is released after the work has ended.
    const JOINS_FIRST: bool = true;
}

/// The rules as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shipped;

impl Rules for Shipped {}

/// [`validity`], by the rules.
pub(super) fn validity_by<R: Rules>(duration: Ms) -> Ms {
    if R::BOTH_CLOCKS { validity(duration) } else { (duration * 9 / 10).saturating_sub(MARGIN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_leader_ends_before_a_fast_follower_begins() {
        for settings in [Settings::FAST, Settings::COMPAT, Settings::TOLERANT] {
            // In true time: the leader's clock runs at 0.9, the follower's at 1.1.
            let leader = validity(settings.duration) as f64 / 0.9;
            let follower = settings.duration as f64 / 1.1;
            assert!(leader + 250.0 < follower, "{settings:?}: {leader} {follower}");
            // Three tries have room in what is left after a renewal.
            assert!(settings.renew + settings.attempt() < validity(settings.duration), "{settings:?}");
            assert!(settings.attempt() >= MARGIN);
        }
        assert_eq!(validity(6_000), 4_659);
        assert_eq!(validity(100), 0);
    }
}
