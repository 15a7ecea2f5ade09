//! `peili-lab simulate`: what ships, in a world that is made up.
//!
//! `election` is described in its file. `network` is the gossip, with its real encoders, among thousands of nodes in one process.
//! Only what surrounds it is made up: a clock that the simulation moves, links that take a fixed time, signatures that are
//! compared and not computed, and inventories that the nodes share where they agree (`holdings`). Bytes are counted as they
//! would be on a wire (`world::cost`). docs/network.md explains the workload and has the figures.

pub(crate) mod calibrate;
mod election;
mod holdings;
mod notary;
mod workload;
mod world;

use anyhow::Result;
use serde_json::json;

use workload::{Figures, Scenario, Workload};

/// What to simulate.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What of Peili
    #[arg(value_enum)]
    what: What,
    /// Nodes; each number is a simulation of its own [default: 1000, or 50 with --calibrate]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=10_000))]
    nodes: Vec<u32>,
    /// Seconds that are measured, after some that are not; 5,000 nodes take about ten seconds of a processor for each
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(10..=3600))]
    seconds: u64,
    /// Only these scenarios
    #[arg(long, value_enum, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Seed of all that is random; with `election`, of the first schedule
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// With `election`: schedules that contain an attempt to take the lease over
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    schedules: u64,
    /// With `election`: seconds of the model, which tries every order of events
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    steps: u64,
    /// One JSON line for each figure instead of the table
    #[arg(long)]
    json: bool,
    /// Compare the simulation with as many real processes; needs root
    #[arg(long, conflicts_with = "scenarios")]
    pub(crate) calibrate: bool,
}

/// What can be simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Membership and inventory
    Network,
    /// The strict role: no two leaders, in a minute or two
    Election,
}

/// What issue 4 asks for.
struct Target {
    kib: f64,
    change_ms: u64,
    failure_ms: u64,
    view_mib: f64,
}

impl Target {
    /// The targets are for 1,000 and for 5,000 nodes.
    fn of(nodes: u32) -> Self {
        if nodes <= 1000 {
            Self { kib: 20.0, change_ms: 1000, failure_ms: 4000, view_mib: 32.0 }
        } else {
            Self { kib: 60.0, change_ms: 2000, failure_ms: 6000, view_mib: 64.0 }
        }
    }
}

/// Runs all that was asked for; `false`: a target was missed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.what == What::Election {
        return Ok(election::run(options.seed, options.schedules, options.steps));
    }
    let scenarios: &[Scenario] = if options.scenarios.is_empty() {
        &[Scenario::Churn, Scenario::Burst, Scenario::Massacre]
    } else {
        &options.scenarios
    };
    let nodes: &[u32] = if options.nodes.is_empty() { &[1000] } else { &options.nodes };
    let mut all_met = true;
    for nodes in nodes {
        let view = holdings::measure(*nodes as usize)?;
        let target = Target::of(*nodes);
        let mut report = Report { nodes: *nodes, json: options.json, met: true };
        if !options.json {
            println!("\n{nodes} nodes");
        }
        report.line("view of one node", "MiB", view, Some(target.view_mib));
        for scenario in scenarios {
            let workload = Workload::new(*nodes as usize, options.seconds, *scenario, options.seed);
            let figures = workload.run(|line| eprintln!("{line}"));
            report.figures(*scenario, &figures, &target);
        }
        all_met &= report.met;
    }
    Ok(all_met)
}

struct Report {
    nodes: u32,
    json: bool,
    met: bool,
}

impl Report {
    fn figures(&mut self, scenario: Scenario, figures: &Figures, target: &Target) {
        let name = scenario.name();
        let budget = match scenario {
            // A burst may cost three times as much.
            Scenario::Burst => Some(3.0 * target.kib),
            Scenario::Churn | Scenario::Flood => Some(target.kib),
            Scenario::Massacre | Scenario::Quiet => None,
        };
        let change = matches!(scenario, Scenario::Churn | Scenario::Burst).then_some(target.change_ms as f64);
        let failure =
            matches!(scenario, Scenario::Churn | Scenario::Massacre).then_some(target.failure_ms as f64);
        self.line(&format!("{name}: both directions, mean"), "KiB/s", figures.kib_mean, budget);
        self.line(&format!("{name}: both directions, p99 of the nodes"), "KiB/s", figures.kib_p99, None);
        self.line(&format!("{name}: frames sent"), "1/s", figures.frames, None);
        if let Some((median, p99)) = figures.change_ms {
            self.line(&format!("{name}: a change reaches 99 % of the nodes, median"), "ms", median, None);
            self.line(&format!("{name}: a change reaches 99 % of the nodes, p99"), "ms", p99, change);
        }
        if let Some((median, p99)) = figures.failure_ms {
            self.line(&format!("{name}: a failure is known to 99 %, median"), "ms", median, None);
            self.line(&format!("{name}: a failure is known to 99 %, p99"), "ms", p99, failure);
        }
        if let Some((_, join)) = figures.join_ms {
            self.line(&format!("{name}: a newcomer's view is complete, p99"), "ms", join, None);
        }
        self.line(&format!("{name}: changes that did not arrive"), "", figures.lost as f64, Some(0.0));
        self.line(&format!("{name}: duplicates per change"), "", figures.duplicates, None);
        for (part, bytes) in &figures.parts {
            self.line(&format!("{name}: sent, {part}"), "B/s", *bytes, None);
        }
    }

    fn line(&mut self, what: &str, unit: &str, value: f64, target: Option<f64>) {
        let is_met = target.is_none_or(|target| value <= target);
        self.met &= is_met;
        if self.json {
            let line = json!({
                "nodes": self.nodes, "what": what, "unit": unit, "value": value, "target": target, "met": is_met,
            });
            println!("{line}");
            return;
        }
        let verdict = match target {
            None => String::new(),
            Some(target) if is_met => format!("  (target {target}: met)"),
            Some(target) => format!("  (target {target}: MISSED)"),
        };
        println!("  {what:<58} {value:>9.1} {unit}{verdict}");
    }
}
