//! Elections among real programs on loopback, without any API server: owners on which all agree, a node that dies, and policies
//! that all or only some have.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Node, Requirement, policy, wait};
use serde_json::{Value, json};

use crate::Case;
use crate::cli::layout;

/// Longest wait for nodes to see the same.
const SAME: Duration = Duration::from_secs(20);
/// From the kill to owners without the dead node (issue 6: p99, on a machine that does nothing else).
const MOVED: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("election::owners_are_agreed_on_and_move", &[], agreed),
        Case::new("election::policies_rank_where_all_have_them", &[Requirement::Policies], ranked).timed(),
        Case::new("election::the_configuration_can_name_them", &[], named),
    ]
}

/// Nodes by a cluster key, the first of which all others look for.
struct Rig {
    nodes: Vec<Node>,
    // After the nodes that use it.
    _scratch: Scratch,
}

/// What `peili election` says of a node.
pub(crate) fn asked(node: &Node, arguments: &[&str]) -> Option<Value> {
    let output = Command::new(binary().unwrap())
        .arg("election")
        .args(arguments)
        .args(["--json", "--data-dir"])
        .arg(node.plan.data_dir())
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).ok()
}

impl Rig {
    async fn start(count: usize, election: impl Fn(usize) -> Value) -> Self {
        let scratch = Scratch::new().unwrap();
        let key = scratch.path().join("cluster.key");
        std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
        let folder = scratch.path().join("layout");
        layout(&folder, &[]);
        let mut nodes: Vec<Node> = Vec::new();
        for number in 0..count {
            let store = format!("layout:{}", folder.display());
            let mut plan = Plan::on_loopback(&format!("node-{number}"), &store).unwrap();
            let first: Vec<_> = nodes.iter().take(1).map(|node| node.plan.control()).collect();
            plan.merge(&json!({
                "node": {"zone": format!("zone-{number}")},
                "network": {"cluster-key": [key], "dns": first},
                "election": election(number),
            }));
            nodes.push(plan.start().await.unwrap());
        }
        Self { nodes, _scratch: scratch }
    }

    fn election(&self, node: usize, arguments: &[&str]) -> Option<Value> {
        asked(&self.nodes[node], arguments)
    }

    /// Waits until what some nodes say of elections is so.
    async fn until(&self, nodes: &[usize], what: &str, limit: Duration, is_so: impl Fn(&Value) -> bool) {
        let mut last = Value::Null;
        for node in nodes {
            let found = wait::until(what, limit, async || {
                last = self.nodes[*node].status().await.ok()?["election"].clone();
                is_so(&last).then_some(())
            });
            if let Err(error) = found.await {
                panic!("node {node}: {error}: {last:#}");
            }
        }
    }

    /// Who holds a role, by all nodes that are named; all say the same.
    async fn same(&self, nodes: &[usize], field: &str) -> Vec<Value> {
        wait::until(&format!("{field} is the same"), SAME, async || {
            let mut all = Vec::new();
            for node in nodes {
                let status = self.nodes[*node].status().await.ok()?["election"].clone();
                all.push((status["view"].clone(), status["roles"].clone()));
            }
            let rankings = |roles: &Value| -> Vec<Value> {
                roles.as_array().unwrap().iter().map(|role| role["ranking"].clone()).collect()
            };
            let same =
                all.iter().all(|(view, roles)| *view == all[0].0 && rankings(roles) == rankings(&all[0].1));
            same.then(|| all[0].1.as_array().unwrap().clone())
        })
        .await
        .unwrap()
    }

    /// The owners of some keys, by one node.
    fn owners(&self, node: usize, keys: usize) -> BTreeMap<usize, String> {
        let owner = |key: usize| {
            let explained =
                self.election(node, &["explain", "tag-home", &format!("docker.io/library/app:{key}")]);
            explained.unwrap()["owners"][0]["node"].as_str().unwrap().to_owned()
        };
        (0..keys).map(|key| (key, owner(key))).collect()
    }
}

/// A role of a status; nothing where there is none.
fn named_role(roles: &[Value], name: &str) -> Value {
    roles.iter().find(|role| role["role"] == name).cloned().unwrap_or_default()
}

/// Three nodes agree on the owners of keys and on introducers; one is killed, and only its keys move, soon; one alone says so.
async fn agreed() {
    let mut rig = Rig::start(3, |_| json!({})).await;
    rig.until(&[0, 1, 2], "three members", SAME, |election| {
        election["members"] == 3 && election["mode"] == "gossip"
    })
    .await;
    let roles = rig.same(&[0, 1, 2], "owners").await;
    assert_eq!(named_role(&roles, "introducers")["holders"].as_array().unwrap().len(), 3, "{roles:?}");
    assert_eq!(named_role(&roles, "tag-home")["by"], "built-in", "{roles:?}");
    // That rankings are the same says so of all keys; some are looked at one by one.
    let before = rig.owners(0, 24);
    assert_eq!(rig.owners(2, 24), before);

    let killed = Instant::now();
    rig.nodes[1].kill();
    rig.until(&[0, 2], "two members", SAME, |election| election["members"] == 2).await;
    let took = killed.elapsed();
    rig.same(&[0, 2], "owners").await;
    let after = rig.owners(2, 24);
    let moved: Vec<_> = before.iter().filter(|(key, owner)| after[key] != **owner).collect();
    assert!(moved.iter().all(|(_, owner)| *owner == "node-1"), "{moved:?}");
    assert!(after.values().all(|owner| owner != "node-1"), "{after:?}");
    println!("election: the owners moved {took:?} after a kill");
    assert!(took < MOVED, "{took:?}");

    let log = rig.nodes[0].log();
    assert!(log.contains("how roles are given") && log.contains("introducers"), "{log}");
    let metric = async |name: &str, label: &str| rig.nodes[0].metric(name, label).await.unwrap();
    assert_eq!(metric("peili_election_mode", "gossip").await, 1.0);
    assert_eq!(metric("peili_election_members", "").await, 2.0);
    assert!(metric("peili_election_transitions_total", "introducers").await >= 2.0);

    rig.nodes[2].terminate(SAME).await.unwrap();
    rig.until(&[0], "alone", SAME, |election| {
        election["mode"] == "alone" && election["cause"] == "unreached"
    })
    .await;
    let text = Command::new(binary().unwrap())
        .args(["election", "status", "--data-dir"])
        .arg(rig.nodes[0].plan.data_dir())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("alone (unreached)") && text.contains("tag-home"), "{text}");
    let wrong = Command::new(binary().unwrap())
        .args(["election", "explain", "king", "--data-dir"])
        .arg(rig.nodes[0].plan.data_dir())
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&wrong.stderr).contains("the roles are coordinator, introducers, tag-home"),
        "{wrong:?}"
    );

    // It comes back with what it remembers: one of the introducers of then is dialled first.
    rig.nodes[2].restart().await.unwrap();
    rig.until(&[0, 2], "two members again", SAME, |election| election["members"] == 2).await;
    rig.same(&[0, 2], "owners").await;
    wait::until("an introducer was dialled", SAME, async || {
        let dialled = rig.nodes[2].metric("peili_network_gossip_events", "Introduced").await.ok()?;
        (dialled >= 1.0).then_some(())
    })
    .await
    .unwrap();
}

/// A policy that one of three nodes has ranks nowhere, and it is said why; once all have it, owners follow it on all.
async fn ranked() {
    let mut rig =
        Rig::start(3, |number| json!({"labels": {"pool": if number == 2 { "large" } else { "small" }}}))
            .await;
    rig.until(&[0, 1, 2], "three members", SAME, |election| election["members"] == 3).await;
    let settings = json!({"rules": [{"label": "pool", "value": "large", "weight": 1000}], "otherwise": 0});
    let policies = json!({"policies": {"election": [
        {"name": "prefer-labels", "path": policy("prefer-labels"), "settings": settings}
    ]}});
    let mount = |node: &mut Node| {
        node.plan.merge(&policies);
        node.rewrite().unwrap();
    };
    mount(&mut rig.nodes[0]);
    let role = |election: &Value, name: &str| {
        named_role(election["roles"].as_array().map(Vec::as_slice).unwrap_or_default(), name)
    };
    rig.until(&[0], "the policy ranks nowhere", SAME, |election| {
        role(election, "tag-home")["fallback"] == "disagreement"
    })
    .await;
    let problems = rig.nodes[0].status().await.unwrap()["problems"].to_string();
    assert!(problems.contains("1 of 3 members carry this node's election policies"), "{problems}");
    let roles = rig.same(&[0, 1, 2], "owners").await;
    assert_eq!(named_role(&roles, "tag-home")["by"], "built-in");

    let began = Instant::now();
    mount(&mut rig.nodes[1]);
    mount(&mut rig.nodes[2]);
    let ranks = |election: &Value| {
        ["tag-home", "introducers"].iter().all(|name| role(election, name)["by"] == "policy")
    };
    rig.until(&[0, 1, 2], "the policy ranks", 2 * SAME, ranks).await;
    println!("election: a policy ranked {:?} after the last node had it", began.elapsed());
    let roles = rig.same(&[0, 1, 2], "owners").await;
    assert_eq!(
        (
            &named_role(&roles, "introducers")["holders"][0]["node"],
            &named_role(&roles, "tag-home")["candidates"],
        ),
        (&json!("node-2"), &json!(1)),
        "{roles:?}"
    );
    let explained = rig.election(0, &["explain", "tag-home", "docker.io/library/app:v1"]).unwrap();
    assert_eq!(explained["owners"][0]["node"], "node-2");
    assert_eq!(explained["said"][0]["policy"], "prefer-labels", "{explained}");
}

/// Named nodes hold the roles; off is nobody, and both change while a node runs.
async fn named() {
    let mut rig = Rig::start(2, |_| json!({"backend": "static", "nodes": ["node-1"]})).await;
    rig.until(&[0, 1], "node-1", SAME, |election| {
        let roles = election["roles"].as_array().map(Vec::as_slice).unwrap_or_default();
        named_role(roles, "introducers")["holders"][0]["node"] == "node-1"
    })
    .await;
    let explained = rig.election(0, &["explain", "tag-home", "r.test/a:v1"]).unwrap();
    assert_eq!(
        (&explained["owners"][0]["node"], &explained["role"]["by"]),
        (&json!("node-1"), &json!("static"))
    );
    rig.nodes[0].plan.merge(&json!({"election": {"backend": "off", "nodes": []}}));
    rig.nodes[0].rewrite().unwrap();
    rig.until(&[0], "off", SAME, |election| election["mode"] == "off").await;
    let explained = rig.election(0, &["explain", "tag-home", "r.test/a:v1"]).unwrap();
    assert_eq!(explained["owners"], json!([]));
}
