//! `peili-lab simulate election`: the core of the strict role as it ships, under schedules of everything that goes wrong.
//!
//! Made up are the clocks, the ways to the API server, and the object there; the candidates are `peili::election::lease`.
//! Each schedule comes from its seed. So that it is known to find something, the same schedules are run with algorithms
//! that are known to be wrong, each of which has to be caught.

mod clock;
mod elector;
mod model;
mod register;
mod schedule;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use elector::Variant;
use peili::election::lease::Shipped;
use world::Outcome;

/// Each broken variant has to be caught within so many schedules.
const WITHIN: u64 = 10_000;

/// Runs schedules from this seed on until so many contain an attempt to take the lease over, and the model for so many
/// steps; `false`: what must hold did not.
pub(super) fn run(seed: u64, schedules: u64, steps: u64) -> bool {
    let started = std::time::Instant::now();
    let total = sweep(Variant::Shipped, seed, schedules);
    println!("{}, seeds {seed} to {}", Variant::Shipped.name(), seed + total.runs - 1);
    total.print();
    println!("  {:<58} {:>11.1} s", "time", started.elapsed().as_secs_f64());
    let mut is_right = total.violations.is_empty();
    let model = model::explore::<Shipped>(steps);
    println!("the model: {model}");
    is_right &= model.violation.is_none();
    for variant in Variant::BROKEN {
        match first(variant, seed) {
            Some((runs, found)) => {
                println!(
                    "{:<36} caught by schedule {runs:>5} (seed {}): {found}",
                    variant.name(),
                    seed + runs - 1
                );
            }
            None => {
                println!("{:<36} NOT CAUGHT within {WITHIN} schedules", variant.name());
                is_right = false;
            }
        }
    }
    is_right
}

/// The sum of many runs.
#[derive(Debug, Default)]
struct Total {
    runs: u64,
    /// Runs with an attempt to take over.
    contested: u64,
    sum: Outcome,
    /// Seeds of runs in which something did not hold.
    violations: Vec<u64>,
    /// Milliseconds until there was a leader.
    healing: Vec<u64>,
}

impl Total {
    fn add(&mut self, seed: u64, outcome: &Outcome) {
        self.runs += 1;
        self.contested += u64::from(outcome.takeovers > 0);
        self.sum.add(outcome);
        if outcome.is_violated() && self.violations.len() < 10 {
            self.violations.push(seed);
        }
        self.healing.extend(outcome.healing.map(|time| time / 1_000));
    }

    fn merge(&mut self, other: Self) {
        self.runs += other.runs;
        self.contested += other.contested;
        self.sum.add(&other.sum);
        self.violations.extend(other.violations);
        self.healing.extend(other.healing);
    }

    fn print(&self) {
        let line = |what: &str, value: String| println!("  {what:<58} {value:>11}");
        let million = |count: u64| format!("{:.0}", count as f64 * 1e6 / self.runs.max(1) as f64);
        line("schedules", self.runs.to_string());
        line("schedules with an attempt to take over", self.contested.to_string());
        line("overlaps (S1)", self.sum.overlaps.to_string());
        line("overlaps where a clock had stopped (allowed)", self.sum.excused.to_string());
        line("wrong tokens (S2)", self.sum.tokens.to_string());
        line("releases before the work had ended (S8)", self.sum.early_releases.to_string());
        line("runs without one leader at the end (S10)", self.sum.stuck.to_string());
        line("attempts to take over, per million schedules", million(self.sum.takeovers));
        line("writes carried out too late, per million", million(self.sum.late));
        line("conflicts, per million", million(self.sum.conflicts));
        line("pauses, per million", million(self.sum.pauses));
        line("deletions, per million", million(self.sum.deletions));
        line("terms, per million", million(self.sum.terms));
        line("effects that the sink refused, per million", million(self.sum.fenced));
        let mut healing = self.healing.clone();
        healing.sort_unstable();
        for (name, part) in [("median", 50), ("p99", 99), ("longest", 100)] {
            let index = (healing.len() * part / 100).min(healing.len().saturating_sub(1));
            let time = healing.get(index).copied().unwrap_or(0);
            line(&format!("from when all is well to a leader, {name}"), format!("{time} ms"));
        }
        if !self.violations.is_empty() {
            println!("  FAILED with the seeds {:?}", self.violations);
        }
    }
}

/// Runs on all processors.
fn sweep(variant: Variant, seed: u64, contested: u64) -> Total {
    let (next, found) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let mut total = Total::default();
        while found.load(Ordering::Relaxed) < contested {
            let seed = seed + next.fetch_add(1, Ordering::Relaxed);
            let outcome = world::run(variant, seed);
            found.fetch_add(u64::from(outcome.takeovers > 0), Ordering::Relaxed);
            total.add(seed, &outcome);
        }
        total
    };
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut total = Total::default();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..processors).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            if let Ok(part) = thread.join() {
                total.merge(part);
            }
        }
    });
    total
}

/// The first schedule in which a broken variant does what it must not, and that.
fn first(variant: Variant, seed: u64) -> Option<(u64, &'static str)> {
    (0..WITHIN).find_map(|index| {
        let outcome = world::run(variant, seed + index);
        let found = if outcome.overlaps > 0 {
            "two leaders"
        } else if outcome.early_releases > 0 {
            "released while its work went on"
        } else {
            return None;
        };
        Some((index + 1, found))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ships_keeps_to_what_it_promises() {
        let total = sweep(Variant::Shipped, 1, 5_000);
        total.print();
        assert_eq!(total.violations, Vec::<u64>::new());
        // Stopped clocks do harm, so that they are known to be there, and the sink's token makes up for it.
        assert!(total.sum.fenced > 0 && total.sum.late > 0 && total.sum.conflicts > 0);
    }

    #[test]
    fn every_order_of_a_few_events_keeps_to_it() {
        let report = model::explore::<Shipped>(2);
        println!("{report}");
        assert_eq!(report.violation, None);
        assert!(report.taken_over > 0);
        // It finds what it looks for.
        let report = model::explore::<elector::NoUid>(2);
        println!("{report}");
        assert_eq!(report.violation, Some("S1: two leaders"));
    }

    #[test]
    fn what_is_known_to_be_wrong_is_caught() {
        for variant in Variant::BROKEN {
            let found = first(variant, 1);
            println!("{}: {found:?}", variant.name());
            assert!(found.is_some(), "{}", variant.name());
        }
    }
}
