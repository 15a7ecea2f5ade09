//! Facts -> verdicts. Pure: no I/O, no clock. What explains other findings is said instead of them, so that one fault gives one verdict.

mod account;
mod api;
mod network;
mod node;
mod rights;

#[cfg(test)]
mod tests;

use super::facts::Facts;
use super::{Ports, Verdict};

/// What was found so far.
struct Found {
    verdicts: Vec<Verdict>,
    /// What is well, or was not looked at.
    seen: Vec<String>,
}

impl Found {
    fn say(&mut self, verdict: Verdict) {
        self.verdicts.push(verdict);
    }

    fn note(&mut self, text: impl Into<String>) {
        self.seen.push(text.into());
    }
}

/// The verdicts, the worst first, and what is well or was not looked at.
pub fn judge(facts: &Facts, ports: &Ports) -> (Vec<Verdict>, Vec<String>) {
    let mut found = Found { verdicts: Vec::new(), seen: Vec::new() };
    api::judge(facts, ports, &mut found);
    network::judge(facts, &mut found);
    node::judge(facts, &mut found);
    found.verdicts.sort_by_key(|verdict| std::cmp::Reverse(verdict.severity));
    (found.verdicts, found.seen)
}
