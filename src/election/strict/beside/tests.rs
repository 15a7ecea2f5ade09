//! Two locks in memory, with short times; what comes before what is written down by the locks and the work themselves.

use std::sync::Mutex;

use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::election::lease::{Answer, Mark, Object, Write};
use crate::election::strict::{BootClock, Cause, Change, Clock, Fault, LeaseMetrics, Memory, Reply, Trouble};

/// The duration of both locks here.
const D: Duration = Duration::from_millis(1_500);
/// For what a busy machine adds.
const SLACK: Duration = Duration::from_millis(700);

type Log = Arc<Mutex<Vec<String>>>;

/// A lock that writes down what is put there.
struct Noted {
    name: &'static str,
    lock: Memory,
    log: Log,
}

#[async_trait]
impl Lock for Noted {
    async fn get(&self, limit: Duration) -> Reply {
        self.lock.get(limit).await
    }

    async fn create(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        self.lock.create(write, notes, limit).await
    }

    async fn put(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        if self.name == "Lease" && write.mark.released {
            // Whoever does not wait for it is faster.
            sleep(D / 15).await;
        }
        let reply = self.lock.put(write, notes, limit).await;
        if matches!(reply.answer, Answer::Object(_)) && (write.begins || write.mark.released) {
            let what = if write.begins { "taken" } else { "given away" };
            self.log.lock().unwrap().push(format!("{} {what} by {}", self.name, write.mark.writer));
        }
        reply
    }

    async fn watch(&self, version: u64, changes: mpsc::Sender<Change>) -> Result<(), Fault> {
        self.lock.watch(version, changes).await
    }

    async fn knock(&self, limit: Duration) -> bool {
        self.lock.knock(limit).await
    }

    fn name(&self) -> String {
        self.name.into()
    }

    fn place(&self) -> String {
        self.lock.place()
    }
}

/// Writes down when it begins and ends, and whether two are at it.
struct Work {
    here: &'static str,
    log: Log,
    returns: bool,
}

struct Working(String, Log);

impl Drop for Working {
    fn drop(&mut self) {
        self.1.lock().unwrap().push(format!("{} stops", self.0));
    }
}

#[async_trait]
impl Duty for Work {
    async fn lead(&self, guard: Guard) {
        assert!(guard.check(BootClock.now()).is_some());
        self.log.lock().unwrap().push(format!("{} works", self.here));
        let _working = Working(self.here.into(), Arc::clone(&self.log));
        if !self.returns {
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Default)]
struct Bench {
    old: Memory,
    lease: Memory,
    log: Log,
}

struct Node {
    strict: Strict,
    old: Memory,
    lease: Memory,
    _driving: AbortOnDropHandle<()>,
}

impl Bench {
    fn node(&self, how: Beside, here: &'static str, rank: u32, returns: bool) -> Node {
        let (old, lease) = (self.old.handle(), self.lease.handle());
        let noted =
            |name, lock: &Memory| Arc::new(Noted { name, lock: lock.clone(), log: Arc::clone(&self.log) });
        let parts = Parts {
            lock: noted("Lease", &lease),
            clock: Arc::new(BootClock),
            duty: Arc::new(Work { here, log: Arc::clone(&self.log), returns }),
            metrics: LeaseMetrics::default(),
            seed: 7,
        };
        let settings = Settings::new(1_500, 300);
        let (strict, pair) = Strict::beside(here, &settings, how, noted("ConfigMap", &old), parts);
        strict.stand(Standing::Candidate(rank));
        Node { strict, old, lease, _driving: AbortOnDropHandle::new(tokio::spawn(pair.run())) }
    }

    /// A node that has the Lease alone.
    fn alone(&self, here: &'static str) -> (Strict, AbortOnDropHandle<()>) {
        let parts = Parts {
            lock: Arc::new(self.lease.handle()),
            clock: Arc::new(BootClock),
            duty: Arc::new(Idle),
            metrics: LeaseMetrics::default(),
            seed: 7,
        };
        let (strict, driver) = Strict::new(here, &Settings::new(1_500, 300), parts);
        strict.stand(Standing::Candidate(0));
        (strict, AbortOnDropHandle::new(tokio::spawn(driver.run())))
    }

    fn said(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// An elector of old takes the ConfigMap, or renews it.
    async fn foreign(&self, sequence: u64) -> Object {
        let seen = self.old.stored().map(|(object, _)| object);
        let write = Write {
            uid: seen.as_ref().map_or_else(|| "".into(), |object| Arc::clone(&object.uid)),
            version: seen.as_ref().map_or(0, |object| object.version),
            holder: "spegel".into(),
            duration: 1_000,
            transitions: 9,
            mark: Mark { writer: "nobody".into(), sequence, duration: 1_000, released: false },
            begins: true,
        };
        let (notes, limit) = (Notes::default(), Duration::from_secs(1));
        let reply = match seen {
            Some(_) => self.old.put(&write, &notes, limit).await,
            None => self.old.create(&write, &notes, limit).await,
        };
        match reply.answer {
            Answer::Object(object) => object,
            other => panic!("{other:?}"),
        }
    }
}

impl Node {
    fn leads(&self) -> bool {
        self.strict.state().leadership.is_some_and(|guard| guard.check(BootClock.now()).is_some())
    }
}

async fn until(what: &str, limit: Duration, is_so: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_holds_both_leads_and_gives_away_the_configmap_last() {
    let bench = Bench::default();
    let first = bench.node(Beside::Held, "a", 0, false);
    let second = bench.node(Beside::Held, "b", 1, false);
    until("a leads", 4 * D, || first.leads()).await;
    assert_eq!(bench.said(), ["ConfigMap taken by a", "Lease taken by a", "a works"]);
    let state = second.strict.state();
    assert_eq!(&*state.lock, "Lease");
    until("b knows", 2 * D, || second.strict.state().holder.as_deref() == Some("a")).await;
    assert_eq!(second.strict.state().beside.unwrap().holder.as_deref(), Some("a"));
    until("all rely on it", 4 * D, || second.strict.state().relied_on && first.strict.state().relied_on)
        .await;

    assert!(first.strict.leave(false).await);
    until("b leads", 2 * D, || second.leads()).await;
    assert_eq!(
        bench.said(),
        [
            "a stops",
            "Lease given away by a",
            "ConfigMap given away by a",
            "ConfigMap taken by b",
            "Lease taken by b",
            "b works"
        ]
    );
    // As an observer it makes room in the same order.
    second.strict.stand(Standing::Observer(60_000));
    until("a leads again", 4 * D, || first.leads()).await;
    assert_eq!(bench.said()[..3], ["b stops", "Lease given away by b", "ConfigMap given away by b"]);
    assert!(first.strict.leave(true).await);
    assert_eq!(bench.said(), ["a stops", "Lease given away by a", "ConfigMap given away by a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_one_of_both_leads_no_more() {
    let bench = Bench::default();
    let node = bench.node(Beside::Held, "a", 0, false);
    until("a leads", 4 * D, || node.leads()).await;
    let guard = node.strict.state().leadership.unwrap();
    bench.said();
    bench.foreign(1).await;
    let took = until("it stops", SLACK, || guard.check(BootClock.now()).is_none()).await;
    println!("stopped after {took:?}");
    until("the Lease is given away", D, || bench.said().contains(&"Lease given away by a".into())).await;
    let state = node.strict.state();
    assert!(!state.free && state.leadership.is_none());
    until("it says who leads", D, || node.strict.state().holder.as_deref() == Some("spegel")).await;
}

/// The Lease cannot be written while the ConfigMap can: the term ends in its time, and the ConfigMap goes to another node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_hold_the_lease_gives_the_configmap_away() {
    let bench = Bench::default();
    let first = bench.node(Beside::Held, "a", 0, false);
    let second = bench.node(Beside::Held, "b", 1, false);
    until("a leads", 4 * D, || first.leads()).await;
    first.lease.trouble(Trouble::ReadOnly);
    until("b leads", 5 * D, || second.leads()).await;
    assert!(!first.leads());
    let said = bench.said();
    let at =
        |what: &str| said.iter().position(|line| line == what).unwrap_or_else(|| panic!("{what}: {said:?}"));
    assert!(
        at("a stops") < at("ConfigMap given away by a") && at("ConfigMap taken by b") < at("b works"),
        "{said:?}"
    );
}

/// Whoever never gets the Lease does not keep the ConfigMap from those who could.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_gets_the_lease_gives_the_configmap_away() {
    let never = async |trouble| {
        let bench = Bench::default();
        let first = bench.node(Beside::Held, "a", 0, false);
        first.lease.trouble(trouble);
        let holds = || first.strict.state().beside.is_some_and(|old| old.leadership.is_some());
        until("a holds the ConfigMap", 4 * D, holds).await;
        let second = bench.node(Beside::Held, "b", 1, false);
        until("b leads", 2 * D + PATIENCE + 5 * D, || second.leads()).await;
        assert!(!first.leads() && !holds());
    };
    // It sees that nobody has the Lease, or nothing of it.
    tokio::join!(never(Trouble::ReadOnly), never(Trouble::Refused));
}

/// As long as somebody else has the Lease alone, as nodes of the last step do, whoever holds the ConfigMap goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_anothers_lease_keeps_the_configmap() {
    let bench = Bench::default();
    let alone = bench.alone("c");
    until("c leads", 4 * D, || alone.0.state().leadership.is_some()).await;
    let both = bench.node(Beside::Held, "a", 0, false);
    let holds = || both.strict.state().beside.is_some_and(|old| old.leadership.is_some());
    until("a holds the ConfigMap", 4 * D, holds).await;
    sleep(2 * D + PATIENCE + D).await;
    assert!(holds() && !both.leads() && alone.0.state().leadership.is_some());
    let state = both.strict.state();
    assert_eq!(state.own.unwrap().holder.as_deref(), Some("c"));
    drop(alone);
    until("a leads", 4 * D, || both.leads()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_ends_by_itself_goes_to_another_node() {
    let bench = Bench::default();
    let first = bench.node(Beside::Held, "a", 0, true);
    let second = bench.node(Beside::Held, "b", 1, false);
    until("b leads", 8 * D, || second.leads()).await;
    assert!(!first.leads());
}

/// After an outage of both the same node leads on soon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_both_are_held_again_soon() {
    let bench = Bench::default();
    let node = bench.node(Beside::Held, "a", 0, false);
    until("a leads", 4 * D, || node.leads()).await;
    for lock in [&node.old, &node.lease] {
        lock.trouble(Trouble::Dropped);
    }
    until("nobody leads", D, || !node.leads()).await;
    sleep(3 * D).await;
    for lock in [&node.old, &node.lease] {
        lock.trouble(Trouble::None);
    }
    let took = until("a leads again", 2 * D + Duration::from_secs(1) + SLACK, || node.leads()).await;
    println!("led again after {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_stands_for_the_lease_while_the_observed_lock_is_held() {
    let bench = Bench::default();
    let mut last = bench.foreign(0).await;
    let node = bench.node(Beside::Observed, "a", 0, false);
    for sequence in 1..=10 {
        sleep(D / 2).await;
        last = bench.foreign(sequence).await;
    }
    let state = node.strict.state();
    assert_eq!((state.holder.as_deref(), state.free), (Some("spegel"), false));
    assert_eq!(bench.said(), [] as [String; 0]);
    // Its last renewal was 1 s and what a client-go may err by ago.
    let took = until("a leads", Duration::from_secs(11 + 4) + 3 * D, || node.leads()).await;
    assert!(took > Duration::from_secs(11) - SLACK, "{took:?}");
    assert_eq!(bench.said(), ["Lease taken by a", "a works"]);
    assert_eq!(bench.old.stored().unwrap().0, last, "it is never written");
    // It comes back, and Peili makes room.
    bench.foreign(11).await;
    let took = until("a makes room", Duration::from_secs(5) + SLACK, || !node.leads()).await;
    println!("made room after {took:?}");
    until("the Lease is given away", D, || bench.said().contains(&"Lease given away by a".into())).await;
    node.old.trouble(Trouble::Refused);
    sleep(2 * D).await;
    assert!(!node.leads());
}

/// Where the lock of old is not there, or has no holder, the Lease is taken as ever; where it cannot be read, nobody can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_observed_lock_that_is_not_there_keeps_nobody_back() {
    let bench = Bench::default();
    let node = bench.node(Beside::Observed, "a", 0, false);
    node.old.trouble(Trouble::Refused);
    sleep(4 * D).await;
    assert!(!node.leads() && bench.lease.stored().is_none());
    assert_eq!(node.strict.state().cause(), Cause::Refused);
    node.old.trouble(Trouble::None);
    until("a leads", 2 * Duration::from_millis(OFTEN) + 2 * D, || node.leads()).await;
    assert!(bench.old.stored().is_none());
}

#[test]
fn an_observed_lock_that_was_not_read_just_now_says_nothing() {
    let state = |free, read| State { free, read, ..State::default() };
    assert!(is_free(&state(true, Some(0)), false) && is_free(&state(true, Some(STALE - 1)), false));
    assert!(!is_free(&state(false, Some(0)), false) && !is_free(&state(true, None), false));
    assert!(!is_free(&state(true, Some(STALE)), false), "as after a pause of this process");
    let fault = Some(Fault::new(Cause::Timeout, "no connection"));
    let failing = State { fault, ..state(true, Some(0)) };
    assert!(!is_free(&failing, false));
    assert!(is_free(&failing, true), "whoever leads goes on");
    assert!(!is_free(&state(true, Some(STALE)), true), "but not for ever");
}
