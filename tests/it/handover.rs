//! Who leads by the policies of whole nodes, on a real Kubernetes API server: another policy reaches one node after the other, and the
//! leader makes room once; a policy that fails moves nobody. What the lease says is written down all the while, and two that lead at
//! once, or a term that begins before the one before it is over, would be seen in it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peili::cluster::Kind;
use peili::election::lease::{Object, Settings, validity};
use peili::election::strict::{Change, Lock};
use peili_lab::kubernetes::Options;
use peili_lab::node::{Node, Plan};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, policy};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::Case;
use crate::cli::layout;
use crate::cluster::{elections, led};
use crate::coordination::{Cluster, lock};

/// Longest until something that is certain is seen, on a busy machine.
const SOON: Duration = Duration::from_secs(30);
/// Between two nodes that get another policy.
const ROLL: Duration = Duration::from_secs(1);
/// So long a better one has to be better, after members have carried the same for ten seconds (docs/elections.md).
const MOVED: Duration = Duration::from_secs(10 + 5);
/// So long a holder that says nothing more counts, and the second candidate waits.
const LOST: Duration = Duration::from_millis(6_000 + 300);
/// What a busy machine adds.
const SLACK: Duration = Duration::from_secs(5);
const CALL: Duration = Duration::from_secs(2);

pub(crate) fn cases() -> Vec<Case> {
    let needs = [Requirement::Kubernetes, Requirement::Policies];
    let long = Duration::from_secs(240);
    vec![
        Case::new("handover::a_leader_makes_room_for_another_policy_and_for_no_fault", &needs, made)
            .within(long)
            // A ranking that takes too long is one that failed, and others compile policies.
            .alone(),
    ]
}

/// Three nodes in two pools, and the record of their lease.
struct Rig {
    cluster: Cluster,
    nodes: Vec<Node>,
    seen: Arc<Mutex<Vec<(Instant, Object)>>>,
    // After the nodes that use it.
    scratch: Scratch,
}

impl Rig {
    async fn start() -> Self {
        let cluster = Cluster::start(Options::on_loopback()).await;
        cluster.allow_all().await;
        let scratch = Scratch::new().unwrap();
        std::fs::write(
            scratch.path().join("cluster.key"),
            "a key of the cluster for tests, 32 bytes at least",
        )
        .unwrap();
        layout(&scratch.path().join("layout"), &[]);
        let mut rig = Self { cluster, nodes: Vec::new(), seen: Arc::default(), scratch };
        for pool in ["blue", "green", "green"] {
            rig.join(pool).await;
        }
        rig
    }

    /// One more node, with the policies of the first ones.
    async fn join(&mut self, pool: &str) {
        let number = self.nodes.len();
        let store = format!("layout:{}", self.scratch.path().join("layout").display());
        let mut plan = Plan::on_loopback(&format!("node-{number}"), &store).unwrap();
        let first: Vec<_> = self.nodes.iter().take(1).map(|node| node.plan.control()).collect();
        let credentials = self.cluster.credentials(&format!("account-{number}")).await;
        plan.merge(&json!({
            "network": {"cluster-key": [self.scratch.path().join("cluster.key")], "dns": first},
            "election": {"labels": {"pool": pool}},
            "kubernetes": {"endpoints": [self.cluster.server.url()], "credentials": credentials},
            "policies": {"election": policies("blue")},
        }));
        self.nodes.push(plan.start().await.unwrap());
    }

    /// Writes down each change of the lease, with when it came, until it is dropped.
    async fn record(&self) -> AbortOnDropHandle<()> {
        let lock = lock(Kind::Lease, self.cluster.server.url(), &self.cluster.credentials("observer").await);
        let seen = Arc::clone(&self.seen);
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                let version = seen
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .last()
                    .map_or(0, |(_, last)| last.version);
                watch(&*lock, version, &seen).await;
                sleep(Duration::from_millis(50)).await;
            }
        }))
    }

    /// The holders in their order, after it was checked that none began before the one before it was over.
    fn terms(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let over = Duration::from_millis(validity(Settings::FAST.duration));
        let name = |object: &Object| object.record.holder.split('/').next().unwrap_or_default().to_owned();
        let mut terms: Vec<String> =
            seen.first().iter().map(|(_, first)| name(first)).filter(|name| !name.is_empty()).collect();
        for pair in seen.windows(2) {
            let ((before, old), (at, new)) = (&pair[0], &pair[1]);
            if new.record.holder.is_empty() || new.record.holder == old.record.holder {
                continue;
            }
            let apart = at.duration_since(*before);
            let is_free = old.record.is_released() || (old.record.holder.is_empty() && terms.is_empty());
            assert!(is_free || apart >= over, "{new:?} {apart:?} after {old:?}");
            terms.push(name(new));
        }
        terms
    }

    /// Waits until one of these nodes says that it leads.
    async fn led(&self, what: &str, is_meant: impl Fn(usize) -> bool) -> Duration {
        let meant = self.nodes.iter().enumerate().filter(|(number, _)| is_meant(*number));
        led(&meant.map(|(_, node)| node).collect::<Vec<_>>(), what, SOON).await
    }

    /// The node that says that it leads.
    async fn leader(&self) -> Option<usize> {
        for (number, node) in self.nodes.iter().enumerate() {
            if node.status().await.ok()?["election"]["lease"]["held"] == true {
                return Some(number);
            }
        }
        None
    }
}

async fn watch(lock: &dyn Lock, version: u64, seen: &Mutex<Vec<(Instant, Object)>>) {
    let version = match version {
        0 => match lock.get(CALL).await.answer {
            peili::election::lease::Answer::Object(object) => {
                let version = object.version;
                seen.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), object));
                version
            }
            _ => return,
        },
        version => version,
    };
    let (told, mut changes) = mpsc::channel(16);
    let write = async {
        while let Some(change) = changes.recv().await {
            match change {
                Change::Seen(object, _) => {
                    seen.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), object));
                }
                Change::Gone(_) => panic!("nobody deletes the lease"),
            }
        }
    };
    let _ = tokio::join!(lock.watch(version, told), write);
}

/// `prefer-labels` for a pool, and a policy that panics once there is a node-3.
fn policies(pool: &str) -> Value {
    let rules = json!([{"label": "pool", "value": pool, "weight": 1000}]);
    let settings = json!({"rules": rules, "otherwise": 0, "handover": "now", "min-tenure-seconds": 0});
    json!([
        {"name": "prefer-labels", "path": policy("prefer-labels"), "settings": settings},
        {"name": "testguests-election", "path": policy("testguests-election"), "settings": {"act": "panic", "on": "node-3"}},
    ])
}

fn coordinator(election: &Value) -> Option<&Value> {
    election["roles"].as_array()?.iter().find(|role| role["role"] == "coordinator")
}

async fn made() {
    let mut rig = Rig::start().await;
    let _recording = rig.record().await;
    rig.led("the one of the blue pool leads", |number| number == 0).await;

    let before = rig.terms();
    assert_eq!(before.last().map(String::as_str), Some("node-0"), "{before:?}");

    // Another policy, one node after the other: for a while they disagree, and that moves nobody.
    let processes: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    for node in &mut rig.nodes {
        sleep(ROLL).await;
        node.plan.merge(&json!({"policies": {"election": policies("green")}}));
        node.rewrite().unwrap();
    }
    let took = rig.led("one of the green pool leads", |number| number > 0).await;
    println!("handover: another leads {took:?} after the last node had the policy");
    assert!(took < MOVED + SLACK, "{took:?}");
    let same: Vec<u32> = rig.nodes.iter().map(|node| node.process().unwrap().id()).collect();
    assert_eq!(processes, same);
    let terms = rig.terms();
    println!("handover: the terms were those of {terms:?}");
    assert_eq!(terms.len(), before.len() + 1, "{terms:?}");

    // A policy panics on all nodes: the built-in ranks, which prefers nobody, and who leads goes on.
    rig.join("blue").await;
    elections(&rig.nodes, "the policy has failed", SOON, |election| {
        coordinator(election).is_some_and(|role| role["by"] == "built-in" && role["fallback"] == "failed")
    })
    .await;
    let renewals = rig.seen.lock().unwrap_or_else(PoisonError::into_inner).len();
    sleep(MOVED).await;
    assert_eq!(rig.terms(), terms);
    assert!(rig.seen.lock().unwrap_or_else(PoisonError::into_inner).len() > renewals + 5, "it renews");

    // Who failed is gone, and the policies rank again; whom they prefer leads already.
    rig.nodes[3].terminate(SOON).await.unwrap();
    rig.nodes.pop();
    elections(&rig.nodes, "the policies rank again", SOON, |election| {
        coordinator(election).is_some_and(|role| role["by"] == "policy")
    })
    .await;
    assert_eq!(rig.terms(), terms);

    // Who leads stands still (SIGSTOP), for longer than its lease: another leads, and it knows when it goes on.
    let leader = rig.leader().await.unwrap();
    rig.nodes[leader].process().unwrap().pause().unwrap();
    let took = rig.led("the other one leads", |number| number > 0 && number != leader).await;
    println!("handover: another leads {took:?} after the leader stood still");
    assert!(took < LOST + SLACK, "{took:?}");
    rig.nodes[leader].process().unwrap().resume().unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_ne!(rig.leader().await, Some(leader), "two lead");
    let after = rig.terms();
    assert_eq!(after.len(), terms.len() + 1, "{after:?}");
}
