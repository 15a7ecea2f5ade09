//! The strict role on a real Kubernetes API server: that the lock in memory and the one by the server do the same, that there is one
//! leader and soon another, and that what is wrong is named. Whole nodes under a blocked API server are in `seed`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use peili::cluster::{Api, Cause, Config, Kind, ObjectLock};
use peili::election::lease::{Answer, Mark, Object, Standing, Write};
use peili::election::strict::{Change, Lock, Memory, Notes};
use peili_lab::candidate::{Candidate, leader};
use peili_lab::kubernetes::{Options, Part, Rule};
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement, wait};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::Case;

/// For one call.
const LIMIT: Duration = Duration::from_secs(2);
/// Longest until something that is certain is seen, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// The duration of the lease.
pub(crate) const D: Duration = Duration::from_secs(6);
pub(crate) const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/peili/leases/peili";
pub(crate) const USER: &str = "system:serviceaccount:peili:peili";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/peili/leases";

pub(crate) fn cases() -> Vec<Case> {
    let server = [Requirement::Kubernetes];
    let long = Duration::from_secs(240);
    vec![
        Case::new("coordination::the_lock_in_memory_and_the_one_of_a_server_are_alike", &server, alike),
        Case::new("coordination::one_leads_and_soon_another", &server, one_leads).within(long).timed(),
        Case::new("coordination::what_is_wrong_is_named", &server, named).within(long),
        Case::new("coordination::a_role_may_be_limited_to_the_one_object", &server, limited),
        Case::new("coordination::five_hundred_nodes_ask_little", &server, many).within(long).timed(),
    ]
}

/// An API server with a namespace and an account for Peili.
pub(crate) struct Cluster {
    pub(crate) server: ApiServer,
    pub(crate) scratch: Scratch,
}

impl Cluster {
    pub(crate) async fn start(options: Options) -> Self {
        let server = ApiServer::start(options).await.unwrap();
        println!("kube-apiserver {}", server.version());
        server.namespace("peili").await.unwrap();
        server.service_account("peili", "peili").await.unwrap();
        Self { server, scratch: Scratch::new().unwrap() }
    }

    /// Gives the account rights over leases: by name, and to make any if `creates`.
    pub(crate) async fn allow(&self, verbs: &[&str], creates: bool) {
        self.allow_on(&["leases.coordination.k8s.io"], verbs, creates).await;
    }

    /// The same over locks of these kinds.
    pub(crate) async fn allow_on(&self, resources: &[&str], verbs: &[&str], creates: bool) {
        let mut rules = vec![Rule { verbs, resources, names: &["peili"] }];
        if creates {
            rules.push(Rule { verbs: &["create"], resources, names: &[] });
        }
        self.server.role("peili", "elects", &rules).await.unwrap();
        self.server.role_binding("peili", "elects", "peili").await.unwrap();
    }

    /// Gives the account all that the coordinator has any use for (docs/elections.md).
    pub(crate) async fn allow_all(&self) {
        self.server.role("peili", "elects", &Rule::of_coordinator(&["peili"])).await.unwrap();
        self.server.role_binding("peili", "elects", "peili").await.unwrap();
    }

    pub(crate) async fn forbid(&self) {
        for kind in ["rolebindings/elects-peili", "roles/elects"] {
            let path = format!("/apis/rbac.authorization.k8s.io/v1/namespaces/peili/{kind}");
            assert_eq!(self.server.admin("DELETE", &path, None).await.unwrap().0, 200);
        }
    }

    /// A folder with the account's credentials.
    pub(crate) async fn credentials(&self, name: &str) -> PathBuf {
        let token = self.server.token("peili", "peili", Duration::from_secs(3_600)).await.unwrap();
        let folder = self.scratch.path().join(name);
        self.server.write_service_account_dir(&folder, &token, "peili").unwrap();
        folder
    }

    pub(crate) fn lock(&self, kind: Kind, credentials: &Path) -> Arc<dyn Lock> {
        lock(kind, self.server.url(), credentials)
    }

    /// The object, by its administrator.
    pub(crate) async fn lease(&self) -> Option<Value> {
        let (status, lease) = self.server.admin("GET", LEASE, None).await.ok()?;
        (status == 200).then_some(lease)
    }

    /// Requests of the account so far.
    fn requests(&self, verb: &str) -> usize {
        let by_peili =
            |request: &peili_lab::kubernetes::Request| request.user == USER && request.verb == verb;
        self.server.requests(by_peili).unwrap().len()
    }
}

/// The lock of a server.
pub(crate) fn lock(kind: Kind, url: String, credentials: &Path) -> Arc<dyn Lock> {
    let credentials = credentials.to_owned();
    let config = Config { endpoints: vec![url], credentials, ..Config::default() };
    Arc::new(ObjectLock::new(kind, Arc::new(Api::new(&config)), "peili"))
}

/// Where the suite's lock is kept, and who may delete it.
#[async_trait]
pub(crate) trait Place {
    fn lock(&self) -> Arc<dyn Lock>;
    async fn delete(&self);
}

struct Served(Cluster, PathBuf);

#[async_trait]
impl Place for Served {
    fn lock(&self) -> Arc<dyn Lock> {
        self.0.lock(Kind::Lease, &self.1)
    }

    async fn delete(&self) {
        assert_eq!(self.0.server.admin("DELETE", LEASE, None).await.unwrap().0, 200);
    }
}

#[async_trait]
impl Place for Memory {
    fn lock(&self) -> Arc<dyn Lock> {
        Arc::new(self.handle())
    }

    async fn delete(&self) {
        Memory::delete(self);
    }
}

async fn alike() {
    suite(&Memory::default()).await;
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow(&["get", "update", "watch"], true).await;
    let credentials = cluster.credentials("account").await;
    suite(&Served(cluster, credentials)).await;
}

fn write(over: Option<&Object>, holder: &str, sequence: u64) -> Write {
    Write {
        uid: over.map_or_else(|| "".into(), |object| object.uid.clone()),
        version: over.map_or(0, |object| object.version),
        holder: holder.into(),
        duration: 6_000,
        transitions: 1,
        mark: Mark { writer: "w".into(), sequence, duration: 6_000, released: false },
        begins: true,
    }
}

fn object(answer: Answer) -> Object {
    match answer {
        Answer::Object(object) => object,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn suite(place: &dyn Place) {
    let (lock, other) = (place.lock(), place.lock());
    let notes = Notes { members: 7, book: vec![b"record".to_vec()] };
    assert_eq!(lock.get(LIMIT).await.answer, Answer::Absent);
    let made = object(lock.create(&write(None, "", 1), &notes, LIMIT).await.answer);
    assert!(made.record.holder.is_empty() && !made.record.is_released());
    assert_eq!(lock.create(&write(None, "", 2), &notes, LIMIT).await.answer, Answer::Conflict);

    let reply = lock.put(&write(Some(&made), "a", 3), &notes, LIMIT).await;
    let (held, said) = (object(reply.answer), reply.notes.unwrap());
    assert!(held.version > made.version && held.uid == made.uid);
    assert_eq!((&*held.record.holder, held.record.duration, held.record.transitions), ("a", 6_000, 1));
    assert_eq!(held.record.mark, Some(write(None, "a", 3).mark));
    assert_eq!(said, notes);
    // The version that it replaces is the one that counts, and the object is the one that was seen.
    assert_eq!(lock.put(&write(Some(&made), "b", 4), &notes, LIMIT).await.answer, Answer::Conflict);
    let stranger = Object { uid: "stranger".into(), ..held.clone() };
    assert_eq!(lock.put(&write(Some(&stranger), "b", 5), &notes, LIMIT).await.answer, Answer::Conflict);

    let (told, mut changes) = mpsc::channel(16);
    let watching = AbortOnDropHandle::new(tokio::spawn({
        let (lock, version) = (place.lock(), held.version);
        async move { lock.watch(version, told).await }
    }));
    // Another process, which reads first.
    let seen = object(other.get(LIMIT).await.answer);
    assert_eq!(seen, held);
    let renewed = object(other.put(&write(Some(&seen), "a", 6), &Notes::default(), LIMIT).await.answer);
    let next =
        async |changes: &mut mpsc::Receiver<Change>| timeout(SOON, changes.recv()).await.unwrap().unwrap();
    assert_eq!(next(&mut changes).await, Change::Seen(renewed.clone(), Notes::default()));
    let again = object(other.put(&write(Some(&renewed), "", 7), &notes, LIMIT).await.answer);
    match next(&mut changes).await {
        Change::Seen(object, _) => assert_eq!(object, again),
        change @ Change::Gone(_) => panic!("{change:?}"),
    }
    place.delete().await;
    match next(&mut changes).await {
        Change::Gone(version) => assert!(version > again.version, "{version} {again:?}"),
        change @ Change::Seen(..) => panic!("{change:?}"),
    }
    drop(watching);
    // What is gone is not made by replacing it.
    let gone = other.put(&write(Some(&again), "b", 8), &notes, LIMIT).await.answer;
    assert!(matches!(gone, Answer::Conflict | Answer::Absent), "{gone:?}");
    assert_eq!(other.get(LIMIT).await.answer, Answer::Absent);
    let anew = object(lock.create(&write(None, "", 9), &notes, LIMIT).await.answer);
    assert!(anew.uid != made.uid && anew.version > again.version);
    assert!(lock.knock(LIMIT).await);
}

async fn one_leads() {
    let mut cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow(&["get", "update", "watch"], true).await;
    let folder = cluster.credentials("account").await;
    let candidate = |rank: u32, life: u32| {
        Candidate::start(
            cluster.lock(Kind::Lease, &folder),
            &format!("n{rank}/{life}"),
            Standing::Candidate(rank),
        )
    };
    let (mut first, second, third) = (candidate(0, 0), candidate(1, 0), candidate(2, 0));
    let (one, took) = leader(&[&first, &second, &third], D + SOON).await.unwrap();
    println!("there was no lease: a leader after {took:?}");
    assert!(
        took >= D - Duration::from_millis(50),
        "an object that was made anew may replace one with a holder"
    );
    assert_eq!(one, 0, "the best first");

    // Given away: the next one takes it by the watch.
    assert!(first.strict.leave(false).await);
    let (one, took) = leader(&[&first, &second, &third], SOON).await.unwrap();
    println!("given away: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(one, 1);

    // Renewals are visible, and no more than that is asked.
    let (before, start) = (cluster.requests("update"), Instant::now());
    sleep(Duration::from_secs(9)).await;
    let renewals = cluster.requests("update") - before;
    let a_minute = renewals as f64 / start.elapsed().as_secs_f64() * 60.0;
    println!("{a_minute:.0} renewals a minute");
    assert!((30.0..50.0).contains(&a_minute));
    wait::until("all rely on it", SOON, async || {
        let all = [&first, &second, &third];
        all.iter().all(|candidate| candidate.strict.state().relied_on).then_some(())
    })
    .await
    .unwrap();

    // Killed.
    drop(second);
    let start = Instant::now();
    let (_, took) = leader(&[&first, &third], D + SOON).await.unwrap();
    println!("killed: {took:?}");
    assert!(start.elapsed() < Duration::from_secs(8), "{took:?}");

    // The server stands still: the term ends in its time, and begins again soon after.
    let all = [&first, &third];
    cluster.server.freeze(Part::Server).unwrap();
    let start = Instant::now();
    wait::until("nobody leads", SOON, async || all.iter().all(|one| !one.leads()).then_some(()))
        .await
        .unwrap();
    assert!(start.elapsed() < Duration::from_millis(5_200), "{:?}", start.elapsed());
    sleep(Duration::from_secs(4)).await;
    assert!(all.iter().any(|candidate| candidate.strict.state().cause() == Cause::NoAnswer));
    cluster.server.thaw(Part::Server).unwrap();
    let (_, took) = leader(&all, SOON).await.unwrap();
    println!("after a freeze: {took:?}");
    assert!(took < Duration::from_secs(4), "{took:?}");

    // It is killed, and comes back with its data.
    cluster.server.stop_hard(Part::Server);
    wait::until("nobody leads", SOON, async || all.iter().all(|one| !one.leads()).then_some(()))
        .await
        .unwrap();
    let refused = async || all.iter().any(|one| one.strict.state().cause() == Cause::Refused).then_some(());
    wait::until("it is refused", SOON, refused).await.unwrap();
    cluster.server.start_again().await.unwrap();
    let (_, took) = leader(&all, SOON).await.unwrap();
    println!("after a restart of the server: {took:?}");

    // The storage stands still: the server answers with errors, or not at all.
    cluster.server.freeze(Part::Storage).unwrap();
    wait::until("nobody leads", SOON, async || all.iter().all(|one| !one.leads()).then_some(()))
        .await
        .unwrap();
    cluster.server.thaw(Part::Storage).unwrap();
    let (_, took) = leader(&all, SOON).await.unwrap();
    println!("after a freeze of the storage: {took:?}");

    // Deleted: whoever leads stops at once, and a new one waits for as long as an old one could go on.
    let token = |candidate: &Candidate| candidate.strict.state().token().cloned();
    let old = all.iter().find_map(|candidate| token(candidate)).unwrap();
    assert_eq!(cluster.server.admin("DELETE", LEASE, None).await.unwrap().0, 200);
    wait::until("nobody leads", Duration::from_secs(1), async || {
        all.iter().all(|one| !one.leads()).then_some(())
    })
    .await
    .unwrap();
    let (one, took) = leader(&all, D + SOON).await.unwrap();
    println!("deleted: {took:?}");
    let new = token(all[one]).unwrap();
    assert!(new > old && new.uid != old.uid, "{old} {new}");

    // What Helm applies again keeps the holder; what somebody puts there takes it away.
    let mut lease = cluster.lease().await.unwrap();
    lease["metadata"]["labels"] = json!({"app.kubernetes.io/managed-by": "Helm"});
    assert_eq!(cluster.server.admin("PUT", LEASE, Some(&lease)).await.unwrap().0, 200);
    sleep(Duration::from_secs(4)).await;
    assert!(all[one].leads(), "it goes on over other people's metadata");
    assert_eq!(cluster.lease().await.unwrap()["metadata"]["labels"], lease["metadata"]["labels"]);
    let mut lease = cluster.lease().await.unwrap();
    lease["spec"]["holderIdentity"] = json!("a stranger");
    lease["spec"]["leaseDurationSeconds"] = json!(1);
    let put = async || {
        let version = cluster.lease().await?["metadata"]["resourceVersion"].clone();
        lease["metadata"]["resourceVersion"] = version;
        (cluster.server.admin("PUT", LEASE, Some(&lease)).await.ok()?.0 == 200).then_some(())
    };
    let mut put = put;
    wait::until("a stranger's record", SOON, async || put().await).await.unwrap();
    wait::until("nobody leads", Duration::from_secs(1), async || {
        all.iter().all(|one| !one.leads()).then_some(())
    })
    .await
    .unwrap();
    drop(std::mem::replace(&mut first, third));
    assert!(!first.driving.is_finished());
}

async fn limited() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    // Made beforehand, as a chart does where no one may create.
    let empty =
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "peili"}});
    assert_eq!(cluster.server.admin("POST", LEASES, Some(&empty)).await.unwrap().0, 201);
    cluster.allow(&["get", "update"], false).await;
    let folder = cluster.credentials("account").await;
    let first = Candidate::start(cluster.lock(Kind::Lease, &folder), "a", Standing::Candidate(0));
    let second = Candidate::start(cluster.lock(Kind::Lease, &folder), "b", Standing::Candidate(1));
    let (one, took) = leader(&[&first, &second], D + SOON).await.unwrap();
    println!("a lease that was made beforehand: {took:?}");
    assert_eq!(one, 0);
    // Without the right to watch it is read, and said.
    wait::until("that it cannot be watched", SOON, async || {
        let blind = second.strict.state().blind;
        blind.is_some_and(|fault| fault.cause == Cause::Forbidden).then_some(())
    })
    .await
    .unwrap();
    sleep(2 * D).await;
    assert!(first.leads() && second.strict.state().relied_on);
    assert_eq!(second.strict.state().holder.as_deref(), Some("a"));
    let all = cluster.server.requests(|request| request.user == USER).unwrap();
    let others: Vec<_> =
        all.iter().filter(|request| !["get", "update", "watch"].contains(&request.verb.as_str())).collect();
    assert!(others.is_empty(), "{others:#?}");
}

/// What goes wrong, one after the other, on one server; each is named, and each is over when it is mended.
async fn named() {
    let mut cluster = Cluster::start(Options::on_loopback()).await;
    let folder = cluster.credentials("account").await;
    let one = Candidate::start(cluster.lock(Kind::Lease, &folder), "a", Standing::Candidate(0));
    let cause = async |expected: Cause| {
        let found = wait::until(expected.name(), Duration::from_secs(40), async || {
            (one.strict.state().cause() == expected).then_some(())
        });
        if let Err(error) = found.await {
            panic!("{error}: {:#?}", one.strict.state());
        }
        one.strict.state().fault.unwrap().text
    };
    let well = async || {
        let found = wait::until("it leads", Duration::from_secs(60), async || {
            (one.leads() && one.strict.state().fault.is_none()).then_some(())
        });
        if let Err(error) = found.await {
            panic!("{error}: {:#?}", one.strict.state());
        }
    };
    let text = cause(Cause::Forbidden).await;
    assert!(text.contains("cannot get resource \"leases\""), "{text}");
    cluster.allow(&["get", "update", "watch"], false).await;
    let text = cause(Cause::NoObject).await;
    assert!(text.contains("/namespaces/peili/leases/peili"), "{text}");
    assert_eq!(one.strict.state().reached, Some(true));
    cluster.forbid().await;
    cluster.allow(&["get", "update", "watch"], true).await;
    well().await;

    // A token that is over; the server takes it a minute longer, so it was over before.
    let over = SystemTime::now() - Duration::from_secs(3_600);
    let token = cluster.server.token_until("peili", "peili", over).await.unwrap();
    cluster.server.write_service_account_dir(&folder, &token, "peili").unwrap();
    let stale = Candidate::start(cluster.lock(Kind::Lease, &folder), "b", Standing::Candidate(1));
    wait::until("unauthorized", SOON, async || {
        (stale.strict.state().cause() == Cause::Unauthorized).then_some(())
    })
    .await
    .unwrap();
    std::fs::remove_file(folder.join("token")).unwrap();
    let none = Candidate::start(cluster.lock(Kind::Lease, &folder), "c", Standing::Candidate(2));
    wait::until("no credentials", SOON, async || {
        (none.strict.state().cause() == Cause::NoCredentials).then_some(())
    })
    .await
    .unwrap();
    let text = none.strict.state().fault.unwrap().text;
    assert!(text.contains("token"), "{text}");
    let right = cluster.credentials("account").await;
    assert_eq!(right, folder);
    for candidate in [&stale, &none] {
        wait::until("it is well again", Duration::from_secs(60), async || {
            candidate.strict.state().fault.is_none().then_some(())
        })
        .await
        .unwrap();
    }
    drop((stale, none));

    // The authority of another cluster.
    let other = ApiServer::start(Options::on_loopback()).await.unwrap();
    let foreign = cluster.credentials("foreign").await;
    std::fs::remove_file(foreign.join("ca.crt")).unwrap();
    std::fs::copy(other.authority(), foreign.join("ca.crt")).unwrap();
    drop(other);
    let foreign = Candidate::start(cluster.lock(Kind::Lease, &foreign), "d", Standing::Candidate(1));
    let refused = async || (foreign.strict.state().cause() == Cause::Tls).then_some(());
    if let Err(error) = wait::until("no trust", SOON, refused).await {
        panic!("{error}: {:#?}", foreign.strict.state());
    }
    drop(foreign);

    // A webhook that nobody answers for.
    let webhook = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "dead"},
        "webhooks": [{
            "name": "dead.peili.test",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "timeoutSeconds": 1,
            "clientConfig": {"url": "https://127.0.0.1:1/dead"},
            "rules": [{
                "apiGroups": ["coordination.k8s.io"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"],
                "resources": ["leases"],
            }],
        }],
    });
    let hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    assert_eq!(cluster.server.admin("POST", hooks, Some(&webhook)).await.unwrap().0, 201);
    let text = cause(Cause::Server).await;
    assert!(text.contains("webhook"), "{text}");
    assert_eq!(cluster.server.admin("DELETE", &format!("{hooks}/dead"), None).await.unwrap().0, 200);
    well().await;

    // The namespace is being deleted: nothing is made in it any more.
    assert_eq!(cluster.server.admin("DELETE", "/api/v1/namespaces/peili", None).await.unwrap().0, 200);
    assert_eq!(cluster.server.admin("DELETE", LEASE, None).await.unwrap().0, 200);
    cause(Cause::NoNamespace).await;

    cluster.server.stop_hard(Part::Server);
    let text = cause(Cause::Refused).await;
    assert!(text.contains(&cluster.server.address().to_string()), "{text}");
    assert!(!one.driving.is_finished(), "and nothing ends it");
}

/// What one server is asked by 500 nodes, counted by its audit log: steady, while it is gone, and when it is back.
async fn many() {
    const NODES: u64 = 500;
    let mut cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow(&["get", "update", "watch"], true).await;
    let folder = cluster.credentials("account").await;
    let start =
        |name: String, standing| Candidate::start(cluster.lock(Kind::Lease, &folder), &name, standing);
    let candidates: Vec<Candidate> =
        (0..5).map(|rank| start(format!("c{rank}"), Standing::Candidate(rank))).collect();
    let observer = Standing::Observer(NODES * 1_000);
    let mut observers: Vec<Candidate> = (5..NODES).map(|n| start(format!("o{n}"), observer)).collect();
    let all: Vec<&Candidate> = candidates.iter().collect();
    leader(&all, D + SOON).await.unwrap();
    let count = |cluster: &Cluster| cluster.server.requests(|request| request.user == USER).unwrap().len();

    let (before, start_of_it) = (count(&cluster), Instant::now());
    sleep(Duration::from_secs(15)).await;
    let steady = (count(&cluster) - before) as f64 / start_of_it.elapsed().as_secs_f64();
    println!("{NODES} nodes ask {steady:.2} times a second");
    assert!(steady <= 2.5, "two a second, of which 15 s show 30");

    // Gone for so long that each node has noticed, which in this test is soon.
    cluster.server.stop_hard(Part::Server);
    for observer in &observers {
        observer.strict.stand(Standing::Observer(2_000));
    }
    drop(std::mem::take(&mut observers));
    let start =
        |name: String, standing| Candidate::start(cluster.lock(Kind::Lease, &folder), &name, standing);
    observers.extend((5..NODES).map(|n| start(format!("p{n}"), Standing::Observer(2_000))));
    wait::until("each has noticed", Duration::from_secs(60), async || {
        observers.iter().all(|one| one.strict.state().fault.is_some()).then_some(())
    })
    .await
    .unwrap();
    observers.iter().for_each(|one| one.strict.stand(observer));
    sleep(Duration::from_secs(4)).await;
    let before = count(&cluster);
    cluster.server.start_again().await.unwrap();
    leader(&candidates.iter().collect::<Vec<_>>(), SOON).await.unwrap();
    // As elections do it, when a member says that it has found the server again (`election.rs`).
    let spread = Duration::from_millis(150) * u32::try_from(NODES).unwrap();
    observers.iter().for_each(|one| one.strict.hint(spread));
    let mut counts = vec![before];
    for _ in 0..6 {
        sleep(Duration::from_secs(5)).await;
        counts.push(count(&cluster));
    }
    let rates: Vec<f64> = counts.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 5.0).collect();
    println!("back: {rates:?} times a second, of 5 s each");
    // The first has what the candidates asked while it started.
    assert!(rates[1..].iter().all(|rate| *rate <= 12.0), "{rates:?}");
    let found = observers.iter().filter(|one| one.strict.state().reached == Some(true)).count();
    assert!(found >= 100, "{found} of {NODES} have found it after 30 s");
}
