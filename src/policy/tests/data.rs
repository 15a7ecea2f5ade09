//! What an operator gives a policy beside its settings: files that are followed as components are, and limits.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::json;

use super::reload::{put, until};
use super::request;
use crate::oci::Digest;
use crate::policy::election::ElectionPolicy as _;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{RegistryPolicy, Way};
use crate::policy::{Config, Data, Failing, Limits, Node, Plugin, Policies, Stage};

fn policies() -> Policies {
    Policies::new(Node::default(), Metrics::default())
}

fn data(name: &str, path: &Path) -> Data {
    Data { name: name.into(), path: path.to_owned(), sha256: None, content: None }
}

/// One that says what its files have.
fn telling(files: Vec<Data>) -> Plugin {
    let settings = json!({"act": "data"});
    Plugin { data: files, ..Plugin::new("telling", peili_lab::policy("testguests"), settings) }
}

fn only(plugin: Plugin) -> Config {
    Config { registry: vec![plugin], ..Config::default() }
}

fn said(policies: &Policies) -> String {
    match RegistryPolicy::explain(policies, &request("a/b")).0.way {
        Way::Deny(reason) => reason.message,
        way => panic!("{way:?}"),
    }
}

/// A changed file is another generation, the same content is none, and one that is gone changes nothing.
#[tokio::test]
async fn files_of_a_policy_are_followed() {
    skip_unless!("policy::tests::data::files_of_a_policy_are_followed", Components);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list");
    put(&path, b"one");
    let policies = Arc::new(policies());
    policies.apply(&only(telling(vec![data("list", &path)]))).unwrap();
    let number = || RegistryPolicy::generation(&*policies);
    assert_eq!((said(&policies).as_str(), number()), ("list=one", 1));
    let sha256 = policies.loaded()[0].data["list"].clone();
    assert_eq!(sha256, Digest::sha256(b"one").hex());

    let following = tokio::spawn(Arc::clone(&policies).follow());
    put(&path, b"two");
    until("the changed file", || said(&policies) == "list=two").await;
    assert_eq!(number(), 2);
    // Another file with the same content, and then one that cannot be read.
    put(&path, b"two");
    fs::rename(&path, dir.path().join("gone")).unwrap();
    until("it is said", || policies.problem().is_some()).await;
    let problem = policies.problem().unwrap();
    assert!(
        problem.contains("policy `telling`") && problem.contains("list), read: No such file"),
        "{problem}"
    );
    assert!(problem.contains("is its mount gone"), "{problem}");
    assert_eq!((said(&policies).as_str(), number()), ("list=two", 2));
    fs::rename(dir.path().join("gone"), &path).unwrap();
    until("it is back", || policies.problem().is_none()).await;
    assert_eq!(number(), 2, "the same set is no other generation");
    following.abort();
    // With other limits it is.
    let limits = Limits { memory: ByteSize::mib(8), ..Limits::default() };
    policies.apply(&only(Plugin { limits, ..telling(vec![data("list", &path)]) })).unwrap();
    assert_eq!(number(), 3);
}

/// What must not be read is not, and what is wrong is said of that file; the last good set stands.
#[test]
fn files_that_cannot_be_taken_change_nothing() {
    skip_unless!("policy::tests::data::files_that_cannot_be_taken_change_nothing", Components);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("root")).unwrap();
    fs::write(at("root/good"), "good").unwrap();
    fs::write(at("secret"), "secret").unwrap();
    fs::write(at("root/large"), vec![b'x'; (1 << 20) + 1]).unwrap();
    fs::write(at("root/largest"), vec![b'x'; 1 << 20]).unwrap();
    symlink("../secret", at("root/up")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(at("root/fifo")).status().unwrap().success());
    let policies = policies();
    let apply = |path: PathBuf, pin: Option<&[u8]>| {
        let pin = pin.map(|bytes| Digest::sha256(bytes).hex());
        let plugin = telling(vec![Data { sha256: pin, ..data("list", &path) }]);
        let roots = vec![at("root"), plugin.path.parent().unwrap().to_owned()];
        policies.apply(&Config { roots, ..only(plugin) })
    };
    apply(at("root/good"), Some(b"good")).unwrap();
    for (file, pin, stage, part) in [
        ("root/absent", None, Stage::Read, "No such file"),
        ("root/up", None, Stage::Read, "leads out of its folder"),
        ("root/fifo", None, Stage::Read, "not a regular file"),
        ("root", None, Stage::Read, "not a regular file"),
        ("secret", None, Stage::Read, "none of policies.roots"),
        ("root/large", None, Stage::Size, "the data `list` has more than 1 MiB"),
        ("root/good", Some(&b"half"[..]), Stage::Pin, "is pinned"),
    ] {
        let error = apply(at(file), pin).unwrap_err();
        assert_eq!((error.stage, error.path.clone()), (stage, at(file)), "{error}");
        assert!(error.to_string().contains(part), "{file}: {error}");
        assert_eq!(error.pending, stage == Stage::Pin, "{error}");
        assert_eq!(said(&policies), "list=good");
    }
    // A file that is pinned and not mounted yet is waited for.
    assert!(apply(at("root/absent"), Some(b"x")).unwrap_err().pending);
    apply(at("root/largest"), None).unwrap();
}

/// The policy says what is wrong in a file, by its line; and cases are asked with the files, or with their own.
#[test]
fn a_list_in_a_file_decides() {
    skip_unless!("policy::tests::data::a_list_in_a_file_decides", Components);
    let dir = tempfile::tempdir().unwrap();
    let (path, cases) = (dir.path().join("images.txt"), dir.path().join("cases.yaml"));
    let policies = policies();
    let plugin = || Plugin {
        data: vec![data("images", &path)],
        cases: Some(cases.clone()),
        ..Plugin::new("allow", peili_lab::policy("allow-list"), json!({"allow-data": ["images"]}))
    };
    let expects =
        |data: &str| format!("{data}\ncases: [{{name: ours, image: docker.io/ours/app, expect: abstain}}]");
    let apply = |list: &str, text: &str| {
        fs::write(&path, list).unwrap();
        fs::write(&cases, text).unwrap();
        policies.apply(&only(plugin()))
    };
    apply("# Ours.\ndocker.io/ours/*\n", &expects("")).unwrap();
    assert!(matches!(policies.decide(&request("ours/app")).way, Way::Mirror(_)));
    assert!(matches!(policies.decide(&request("theirs/app")).way, Way::Deny(_)));
    assert_eq!(policies.loaded()[0].summary, "allows 1 globs");
    let error = apply("docker.io/ours/*\n\ndocker.io//x\n", &expects("")).unwrap_err();
    assert_eq!(error.stage, Stage::Configure);
    assert!(error.message.contains("settings/allow-data/0: line 3 of `images`: an empty segment"), "{error}");
    let error = apply("docker.io/others/*", &expects("")).unwrap_err();
    assert_eq!(error.stage, Stage::Cases, "{error}");
    apply("docker.io/others/*", &expects("data: {images: 'docker.io/ours/*'}")).unwrap();
    assert!(matches!(policies.decide(&request("ours/app")).way, Way::Deny(_)));
}

/// A component and its files that are published together are in force together.
#[test]
fn files_are_of_one_state_with_the_component() {
    skip_unless!("policy::tests::data::files_are_of_one_state_with_the_component", Components);
    let dir = tempfile::tempdir().unwrap();
    let component = fs::read(peili_lab::policy("testguests")).unwrap();
    let mut published = HashSet::new();
    for set in 0..2 {
        let folder = dir.path().join(format!("..set-{set}"));
        fs::create_dir(&folder).unwrap();
        // A section of the name `x` makes each another one.
        let bytes = [&component[..], &[0, 3, 1, b'x', set]].concat();
        fs::write(folder.join("policy.wasm"), &bytes).unwrap();
        fs::write(folder.join("a"), set.to_string()).unwrap();
        fs::write(folder.join("b"), set.to_string()).unwrap();
        published.insert((Digest::sha256(&bytes).hex(), format!("a={set} b={set}")));
    }
    let swap = |set: usize| {
        symlink(format!("..set-{set}"), dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), dir.path().join("..data")).unwrap();
    };
    swap(0);
    let [a, b] = ["a", "b"].map(|name| data(name, &dir.path().join(name)));
    let plugin = Plugin { path: dir.path().join("policy.wasm"), ..telling(vec![a, b]) };
    let (policies, ends, mut seen) = (policies(), AtomicBool::new(false), HashSet::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                swap(rand::random_range(0..2));
                // Without a pause nothing else gets at the folder.
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        for _ in 0..200 {
            let applied = policies.apply(&only(plugin.clone()));
            let set = applied.map(|()| (policies.loaded()[0].sha256.clone(), said(&policies)));
            let is_whole = set.as_ref().is_ok_and(|set| published.contains(set));
            seen.extend(set.clone());
            ends.store(!is_whole, Ordering::Relaxed);
            assert!(is_whole, "{set:?}");
        }
        ends.store(true, Ordering::Relaxed);
    });
    assert_eq!(seen.len(), 2);
}

/// Who ranks by other files, or within other bounds, must not be taken for one who ranks alike.
#[test]
fn the_hash_of_rankings_is_of_files_and_limits() {
    skip_unless!("policy::tests::data::the_hash_of_rankings_is_of_files_and_limits", Components);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list");
    let policies = policies();
    let hash = |text: &str, name: &str, limits: Limits| {
        fs::write(&path, text).unwrap();
        let files = if name.is_empty() { Vec::new() } else { vec![data(name, &path)] };
        let spread = Plugin::new("spread", peili_lab::policy("zone-spread"), json!({}));
        let election = vec![Plugin { data: files, limits, ..spread }];
        policies.apply(&Config { election, ..Config::default() }).unwrap();
        policies.hash(Some(b"key"))
    };
    let memory = |mib| Limits { memory: ByteSize::mib(mib), ..Limits::default() };
    let all = [
        hash("one", "", memory(16)),
        hash("one", "list", memory(16)),
        hash("two", "list", memory(16)),
        hash("one", "other", memory(16)),
        hash("one", "", memory(8)),
    ];
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    let words = Limits { log: 1, time: Some(Duration::from_millis(9)), ..memory(16) };
    assert_eq!(hash("three", "", words), all[0], "what no ranking depends on");
}

fn limited(act: &str, limits: Limits) -> Policies {
    let settings = json!({"act": act, "on": "bad"});
    let guest = Plugin::new("guest", peili_lab::policy("testguests"), settings);
    let policies = policies();
    policies.apply(&only(Plugin { limits, failure: Failing::Deny, ..guest })).unwrap();
    policies
}

/// What a policy did with a request, and how long that took.
fn failed(policies: &Policies) -> (String, Duration) {
    let began = Instant::now();
    let (_, said) = RegistryPolicy::explain(policies, &request("bad/app"));
    (said[0].verdict.clone(), began.elapsed())
}

/// Guards that each limit is the policy's own: what is within the host's and beyond it fails, and nothing else does.
#[test]
fn each_limit_counts() {
    skip_unless!("policy::tests::data::each_limit_counts", Components);
    // One that never returns is ended by its own time, long before the chain's.
    let soon = Limits { time: Some(Duration::from_millis(2)), ..Limits::default() };
    let (loops, patient) = (limited("loop", soon), limited("loop", Limits::default()));
    let shortest = |policies: &Policies| {
        let all = (0..5).map(|_| failed(policies));
        let took = all.map(|(verdict, took)| {
            assert!(verdict.contains("its time was up"), "{verdict}");
            took
        });
        took.min().unwrap()
    };
    let (own, all) = (shortest(&loops), shortest(&patient));
    println!("ended after {own:?} and {all:?}");
    assert!(own < Duration::from_millis(8) && all >= Duration::from_millis(9), "{own:?} {all:?}");

    // 1 KiB is enough for a short reason only.
    let short = Limits { verdict: ByteSize::kib(1), ..Limits::default() };
    let long = Plugin::new("guest", peili_lab::policy("testguests"), json!({"act": "data"}));
    let files = |size: usize| {
        let content = Some(vec![b'x'; size].into());
        vec![Data { content, ..data("list", Path::new("")) }]
    };
    let verdict = |size: usize, limits: Limits| {
        let policies = policies();
        policies.apply(&only(Plugin { data: files(size), limits, ..long.clone() })).unwrap();
        failed(&policies).0
    };
    assert!(verdict(100, short).starts_with("deny (data: list="));
    assert!(verdict(2000, Limits::default()).starts_with("deny (data: list="));
    assert!(verdict(2000, short).starts_with("failed: it trapped"), "{}", verdict(2000, short));

    // A small memory refuses what a large one holds.
    let memory = |mib| Limits { memory: ByteSize::mib(mib), ..Limits::default() };
    let tries = |mib| {
        let policies = policies();
        let plugin = Plugin { data: files(1 << 20), limits: memory(mib), ..long.clone() };
        policies.apply(&only(plugin)).unwrap();
        failed(&policies).0
    };
    let verdict = tries(1);
    assert!(verdict.contains("more memory than it may have"), "{verdict}");
    let verdict = tries(16);
    assert!(!verdict.contains("memory"), "{verdict}");
}

/// Guards that who changes a limit alone gets it.
#[test]
fn another_limit_is_another_generation() {
    skip_unless!("policy::tests::data::another_limit_is_another_generation", Components);
    let policies = policies();
    for (number, log) in [(1, 10), (1, 10), (2, 0), (3, 10)] {
        let limits = Limits { log, ..Limits::default() };
        policies.apply(&only(Plugin { limits, ..telling(Vec::new()) })).unwrap();
        assert_eq!(RegistryPolicy::generation(&policies), number);
    }
}
