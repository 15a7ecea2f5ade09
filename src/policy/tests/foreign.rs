//! Components that no SDK made: written by hand, carrying cases of their own, and such as import what `wasm32-wasip2` gives.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::{Value, json};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use super::request;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{RegistryPolicy, Way};
use crate::policy::trust::{Conduct, Request as Peer, TrustPolicy as _, Way as Standing};
use crate::policy::{Config, EMBEDDED_LIMIT, Embedded, Lines, Node, Plugin, Policies, Said, Stage, facts};

/// The contract's versions that this host speaks.
const CONTRACTS: [(&str, &str); 2] = [
    ("0.1.0", include_str!("../../../wit/released/0.1.0.wit")),
    ("0.1.1", include_str!("../../../wit/policy.wit")),
];

/// What a standard library names of WASI, in part.
const WASI: [&str; 4] = [
    "package wasi:io@0.2.0;
     interface error { resource error; }
     interface streams {
         use error.{error};
         variant stream-error { last-operation-failed(error), closed }
         resource output-stream { blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>; }
     }",
    "package wasi:cli@0.2.0;
     interface environment { get-environment: func() -> list<tuple<string, string>>; }
     interface stdout { use wasi:io/streams@0.2.0.{output-stream}; get-stdout: func() -> output-stream; }",
    "package wasi:clocks@0.2.0;
     interface monotonic-clock { now: func() -> u64; }
     interface wall-clock { record datetime { seconds: u64, nanoseconds: u32 } now: func() -> datetime; }",
    "package wasi:random@0.2.0;
     interface random { get-random-bytes: func(len: u64) -> list<u8>; get-random-u64: func() -> u64; }",
];

/// Where the contract's version, the world's name, its function, the number of a denial and what is done first are filled in.
const MODULE: &str = r#"(module
  (import "wasi:cli/environment@0.2.0" "get-environment" (func $environment (param i32)))
  (import "wasi:cli/stdout@0.2.0" "get-stdout" (func $stdout (result i32)))
  (import "wasi:io/streams@0.2.0" "[method]output-stream.blocking-write-and-flush"
    (func $write (param i32 i32 i32 i32)))
  (import "wasi:io/streams@0.2.0" "[resource-drop]output-stream" (func $drop (param i32)))
  (import "wasi:clocks/monotonic-clock@0.2.0" "now" (func $now (result i64)))
  (import "wasi:clocks/wall-clock@0.2.0" "now" (func $date (param i32)))
  (import "wasi:random/random@0.2.0" "get-random-u64" (func $random (result i64)))
  (import "wasi:random/random@0.2.0" "get-random-bytes" (func $bytes (param i64 i32)))
  (memory (export "memory") 4)
  (global $free (mut i32) (i32.const 4096))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (if (i32.gt_u (global.get $free) (i32.const 200000)) (then (global.set $free (i32.const 4096))))
    (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
    (global.set $free (i32.add (local.get $at) (local.get 3)))
    (local.get $at))
  (func $check (param i32) (if (local.get 0) (then unreachable)))
  ;; Nothing is there, nothing is known, and what is written goes nowhere.
  (func $use
    (local $stream i32)
    (call $check (i64.ne (call $now) (i64.const 0)))
    (call $check (i64.ne (call $random) (i64.const 0)))
    (call $date (i32.const 2048))
    (call $check (i64.ne (i64.load (i32.const 2048)) (i64.const 0)))
    (call $environment (i32.const 2048))
    (call $check (i32.load (i32.const 2052)))
    (call $bytes (i64.const 8) (i32.const 2048))
    (call $check (i32.ne (i32.load (i32.const 2052)) (i32.const 8)))
    (call $check (i64.ne (i64.load (i32.load (i32.const 2048))) (i64.const 0)))
    (local.set $stream (call $stdout))
    (call $write (local.get $stream) (i32.const 1024) (i32.const 8) (i32.const 2048))
    (call $check (i32.load8_u (i32.const 2048)))
    (call $drop (local.get $stream)))
  ;; An empty summary.
  (func (export "peili:policy/lifecycle@VERSION#configure")
    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (call $use)
    (i32.const 1024))
  (func (export "peili:policy/WORLD@VERSION#FUNCTION") (param i32) (result i32)
    FIRST
    (i32.store8 (i32.const 3072) (i32.const DENY))
    (i32.const 3072))
)"#;

/// A component whose verdict is a denial.
fn component((version, contract): (&str, &str), world: &str, first: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    resolve.push_source("policy.wit", contract).unwrap();
    for (number, text) in WASI.iter().enumerate() {
        resolve.push_source(&format!("wasi-{number}.wit"), text).unwrap();
    }
    let guest = format!(
        "package test:guest;
         world guest {{
             include peili:policy/{world}-policy@{version};
             import wasi:io/streams@0.2.0;
             import wasi:cli/environment@0.2.0;
             import wasi:cli/stdout@0.2.0;
             import wasi:clocks/monotonic-clock@0.2.0;
             import wasi:clocks/wall-clock@0.2.0;
             import wasi:random/random@0.2.0;
         }}"
    );
    let package = resolve.push_source("guest.wit", &guest).unwrap();
    let world_of = resolve.select_world(&[package], None).unwrap();
    let (function, deny) = if world == "trust" { ("evaluate", "2") } else { ("decide", "3") };
    let text = MODULE
        .replace("WORLD", world)
        .replace("FUNCTION", function)
        .replace("FIRST", first)
        .replace("VERSION", version);
    let mut module = wat::parse_str(text.replace("DENY", deny)).unwrap();
    embed_component_metadata(&mut module, &resolve, world_of, StringEncoding::UTF8).unwrap();
    ComponentEncoder::default().validate(true).module(&module).unwrap().encode().unwrap()
}

fn plugin(path: PathBuf, settings: Value) -> Plugin {
    Plugin::new("foreign", path, settings)
}

fn policies() -> Policies {
    Policies::new(Node::default(), Metrics::default())
}

/// Asks again and again; what is no answer in time, on a machine that does other things too, is seldom and not counted.
pub(super) fn asked(times: usize, ask: impl Fn() -> (bool, Vec<Said>)) {
    let mut late = 0;
    for _ in 0..times {
        let (is_right, said) = ask();
        let is_late = said[0].verdict.contains("its time was up");
        late += usize::from(is_late);
        assert!(is_right || is_late, "{said:?}");
    }
    assert!(late < times / 10, "{late} of {times}");
}

/// Guards that a component of `wasm32-wasip2` works, of each version of the contract, and that nothing of the machine gets into it.
#[test]
fn stubs_answer_and_say_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.wasm");
    let policies = policies();
    for contract in CONTRACTS {
        let bytes = component(contract, "registry", "(call $use)");
        assert_eq!(facts(&bytes).unwrap().contract.as_deref(), Some(contract.0));
        std::fs::write(&path, bytes).unwrap();
        let registry = vec![plugin(path.clone(), Value::Null)];
        policies.apply(&Config { registry, ..Config::default() }).unwrap();
        asked(2000, || {
            let (ruling, said) = RegistryPolicy::explain(&policies, &request("a/b"));
            (matches!(ruling.way, Way::Deny(_)), said)
        });

        std::fs::write(&path, component(contract, "trust", "(call $use)")).unwrap();
        let trust = vec![plugin(path.clone(), Value::Null)];
        policies.apply(&Config { trust, ..Config::default() }).unwrap();
        let peer = Peer {
            peer: Node::default(),
            observed: Vec::new(),
            announced: Vec::new(),
            evidence: Vec::new(),
            conduct: Conduct::default(),
            level: crate::oci::Level::None,
            now: std::time::SystemTime::now(),
        };
        let standing = policies.evaluate(&peer).way;
        assert!(matches!(standing, Standing::Deny(..)), "{standing:?}");
    }
}

/// Guards that handles, which the host keeps, are bounded.
#[test]
fn handles_do_not_pile_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.wasm");
    let hoard = "(loop $again (drop (call $stdout)) (br $again))";
    std::fs::write(&path, component(CONTRACTS[1], "registry", hoard)).unwrap();
    let policies = policies();
    let registry = vec![plugin(path, Value::Null)];
    policies.apply(&Config { registry, ..Config::default() }).unwrap();
    let began = Instant::now();
    let (ruling, said) = RegistryPolicy::explain(&policies, &request("a/b"));
    assert_eq!(ruling.way, Way::Bypass);
    assert!(said[0].verdict.contains("more than 1,000 handles"), "{said:?} in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(2));
}

/// Guards that what a guest does beyond its memory, at its edge, far from it and by a large offset, is the end of that call alone: on any
/// thread, the next policy answers, and so does the next call.
#[test]
fn nothing_is_beyond_its_memory() {
    skip_unless!("policy::tests::foreign::nothing_is_beyond_its_memory", Components);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.wasm");
    let lists =
        Plugin::new("lists", peili_lab::policy("allow-list"), json!({"deny": ["docker.io/denied/*"]}));
    for beyond in [
        "(drop (i32.load8_u (i32.const 262144)))",
        "(drop (i32.load (i32.const -4)))",
        "(i64.store (i32.const 262140) (i64.const -1))",
        "(i32.store8 (i32.const -1) (i32.const 1))",
        "(drop (i64.load offset=4294967288 (i32.const -8)))",
        "(i64.store offset=40000000 (i32.const 262144) (i64.const 1))",
    ] {
        std::fs::write(&path, component(CONTRACTS[1], "registry", beyond)).unwrap();
        let policies = policies();
        let registry = vec![plugin(path.clone(), Value::Null), lists.clone()];
        policies.apply(&Config { registry, ..Config::default() }).unwrap();
        let explained = || RegistryPolicy::explain(&policies, &request("denied/app"));
        let ask = || {
            asked(50, || {
                let (_, said) = explained();
                (said[0].verdict.contains("out of bounds memory access"), said)
            });
        };
        std::thread::scope(|scope| [(); 2].map(|()| scope.spawn(ask)).map(|thread| thread.join().unwrap()));
        asked(10, || {
            let (ruling, said) = explained();
            (matches!(ruling.way, Way::Deny(_)), said)
        });
    }
}

/// A guest with these cases in it.
fn carrying(cases: &str) -> Vec<u8> {
    let mut bytes = std::fs::read(peili_lab::policy("testguests")).unwrap();
    Embedded { cases: Some(cases.into()), ..Embedded::default() }.put(&mut bytes);
    bytes
}

/// Guards that a component which does not do what its author says is not taken, whatever its operator's settings are.
#[test]
fn a_component_answers_what_it_carries() {
    skip_unless!("policy::tests::foreign::a_component_answers_what_it_carries", Components);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.wasm");
    let config =
        Config { registry: vec![plugin(path.clone(), json!({"act": "bypass"}))], ..Config::default() };
    let case = |name: &str, expect: &str| {
        format!("{{name: {name}, image: nginx, settings: {{act: deny}}, expect: {expect}}}")
    };
    let many = vec![case("a", "deny"); 201].join(",");
    let long = format!("cases: [{}] #{}", case("a", "deny"), "x".repeat(EMBEDDED_LIMIT));
    for (cases, wrong) in [
        (format!("cases: [{}]", case("a", "deny")), None),
        (
            format!("cases: [{}, {}]", case("a", "deny"), case("b", "abstain")),
            Some("case `b`: expected `abstain`"),
        ),
        ("cases: [{name: a}]".into(), Some("its own cases: ")),
        (format!("cases: [{many}]"), Some("there are 201 cases, more than 200")),
        (long, Some("`peili:cases` has more than 256 KiB")),
    ] {
        std::fs::write(&path, carrying(&cases)).unwrap();
        let policies = policies();
        let applied = policies.apply(&config);
        let Some(wrong) = wrong else {
            applied.unwrap();
            assert_eq!(policies.decide(&request("a/b")).way, Way::Bypass, "by the operator's settings");
            continue;
        };
        let error = applied.unwrap_err();
        assert_eq!(error.stage, Stage::SelfTest, "{error}");
        assert!(error.to_string().contains(wrong), "{error}");
    }
    std::fs::write(&path, carrying(&format!("cases: [{}]", case("b", "abstain")))).unwrap();
    policies().without_self_tests().apply(&config).unwrap();
}

/// Guards that what is wrong with settings is found in the file that an operator wrote.
#[test]
fn wrong_settings_are_named_by_their_line() {
    skip_unless!("policy::tests::foreign::wrong_settings_are_named_by_their_line", Components);
    let settings = json!({"allow": ["a/b", "a//b"]});
    let lines = Lines::new([(String::new(), 5), ("/allow".into(), 6), ("/allow/1".into(), 8)]);
    let list = Plugin { lines, ..plugin(peili_lab::policy("allow-list"), settings) };
    let error = policies().apply(&Config { registry: vec![list], ..Config::default() }).unwrap_err();
    assert_eq!(error.stage, Stage::Configure);
    assert!(error.message.contains("settings/allow/1 (line 8): "), "{error}");
}
