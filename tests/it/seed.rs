//! The story that Peili answers, with whole nodes and a real API server: what a mirror does whose election cannot reach it.
//!
//! In that story (Spegel 0.0.17) 0 of 172 probes were answered, pods were restarted 6 times in 10 minutes, no request was mirrored
//! although a neighbour held the content, and after the block two of three pods went on crashing because the lock named a dead leader.

use std::process::Command;
use std::time::{Duration, Instant};

use peili::cluster::Kind;
use peili_lab::kubernetes::Options;
use peili_lab::netns::{Addresses, Block, Network, NetworkNode};
use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Dns, Image, Node, Requirement, wait};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::Case;
use crate::cli::layout;
use crate::cluster::{REGISTRY, elections, led};
use crate::coordination::Cluster;
use crate::doctor::Doctor;
use crate::election;

/// Of the whole outage. The story's was ten minutes; `PEILI_OUTAGE` (seconds) makes it as long.
const OUTAGE: Duration = Duration::from_secs(60);
/// With the other lock, which changes nothing of what lasts.
const SHORT: Duration = Duration::from_secs(10);
/// A mirror is ready at once, whatever else is not (issue 6). Beside it two cores start two others and an API server.
const READY: Duration = Duration::from_secs(1);
/// All know each other.
const JOINED: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(40);
/// The duration of the lease.
const D: Duration = Duration::from_secs(6);
/// What a busy machine adds to any of these: less than the difference between a third of the duration and all of it.
const SLACK: Duration = Duration::from_millis(2_500);
/// The nodes of the network that have the API server and the name server.
const SERVER: usize = 3;
const NAMES: usize = 4;

pub(crate) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables, Requirement::Kubernetes];
    let long = Duration::from_secs(240) + outage();
    vec![
        Case::new("seed::blocked_from_before_the_start", &needs, || blocked(Kind::Lease, outage()))
            .within(long)
            .timed(),
        Case::new("seed::blocked_from_before_the_start_with_the_lock_of_old", &needs, || {
            blocked(Kind::ConfigMap, outage().min(SHORT))
        })
        .within(long)
        .timed(),
        Case::new("seed::one_node_is_cut_off_and_others_know", &needs, cut_off).within(long),
        Case::new("seed::the_lock_names_a_dead_leader", &needs, dead_leader).within(long),
        Case::new("seed::rights_and_objects_come_late", &needs, late).within(long),
        Case::new("seed::a_node_finds_others_by_what_the_coordinator_wrote", &needs, book).within(long),
        Case::new("seed::everything_comes_late_in_any_order", &needs, everything_late).within(long),
    ]
}

fn outage() -> Duration {
    let seconds = std::env::var("PEILI_OUTAGE").ok().and_then(|seconds| seconds.parse().ok());
    seconds.map_or(OUTAGE, Duration::from_secs)
}

/// Three nodes, each with an image of its own, and an API server; nodes find each other by a static address.
pub(crate) struct Rig {
    pub(crate) cluster: Cluster,
    pub(crate) nodes: Vec<Node>,
    pub(crate) images: Vec<Image>,
    network: Network,
    scratch: Scratch,
}

impl Rig {
    /// None of the nodes runs yet.
    pub(crate) async fn new() -> (Self, Vec<Plan>) {
        let network = Network::new(5, Addresses::V4).unwrap();
        let scratch = Scratch::new().unwrap();
        let server = network.nodes[SERVER].clone();
        let cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
        let credentials = cluster.credentials("account").await;
        let key = scratch.path().join("cluster.key");
        std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
        // As a headless Service has them: whoever is gone, the others are named.
        let named: Vec<String> =
            network.nodes.iter().take(SERVER).map(|node| format!("{}:5001", node.address())).collect();
        let (mut plans, mut images) = (Vec::new(), Vec::new());
        for (number, place) in network.nodes.iter().take(3).enumerate() {
            let image = Image::builder(&format!("library/app-{number}"), "1")
                .layer(4_096)
                .seed(number as u64)
                .build()
                .unwrap();
            let folder = scratch.path().join(format!("layout-{number}"));
            layout(&folder, &[&image]);
            let store = format!("layout:{}", folder.display());
            let mut plan =
                Plan::in_namespace(&format!("node-{number}"), &store, &place.namespace, place.address())
                    .unwrap();
            plan.merge(&json!({
                "network": {"cluster-key": [key], "dns": named},
                "kubernetes": {"service": format!("{}:6443", server.address()), "credentials": credentials},
            }));
            plans.push(plan);
            images.push(image);
        }
        (Self { cluster, nodes: Vec::new(), images, network, scratch }, plans)
    }

    fn block(&self, block: Block) {
        (0..SERVER).for_each(|node| self.network.block(node, SERVER, block).unwrap());
    }

    fn unblock(&self, block: Block) {
        (0..SERVER).for_each(|node| self.network.unblock(node, SERVER, block).unwrap());
    }

    /// Waits until all nodes say so of their elections; how long that took.
    pub(crate) async fn until(
        &self,
        what: &str,
        limit: Duration,
        is_so: impl Fn(&Value) -> bool,
    ) -> Duration {
        elections(&self.nodes, what, limit, is_so).await
    }

    /// Waits until each node has heard what each other one holds.
    pub(crate) async fn heard(&self) {
        wait::until("what others hold", SOON, async || {
            for node in &self.nodes {
                for other in self.nodes.iter().filter(|other| other.plan.name != node.plan.name) {
                    if node.known(other).await.ok()?? == 0 {
                        return None;
                    }
                }
            }
            Some(())
        })
        .await
        .unwrap();
    }

    /// Each node mirrors what each other one holds.
    pub(crate) async fn mirrors(&self) {
        for (reader, node) in self.nodes.iter().enumerate() {
            for (owner, image) in self.images.iter().enumerate().filter(|(owner, _)| *owner != reader) {
                let path = format!("/v2/{}/manifests/{}?ns={}", image.repository, image.root, REGISTRY);
                let answer = node.fetch(&path).await.unwrap();
                assert_eq!(answer.status, 200, "node {reader} of node {owner}: {}", answer.text());
            }
        }
    }

    /// Each node has found what it can know of the block; and once the control plane is seen to live, doctor knows more.
    async fn is_diagnosed(&self) {
        for node in &self.nodes {
            let status = node.status().await.unwrap();
            let diagnosis = &status["diagnosis"];
            assert_eq!(diagnosis["verdicts"].as_array().unwrap().len(), 1, "{diagnosis:#}");
            assert_eq!(diagnosis["verdicts"][0]["code"], "api-unreachable", "{diagnosis:#}");
            assert!(status["problems"].to_string().contains("doctor: api-unreachable"), "{status:#}");
            let gauge = node.metric("peili_doctor_verdicts", "api-unreachable").await.unwrap();
            assert!((gauge - 1.0).abs() < f64::EPSILON, "{gauge}");
            let told = node.log().matches("diagnosis: packets to the API server are not answered").count();
            assert_eq!(told, 1, "one line for each change");
        }
        let doctor = Doctor::of(&self.nodes[0].plan);
        let found = doctor.finds("blocked, and nobody knows more", &["api-unreachable"]).await;
        assert_eq!(found.verdict("api-unreachable")["confidence"], "medium");
        // As kubelet renews it.
        self.cluster.credentials("account").await;
        let found = doctor.finds("blocked, and the control plane lives", &["api-blocked"]).await;
        let verdict = found.verdict("api-blocked");
        assert!(verdict["evidence"].to_string().contains("another token"), "{verdict}");
    }

    /// The node that coordinates, by the word of all.
    pub(crate) async fn coordinator(&self, limit: Duration) -> (String, Duration) {
        let took = self
            .until("a coordinator that all know", limit, |election| {
                election["mode"] == "lease" && !holders(election).is_empty()
            })
            .await;
        let status = self.nodes[0].status().await.unwrap();
        let holder = holders(&status["election"]);
        assert_eq!(self.explained_coordinator(), [holder.as_str()], "and nobody else, by `explain`");
        (holder, took)
    }

    /// Who holds the role, and who of those that stand for it is said to, by `peili election explain`.
    fn explained_coordinator(&self) -> Vec<String> {
        let explained = election::asked(&self.nodes[0], &["explain", "coordinator"]).unwrap();
        let names = |of: &str| -> Vec<String> {
            let all = explained[of].as_array().into_iter().flatten();
            let all = all.filter(|one| of == "owners" || one["holds"] == true);
            all.map(|one| one["node"].as_str().unwrap_or_default().to_owned()).collect()
        };
        assert_eq!(names("owners"), names("candidates"), "{explained}");
        names("owners")
    }

    /// One of them leads, by its own word.
    async fn leads(&self, limit: Duration) -> Duration {
        led(&self.nodes.iter().collect::<Vec<_>>(), "a leader", limit).await
    }
}

pub(crate) fn holders(election: &Value) -> String {
    let roles = election["roles"].as_array().cloned().unwrap_or_default();
    let coordinator = roles.into_iter().find(|role| role["role"] == "coordinator");
    let holders = coordinator.map(|role| role["holders"].clone()).unwrap_or_default();
    holders[0]["node"].as_str().unwrap_or_default().to_owned()
}

async fn start(plan: Plan) -> (Node, Duration) {
    let began = Instant::now();
    let node = plan.start().await.unwrap();
    (node, began.elapsed())
}

/// 6443 is dropped from before the start. Nodes are ready, join, mirror, answer every probe and say why, for as long as it lasts; one
/// that starts anew under the block does too; and when it is lifted there is a leader, without a restart.
async fn blocked(lock: Kind, outage: Duration) {
    let block = Block::Drop;
    let (mut rig, plans) = Rig::new().await;
    let (resource, backend) = match lock {
        Kind::Lease => ("leases.coordination.k8s.io", "auto"),
        Kind::ConfigMap => ("configmaps", "configmap"),
    };
    rig.cluster.allow_on(&[resource], &["get", "update", "watch"], true).await;
    rig.block(block);
    for mut plan in plans {
        plan.merge(&json!({"election": {"backend": backend}}));
        let (node, took) = start(plan).await;
        println!("{} ready after {took:?}", node.plan.name);
        assert!(took < READY + SLACK, "{took:?}");
        rig.nodes.push(node);
    }
    let joined = rig.until("three members", JOINED + SLACK, |election| election["members"] == 3).await;
    println!("joined after {joined:?}");
    rig.heard().await;
    rig.until("it is said why", SOON, |election| {
        election["mode"] == "gossip-degraded" && election["cause"] == "api-timeout"
    })
    .await;
    let status = rig.nodes[0].status().await.unwrap();
    let remedy = status["election"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("toEntities") && remedy.contains("egress"), "{remedy}");
    let problems = status["problems"].to_string();
    assert!(problems.contains("api-timeout"), "{problems}");

    let (mut probes, mut pulls) = (0, 0);
    let processes: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    let end = Instant::now() + outage;
    while Instant::now() < end {
        for node in &rig.nodes {
            for path in ["/livez", "/readyz"] {
                let answer = node.admin(path).await.unwrap();
                assert_eq!(answer.status, 200, "{} {path}: {}", node.plan.name, answer.text());
                probes += 1;
            }
        }
        rig.mirrors().await;
        pulls += 6;
        sleep(Duration::from_secs(1)).await;
    }
    println!("{probes} probes answered, {pulls} manifests mirrored, in {outage:?} without an API server");
    let same: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    assert_eq!(processes, same);

    if lock == Kind::Lease {
        rig.is_diagnosed().await;
    }

    // One starts anew, as its node would start it again, while the others stay up.
    rig.nodes[2].kill();
    let began = Instant::now();
    rig.nodes[2].restart().await.unwrap();
    let took = began.elapsed();
    println!("ready again after {took:?}");
    assert!(took < READY + SLACK, "{took:?}");
    rig.until("three members", JOINED + SLACK, |election| election["members"] == 3).await;
    rig.heard().await;
    rig.mirrors().await;

    rig.unblock(block);
    let took = rig.leads(SOON).await;
    println!("a leader {took:?} after the block was lifted (there was no lease)");
    assert!(took < D + Duration::from_secs(2) + SLACK, "{took:?}");
    let (one, took) = rig.coordinator(2 * SOON).await;
    println!("{one} coordinates, and all rely on it after {took:?} more");

    // Blocked again: whoever leads pauses, and after it leads on in a third of the duration.
    rig.block(block);
    rig.until("nobody leads", SOON, |election| election["lease"]["held"] == false).await;
    rig.until("it is said why", SOON, |election| election["mode"] == "gossip-degraded").await;
    rig.mirrors().await;
    rig.unblock(block);
    let took = rig.leads(SOON).await;
    println!("a leader {took:?} after the second block was lifted (its last holder still runs)");
    assert!(took < D / 3 + Duration::from_secs(1) + SLACK, "{took:?}");
    let same: Vec<u32> = rig.nodes.iter().take(2).map(|node| node.process().unwrap().id()).collect();
    assert_eq!(processes[..2], same);
    wait::until("nothing is wrong any more", 2 * SOON, async || {
        for node in &rig.nodes {
            let status = node.status().await.ok()?;
            let diagnosis = &status["diagnosis"];
            if !diagnosis["verdicts"].as_array()?.is_empty() || !diagnosis["unreached_seconds"].is_null() {
                return None;
            }
        }
        Some(())
    })
    .await
    .unwrap();
}

/// One node of three is cut off from the API server. Its doctor says no more than it can know, until what the others say is of after the loss.
async fn cut_off() {
    let (mut rig, plans) = Rig::new().await;
    rig.cluster.allow_all().await;
    for plan in plans {
        rig.nodes.push(start(plan).await.0);
    }
    rig.coordinator(2 * SOON).await;
    rig.network.block(0, SERVER, Block::Drop).unwrap();
    let diagnosis = async || rig.nodes[0].status().await.unwrap()["diagnosis"].clone();
    let lost_for = |diagnosis: &Value| diagnosis["unreached_seconds"].as_u64().unwrap_or(0);
    wait::until("it knows", SOON, async || (lost_for(&diagnosis().await) > 0).then_some(())).await.unwrap();
    let doctor = Doctor::of(&rig.nodes[0].plan);
    let found = doctor.finds("cut off a moment ago", &["api-unreachable"]).await;
    assert!(!found.verdict("api-unreachable")["evidence"].to_string().contains("other members"), "{found:?}");
    // Twice as long as an observer may not have looked.
    wait::until("all have looked", 2 * SOON, async || (lost_for(&diagnosis().await) > 61).then_some(()))
        .await
        .unwrap();
    let found = doctor.finds("cut off, and the others are not", &["api-blocked"]).await;
    let evidence = found.verdict("api-blocked")["evidence"].to_string();
    assert!(evidence.contains("2 of 2 other members reach the API server"), "{evidence}");
}

/// The lease is held by a process that is gone, and the server was out of reach when the others started.
async fn dead_leader() {
    let (mut rig, plans) = Rig::new().await;
    rig.cluster.allow(&["get", "update", "watch"], true).await;
    for plan in plans {
        rig.nodes.push(start(plan).await.0);
    }
    let (leader, _) = rig.coordinator(SOON).await;
    let place = rig.nodes.iter().position(|node| node.plan.name == leader).unwrap();
    rig.block(Block::Reject);
    // It dies while it cannot give the lease away, and does not come back.
    rig.nodes[place].kill();
    rig.nodes.remove(place);
    rig.images.remove(place);
    let record = rig.cluster.lease().await.unwrap();
    assert!(record["spec"]["holderIdentity"].as_str().unwrap().starts_with(&leader), "{record}");
    for node in &mut rig.nodes {
        node.restart().await.unwrap();
    }
    rig.until("it is said why", SOON, |election| election["cause"] == "api-refused").await;
    rig.heard().await;
    rig.mirrors().await;
    rig.unblock(Block::Reject);
    let took = rig.leads(SOON).await;
    println!("a leader {took:?} after the block was lifted (the lock named a dead one)");
    assert!(took < D + Duration::from_secs(2) + SLACK, "{took:?}");
    // Given away by hand, it goes to the other, and the log has one line for it.
    rig.coordinator(SOON).await;
    let place = {
        let mut place = None;
        for (number, node) in rig.nodes.iter().enumerate() {
            if node.status().await.unwrap()["election"]["lease"]["held"] == true {
                place = Some(number);
            }
        }
        place.unwrap()
    };
    let run = |node: usize| {
        let mut command = Command::new(binary().unwrap());
        command.args(["election", "yield", "coordinator", "--data-dir"]).arg(rig.nodes[node].plan.data_dir());
        command.output().unwrap()
    };
    let refused = run(1 - place);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("does not hold coordinator"), "{refused:?}");
    let given = run(place);
    assert!(given.status.success(), "{given:?}");
    wait::until("the other leads", SOON, async || {
        (rig.nodes[1 - place].status().await.ok()?["election"]["lease"]["held"] == true).then_some(())
    })
    .await
    .unwrap();
}

/// First there are no rights, then no object, then all is there; and when a node ends it has given the lease away.
async fn late() {
    let (mut rig, plans) = Rig::new().await;
    for plan in plans {
        rig.nodes.push(start(plan).await.0);
    }
    rig.until("the missing right", SOON, |election| election["cause"] == "forbidden").await;
    let status = rig.nodes[1].status().await.unwrap();
    let remedy = status["election"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("get, update and watch"), "{remedy}");
    rig.cluster.allow(&["get", "update", "watch"], false).await;
    rig.until("the missing object", SOON, |election| election["cause"] == "no-lease").await;
    rig.heard().await;
    rig.mirrors().await;
    let empty =
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "peili"}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/peili/leases";
    assert_eq!(rig.cluster.server.admin("POST", leases, Some(&empty)).await.unwrap().0, 201);
    let (leader, took) = rig.coordinator(2 * SOON).await;
    println!("{leader} coordinates, {took:?} after the object was made");
    let place = rig.nodes.iter().position(|node| node.plan.name == leader).unwrap();
    let metrics = rig.nodes[place].metrics().await.unwrap();
    assert!(metrics.contains("leader_election_master_status{name=\"peili\"} 1"), "{metrics}");

    rig.nodes[place].terminate(Duration::from_secs(20)).await.unwrap();
    let lease = rig.cluster.lease().await.unwrap();
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
    assert!(!holder.starts_with(&format!("{leader}/")), "{lease}");
    rig.nodes.remove(place);
    let took = rig.leads(SOON).await;
    println!("another leads {took:?} after the leader was ended");
}

/// The coordinator writes its summary and its Events; and a node that nothing tells where others are finds them by its book.
async fn book() {
    let (mut rig, plans) = Rig::new().await;
    rig.cluster.allow_all().await;
    let mut plans = plans.into_iter();
    let mut lost = plans.next_back().unwrap();
    for plan in plans {
        rig.nodes.push(start(plan).await.0);
    }
    let (leader, _) = rig.coordinator(SOON).await;
    let fleet = "/api/v1/namespaces/peili/configmaps/peili-fleet";
    let summary = wait::until("the fleet summary", SOON, async || {
        let (status, map) = rig.cluster.server.admin("GET", fleet, None).await.ok()?;
        let summary: Value = serde_json::from_str(map["data"]["summary.json"].as_str()?).ok()?;
        (status == 200 && summary["members"] == 2).then_some(summary)
    })
    .await
    .unwrap();
    assert_eq!(summary["leader"], leader.as_str(), "{summary}");
    let lease = rig.cluster.lease().await.unwrap();
    assert_eq!(summary["token"]["uid"], lease["metadata"]["uid"]);
    let events = "/apis/events.k8s.io/v1/namespaces/peili/events";
    let reasons = wait::until("an Event", SOON, async || {
        let (_, events) = rig.cluster.server.admin("GET", events, None).await.ok()?;
        let items = events["items"].as_array()?.clone();
        (!items.is_empty()).then_some(items)
    })
    .await
    .unwrap();
    assert!(reasons.iter().all(|event| event["reason"] == "LeaderChanged"), "{reasons:#?}");
    assert_eq!(lease["metadata"]["annotations"]["peili.dev/members"], "2");

    lost.merge(&json!({"network": {"dns": []}}));
    let began = Instant::now();
    rig.nodes.push(start(lost).await.0);
    let seen = rig.nodes[2].status().await.unwrap();
    assert!(seen["election"]["mode"] != "lease", "{seen}");
    rig.until("three members", SOON, |election| election["members"] == 3).await;
    let took = began.elapsed();
    println!("by the book it joined {took:?} after its start");
    // It looks for 5 s whether somebody is there, and then reads the lease.
    assert!(took < 2 * JOINED + SLACK, "{took:?}");
    rig.heard().await;
    rig.mirrors().await;
}

/// What a node may lack when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    /// Its cable.
    Link,
    /// The addresses of the others.
    Names,
    /// Its content.
    Store,
    /// The way to the API server.
    Server,
    /// The object that elections are about, which nobody may make.
    Lock,
}

/// Nothing is there when the nodes start, and one thing after the other comes, in an order of its own each time (`PEILI_SEED` repeats
/// one). No node ends, probes are answered all the while, and in the end all is well.
async fn everything_late() {
    let seed = std::env::var("PEILI_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    let mut order = [Late::Link, Late::Names, Late::Store, Late::Server, Late::Lock];
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    println!("PEILI_SEED={seed}: {order:?}");
    let (mut rig, plans) = Rig::new().await;
    rig.cluster.allow(&["get", "update", "watch"], false).await;
    let names = &rig.network.nodes[NAMES];
    let dns = Dns::start(&names.namespace, names.address()).unwrap();
    let addresses: Vec<_> = rig.network.nodes.iter().take(SERVER).map(NetworkNode::address).collect();
    rig.block(Block::Drop);
    for (number, mut plan) in plans.into_iter().enumerate() {
        rig.network.set_link(number, false).unwrap();
        let folder = rig.scratch.path().join(format!("layout-{number}"));
        std::fs::rename(&folder, folder.with_extension("later")).unwrap();
        plan.set_resolver(dns.address()).unwrap();
        plan.merge(&json!({"network": {"dns": ["peers.test:5001"]}}));
        rig.nodes.push(plan.launch().unwrap());
    }
    let processes: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    for node in &rig.nodes {
        let is_alive = async || (node.admin("/livez").await.ok()?.status == 200).then_some(());
        wait::until("it lives", READY + SLACK, is_alive).await.unwrap();
    }
    let mut probes = 0;
    for (step, late) in order.into_iter().enumerate() {
        let end = Instant::now() + Duration::from_secs(4);
        while Instant::now() < end {
            for node in &rig.nodes {
                assert_eq!(
                    node.admin("/livez").await.unwrap().status,
                    200,
                    "{} before {late:?}",
                    node.plan.name
                );
                let has_content = order[..step].contains(&Late::Store);
                let ready = node.admin("/readyz").await.unwrap();
                let right = if has_content { [200, 200] } else { [200, 503] };
                // What has just come is read within a second or two.
                let is_new = order.get(step.wrapping_sub(1)) == Some(&Late::Store);
                assert!(
                    is_new || right.contains(&ready.status),
                    "{} before {late:?}: {}",
                    node.plan.name,
                    ready.text()
                );
                probes += 2;
            }
            sleep(Duration::from_millis(250)).await;
        }
        for number in 0..SERVER {
            let folder = rig.scratch.path().join(format!("layout-{number}"));
            match late {
                Late::Link => rig.network.set_link(number, true).unwrap(),
                Late::Store => std::fs::rename(folder.with_extension("later"), &folder).unwrap(),
                Late::Names | Late::Server | Late::Lock => {}
            }
        }
        match late {
            Late::Names => dns.set("peers.test", Some(addresses.clone())),
            Late::Server => rig.unblock(Block::Drop),
            Late::Lock => {
                let lease = json!({
                    "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "peili"},
                });
                let leases = "/apis/coordination.k8s.io/v1/namespaces/peili/leases";
                assert_eq!(rig.cluster.server.admin("POST", leases, Some(&lease)).await.unwrap().0, 201);
            }
            Late::Link | Late::Store => {}
        }
    }
    let joined = rig.until("three members", JOINED + SLACK, |election| election["members"] == 3).await;
    let (leader, took) = rig.coordinator(2 * SOON).await;
    println!(
        "joined {joined:?} after the last came; {leader} coordinates, and all rely on it {took:?} later; {probes} probes"
    );
    rig.heard().await;
    rig.mirrors().await;
    let same: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    assert_eq!(processes, same);
}
