//! What the worlds have in common: what is asked, what is answered, and how answers become one ruling.

use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use super::config::Failing;
use super::{Config, Failure, Limits, Plugin};

/// A world of policies.
pub(super) trait World: Sized + Send + Sync + 'static {
    /// Its name in the contract, the configuration and metrics.
    const NAME: &'static str;
    /// What a verdict can be, as a label in metrics.
    const OUTCOMES: &'static [&'static str];
    /// What all policies of a chain may take together (DESIGN.md, "Policies").
    const DEADLINE: Duration = Limits::TIME_MAX;
    /// Whether all nodes must come to the same verdict. Then policies do not learn which node asks, each verdict is one of a fresh
    /// instance, and what it may do is counted in instructions, of which it has [`World::fuel`].
    const IS_COMMON: bool = false;

    type Request;
    type Verdict;
    type Ruling;
    type Merge: Default;

    /// What tells one question from another, for policies that trap: made up after a trap only.
    fn input(request: &Self::Request) -> impl Hash;

    /// Instructions for one verdict, `configure` included; `None`: of `configure` alone.
    fn fuel(_: Option<&Self::Request>) -> u64 {
        u64::MAX
    }

    /// Whether a verdict is one that this request may get, beside what its form must be.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(request: &Self::Request, verdict: &Self::Verdict) -> Result<(), String>;

    /// Which of [`World::OUTCOMES`].
    fn outcome(verdict: &Self::Verdict) -> usize;

    /// In one line, for people.
    fn describe(verdict: &Self::Verdict) -> String;

    /// Adds what the next policy says. `failing`: its verdict where it does not answer.
    fn add(
        merge: &mut Self::Merge,
        policy: &Arc<str>,
        answer: Result<Self::Verdict, Failure>,
        failing: Failing,
    );

    /// What all said.
    fn ruling(merge: Self::Merge) -> Self::Ruling;

    /// Its part of the configuration.
    fn plugins(config: &Config) -> &[Plugin];
}
