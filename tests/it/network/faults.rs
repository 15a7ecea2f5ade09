//! What happens to the network: a partition, sources that come late, a name with thousands of addresses, many deaths at once.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use peili_lab::netns::{Addresses, Block};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Network, Node, wait};
use serde_json::{Value, json};

use super::joined;
use crate::cli::layout;
use crate::cluster::REGISTRY;

/// Longest end of a node that is asked to end.
const END: Duration = Duration::from_secs(15);
/// Longest time until a death is known to all.
const DEATH: Duration = Duration::from_secs(6);
/// Those who are cut off are looked for three times a minute.
const HEALED: Duration = Duration::from_secs(75);

/// Plans of nodes with an empty store, by a cluster key.
pub(super) fn plans(scratch: &Scratch, count: usize, plan: impl Fn(usize, &str, &str) -> Plan) -> Vec<Plan> {
    let (key, folder) = (scratch.path().join("key"), scratch.path().join("layout"));
    std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
    layout(&folder, &[]);
    (0..count)
        .map(|number| {
            let store = format!("layout:{}", folder.display());
            let mut plan = plan(number, &format!("node-{number}"), &store);
            plan.merge(&json!({"network": {"cluster-key": [key]}, "log": {"level": "info,peili=debug"}}));
            plan
        })
        .collect()
}

pub(super) fn place(network: &Network, number: usize, name: &str, store: &str) -> Plan {
    let node = &network.nodes[number];
    Plan::in_namespace(name, store, &node.namespace, node.address()).unwrap()
}

fn control(node: &Node) -> String {
    node.plan.control().to_string()
}

async fn start(mut plan: Plan, dns: &[String]) -> Node {
    plan.merge(&json!({"network": {"dns": dns}}));
    plan.start().await.unwrap()
}

/// Waits until `node` sees so many members, whatever their number was.
async fn sees(node: &Node, members: u64, limit: Duration) {
    wait::until(&format!("{} sees {members}", node.plan.name), limit, async || {
        (node.status().await.ok()?["network"]["members"] == members).then_some(())
    })
    .await
    .unwrap();
}

pub(super) async fn partition() {
    let scratch = Scratch::new().unwrap();
    let network = Network::new(4, Addresses::V4).unwrap();
    let mut plans = plans(&scratch, 4, |number, name, store| place(&network, number, name, store));
    let image = Image::builder("library/app", "v1").layer(1 << 20).build().unwrap();
    let held = scratch.path().join("held");
    layout(&held, &[]);
    plans[3].merge(&json!({"store": {"source": format!("layout:{}", held.display())}}));
    let mut nodes: Vec<Node> = Vec::new();
    for plan in plans {
        let dns: Vec<String> = nodes.first().map(control).into_iter().collect();
        nodes.push(start(plan, &dns).await);
    }
    for node in &nodes {
        joined(node, 4).await;
    }
    let cut = [(0, 2), (0, 3), (1, 2), (1, 3)];
    let start = Instant::now();
    for (one, other) in cut {
        network.block(one, other, Block::Drop).unwrap();
    }
    // A change lets each half listen closely.
    layout(&held, &[&image]);
    for node in &nodes {
        sees(node, 2, HEALED).await;
        assert_eq!(node.fetch("/v2/").await.unwrap().status, 200, "it serves all the same");
    }
    println!("both halves know after {} ms", start.elapsed().as_millis());
    for (one, other) in cut {
        network.unblock(one, other, Block::Drop).unwrap();
    }
    let start = Instant::now();
    for node in &nodes {
        sees(node, 4, HEALED).await;
    }
    let path = format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]);
    wait::until("what came meanwhile is found", HEALED, async || {
        (nodes[0].request("HEAD", &path, &[]).await.ok()?.status == 200).then_some(())
    })
    .await
    .unwrap();
    println!("one again after {} s", start.elapsed().as_secs());
}

/// A third of ten at once, without a word to anybody.
pub(super) async fn deaths() {
    let scratch = Scratch::new().unwrap();
    let network = Network::new(10, Addresses::V4).unwrap();
    let mut nodes: Vec<Node> = Vec::new();
    for plan in plans(&scratch, 10, |number, name, store| place(&network, number, name, store)) {
        let dns: Vec<String> = nodes.first().map(control).into_iter().collect();
        nodes.push(start(plan, &dns).await);
    }
    for node in &nodes {
        joined(node, 10).await;
    }
    let start = Instant::now();
    for node in &mut nodes[..3] {
        node.kill();
    }
    for node in &nodes[3..] {
        sees(node, 7, DEATH).await;
    }
    println!("three of ten dead, known to all after {} ms", start.elapsed().as_millis());
    // All the others start again within a minute, and find each other by what they kept: the one that they were told of is gone.
    for node in &mut nodes[3..] {
        node.terminate(END).await.unwrap();
        node.relaunch().unwrap();
    }
    for node in &nodes[3..] {
        joined(node, 7).await;
    }
}

/// None of the sources is there; then one is.
pub(super) async fn late_source() {
    let scratch = Scratch::new().unwrap();
    let mut plans = plans(&scratch, 2, |_, name, store| Plan::on_loopback(name, store).unwrap());
    let (late, early) = (plans.pop().unwrap(), plans.pop().unwrap());
    let address = late.control().to_string();
    let dns = ["nowhere.invalid:5001".to_owned(), "127.0.0.2:1".to_owned(), address];
    let node = start(early, &dns).await;
    let status = |value: &Value| value["network"]["problems"].to_string();
    wait::until("it says what it tried", DEATH, async || {
        let problems = status(&node.status().await.ok()?);
        (problems.contains("nowhere.invalid") && problems.contains("127.0.0.2:1")).then_some(())
    })
    .await
    .unwrap();
    assert_eq!(node.fetch("/v2/").await.unwrap().status, 200, "alone is legal");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let started = Instant::now();
    let late = start(late, &[]).await;
    joined(&node, 2).await;
    joined(&late, 2).await;
    println!("found {} ms after its start", started.elapsed().as_millis());
}

/// The name of the service has 5,000 addresses, at all of which one node answers. Its resolver takes seconds to read so long a file, as
/// this program is built here.
pub(super) async fn many_addresses() {
    let scratch = Scratch::new().unwrap();
    let mut plans = plans(&scratch, 2, |_, name, store| Plan::on_loopback(name, store).unwrap());
    let (mut many, mut one) = (plans.pop().unwrap(), plans.pop().unwrap());
    let port = one.ports.network;
    one.merge(&json!({"network": {"listen": [format!("0.0.0.0:{port}")]}}));
    let one = start(one, &[]).await;
    let addresses = (1..=5000_u32).map(|n| IpAddr::from(Ipv4Addr::from_bits(0x7f00_0000 + n)));
    let names: Vec<(IpAddr, &str)> = addresses.map(|address| (address, "peers.test")).collect();
    many.set_hosts(&names).unwrap();
    let started = Instant::now();
    let many = start(many, &[format!("peers.test:{port}")]).await;
    joined(&many, 2).await;
    println!("joined after {} ms", started.elapsed().as_millis());
    // Time enough for the name to be asked some times more.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let usage = many.usage().unwrap();
    assert!(usage.descriptors < 100, "{usage:?}");
    assert!(one.usage().unwrap().descriptors < 100);
    assert_eq!(many.status().await.unwrap()["network"]["members"], 2);
}
