//! `peili-lab bench`: what bytes, lookups and memory cost, beside nginx with sendfile in the same run; how soon elections are decided;
//! and what policies cost.
//!
//! With root, nodes are network namespaces with real containerds; else they share loopback and layout folders, and the
//! report says so. Everything is measured from outside: CPU time and memory from `/proc`, the rest by a client's clock.

mod bed;
mod cases;
mod election;
mod load;
mod machine;
mod policies;

use std::time::Duration;

use anyhow::Result;
use peili_lab::{Requirement, require};
use serde_json::{Map, Value, json};

use self::bed::Bed;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measurements of each kind, after one that does not count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeats: u32,
    /// Size of the layer in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=16384))]
    size: u64,
    /// Requests of each kind of lookup
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    lookups: u32,
    /// Stay on loopback even with root
    #[arg(long)]
    loopback: bool,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

/// What one case found: figures by name, each with its unit in the name.
pub(crate) struct Report {
    case: &'static str,
    figures: Vec<(String, Spread)>,
}

/// Several measurements of one thing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    min: f64,
    median: f64,
    p99: f64,
    max: f64,
    runs: usize,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let last = values.len().saturating_sub(1);
        let median = (at(last / 2) + at(values.len() / 2)) / 2.0;
        // The nearest rank: of fewer than a hundred it is the largest.
        let p99 = at((values.len() * 99).div_ceil(100).saturating_sub(1));
        Self { min: at(0), median, p99, max: at(last), runs: values.len() }
    }
}

impl Report {
    fn new(case: &'static str) -> Self {
        Self { case, figures: Vec::new() }
    }

    fn add(&mut self, name: impl Into<String>, values: Vec<f64>) {
        self.figures.push((name.into(), Spread::of(values)));
    }

    fn print(&self, place: &str) {
        let figures: Map<String, Value> = self
            .figures
            .iter()
            .map(|(name, spread)| {
                let Spread { min, median, p99, max, runs } = *spread;
                (name.clone(), json!({"min": min, "median": median, "p99": p99, "max": max, "runs": runs}))
            })
            .collect();
        println!("{}", json!({"case": self.case, "place": place, "figures": figures}));
        let width = self.figures.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        println!("\n  {:width$}  {:>9}  {:>9}  {:>9}  {:>9}  runs", self.case, "min", "median", "p99", "max");
        for (name, Spread { min, median, p99, max, runs }) in &self.figures {
            println!("  {name:width$}  {min:>9.3}  {median:>9.3}  {p99:>9.3}  {max:>9.3}  {runs:>4}");
        }
        println!();
    }
}

/// Measures everything and prints it. A case that cannot run is an error; the figures themselves are not judged.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    println!("{}", json!({"machine": machine::describe(), "repeats": options.repeats}));
    let wanted = |case: &str| case.contains(&options.only);
    if ["throughput", "memory", "lookup", "pull"].into_iter().any(wanted) {
        bytes(options, wanted).await?;
    }
    policies(options, wanted).await?;
    if wanted("election.strict") {
        let (report, server) = election::strict(options.repeats).await?;
        report.print(&server);
    }
    if wanted("election.advisory") {
        election::advisory(options.repeats).await?.print("loopback");
    }
    if wanted("election.cost") {
        election::cost(options.repeats).await?.print("loopback");
    }
    println!("{}", json!({"load at the end": machine::load()}));
    Ok(true)
}

/// The cases that are about bytes.
async fn bytes(options: &Options, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let bed = Bed::new(options.size, options.loopback).await?;
    if wanted("throughput") {
        cases::throughput(&bed, options.repeats).await?.print(bed.place());
    }
    if wanted("memory") {
        cases::memory(&bed).await?.print(bed.place());
    }
    if wanted("lookup") {
        cases::lookups(&bed, options.lookups).await?.print(bed.place());
    }
    if wanted("pull") {
        match cases::pull(&bed, options.repeats).await? {
            Some(report) => report.print(bed.place()),
            None => println!("pull: not measured, it needs root and a containerd"),
        }
    }
    Ok(())
}

/// The cases that are about policies.
async fn policies(options: &Options, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let names = ["call", "memory", "request", "throughput", "change"].map(|name| format!("policies.{name}"));
    if !names.iter().any(|name| wanted(name)) {
        return Ok(());
    }
    if let Err(lacking) = require(&[Requirement::Policies]) {
        println!("policies: not measured: {lacking}");
        return Ok(());
    }
    if wanted("policies.call") {
        policies::calls(options.repeats).await?.print("one process");
    }
    if wanted("policies.memory") {
        policies::memory(options.repeats).await?.print("loopback");
    }
    if wanted("policies.request") {
        policies::requests(options.repeats, options.lookups).await?.print("loopback");
    }
    if wanted("policies.change") {
        policies::changes(options.repeats).await?.print("loopback");
    }
    if wanted("policies.throughput") {
        let bed = Bed::new(options.size, options.loopback).await?;
        policies::throughput(&bed, options.repeats).await?.print(bed.place());
    }
    Ok(())
}

/// Longest wait for anything that is not measured.
const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let check = |values: &[f64], (min, median, max): (f64, f64, f64)| {
            let spread = Spread::of(values.to_vec());
            assert!((spread.min, spread.median, spread.max) == (min, median, max), "{spread:?}");
        };
        let p99 = |count: u32| Spread::of((1..=count).map(f64::from).collect()).p99;
        assert!(
            [(1, 1.0), (99, 99.0), (100, 99.0), (200, 198.0)].into_iter().all(|(count, p)| p99(count) == p)
        );
        check(&[3.0, 1.0, 2.0], (1.0, 2.0, 3.0));
        check(&[4.0, 1.0, 2.0, 3.0], (1.0, 2.5, 4.0));
        check(&[7.0], (7.0, 7.0, 7.0));
    }
}
