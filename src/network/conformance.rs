//! One suite for all networks, and the gate and tags that it controls them with.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Advertisement, Network, ResolveError, TagQuestion, TagSource, Tagged};
use crate::oci::{Action, Descriptor, Digest, Gate, Level, Name, PeerId, Reference};

/// How long a change may take to arrive everywhere; far above the second that is promised, for slow machines.
const DEADLINE: Duration = Duration::from_secs(20);

/// Nodes that know each other and trust each other for tags.
#[async_trait]
pub(crate) trait Cluster: Sized {
    async fn start(count: usize) -> Self;
    fn network(&self, node: usize) -> Arc<dyn Network>;
    fn id(&self, node: usize) -> PeerId;
    fn controls(&self, node: usize) -> &Controls;
    /// The gate of `node` answers differently from now on.
    fn recheck(&self, node: usize);
    /// Ends a node as a crash does.
    async fn kill(&mut self, node: usize);
}

/// What a node under test asks.
#[derive(Default)]
pub(crate) struct Controls {
    pub(crate) gate: Arc<TestGate>,
    pub(crate) tags: Arc<TestTags>,
}

/// Trusts everybody for tags, except as told.
#[derive(Default)]
pub(crate) struct TestGate {
    pub(crate) others: RwLock<Option<Level>>,
    pub(crate) levels: RwLock<HashMap<PeerId, Level>>,
}

/// How old what a node knows of a tag is.
const AGE: Duration = Duration::from_secs(40);

/// What names mean.
#[derive(Default)]
pub(crate) struct TestTags {
    names: RwLock<BTreeMap<Reference, Descriptor>>,
    /// Who asked.
    pub(crate) asked: Mutex<Vec<PeerId>>,
}

impl TestGate {
    pub(crate) fn set(&self, peer: &PeerId, level: Level) {
        self.levels.write().unwrap().insert(peer.clone(), level);
    }
}

impl Gate for TestGate {
    fn level(&self, peer: &PeerId, _: Action) -> Level {
        let others = self.others.read().unwrap().unwrap_or(Level::Tags);
        self.levels.read().unwrap().get(peer).copied().unwrap_or(others)
    }

    fn serves(&self, _: &PeerId, _: &Name) -> bool {
        true
    }
}

impl TestTags {
    pub(crate) fn set(&self, name: &Reference, descriptor: Descriptor) {
        self.names.write().unwrap().insert(name.clone(), descriptor);
    }
}

#[async_trait]
impl TagSource for TestTags {
    fn tag(&self, peer: &PeerId, name: &Reference) -> Option<Tagged> {
        self.asked.lock().unwrap().push(peer.clone());
        let target = self.names.read().unwrap().get(name).cloned()?;
        Some(Tagged { target, age: Some(AGE) })
    }

    async fn home_tag(&self, peer: &PeerId, name: &Reference, fresh: Duration) -> Option<Tagged> {
        // The registry takes its time.
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.tag(peer, name).map(|tagged| Tagged { age: Some(fresh / 2), ..tagged })
    }
}

/// Waits until `condition` holds.
pub(crate) async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "not so in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Who holds `digest`, as `network` sees it, in order.
pub(crate) fn holders(network: &Arc<dyn Network>, digest: &Digest) -> Vec<PeerId> {
    let mut ids: Vec<PeerId> = network.holders(digest).iter().map(|peer| peer.id.clone()).collect();
    ids.sort();
    ids
}

fn digest(text: &str) -> Digest {
    Digest::sha256(text.as_bytes())
}

/// The whole suite.
pub(crate) async fn check_all<C: Cluster>() {
    check(inventories_follow_changes::<C>).await;
    check(a_dead_node_holds_nothing::<C>).await;
    check(an_untrusted_peer_is_not_believed::<C>).await;
    check(trust_may_change::<C>).await;
    check(tags_need_the_level_tags::<C>).await;
    check(a_dead_peer_does_not_delay_a_tag::<C>).await;
    check(status_shows_all::<C>).await;
}

async fn check<C: Cluster, F: Future<Output = ()>>(case: impl Fn(C) -> F) {
    let cluster = C::start(3).await;
    for node in 0..3 {
        let network = cluster.network(node);
        wait_for("all are connected", || network.tag_peers().len() == 2).await;
    }
    case(cluster).await;
}

async fn inventories_follow_changes<C: Cluster>(cluster: C) {
    let (one, two, three) = (cluster.network(0), cluster.network(1), cluster.network(2));
    let (a, b, c) = (digest("a"), digest("b"), digest("c"));
    one.advertise(Advertisement::All(vec![a, b]));
    two.advertise(Advertisement::Added(b));
    let mut both = vec![cluster.id(0), cluster.id(1)];
    both.sort();
    wait_for("b is at two nodes", || holders(&three, &b) == both).await;
    wait_for("a is at one", || holders(&three, &a) == [cluster.id(0)]).await;
    wait_for("a node never names itself", || holders(&one, &b) == [cluster.id(1)]).await;
    assert!(holders(&three, &c).is_empty());

    one.advertise(Advertisement::Removed(b));
    wait_for("b is at one node", || holders(&three, &b) == [cluster.id(1)]).await;
    one.advertise(Advertisement::All(vec![c]));
    wait_for("the whole is replaced", || {
        holders(&three, &a).is_empty() && holders(&three, &c) == [cluster.id(0)]
    })
    .await;
    let peer = three.holders(&c).pop().unwrap();
    assert!(!peer.transfer.is_empty() && !peer.version.is_empty(), "{peer:?}");
}

async fn a_dead_node_holds_nothing<C: Cluster>(mut cluster: C) {
    let a = digest("a");
    let watcher = cluster.network(1);
    cluster.network(0).advertise(Advertisement::Added(a));
    wait_for("it is known", || holders(&watcher, &a).len() == 1).await;
    cluster.kill(0).await;
    wait_for("it is forgotten", || holders(&watcher, &a).is_empty()).await;
    assert_eq!(watcher.tag_peers().len(), 1);
}

async fn an_untrusted_peer_is_not_believed<C: Cluster>(cluster: C) {
    let (one, two, three) = (cluster.network(0), cluster.network(1), cluster.network(2));
    // Node 0 reads the records of node 1 and no more.
    cluster.controls(0).gate.set(&cluster.id(1), Level::Introduce);
    cluster.recheck(0);
    let (a, b) = (digest("a"), digest("b"));
    one.advertise(Advertisement::Added(a));
    two.advertise(Advertisement::Added(b));
    wait_for("the third hears both", || holders(&three, &a).len() + holders(&three, &b).len() == 2).await;
    three.advertise(Advertisement::Added(a));
    wait_for("news reaches node 1", || holders(&two, &a).contains(&cluster.id(2))).await;
    wait_for("news reaches node 0", || holders(&one, &a).contains(&cluster.id(2))).await;
    assert!(holders(&one, &b).is_empty(), "believed");
    // Now not even that.
    cluster.controls(0).gate.set(&cluster.id(1), Level::None);
    cluster.recheck(0);
    let lost = |network: &Arc<dyn Network>, id: &PeerId| {
        !network.status().peers.iter().any(|peer| peer.id == id.as_str() && peer.connected)
    };
    wait_for("the connection is closed", || lost(&one, &cluster.id(1)) && lost(&two, &cluster.id(0))).await;
}

async fn trust_may_change<C: Cluster>(cluster: C) {
    let (one, two) = (cluster.network(0), cluster.network(1));
    let b = digest("b");
    two.advertise(Advertisement::Added(b));
    wait_for("it is believed", || holders(&one, &b).len() == 1).await;
    for level in [Level::Introduce, Level::None] {
        cluster.controls(0).gate.set(&cluster.id(1), level);
        assert!(holders(&one, &b).is_empty(), "at once");
        cluster.recheck(0);
        wait_for("only one may be asked", || one.tag_peers().len() == 1).await;
        cluster.controls(0).gate.set(&cluster.id(1), Level::Tags);
        cluster.recheck(0);
        wait_for("it is believed again", || holders(&one, &b).len() == 1).await;
    }
}

async fn tags_need_the_level_tags<C: Cluster>(cluster: C) {
    let name: Reference = "ghcr.io/a/b:v1".parse().unwrap();
    let other: Reference = "ghcr.io/a/b:v2".parse().unwrap();
    let descriptor = Descriptor::new(digest("m"), 7, "application/vnd.oci.image.index.v1+json");
    cluster.controls(1).tags.set(&name, descriptor.clone());
    let (one, id) = (cluster.network(0), cluster.id(1));
    let ask_for = |name: &Reference, home| {
        let (one, id, question) = (Arc::clone(&one), id.clone(), TagQuestion { name: name.clone(), home });
        async move { one.resolve(&id, &question, DEADLINE).await }
    };
    let ask = |name: &Reference| ask_for(name, None);
    assert_eq!(ask(&name).await.unwrap(), Some(Tagged { target: descriptor.clone(), age: Some(AGE) }));
    assert_eq!(ask(&other).await.unwrap(), None);
    assert_eq!(*cluster.controls(1).tags.asked.lock().unwrap(), [cluster.id(0), cluster.id(0)]);
    // As the home of a tag it takes its time, and the answer is by the registry's word.
    let fresh = Duration::from_secs(60);
    let answer = ask_for(&name, Some(fresh)).await.unwrap();
    assert_eq!(answer, Some(Tagged { target: descriptor, age: Some(fresh / 2) }));
    cluster.controls(1).tags.asked.lock().unwrap().truncate(2);
    // The other side says no, and its source is not asked.
    cluster.controls(1).gate.set(&cluster.id(0), Level::Blobs);
    cluster.recheck(1);
    assert!(matches!(ask(&name).await, Err(ResolveError::Denied)));
    assert_eq!(cluster.controls(1).tags.asked.lock().unwrap().len(), 2);
    // This side says no.
    cluster.controls(1).gate.set(&cluster.id(0), Level::Tags);
    cluster.controls(0).gate.set(&id, Level::Blobs);
    cluster.recheck(0);
    assert!(matches!(ask(&name).await, Err(ResolveError::Denied)));
    assert_eq!(one.tag_peers().len(), 1);
    assert_eq!(cluster.controls(1).tags.asked.lock().unwrap().len(), 2);
}

async fn a_dead_peer_does_not_delay_a_tag<C: Cluster>(mut cluster: C) {
    let name: Reference = "ghcr.io/a/b:v1".parse().unwrap();
    let (one, id) = (cluster.network(0), cluster.id(1));
    cluster.kill(1).await;
    let limit = Duration::from_millis(300);
    let start = Instant::now();
    let answer = one.resolve(&id, &TagQuestion { name, home: None }, limit).await;
    assert!(matches!(answer, Err(ResolveError::Unreachable(_) | ResolveError::Timeout)), "{answer:?}");
    assert!(start.elapsed() < limit + Duration::from_millis(500), "{:?}", start.elapsed());
}

async fn status_shows_all<C: Cluster>(mut cluster: C) {
    let one = cluster.network(0);
    let id = cluster.id(2).to_string();
    one.advertise(Advertisement::All(vec![digest("a"), digest("b")]));
    cluster.network(2).advertise(Advertisement::Added(digest("c")));
    let third = |status: &super::Status| status.peers.iter().find(|peer| peer.id == id).cloned().unwrap();
    wait_for("it holds one", || third(&one.status()).holds == 1).await;
    let status = one.status();
    let peer = third(&status);
    assert_eq!((status.id, status.advertised, status.peers.len()), (cluster.id(0).to_string(), 2, 2));
    assert_eq!((peer.connected, peer.level, peer.problem.as_str()), (true, Level::Tags, ""));
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    cluster.kill(2).await;
    wait_for("it is gone", || !third(&one.status()).connected).await;
    let status = one.status();
    assert!(!third(&status).problem.is_empty());
    assert!(status.problems.iter().any(|problem| problem.contains(&id)), "{:?}", status.problems);
}
