//! Several drivers on one lease in memory, with short times.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::{Instant, sleep};

use super::*;
use crate::election::lease::Ms;

/// The duration of the lease here.
const FAST: Duration = Duration::from_millis(1_500);
/// For what a busy machine adds.
const SLACK: Duration = Duration::from_millis(700);

fn settings() -> Settings {
    Settings::new(1_500, 300)
}

/// Counts who works, and finds two at once.
#[derive(Clone, Default)]
struct Work {
    at_once: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    panics: bool,
    returns: bool,
}

struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Duty for Work {
    async fn lead(&self, guard: Guard) {
        let count = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        let _working = Working(Arc::clone(&self.at_once));
        self.most.fetch_max(count, Ordering::SeqCst);
        sleep(FAST / 6).await;
        assert!(!self.panics, "as it was told");
        if !self.returns {
            std::future::pending::<()>().await;
        }
        drop(guard);
    }
}

struct Node {
    strict: Strict,
    lock: Memory,
    task: tokio_util::task::AbortOnDropHandle<()>,
}

struct Bench {
    lease: Memory,
    work: Work,
}

impl Bench {
    fn new() -> Self {
        Self { lease: Memory::default(), work: Work::default() }
    }

    fn node(&self, name: &str, standing: Standing) -> Node {
        self.node_that(name, standing, self.work.clone())
    }

    fn node_that(&self, name: &str, standing: Standing, work: Work) -> Node {
        let lock = self.lease.handle();
        let parts = Parts {
            lock: Arc::new(lock.clone()),
            clock: Arc::new(BootClock),
            duty: Arc::new(work),
            metrics: LeaseMetrics::default(),
            seed: 7,
        };
        let (strict, driver) = Strict::new(name, &settings(), parts);
        strict.stand(standing);
        let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(driver.run()));
        Node { strict, lock, task }
    }

    fn now(&self) -> Ms {
        BootClock.now()
    }

    /// Waits until it is so, and says how long that took.
    async fn until(&self, what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
            sleep(Duration::from_millis(10)).await;
        }
        start.elapsed()
    }
}

impl Node {
    fn leads(&self, now: Ms) -> bool {
        self.strict.state().leadership.is_some_and(|leadership| leadership.check(now).is_some())
    }
}

#[tokio::test]
async fn one_of_three_leads_and_hands_over_at_once_when_asked() {
    let bench = Bench::new();
    let nodes: Vec<Node> = (0..3).map(|n| bench.node(&format!("n{n}"), Standing::Candidate(n))).collect();
    let took = bench.until("a leader", 2 * FAST, || nodes.iter().any(|node| node.leads(bench.now()))).await;
    assert!(took >= FAST, "an object that was made anew may replace one with a holder: {took:?}");
    sleep(4 * FAST).await;
    assert!(nodes[0].leads(bench.now()), "rank 0 is first");
    assert!(nodes.iter().all(|node| node.strict.state().relied_on));
    let state = nodes[2].strict.state();
    assert_eq!((state.holder.as_deref(), state.reached, state.free), (Some("n0"), Some(true), false));

    let start = Instant::now();
    assert!(nodes[0].strict.leave(false).await);
    let took = bench.until("the next", FAST, || nodes[1].leads(bench.now())).await;
    assert!(start.elapsed() < Duration::from_millis(350) + SLACK, "rank 1 waits 300 ms: {took:?}");
    assert!(!nodes[0].leads(bench.now()));
    // Whoever leaves for good has given it away when it says so.
    assert!(nodes[1].strict.leave(true).await);
    assert!(bench.lease.stored().unwrap().0.record.is_released());
    bench.until("the last one", FAST, || nodes[2].leads(bench.now())).await;
    assert_eq!(bench.work.most.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_leader_that_is_cut_off_stops_before_another_begins_and_comes_back() {
    for trouble in [Trouble::Dropped, Trouble::Refused] {
        let bench = Bench::new();
        let (first, second) =
            (bench.node("a", Standing::Candidate(0)), bench.node("b", Standing::Candidate(1)));
        bench.until("a leads", 2 * FAST, || first.leads(bench.now())).await;
        sleep(FAST).await;
        first.lock.trouble(trouble.clone());
        let stops = bench.until("a stops", FAST, || !first.leads(bench.now())).await;
        assert!(stops <= Duration::from_millis(977) + SLACK, "{trouble:?}: {stops:?}");
        let starts = bench.until("b leads", 3 * FAST, || second.leads(bench.now())).await;
        assert!(!first.leads(bench.now()), "{trouble:?}");
        assert!(stops + starts <= 3 * FAST, "{trouble:?}: {starts:?}");
        sleep(FAST).await;
        let state = first.strict.state();
        // That it is out of reach is told after five seconds.
        assert!(!state.relied_on && state.reached.is_none(), "{trouble:?}: {state:?}");
        first.lock.trouble(Trouble::None);
        sleep(3 * FAST).await;
        let state = first.strict.state();
        assert_eq!((state.relied_on, state.holder.as_deref()), (true, Some("b")), "{trouble:?}");
        assert_eq!(bench.work.most.load(Ordering::SeqCst), 1, "{trouble:?}");
    }
}

/// Whose writes are carried out without an answer takes no term from them, and loses none that others could have.
#[tokio::test]
async fn answers_that_are_lost_make_no_second_leader() {
    let bench = Bench::new();
    let (first, second) = (bench.node("a", Standing::Candidate(0)), bench.node("b", Standing::Candidate(1)));
    bench.until("a leads", 2 * FAST, || first.leads(bench.now())).await;
    first.lock.trouble(Trouble::Deaf);
    sleep(2 * FAST).await;
    assert!(!first.leads(bench.now()) && !second.leads(bench.now()));
    first.lock.trouble(Trouble::None);
    let any = || first.leads(bench.now()) || second.leads(bench.now());
    bench.until("one leads", 3 * FAST, any).await;
    assert_eq!(bench.work.most.load(Ordering::SeqCst), 1);
}

/// As after a SIGSTOP, until the driver runs again.
#[tokio::test]
async fn a_term_whose_time_is_over_is_not_told_of() {
    let bench = Bench::new();
    let node = bench.node("a", Standing::Candidate(0));
    bench.until("it leads", 2 * FAST, || node.leads(bench.now())).await;
    node.task.abort();
    assert!(node.strict.state().leadership.is_some());
    bench.until("it is over", 2 * FAST, || node.strict.state().leadership.is_none()).await;
}

/// All lose the server and find it again: a leader stands soon after, without a restart.
#[tokio::test]
async fn after_an_outage_a_leader_stands_soon() {
    let bench = Bench::new();
    let nodes: Vec<Node> = (0..3).map(|n| bench.node(&format!("n{n}"), Standing::Candidate(n))).collect();
    sleep(4 * FAST).await;
    for node in &nodes {
        node.lock.trouble(Trouble::Dropped);
    }
    bench.until("nobody leads", FAST, || !nodes.iter().any(|node| node.leads(bench.now()))).await;
    sleep(Duration::from_secs(7)).await;
    assert!(nodes.iter().all(|node| node.strict.state().reached == Some(false)));
    for node in &nodes {
        node.lock.trouble(Trouble::None);
    }
    // A knock each second, and what is drawn after it.
    let limit = Duration::from_secs(1) + FAST / 3 + SLACK;
    bench.until("a leader", limit, || nodes.iter().any(|node| node.leads(bench.now()))).await;
    sleep(3 * FAST).await;
    assert!(nodes.iter().all(|node| node.strict.state().relied_on));
}

#[tokio::test]
async fn what_may_not_be_written_stays_wrong_while_it_can_be_read() {
    let bench = Bench::new();
    let node = bench.node("a", Standing::Candidate(0));
    node.lock.trouble(Trouble::ReadOnly);
    sleep(4 * FAST).await;
    let state = node.strict.state();
    assert_eq!((state.cause(), state.reached, state.relied_on), (Cause::Forbidden, Some(true), false));
    node.lock.trouble(Trouble::None);
    bench.until("it leads", 4 * FAST, || node.leads(bench.now())).await;
    assert!(node.strict.state().fault.is_none());
}

/// A leader whose work has died is none.
#[tokio::test]
async fn work_that_ends_by_itself_gives_the_lease_away() {
    for panics in [true, false] {
        let bench = Bench::new();
        let broken = Work { panics, returns: !panics, ..bench.work.clone() };
        let first = bench.node_that("a", Standing::Candidate(0), broken);
        let second = bench.node("b", Standing::Candidate(1));
        bench.until("b leads", 4 * FAST, || second.leads(bench.now())).await;
        assert!(!first.leads(bench.now()) && !first.task.is_finished());
        assert_eq!(bench.work.most.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn an_observer_asks_seldom_and_a_deleted_lease_ends_the_term_at_once() {
    let bench = Bench::new();
    let observer = bench.node("o", Standing::Observer(300));
    sleep(Duration::from_secs(3)).await;
    let calls = bench.lease.calls();
    assert!((5..=20).contains(&calls), "{calls} in ten times its pause");
    assert!(bench.lease.stored().is_none(), "it writes nothing");
    let leader = bench.node("a", Standing::Candidate(0));
    bench.until("a leads", 2 * FAST, || leader.leads(bench.now())).await;
    sleep(FAST).await;
    assert_eq!(observer.strict.state().holder.as_deref(), Some("a"));
    // It knows of no renewal between two reads, and does not take that for a lease without a holder.
    observer.strict.stand(Standing::Observer(5_000));
    sleep(2 * FAST).await;
    assert!(!observer.strict.state().free);
    bench.lease.delete();
    let took = bench.until("the term ends", FAST, || !leader.leads(bench.now())).await;
    assert!(took <= Duration::from_millis(100) + SLACK, "{took:?}");
    leader.strict.stand(Standing::Observer(30_000));
    sleep(2 * FAST).await;
    assert!(!leader.leads(bench.now()));
}

/// What is not said is that there is nothing to give away.
#[tokio::test]
async fn nothing_waits_for_a_role_that_was_never_held() {
    let bench = Bench::new();
    let node = bench.node("a", Standing::Observer(30_000));
    assert!(node.strict.leave(false).await);
    assert!(node.strict.leave(true).await);
    let (strict, driver) = Strict::new(
        "x",
        &settings(),
        Parts {
            lock: Arc::new(Memory::default()),
            clock: Arc::new(BootClock),
            duty: Arc::new(Idle),
            metrics: LeaseMetrics::default(),
            seed: 1,
        },
    );
    let _driving = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(driver.run()));
    assert!(strict.leave(false).await, "before it knows where it stands");
}

/// Whoever ends takes nothing any more: another that ends gives its lease away beside it.
#[tokio::test]
async fn whoever_leaves_for_good_does_not_take_what_another_gives_away() {
    let bench = Bench::new();
    let (first, second) = (bench.node("a", Standing::Candidate(0)), bench.node("b", Standing::Candidate(1)));
    bench.until("a leads", 2 * FAST, || first.leads(bench.now())).await;
    assert!(second.strict.leave(true).await);
    assert!(first.strict.leave(true).await);
    sleep(2 * FAST).await;
    assert!(!second.leads(bench.now()));
    assert!(bench.lease.stored().unwrap().0.record.is_released());
}
