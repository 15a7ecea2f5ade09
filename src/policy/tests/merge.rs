//! Chains of verdicts that are made up: what wins, and that one more policy never loosens a constraint.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::request;
use crate::oci::Level;
use crate::policy::chain::{Answers, Chain, Entry, Quarantine};
use crate::policy::metrics::Metrics;
use crate::policy::registry::{
    Decision, Merge, Plan, Registry, Request, Route, Ruling, Source, TagResolution, Upstream, Verdict, Way,
};
use crate::policy::world::World as _;
use crate::policy::{Failing, Failure, Mode, Reason};

fn plan() -> impl Strategy<Value = Plan> {
    let resolution = prop_oneof![
        Just(TagResolution::Peers),
        Just(TagResolution::Home),
        Just(TagResolution::Revalidated),
        Just(TagResolution::UpstreamOnly),
    ];
    let level = prop_oneof![Just(Level::None), Just(Level::Introduce), Just(Level::Blobs), Just(Level::Tags)];
    let upstream = Source::Upstream(Route { upstream: "corp".into(), repository: None });
    let source = prop_oneof![Just(Source::Peers), Just(upstream), Just(Source::Origin)];
    let parts = (
        option::of(vec(source, 0..3)),
        any::<(bool, bool, bool, bool)>(),
        option::of(resolution),
        option::of(0_u64..10),
        option::of(level),
        option::of(1_u32..5),
    );
    parts.prop_map(|(sources, flags, tag_resolution, age, min_trust, max_fan_out)| Plan {
        sources,
        without_peers: flags.0,
        without_upstreams: flags.1,
        without_origin: flags.2,
        always_verify: flags.3,
        tag_resolution,
        max_tag_age: age.map(Duration::from_secs),
        min_trust,
        max_fan_out,
    })
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let decision = prop_oneof![
        3 => Just(Decision::Abstain),
        6 => plan().prop_map(Decision::Mirror),
        1 => Just(Decision::Bypass),
        1 => Just(Decision::Deny),
    ];
    decision.prop_map(|decision| Verdict { decision, reason: None })
}

fn ruling(verdicts: &[Verdict]) -> Ruling {
    let mut merge = Merge::default();
    for (number, verdict) in verdicts.iter().enumerate() {
        merge.add(&Arc::from(format!("policy-{number}")), verdict.clone());
    }
    merge.ruling()
}

/// Peili's own way is stricter than to ask peers always.
fn rank(resolution: Option<TagResolution>) -> u8 {
    match resolution {
        Some(TagResolution::Peers) => 0,
        None => 1,
        Some(TagResolution::Home) => 2,
        Some(TagResolution::Revalidated) => 3,
        Some(TagResolution::UpstreamOnly) => 4,
    }
}

/// A limit that is none is the loosest.
fn at_most<T: PartialOrd>(tighter: Option<T>, looser: Option<T>) -> bool {
    match (tighter, looser) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(tighter), Some(looser)) => tighter <= looser,
    }
}

proptest! {
    /// DESIGN.md, "Policies": any deny wins, else the first bypass or mirror; of each constraint the strictest.
    #[test]
    fn one_more_policy_never_loosens_anything(verdicts in vec(verdict(), 0..6), more in verdict()) {
        let before = ruling(&verdicts);
        let after = ruling(&[&verdicts[..], &[more]].concat());
        let alone = before.by.is_none();
        match (before.way, after.way) {
            (Way::Deny(_), after) => prop_assert!(matches!(after, Way::Deny(_))),
            (Way::Bypass, after) => prop_assert!(!matches!(after, Way::Mirror(_))),
            (Way::Mirror(_), Way::Deny(_) | Way::Bypass) => {}
            (Way::Mirror(before), Way::Mirror(after)) => {
                prop_assert!(before.sources.is_none() || before.sources == after.sources);
                prop_assert!(after.without_peers >= before.without_peers);
                prop_assert!(after.without_upstreams >= before.without_upstreams);
                prop_assert!(after.without_origin >= before.without_origin);
                prop_assert!(after.always_verify >= before.always_verify);
                // The first that mirrors may say that peers are asked; none that comes after it.
                prop_assert!(alone || rank(after.tag_resolution) >= rank(before.tag_resolution));
                prop_assert!(after.min_trust >= before.min_trust);
                prop_assert!(at_most(after.max_tag_age, before.max_tag_age));
                prop_assert!(at_most(after.max_fan_out, before.max_fan_out));
                if before.sources.is_some() {
                    prop_assert!(before.asks_peers() >= after.asks_peers());
                    prop_assert!(before.routes().count() >= after.routes().count());
                    prop_assert!(before.leaves_to_origin() >= after.leaves_to_origin());
                }
            }
        }
    }
}

#[test]
fn what_wins_is_said() {
    let of = |decision| Verdict { decision, reason: None };
    let deny = |code: &str| Verdict {
        decision: Decision::Deny,
        reason: Some(Reason { code: code.into(), message: String::new() }),
    };
    let mirror = of(Decision::Mirror(Plan::default()));
    let first = ruling(&[of(Decision::Abstain), mirror.clone(), of(Decision::Bypass)]);
    assert_eq!((first.way, first.by.as_deref()), (Way::Mirror(Plan::default()), Some("policy-1")));
    let first = ruling(&[of(Decision::Bypass), mirror]);
    assert_eq!((first.way, first.by.as_deref()), (Way::Bypass, Some("policy-0")));
    let denied = ruling(&[of(Decision::Bypass), deny("a"), deny("b")]);
    assert!(matches!(&denied.way, Way::Deny(reason) if reason.code == "a"), "{denied:?}");
    assert_eq!(denied.by.as_deref(), Some("policy-1"));
    assert_eq!(ruling(&[of(Decision::Abstain)]), Ruling::default());
}

/// Answers by a function.
struct Fake<F>(F);

impl<F: Fn(&Request) -> Result<Verdict, Failure> + Send + Sync> Answers<Registry> for Fake<F> {
    fn decide(&self, request: &Request, _: Instant) -> Result<Verdict, Failure> {
        (self.0)(request)
    }
}

fn entry(
    mode: Mode,
    failing: Failing,
    answer: impl Fn(&Request) -> Result<Verdict, Failure> + Send + Sync + 'static,
) -> Entry<Registry> {
    Entry {
        name: "fake".into(),
        mode,
        failing,
        time: None,
        policy: Box::new(Fake(answer)),
        metrics: Metrics::default().of::<Registry>("fake"),
        quarantine: Quarantine::default(),
    }
}

#[test]
fn a_monitor_changes_nothing() {
    let deny = |_: &Request| Ok(Verdict { decision: Decision::Deny, reason: None });
    let chain = Chain::new(vec![entry(Mode::Monitor, Failing::Deny, deny)]);
    assert_eq!(chain.decide(&request("a/b"), |_, _, _| {}), Ruling::default());
}

/// An input on which a policy traps is asked about once a second from the third on, and has the same verdict all the while; no
/// other input is touched, however many are crafted.
#[tokio::test]
async fn quarantine_is_not_an_off_switch() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let traps = move |request: &Request| {
        if request.name.repository.as_str().starts_with("bad/") {
            counted.fetch_add(1, Ordering::Relaxed);
            Err(Failure::Trap("told to".into()))
        } else {
            Ok(Verdict { decision: Decision::Abstain, reason: None })
        }
    };
    let chain = Chain::new(vec![entry(Mode::Enforce, Failing::Deny, traps)]);
    let bad = |number: usize| {
        let ruling = chain.decide(&request(&format!("bad/n{number}")), |_, _, _| {});
        assert!(matches!(ruling.way, Way::Deny(reason) if reason.code == "policy-failed"));
        assert_eq!(chain.decide(&request("good/one"), |_, _, _| {}), Ruling::default());
        calls.load(Ordering::Relaxed)
    };
    assert_eq!(
        (bad(0), bad(0), bad(1), bad(2)),
        (1, 2, 3, 4),
        "below three distinct ones all are asked about"
    );
    assert_eq!((bad(0), bad(1), bad(2)), (4, 4, 4), "those are held");
    assert_eq!(bad(3), 5, "another one is not");
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!((bad(0), bad(0)), (6, 6), "once a second");
    for number in 4..3000 {
        bad(number);
    }
}

/// Guards that a plan names what the operator configured and nothing else: the address is the operator's, so is the prefix.
#[test]
fn a_plan_names_only_upstreams_of_the_configuration() {
    let request = Request {
        upstreams: [Upstream {
            name: "corp".into(),
            repositories: ["hub/library".to_owned(), "team".to_owned()].into(),
            ..Upstream::default()
        }]
        .into(),
        ..request("team/app")
    };
    let check = |upstream: &str, repository: Option<&str>| {
        let route =
            Route { upstream: upstream.into(), repository: repository.map(|name| name.parse().unwrap()) };
        let plan = Plan { sources: Some(vec![Source::Peers, Source::Upstream(route)]), ..Plan::default() };
        Registry::check(&request, &Verdict { decision: Decision::Mirror(plan), reason: None })
    };
    assert_eq!(check("corp", None), Ok(()));
    assert_eq!(check("corp", Some("hub/library/nginx")), Ok(()));
    for (upstream, repository) in
        [("other", None), ("corp", Some("hub/librarys/nginx")), ("corp", Some("hub")), ("", Some("team"))]
    {
        assert!(check(upstream, repository).is_err(), "{upstream} {repository:?}");
    }
}

/// What comes after the registry, which the runtime asks itself, is never asked.
#[test]
fn steps_end_at_the_registry() {
    let corp = Source::Upstream(Route { upstream: "corp".into(), repository: None });
    let plan = |sources: &[Source]| Plan { sources: Some(sources.to_vec()), ..Plan::default() };
    let steps = |plan: &Plan| plan.steps().cloned().collect::<Vec<_>>();
    let [peers, origin] = [Source::Peers, Source::Origin];
    assert_eq!(steps(&Plan::default()), std::slice::from_ref(&peers));
    let all = plan(&[corp.clone(), peers.clone(), origin.clone()]);
    assert_eq!(steps(&all), [corp.clone(), peers.clone()]);
    assert!(steps(&plan(&[origin, corp.clone(), peers.clone()])).is_empty());
    assert_eq!(steps(&Plan { without_upstreams: true, ..all.clone() }), [peers]);
    assert_eq!(steps(&Plan { without_peers: true, ..all }), [corp]);
}
