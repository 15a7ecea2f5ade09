//! Facts -> verdicts. Pure: no I/O, no clock. What explains other findings is said instead of them, so that one fault gives one verdict.

mod account;
mod api;
mod network;
mod node;
mod rights;

#[cfg(test)]
mod tests;

use super::code::Code;
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

    /// Says it; or, where one of these causes explains it and is said already, adds it to that as something that was seen.
    fn say_or_fold(&mut self, verdict: Verdict, causes: &[Code]) {
        match self.verdicts.iter_mut().find(|said| causes.contains(&said.code)) {
            Some(cause) => {
                cause.severity = cause.severity.max(verdict.severity);
                cause.evidence.push(follows(&verdict));
            }
            None => self.say(verdict),
        }
    }

    /// Takes back what was said by this code, and adds it to its cause.
    fn fold(&mut self, code: Code, cause: &mut Verdict) {
        let follow = self.verdicts.iter().filter(|said| said.code == code).map(follows);
        cause.evidence.extend(follow);
        self.verdicts.retain(|said| said.code != code);
    }

    fn note(&mut self, text: impl Into<String>) {
        self.seen.push(text.into());
    }
}

/// A verdict as what was seen of its cause.
fn follows(verdict: &Verdict) -> String {
    format!("`{}` follows from it: {}", verdict.code.name(), verdict.evidence.join("; "))
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
