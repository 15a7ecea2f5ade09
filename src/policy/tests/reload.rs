//! Generations that follow each other: what is waited for, what is kept, and what a changed set is tried on.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::{Value, json};

use super::request;
use crate::oci::Digest;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{Plan, RegistryPolicy, Way};
use crate::policy::{Config, LoadError, Mode, Node, Plugin, Policies, Stage};

fn policies() -> Policies {
    Policies::new(Node { name: "node-1".into(), ..Node::default() }, Metrics::default())
}

fn at(path: &Path, settings: Value) -> Plugin {
    Plugin::new("one", path, settings)
}

fn only(plugin: Plugin) -> Config {
    Config { registry: vec![plugin], ..Config::default() }
}

fn guest(act: &str, on: &str) -> Plugin {
    at(&peili_lab::policy("testguests"), json!({"act": act, "on": on}))
}

/// A component of the same kind with another digest.
fn variant(of: &str, number: usize) -> Vec<u8> {
    let mut bytes = fs::read(peili_lab::policy(of)).unwrap();
    // A custom section of the name `x`.
    let text = format!("{number:08}");
    bytes.extend([0, 10, 1, b'x']);
    bytes.extend(text.as_bytes());
    bytes
}

/// A whole file at once.
pub(super) fn put(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::rename(new, path).unwrap();
}

pub(super) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The configuration is here, the file of another mount is not yet: that is no error for some time, and then it is.
#[tokio::test]
async fn a_pin_is_waited_for() {
    skip_unless!("policy::tests::reload::a_pin_is_waited_for", Components);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.wasm");
    let [old, new] = [1, 2].map(|number| variant("testguests", number));
    let pinned = |bytes: &[u8]| {
        let plugin = at(&path, json!({"act": "deny"}));
        only(Plugin { sha256: Some(Digest::sha256(bytes).hex()), ..plugin })
    };
    let metrics = Metrics::default();
    let policies = Arc::new(Policies::new(Node::default(), metrics.clone()));
    policies.be_patient_for(Duration::from_secs(2));
    let following = tokio::spawn(Arc::clone(&policies).follow());
    let is_pending = || policies.problem().is_some_and(|problem| problem.starts_with("pending: "));
    let stands = |bytes: &[u8]| policies.loaded()[0].sha256 == Digest::sha256(bytes).hex();

    let error = policies.apply(&pinned(&old)).unwrap_err();
    assert!(
        error.pending && error.stage == Stage::Read,
        "a file that is pinned and not mounted yet: {error}"
    );
    put(&path, &old);
    until("the first", || policies.problem().is_none() && stands(&old)).await;

    let error = policies.apply(&pinned(&new)).unwrap_err();
    assert!(
        error.pending && error.stage == Stage::Pin && error.to_string().contains("waited for"),
        "{error}"
    );
    assert!(is_pending() && stands(&old));
    assert_eq!(metrics.is_refused.get(), 0, "what is waited for is not refused");
    put(&path, &new);
    until("the new one", || policies.problem().is_none() && stands(&new)).await;

    // The other way about, and nobody follows.
    put(&path, &old);
    until("it is waited for", is_pending).await;
    until("and then not any more", || !is_pending() && policies.problem().is_some()).await;
    assert!(stands(&new) && policies.problem().unwrap().contains("is pinned"));
    assert_eq!(metrics.is_refused.get(), 1);
    put(&path, &variant("testguests", 3));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!is_pending(), "who changes files again and again is not waited for again and again");
    assert_eq!(metrics.is_refused.get(), 1);
    put(&path, &new);
    until("the last good one again, which is in force", || policies.problem().is_none()).await;
    assert_eq!(metrics.is_refused.get(), 0);
    following.abort();
}

/// Files that are gone change nothing; a policy that is taken out of the configuration is.
#[tokio::test]
async fn a_mount_that_vanishes_changes_nothing() {
    skip_unless!("policy::tests::reload::a_mount_that_vanishes_changes_nothing", Components);
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    let path = mount.join("policy.wasm");
    fs::create_dir(&mount).unwrap();
    put(&path, &variant("testguests", 1));
    let policies = Arc::new(policies());
    let pin = Some(Digest::sha256(&variant("testguests", 1)).hex());
    policies.apply(&only(Plugin { sha256: pin, ..at(&path, json!({"act": "deny"})) })).unwrap();
    let number = RegistryPolicy::generation(&*policies);
    let following = tokio::spawn(Arc::clone(&policies).follow());
    fs::rename(&mount, dir.path().join("gone")).unwrap();
    until("it is said", || policies.problem().is_some()).await;
    let problem = policies.problem().unwrap();
    assert!(problem.contains("read: No such file") && problem.contains("is its mount gone"), "{problem}");
    assert!(matches!(policies.decide(&request("a/b")).way, Way::Deny(_)));
    fs::rename(dir.path().join("gone"), &mount).unwrap();
    until("it is back", || policies.problem().is_none()).await;
    assert_eq!(RegistryPolicy::generation(&*policies), number, "the same set is no other generation");
    policies.apply(&Config::default()).unwrap();
    assert!(!RegistryPolicy::is_active(&*policies));
    following.abort();
}

/// What an operator expects is asked with the settings that the policy is to have.
#[test]
fn a_set_that_fails_its_cases_is_not_taken_over() {
    skip_unless!("policy::tests::reload::a_set_that_fails_its_cases_is_not_taken_over", Components);
    let dir = tempfile::tempdir().unwrap();
    let cases = dir.path().join("cases.yaml");
    let path = peili_lab::policy("allow-list");
    let policies = policies();
    let apply = |deny: &str, text: &str| -> Result<(), LoadError> {
        fs::write(&cases, text).unwrap();
        policies.apply(&only(Plugin { cases: Some(cases.clone()), ..at(&path, json!({"deny": [deny]})) }))
    };
    let expects = "cases: [{name: \"the bad\", image: docker.io/bad/app, expect: deny}]";
    apply("docker.io/bad/*", expects).unwrap();
    let many: Vec<_> =
        (0..1001).map(|_| json!({"name": "a", "image": "nginx", "expect": "abstain"})).collect();
    let state = "cases: [{name: a, settings: {alow: 1}, image: nginx, expect: abstain}]";
    for (deny, text, part) in [
        ("docker.io/other/*", expects, "case `the bad`: expected `deny`, and it says `abstain`"),
        ("docker.io/bad/*", "cases: [{name: a, image: nginx}]", "expect"),
        ("docker.io/bad/*", "cases: [{name: a, expect: deny}]", "case `a`: it names no `image`"),
        ("docker.io/bad/*", state, "settings/alow"),
        ("docker.io/bad/*", &json!({"cases": many}).to_string(), "1001 cases, more than 1000"),
        ("docker.io/bad/*", &" ".repeat((1 << 20) + 1), "more than 1 MiB"),
    ] {
        let error = apply(deny, text).unwrap_err();
        assert!(error.stage == Stage::Cases && error.to_string().contains(part), "{error}");
        assert_eq!(error.path, cases);
        assert!(matches!(policies.decide(&request("bad/app")).way, Way::Deny(_)), "the last good one stands");
    }
    // The cases' own settings come first.
    let own =
        "{settings: {deny: [\"docker.io/x/*\"]}, cases: [{name: a, image: docker.io/x/y, expect: deny}]}";
    apply("docker.io/other/*", own).unwrap();
}

/// A set that would answer recent requests otherwise, or fails on one, is refused until it is named.
#[test]
fn a_set_that_changes_much_is_not_taken_over() {
    skip_unless!("policy::tests::reload::a_set_that_changes_much_is_not_taken_over", Components);
    let policies = policies();
    let deny = |glob: &str, message: &str| {
        let settings = json!({"deny": [glob], "message": message});
        only(at(&peili_lab::policy("allow-list"), settings))
    };
    let ask = |name: &str, times: usize| {
        for number in 0..times {
            policies.decide(&request(&format!("{name}/app-{number}")));
        }
    };
    policies.apply(&deny("docker.io/none/*", "a")).unwrap();
    ask("bad", 9);
    policies.apply(&deny("docker.io/**", "a")).unwrap();
    policies.apply(&deny("docker.io/none/*", "a")).unwrap();
    // Too few to count until now.
    ask("bad", 11);
    ask("good", 40);
    // One that is asked for again and again is one.
    ask("bad", 11);
    let refused = |config: &Config, part: &str| {
        let error = policies.apply(config).unwrap_err();
        assert!(error.stage == Stage::Shadow && error.to_string().contains(part), "{error}");
        assert_eq!(policies.decide(&request("good/app")).way, Way::Mirror(Plan::default()));
        error
    };
    let error = refused(
        &deny("docker.io/bad/*", "b"),
        "11 of 51 different recent requests would be answered otherwise",
    );
    assert!(error.to_string().contains("docker.io/bad/app-0:v1: mirror, and then deny"), "{error}");
    let accept = |error: &LoadError| {
        let hint = error.hint.clone().unwrap();
        hint.split('"').nth(1).unwrap().to_owned()
    };
    let named = accept(&error);
    refused(&Config { accept: "0123456789abcdef".into(), ..deny("docker.io/bad/*", "b") }, "of 52");
    refused(&Config { accept: named.clone(), ..deny("docker.io/bad/*", "another") }, "of 52");
    policies.apply(&Config { max_change: 30, ..deny("docker.io/bad/*", "b") }).unwrap();
    // Other words of the same denial, and fewer changes than are allowed.
    policies.apply(&Config { max_change: 0, ..deny("docker.io/bad/*", "c") }).unwrap();
    policies.apply(&deny("docker.io/bad/app-1", "c")).unwrap();
    policies.apply(&Config { accept: named, ..deny("docker.io/bad/*", "b") }).unwrap();

    // One that panics on what was asked is good for nothing, however rare it is.
    for act in ["panic", "loop", "allocate", "recurse"] {
        let config = Config { max_change: 100, ..only(guest(act, "bad/app-1")) };
        let error = policies.apply(&config).unwrap_err();
        assert!(
            error.stage == Stage::Shadow && error.to_string().contains("docker.io/bad/app-1:v1"),
            "{error}"
        );
        assert!(matches!(policies.decide(&request("bad/app-1")).way, Way::Deny(_)), "{act}");
        let watched = Plugin { mode: Mode::Monitor, ..guest(act, "bad/app-1") };
        assert_eq!(
            policies.apply(&Config { max_change: 100, ..only(watched) }).unwrap_err().stage,
            Stage::Shadow
        );
    }
    let config = only(guest("panic", "bad/app-1"));
    let named = accept(&policies.apply(&config).unwrap_err());
    policies.apply(&Config { accept: named, ..config }).unwrap();
    assert_eq!(policies.decide(&request("bad/app-1")).way, Way::Bypass);
}

/// One that passes all tests and then traps on everything costs its failure verdict, is replaced without asking for its
/// agreement, and touches nothing else.
#[test]
fn one_that_always_traps_is_replaced() {
    skip_unless!("policy::tests::reload::one_that_always_traps_is_replaced", Components);
    let policies = policies();
    policies.apply(&only(guest("panic", ""))).unwrap();
    for number in 0..100 {
        assert_eq!(policies.decide(&request(&format!("a/app-{number}"))).way, Way::Bypass);
    }
    policies.apply(&only(guest("deny", ""))).unwrap();
    assert!(matches!(policies.decide(&request("a/app-1")).way, Way::Deny(_)));
}

/// Guards that nobody is kept from going back, from doing without policies, and from changing something else while a policy that is
/// in force fails on what somebody made up.
#[test]
fn the_way_out_is_open() {
    skip_unless!("policy::tests::reload::the_way_out_is_open", Components);
    let policies = policies();
    let ask = |from: usize| {
        for number in from..from + 60 {
            policies.decide(&request(&format!("a/app-{number}")));
        }
    };
    let none = only(at(&peili_lab::policy("allow-list"), json!({"deny": ["docker.io/none/*"]})));
    let all = only(at(&peili_lab::policy("allow-list"), json!({"deny": ["docker.io/**"]})));
    policies.apply(&none).unwrap();
    policies.apply(&all).unwrap();
    ask(0);
    policies.apply(&none).unwrap();
    ask(100);
    assert_eq!(policies.apply(&all).map_err(|error| error.stage), Ok(()), "the one before it");
    ask(200);
    policies.apply(&Config::default()).unwrap();

    let traps = |deny: &str| Config {
        registry: vec![
            guest("panic", "a/crafted"),
            Plugin { name: "two".into(), ..at(&peili_lab::policy("allow-list"), json!({"deny": [deny]})) },
        ],
        ..Config::default()
    };
    policies.apply(&traps("docker.io/none/*")).unwrap();
    policies.decide(&request("a/crafted"));
    policies.apply(&traps("docker.io/bad/*")).unwrap();
    assert!(matches!(policies.decide(&request("bad/app")).way, Way::Deny(_)));
}

/// Two components that are published together are in force together, whoever swaps the folder and how often; and what is in
/// force under a digest is what was compiled of it.
#[test]
fn each_generation_is_one_whole_set() {
    skip_unless!("policy::tests::reload::each_generation_is_one_whole_set", Components);
    let dir = tempfile::tempdir().unwrap();
    let mut published = HashSet::new();
    let mut links = Vec::new();
    for set in 0..2 {
        let name = format!("..set-{set}");
        fs::create_dir(dir.path().join(&name)).unwrap();
        let components = ["testguests", "allow-list"];
        let digests = components.map(|component| {
            // The first are of one kind by turns, so that what they do shows which they are.
            let component = components[usize::from(component != components[set])];
            let bytes = variant(component, set);
            let file = if component == "testguests" { "a" } else { "b" };
            fs::write(dir.path().join(&name).join(file), &bytes).unwrap();
            (file, Digest::sha256(&bytes).hex())
        });
        let mut digests = Vec::from(digests);
        digests.sort_unstable();
        published.insert(digests.into_iter().map(|(_, digest)| digest).collect::<Vec<_>>());
        links.push(name);
    }
    let swap = |to: &str| {
        symlink(to, dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), dir.path().join("..data")).unwrap();
    };
    swap(&links[0]);
    let [a, b] = ["a", "b"].map(|file| dir.path().join(file));
    let config = Config {
        registry: vec![
            at(&a, json!({"act": "abstain"})),
            Plugin { name: "two".into(), ..at(&b, json!({"deny": ["docker.io/bad/*"]})) },
        ],
        ..Config::default()
    };
    let policies = policies();
    let ends = AtomicBool::new(false);
    let mut seen = HashSet::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                swap(&links[rand::random_range(0..2)]);
                // Without a pause nothing else gets at the folder.
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        for _ in 0..200 {
            policies.apply(&config).unwrap();
            let loaded: Vec<_> = policies.loaded().into_iter().map(|loaded| loaded.sha256).collect();
            assert!(published.contains(&loaded), "{loaded:?}");
            assert!(matches!(policies.decide(&request("bad/app")).way, Way::Deny(_)));
            seen.insert(loaded);
        }
        ends.store(true, Ordering::Relaxed);
    });
    assert_eq!(seen.len(), 2);
}

/// Each of many components is compiled, is in force, and leaves nothing when it goes. A hundred where the compiler is
/// optimised: here each takes it a second.
#[test]
fn many_components_one_after_another() {
    skip_unless!("policy::tests::reload::many_components_one_after_another", Components);
    let count = if cfg!(debug_assertions) { 10 } else { 100 };
    let dir = tempfile::tempdir().unwrap();
    let policies = policies();
    let mut digests = HashSet::new();
    for number in 0..count {
        let path: PathBuf = dir.path().join(format!("{number}.wasm"));
        fs::write(&path, variant("testguests", number)).unwrap();
        policies.apply(&only(at(&path, json!({"act": "deny"})))).unwrap();
        digests.insert(policies.loaded()[0].sha256.clone());
        assert!(policies.compiled() <= 2, "the one in force and the one before");
    }
    assert_eq!(digests.len(), count);
}

/// A zone that becomes known after the start acts on the policies in force, although nothing of their set is another.
#[tokio::test]
async fn a_zone_that_becomes_known_is_told() {
    skip_unless!("policy::tests::reload::a_zone_that_becomes_known_is_told", Components);
    let policies = Arc::new(policies());
    let path = peili_lab::policy("zone-boundary");
    let boundary = Plugin::new("boundary", path, json!({"claimed": true}));
    policies.apply(&Config { trust: vec![boundary], ..Config::default() }).unwrap();
    let said = |part: &str| policies.loaded()[0].summary.contains(part);
    assert!(said("zone is not known"), "{:?}", policies.loaded());
    let generation = || policies.generation();
    let before = generation();
    let following = tokio::spawn(Arc::clone(&policies).follow());
    for zone in ["eu-1a", "eu-1b"] {
        policies.set_zone(zone);
        until(zone, || said(&format!("outside of zone {zone}"))).await;
    }
    assert_eq!(generation(), before + 2, "so that all peers are judged anew");
    policies.set_zone("eu-1b");
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(generation(), before + 2, "it is no other one");
    following.abort();
}
