//! Policies of the election world decide who asks the registry for all: counted there, by who asked.

use std::time::Duration;

use peili_lab::{Generation, Image, policy, wait};
use serde_json::{Value, json};

use super::{needs_for, tags_asked};
use crate::Case;
use crate::cluster::{Cluster, REGISTRY, Setup};

/// Until all carry the same policies for 10 s, and some more on a busy machine.
const RANKS: Duration = Duration::from_secs(40);
/// So many that chance would not give all of them to one of three nodes.
const TAGS: u64 = 5;

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![
        // Whoever is slow to tell a tag is not waited for.
        Case::new("policies::election::home", &needs, home).timed(),
        Case::new("policies::election::failing", &needs, failing),
    ]
}

/// Three nodes whose tags have a home that this policy ranks, once the role is as it is expected to be.
async fn cluster(component: &str, settings: &Value, is_so: impl Fn(&Value) -> bool) -> Cluster {
    let rule = json!({"match": [format!("{REGISTRY}/**")], "resolve": "home", "max-age": "10m"});
    let freshness = json!({"name": "tags", "path": policy("tag-freshness"), "settings": {"rules": [rule]}});
    let ranks = json!({"name": component, "path": policy(component), "settings": settings});
    let config = json!({"policies": {"registry": [freshness], "election": [ranks]}});
    let large = json!({"election": {"labels": {"pool": "large"}}});
    let setup = Setup { count: 3, config, configs: vec![(2, large)], ..Setup::new(Generation::V2) };
    let cluster = setup.start().await;
    for node in &cluster.nodes {
        wait::until("the role is held as expected", RANKS, async || {
            let election = &node.peili.status().await.ok()?["election"];
            let role = election["roles"].as_array()?.iter().find(|role| role["role"] == "tag-home")?;
            (election["members"] == 3 && is_so(role)).then_some(())
        })
        .await
        .unwrap();
    }
    cluster
}

/// All nodes pull some images at once; by number, the nodes that asked the registry for tags, each tag once.
async fn homes(cluster: &Cluster) -> Vec<usize> {
    let mut homes = Vec::new();
    for seed in 1..=TAGS {
        let name = format!("library/app-{seed}");
        let image = Image::builder(&name, "v1").layer(1 << 20).seed(seed).build().unwrap();
        cluster.origin.add(&image);
        cluster.origin.reset();
        futures::future::join_all(cluster.nodes.iter().map(|node| node.pull(&image))).await;
        assert_eq!(tags_asked(cluster, &image), 1, "{:?}", cluster.origin.requests());
        let asked = cluster.origin.requests().into_iter().find(|request| request.path.ends_with("/v1"));
        let asked = asked.unwrap().remote.ip();
        homes.extend(cluster.network.nodes.iter().position(|node| node.addresses().any(|own| own == asked)));
    }
    println!("asked by {homes:?}");
    homes
}

/// The node that the policy prefers asks the registry for all.
async fn home() {
    let settings = json!({"rules": [{"label": "pool", "value": "large", "weight": 1000}], "otherwise": 0});
    let is_so = |role: &Value| role["by"] == "policy" && role["candidates"] == 1;
    let cluster = cluster("prefer-labels", &settings, is_so).await;
    assert_eq!(homes(&cluster).await, [2; TAGS as usize]);
}

/// A policy that traps wherever it is asked ranks nobody: the built-in ranking decides, and each tag still has one home.
async fn failing() {
    let settings = json!({"act": "panic", "on": "node-2"});
    let is_so = |role: &Value| role["by"] == "built-in" && role["fallback"] == "failed";
    let cluster = cluster("testguests-election", &settings, is_so).await;
    let homes = homes(&cluster).await;
    assert_eq!(homes.len(), TAGS as usize);
}
