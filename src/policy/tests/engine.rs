//! Real components in the real engine. They are built by `cargo xtask plugins`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::{Value, json};

use super::request;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{Plan, RegistryPolicy, Ruling, Source, TagResolution, Way};
use crate::policy::{Config, Failing, Node, Plugin, Policies, Stage};

fn plugin(name: &str, component: &str, settings: Value) -> Plugin {
    Plugin::new(name, peili_lab::policy(component), settings)
}

fn act(act: &str) -> Plugin {
    plugin("guest", "testguests", json!({"act": act, "on": "bad"}))
}

fn registry(plugin: Plugin) -> Config {
    Config { registry: vec![plugin], ..Config::default() }
}

fn policies() -> Policies {
    Policies::new(Node { name: "node-1".into(), ..Node::default() }, Metrics::default())
}

fn with(plugins: Vec<Plugin>) -> Policies {
    let policies = policies();
    policies.apply(&Config { registry: plugins, ..Config::default() }).unwrap();
    policies
}

#[test]
fn an_allow_list_decides() {
    skip_unless!("policy::tests::engine::an_allow_list_decides", Components);
    let settings = json!({"allow": ["docker.io/library/*"], "message": "ask the platform team"});
    let policies = with(vec![plugin("allow", "allow-list", settings)]);
    assert_eq!(policies.decide(&request("library/nginx")), Ruling::default());
    let refused = policies.decide(&request("team/app"));
    assert!(
        matches!(&refused.way, Way::Deny(reason) if reason.code == "not-allowed" && reason.message == "ask the platform team"),
        "{refused:?}"
    );
    let loaded = policies.loaded();
    assert_eq!(loaded[0].summary, "allows 1 globs");
}

#[test]
fn each_field_of_a_plan_arrives() {
    skip_unless!("policy::tests::engine::each_field_of_a_plan_arrives", Components);
    let plan = Plan {
        sources: Some(vec![Source::Peers, Source::Origin]),
        without_peers: false,
        without_upstreams: true,
        without_origin: false,
        tag_resolution: Some(TagResolution::UpstreamOnly),
        max_tag_age: Some(Duration::from_mins(1)),
        min_trust: Some(crate::oci::Level::Tags),
        always_verify: true,
        max_fan_out: Some(1),
    };
    assert_eq!(with(vec![act("plan")]).decide(&request("bad/app")).way, Way::Mirror(plan));
}

/// Whatever a policy does on an input becomes its failure verdict for that input, in time, and nothing else changes: neither
/// for other inputs, nor for the policy beside it.
#[test]
fn what_a_policy_does_wrong_stays_its_own() {
    skip_unless!("policy::tests::engine::what_a_policy_does_wrong_stays_its_own", Components);
    for (what, failing) in ["loop", "panic", "allocate", "verdict", "recurse", "garbage", "upstream"]
        .into_iter()
        .flat_map(|what| [(what, Failing::Bypass), (what, Failing::Deny)])
    {
        let beside = plugin("beside", "allow-list", json!({"deny": ["docker.io/denied/*"]}));
        let policies = with(vec![Plugin { failure: failing, ..act(what) }, beside]);
        for _ in 0..2 {
            let began = Instant::now();
            let ruling = policies.decide(&request("bad/app"));
            let took = began.elapsed();
            match failing {
                Failing::Bypass => assert_eq!(ruling.way, Way::Bypass, "{what}"),
                Failing::Deny => assert!(
                    matches!(&ruling.way, Way::Deny(reason) if reason.code == "policy-failed"),
                    "{what}: {ruling:?}"
                ),
            }
            println!("{what}: {took:?}");
            // 10 ms by the contract; this build is not optimised, and the machine may be busy.
            assert!(took < Duration::from_millis(100), "{what}: {took:?}");
            assert_eq!(policies.decide(&request("good/app")), Ruling::default(), "{what}");
            assert!(matches!(policies.decide(&request("denied/app")).way, Way::Deny(_)), "{what}");
        }
    }
}

/// What a policy gathers is bounded, and a flood of lines costs its own time.
#[test]
fn growth_and_floods_end() {
    skip_unless!("policy::tests::engine::growth_and_floods_end", Components);
    let policies = with(vec![act("grow")]);
    for _ in 0..1000 {
        assert_eq!(policies.decide(&request("bad/app")), Ruling::default());
    }
    let flood = with(vec![act("log")]).decide(&request("bad/app"));
    assert!(matches!(flood.way, Way::Bypass | Way::Mirror(_)), "{flood:?}");
}

/// Each gets the answer to its own question. On a busy machine one may get none in time, which is the failure verdict.
#[test]
fn many_ask_at_once() {
    skip_unless!("policy::tests::engine::many_ask_at_once", Components);
    let policies =
        Arc::new(with(vec![plugin("allow", "allow-list", json!({"deny": ["docker.io/denied/*"]}))]));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let policies = Arc::clone(&policies);
            std::thread::spawn(move || {
                let mut answers = 0;
                for _ in 0..200 {
                    for (name, is_denied) in [("denied/app", true), ("good/app", false)] {
                        match policies.decide(&request(name)).way {
                            Way::Deny(reason) => {
                                assert!(is_denied && reason.code == "denied", "{name}: {reason:?}");
                            }

                            Way::Mirror(_) => assert!(!is_denied, "{name}"),
                            Way::Bypass => continue,
                        }
                        answers += 1;
                    }
                }
                answers
            })
        })
        .collect();
    let answers: u32 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!("{answers} of 3200 in time");
    assert!(answers > 2400, "{answers}");
}

#[test]
fn what_cannot_be_loaded_leaves_what_was_there() {
    skip_unless!("policy::tests::engine::what_cannot_be_loaded_leaves_what_was_there", Components);
    let good = plugin("allow", "allow-list", json!({"deny": ["docker.io/denied/*"]}));
    let policies = with(vec![good.clone()]);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let at = |path: &Path| Plugin { path: path.to_owned(), ..good.clone() };
    let module = b"\0asm\x01\0\0\0";
    let whole = std::fs::read(&good.path).unwrap();
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let cases = [
        (at(&dir.path().join("absent.wasm")), Stage::Read, "No such file"),
        (at(dir.path()), Stage::Read, "not a regular file"),
        (at(&fifo), Stage::Read, "not a regular file"),
        (Plugin { sha256: Some("ab".repeat(32)), ..good.clone() }, Stage::Pin, "is pinned"),
        (at(&write("large.wasm", &vec![0; (4 << 20) + 1])), Stage::Size, "4 MiB"),
        (at(&write("text.wasm", b"no wasm")), Stage::Size, "no WebAssembly"),
        (at(&write("empty.wasm", b"")), Stage::Size, "no WebAssembly"),
        (at(&write("module.wasm", module)), Stage::Size, "core module"),
        (at(&write("half.wasm", &whole[..whole.len() / 2])), Stage::Size, "it is damaged"),
        (at(&write("none.wasm", b"\0asm\x0d\0\x01\0")), Stage::World, "no policy"),
        (
            plugin("allow", "zone-boundary", Value::Null),
            Stage::World,
            "of the trust world, not of the registry world",
        ),
        (
            plugin("allow", "allow-list", json!({"alow": []})),
            Stage::Configure,
            "settings/alow: unknown field",
        ),
        (
            plugin("allow", "allow-list", json!({"allow": ["a", "b//c"]})),
            Stage::Configure,
            "settings/allow/1",
        ),
        (
            plugin("guest", "testguests", json!({"act": "refuse"})),
            Stage::Configure,
            "settings/act: it is refused",
        ),
        (plugin("guest", "testguests", json!({"act": "configure"})), Stage::Configure, "trapped"),
        (plugin("guest", "testguests", json!({"act": "stuck"})), Stage::Configure, "time was up"),
    ];
    for (plugin, stage, text) in cases {
        let error = policies.apply(&registry(plugin)).unwrap_err();
        assert_eq!(error.stage, stage, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(policies.problem(), Some(error.to_string()));
        assert!(
            matches!(policies.decide(&request("denied/app")).way, Way::Deny(_)),
            "the last good one stands"
        );
    }
    policies.apply(&registry(good.clone())).unwrap();
    assert_eq!(policies.problem(), None);
    policies.apply(&Config::default()).unwrap();
    assert!(!RegistryPolicy::is_active(&policies), "none is a choice too");
}

/// Without anything older, a policy that cannot be loaded has its failure verdict.
#[test]
fn the_first_that_cannot_be_loaded_fails_closed_or_open_as_it_says() {
    for failing in [Failing::Bypass, Failing::Deny] {
        let policies = policies();
        let path = PathBuf::from("/no/such/policy.wasm");
        let plugin = Plugin { path, failure: failing, ..plugin("absent", "allow-list", Value::Null) };
        policies.apply(&registry(plugin)).unwrap_err();
        let way = policies.decide(&request("library/nginx")).way;
        match failing {
            Failing::Bypass => assert_eq!(way, Way::Bypass),
            Failing::Deny => assert!(matches!(way, Way::Deny(_))),
        }
    }
}

/// A file that is replaced is in force within a second, and a broken one changes nothing.
#[tokio::test]
async fn files_are_followed() {
    skip_unless!("policy::tests::engine::files_are_followed", Components);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.wasm");
    let replace = |bytes: &[u8]| {
        let new = dir.path().join("new");
        std::fs::write(&new, bytes).unwrap();
        std::fs::rename(new, &path).unwrap();
    };
    let [guest, list] =
        ["testguests", "allow-list"].map(|name| std::fs::read(peili_lab::policy(name)).unwrap());
    replace(&guest);
    let policies = Arc::new(policies());
    let plugin = Plugin { path: path.clone(), ..act("deny") };
    policies.apply(&registry(plugin)).unwrap();
    let following = tokio::spawn(Arc::clone(&policies).follow());
    let digest = || policies.loaded()[0].sha256.clone();
    let first = digest();
    // It refuses the settings of the other.
    replace(&list);
    let began = Instant::now();
    while policies.problem().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    println!("refused after {:?}", began.elapsed());
    assert_eq!(digest(), first);
    assert!(matches!(policies.decide(&request("bad/app")).way, Way::Deny(_)));
    // The same with a section that says nothing: another file.
    replace(&[&guest[..], b"\0\x05\x01x123"].concat());
    let began = Instant::now();
    while policies.problem().is_some() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(began.elapsed() < Duration::from_secs(8));
    }
    println!("in force after {:?}", began.elapsed());
    assert_ne!(digest(), first);
    assert!(matches!(policies.decide(&request("bad/app")).way, Way::Deny(_)));
    assert!(!following.is_finished());
    following.abort();
}
