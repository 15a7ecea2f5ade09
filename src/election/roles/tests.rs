//! The engine, with the time in hand and policies that are functions.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;
use crate::election::members::Facts;
use crate::oci::Home;
use crate::policy::Failure;
use crate::policy::election::{Handover, Reachability, Why};

mod rolling;

const SECOND: Duration = Duration::from_secs(1);
const MARK: EffectiveHash = EffectiveHash([7; 32]);

pub(in crate::election) fn id(n: u32) -> PeerId {
    // 52 characters of base58, sorted by number.
    let digits = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let (high, low) = (digits[(n / 58) as usize] as char, digits[(n % 58) as usize] as char);
    format!("12D3KooW{}{high}{low}", "x".repeat(42)).parse().unwrap()
}

fn member(n: u32) -> Member {
    Member {
        id: id(n),
        name: format!("node-{n}"),
        zone: format!("zone-{}", n % 3),
        version: "1".into(),
        facts: Facts { policy: Mark::of(&MARK), ..Facts::default() },
        suspected: None,
    }
}

/// Policies that say what a test wants.
#[derive(Default)]
struct Ranks {
    ranked: Mutex<Ranked>,
    generation: Mutex<i64>,
    asked: Mutex<usize>,
    /// What they are; `None`: [`MARK`].
    hash: Mutex<Option<EffectiveHash>>,
}

impl Ranks {
    fn say(&self, weights: &[u32]) {
        *self.ranked.lock().unwrap() = Ranked {
            weights: Some(weights.to_vec()),
            why: Why::Policies(vec!["p".into()]),
            ..Ranked::default()
        };
        *self.generation.lock().unwrap() += 1;
    }

    /// They are others from now on.
    fn carry(&self, hash: EffectiveHash) {
        *self.hash.lock().unwrap() = Some(hash);
    }

    fn fail(&self) {
        let why = Why::Failed("p".into(), Failure::Time);
        *self.ranked.lock().unwrap() = Ranked { why, ..Ranked::default() };
        *self.generation.lock().unwrap() += 1;
    }
}

impl ElectionPolicy for Ranks {
    fn is_active(&self) -> bool {
        *self.generation.lock().unwrap() > 0
    }

    fn generation(&self) -> i64 {
        *self.generation.lock().unwrap()
    }

    fn rank(&self, _: &policies::View) -> Ranked {
        *self.asked.lock().unwrap() += 1;
        self.ranked.lock().unwrap().clone()
    }

    fn hash(&self, _: Option<&[u8]>) -> EffectiveHash {
        let is_fault = self.ranked.lock().unwrap().why.is_fault();
        if is_fault { EffectiveHash::BUILT_IN } else { self.hash.lock().unwrap().unwrap_or(MARK) }
    }
}

struct Bench {
    ranks: Arc<Ranks>,
    roles: Roles,
    config: Config,
    known: usize,
    lease: Option<Lease>,
}

impl Bench {
    /// The node number `here`.
    fn new(here: u32) -> Self {
        let ranks = Arc::new(Ranks::default());
        let hash = Arc::clone(&ranks);
        let roles = Roles::new(id(here), Arc::clone(&ranks) as _, move || hash.hash(None));
        Self { ranks, roles, config: Config::default(), known: 1, lease: None }
    }

    fn at(&mut self, seconds: u32, members: &[Member]) -> Output {
        let alone = Alone::Unreached;
        let (known, lease) = (self.known, self.lease.clone());
        let input =
            Input { now: seconds * SECOND, members: members.to_vec(), complete: true, alone, known, lease };
        self.roles.evaluate(&self.config, input)
    }
}

fn by(output: &Output, role: Role) -> (By, String) {
    let status = output.table.status(Backend::Auto, &[]);
    let role = status.roles.into_iter().find(|known| known.role == role.name()).unwrap();
    (role.by, role.fallback)
}

#[test]
fn the_book_names_introducers_and_then_this_node_and_others() {
    let members: Vec<Member> = (0..20).map(member).collect();
    let mut bench = Bench::new(19);
    bench.config.introducers = 2;
    let table = bench.at(0, &members).table;
    let (book, introducers) = (table.book(), table.introducers());
    assert_eq!((book.len(), &book[..2]), (5, &introducers[..]));
    assert!(book.contains(&id(19)));
    let mut once = book.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), 5, "{book:?}");
    assert_eq!(bench.at(10, &members[19..]).table.book(), [id(19)]);
}

/// Two nodes that see the same members in another order agree on everything.
#[test]
fn nodes_agree_and_few_keys_move() {
    let members: Vec<Member> = (0..50).map(member).collect();
    let reversed: Vec<Member> = members.iter().rev().cloned().collect();
    let (mut a, mut b) = (Bench::new(0), Bench::new(49));
    let (first, second) = (a.at(0, &members), b.at(0, &reversed));
    assert_eq!(first.table.opinion(), second.table.opinion());
    assert_eq!(first.table.introducers(), second.table.introducers());
    let who = |output: &Output, here: u32, key: u32| match output.table.home(&key.to_be_bytes()) {
        Home::Here => id(here),
        Home::Peer(id) => id,
        Home::Nobody => panic!("nobody"),
    };
    assert!((0..1000).all(|key| who(&first, 0, key) == who(&second, 49, key)));

    let fewer: Vec<Member> = members.iter().filter(|member| member.id != id(7)).cloned().collect();
    let after = a.at(1, &fewer);
    let moved: Vec<u32> = (0..10_000).filter(|key| who(&first, 0, *key) != who(&after, 0, *key)).collect();
    assert!(moved.iter().all(|key| who(&first, 0, *key) == id(7)), "only those of who is gone");
    assert!((100..300).contains(&moved.len()), "{} of 10,000, a fiftieth are 200", moved.len());
    assert_ne!(first.table.opinion(), after.table.opinion());
}

#[test]
fn introducers_are_of_different_zones_and_stay() {
    let mut bench = Bench::new(0);
    let members: Vec<Member> = (0..9).map(member).collect();
    let output = bench.at(0, &members);
    let held = output.table.introducers();
    let zones: std::collections::BTreeSet<&str> = members
        .iter()
        .filter(|member| held.contains(&member.id))
        .map(|member| member.zone.as_str())
        .collect();
    assert_eq!((held.len(), zones.len()), (3, 3));
    // More members: whoever is better must be so for a while.
    let more: Vec<Member> = (0..40).map(member).collect();
    let later = bench.at(1, &more);
    assert_eq!(later.table.introducers(), held);
    assert_eq!(later.due, Some(6 * SECOND));
    assert!(!later.changed.contains(&Role::Introducers));
    let settled = bench.at(6, &more);
    assert_ne!(settled.table.introducers(), held);
    assert_eq!(settled.changed, [Role::Introducers]);
    // One zone, unknown: there are still three.
    let unknown: Vec<Member> = (0..9).map(|n| Member { zone: String::new(), ..member(n) }).collect();
    assert_eq!(Bench::new(0).at(0, &unknown).table.introducers().len(), 3);
}

#[test]
fn who_is_silent_leads_nothing() {
    let mut bench = Bench::new(0);
    let mut members: Vec<Member> = (0..3).map(member).collect();
    bench.at(0, &members);
    members[1].suspected = Some(Duration::from_millis(100));
    let output = bench.at(1, &members);
    assert_eq!((output.table.members(), output.due), (3, Some(SECOND + Duration::from_millis(400))));
    members[1].suspected = Some(Duration::from_millis(500));
    let output = bench.at(2, &members);
    assert_eq!(output.table.members(), 2);
    assert!(!output.table.introducers().contains(&id(1)));
    // Who stood still is not without itself.
    members[0].suspected = Some(SECOND);
    assert!(bench.at(3, &members).table.holds(Role::TagHome));
}

#[test]
fn policies_rank_where_two_thirds_carry_them_for_a_while() {
    let mut bench = Bench::new(0);
    let members: Vec<Member> = (0..4).map(member).collect();
    assert_eq!(by(&bench.at(0, &members), Role::TagHome), (By::BuiltIn, String::new()), "there is no policy");
    bench.ranks.say(&[0, 0, 0, 5]);
    // The others have carried it for long enough, which is more than two thirds of four.
    let mut members = members;
    assert_eq!(by(&bench.at(21, &members), Role::TagHome).0, By::Policy);
    assert_eq!(bench.at(21, &members).table.home(b"key"), Home::Peer(id(3)));
    assert_eq!(bench.at(21, &members).table.introducers(), [id(3)], "who is excluded sits no more");
    // Two of four are not enough, and that counts at once.
    for other in [1, 2] {
        members[other].facts.policy = Mark([1; 16]);
    }
    let output = bench.at(22, &members);
    assert_eq!(
        (by(&output, Role::TagHome), output.mark),
        ((By::BuiltIn, "disagreement".into()), Mark::of(&MARK))
    );
    assert_eq!(output.table.carry(), 2);
    // Nor are three where one has carried it for too short a time.
    members[1].facts.policy = Mark::of(&MARK);
    assert_eq!(by(&bench.at(30, &members), Role::TagHome).0, By::BuiltIn);
    let output = bench.at(39, &members);
    assert_eq!((by(&output, Role::TagHome).0, output.due), (By::BuiltIn, Some(40 * SECOND)));
    assert_eq!(by(&bench.at(40, &members), Role::TagHome).0, By::Policy);
}

#[test]
fn two_thirds_are_not_more_than_two_thirds() {
    let mut bench = Bench::new(0);
    let mut members: Vec<Member> = (0..3).map(member).collect();
    members[2].facts.policy = Mark::default();
    bench.ranks.say(&[1, 1, 1]);
    for second in [0, 60] {
        let output = bench.at(second, &members);
        assert_eq!(by(&output, Role::TagHome), (By::BuiltIn, "disagreement".into()));
    }
}

#[test]
fn a_policy_that_fails_is_the_built_in_for_all_and_is_tried_again() {
    let mut bench = Bench::new(0);
    let members: Vec<Member> = (0..3).map(member).collect();
    bench.ranks.say(&[0, 0, 5]);
    bench.at(0, &members);
    assert_eq!(by(&bench.at(10, &members), Role::TagHome).0, By::Policy);
    bench.ranks.fail();
    let output = bench.at(11, &members);
    assert_eq!((by(&output, Role::TagHome), output.mark), ((By::BuiltIn, "failed".into()), Mark::default()));
    let asked = || *bench.ranks.asked.lock().unwrap();
    let before = asked();
    let ranks = Arc::clone(&bench.ranks);
    let asked = || *ranks.asked.lock().unwrap();
    bench.at(70, &members);
    assert_eq!(asked(), before, "nothing has changed");
    bench.at(71, &members);
    assert_eq!(asked(), before + 2, "after a minute it is tried again");
}

#[test]
fn policies_are_asked_when_something_has_changed_and_not_before() {
    let mut bench = Bench::new(0);
    let mut members: Vec<Member> = (0..3).map(member).collect();
    bench.ranks.say(&[1, 1, 1]);
    let ranks = Arc::clone(&bench.ranks);
    let asked = || std::mem::take(&mut *ranks.asked.lock().unwrap());
    bench.at(0, &members);
    assert_eq!(asked(), 2);
    members[1].facts.policy = Mark::default();
    bench.at(1, &members);
    assert_eq!(asked(), 0, "who carries what is no fact about candidates");
    members[1].facts.labels = BTreeMap::from([("a".into(), "b".into())]);
    bench.at(2, &members);
    assert_eq!(asked(), 2);
    // A wrong length is worth nothing, where all carry the policies.
    members[1].facts.policy = Mark::of(&MARK);
    bench.at(3, &members);
    assert_eq!(by(&bench.at(20, &members), Role::TagHome).0, By::Policy);
    bench.ranks.say(&[1]);
    assert_eq!(by(&bench.at(21, &members), Role::TagHome).0, By::BuiltIn);
}

#[test]
fn the_configuration_names_them_or_nobody() {
    let mut bench = Bench::new(0);
    let members: Vec<Member> = (0..6).map(member).collect();
    bench.config = Config {
        backend: Backend::Static,
        nodes: vec!["node-4".into(), "node-9".into(), "node-1".into()],
        introducers: 1,
        ..Config::default()
    };
    let output = bench.at(0, &members);
    assert_eq!(output.table.introducers(), [id(4)], "the first one that lives");
    let homes: std::collections::HashSet<Home> =
        (0..100_u32).map(|key| output.table.home(&key.to_be_bytes())).collect();
    assert_eq!(homes, [Home::Peer(id(4)), Home::Peer(id(1))].into());
    let left: Vec<Member> = members.iter().filter(|member| member.id != id(4)).cloned().collect();
    assert_eq!(bench.at(1, &left).table.introducers(), [id(1)]);
    bench.config = Config { backend: Backend::Off, ..Config::default() };
    let output = bench.at(2, &members);
    assert_eq!((output.table.home(b"k"), output.table.introducers()), (Home::Nobody, vec![]));
    assert_eq!(output.table.mode(), Mode::Off);
}

#[test]
fn alone_is_a_state_with_a_cause() {
    let mut bench = Bench::new(0);
    let output = bench.at(0, &[member(0)]);
    assert_eq!(output.table.mode(), Mode::Alone(Alone::Unreached));
    assert_eq!(output.table.home(b"k"), Home::Here);
    assert_eq!(bench.at(1, &[member(0), member(1)]).table.mode(), Mode::Gossip);
}

#[test]
fn what_is_explained_is_what_is_held() {
    let mut bench = Bench::new(0);
    let members: Vec<Member> = (0..30).map(member).collect();
    let output = bench.at(0, &members);
    let explained = output.table.explain(Role::TagHome, Some("docker.io/library/nginx:1.27"), Vec::new());
    let holder = match output.table.home(b"docker.io/library/nginx:1.27") {
        Home::Here => id(0),
        Home::Peer(id) => id,
        Home::Nobody => panic!("nobody"),
    };
    assert_eq!(explained.owners[0].id, holder.to_string());
    assert_eq!(
        (explained.candidates[0].id.clone(), explained.candidates[0].holds),
        (holder.to_string(), true)
    );
    assert_eq!(explained.candidates.len(), 20);
    let explained = output.table.explain(Role::Introducers, None, Vec::new());
    assert_eq!(explained.owners.len(), 3);
    assert_eq!(explained.candidates.iter().filter(|standing| standing.holds).count(), 3);
    let explained = output.table.explain(Role::Coordinator, None, Vec::new());
    assert!(explained.owners.is_empty() && !explained.candidates.iter().any(|standing| standing.holds));
}

#[test]
fn a_long_tenure_counts_for_a_minute() {
    let mut bench = Bench::new(0);
    bench.config.introducers = 1;
    let members: Vec<Member> = (0..3).map(member).collect();
    let say = |bench: &Bench, weights: [u32; 3]| {
        bench.ranks.say(&weights);
        bench.ranks.ranked.lock().unwrap().min_tenure = Some(Duration::from_secs(3600));
    };
    say(&bench, [9, 1, 1]);
    bench.at(0, &members);
    // Whoever the built-in chose has no tenure to serve.
    bench.at(10, &members);
    assert_eq!(bench.at(80, &members).table.introducers(), [id(0)]);
    say(&bench, [1, 9, 1]);
    bench.at(81, &members);
    assert_eq!(bench.at(85, &members).table.introducers(), [id(0)]);
    let due = bench.at(85, &members).due;
    assert!(due.is_some_and(|due| due <= 141 * SECOND), "{due:?}");
    assert_eq!(bench.at(141, &members).table.introducers(), [id(1)]);
}

fn lease(holder: Option<u32>, tenure: u32) -> Option<Lease> {
    Some(Lease {
        relied_on: true,
        cause: Cause::Starting,
        holder: holder.map(id),
        tenure: tenure * SECOND,
        members: 0,
        free: Duration::ZERO,
        duration: 6 * SECOND,
    })
}

/// The parts of all nodes for the strict role, by their numbers.
fn standings(members: &[Member]) -> Vec<Standing> {
    let numbers = 0..u32::try_from(members.len()).unwrap();
    let standing = |n| {
        let mut bench = Bench::new(n);
        bench.lease = lease(None, 0);
        bench.at(0, members).standing.unwrap()
    };
    numbers.map(standing).collect()
}

#[test]
fn five_stand_for_the_strict_role_in_one_order_and_the_others_ask_once_a_second_together() {
    let members: Vec<Member> = (0..50).map(member).collect();
    let all = standings(&members);
    let mut ranks: Vec<u32> = all
        .iter()
        .filter_map(|standing| match standing {
            Standing::Candidate(rank) => Some(*rank),
            Standing::Observer(pause) => {
                assert_eq!(*pause, 50_000);
                None
            }
        })
        .collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [0, 1, 2, 3, 4]);
    let three = standings(&members[..3]);
    assert!(three.iter().all(|standing| matches!(standing, Standing::Candidate(_))));
    // Without a lease nobody stands.
    assert_eq!(Bench::new(0).at(0, &members).standing, None);
}

/// The case that this project comes from: some nodes cannot reach the API server.
#[test]
fn who_does_not_reach_the_api_server_does_not_stand_unless_nobody_does() {
    let mut members: Vec<Member> = (0..8).map(member).collect();
    for member in &mut members[..6] {
        member.facts.api_server = Reachability::Unreachable;
    }
    let all = standings(&members);
    let stands = |standing: &Standing| matches!(standing, Standing::Candidate(_));
    assert_eq!(all.iter().map(stands).collect::<Vec<_>>(), [[false; 6].as_slice(), &[true; 2]].concat());
    for member in &mut members[6..] {
        member.facts.api_server = Reachability::Unreachable;
    }
    assert_eq!(standings(&members).iter().filter(|standing| stands(standing)).count(), 5);
}

/// Where nodes cannot see each other, each would take itself for the first: about five of them stand all the same.
#[test]
fn of_many_nodes_that_are_alone_some_stand() {
    let standing = |n: u32, known: usize, said: u32| {
        let mut bench = Bench::new(n);
        bench.known = known;
        bench.lease = lease(None, 0).map(|lease| Lease { members: said, ..lease });
        bench.at(10, &[member(n)]).standing.unwrap()
    };
    assert_eq!(standing(1, 1, 0), Standing::Candidate(0), "a cluster of one");
    for (known, said) in [(500, 0), (1, 500)] {
        let stand = (0..500).filter(|n| matches!(standing(*n, known, said), Standing::Candidate(_))).count();
        assert!((1..=15).contains(&stand), "{stand} of 500");
    }
    assert!((0..500).any(|n| standing(n, 500, 0) == Standing::Observer(500_000)));
    // Beside somebody who leads and cannot be seen, nobody stands who knows of no others.
    let mut bench = Bench::new(1);
    bench.lease = lease(Some(2), 0);
    assert_eq!(bench.at(10, &[member(1)]).standing, Some(Standing::Observer(30_000)));
}

/// Whoever may write the lease can have nodes ask seldom, and neither never again nor have nobody stand.
#[test]
fn what_a_lease_says_of_members_is_believed_within_bounds() {
    let mut bench = Bench::new(0);
    let written =
        |free: u32| lease(None, 0).map(|lease| Lease { members: u32::MAX, free: free * SECOND, ..lease });
    bench.lease = written(0);
    assert_eq!(bench.at(10, &[member(0)]).standing, Some(Standing::Observer(10_000_000)));
    bench.lease = written(480);
    assert!(matches!(bench.at(500, &[member(0)]).standing, Some(Standing::Candidate(_))), "nobody else does");
    let members: Vec<Member> = (0..8).map(member).collect();
    let observer = (0..8).find_map(|n| {
        let mut bench = Bench::new(n);
        bench.lease = written(0);
        match bench.at(0, &members).standing {
            Some(Standing::Observer(pause)) => Some(pause),
            _ => None,
        }
    });
    assert_eq!(observer, Some(10_000_000));
}

/// Handover and tenure are the policy's, also where the leader is no longer among the five best.
#[test]
fn a_leader_that_is_outranked_by_five_keeps_what_it_has() {
    let members: Vec<Member> = (0..8).map(member).collect();
    let mut bench = Bench::new(0);
    bench.ranks.say(&[1, 9, 9, 9, 9, 9, 9, 9]);
    for second in 0..60 {
        bench.lease = lease(Some(0), second);
        let output = bench.at(second, &members);
        assert!(matches!(output.standing, Some(Standing::Candidate(_))) && !output.yields, "{second}");
    }
}

/// It makes no room for one that says that it could not lead.
#[test]
fn a_leader_makes_no_room_for_whoever_cannot_reach_the_api_server() {
    let mut members: Vec<Member> = (0..3).map(member).collect();
    members[1].facts.api_server = Reachability::Unreachable;
    let mut bench = Bench::new(0);
    bench.ranks.say(&[5, 9, 1]);
    bench.ranks.ranked.lock().unwrap().handover = Some(Handover::Now);
    for second in 0..60 {
        bench.lease = lease(Some(0), second);
        assert!(!bench.at(second, &members).yields, "{second}");
    }
}

#[test]
fn a_node_that_has_just_started_waits_for_others() {
    let mut bench = Bench::new(0);
    bench.lease = lease(None, 0);
    let input = |now: u32, bench: &mut Bench| {
        let input = Input {
            now: now * SECOND,
            members: vec![member(0)],
            complete: false,
            alone: Alone::Unreached,
            known: 1,
            lease: bench.lease.clone(),
        };
        bench.roles.evaluate(&bench.config, input)
    };
    let early = input(4, &mut bench);
    assert_eq!((early.standing, early.due), (None, Some(5 * SECOND)));
    assert_eq!(input(5, &mut bench).standing, Some(Standing::Candidate(0)));
}

#[test]
fn a_leader_makes_room_as_its_policies_say() {
    let members: Vec<Member> = (0..3).map(member).collect();
    let best = |bench: &mut Bench, n: usize, handover: Option<Handover>, min_tenure: Option<Duration>| {
        let mut weights = [1; 3];
        weights[n] = 500;
        bench.ranks.say(&weights);
        let mut ranked = bench.ranks.ranked.lock().unwrap();
        (ranked.handover, ranked.min_tenure) = (handover, min_tenure);
    };
    for (handover, tenure, at) in [
        (None, None, None),
        (Some(Handover::Never), None, None),
        (Some(Handover::Now), None, Some(16)),
        (Some(Handover::Idle), None, Some(23)),
        (Some(Handover::Now), Some(SECOND * 40), Some(41)),
    ] {
        let mut bench = Bench::new(0);
        best(&mut bench, 1, handover, tenure);
        let mut yields = None;
        for second in 0..60 {
            bench.lease = lease(Some(0), second);
            // Policies rank from second 10 on, when they have been carried for long enough.
            if bench.at(second, &members).yields {
                yields.get_or_insert(second);
            }
        }
        let close = |at: u32| yields.is_some_and(|second| second.abs_diff(at) <= 1);
        assert!(at.map_or(yields.is_none(), close), "{handover:?} {tenure:?}: {yields:?}");
        // Who does not lead has nothing to give.
        let mut bench = Bench::new(2);
        best(&mut bench, 1, handover, tenure);
        for second in 0..60 {
            bench.lease = lease(Some(0), second);
            assert!(!bench.at(second, &members).yields);
        }
    }
}

#[test]
fn modes_say_whether_the_lease_is_relied_on() {
    let members: Vec<Member> = (0..3).map(member).collect();
    let mode = |lease: Option<Lease>, members: &[Member]| {
        let mut bench = Bench::new(0);
        bench.lease = lease;
        bench.at(0, members).table.mode()
    };
    let degraded = |cause| lease(None, 0).map(|lease| Lease { relied_on: false, cause, ..lease });
    assert_eq!(mode(lease(None, 0), &members), Mode::Lease);
    assert_eq!(mode(degraded(Cause::Timeout), &members), Mode::Degraded(Cause::Timeout));
    assert_eq!(mode(None, &members), Mode::Gossip);
    assert_eq!(mode(degraded(Cause::Timeout), &members[..1]), Mode::Alone(Alone::Unreached));
    assert!(!Mode::Degraded(Cause::Timeout).remedy().is_empty());
    // Another backend has no lease.
    let mut bench = Bench::new(0);
    (bench.lease, bench.config.backend) = (lease(None, 0), Backend::Gossip);
    let output = bench.at(0, &members);
    assert_eq!((output.table.mode(), output.standing), (Mode::Gossip, None));
}

/// Who reads the lease twice a minute would rely on it for as long after the API server went.
#[test]
fn who_reads_seldom_knows_by_the_holder_that_the_lease_is_lost() {
    let mut members: Vec<Member> = (0..8).map(member).collect();
    let mode = |here: usize, members: &[Member]| {
        let mut bench = Bench::new(u32::try_from(here).unwrap());
        bench.lease = lease(Some(1), 60);
        bench.at(0, members).table.mode()
    };
    assert!((0..8).all(|here| mode(here, &members) == Mode::Lease));
    members[1].facts.api_server = Reachability::Unreachable;
    let all = standings(&members);
    let (mut lost, mut kept) = (0, 0);
    for here in (0..8).filter(|here| *here != 1) {
        match (mode(here, &members), all[here]) {
            (Mode::Degraded(Cause::NoLeader), Standing::Observer(_)) => lost += 1,
            // It sees for itself.
            (Mode::Lease, Standing::Candidate(_)) => kept += 1,
            (mode, standing) => panic!("{here}: {mode:?} {standing:?}"),
        }
    }
    assert_eq!((lost, kept), (2, 5));
}
