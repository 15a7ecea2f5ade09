//! The judge with policies and facts that are made up.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};

use super::*;
use crate::policy::trust::{Conduct, Grant, Request, Ruling, TTL_LIMIT, TrustPolicy, Way};
use crate::policy::{Failure, Node, Reason};

type Answer = Box<dyn Fn(&Request) -> Way + Send>;

/// Answers by a function.
struct Fake {
    answer: Mutex<Answer>,
    generation: AtomicI64,
    active: AtomicBool,
    calls: AtomicUsize,
}

impl TrustPolicy for Fake {
    fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    fn enforces(&self) -> bool {
        self.is_active()
    }

    fn generation(&self) -> i64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn evaluate(&self, request: &Request) -> Ruling {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ruling { way: (self.answer.lock().unwrap())(request), by: Some("fake".into()) }
    }
}

#[derive(Default)]
struct Known(Mutex<Vec<Fact>>);

impl Facts for Known {
    fn facts(&self) -> Vec<Fact> {
        self.0.lock().unwrap().clone()
    }
}

struct Court {
    trust: Arc<PinnedTrust>,
    policy: Arc<Fake>,
    known: Arc<Known>,
    judge: Judge,
    now: Instant,
}

impl Court {
    fn new(answer: impl Fn(&Request) -> Way + Send + 'static) -> Self {
        let trust = Arc::new(PinnedTrust::new(Config::default(), [peer(PEER), peer(OTHER)]).unwrap());
        let policy = Arc::new(Fake {
            answer: Mutex::new(Box::new(answer)),
            generation: AtomicI64::new(1),
            active: AtomicBool::new(true),
            calls: AtomicUsize::new(0),
        });
        let known = Arc::new(Known(Mutex::new(vec![fact(PEER), fact(OTHER)])));
        let judge = Judge::new(Arc::clone(&trust), Arc::clone(&policy) as _, Arc::clone(&known) as _);
        trust.judge_first(true);
        Self { trust, policy, known, judge, now: Instant::now() }
    }

    fn answers(&self, answer: impl Fn(&Request) -> Way + Send + 'static) {
        *self.policy.answer.lock().unwrap() = Box::new(answer);
    }

    /// Looks, so many milliseconds later; tells whether anything changed.
    fn look(&mut self, later: u64) -> bool {
        self.now += Duration::from_millis(later);
        let changed = self.judge.look(self.now) != Changed::Of(Vec::new());
        // What was given meanwhile stands from then on.
        self.now += Duration::from_millis(1);
        changed
    }

    fn levels(&self, id: &str) -> [Level; 5] {
        let table = self.trust.table.load();
        ACTIONS.map(|action| self.trust.level_at(&table, &peer(id), action, self.now))
    }

    fn calls(&self) -> usize {
        self.policy.calls.swap(0, Ordering::Relaxed)
    }
}

fn fact(id: &str) -> Fact {
    Fact {
        id: peer(id),
        node: Node { id: id.into(), name: id[..12].into(), ..Node::default() },
        observed: vec![],
        announced: vec![],
        conduct: Conduct::default(),
    }
}

fn all(level: Level) -> Grant {
    Grant { level, serve: true, max_uploads: None, max_upload_rate: None, ttl: Duration::from_mins(1) }
}

fn deny(_: &Request) -> Way {
    Way::Deny(Duration::from_secs(10), Reason { code: "no".into(), message: "it may not".into() })
}

const INTRODUCED: [Level; 5] = [Level::Introduce; 5];

/// Guards that nobody gets anything before it was judged, and no more than admission gives after it.
#[test]
fn who_was_not_judged_is_introduced_at_most() {
    let mut court = Court::new(|_| Way::Allow(all(Level::Tags)));
    assert_eq!(court.levels(PEER), INTRODUCED);
    assert!(!court.trust.serves(&peer(PEER), &"ghcr.io/a/b".parse().unwrap()));
    assert!(!court.trust.is_unproved(&peer(PEER)), "it is a member all the same");
    assert!(court.trust.is_unjudged(&peer(PEER)), "and may get more in a moment");
    assert!(court.look(0));
    let granted = [Level::Tags, Level::Tags, Level::Blobs, Level::Tags, Level::Tags];
    assert_eq!(court.levels(PEER), granted);
    assert!(!court.look(10), "nothing is new");
    // Not listed any more: a grant is none without admission.
    assert!(court.trust.replace(Config::default(), [peer(OTHER)]).unwrap());
    assert_eq!(court.levels(PEER), [Level::None; 5]);
    assert!(court.trust.replace(Config::default(), Peers::default()).unwrap());
    assert_eq!(court.levels(PEER), [Level::Blobs; 5], "an open network has no tags to grant");
}

#[test]
fn a_grant_limits_each_action() {
    let limits =
        Grant { level: Level::Introduce, max_uploads: Some(2), max_upload_rate: Some(9), ..all(Level::None) };
    let mut court = Court::new(move |_| Way::Allow(limits));
    court.look(0);
    let [connect, believe, serve, fetch, tags] = court.levels(PEER);
    assert_eq!([connect, believe, fetch, tags], [Level::Introduce; 4]);
    assert_eq!(serve, Level::Blobs, "what goes to it is another matter");
    assert_eq!(
        court.trust.upload_limits(&peer(PEER)),
        UploadLimits { at_once: Some(2), per_second: Some(9) }
    );
    court.policy.generation.store(2, Ordering::Relaxed);
    court.answers(|_| Way::Allow(Grant { serve: false, ..all(Level::Blobs) }));
    assert!(court.look(10));
    assert_eq!(
        court.levels(PEER),
        [Level::Blobs, Level::Blobs, Level::Introduce, Level::Blobs, Level::Blobs]
    );
}

/// A denial stands for its time, whatever the peer says of itself meanwhile, and is gone with other policies.
#[test]
fn a_denial_stands_for_its_time() {
    let mut court = Court::new(deny);
    assert!(court.look(0));
    assert_eq!(court.levels(PEER), [Level::None; 5]);
    assert_eq!(court.calls(), 2);
    let problems = court.trust.grants.problems(court.now);
    assert!(problems.iter().any(|text| text.contains(PEER) && text.contains("it may not")), "{problems:?}");
    court.answers(|_| Way::BuiltIn);
    court.known.0.lock().unwrap()[0].node.name = "another".into();
    assert!(!court.look(9_000));
    assert_eq!(court.calls(), 0);
    assert!(court.look(1_500));
    assert_eq!((court.levels(PEER), court.calls()), ([Level::Tags; 5], 2));
    court.answers(deny);
    court.policy.generation.store(2, Ordering::Relaxed);
    assert!(court.look(10), "other policies act at once");
    court.policy.active.store(false, Ordering::Relaxed);
    assert!(court.look(10));
    assert_eq!(court.levels(PEER), [Level::Tags; 5], "without policies admission decides");
    assert!(!court.look(10));
}

/// Policies that are only watched are asked, and decide nothing.
#[test]
fn a_monitor_is_asked_and_decides_nothing() {
    struct Watched(AtomicUsize);
    impl TrustPolicy for Watched {
        fn is_active(&self) -> bool {
            true
        }
        fn enforces(&self) -> bool {
            false
        }
        fn generation(&self) -> i64 {
            1
        }
        fn evaluate(&self, _: &Request) -> Ruling {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ruling { way: Way::BuiltIn, by: None }
        }
    }
    let court = Court::new(deny);
    let watched = Arc::new(Watched(AtomicUsize::new(0)));
    let judge =
        Judge::new(Arc::clone(&court.trust), Arc::clone(&watched) as _, Arc::clone(&court.known) as _);
    court.trust.judge_first(false);
    for _ in 0..3 {
        assert_ne!(judge.look(court.now), Changed::All);
        assert_eq!(court.levels(PEER), [Level::Tags; 5]);
        assert!(!court.trust.is_unjudged(&peer(PEER)));
    }
    assert_eq!(watched.0.load(Ordering::Relaxed), 2, "once each");
}

/// Guards that a peer is judged again when its facts change, and when its grant is about to end; not more often.
#[test]
fn who_is_judged_again() {
    let mut court = Court::new(|_| Way::Allow(all(Level::Tags)));
    court.look(0);
    assert_eq!(court.calls(), 2);
    court.look(250);
    court.known.0.lock().unwrap()[0].conduct.bytes = 1 << 30;
    court.look(250);
    assert_eq!(court.calls(), 0, "that it gives content is no news");
    court.known.0.lock().unwrap()[0].conduct.digest_mismatches = 1;
    court.look(250);
    assert_eq!(court.calls(), 1);
    court.look(44_500);
    assert_eq!(court.calls(), 1, "the other one's grant is about to end");
    assert_eq!(court.levels(OTHER)[0], Level::Tags, "and no moment is without one");
}

/// Guards `failed`: the last grant stands until its end, a newcomer gets nothing.
#[test]
fn where_a_policy_fails_a_grant_stands_to_its_end() {
    let mut court = Court::new(|request| match request.peer.id.as_str() {
        PEER => Way::Allow(all(Level::Tags)),
        _ => Way::Failed(Failure::Time),
    });
    court.look(0);
    assert_eq!((court.levels(PEER)[3], court.levels(OTHER)), (Level::Tags, INTRODUCED));
    court.answers(|_| Way::Failed(Failure::Time));
    court.policy.generation.store(2, Ordering::Relaxed);
    assert!(!court.look(1_500), "its standing is the same");
    assert_eq!((court.levels(PEER)[3], court.levels(OTHER)), (Level::Tags, INTRODUCED));
    let problems = court.trust.grants.problems(court.now);
    assert!(
        problems.iter().any(|text| text.contains(PEER) && text.contains("its time was up")),
        "{problems:?}"
    );
    court.calls();
    court.look(100);
    assert_eq!(court.calls(), 0, "once a second");
    court.look(57_000);
    assert_eq!(court.levels(PEER)[3], Level::Tags);
    court.look(2_000);
    assert_eq!(court.levels(PEER), INTRODUCED, "its time is over");
    court.answers(|_| Way::BuiltIn);
    assert!(court.look(1_100));
    assert_eq!((court.levels(PEER), court.levels(OTHER)), ([Level::Tags; 5], [Level::Tags; 5]));
}

/// Guards `FAILURES`: peers on which a policy fails cost the others neither their judgement nor its time.
#[test]
fn failures_do_not_starve_others() {
    let mut court = Court::new(|request| match request.peer.name.as_str() {
        "bad" => Way::Failed(Failure::Memory),
        _ => Way::BuiltIn,
    });
    let id = |number: usize| format!("{}{}", "1".repeat(42), format!("{number:03}").replace('0', "a"));
    let bad = (0..200)
        .map(|number| Fact { node: Node { name: "bad".into(), ..Node::default() }, ..fact(&id(number)) });
    let bad: Vec<Fact> = bad.collect();
    let listed = bad.iter().map(|fact| fact.id.clone()).chain([peer(PEER), peer(OTHER)]);
    court.trust.replace(Config::default(), Peers::from(listed.collect::<Vec<_>>())).unwrap();
    *court.known.0.lock().unwrap() = [&bad[..], &[fact(PEER), fact(OTHER)]].concat();
    let mut looks = 0;
    while court.levels(PEER)[0] != Level::Tags {
        court.look(20);
        looks += 1;
        assert!(court.calls() <= super::super::judge::FAILURES + 2 && looks <= 21, "{looks}");
    }
    // All of them are due again: who is new comes before them.
    let new = id(999);
    let listed = bad.iter().map(|fact| fact.id.clone()).chain([peer(&new)]);
    court.trust.replace(Config::default(), Peers::from(listed.collect::<Vec<_>>())).unwrap();
    court.known.0.lock().unwrap().push(fact(&new));
    court.look(5000);
    assert_eq!(court.levels(&new)[0], Level::Tags);
    let listed = bad.iter().map(|fact| fact.id.clone()).chain([peer(PEER), peer(&new)]);
    court.trust.replace(Config::default(), Peers::from(listed.collect::<Vec<_>>())).unwrap();
    court.calls();
    for _ in 0..100 {
        court.look(250);
        assert!(court.calls() <= super::super::judge::FAILURES + 2);
        assert_eq!(court.levels(PEER)[0], Level::Tags);
    }
}

/// Issue 5: a reload re-evaluates 5,000 peers in less than a second. Here without the policies' own time (5 us each, measured).
#[test]
fn a_reload_judges_thousands() {
    let mut court = Court::new(|_| Way::Allow(all(Level::Tags)));
    let id = |number: usize| format!("{}{}", "1".repeat(40), format!("{number:05}").replace('0', "a"));
    let facts: Vec<Fact> = (0..5000).map(|number| fact(&id(number))).collect();
    let listed: Vec<PeerId> = facts.iter().map(|fact| fact.id.clone()).collect();
    court.trust.replace(Config::default(), Peers::from(listed)).unwrap();
    *court.known.0.lock().unwrap() = facts;
    court.look(0);
    court.policy.generation.store(2, Ordering::Relaxed);
    court.answers(|_| Way::Allow(Grant { ttl: TTL_LIMIT, ..all(Level::Blobs) }));
    court.calls();
    let began = std::time::Instant::now();
    assert!(court.look(10));
    println!("{:?} for {} peers", began.elapsed(), court.calls());
    assert_eq!(court.levels(&id(4999))[3], Level::Blobs);
}
