//! `cargo xtask demo`: the main job, seen with real processes, in a minute and a half.
//!
//! A demonstration is a row of acts (`acts`) on one stage (`stage`): an origin registry, an API server and three nodes, on loopback
//! with image layouts or on containerds in network namespaces. Each act checks what it shows, and the first that does
//! not see it ends the demonstration with an error. It measures nothing: `cargo xtask bench` does.

mod acts;
mod coordinator;
mod diagnosis;
mod distrust;
mod meter;
mod newcomer;
mod policy;
mod screen;
mod stage;
mod stranger;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use futures::future::LocalBoxFuture;
use serde_json::{Value, json};

use screen::{Screen, bytes};
use stage::Stage;

/// How often an act may be tried.
const ATTEMPTS: u32 = 3;
/// Between two attempts: nodes that are suspected are tried again within this time.
const PAUSE: Duration = Duration::from_secs(3);

/// What `demo` was told.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Use real containerds in network namespaces instead of image layouts on loopback; needs root
    #[arg(long)]
    containerd: bool,
    /// Print the summary as JSON to standard output, all else to standard error
    #[arg(long)]
    json: bool,
}

/// One thing to show. Acts come in the order of [`acts::ACTS`], and each finds the stage as the one before left it.
struct Act {
    /// What is shown, in one line.
    title: &'static str,
    /// Shows it. Returns in one line what was seen, or an error if that is not what should be seen.
    run: for<'a> fn(&'a mut Stage) -> LocalBoxFuture<'a, Result<String>>,
}

/// What became of an act.
struct Outcome {
    title: &'static str,
    seen: Result<String, String>,
    seconds: f64,
    /// How often it was tried.
    attempts: u32,
}

/// Runs all acts; false if one of them did not see what should be seen.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let screen = Arc::new(Screen::new(options.json));
    let begin = Instant::now();
    screen.say("Peili: images from node to node. What you see are real processes and real bytes.");
    let mut stage = match Stage::start(options.containerd, Arc::clone(&screen)).await {
        Ok(stage) => stage,
        Err(error) => {
            screen.say(&format!("cannot begin: {error:#}"));
            return Ok(false);
        }
    };
    screen.say(&stage.setting());
    let mut outcomes = Vec::new();
    for (index, act) in acts::ACTS.iter().enumerate() {
        screen.say(&format!("\n{}. {}", index + 1, act.title));
        let started = Instant::now();
        let (seen, attempts) = perform(act, &mut stage).await;
        let seconds = started.elapsed().as_secs_f64();
        stage.show().await;
        screen.settle();
        match &seen {
            Ok(seen) => screen.say(&format!("   seen: {seen} ({seconds:.1} s)")),
            Err(error) => screen.say(&format!("   NOT SEEN: {error:#} ({seconds:.1} s)")),
        }
        let failed = seen.is_err();
        let seen = seen.map_err(|error| format!("{error:#}"));
        outcomes.push(Outcome { title: act.title, seen, seconds, attempts });
        if failed {
            screen.say(&stage.logs());
            break;
        }
    }
    let passed = outcomes.len() == acts::ACTS.len() && outcomes.iter().all(|outcome| outcome.seen.is_ok());
    let summary = summary(&stage, &outcomes, passed, begin.elapsed().as_secs_f64());
    drop(stage);
    screen.say(&format!("\n{}", text(&summary)));
    if options.json {
        println!("{summary:#}");
    }
    Ok(passed)
}

/// Peili goes on without a node that is silent for 0.3 s, which on a machine that is busy otherwise says nothing about
/// Peili: what is not seen is tried again before it counts, and the summary says how often.
async fn perform(act: &Act, stage: &mut Stage) -> (Result<String>, u32) {
    let mut attempt = 1;
    loop {
        let seen = match stage.prepare().await {
            Ok(()) => (act.run)(stage).await,
            Err(error) => return (Err(error), attempt),
        };
        match seen {
            Err(error) if attempt < ATTEMPTS => {
                stage
                    .screen
                    .say(&format!("   not seen: {error:#}; the machine may be too busy, so once more"));
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            seen => return (seen, attempt),
        }
    }
}

fn summary(stage: &Stage, outcomes: &[Outcome], passed: bool, seconds: f64) -> Value {
    let acts: Vec<Value> = outcomes
        .iter()
        .enumerate()
        .map(|(index, Outcome { title, seen, seconds, attempts })| {
            let (key, seen) = match seen {
                Ok(seen) => ("seen", seen),
                Err(error) => ("error", error),
            };
            let passed = key == "seen";
            json!({
                "act": index + 1, "title": title, "passed": passed, key: seen, "seconds": seconds, "attempts": attempts,
            })
        })
        .collect();
    let nodes: Vec<Value> = stage
        .meter
        .totals()
        .into_iter()
        .map(|(name, gave, got)| json!({"name": name, "gave_bytes": gave, "got_bytes": got}))
        .collect();
    let main = &stage.main;
    json!({
        "passed": passed,
        "runtime": stage.runtime,
        "seconds": seconds,
        "main": {
            "nodes": stage.nodes.len(),
            "image_bytes": main.image,
            "upstream_bytes": main.upstream,
            "peer_bytes": main.peers,
            "without_peili_bytes": main.image * stage.nodes.len() as u64,
        },
        "all": {
            "upstream_bytes": stage.upstream_bytes(),
            "peer_bytes": nodes.iter().filter_map(|node| node["got_bytes"].as_u64()).sum::<u64>(),
            "pulled_bytes": stage.pulled,
        },
        "nodes": nodes,
        "acts": acts,
    })
}

/// The summary for people.
fn text(summary: &Value) -> String {
    let amount = |value: &Value| bytes(value.as_u64().unwrap_or(0));
    let (main, all) = (&summary["main"], &summary["all"]);
    let verdict =
        if summary["passed"] == true { "All was as it should be" } else { "NOT all was as it should be" };
    let acts = summary["acts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let again =
        acts.iter().filter(|act| act["attempts"].as_u64() > Some(1)).map(|act| act["act"].to_string());
    let again: Vec<String> = again.collect();
    let again = if again.is_empty() {
        String::new()
    } else {
        format!("Not seen at the first attempt, on this machine: act {}\n", again.join(", "))
    };
    format!(
        "{nodes} nodes, image of {image}: {upstream} came from upstream once, {peers} from node to node; without \
         Peili: {without}\nAll acts together: {all_upstream} from upstream, {all_peers} from node to node\n\
         {again}{verdict}, \
         in {seconds:.0} s.",
        nodes = main["nodes"],
        image = amount(&main["image_bytes"]),
        upstream = amount(&main["upstream_bytes"]),
        peers = amount(&main["peer_bytes"]),
        without = amount(&main["without_peili_bytes"]),
        all_upstream = amount(&all["upstream_bytes"]),
        all_peers = amount(&all["peer_bytes"]),
        seconds = summary["seconds"].as_f64().unwrap_or(0.0),
    )
}
