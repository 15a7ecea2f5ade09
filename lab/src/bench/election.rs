//! Elections: how long until somebody else leads, by many leases at once on one API server; how long until the owners of an advisory
//! role have moved; and what it costs a node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use peili::cluster::{Api as Client, Config, Kind, ObjectLock};
use peili::election::lease::Standing;
use peili_lab::candidate::{Candidate, leader};
use peili_lab::image::write_empty_layout;
use peili_lab::node::{Node, Plan};
use peili_lab::scratch::Scratch;
use peili_lab::wait;
use rand::RngExt;
use serde_json::{Value, json};

use super::{PATIENCE, Report};
use crate::api::Api;

/// Leases at once: each has three candidates, and all together ask the server some thirty times a second.
const LEASES: usize = 30;
/// A leader is taken away at a random moment of this time, so that it is at any point between two renewals.
const SPREAD: Duration = Duration::from_secs(3);
/// Nodes, one of which is taken away.
const NODES: usize = 4;
/// How often nodes are asked who holds what.
const LOOK: Duration = Duration::from_millis(20);
/// For how long it is counted what nodes cost.
const COST: Duration = Duration::from_secs(60);

/// How long until another candidate may act, after a leader was killed and after it gave the lease away.
pub(crate) async fn strict(repeats: u32) -> Result<(Report, String)> {
    let names: Vec<String> = (0..LEASES).map(|number| format!("bench-{number}")).collect();
    let api = Api::start(None, &names).await?;
    let credentials = api.credentials().await?;
    let config = Config { endpoints: vec![api.url()], credentials, ..Config::default() };
    let all = try_join_all(names.iter().map(|name| rounds(&config, name, repeats))).await?;
    let mut report = Report::new("election.strict");
    let millis = |times: Vec<Duration>| times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    let (killed, given): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    report.add("killed, ms", millis(killed.concat()));
    report.add("given away, ms", millis(given.concat()));
    Ok((report, api.name()))
}

/// The times of one lease.
async fn rounds(config: &Config, name: &str, repeats: u32) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let candidate = |rank: u32, life: u32| {
        let lock = Arc::new(ObjectLock::new(Kind::Lease, Arc::new(Client::new(config)), name));
        Candidate::start(lock, &format!("{name}-{rank}/{life}"), Standing::Candidate(rank))
    };
    let mut candidates: Vec<Candidate> = (0..3).map(|rank| candidate(rank, 0)).collect();
    let (mut killed, mut given) = (Vec::new(), Vec::new());
    for round in 1..=repeats {
        let (leads, _) = leader(&candidates.iter().collect::<Vec<_>>(), PATIENCE).await?;
        tokio::time::sleep(rand::rng().random_range(Duration::ZERO..SPREAD)).await;
        drop(candidates.remove(leads));
        let (_, took) = leader(&candidates.iter().collect::<Vec<_>>(), PATIENCE).await?;
        killed.push(took);
        // Its place is taken by one that has seen nothing yet.
        candidates.insert(leads, candidate(u32::try_from(leads)?, round));
        let (leads, _) = leader(&candidates.iter().collect::<Vec<_>>(), PATIENCE).await?;
        tokio::time::sleep(rand::rng().random_range(Duration::ZERO..SPREAD)).await;
        let began = Instant::now();
        let others = without(&candidates, leads);
        let (gave, taken) = tokio::join!(candidates[leads].strict.leave(false), leader(&others, PATIENCE));
        ensure!(gave, "the lease was not given away");
        taken?;
        given.push(began.elapsed());
    }
    Ok((killed, given))
}

/// How long until all others agree on the owners without a node that was killed, or stands still.
pub(crate) async fn advisory(repeats: u32) -> Result<Report> {
    let scratch = Scratch::new()?;
    let mut nodes = fleet(&scratch, "advisory", NODES, &json!({"election": {"backend": "gossip"}})).await?;
    let mut report = Report::new("election.advisory");
    for stands_still in [false, true] {
        let mut times = Vec::new();
        for round in 0..repeats * 4 {
            agreed(&nodes.iter().collect::<Vec<_>>(), NODES).await?;
            tokio::time::sleep(rand::rng().random_range(Duration::ZERO..SPREAD)).await;
            // Never the one that all others were told of, only so that each round is alike.
            let gone = 1 + usize::try_from(round)? % (NODES - 1);
            if stands_still {
                nodes[gone].process().context("it ended")?.pause()?;
            } else {
                nodes[gone].kill();
            }
            let began = Instant::now();
            agreed(&without(&nodes, gone), NODES - 1).await?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
            nodes[gone].restart().await?;
        }
        report.add(if stands_still { "stands still, ms" } else { "killed, ms" }, times);
    }
    Ok(report)
}

/// What a lease costs nodes: memory, and time on a CPU, beside nodes that elect nobody, in the same minutes.
pub(crate) async fn cost(repeats: u32) -> Result<Report> {
    let scratch = Scratch::new()?;
    let api = Api::start(None, &["peili".to_owned()]).await?;
    let account = json!({"kubernetes": {"endpoints": [api.url()], "credentials": api.credentials().await?}});
    let with = fleet(&scratch, "with", 3, &account).await?;
    let without = fleet(&scratch, "without", 3, &json!({"election": {"backend": "off"}})).await?;
    wait::until("a coordinator", PATIENCE, async || {
        let status = with[0].status().await.ok()?;
        (status["election"]["mode"] == "lease").then_some(())
    })
    .await?;
    let mut report = Report::new("election.cost");
    for (name, nodes) in [("with a lease", &with), ("with none", &without)] {
        let (mut memory, mut load) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            let before = usages(nodes)?;
            tokio::time::sleep(COST / repeats).await;
            for ((cpu, _), (later, resident)) in before.into_iter().zip(usages(nodes)?) {
                load.push((later - cpu) / (COST / repeats).as_secs_f64() * 100.0);
                memory.push(resident);
            }
        }
        report.add(format!("{name}, MiB"), memory);
        report.add(format!("{name}, % of a core"), load);
    }
    Ok(report)
}

/// All but the one in this place.
fn without<T>(all: &[T], place: usize) -> Vec<&T> {
    all.iter().enumerate().filter(|(number, _)| *number != place).map(|(_, other)| other).collect()
}

fn usages(nodes: &[Node]) -> Result<Vec<(f64, f64)>> {
    let usage = |node: &Node| {
        let usage = node.usage().context("a node ended")?;
        Ok((usage.cpu.as_secs_f64(), usage.resident as f64 / f64::from(1 << 20)))
    };
    nodes.iter().map(usage).collect()
}

/// Nodes on loopback that all look for the first one.
async fn fleet(scratch: &Scratch, name: &str, count: usize, changes: &Value) -> Result<Vec<Node>> {
    let folder = scratch.path().join(name);
    std::fs::create_dir_all(&folder)?;
    let key = folder.join("cluster.key");
    std::fs::write(&key, "the key of the cluster of this measurement")?;
    write_empty_layout(&folder.join("layout"))?;
    let store = format!("layout:{}", folder.join("layout").display());
    let mut nodes: Vec<Node> = Vec::new();
    for number in 0..count {
        let mut plan = Plan::on_loopback(&format!("node-{number}"), &store)?;
        let first: Vec<_> = nodes.iter().take(1).map(|node| node.plan.control()).collect();
        plan.merge(&json!({"network": {"cluster-key": [key], "dns": first}}));
        plan.merge(changes);
        nodes.push(plan.start().await?);
    }
    Ok(nodes)
}

/// Waits until all these nodes see so many members, and the same owners.
async fn agreed(nodes: &[&Node], members: usize) -> Result<()> {
    wait::until("all agree on the owners", PATIENCE, async || {
        let mut rankings = Vec::new();
        for node in nodes {
            let status = node.status().await.ok()?;
            if status["election"]["members"] != members {
                tokio::time::sleep(LOOK).await;
                return None;
            }
            let roles = status["election"]["roles"].as_array()?.clone();
            rankings.push(roles.iter().map(|role| role["ranking"].clone()).collect::<Vec<_>>());
        }
        rankings.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
    })
    .await
}
