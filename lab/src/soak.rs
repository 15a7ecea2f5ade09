//! `cargo xtask soak`: six nodes on loopback under churn, for as long as one likes.
//!
//! Images appear and disappear, pulls run all the time at a bounded rate, clients hang up, half of the nodes are killed
//! and restarted, and the other half is watched for growth (`readings`). It is no benchmark and injects no network
//! faults: the integration tests do.

mod fleet;
mod readings;
mod work;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use peili_lab::wait;
use tokio::task::JoinSet;
use tokio::time::Instant;

use fleet::{Fleet, Rest};
use readings::Readings;

/// Nodes that are never killed, so that growth over the whole time is seen.
const STABLE: usize = 3;
/// Nodes that are killed and restarted.
const CHURNED: usize = 3;
/// How often the stable nodes are read.
const READ_INTERVAL: Duration = Duration::from_millis(500);
/// How often it says that it still runs.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// How long all nodes may take to know each other, at the start and after the last restart.
const MEET_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take, once nobody asks any more, until nothing is held that a node without work does not hold: idle
/// connections to peers are kept for 30 s, and those of a killed node are noticed later.
const QUIET_LIMIT: Duration = Duration::from_secs(90);

/// What `soak` was told.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How long
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// What is random begins with this; tasks run side by side, so two runs are alike but not the same
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pulls per second, of all nodes together
    #[arg(long, default_value_t = 4.0)]
    rate: f64,
}

/// Runs it; false if anything broke, leaked or grew.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    ensure!(options.minutes > 0.0 && options.minutes < 1e5, "--minutes must be above 0");
    ensure!(options.rate > 0.0 && options.rate < 1e3, "--rate must be above 0, and below 1000");
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    println!("soak: {} nodes for {length:.0?}, seed {}", STABLE + CHURNED, options.seed);
    let fleet = Arc::new(Fleet::start(STABLE, CHURNED, options.seed).await?);
    let before = rest(&fleet).await;
    let mut tasks = JoinSet::new();
    work::spawn(&mut tasks, &fleet, options.seed, options.rate);

    let mut readings = Readings::new(length, STABLE);
    tokio::select! {
        () = watch(&fleet, &mut tasks, &mut readings, length) => {}
        () = work::kill_for_ever(&fleet, options.seed) => {}
    }
    // Pulls and restarts that run are ended where they are; the nodes see clients that hang up.
    tasks.shutdown().await;
    fleet.revive().await;
    for (slot, before) in fleet.slots.iter().zip(before) {
        let quiet = async || slot.rest().await.filter(|now| now.is_back_at(&before));
        match wait::until("quiet", QUIET_LIMIT, quiet).await {
            Ok(now) => println!("soak: {} at rest: {before}, then {now}", slot.name),
            Err(_) => {
                let now = slot.rest().await.map_or("no answer".to_owned(), |now| now.to_string());
                fleet.violation(format!("{} does not come to rest: {before}, then {now}", slot.name));
            }
        }
    }
    fleet.check_logs();
    for fault in readings.judge(&fleet) {
        fleet.violation(fault);
    }
    println!("{}", readings.table(&fleet));
    println!("soak: {}", fleet.line());
    let violations = fleet.violations();
    for violation in &violations {
        println!("soak: VIOLATION: {violation}");
    }
    println!("soak: {}", if violations.is_empty() { "nothing broke, leaked or grew" } else { "failed" });
    Ok(violations.is_empty())
}

/// What each node holds before it has any work, once all know each other.
async fn rest(fleet: &Fleet) -> Vec<Rest> {
    let mut rests = Vec::new();
    for slot in &fleet.slots {
        let rest = wait::until("all nodes know each other", MEET_LIMIT, async || {
            slot.rest().await.filter(|rest| rest.peers + 1 == fleet.slots.len())
        });
        match rest.await {
            Ok(rest) => rests.push(rest),
            Err(error) => {
                fleet.violation(format!("{}: {error:#}", slot.name));
                rests.push(Rest::default());
            }
        }
    }
    rests
}

/// Reads the nodes and their logs until the time is over.
async fn watch(fleet: &Fleet, tasks: &mut JoinSet<()>, readings: &mut Readings, length: Duration) {
    let begin = Instant::now();
    let mut report = begin + REPORT_INTERVAL;
    while begin.elapsed() < length && !fleet.is_hopeless() {
        tokio::time::sleep(READ_INTERVAL).await;
        readings.read(fleet, begin.elapsed());
        fleet.check_logs();
        if let Some(Err(error)) = tasks.try_join_next() {
            fleet.violation(format!("the soak itself broke: {error}"));
        }
        if Instant::now() >= report {
            report += REPORT_INTERVAL;
            println!("soak: {:>5.0} s  {}", begin.elapsed().as_secs_f64(), fleet.line());
        }
    }
}
