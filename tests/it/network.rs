//! The network among real nodes: six of them in namespaces, each with a containerd, members by a cluster key.

mod faults;
mod names;
mod upgrade;

use std::path::Path;
use std::time::{Duration, Instant};

use peili_lab::node::Plan;
use peili_lab::{Generation, Image, Node, Requirement, wait};
use serde_json::json;

use crate::Case;
use crate::cluster::{Cluster, REGISTRY, Setup};

/// Longest time from the start of the process to a complete view, by any source (issue 4).
const JOIN: Duration = Duration::from_secs(5);
/// Time after joining in which a pull finds what others hold (issue 4).
const FIRST_LOOKUP: Duration = Duration::from_millis(300);
/// Longest time until what one node has pulled is used by another (issue 4).
const KNOWN: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Nothing changes for so long before idling is measured, and while it is: twice the pause between signs of life.
const SETTLE: Duration = Duration::from_secs(15);
const IDLE: Duration = Duration::from_secs(60);
/// Bytes per second of one idle node, both directions, headers included (issue 4).
const IDLE_BYTES: f64 = 200.0;

pub(crate) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2, Requirement::Containerd(Generation::V2)];
    let with_next = [&needs[..], &[Requirement::NextVersion]].concat();
    let filtered = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables];
    vec![
        Case::new("network::six_nodes_join_by_any_source", &needs, joining),
        Case::new("network::six_nodes_share_at_once", &needs, sharing).alone(),
        Case::new("network::six_nodes_idle", &needs, idling).alone(),
        Case::new("network::six_nodes_are_upgraded_and_rolled_back", &with_next, upgrade::upgrade)
            .within(4 * MINUTE)
            .timed(),
        Case::new("network::a_partition_heals", &filtered, faults::partition).within(4 * MINUTE),
        Case::new("network::a_third_dies_at_once", &filtered[..2], faults::deaths),
        Case::new("network::sources_that_come_late", &[], faults::late_source),
        Case::new("network::joined_by_whatever_says_where_others_are", &filtered, names::matrix)
            .within(4 * MINUTE)
            .timed(),
        Case::new("network::one_who_lives_is_found_among_5000_addresses", &filtered[..2], names::needle)
            .within(4 * MINUTE),
        Case::new("network::a_name_with_5000_addresses", &[Requirement::Root], faults::many_addresses),
    ]
}

/// Six members that know the first one's address, and the first one knows nobody.
async fn six() -> Cluster {
    fn by_first(plans: &mut [Plan]) {
        let key = plans[0].data_dir().join("cluster.key");
        std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
        let first = plans[0].control();
        for (number, plan) in plans.iter_mut().enumerate() {
            let dns = if number == 0 { Vec::new() } else { vec![&first] };
            plan.merge(&json!({"network": {"cluster-key": [key], "dns": dns}}));
        }
    }
    let setup = Setup { count: 6, plans: Some(by_first), ..Setup::new(Generation::V2) };
    let cluster = setup.start_apart().await;
    for member in &cluster.nodes {
        joined(&member.peili, 6).await;
    }
    cluster
}

/// Waits until it has a complete view of so many members, and a neighbour.
async fn joined(node: &Node, members: u64) {
    let what = format!("{} sees {members} members", node.plan.name);
    wait::until(&what, 4 * JOIN, async || {
        let status = node.status().await.ok()?;
        let network = &status["network"];
        let is_linked = network["peers"].as_array()?.iter().any(|peer| peer["neighbour"] == true);
        (network["members"] == members && network["complete"] == true && is_linked).then_some(())
    })
    .await
    .unwrap();
}

fn view(node: &Node) -> std::path::PathBuf {
    node.plan.data_dir().join("view")
}

/// From the start of the process.
async fn rejoin(node: &mut Node, what: &str) {
    let start = Instant::now();
    node.relaunch().unwrap();
    joined(node, 6).await;
    let took = start.elapsed();
    println!("joined {what}: {} ms", took.as_millis());
    assert!(took < JOIN, "{what}: {took:?}");
}

async fn joining() {
    let mut cluster = six().await;
    let first = &cluster.nodes[0].peili.plan;
    let address = first.control();
    let pinned = json!([{"id": first.peer_id, "addresses": [address]}]);
    let node = &mut cluster.nodes[5].peili;
    let none = json!({"network": {"dns": [], "peers": []}});
    let sources = [
        ("by an address", json!({"network": {"dns": [address]}})),
        ("by a name", json!({"network": {"dns": [format!("peers.test:{}", address.port())]}})),
        ("by a configured peer", json!({"network": {"peers": pinned}})),
        ("by what it kept", json!({})),
    ];
    for (what, source) in sources {
        node.terminate(JOIN).await.unwrap();
        assert!(view(node).is_file(), "its view is kept");
        if what != "by what it kept" {
            std::fs::remove_file(view(node)).unwrap();
        }
        node.plan.set_hosts(&[(address.ip(), "peers.test")]).unwrap();
        node.plan.merge(&none);
        node.plan.merge(&source);
        rejoin(node, what).await;
    }
    // What it kept is from before a long time: the addresses in it are worth trying.
    node.terminate(JOIN).await.unwrap();
    age(&view(node));
    rejoin(node, "by what it kept long ago").await;
    assert!(node.log().contains(r#""fresh":false"#), "the view was taken for a fresh one");
    // A node whose view was damaged, and that has no other source, is found by the others or waits; it serves all the same.
    node.kill();
    std::fs::write(view(node), b"peili-view 1\nand then nothing").unwrap();
    node.restart().await.unwrap();
    assert_eq!(node.fetch("/v2/").await.unwrap().status, 200);
    assert!(node.log().contains("the view of the last run is of no use"));
}

/// Makes a kept view an hour older; its digest with it.
fn age(path: &Path) {
    const HEADER: usize = b"peili-view 1\n".len();
    let mut bytes = std::fs::read(path).unwrap();
    let content = bytes.len() - 32;
    let time: [u8; 8] = bytes[HEADER..HEADER + 8].try_into().unwrap();
    let time = u64::from_le_bytes(time) - 3600;
    bytes[HEADER..HEADER + 8].copy_from_slice(&time.to_le_bytes());
    let digest = peili::oci::Digest::sha256(&bytes[..content]);
    bytes[content..].copy_from_slice(digest.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

async fn sharing() {
    let mut cluster = six().await;
    let image = Image::builder("library/app", "v1").layer(4 << 20).layers(3, 256 << 10).build().unwrap();
    cluster.origin.add(&image);
    cluster.nodes[1].pull(&image).await;
    let layer = |image: &Image, number: usize| {
        format!("/v2/{}/blobs/{}?ns={REGISTRY}", image.repository, image.layers[number])
    };

    // What one has pulled, others use a second later; its layers come before its pull is over.
    let mut slowest = Duration::ZERO;
    for member in cluster.nodes.iter().filter(|member| member.peili.plan.name != "node-2") {
        let start = Instant::now();
        let path = layer(&image, 0);
        wait::until("the layer is found", 5 * KNOWN, async || {
            (member.peili.request("HEAD", &path, &[]).await.ok()?.status == 200).then_some(())
        })
        .await
        .unwrap();
        slowest = slowest.max(start.elapsed());
    }
    println!("known to all {} ms after the pull", slowest.as_millis());
    assert!(slowest < KNOWN, "{slowest:?}");
    cluster.origin.reset();
    cluster.nodes[2].pull(&image).await;
    assert_eq!(cluster.origin.layer_bytes(&image), 0, "the second pull went to the origin");

    // A node that is new finds what others hold 300 ms after it is connected to one of them.
    let node = &mut cluster.nodes[5].peili;
    node.terminate(JOIN).await.unwrap();
    std::fs::remove_file(view(node)).unwrap();
    let start = Instant::now();
    node.relaunch().unwrap();
    wait::until("it has a neighbour", JOIN, async || {
        let status = node.status().await.ok()?;
        status["network"]["peers"].as_array()?.iter().any(|peer| peer["neighbour"] == true).then_some(())
    })
    .await
    .unwrap();
    println!("joined after {} ms", start.elapsed().as_millis());
    tokio::time::sleep(FIRST_LOOKUP).await;
    cluster.nodes[5].pull(&image).await;
    assert_eq!(cluster.origin.layer_bytes(&image), 0, "the newcomer's pull went to the origin");
    assert!(cluster.nodes[5].peer_bytes().await >= image.layer_bytes());
}

async fn idling() {
    let cluster = six().await;
    tokio::time::sleep(SETTLE).await;
    let bytes = |number: usize| {
        let traffic = cluster.network.nodes[number].traffic().unwrap();
        traffic.received + traffic.sent
    };
    let usage = |number: usize| cluster.nodes[number].peili.usage().unwrap();
    let before: Vec<_> = (0..6).map(|number| (bytes(number), usage(number).cpu)).collect();
    tokio::time::sleep(IDLE).await;
    for (number, (bytes_before, cpu_before)) in before.into_iter().enumerate() {
        let rate = (bytes(number) - bytes_before) as f64 / IDLE.as_secs_f64();
        let now = usage(number);
        let cpu = (now.cpu - cpu_before).as_secs_f64() * 60.0 / IDLE.as_secs_f64();
        println!("node {number}: {rate:.0} bytes/s, {cpu:.2} CPU s a minute, {} MiB", now.resident >> 20);
        assert!(rate <= IDLE_BYTES, "{rate} bytes/s");
    }
}
