//! All nodes must come to the same ranking: the same component on the same view gives the same bytes, whatever processor, engine
//! and hour. What is known of them is committed in `determinism.txt`.
//!
//! After a change of a shipped policy: `PEILI_WRITE_RANKINGS=1 cargo test --lib -- determinism` writes it anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::{Value, json};

use super::election::view;
use crate::policy::chain::Answers as _;
use crate::policy::election::{
    Candidate, Election, Reachability, Role, RoleKind, Selection, TEXT_LIMIT, Tenure, View,
};
use crate::policy::engine::{Bound, Code, Compiled, Engine, Files, Given, Policy};
use crate::policy::world::World as _;
use crate::policy::{Limits, Node};

/// More than enough: here only instructions count.
const PATIENCE: Duration = Duration::from_secs(60);

/// An engine, components that it compiled, and policies by component and settings.
struct Machine {
    engine: Arc<Engine>,
    compiled: BTreeMap<String, Compiled<Election>>,
    policies: BTreeMap<String, Arc<Policy<Election>>>,
}

impl Machine {
    fn new(code: Code) -> Self {
        let engine = Arc::new(Engine::new(code, Bound::Fuel).unwrap());
        Self { engine, compiled: BTreeMap::new(), policies: BTreeMap::new() }
    }

    fn policy(&mut self, component: &str, settings: &Value) -> Arc<Policy<Election>> {
        let name = format!("{component} {settings}");
        if let Some(policy) = self.policies.get(&name) {
            return Arc::clone(policy);
        }
        let compiled = self.compiled.entry(component.into()).or_insert_with(|| {
            self.engine.compile(&std::fs::read(peili_lab::policy(component)).unwrap()).unwrap()
        });
        let (engine, compiled) = (Arc::clone(&self.engine), compiled.clone());
        let given = Given {
            name: component.into(),
            settings: settings.to_string(),
            data: Files::default(),
            limits: Limits::DEFAULT,
        };
        let made = Policy::configure(engine, compiled, given, &Node::default());
        let policy = Arc::new(made.unwrap_or_else(|refused| panic!("{component}: {refused}")).0);
        self.policies.insert(name, Arc::clone(&policy));
        policy
    }

    /// All that the policy says of a view.
    fn rank(&mut self, component: &str, settings: &Value, view: &View) -> String {
        let policy = self.policy(component, settings);
        let rank = || match policy.decide(view, Instant::now() + PATIENCE) {
            Ok(ranking) => Election::describe(&ranking),
            Err(failure) => format!("failed: {failure}"),
        };
        let said = rank();
        assert_eq!(rank(), said, "{component} {settings}: once more");
        said
    }
}

/// 0, 1, 7 and 200 nodes that are all different, of all roles.
fn views() -> Vec<(String, View)> {
    let mut state = 1_u64;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 40).unwrap() % below
    };
    let roles = [
        ("coordinator", RoleKind::Strict, Selection::Ranked, 1),
        ("introducers", RoleKind::Advisory, Selection::Ranked, 3),
        ("tag-home", RoleKind::Advisory, Selection::Proportional, 1),
    ];
    let mut views = Vec::new();
    for count in [0, 1, 7, 200] {
        let candidates: Vec<Candidate> = (0..count)
            .map(|number| Candidate {
                name: format!("node-{number}-{}", next(1000)),
                version: ["0.1.0", "0.2.0"][next(2)].into(),
                zone: [None, Some("a"), Some("b"), Some("c")][next(4)].map(Into::into),
                labels: (0..next(3))
                    .map(|_| (format!("label-{}", next(3)), format!("{}", next(2))))
                    .collect(),
                load: u8::try_from(next(11)).unwrap(),
                uptime: Duration::from_secs(next(1 << 20) as u64),
                api_server: [Reachability::Unknown, Reachability::Reachable, Reachability::Unreachable]
                    [next(3)],
            })
            .collect();
        for (name, kind, selection, seats) in roles {
            let holder = (count > 1 && kind == RoleKind::Strict)
                .then(|| Tenure { candidate: next(count), duration: Duration::from_secs(next(1000) as u64) });
            let role = Role { name: name.into(), kind, selection, seats };
            let view = View { role, candidates: candidates.clone(), holder };
            views.push((format!("{name} of {count}"), view));
        }
    }
    views
}

/// What does not depend on the compiler of the components: the shipped policies, and what a machine could do otherwise.
fn known() -> Vec<(&'static str, Value)> {
    let labels = json!({"rules": [{"label": "label-0", "value": "1", "weight": 700}, {"label": "label-1", "weight": 30}]});
    let mut known = vec![
        ("zone-spread", json!({})),
        ("zone-spread", json!({"zones": ["a", "c"], "max-factor": 2})),
        ("api-reachable", json!({"roles": ["coordinator", "tag-home"], "allow-unknown": true})),
        ("prefer-labels", labels),
    ];
    for act in ["not-a-number", "fractions", "zero", "short", "over", "loop", "panic"] {
        known.push(("testguests-election", json!({"act": act})));
    }
    known.push(("testguests-election", json!({"act": "depth", "steps": 500})));
    known
}

/// What does: addresses, and what is made of them.
fn own() -> Vec<Value> {
    let mut own: Vec<Value> = ["hash-order", "growth", "recurse", "allocate", "huge", "log", "different"]
        .map(|act| json!({"act": act}))
        .into();
    own.push(json!({"act": "depth", "steps": 200_000}));
    own
}

#[test]
fn rankings_are_the_same_bytes_everywhere() {
    skip_unless!("policy::tests::determinism::rankings_are_the_same_bytes_everywhere", Components);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/policy/tests/determinism.txt");
    let views = views();
    let mut machines = [Code::Native, Code::Checked, Code::Baseline, Code::Interpreted]
        .map(|code| (code, Machine::new(code)));
    let mut texts = Vec::new();
    for (code, machine) in &mut machines {
        let began = Instant::now();
        let mut text = String::new();
        for (component, settings) in known() {
            for (name, view) in &views {
                let said = machine.rank(component, &settings, view);
                writeln!(text, "{component} {settings}, {name}: {said}").unwrap();
            }
        }
        println!("{code:?}: {:?}", began.elapsed());
        texts.push(text);
    }
    if std::env::var_os("PEILI_WRITE_RANKINGS").is_some() {
        std::fs::write(&path, &texts[0]).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    for ((code, _), text) in machines.iter().zip(&texts) {
        let differs = committed.lines().zip(text.lines()).find(|(one, other)| one != other);
        assert!(committed == *text, "{code:?}: committed, and now: {differs:#?}");
    }
    for settings in own() {
        for (name, view) in
            views.iter().filter(|(name, _)| name.ends_with(" of 7") || name.ends_with(" of 200"))
        {
            let said =
                machines.each_mut().map(|(_, machine)| machine.rank("testguests-election", &settings, view));
            assert!(said.iter().all(|other| *other == said[0]), "{settings}, {name}: {said:#?}");
        }
    }
}

/// A view within its bounds is no reason to fail: the guest has the memory for it.
#[test]
fn the_largest_view_fits() {
    skip_unless!("policy::tests::determinism::the_largest_view_fits", Components);
    let name = "n".repeat(TEXT_LIMIT);
    let most = view(&vec![name.as_str(); 3800]);
    assert_eq!(most.check(), Ok(()));
    let said = Machine::new(Code::Native).rank("testguests-election", &json!({"act": "abstain"}), &most);
    assert_eq!(said, "abstain");
}

/// The edge of what a policy may do is at the same step: one that just ends on one node does on all.
#[test]
fn instructions_end_at_the_same_step() {
    skip_unless!("policy::tests::determinism::instructions_end_at_the_same_step", Components);
    let three = view(&["a", "b", "c"]);
    let mut machines = [Code::Native, Code::Checked, Code::Baseline, Code::Interpreted].map(Machine::new);
    let is_enough = |machine: &mut Machine, steps: u64| {
        let said = machine.rank("testguests-election", &json!({"act": "work", "steps": steps}), &three);
        assert!(["abstain", "failed: its instructions were used up"].contains(&said.as_str()), "{said}");
        said == "abstain"
    };
    let (mut enough, mut too_many) = (1, 4_000_000);
    while too_many - enough > 1 {
        let middle = u64::midpoint(enough, too_many);
        if is_enough(&mut machines[0], middle) { enough = middle } else { too_many = middle }
    }
    println!("{enough} steps");
    for machine in &mut machines {
        assert!(is_enough(machine, enough) && !is_enough(machine, too_many));
    }
}
