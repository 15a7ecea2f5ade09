//! The election world: what wins in a chain, and real components about clusters that are made up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::policy::election::{
    Candidate, EffectiveHash, Election, ElectionPolicy, Handover, Merge, Ranked, Ranking, Reachability, Role,
    RoleKind, Selection, TEXT_LIMIT, Tenure, View, Why,
};
use crate::policy::metrics::Metrics;
use crate::policy::world::World;
use crate::policy::{Config, Failing, Failure, Mode, Node, Plugin, Policies, Stage};

const CANDIDATES: usize = 4;

fn ranking() -> impl Strategy<Value = Ranking> {
    let weights = prop_oneof![
        1 => Just(Vec::new()),
        3 => vec(prop_oneof![1 => Just(0_u16), 4 => 1_u16..=1000], CANDIDATES)
            .prop_filter("all excluded", |weights| weights.iter().any(|weight| *weight > 0)),
    ];
    let handover = prop_oneof![Just(Handover::Never), Just(Handover::Idle), Just(Handover::Now)];
    (weights, option::of(1_u64..100), option::of(handover)).prop_map(|(weights, tenure, handover)| Ranking {
        weights,
        min_tenure: tenure.map(Duration::from_secs),
        handover,
        reason: None,
    })
}

fn ruling(answers: &[Result<Ranking, Failure>]) -> Ranked {
    let mut merge = Merge::default();
    for (number, answer) in answers.iter().enumerate() {
        Election::add(&mut merge, &Arc::from(format!("policy-{number}")), answer.clone(), Failing::Bypass);
    }
    Election::ruling(merge)
}

proptest! {
    /// DESIGN.md, "Policies": any 0 excludes, weights add up; tenure is the longest, handover the most reluctant.
    #[test]
    fn rankings_become_one(rankings in vec(ranking(), 0..6)) {
        let answers: Vec<_> = rankings.iter().cloned().map(Ok).collect();
        let ranked = ruling(&answers);
        let weighted: Vec<&Ranking> = rankings.iter().filter(|ranking| !ranking.weights.is_empty()).collect();
        let expected: Vec<u32> = (0..CANDIDATES)
            .map(|candidate| {
                let of = weighted.iter().map(|ranking| u32::from(ranking.weights[candidate]));
                if of.clone().any(|weight| weight == 0) { 0 } else { of.sum() }
            })
            .collect();
        if weighted.is_empty() {
            prop_assert_eq!(&ranked.weights, &None);
            prop_assert_eq!(&ranked.why, if rankings.is_empty() { &Why::NoPolicy } else { &Why::Abstained });
        } else if expected.iter().all(|weight| *weight == 0) {
            prop_assert_eq!(&ranked, &Ranked { why: Why::AllExcluded, ..Ranked::default() });
            return Ok(());
        } else {
            prop_assert_eq!(&ranked.weights, &Some(expected));
            prop_assert!(matches!(&ranked.why, Why::Policies(by) if by.len() == weighted.len()));
        }
        prop_assert_eq!(ranked.min_tenure, rankings.iter().filter_map(|ranking| ranking.min_tenure).max());
        prop_assert_eq!(ranked.handover, rankings.iter().filter_map(|ranking| ranking.handover).min());
    }

    /// One that fails leaves nothing of the others: half a chain would rank otherwise than a whole one elsewhere.
    #[test]
    fn one_that_fails_leaves_the_built_in(rankings in vec(ranking(), 0..4), place in 0_usize..4) {
        let mut answers: Vec<_> = rankings.into_iter().map(Ok).collect();
        let place = place.min(answers.len());
        answers.insert(place, Err(Failure::Fuel));
        let why = Why::Failed(format!("policy-{place}").into(), Failure::Fuel);
        prop_assert_eq!(ruling(&answers), Ranked { why, ..Ranked::default() });
    }
}

pub(super) fn plugin(component: &str, settings: Value) -> Plugin {
    Plugin::new(component, peili_lab::policy(component), settings)
}

fn guest(act: &str, on: &str) -> Plugin {
    plugin("testguests-election", json!({"act": act, "on": on}))
}

fn config(plugins: Vec<Plugin>) -> Config {
    Config { election: plugins, ..Config::default() }
}

pub(super) fn with(plugins: Vec<Plugin>) -> Policies {
    let policies = Policies::new(Node { name: "node-1".into(), ..Node::default() }, Metrics::default());
    policies.apply(&config(plugins)).unwrap();
    policies
}

/// Nodes whose first letter is their zone.
pub(super) fn view(names: &[&str]) -> View {
    let candidate = |name: &&str| Candidate {
        name: (*name).into(),
        version: "0.1.0".into(),
        zone: name.get(..1).map(Into::into),
        ..Candidate::default()
    };
    View {
        role: Role {
            name: "coordinator".into(),
            kind: RoleKind::Strict,
            selection: Selection::Ranked,
            seats: 1,
        },
        candidates: names.iter().map(candidate).collect(),
        holder: None,
    }
}

/// The ranking, and once more where the machine was too busy.
fn rank(policies: &Policies, view: &View) -> Ranked {
    let ranked = policies.rank(view);
    if matches!(ranked.why, Why::Failed(_, Failure::Time)) { policies.rank(view) } else { ranked }
}

#[test]
fn the_shipped_policies_rank_together() {
    skip_unless!("policy::tests::election::the_shipped_policies_rank_together", Components);
    let rules = json!({
        "rules": [{"label": "size", "value": "large", "weight": 500}],
        "min-tenure-seconds": 300,
        "handover": "idle",
    });
    let policies = with(vec![
        plugin("zone-spread", json!({"min-tenure-seconds": 60})),
        plugin("api-reachable", json!({})),
        plugin("prefer-labels", rules),
    ]);
    let mut view = view(&["a1", "a2", "b1", "c1"]);
    for (candidate, reach) in view.candidates.iter_mut().zip([
        Reachability::Reachable,
        Reachability::Reachable,
        Reachability::Unreachable,
        Reachability::Reachable,
    ]) {
        candidate.api_server = reach;
    }
    view.candidates[3].labels = BTreeMap::from([("size".into(), "large".into())]);
    view.holder = Some(Tenure { candidate: 0, duration: Duration::from_secs(100) });
    let ranked = rank(&policies, &view);
    assert_eq!(ranked.weights, Some(vec![1002, 1001, 0, 1501]), "{ranked}");
    assert_eq!((ranked.min_tenure, ranked.handover), (Some(Duration::from_mins(5)), Some(Handover::Idle)));
    let (explained, said) = policies.explain(&view);
    assert_eq!(explained, ranked);
    assert_eq!(said[0].verdict, "weights=1000,999,1000,1000 min-tenure=60s");
    assert_eq!(policies.loaded().len(), 3);
    assert_eq!(
        ranked.to_string(),
        "weights=1002,1001,0,1501 min-tenure=300s handover=idle (by zone-spread, api-reachable, prefer-labels)"
    );
}

/// Whatever a policy does on a view becomes the built-in ranking for that view, in time, and the policies of the node say no
/// more that they rank by plugin until they do again.
#[test]
fn what_a_policy_does_wrong_is_the_built_in() {
    skip_unless!("policy::tests::election::what_a_policy_does_wrong_is_the_built_in", Components);
    let policies = with(Vec::new());
    for (act, kind) in [
        ("zero", "invalid"),
        ("short", "invalid"),
        ("over", "invalid"),
        ("huge", ""),
        ("garbage", "invalid"),
        ("loop", "fuel"),
        ("panic", "trap"),
        ("recurse", ""),
        ("allocate", ""),
    ] {
        let spread = plugin("zone-spread", json!({"min-tenure-seconds": 60}));
        policies.apply(&config(vec![guest(act, "bad"), spread])).unwrap();
        let own = policies.hash(None);
        for _ in 0..2 {
            let began = Instant::now();
            let ranked = rank(&policies, &view(&["a", "bad"]));
            let took = began.elapsed();
            println!("{act}: {ranked}, {took:?}");
            let Why::Failed(by, failure) = &ranked.why else { panic!("{act}: {ranked}") };
            assert_eq!(
                (&**by, ranked.weights, ranked.min_tenure),
                ("testguests-election", None, None),
                "{act}"
            );
            assert!(kind.is_empty() || failure.label() == kind, "{act}: {failure}");
            // 20 ms by the contract; this build is not optimised, and the machine may be busy.
            assert!(took < Duration::from_millis(200), "{act}: {took:?}");
            assert_eq!(policies.hash(None), EffectiveHash::BUILT_IN, "{act}");
        }
        let ranked = rank(&policies, &view(&["a", "b"]));
        assert_eq!(ranked.weights, Some(vec![1000, 1000]), "{act}: {ranked}");
        assert_eq!(policies.hash(None), own, "{act}");
    }
}

/// An instance that was asked before would count on.
#[test]
fn each_ranking_is_one_of_a_fresh_instance() {
    skip_unless!("policy::tests::election::each_ranking_is_one_of_a_fresh_instance", Components);
    let policies = with(vec![guest("different", "")]);
    for _ in 0..5 {
        assert_eq!(rank(&policies, &view(&["a", "b"])).weights, Some(vec![1, 1]));
    }
}

/// A policy that ranks whoever leads last is not stopped from it here; tenure is for that.
#[test]
fn tenure_and_handover_arrive() {
    skip_unless!("policy::tests::election::tenure_and_handover_arrive", Components);
    let settings = json!({"act": "flap", "min-tenure": u64::MAX, "handover": "never"});
    let policies = with(vec![plugin("testguests-election", settings)]);
    for (candidate, expected) in [(0, [1, 1000]), (1, [1000, 1])] {
        let holder = Some(Tenure { candidate, duration: Duration::from_secs(5) });
        let ranked = rank(&policies, &View { holder, ..view(&["a", "b"]) });
        assert_eq!(ranked.weights, Some(expected.into()));
        assert_eq!(ranked.handover, Some(Handover::Never));
        assert_eq!(ranked.min_tenure, Some(Duration::from_hours(24)), "it is bounded");
    }
}

#[test]
fn a_view_has_bounds() {
    skip_unless!("policy::tests::election::a_view_has_bounds", Components);
    let policies = with(vec![guest("weights", "no such")]);
    let why = |view: &View| rank(&policies, view).why;
    let mut long = view(&["a"]);
    long.candidates[0].zone = Some("z".repeat(TEXT_LIMIT + 1));
    assert_eq!(why(&long), Why::View("a text of the view has more than 1 KiB"));
    let name = "n".repeat(TEXT_LIMIT);
    assert_eq!(why(&view(&vec![name.as_str(); 4000])), Why::View("the view has more than 4 MiB"));
    assert_eq!(policies.hash(None), EffectiveHash::BUILT_IN);
    let holder = Some(Tenure { candidate: 1, duration: Duration::ZERO });
    assert_eq!(why(&View { holder, ..view(&["a"]) }), Why::View("the holder is no candidate"));
}

#[test]
fn the_hash_is_of_what_ranks() {
    skip_unless!("policy::tests::election::the_hash_is_of_what_ranks", Components);
    let policies = with(Vec::new());
    let hash = |plugins: Vec<Plugin>| {
        policies.apply(&config(plugins)).unwrap();
        policies.hash(Some(b"key"))
    };
    let spread = |settings: &str| plugin("zone-spread", serde_json::from_str(settings).unwrap());
    let reach = || plugin("api-reachable", Value::Null);
    let one = hash(vec![spread(r#"{"max-factor": 2, "zones": ["a"]}"#), reach()]);
    assert_ne!(one, EffectiveHash::BUILT_IN);
    let same = hash(vec![
        Plugin { name: "other-name".into(), ..spread(r#"{"zones": ["a"], "max-factor": 2}"#) },
        plugin("api-reachable", json!({})),
        Plugin { mode: Mode::Monitor, ..plugin("prefer-labels", json!({})) },
    ]);
    assert_eq!(same, one, "neither the order of keys nor what is only watched counts");
    for other in [
        hash(vec![reach(), spread(r#"{"max-factor": 2, "zones": ["a"]}"#)]),
        hash(vec![spread(r#"{"max-factor": 2, "zones": ["b"]}"#), reach()]),
        hash(vec![reach()]),
    ] {
        assert_ne!(other, one);
    }
    let keyed = hash(vec![reach()]);
    for key in [Some(&b"other"[..]), None] {
        assert_ne!(policies.hash(key), keyed);
    }
    assert_eq!(hash(Vec::new()), EffectiveHash::BUILT_IN);
    assert_eq!(hash(vec![Plugin { mode: Mode::Monitor, ..reach() }]), EffectiveHash::BUILT_IN);
}

/// What is counted may be counted otherwise by another version: nodes with different ones must not take their rankings for the
/// same.
#[test]
fn the_profile_names_the_engine_that_runs() {
    let lock = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock"));
    let lock = lock.unwrap();
    let (_, rest) = lock.split_once("name = \"wasmtime\"\nversion = \"").unwrap();
    let version = rest.split('"').next().unwrap();
    let (stack, (fuel, each)) = (crate::policy::engine::STACK, crate::policy::election::FUEL);
    let memory = crate::policy::Limits::DEFAULT.memory.as_u64();
    let expected = format!(
        "peili:policy@0.1 wasmtime@{version} fuel={fuel}+{each}n memory={}MiB stack={}KiB nan=canonical",
        memory >> 20,
        stack >> 10
    );
    assert_eq!(crate::policy::election::PROFILE, expected);
}

/// Guards that `configure` cannot take a node's time: it is counted like a ranking, and a node does not know which one it is.
#[test]
fn a_policy_that_cannot_be_configured_is_not_taken() {
    skip_unless!("policy::tests::election::a_policy_that_cannot_be_configured_is_not_taken", Components);
    let good = plugin("zone-spread", json!({}));
    let policies = with(vec![good.clone()]);
    for (plugin, stage, text) in [
        (guest("stuck", ""), Stage::Configure, "instructions"),
        (guest("configure", ""), Stage::Configure, "trapped"),
        (plugin("zone-spread", json!({"max-factor": 0})), Stage::Configure, "settings/max-factor"),
        (plugin("node-allow", json!({})), Stage::World, "of the trust world, not of the election world"),
    ] {
        let error = policies.apply(&config(vec![plugin])).unwrap_err();
        assert_eq!(error.stage, stage, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(rank(&policies, &view(&["a", "b"])).weights, Some(vec![1000, 1000]));
    }
    let absent = Policies::new(Node::default(), Metrics::default());
    let nowhere = Plugin { path: "/no/such/policy.wasm".into(), ..good };
    absent.apply(&config(vec![nowhere])).unwrap_err();
    assert!(ElectionPolicy::is_active(&absent));
    let ranked = absent.rank(&view(&["a"]));
    assert!(matches!(ranked.why, Why::Failed(_, Failure::Absent)), "somebody leads: {ranked}");
    assert_eq!(absent.hash(None), EffectiveHash::BUILT_IN);
}

/// A set with which the last view has no ranking is not taken over, and one that ranks it otherwise is.
#[test]
fn a_changed_set_is_tried_on_the_last_views() {
    skip_unless!("policy::tests::election::a_changed_set_is_tried_on_the_last_views", Components);
    let policies = with(vec![plugin("zone-spread", json!({}))]);
    let nodes = view(&["a", "b"]);
    assert_eq!(rank(&policies, &nodes).weights, Some(vec![1000, 1000]));
    for act in ["zero", "panic"] {
        let error = policies.apply(&config(vec![guest(act, "")])).unwrap_err();
        assert_eq!(error.stage, Stage::Shadow, "{error}");
        assert!(error.to_string().contains("the last view of the role coordinator"), "{error}");
    }
    let one = plugin("testguests-election", json!({"act": "weights", "weights": [1, 0]}));
    let other = plugin("prefer-labels", json!({"rules": [{"label": "a", "weight": 1}]}));
    policies.apply(&config(vec![one.clone(), other])).unwrap();
    assert_eq!(rank(&policies, &nodes).weights, Some(vec![2, 0]));
    // Each alone is well; together they leave nobody.
    let all = plugin("testguests-election", json!({"act": "weights", "weights": [0, 1]}));
    let error = policies.apply(&config(vec![one, Plugin { name: "second".into(), ..all }])).unwrap_err();
    assert!(error.to_string().contains("together exclude each candidate"), "{error}");
    policies.apply(&config(Vec::new())).unwrap();
    assert_eq!(policies.rank(&nodes).why, Why::NoPolicy);
}
