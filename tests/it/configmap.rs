//! The lock of electors of old, on a real API server: that it is a lock as the Lease is one, that Peili alternates with an elector of
//! client-go over it, and whole nodes on the way from the one to the other. Whole nodes without an API server are in `seed`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use peili::cluster::{Cause, Kind};
use peili::election::lease::{Settings, Standing};
use peili::election::strict::{Beside, BootClock, Idle, LeaseMetrics, Lock, Parts, Strict};
use peili_lab::candidate::{Candidate, leader};
use peili_lab::kubernetes::{Client, Options};
use peili_lab::{Requirement, wait};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::Case;
use crate::coordination::{Cluster, D, Place, SOON, USER, suite};
use crate::seed::{Rig, holders};

const FOLDER: &str = "/api/v1/namespaces/peili/configmaps";
const MAP: &str = "/api/v1/namespaces/peili/configmaps/peili";
const LEASE_PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/peili/leases/peili";
const MAPS: &str = "configmaps";
const LEASES: &str = "leases.coordination.k8s.io";
const VERBS: [&str; 3] = ["get", "update", "watch"];
/// client-go's `LeaderElectionRecordAnnotationKey`.
const RECORD: &str = "control-plane.alpha.kubernetes.io/leader";
/// Spegel 0.0.17's times: of the lease, until a leader gives up, and between two tries.
const LEASE: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(2);
/// client-go waits 1 to 2.2 times as long where it does not lead.
const RETRY_MOST: Duration = Duration::from_millis(4_400);
/// For a holder of which nobody knows when it stops (docs/elections.md).
const FOREIGN: Duration = Duration::from_secs(10);
/// For what a busy machine adds.
const SLACK: Duration = Duration::from_millis(2_500);

pub(crate) fn cases() -> Vec<Case> {
    let server = [Requirement::Kubernetes];
    let nodes = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables, Requirement::Kubernetes];
    let long = Duration::from_secs(240);
    vec![
        Case::new("configmap::the_lock_is_one_as_the_lease_is", &server, alike),
        Case::new("configmap::one_leads_and_soon_another", &server, one_leads).within(long).timed(),
        Case::new("configmap::what_is_missing_is_named", &server, named),
        Case::new("configmap::peili_and_an_elector_of_old_alternate", &server, || alternate(false))
            .within(long)
            .timed(),
        Case::new("configmap::peili_and_an_elector_of_both_alternate", &server, || alternate(true))
            .within(long)
            .timed(),
        Case::new("configmap::nodes_go_from_the_lock_of_old_to_the_lease", &nodes, migrate).within(long),
    ]
}

struct Served(Cluster, PathBuf);

#[async_trait]
impl Place for Served {
    fn lock(&self) -> Arc<dyn Lock> {
        self.0.lock(Kind::ConfigMap, &self.1)
    }

    async fn delete(&self) {
        assert_eq!(self.0.server.admin("DELETE", MAP, None).await.unwrap().0, 200);
    }
}

async fn alike() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow_on(&[MAPS], &VERBS, true).await;
    let credentials = cluster.credentials("account").await;
    suite(&Served(cluster, credentials)).await;
}

/// The ConfigMap, by its administrator.
async fn map(cluster: &Cluster) -> Value {
    let (status, map) = cluster.server.admin("GET", MAP, None).await.unwrap();
    assert_eq!(status, 200, "{map}");
    map
}

/// Makes it as charts do, with content of its own.
async fn make(cluster: &Cluster) {
    let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "peili", "labels": {"app": "spegel"}}, "data": {"key": "value"}});
    assert_eq!(cluster.server.admin("POST", FOLDER, Some(&body)).await.unwrap().0, 201);
}

fn holder(map: &Value) -> String {
    let record = map["metadata"]["annotations"][RECORD].as_str().unwrap_or("{}");
    let record: Value = serde_json::from_str(record).unwrap();
    record["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

async fn one_leads() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow_on(&[MAPS], &VERBS, false).await;
    make(&cluster).await;
    let folder = cluster.credentials("account").await;
    let start = |rank: u32| {
        Candidate::start(
            cluster.lock(Kind::ConfigMap, &folder),
            &format!("n{rank}"),
            Standing::Candidate(rank),
        )
    };
    let (first, second, third) = (start(0), start(1), start(2));
    let (one, took) = leader(&[&first, &second, &third], D + SOON).await.unwrap();
    println!("a ConfigMap without a record: a leader after {took:?}");
    assert_eq!(one, 0);
    assert!(took >= D - Duration::from_millis(50), "{took:?}");
    assert!(first.strict.leave(false).await);
    let (one, took) = leader(&[&first, &second, &third], SOON).await.unwrap();
    println!("given away: {took:?}");
    assert!(one == 1 && took < Duration::from_secs(1), "{one} {took:?}");
    sleep(2 * D).await;
    assert!(second.leads() && third.strict.state().relied_on);
    drop(second);
    let start = Instant::now();
    let (_, took) = leader(&[&first, &third], D + SOON).await.unwrap();
    println!("killed: {took:?}");
    assert!(start.elapsed() < Duration::from_secs(8), "{took:?}");
    let map = map(&cluster).await;
    assert_eq!((&map["data"]["key"], &map["metadata"]["labels"]["app"]), (&json!("value"), &json!("spegel")));
    let all = cluster.server.requests(|request| request.user == USER).unwrap();
    let others: Vec<_> = all.iter().filter(|request| !VERBS.contains(&request.verb.as_str())).collect();
    assert!(others.is_empty(), "{others:#?}");
}

async fn named() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    let folder = cluster.credentials("account").await;
    let one = Candidate::start(cluster.lock(Kind::ConfigMap, &folder), "a", Standing::Candidate(0));
    let cause = async |expected: Cause| {
        let found = wait::until(expected.name(), Duration::from_secs(40), async || {
            (one.strict.state().cause() == expected).then_some(())
        });
        if let Err(error) = found.await {
            panic!("{error}: {:#?}", one.strict.state());
        }
        one.strict.state().fault.unwrap().text
    };
    let text = cause(Cause::ConfigMapForbidden).await;
    assert!(text.contains("cannot get resource \"configmaps\""), "{text}");
    assert!(Cause::ConfigMapForbidden.remedy().contains("get, update and watch on this ConfigMap"));
    cluster.allow_on(&[MAPS], &["get", "update"], false).await;
    let text = cause(Cause::NoConfigMap).await;
    assert!(text.contains("/api/v1/namespaces/peili/configmaps/peili does not exist"), "{text}");
    make(&cluster).await;
    // Refused tries are half a minute apart at most.
    let took = leader(&[&one], D + 2 * SOON).await.unwrap().1;
    println!("made beforehand: {took:?}");
    wait::until("that it cannot be watched", SOON, async || {
        one.strict.state().blind.is_some_and(|fault| fault.cause == Cause::ConfigMapForbidden).then_some(())
    })
    .await
    .unwrap();
}

fn holds_both(old: Arc<dyn Lock>, lease: Arc<dyn Lock>, name: &str, rank: u32) -> Candidate {
    let parts = Parts {
        lock: lease,
        clock: Arc::new(BootClock),
        duty: Arc::new(Idle),
        metrics: LeaseMetrics::default(),
        seed: rank.into(),
    };
    let (strict, pair) = Strict::beside(name, &Settings::FAST, Beside::Held, old, parts);
    strict.stand(Standing::Candidate(rank));
    Candidate { strict, driving: AbortOnDropHandle::new(tokio::spawn(pair.run())) }
}

/// client-go's `LeaderElectionRecord`, as strict as it reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Record {
    holder_identity: String,
    lease_duration_seconds: i64,
    acquire_time: String,
    renew_time: String,
    leader_transitions: i64,
}

/// An elector as client-go 0.20 has it, over its ConfigMap lock or over that and a Lease: `leaderelection.go`, `configmaplock.go`,
/// `leaselock.go` and `multilock.go`, line by line.
struct Elector {
    both: bool,
    client: Client,
    identity: &'static str,
    leads: AtomicBool,
    /// 0: goes on; 1: gives the lock away and ends; 2: ends as a process that is killed.
    end: AtomicU8,
}

struct Observed {
    record: Record,
    raw: String,
    at: Instant,
    map: Value,
    lease: Value,
}

impl Elector {
    fn start(
        cluster: &Cluster,
        token: &str,
        identity: &'static str,
        both: bool,
    ) -> (Arc<Self>, AbortOnDropHandle<()>) {
        let client = cluster.server.client(token);
        let (leads, end) = (AtomicBool::new(false), AtomicU8::new(0));
        let elector = Arc::new(Self { both, client, identity, leads, end });
        let task = tokio::spawn(Arc::clone(&elector).run());
        (elector, AbortOnDropHandle::new(task))
    }

    fn leads(&self) -> bool {
        self.leads.load(Ordering::SeqCst)
    }

    fn ends(&self) -> bool {
        self.end.load(Ordering::SeqCst) > 0
    }

    async fn run(self: Arc<Self>) {
        let mut observed = Observed {
            record: Record::default(),
            raw: String::new(),
            at: Instant::now(),
            map: Value::Null,
            lease: Value::Null,
        };
        while !self.try_acquire_or_renew(&mut observed).await {
            if self.ends() {
                return;
            }
            sleep(RETRY.mul_f64(rand::random_range(1.0..2.2))).await;
        }
        self.leads.store(true, Ordering::SeqCst);
        let mut renewed = Instant::now();
        while renewed.elapsed() < DEADLINE {
            sleep(RETRY).await;
            match self.end.load(Ordering::SeqCst) {
                0 => {}
                1 => {
                    self.leads.store(false, Ordering::SeqCst);
                    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
                    let record = Record {
                        leader_transitions: observed.record.leader_transitions,
                        lease_duration_seconds: 1,
                        renew_time: now.clone(),
                        acquire_time: now,
                        ..Record::default()
                    };
                    assert!(self.update(&mut observed, record).await);
                    return;
                }
                _ => break,
            }
            if self.try_acquire_or_renew(&mut observed).await {
                renewed = Instant::now();
            }
        }
        self.leads.store(false, Ordering::SeqCst);
    }

    async fn try_acquire_or_renew(&self, observed: &mut Observed) -> bool {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let mut record = Record {
            holder_identity: self.identity.into(),
            lease_duration_seconds: 10,
            renew_time: now.clone(),
            acquire_time: now,
            leader_transitions: 0,
        };
        let Some((old, raw)) = self.get(observed).await else { return self.create(observed, record).await };
        if observed.raw != raw {
            (observed.record, observed.raw, observed.at) = (old.clone(), raw, Instant::now());
        }
        let is_leader = observed.record.holder_identity == self.identity;
        if !old.holder_identity.is_empty() && observed.at.elapsed() < LEASE && !is_leader {
            return false;
        }
        if is_leader {
            record.acquire_time = old.acquire_time;
            record.leader_transitions = old.leader_transitions;
        } else {
            record.leader_transitions = old.leader_transitions + 1;
        }
        self.update(observed, record).await
    }

    /// The record and its bytes; of two different ones nobody is the holder.
    async fn get(&self, observed: &mut Observed) -> Option<(Record, String)> {
        let (status, map) = self.client.send("GET", MAP, None).await.unwrap();
        if status == 404 {
            return None;
        }
        assert_eq!(status, 200, "{map}");
        let mut raw = map["metadata"]["annotations"][RECORD].as_str().unwrap_or_default().to_owned();
        let mut record = Record::default();
        if !raw.is_empty() {
            record =
                serde_json::from_str(&raw).expect("an elector of old goes no further at what it cannot read");
            for time in [&record.acquire_time, &record.renew_time] {
                humantime::parse_rfc3339(time).expect("nor at times that are none");
            }
        }
        observed.map = map;
        if self.both {
            let (status, lease) = self.client.send("GET", LEASE_PATH, None).await.unwrap();
            if status == 404 {
                return Some((record, raw));
            }
            let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
            if holder != record.holder_identity {
                record.holder_identity = "leaderelection.k8s.io/unknown".into();
            }
            raw = format!("{}:{}", serde_json::to_string(&record).unwrap(), lease["spec"]);
            observed.lease = lease;
        }
        Some((record, raw))
    }

    async fn create(&self, observed: &mut Observed, record: Record) -> bool {
        let annotations = json!({RECORD: serde_json::to_string(&record).unwrap()});
        let metadata = json!({"name": "peili", "annotations": annotations});
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata});
        let (status, map) = self.client.send("POST", FOLDER, Some(&body)).await.unwrap();
        if status != 201 || !self.put_lease(observed, &record).await {
            return false;
        }
        (observed.record, observed.at, observed.map) = (record, Instant::now(), map);
        true
    }

    async fn update(&self, observed: &mut Observed, record: Record) -> bool {
        observed.map["metadata"]["annotations"][RECORD] = json!(serde_json::to_string(&record).unwrap());
        let (status, map) = self.client.send("PUT", MAP, Some(&observed.map)).await.unwrap();
        if status != 200 || !self.put_lease(observed, &record).await {
            return false;
        }
        (observed.record, observed.at, observed.map) = (record, Instant::now(), map);
        true
    }

    /// The other half, where there is one: it is made where it is not there.
    async fn put_lease(&self, observed: &mut Observed, record: &Record) -> bool {
        if !self.both {
            return true;
        }
        let micros = |time: &str| time.replace('Z', ".000000Z");
        let spec = json!({
            "holderIdentity": record.holder_identity,
            "leaseDurationSeconds": record.lease_duration_seconds,
            "acquireTime": micros(&record.acquire_time),
            "renewTime": micros(&record.renew_time),
            "leaseTransitions": record.leader_transitions,
        });
        let (wanted, status, lease) = if observed.lease.is_null() {
            let metadata = json!({"name": "peili"});
            let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec});
            let folder = LEASE_PATH.trim_end_matches("/peili");
            let (status, lease) = self.client.send("POST", folder, Some(&body)).await.unwrap();
            (201, status, lease)
        } else {
            observed.lease["spec"] = spec;
            let (status, lease) = self.client.send("PUT", LEASE_PATH, Some(&observed.lease)).await.unwrap();
            (200, status, lease)
        };
        if status == wanted {
            observed.lease = lease;
        }
        status == wanted
    }
}

/// Waits until it is so, and finds two leaders at once meanwhile.
async fn until(what: &str, limit: Duration, leads: &dyn Fn() -> Vec<String>, wanted: &str) -> Duration {
    let start = Instant::now();
    loop {
        let leading = leads();
        assert!(leading.len() <= 1, "two lead: {leading:?}");
        if leading.first().is_some_and(|one| one.starts_with(wanted)) {
            return start.elapsed();
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}, but {leading:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Peili holds the ConfigMap alone, or (`both`) a Lease too, as the electors of old do.
async fn alternate(both: bool) {
    let cluster = Cluster::start(Options::on_loopback()).await;
    let kinds = if both { &[MAPS, LEASES][..] } else { &[MAPS] };
    cluster.allow_on(kinds, &VERBS, true).await;
    // Who does not hold the ConfigMap reads the Lease once in D, half of it more at most, and counts from then.
    let read = if both { D * 3 / 2 } else { Duration::ZERO };
    let token = cluster.server.token("peili", "peili", Duration::from_secs(3_600)).await.unwrap();
    let folder = cluster.credentials("account").await;
    let (old, _runs) = Elector::start(&cluster, &token, "spegel-1", both);
    wait::until("an elector of old leads", SOON, async || old.leads().then_some(())).await.unwrap();
    let start = |rank: u32| {
        let (name, old) = (format!("peili-{rank}"), cluster.lock(Kind::ConfigMap, &folder));
        if both {
            holds_both(old, cluster.lock(Kind::Lease, &folder), &name, rank)
        } else {
            Candidate::start(old, &name, Standing::Candidate(rank))
        }
    };
    let (first, second) = (start(0), start(1));
    let leading = |electors: &[&Arc<Elector>]| {
        let mut all: Vec<String> =
            electors.iter().filter(|one| one.leads()).map(|one| one.identity.to_owned()).collect();
        all.extend(
            [&first, &second].iter().filter(|one| one.leads()).map(|one| one.strict.identity().to_owned()),
        );
        all
    };
    // It holds on, and Peili knows who it is.
    let start = Instant::now();
    while start.elapsed() < D + Duration::from_secs(2) {
        assert_eq!(leading(&[&old]), ["spegel-1"]);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(second.strict.state().holder.as_deref(), Some("spegel-1"));
    assert!(!second.strict.state().free);

    // It dies: Peili takes over, and not before it is certain that an elector of that kind has stopped.
    old.end.store(2, Ordering::SeqCst);
    wait::until("it ends", RETRY + SLACK, async || (!old.leads()).then_some(())).await.unwrap();
    let took = until("Peili leads", LEASE + FOREIGN + read + SLACK, &|| leading(&[&old]), "peili-0").await;
    println!("the elector of old died: Peili leads after {took:?}");
    assert!(took > LEASE + FOREIGN - RETRY - SLACK, "{took:?}");

    // Another one follows, for longer than it would wait for one of its own.
    let (next, _runs) = Elector::start(&cluster, &token, "spegel-2", both);
    let start = Instant::now();
    while start.elapsed() < LEASE + Duration::from_secs(2) {
        assert_eq!(leading(&[&old, &next]), ["peili-0"]);
        sleep(Duration::from_millis(5)).await;
    }
    // Peili gives it away to whoever wants it.
    second.strict.stand(Standing::Observer(60_000));
    assert!(first.strict.leave(false).await);
    let took = until("the elector leads", RETRY_MOST + SLACK, &|| leading(&[&next]), "spegel-2").await;
    println!("Peili gave it away: the elector of old leads after {took:?}");
    second.strict.stand(Standing::Candidate(1));
    sleep(D).await;
    assert_eq!(leading(&[&next]), ["spegel-2"]);
    assert!(
        map(&cluster).await["metadata"]["annotations"]["peili.dev/election"].is_string(),
        "which it leaves"
    );

    // It gives the lock away as client-go does, beside Peili's mark of an earlier release.
    next.end.store(1, Ordering::SeqCst);
    wait::until("it ends", RETRY + SLACK, async || (!next.leads()).then_some(())).await.unwrap();
    let took = until("Peili leads", 2 * D + read + SLACK, &|| leading(&[&next]), "peili-").await;
    println!("the elector of old gave it away: Peili leads after {took:?}");
    assert!(took > D - Duration::from_millis(500), "its work may go on: {took:?}");

    // Peili dies: an elector of old takes over after its own time.
    let (third, _runs) = Elector::start(&cluster, &token, "spegel-3", both);
    sleep(RETRY_MOST).await;
    drop((first, second));
    let start = Instant::now();
    wait::until("the elector leads", LEASE + RETRY_MOST + SLACK, async || third.leads().then_some(()))
        .await
        .unwrap();
    println!("Peili died: the elector of old leads after {:?}", start.elapsed());
}

/// Waits until all nodes know of one of them that it coordinates; how long that took.
async fn coordinates(rig: &Rig) -> Duration {
    let is_so = |election: &Value| election["mode"] == "lease" && holders(election).starts_with("node-");
    rig.until("a node coordinates", LEASE + FOREIGN + 2 * SOON, is_so).await
}

async fn migrate() {
    let (mut rig, plans) = Rig::new().await;
    rig.cluster.allow_on(&[MAPS, LEASES], &VERBS, true).await;
    let token = rig.cluster.server.token("peili", "peili", Duration::from_secs(3_600)).await.unwrap();
    let (old, _runs) = Elector::start(&rig.cluster, &token, "spegel-1", false);
    wait::until("an elector of old leads", SOON, async || old.leads().then_some(())).await.unwrap();
    for mut plan in plans {
        plan.merge(&json!({"election": {"backend": "configmap", "configmap": {"hold": "observe"}}}));
        rig.nodes.push(plan.start().await.unwrap());
    }
    rig.until("who holds the lock of old", SOON, |election| {
        election["configmap"]["holder"] == "spegel-1"
            && election["lease"]["holder"] == ""
            && holders(election) == "spegel-1"
    })
    .await;
    rig.heard().await;
    rig.mirrors().await;
    sleep(D).await;
    assert!(rig.cluster.lease().await.is_none(), "nobody stands for the Lease");
    old.end.store(2, Ordering::SeqCst);
    wait::until("it ends", RETRY + SLACK, async || (!old.leads()).then_some(())).await.unwrap();
    let took = coordinates(&rig).await;
    println!("the elector of old died: a node coordinates, and all know it, after {took:?}");
    let observed = map(&rig.cluster).await;
    assert_eq!(holder(&observed), "spegel-1");
    assert!(
        observed["metadata"]["annotations"]["peili.dev/election"].is_null(),
        "it is never written: {observed}"
    );

    // Then both are held.
    for node in &mut rig.nodes {
        node.terminate(Duration::from_secs(20)).await.unwrap();
        node.plan.merge(&json!({"election": {"configmap": {"hold": "both"}}}));
        node.restart().await.unwrap();
    }
    let took = coordinates(&rig).await;
    let (leader, _) = rig.coordinator(SOON).await;
    println!("{leader} holds both, and all know it, after {took:?}");
    let lease = rig.cluster.lease().await.unwrap();
    let both = holder(&map(&rig.cluster).await);
    assert!(both.starts_with(&leader), "{both}");
    assert_eq!(lease["spec"]["holderIdentity"], both.as_str());
    let place = rig.nodes.iter().position(|node| node.plan.name == leader).unwrap();
    let mut command = std::process::Command::new(peili_lab::node::binary().unwrap());
    command.args(["election", "status", "--data-dir"]).arg(rig.nodes[place].plan.data_dir());
    let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
    for part in ["Lease peili is held by", "ConfigMap peili is held by"] {
        assert!(said.contains(&format!("{part} {both}")), "{said}");
    }
    // Who ends gives both away.
    rig.nodes[place].terminate(Duration::from_secs(20)).await.unwrap();
    let mut gone = rig.nodes.remove(place);
    rig.images.remove(place);
    let took = rig
        .until("the next", 2 * SOON, |election| {
            holders(election).starts_with("node-") && holders(election) != leader
        })
        .await;
    let (next, _) = rig.coordinator(SOON).await;
    println!("{next} holds both {took:?} after {leader} was ended");
    // The one that needs no ConfigMap any more stands for the Lease alone.
    gone.plan.merge(&json!({"election": {"backend": "auto"}}));
    gone.restart().await.unwrap();
    rig.nodes.push(gone);
    rig.until("all know it", SOON, |election| election["mode"] == "lease" && election["members"] == 3).await;
}
