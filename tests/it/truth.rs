//! What the network does to a node, and what the node says of it: each way in which the API server can be out of reach, by the kernel's own
//! rules and routes between namespaces.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use peili::cluster::{Api, Cause, Config, Fault, Kind, ObjectLock};
use peili::election::lease::{Settings, Standing};
use peili::election::strict::{BootClock, Clock, Idle, LeaseMetrics, Parts, Strict};
use peili_lab::kubernetes::{Options, Rule};
use peili_lab::netns::{Addresses, Block, Namespace, Network};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Node, Requirement, wait};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::Case;
use crate::cli::layout;
use crate::cluster::REGISTRY;
use crate::coordination::Cluster;

/// The duration of the lease, and longest until a leader stands again whose lease nobody took: a third of it, and a second.
const D: Duration = Duration::from_secs(6);
const BACK: Duration = Duration::from_secs(3);
/// What may be acted on without an answer: 4.66 s.
const VALID: Duration = Duration::from_millis(4_700);
/// Longest until the cause is named: a renewal after 1.5 s, a second without an answer over the old connection, a pause of 2 s, and 0.6 s
/// for a new one.
const NAMED: Duration = Duration::from_millis(5_200);
/// For how long each is watched: an ICMP answer that was not sent would show.
const WATCHED: Duration = Duration::from_secs(9);
/// What a busy machine adds.
const SLACK: Duration = Duration::from_millis(1_000);
const SOON: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables, Requirement::Kubernetes];
    let long = Duration::from_secs(180);
    vec![
        // Alone: on a busy machine a server that is slow is not always slow in the same way.
        Case::new("truth::each_way_to_be_cut_off_from_the_api_server_is_named", &needs, api)
            .within(long)
            .alone(),
        Case::new("truth::each_way_to_be_cut_off_from_peers_is_seen_by_both_sides", &needs[..3], peers)
            .within(long)
            .timed(),
    ]
}

/// What is done to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    Blocked(Block),
    /// Its cable is pulled.
    Unplugged,
    /// The connections that it has stand still, and others pass.
    Cut,
}

/// Each with what is to be said of it.
pub(crate) const TROUBLES: [(Trouble, Cause); 14] = [
    (Trouble::Blocked(Block::Drop), Cause::Timeout),
    (Trouble::Blocked(Block::Reject), Cause::Refused),
    (Trouble::Blocked(Block::Icmp("icmp-port-unreachable")), Cause::Refused),
    (Trouble::Blocked(Block::Icmp("icmp-host-unreachable")), Cause::Unroutable),
    (Trouble::Blocked(Block::Icmp("icmp-net-unreachable")), Cause::Unroutable),
    (Trouble::Blocked(Block::Icmp("icmp-proto-unreachable")), Cause::Unroutable),
    (Trouble::Blocked(Block::Icmp("icmp-admin-prohibited")), Cause::Unroutable),
    (Trouble::Blocked(Block::Icmp("icmp-host-prohibited")), Cause::Unroutable),
    (Trouble::Blocked(Block::Icmp("icmp-net-prohibited")), Cause::Unroutable),
    (Trouble::Blocked(Block::Route("prohibit")), Cause::Unroutable),
    (Trouble::Blocked(Block::Route("blackhole")), Cause::Unroutable),
    (Trouble::Blocked(Block::Route("unreachable")), Cause::Unroutable),
    (Trouble::Unplugged, Cause::Unroutable),
    (Trouble::Cut, Cause::NoAnswer),
];
/// The node of the network that has the API server.
pub(crate) const SERVER: usize = TROUBLES.len();

/// A candidate of this process whose sockets are in a namespace.
struct Candidate {
    strict: Strict,
    _end: oneshot::Sender<()>,
}

impl Candidate {
    /// Alone for its lease.
    fn start(namespace: &Namespace, config: &Config, lease: &str) -> Self {
        let parts = Parts {
            lock: Arc::new(ObjectLock::new(Kind::Lease, Arc::new(Api::new(config)), lease)),
            clock: Arc::new(BootClock),
            duty: Arc::new(Idle),
            metrics: LeaseMetrics::default(),
            seed: 7,
        };
        let (strict, driver) = Strict::new(lease, &Settings::FAST, parts);
        strict.stand(Standing::Candidate(0));
        let (end, ended) = oneshot::channel::<()>();
        let namespace = namespace.clone();
        // A thread of its own, since a namespace is a thread's.
        std::thread::spawn(move || {
            namespace.enter().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = driver.run() => {}
                    _ = ended => {}
                }
            });
        });
        Self { strict, _end: end }
    }

    fn leads(&self) -> bool {
        let leadership = self.strict.state().leadership;
        leadership.is_some_and(|leadership| leadership.check(BootClock.now()).is_some())
    }

    /// Waits until it leads; how long that took.
    async fn leading(&self, limit: Duration) -> Duration {
        let start = Instant::now();
        if let Err(error) = wait::until("it leads", limit, async || self.leads().then_some(())).await {
            panic!("{error}: {:#?}", self.strict.state());
        }
        start.elapsed()
    }

    /// The causes that it names for so long, each with the time of its beginning, and when it stopped to lead.
    async fn causes(&self, time: Duration) -> (Vec<(Fault, Duration)>, Option<Duration>) {
        let (start, mut causes, mut ended) = (Instant::now(), Vec::<(Fault, Duration)>::new(), None);
        while start.elapsed() < time {
            if let Some(fault) = self.strict.state().fault
                && causes.last().is_none_or(|(last, _)| last.cause != fault.cause)
            {
                causes.push((fault, start.elapsed()));
            }
            if ended.is_none() && !self.leads() {
                ended = Some(start.elapsed());
            }
            sleep(Duration::from_millis(10)).await;
        }
        (causes, ended)
    }
}

/// All at once, each node with a lease to itself.
async fn api() {
    let network = Network::new(TROUBLES.len() + 1, Addresses::V4).unwrap();
    let server = network.nodes[SERVER].clone();
    let cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
    let any = Rule {
        verbs: &["get", "update", "watch", "create"],
        resources: &["leases.coordination.k8s.io"],
        names: &[],
    };
    cluster.server.role("peili", "elects", &[any]).await.unwrap();
    cluster.server.role_binding("peili", "elects", "peili").await.unwrap();
    let config = Config {
        endpoints: vec![cluster.server.url()],
        credentials: cluster.credentials("account").await,
        ..Config::default()
    };
    let candidates: Vec<Candidate> = network.nodes[..SERVER]
        .iter()
        .enumerate()
        .map(|(number, node)| Candidate::start(&node.namespace, &config, &format!("peili-{number}")))
        .collect();
    join_all(candidates.iter().map(|candidate| candidate.leading(D + SOON))).await;

    let change = |blocks: bool| {
        for (node, (trouble, _)) in TROUBLES.iter().enumerate() {
            match trouble {
                Trouble::Blocked(block) if blocks => {
                    if *block == Block::Drop {
                        // The old connections stand still for good: whoever used them again would be silent after the end, too.
                        assert!(network.cut(node, SERVER).unwrap() > 0);
                    }
                    network.block(node, SERVER, *block).unwrap();
                }
                Trouble::Blocked(block) => network.unblock(node, SERVER, *block).unwrap(),
                Trouble::Unplugged => network.set_link(node, !blocks).unwrap(),
                Trouble::Cut if blocks => assert!(network.cut(node, SERVER).unwrap() > 0),
                // They stand still for good.
                Trouble::Cut => {}
            }
        }
    };
    change(true);
    let seen = join_all(candidates.iter().map(|candidate| candidate.causes(WATCHED))).await;
    change(false);
    let back = join_all(candidates.iter().map(|candidate| candidate.leading(SOON))).await;
    for ((trouble, _), (seen, back)) in TROUBLES.iter().zip(seen.iter().zip(&back)) {
        println!(
            "{trouble:?}: {:?}; its term ended after {:?}, began again {back:?} after the end",
            seen.0, seen.1
        );
    }
    for (number, ((trouble, cause), candidate)) in TROUBLES.iter().zip(&candidates).enumerate() {
        let (causes, ended) = &seen[number];
        let position = |cause: Cause| causes.iter().position(|(fault, _)| fault.cause == cause);
        // An old connection may have been silent before, or an ICMP answer not have been sent.
        let is_silence = |fault: &Fault| matches!(fault.cause, Cause::NoAnswer | Cause::Timeout);
        let all_are = |is: &dyn Fn(&Fault) -> bool| causes.iter().all(|(fault, _)| is(fault));
        match (trouble, position(*cause)) {
            // Renewed over a new connection, before or after the old one was tried.
            (Trouble::Cut, _) => assert!(all_are(&|fault| fault.cause == *cause), "{causes:?}"),
            // Without a neighbour's answer a connection fails after three seconds, if it is waited for.
            (Trouble::Unplugged, _) => {
                assert!(all_are(&|fault| is_silence(fault) || fault.cause == *cause), "{causes:?}");
            }
            (Trouble::Blocked(_), None) => panic!("{cause:?} was not named: {causes:?}"),
            (Trouble::Blocked(_), Some(named)) => {
                assert!(causes[named].1 < NAMED + SLACK, "late: {causes:?}");
                assert!(causes[..named].iter().all(|(fault, _)| is_silence(fault)), "{causes:?}");
                assert_eq!(causes.len(), named + 1, "another cause: {causes:?}");
            }
        }
        if *trouble == Trouble::Cut {
            assert_eq!(*ended, None, "a new connection is made in time");
        } else {
            assert!(ended.is_some_and(|ended| ended < VALID + SLACK), "{ended:?}");
        }
        assert!(back[number] < BACK + SLACK, "late");
        let state = candidate.strict.state();
        assert!(state.fault.is_none(), "{state:#?}");
    }
}

/// Nodes that nothing is done to, and what is done to the others.
const WELL: usize = 3;
const VICTIMS: [Trouble; 5] = [
    Trouble::Blocked(Block::Drop),
    Trouble::Blocked(Block::Reject),
    Trouble::Blocked(Block::Icmp("icmp-admin-prohibited")),
    Trouble::Unplugged,
    Trouble::Cut,
];
const NODES: usize = WELL + VICTIMS.len();
/// From when a neighbour is silent to when all know (issue 4), and until those who were apart have found each other.
const DEATH: Duration = Duration::from_secs(6);
const HEALED: Duration = Duration::from_secs(75);
/// A pull's longest detour by a holder that is silent.
const DETOUR: Duration = Duration::from_secs(2);

/// Waits until `is_so` of the status of all these; how long that took.
async fn until(nodes: &[&Node], what: &str, limit: Duration, is_so: impl Fn(&Value) -> bool) -> Duration {
    let (start, mut last) = (Instant::now(), vec![Value::Null; nodes.len()]);
    let found = wait::until(what, limit, async || {
        for (node, last) in nodes.iter().zip(&mut last) {
            *last = node.status().await.ok()?;
        }
        last.iter().all(&is_so).then_some(())
    });
    if let Err(error) = found.await {
        panic!("{error}: {:#?}", last.iter().map(|status| &status["network"]).collect::<Vec<_>>());
    }
    start.elapsed()
}

async fn manifest(node: &Node, image: &Image) -> (u16, Duration) {
    let start = Instant::now();
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    (node.fetch(&path).await.unwrap().status, start.elapsed())
}

/// One image that a node has that is well, and all victims have; and one that only victims have.
async fn peers() {
    let network = Network::new(NODES, Addresses::V4).unwrap();
    let scratch = Scratch::new().unwrap();
    let image = |name: &str, seed| Image::builder(name, "1").layer(4_096).seed(seed).build().unwrap();
    let (shared, theirs) = (image("library/shared", 1), image("library/theirs", 2));
    let key = scratch.path().join("cluster.key");
    std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
    let all: Vec<String> = network.nodes.iter().map(|node| format!("{}:5001", node.address())).collect();
    let mut nodes = Vec::new();
    for (number, place) in network.nodes.iter().enumerate() {
        let folder = scratch.path().join(format!("layout-{number}"));
        match number {
            1 => layout(&folder, &[&shared]),
            WELL.. => layout(&folder, &[&shared, &theirs]),
            _ => layout(&folder, &[]),
        }
        let store = format!("layout:{}", folder.display());
        let mut plan =
            Plan::in_namespace(&format!("node-{number}"), &store, &place.namespace, place.address()).unwrap();
        plan.merge(&json!({"network": {"cluster-key": [key], "dns": all}}));
        nodes.push(plan.start().await.unwrap());
    }
    let everybody: Vec<&Node> = nodes.iter().collect();
    let is_all =
        |status: &Value| status["network"]["members"] == NODES && status["network"]["complete"] == true;
    until(&everybody, "all know each other", SOON, is_all).await;
    wait::until("what others hold", SOON, async || {
        for victim in &nodes[WELL..] {
            if nodes[0].known(victim).await.ok()?.is_none_or(|held| held == 0) {
                return None;
            }
        }
        Some(())
    })
    .await
    .unwrap();

    let change = |blocks: bool| {
        for (trouble, one) in VICTIMS.iter().zip(WELL..) {
            for other in (0..NODES).filter(|other| *other != one) {
                match trouble {
                    Trouble::Blocked(block) if blocks => network.block(one, other, *block).unwrap(),
                    Trouble::Blocked(block) => network.unblock(one, other, *block).unwrap(),
                    Trouble::Cut if blocks => {
                        network.cut(one, other).unwrap();
                        network.cut(other, one).unwrap();
                    }
                    Trouble::Cut | Trouble::Unplugged => {}
                }
            }
            if *trouble == Trouble::Unplugged {
                network.set_link(one, !blocks).unwrap();
            }
        }
    };
    change(true);
    let (status, took) = manifest(&nodes[0], &shared).await;
    println!("one who is well has it: {status} after {took:?}");
    assert!(status == 200 && took < DETOUR, "{status} {took:?}");
    let (status, took) = manifest(&nodes[0], &theirs).await;
    println!(
        "only those who are cut off have it, or one whose old connections stand still: {status} after {took:?}"
    );
    assert!(matches!(status, 200 | 404) && took < DETOUR, "{status} {took:?}");
    // Those who are well, and the one that makes new connections.
    let rest = WELL + 1;
    let (others, cut) = (&everybody[..WELL], everybody[NODES - 1]);
    let apart = &everybody[WELL..NODES - 1];
    let sees = |members: usize| move |status: &Value| status["network"]["members"] == members;
    let took = until(others, "those who are well know", DEATH + 2 * SLACK, sees(rest)).await;
    println!("those who are well know after {took:?}");
    let took = until(&[cut], "it is here again", HEALED, sees(rest)).await;
    println!("whose connections stood still is here after {took:?} more");
    let took = until(apart, "they say that they are alone", HEALED, |status| {
        let election = &status["election"];
        election["mode"] == "alone" && election["cause"] == "unreached"
    })
    .await;
    println!("those who are cut off say so after {took:?} more");
    for node in apart {
        assert_eq!(node.admin("/readyz").await.unwrap().status, 200);
        assert_eq!(manifest(node, &shared).await.0, 200, "what it has it serves");
    }
    for (node, words) in
        apart.iter().zip(["timeout", "connection refused", "no route to host", "no route to host"])
    {
        let mut problems = String::new();
        let said = wait::until("it is said why", SOON, async || {
            problems = node.status().await.ok()?["network"]["problems"].to_string();
            (problems.contains("10.77.0.") && problems.contains(words)).then_some(())
        });
        if let Err(error) = said.await {
            panic!("{}: {error}: {words}: {problems}", node.plan.name);
        }
    }
    // The one that is here again has it, and is asked.
    assert_eq!(manifest(&nodes[2], &theirs).await.0, 200);
    change(false);
    let took = until(&everybody, "all are here again", HEALED, is_all).await;
    println!("all know each other {took:?} after the end");
}
