//! The act of the election: one node coordinates, as a policy says; another policy, and it makes room; without an API server nobody
//! does, and images go on; and who is killed is replaced. No process is started again for any of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peili_lab::wait;
use peili_lab::{Requirement, policy, require};
use serde_json::{Value, json};

use super::stage::{LIMIT, REGISTRY, Stage};

/// The pools of the nodes: a policy names one of them.
const POOLS: [&str; 3] = ["green", "blue", "green"];
/// The pool whose one node coordinates first, and the one whose two nodes may then.
const FIRST: &str = "blue";
const THEN: &str = "green";

/// What a node's configuration has for it from the beginning: its label, and the policy.
pub(super) fn configuration(index: usize) -> Result<Value> {
    require(&[Requirement::Policies]).map_err(anyhow::Error::msg)?;
    Ok(json!({
        "election": {"labels": {"pool": POOLS.get(index)}},
        "policies": {"election": [ranks(FIRST)]},
    }))
}

/// `prefer-labels`: nodes of this pool coordinate and no others, and a leader makes room at once.
fn ranks(pool: &str) -> Value {
    let rules = json!([{"label": "pool", "value": pool, "weight": 1000}]);
    let settings = json!({"roles": ["coordinator"], "rules": rules, "otherwise": 0, "handover": "now", "min-tenure-seconds": 0});
    json!({"name": "prefer-labels", "path": policy("prefer-labels"), "settings": settings})
}

/// Leaders by policy; the policy replaced; the API server cut off; the leader killed.
pub(super) async fn is_elected(stage: &mut Stage) -> Result<String> {
    let image = stage.image.clone().context("there is no image")?;
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    let processes = processes(stage);
    set(stage, FIRST)?;
    all(stage, "the node of the blue pool coordinates, and all rely on it", |election| {
        election["mode"] == "lease" && holder(election).is_some_and(|name| pool(name) == Some(FIRST))
    })
    .await?;
    let first = leader(stage).await?;

    set(stage, THEN)?;
    let began = Instant::now();
    let second = led(stage, THEN).await?;
    let replaced = began.elapsed();

    stage.cut_api(true)?;
    let began = Instant::now();
    all(stage, "nobody coordinates, and all say why", |election| {
        election["lease"]["held"] == false
            && election["mode"] == "gossip-degraded"
            && election["cause"] != "starting"
    })
    .await?;
    let paused = began.elapsed();
    let status = stage.nodes[0].node.status().await?;
    let cause = status["election"]["cause"].as_str().unwrap_or_default().to_owned();
    for member in &stage.nodes {
        let answer = member.node.fetch(&path).await?;
        ensure!(
            answer.status == 200,
            "{} answers {} without an API server",
            member.node.plan.name,
            answer.status
        );
        let ready = member.node.admin("/readyz").await?;
        ensure!(ready.status == 200, "{} is not ready without an API server", member.node.plan.name);
    }
    stage.cut_api(false)?;
    let began = Instant::now();
    let third = led(stage, THEN).await?;
    let back = began.elapsed();

    ensure!(processes == self::processes(stage), "a process was started again");
    stage.kill(third);
    let began = Instant::now();
    let fourth = led(stage, THEN).await?;
    let killed = began.elapsed();
    stage.restart(third).await?;
    stage.settle().await?;
    let name = |index: usize| &stage.nodes[index].node.plan.name;
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    Ok(format!(
        "{} coordinates, as the policy says; {} does {} after it was replaced; without an API server ({cause}) nobody \
         does {} later, and all serve; {} does {} after it is back; killed, {} does {} later",
        name(first),
        name(second),
        seconds(replaced),
        seconds(paused),
        name(third),
        seconds(back),
        name(fourth),
        seconds(killed),
    ))
}

fn processes(stage: &Stage) -> Vec<Option<u32>> {
    stage.nodes.iter().map(|member| member.node.process().map(peili_lab::Process::id)).collect()
}

fn pool(name: &str) -> Option<&'static str> {
    POOLS.get(name.strip_prefix("node-")?.parse::<usize>().ok()?.checked_sub(1)?).copied()
}

fn set(stage: &mut Stage, pool: &str) -> Result<()> {
    for member in &mut stage.nodes {
        member.node.plan.merge(&json!({"policies": {"election": [ranks(pool)]}}));
        member.node.rewrite()?;
    }
    Ok(())
}

/// Who coordinates, as a node sees it.
fn holder(election: &Value) -> Option<&str> {
    let role = election["roles"].as_array()?.iter().find(|role| role["role"] == "coordinator")?;
    role["holders"][0]["node"].as_str()
}

/// Waits until all nodes that run say so of their elections.
async fn all(stage: &Stage, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<()> {
    wait::until(what, LIMIT, async || {
        for member in stage.nodes.iter().filter(|member| member.node.process().is_some()) {
            let status = member.node.status().await.ok()?;
            if !is_so(&status["election"]) {
                return None;
            }
        }
        Some(())
    })
    .await
}

/// The node that says that it holds the lease; two of them are an error.
async fn leader(stage: &Stage) -> Result<usize> {
    wait::until("one node holds the lease", LIMIT, async || leading(stage).await.ok()?).await
}

/// Waits until a node of this pool holds it.
async fn led(stage: &Stage, by: &str) -> Result<usize> {
    wait::until(&format!("a node of the {by} pool holds the lease"), LIMIT, async || {
        match leading(stage).await {
            Ok(found) => found.filter(|index| POOLS.get(*index) == Some(&by)).map(Ok),
            Err(error) => Some(Err(error)),
        }
    })
    .await
    .and_then(|found| found)
}

/// Who holds it now; two are an error.
pub(super) async fn leading(stage: &Stage) -> Result<Option<usize>> {
    let mut found = None;
    for (index, member) in
        stage.nodes.iter().enumerate().filter(|(_, member)| member.node.process().is_some())
    {
        let Ok(status) = member.node.status().await else { continue };
        if status["election"]["lease"]["held"] == true {
            // One status is older than the other: two lead if both still say so.
            if let Some(other) = found.replace(index) {
                let again: Value = stage.nodes[other].node.status().await?;
                ensure!(again["election"]["lease"]["held"] != true, "two nodes hold the lease");
            }
        }
    }
    Ok(found)
}
