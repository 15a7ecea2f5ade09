//! The trust world: what wins in a chain, and real components about peers that are made up.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::oci::Level;
use crate::policy::metrics::Metrics;
use crate::policy::trust::{
    Claim, Conduct, Decision, Evidence, Grant, Merge, Method, Request, Ruling, TTL_LIMIT, Trust, TrustPolicy,
    Verdict, Way,
};
use crate::policy::world::World;
use crate::policy::{Config, Failing, Failure, Label, Node, Plugin, Policies, Provenance};

fn grant() -> impl Strategy<Value = Grant> {
    let level = prop_oneof![Just(Level::None), Just(Level::Introduce), Just(Level::Blobs), Just(Level::Tags)];
    let parts = (level, any::<bool>(), option::of(1_u32..5), option::of(1_u64..5), 1_u64..300);
    parts.prop_map(|(level, serve, max_uploads, max_upload_rate, ttl)| Grant {
        level,
        serve,
        max_uploads,
        max_upload_rate,
        ttl: Duration::from_secs(ttl),
    })
}

fn answer() -> impl Strategy<Value = Result<Verdict, Failure>> {
    let said = |decision| Ok(Verdict { decision, reason: None });
    prop_oneof![
        3 => Just(said(Decision::Abstain)),
        6 => grant().prop_map(move |grant| said(Decision::Allow(grant))),
        1 => Just(said(Decision::Deny(Duration::from_secs(60)))),
        1 => Just(Err(Failure::Time)),
    ]
}

fn ruling(answers: &[Result<Verdict, Failure>]) -> Ruling {
    let mut merge = Merge::default();
    for (number, answer) in answers.iter().enumerate() {
        Trust::add(&mut merge, &Arc::from(format!("policy-{number}")), answer.clone(), Failing::Bypass);
    }
    Trust::ruling(merge)
}

fn at_most<T: PartialOrd>(tighter: Option<T>, looser: Option<T>) -> bool {
    looser.is_none_or(|looser| tighter.is_some_and(|tighter| tighter <= looser))
}

proptest! {
    /// DESIGN.md, "Policies": deny wins; grants merge to the strictest; a failure is no grant.
    #[test]
    fn one_more_policy_never_trusts_more(answers in vec(answer(), 0..6), more in answer()) {
        let before = ruling(&answers);
        let after = ruling(&[&answers[..], &[more]].concat());
        match (before.way, after.way) {
            (Way::BuiltIn, _) | (Way::Allow(_), Way::Deny(..) | Way::Failed(_)) => {}
            (Way::Deny(..), after) => prop_assert!(matches!(after, Way::Deny(..))),
            (Way::Failed(_), after) => prop_assert!(matches!(after, Way::Failed(_) | Way::Deny(..))),
            (Way::Allow(before), Way::Allow(after)) => {
                prop_assert!(after.level <= before.level && after.serve <= before.serve);
                prop_assert!(after.ttl <= before.ttl);
                prop_assert!(at_most(after.max_uploads, before.max_uploads));
                prop_assert!(at_most(after.max_upload_rate, before.max_upload_rate));
            }
            (Way::Allow(_), Way::BuiltIn) => prop_assert!(false, "a grant is never undone"),
        }
    }
}

fn plugin(component: &str, settings: Value) -> Plugin {
    Plugin::new(component, peili_lab::policy(component), settings)
}

fn with(plugins: Vec<Plugin>) -> Policies {
    let zone = Label {
        key: "topology.kubernetes.io/zone".into(),
        value: "a".into(),
        provenance: Provenance::Configured,
    };
    let here = Node { name: "node-1".into(), labels: vec![zone], ..Node::default() };
    let policies = Policies::new(here, Metrics::default());
    policies.apply(&Config { trust: plugins, ..Config::default() }).unwrap();
    policies
}

fn peer(name: &str) -> Request {
    Request {
        peer: Node {
            id: format!("12D3KooW{name}"),
            name: name.into(),
            version: "0.1.0".into(),
            ..Node::default()
        },
        observed: vec!["10.0.0.7".parse().unwrap()],
        announced: vec!["/ip4/10.0.0.7/tcp/5002".into()],
        evidence: vec![Evidence { method: Method::ClusterKey, claims: vec![(Claim::KeyId, "00".into())] }],
        conduct: Conduct::default(),
        level: Level::None,
        now: SystemTime::now(),
    }
}

#[test]
fn node_allow_and_zone_boundary_decide_together() {
    skip_unless!("policy::tests::trust::node_allow_and_zone_boundary_decide_together", Components);
    let rules = json!({
        "allow": [{"match": {"networks": ["10.0.0.0/8"], "evidence": ["cluster-key"]}, "max-uploads": 3}],
        "deny": [{"names": ["evil-*"]}],
        "quarantine": {"weight": 10, "half-life-minutes": 10},
    });
    let policies = with(vec![
        plugin("node-allow", rules),
        plugin("zone-boundary", json!({"claimed": true, "serve": false})),
    ]);
    let expected = Grant {
        level: Level::Blobs,
        serve: false,
        max_uploads: Some(3),
        max_upload_rate: None,
        ttl: TTL_LIMIT,
    };
    assert_eq!(
        policies.evaluate(&peer("good")).way,
        Way::Allow(expected),
        "another zone: the strictest of both"
    );
    let zone = Label {
        key: "topology.kubernetes.io/zone".into(),
        value: "a".into(),
        provenance: Provenance::Claimed,
    };
    let mut near = peer("near");
    near.peer.labels = vec![zone];
    let expected = Grant { level: Level::Tags, serve: true, ..expected };
    assert_eq!(policies.evaluate(&near).way, Way::Allow(expected));
    let code = |request: &Request| match policies.evaluate(request).way {
        Way::Deny(_, reason) => reason.code,
        way => format!("{way:?}"),
    };
    assert_eq!(code(&peer("evil-1")), "denied");
    assert_eq!(
        code(&Request { observed: vec!["192.168.0.1".parse().unwrap()], ..peer("far") }),
        "not-allowed"
    );
    let conduct = Conduct {
        digest_mismatches: 2,
        since_last_fault: Some(Duration::from_secs(1)),
        ..Conduct::default()
    };
    assert_eq!(code(&Request { conduct, ..peer("liar") }), "quarantine");
}

/// Whatever a policy does with a peer is a failure about that peer, in time, and others are judged as before.
#[test]
fn what_a_policy_does_wrong_stays_its_own() {
    skip_unless!("policy::tests::trust::what_a_policy_does_wrong_stays_its_own", Components);
    for what in ["loop", "panic", "allocate", "verdict", "recurse", "garbage", "zero"] {
        let policies = with(vec![plugin("testguests-trust", json!({"act": what, "on": "bad"}))]);
        for _ in 0..2 {
            let began = Instant::now();
            let ruling = policies.evaluate(&peer("bad"));
            let took = began.elapsed();
            assert!(matches!(ruling.way, Way::Failed(_)), "{what}: {ruling:?}");
            println!("{what}: {took:?}");
            // 10 ms by the contract; this build is not optimised, and the machine may be busy.
            assert!(took < Duration::from_millis(100), "{what}: {took:?}");
            assert_eq!(policies.evaluate(&peer("good")).way, Way::BuiltIn, "{what}");
        }
    }
    let grows = with(vec![plugin("testguests-trust", json!({"act": "grow"}))]);
    for _ in 0..1000 {
        assert_eq!(grows.evaluate(&peer("any")).way, Way::BuiltIn);
    }
}

/// A component of another world is not taken, and says so.
#[test]
fn a_policy_of_the_registry_world_is_refused() {
    skip_unless!("policy::tests::trust::a_policy_of_the_registry_world_is_refused", Components);
    let policies = Policies::new(Node::default(), Metrics::default());
    let config = Config { trust: vec![plugin("allow-list", json!({}))], ..Config::default() };
    let error = policies.apply(&config).unwrap_err();
    assert!(error.to_string().contains("of the registry world, not of the trust world"), "{error}");
    assert!(TrustPolicy::is_active(&policies));
    assert!(matches!(policies.evaluate(&peer("any")).way, Way::Failed(Failure::Absent)));
}

/// The times of a grant are brought within their limits.
#[test]
fn a_grant_ends_in_five_minutes() {
    skip_unless!("policy::tests::trust::a_grant_ends_in_five_minutes", Components);
    for (seconds, expected) in [(86_400, TTL_LIMIT), (0, Duration::from_secs(1)), (7, Duration::from_secs(7))]
    {
        let settings = json!({"act": "grant", "ttl-seconds": seconds});
        let way = with(vec![plugin("testguests-trust", settings)]).evaluate(&peer("any")).way;
        assert!(matches!(way, Way::Allow(grant) if grant.ttl == expected), "{way:?}");
    }
}
