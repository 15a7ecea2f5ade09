//! The decision log: what a monitor says on a running node is what it says when it counts, and when its log is replayed.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use peili_lab::image::Image;
use peili_lab::node::{Node, Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, policy, wait};
use serde_json::{Value, json};

use crate::Case;
use crate::cluster::REGISTRY;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        "policies::recorded::monitor_enforce_replay",
        &[Requirement::Policies],
        monitor_enforce_replay,
    )]
}

/// How often each verdict was given.
type Counts = BTreeMap<String, u64>;

async fn monitor_enforce_replay() {
    let scratch = Scratch::new().unwrap();
    let layout = scratch.path().join("layout");
    let image = Image::builder("plain/app", "v1").layer(4096).build().unwrap();
    image.write_layout(&layout, Some(&image.reference(REGISTRY))).unwrap();
    let settings = json!({"deny": [format!("{REGISTRY}/special/**")], "message": "ask the platform team"});
    let start = async |mode: Option<&str>, sample: u32| {
        let mut plan = Plan::on_loopback("node-1", &format!("layout:{}", layout.display())).unwrap();
        if let Some(mode) = mode {
            let plugin =
                json!({"name": "lists", "path": policy("allow-list"), "settings": settings, "mode": mode});
            let log = plan.data_dir().join("decisions.jsonl");
            let decisions = json!({"path": log, "sample": sample});
            plan.merge(&json!({"policies": {"registry": [plugin], "decisions": decisions}}));
        }
        plan.start().await.unwrap()
    };
    let (without, monitored, enforced) =
        (start(None, 0).await, start(Some("monitor"), 1).await, start(Some("enforce"), 0).await);

    let wires = [ask(&without, &image).await, ask(&monitored, &image).await, ask(&enforced, &image).await];
    assert_eq!(wires[0], wires[1], "a monitored policy changes nothing");
    let statuses = |wire: &[(u16, String)]| wire.iter().map(|(status, _)| *status).collect::<Vec<_>>();
    assert_eq!(statuses(&wires[0]), [200, 200, 404, 200, 200, 404, 200, 200, 404]);
    assert_eq!(statuses(&wires[2]), [200, 200, 404, 403, 403, 403, 403, 403, 403]);

    let counts = [counts(&monitored).await, counts(&enforced).await];
    assert_eq!(counts[0], counts[1], "a monitor counts as one that counts");
    assert_eq!((counts[0]["deny"], counts[0]["abstain"]), (6, 3));

    // All that were asked, and of the other node what it denied.
    let log = |node: &Node| node.plan.data_dir().join("decisions.jsonl");
    for (node, lines) in [(&monitored, 9), (&enforced, 6)] {
        wait::until(&format!("{lines} lines"), Duration::from_secs(10), async || {
            let text = std::fs::read_to_string(log(node)).ok()?;
            (text.lines().count() == lines).then_some(())
        })
        .await
        .unwrap();
        assert_eq!(std::fs::metadata(log(node)).unwrap().permissions().mode() & 0o777, 0o600);
        let written =
            node.metric("peili_policy_recorded_decisions_total", "outcome=\"written\"").await.unwrap();
        assert_eq!(written, lines as f64);
    }

    let (component, other) = (policy("allow-list"), json!({"deny": [format!("{REGISTRY}/special/other")]}));
    let (code, text) = plugin(
        &["replay"],
        &[&log(&monitored), &component],
        &["--settings", &settings.to_string(), "--json"],
    );
    let replayed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &replayed["changed"], &replayed["compared"]), (0, &json!(0), &json!(9)), "{text}");
    let outcomes: Counts = serde_json::from_value(replayed["outcomes"]["lists"].clone()).unwrap();
    assert_eq!(outcomes, counts[0], "a replay counts as both did");
    // By the configuration the ruling is compared too.
    let (code, text) = plugin(&["replay", "--config"], &[&enforced.plan.config_path(), &log(&enforced)], &[]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("lists: deny 6") && text.contains("0 of 12 recorded verdicts changed, in 6"),
        "{text}"
    );
    let (code, text) =
        plugin(&["replay"], &[&log(&monitored), &component], &["--settings", &other.to_string()]);
    assert_eq!(code, 1, "{text}");
    // The words of those that are still denied are others too.
    let first = format!("CHANGED line 4: {REGISTRY}/special/app");
    let verdict = "recorded  deny (denied: ask the platform team)\n  now       abstain";
    for part in ["lists: abstain 6, deny 3", "6 of 9 recorded verdicts changed", &first, verdict] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }

    let cases = scratch.path().join("cases.yaml");
    let (code, text) = plugin(
        &["replay", "--write-cases"],
        &[&cases, &log(&monitored), &component],
        &["--settings", &settings.to_string()],
    );
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("9 cases written"), "{text}");
    let (code, text) = plugin(&["test"], &[&component, &cases], &[]);
    assert_eq!((code, text.lines().filter(|line| line.starts_with("ok ")).count()), (0, 9), "{text}");
    let (code, text) = plugin(&["diff", "--requests"], &[&log(&monitored), &component, &component], &[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("in 9 cases"), "{text}");
    with_data(scratch.path(), &log(&monitored), &component);
    measured(scratch.path(), &log(&monitored), &component, &settings.to_string());
}

/// What it costs to ask all that again, kept and compared.
fn measured(folder: &Path, log: &Path, component: &Path, settings: &str) {
    let before = folder.join("before.json");
    let bench = |paths: &[&Path], more: &[&str]| plugin(&["bench", "--requests"], paths, more);
    let save = before.display().to_string();
    let (code, text) = bench(&[log, component], &["--settings", settings, "--json", "--save", &save]);
    assert_eq!(code, 0, "{text}");
    let figures: Value = serde_json::from_str(&text).unwrap();
    // Three of nine are not denied; now and then one is not answered in time, beside other cases.
    let (allowed, third) = (figures["allowed"].as_u64().unwrap(), figures["asked"].as_u64().unwrap() / 3);
    assert!(figures["questions"] == 9 && (third / 2..=third + 3).contains(&allowed), "{text}");
    let of = |path: &str| figures.pointer(path).and_then(Value::as_f64).unwrap();
    assert!(of("/cold/median") > of("/warm/median") && of("/warm/p99") >= of("/warm/median"), "{text}");
    assert!(of("/load") > 0.0 && of("/compile") > of("/cold/median"), "{text}");
    assert!(of("/instance-memory") >= f64::from(64 << 10), "at least a page: {text}");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(&before).unwrap()).unwrap();
    assert_eq!(kept, figures);

    // As if it had been far cheaper.
    let mut cheap = kept;
    cheap["instance-memory"] = json!(1);
    std::fs::write(&before, cheap.to_string()).unwrap();
    let compare = ["--settings", settings, "--baseline", &save, "--max-ratio", "1000"];
    let (code, text) = bench(&[log, component], &compare);
    assert_eq!(code, 1, "{text}");
    for part in
        ["instance-memory is", "times that of the baseline, and 1000 is allowed", "of the baseline), "]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    std::fs::write(&before, "{}").unwrap();
    for (paths, more, code, part) in [
        (&[log, component][..], &compare[..], 1, "`--save FILE` writes them"),
        (&[log, component], &["--max-ratio", "2"], 2, "--baseline"),
        (&[log, &policy("node-allow")], &[], 1, "is a decision that can be asked again"),
        (&[log, &policy("zone-spread")], &[], 1, "world"),
    ] {
        let (ended, text) = bench(paths, more);
        assert!(ended == code && text.contains(part), "{part} is not in\n{text}");
    }
}

/// The same list in a file beside the settings: whatever asks a policy gives it that, and cases that are written bring it along.
fn with_data(folder: &Path, log: &Path, component: &Path) {
    let (list, cases) = (folder.join("images.txt"), folder.join("with-data.yaml"));
    std::fs::write(&list, format!("# Not ours.\n{REGISTRY}/special/**\n")).unwrap();
    let settings = json!({"deny-data": ["images"], "message": "ask the platform team"});
    let (settings, data) = (settings.to_string(), format!("images={}", list.display()));
    let given = ["--settings", &settings, "--data", &data];
    let (code, text) = plugin(&["replay", "--write-cases"], &[&cases, log, component], &given);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("deny 6") && text.contains("9 cases written"), "{text}");
    let (code, text) = plugin(&["diff", "--requests"], &[log, component, component], &given);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("in 9 cases"), "{text}");
    for what in [&["diff", "--requests"][..], &["replay"]] {
        let paths = [log, component, component];
        let (code, text) = plugin(what, &paths[..what.len() + 1], &given[..2]);
        assert_eq!(code, 1, "without the list: {text}");
        assert!(text.contains("`images`"), "{text}");
    }

    std::fs::remove_file(&list).unwrap();
    let passed = |text: &str| text.lines().filter(|line| line.starts_with("ok ")).count();
    let (code, text) = plugin(&["test"], &[component, &cases], &[]);
    assert_eq!((code, passed(&text)), (0, 9), "{text}");
    // Of cases that bring none, it is the list that is given.
    let mut file: Value = serde_saphyr::from_str(&std::fs::read_to_string(&cases).unwrap()).unwrap();
    let lines = file.as_object_mut().unwrap().remove("data").unwrap()["images"].clone();
    std::fs::write(&list, lines.as_str().unwrap()).unwrap();
    std::fs::write(&cases, file.to_string()).unwrap();
    for (given, code) in [(&given[2..], 0), (&given[..0], 1)] {
        let (tested, text) = plugin(&["test"], &[component, &cases], given);
        assert_eq!((tested, passed(&text) == 9), (code, code == 0), "{text}");
        let (compared, text) = plugin(&["diff"], &[component, component, &cases], given);
        assert_eq!(compared, code, "{text}");
    }
}

/// What the runtime gets under three names: the manifest by digest, a layer, and what nobody has.
async fn ask(node: &Node, image: &Image) -> Vec<(u16, String)> {
    let nobody = format!("sha256:{}", "ab".repeat(32));
    let mut answers = Vec::new();
    for repository in ["plain/app", "special/app", "special/other"] {
        for (kind, digest) in [
            ("manifests", &image.root.to_string()),
            ("blobs", &image.layers[0].to_string()),
            ("blobs", &nobody),
        ] {
            let answer =
                node.fetch(&format!("/v2/{repository}/{kind}/{digest}?ns={REGISTRY}")).await.unwrap();
            answers.push((answer.status, format!("{:?} {:?}", answer.header("content-type"), answer.text())));
        }
    }
    answers
}

async fn counts(node: &Node) -> Counts {
    let mut counts = Counts::new();
    for outcome in ["abstain", "deny", "mirror", "bypass", "failed"] {
        let count = node.metric("peili_policy_decisions_total", &format!("outcome=\"{outcome}\"")).await;
        let count = count.unwrap_or_default() as u64;
        counts.extend((count > 0).then(|| (outcome.to_owned(), count)));
    }
    counts
}

fn plugin(what: &[&str], paths: &[&Path], more: &[&str]) -> (i32, String) {
    let mut command = Command::new(binary().unwrap());
    let output = command.arg("plugin").args(what).args(paths).args(more).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}
