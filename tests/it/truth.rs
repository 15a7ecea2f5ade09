//! What the network does to a node, and what the node says of it: each way in which the API server can be out of reach, by the kernel's own
//! rules and routes between namespaces.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use peili::cluster::{Api, Cause, Config, LeaseLock};
use peili::election::lease::{Settings, Standing};
use peili::election::strict::{BootClock, Clock, Idle, LeaseMetrics, Parts, Strict};
use peili_lab::kubernetes::{Options, Rule};
use peili_lab::netns::{Addresses, Block, Namespace, Network};
use peili_lab::{Requirement, wait};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::Case;
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
        Case::new("truth::each_way_to_be_cut_off_from_the_api_server_is_named", &needs, api)
            .within(long)
            .alone(),
    ]
}

/// What is done to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Blocked(Block),
    /// Its cable is pulled.
    Unplugged,
    /// The connections that it has stand still, and others pass.
    Cut,
}

/// Each with what is to be said of it.
const TROUBLES: [(Trouble, Cause); 14] = [
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
const SERVER: usize = TROUBLES.len();

/// A candidate of this process whose sockets are in a namespace.
struct Candidate {
    strict: Strict,
    _end: oneshot::Sender<()>,
}

impl Candidate {
    /// Alone for its lease.
    fn start(namespace: &Namespace, config: &Config, lease: &str) -> Self {
        let parts = Parts {
            lock: Arc::new(LeaseLock::new(Arc::new(Api::new(config)), lease)),
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
    async fn causes(&self, time: Duration) -> (Vec<(Cause, Duration)>, Option<Duration>) {
        let (start, mut causes, mut ended) = (Instant::now(), Vec::new(), None);
        while start.elapsed() < time {
            if let Some(fault) = self.strict.state().fault
                && causes.last().is_none_or(|(cause, _)| *cause != fault.cause)
            {
                causes.push((fault.cause, start.elapsed()));
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
        let named = causes.iter().position(|(named, _)| named == cause);
        let named = named.unwrap_or_else(|| panic!("{cause:?} was not named"));
        assert!(causes[named].1 < NAMED + SLACK, "late");
        // Before it an old connection may have been silent, or an ICMP answer not have been sent.
        let is_silence = |(cause, _): &(Cause, Duration)| matches!(cause, Cause::NoAnswer | Cause::Timeout);
        assert!(causes[..named].iter().all(is_silence) && causes.len() == named + 1, "another cause");
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
