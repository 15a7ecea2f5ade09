//! What says where others are: a name server that answers, is silent, refuses, or knows no such name; the configuration; a view that was
//! kept; or nothing. The API server is out of reach all the while.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use peili_lab::netns::{Addresses, Block};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Certificates, Dns, Network, Node, wait};
use serde_json::{Value, json};

use super::faults::{place, plans};

/// From the start of a process, or from when there is something that says where others are (issue 6).
const JOINED: Duration = Duration::from_secs(5);
const READY: Duration = Duration::from_secs(1);
/// What a busy machine adds: sixteen nodes run on two cores.
const SLACK: Duration = Duration::from_millis(1_500);
const SOON: Duration = Duration::from_secs(20);
/// So long nothing says where others are: pauses have grown to their longest.
const ALONE: Duration = Duration::from_secs(12);

/// How the name server does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Names {
    Answer,
    Silent,
    /// It knows no such name.
    Unknown,
    /// Nothing listens there yet.
    Refused,
}

/// What else there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Kept,
    Configured,
    None,
}

/// Places in the network.
const FIRST: usize = 0;
const DNS: usize = 1;
const API: usize = 2;
const CELLS: usize = 3;
const UNTOLD: usize = CELLS + 12;
/// One that is called, and its caller.
const CALLED: usize = UNTOLD + 1;
const CALLER: usize = UNTOLD + 2;
const ALL: usize = UNTOLD + 3;

/// Waits until it is a neighbour of somebody and is known to the first one as alive.
async fn joined(node: &Node, first: &Node, began: Instant, what: &str) -> Duration {
    let found = wait::until(what, SOON, async || {
        let (status, of_first) = (node.status().await.ok()?, first.status().await.ok()?);
        let peers = |status: &Value| status["network"]["peers"].as_array().cloned().unwrap_or_default();
        let is_linked = peers(&status).iter().any(|peer| peer["neighbour"] == true);
        let is_alive = |peer: &Value| peer["id"] == *node.plan.peer_id && peer["state"] == "alive";
        (is_linked && peers(&of_first).iter().any(is_alive)).then_some(())
    });
    if let Err(error) = found.await {
        panic!("{error}: {:#}", node.status().await.unwrap_or_default());
    }
    let took = began.elapsed();
    println!("{what}: joined after {took:?}");
    assert!(took < JOINED + SLACK, "{what}: {took:?}");
    took
}

async fn start(plan: Plan, what: &str) -> (Node, Instant) {
    let began = Instant::now();
    let node = plan.start().await.unwrap();
    is_ready(began, what);
    (node, began)
}

fn is_ready(began: Instant, what: &str) {
    let took = began.elapsed();
    assert!(took < READY + SLACK, "{what}: ready after {took:?}");
}

/// Waits until it says that it is alone, and why.
async fn alone(node: &Node, cause: &str, words: &str) {
    let mut last = Value::Null;
    let found = wait::until("it says that it is alone", SOON, async || {
        last = node.status().await.ok()?;
        let election = &last["election"];
        let is_said = election["mode"] == "alone" && election["cause"] == cause;
        (is_said && last["problems"].to_string().contains(words)).then_some(())
    });
    if let Err(error) = found.await {
        panic!("{}: {error}: {words:?}: {last:#}", node.plan.name);
    }
    assert_eq!(node.admin("/readyz").await.unwrap().status, 200, "alone is legal");
}

pub(super) async fn matrix() {
    let scratch = Scratch::new().unwrap();
    let network = Network::new(ALL, Addresses::V4).unwrap();
    let dns = Dns::start(&network.nodes[DNS].namespace, network.nodes[DNS].address()).unwrap();
    let credentials = scratch.path().join("account");
    Certificates::of_server(network.nodes[API].address()).unwrap().copy_to(&credentials).unwrap();
    std::fs::write(credentials.join("token"), "of nobody").unwrap();
    std::fs::write(credentials.join("namespace"), "peili").unwrap();
    let api = format!("{}:6443", network.nodes[API].address());
    let mut all: Vec<Option<Plan>> = plans(&scratch, ALL, |number, name, store| {
        let mut plan = place(&network, number, name, store);
        plan.set_resolver(dns.address()).unwrap();
        plan.merge(&json!({"kubernetes": {"service": api, "credentials": credentials}}));
        plan
    })
    .into_iter()
    .map(Some)
    .collect();
    (0..ALL).filter(|node| *node != API).for_each(|node| network.block(node, API, Block::Drop).unwrap());
    let mut take = |number: usize| all[number].take().unwrap();

    let (first, _) = start(take(FIRST), "the first").await;
    let address = first.plan.control();
    let pinned = json!([{"id": first.plan.peer_id, "addresses": [address]}]);
    dns.set("peers.test", Some(vec![address.ip()]));
    let (mut nodes, mut late) = (Vec::new(), Vec::new());
    let states = [Names::Answer, Names::Silent, Names::Unknown, Names::Refused];
    let cells = states
        .into_iter()
        .flat_map(|names| [Source::Kept, Source::Configured, Source::None].map(|source| (names, source)));
    for (number, (names, source)) in cells.enumerate() {
        let (place, what) = (CELLS + number, format!("{names:?}, {source:?}"));
        let mut plan = take(place);
        let name = if names == Names::Unknown { "absent.test:5001" } else { "peers.test:5001" };
        let peers = if source == Source::None { json!([]) } else { pinned.clone() };
        plan.merge(&json!({"network": {"dns": [name], "peers": peers}}));
        let mut node = plan.launch().unwrap();
        if source == Source::Kept {
            joined(&node, &first, Instant::now(), &format!("{what}, in the life before")).await;
            // Of a view that is not complete nothing is kept.
            let is_complete =
                async || (node.status().await.ok()?["network"]["complete"] == true).then_some(());
            wait::until("a complete view", SOON, is_complete).await.unwrap();
            node.terminate(SOON).await.unwrap();
            node.plan.merge(&json!({"network": {"peers": []}}));
        } else {
            node.kill();
        }
        match names {
            Names::Silent => network.block(place, DNS, Block::Drop).unwrap(),
            Names::Refused => network.block(place, DNS, Block::Icmp("icmp-port-unreachable")).unwrap(),
            Names::Answer | Names::Unknown => {}
        }
        let began = Instant::now();
        node.restart().await.unwrap();
        is_ready(began, &what);
        if names == Names::Answer || source != Source::None {
            joined(&node, &first, began, &what).await;
            nodes.push(node);
        } else {
            late.push((place, names, node));
        }
    }
    let (untold, _) = start(take(UNTOLD), "untold").await;
    let (called, _) = start(take(CALLED), "called").await;
    for (_, names, node) in &late {
        let words = match names {
            Names::Silent => "dns peers.test:5001: no name server answers",
            Names::Unknown => "dns absent.test:5001: no such host",
            _ => "dns peers.test:5001: ",
        };
        alone(node, "unreached", words).await;
    }
    alone(&untold, "no-bootstrap-source", "").await;
    alone(&called, "no-bootstrap-source", "").await;
    tokio::time::sleep(ALONE).await;

    // One after the other there is something that says where others are.
    for (place, names, node) in &late {
        let began = Instant::now();
        match names {
            Names::Silent => network.unblock(*place, DNS, Block::Drop).unwrap(),
            Names::Refused => network.unblock(*place, DNS, Block::Icmp("icmp-port-unreachable")).unwrap(),
            _ => dns.set("absent.test", Some(vec![address.ip()])),
        }
        joined(node, &first, began, &format!("{names:?}, and then not")).await;
    }
    let mut untold = untold;
    untold.plan.merge(&json!({"network": {"peers": pinned}}));
    let began = Instant::now();
    untold.rewrite().unwrap();
    joined(&untold, &first, began, "told by its configuration").await;
    let mut caller = take(CALLER);
    caller.merge(&json!({"network": {"dns": [called.plan.control(), address]}}));
    let began = Instant::now();
    let (_caller, _) = start(caller, "caller").await;
    joined(&called, &first, began, "called").await;
    let status = called.status().await.unwrap();
    assert_eq!(status["election"]["mode"], "gossip-degraded", "{status:#}");
}

/// The name of the service has 5,000 addresses: one is a member's, one a stranger's, hundreds are silent, a thousand have no route, and at
/// all others nobody listens.
pub(super) async fn needle() {
    const SILENT: u32 = 500;
    let scratch = Scratch::new().unwrap();
    let network = Network::new(5, Addresses::V4).unwrap();
    let [here, alive, stranger, nobody, server] = &network.nodes[..] else { unreachable!() };
    let dns = Dns::start(&server.namespace, server.address()).unwrap();
    here.namespace.route("10.78.0.0/16", nobody.address()).unwrap();
    here.namespace.route("10.79.0.0/16", nobody.address()).unwrap();
    nobody.namespace.own("10.79.0.0/16").unwrap();
    let v4 = |high: u32, n: u32| IpAddr::from(Ipv4Addr::from_bits((high << 16) + n + 1));
    let silent = (0..SILENT).map(|n| v4(0x0a4e, n));
    let refusing = (0..3_998 - SILENT).map(|n| v4(0x0a4f, n));
    let unroutable = (0..1_000_u16).map(|n| IpAddr::from(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, n)));
    let all: Vec<IpAddr> =
        silent.chain(refusing).chain(unroutable).chain([alive.address(), stranger.address()]).collect();
    assert_eq!(all.len(), 5_000);
    dns.set("peers.test", Some(all));

    let mut planned =
        plans(&scratch, 3, |number, name, store| place(&network, number, name, store)).into_iter();
    let (mut here, alive, mut stranger) =
        (planned.next().unwrap(), planned.next().unwrap(), planned.next().unwrap());
    let other = scratch.path().join("other-key");
    std::fs::write(&other, "a key of another cluster, 32 bytes at least").unwrap();
    stranger.merge(&json!({"network": {"cluster-key": [other]}}));
    let (alive, stranger) = (alive.start().await.unwrap(), stranger.start().await.unwrap());
    here.set_resolver(dns.address()).unwrap();
    here.merge(&json!({"network": {"dns": ["peers.test:5001"]}, "log": {"level": "info"}}));
    let began = Instant::now();
    let here = here.start().await.unwrap();
    let before = here.usage().unwrap();
    let (mut dials, mut most, mut peak) =
        (here.metric("peili_network_dial_failures_total", "").await.unwrap(), 0.0_f64, 0);
    let mut at = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let status = here.status().await.unwrap();
        let now = here.metric("peili_network_dial_failures_total", "").await.unwrap();
        most = most.max((now - dials) / at.elapsed().as_secs_f64());
        (dials, at) = (now, Instant::now());
        peak = peak.max(here.usage().unwrap().descriptors);
        let problems = status["network"]["problems"].as_array().unwrap().len();
        assert!(problems <= 24, "{problems} problems: {status:#}");
        if status["network"]["members"] == 2 && here.known(&alive).await.unwrap().is_some() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(150), "{status:#}");
    }
    let usage = here.usage().unwrap();
    println!(
        "found after {:?}: {dials} dials failed, at most {most:.0} in a second, {peak} descriptors, {} MiB more, {} questions",
        began.elapsed(),
        usage.peak_resident.saturating_sub(before.resident) >> 20,
        dns.questions(),
    );
    // Fifty a second, ten with each answer, and a second's are seen in the next.
    assert!(most <= 100.0, "{most}");
    assert!(peak <= before.descriptors + 64, "{peak}");
    assert!(usage.peak_resident.saturating_sub(before.resident) < 64 << 20, "{before:?} {usage:?}");
    assert_eq!(stranger.status().await.unwrap()["network"]["members"], 1);
    // With somebody there it looks no further but seldom.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let before = here.metric("peili_network_dial_failures_total", "").await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = here.metric("peili_network_dial_failures_total", "").await.unwrap();
    assert!(after - before <= 25.0, "{before} {after}");
}
