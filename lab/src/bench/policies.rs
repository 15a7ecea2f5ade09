//! What policies cost: a call, beside a call of a component that does nothing; memory; bytes and requests of a mirror, beside one
//! without policies in the same minutes; and how soon what changed is in force.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peili::oci::Digest;
use peili_lab::node::{Node, Plan, binary};
use peili_lab::policy;
use peili_lab::process::Usage;
use peili_lab::scratch::Scratch;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::bed::{Bed, REGISTRY, Store, blob_path, manifest_path, write_small};
use super::cases::{SETTLE, timed, whole};
use super::load;
use super::{PATIENCE, Report};

/// Globs of the allow list. What is asked for matches the last one.
const GLOBS: usize = 1000;
/// Changed settings, one after the other.
const RELOADS: u32 = 1000;
/// Requests to one node until it is the next one's turn.
const TURN: usize = 100;
/// As many as a mirror keeps to try a changed set on.
const RECENT: u32 = 1000;
/// Between two looks at whether a change is in force.
const LOOK: Duration = Duration::from_millis(2);
const MIB: f64 = (1_u64 << 20) as f64;
/// Between two looks of a mirror at its files (`policy/generation.rs`).
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);
/// The component that is replaced, in its node's data folder.
const COMPONENT: &str = "allow-list.wasm";
/// The list that is changed, there too.
const LIST: &str = "list.txt";

/// One policy at a time, as `peili plugin bench` calls it: with what a mirror recorded, and with one question.
pub(crate) async fn calls(repeats: u32) -> Result<Report> {
    let mut report = Report::new("policies.call");
    let place = Place::new()?;
    let log = place.record().await?;
    let asked = ["--requests".as_ref(), log.as_os_str()];
    for (name, component, settings, asked) in [
        ("1,000 globs", "allow-list", allowed(), &asked[..]),
        ("three sources", "upstream-order", ordered(), &asked),
        ("a whole plan", "testguests", json!({"act": "plan"}), &[]),
        ("no opinion", "testguests", json!({"act": "abstain"}), &[]),
    ] {
        let kinds = [
            ("no-op median us", "/noop", 1.0),
            ("median us", "/warm/median", 1.0),
            ("p99 us", "/warm/p99", 1.0),
            ("cold median us", "/cold/median", 1.0),
            ("cold p99 us", "/cold/p99", 1.0),
            ("compile ms", "/compile", 1e3),
            ("load ms", "/load", 1e3),
            ("an instance MiB", "/instance-memory", MIB),
        ];
        let (mut figures, mut ratios) = (kinds.map(|_| Vec::new()), Vec::new());
        for _ in 0..repeats {
            let measured = measured(component, &settings, asked)?;
            let of = |path: &str| {
                measured.pointer(path).and_then(Value::as_f64).with_context(|| format!("no {path}"))
            };
            for (figure, (_, path, unit)) in figures.iter_mut().zip(kinds) {
                figure.push(of(path)? / unit);
            }
            ratios.push(of("/warm/median")? / of("/noop")?);
            // But for those that a busy machine does not let answer in time.
            ensure!(of("/allowed")? > 0.99 * of("/asked")?, "{name}: not all is allowed: {measured}");
        }
        for ((kind, ..), values) in kinds.into_iter().zip(figures) {
            report.add(format!("{name}, {kind}"), values);
        }
        report.add(format!("{name}, median/no-op"), ratios);
    }
    Ok(report)
}

fn measured(component: &str, settings: &Value, asked: &[&OsStr]) -> Result<Value> {
    let mut command = Command::new(binary()?);
    command.args(["plugin", "bench", "--json", "--settings", &settings.to_string()]);
    let output = command.arg(policy(component)).args(asked).output()?;
    ensure!(output.status.success(), "{component}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What three policies add to a mirror's memory: idle, and after 1,000 reloads under requests.
pub(crate) async fn memory(repeats: u32) -> Result<Report> {
    let mut report = Report::new("policies.memory");
    let place = Place::new()?;
    let worlds = json!({
        "registry": [plugin("allow-list", &allowed())],
        "trust": [{"name": "zone-boundary", "path": policy("zone-boundary")}],
        "election": [{"name": "zone-spread", "path": policy("zone-spread")}],
    });
    let (mut figures, mut last) = ([const { Vec::new() }; 5], None);
    for _ in 0..repeats {
        let nodes = [
            place.node(&json!({})).await?,
            place.node(&three(&policy("allow-list"), "")).await?,
            place.node(&json!({"policies": worlds})).await?,
        ];
        tokio::time::sleep(SETTLE).await;
        let [none, with, each] = [usage(&nodes[0])?, usage(&nodes[1])?, usage(&nodes[2])?];
        let values = [
            mib(none.resident),
            mib(with.resident) - mib(none.resident),
            mib(with.anonymous) - mib(none.anonymous),
            mib(each.resident) - mib(none.resident),
            mib(each.anonymous) - mib(none.anonymous),
        ];
        figures.iter_mut().zip(values).for_each(|(figure, value)| figure.push(value));
        last = Some(nodes);
    }
    let names = [
        "a mirror without policies, MiB",
        "three of the registry world add, MiB",
        "of that not of files, MiB",
        "one of each world add, MiB",
        "of that not of files, too, MiB",
    ];
    for (name, values) in names.into_iter().zip(figures) {
        report.add(name, values);
    }
    let [none, mut with, _] = last.context("no round")?;
    let times = reloads(&none, &mut with).await?;
    let [none, with] = [usage(&none)?, usage(&with)?];
    report.add("1,000 reloads later they add, MiB", vec![mib(with.resident) - mib(none.resident)]);
    report.add(
        "of that not of files, 1,000 reloads later, MiB",
        vec![mib(with.anonymous) - mib(none.anonymous)],
    );
    report.add("signal to other settings in force, ms", times);
    Ok(report)
}

/// The times until other settings are in force; `none` is told and asked the same.
async fn reloads(none: &Node, with: &mut Node) -> Result<Vec<f64>> {
    let denied = manifest_path("denied/app", &Digest::sha256(b"denied"));
    let mut times = Vec::new();
    for number in 1..=RELOADS {
        let message = format!("set {number}.");
        with.plan.merge(&three(&policy("allow-list"), &message));
        for node in [none, &*with] {
            node.rewrite()?;
            node.process().context("it ended")?.signal(Signal::HUP)?;
        }
        let began = Instant::now();
        let what = format!("set {number} in force");
        soon(&what, async || {
            none.fetch(&denied).await.ok()?;
            with.fetch(&denied).await.ok()?.text().contains(&message).then_some(())
        })
        .await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// Requests for what a mirror has itself: without policies, with three, with each of their decisions in the log.
pub(crate) async fn requests(repeats: u32, count: u32) -> Result<Report> {
    let mut report = Report::new("policies.request");
    let place = Place::new()?;
    let policies = three(&policy("allow-list"), "");
    let mut recorded = policies.clone();
    recorded["policies"]["decisions"] = json!({"path": place.path("decisions.jsonl"), "sample": 1});
    let kinds = [
        ("no policies", json!({})),
        ("three policies", policies),
        ("three policies, all decisions recorded", recorded),
    ];
    let mut nodes = Vec::new();
    for (_, config) in &kinds {
        nodes.push(place.node(config).await?);
    }
    let paths: Vec<String> = place.small.iter().map(|(_, config)| blob_path("small", config)).collect();
    let (mut all, mut medians) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
    for turn in 0..=usize::try_from(count * repeats)? / TURN {
        for (index, node) in nodes.iter().enumerate() {
            let paths = paths.clone();
            let mut times =
                load::with(None, node.registry(), move |client| timed(client, "HEAD", &paths, TURN, 200))
                    .await?;
            // The first is to get warm.
            if turn > 0 {
                all[index].extend_from_slice(&times);
                times.sort_by(f64::total_cmp);
                medians[index].push(times[TURN / 2]);
            }
        }
    }
    let ratios = |index: usize| -> Vec<f64> {
        medians[index].iter().zip(&medians[0]).map(|(with, none)| with / none).collect()
    };
    let (three, recorded) = (ratios(1), ratios(2));
    for ((name, _), times) in kinds.iter().zip(all) {
        report.add(format!("{name} ms"), times);
    }
    report.add("three policies/none", three);
    report.add("recorded/none", recorded);
    Ok(report)
}

/// The layer through a node without policies, one with three, and another one without, which says how much two nodes that are alike
/// differ: each round in another order.
pub(crate) async fn throughput(bed: &Bed, repeats: u32) -> Result<Report> {
    let mut report = Report::new("policies.throughput");
    // Node 1 has another store than those that are compared.
    let nodes = bed.nodes_with(5, Store::Holder, |index| {
        let mut config = if index == 3 { three(&policy("allow-list"), "") } else { json!({}) };
        config["mirror"] = json!({"verify": false});
        config
    });
    let nodes = nodes.await?;
    let path = blob_path(&bed.image.repository, &bed.layer()?);
    let mut speeds = [const { Vec::new() }; 3];
    for round in 0..=repeats {
        for place in 0..3 {
            let index = (place + round as usize) % 3;
            let (path, namespace) = (path.clone(), bed.namespace(index + 2));
            let address = nodes[index + 2].registry();
            let get = load::with(namespace, address, move |client| whole(client, &path));
            let (bytes, elapsed) = get.await?;
            // The first is to get warm.
            if round > 0 {
                speeds[index].push(bytes / elapsed / 1e9);
            }
        }
    }
    let to_none = |index: usize| -> Vec<f64> {
        speeds[index].iter().zip(&speeds[0]).map(|(other, none)| other / none).collect()
    };
    let (three, control) = (to_none(1), to_none(2));
    let [none, with, _] = speeds;
    report.add("no policies GB/s", none);
    report.add("three policies GB/s", with);
    report.add("three policies/none", three);
    report.add("none/none", control);
    Ok(report)
}

/// How long after a file changed it is in force: a component that was never seen, and a list, on a node that is asked little and on
/// one that tries the change on all requests that it keeps.
pub(crate) async fn changes(repeats: u32) -> Result<Report> {
    let mut report = Report::new("policies.change");
    let place = Place::new()?;
    let (component, list) = (place.path(COMPONENT), place.path(LIST));
    let original = fs::read(policy("allow-list"))?;
    replace(&component, &original)?;
    replace(&list, listed(true).as_bytes())?;
    let mut config = three(&component, "");
    config["policies"]["registry"][0]["settings"] = json!({"allow-data": ["list"]});
    config["policies"]["registry"][0]["data"] = json!([{"name": "list", "path": list}]);
    let node = place.node(&config).await?;
    let (manifest, _) = place.small.first().context("no image")?;
    let path = manifest_path("small", manifest);
    let before = usage(&node)?;
    let mut times = Vec::new();
    for number in 0..repeats * 4 {
        let mut other = original.clone();
        // A custom section, which the compiler leaves out.
        let name = format!("n{number:07}");
        other.extend([&[0, 9, 8][..], name.as_bytes()].concat());
        let sha256 = Digest::sha256(&other).hex();
        staggered(number, repeats * 4).await;
        replace(&component, &other)?;
        let began = Instant::now();
        soon("the component in force", async || {
            let status = node.status().await.ok()?;
            let policies = status["policies"].as_array()?;
            policies.iter().any(|policy| policy["sha256"] == *sha256).then_some(())
        })
        .await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    report.add("another component, ms", times);
    let grown = mib(usage(&node)?.resident) - mib(before.resident);
    report.add("after all of them, MiB more", vec![grown]);
    for (name, kept) in [("another list, ms", 0), ("another list, after 1,000 requests, ms", RECENT)] {
        let mut times = Vec::new();
        for number in 0..repeats * 4 {
            let asked: Vec<String> =
                (0..kept).map(|number| blob_path("small", &Digest::sha256(&number.to_be_bytes()))).collect();
            load::with(None, node.registry(), move |client| {
                asked.iter().try_for_each(|path| client.request("HEAD", path).map(drop))
            })
            .await?;
            let (is_on, status) = if number % 2 == 0 { (false, 403) } else { (true, 200) };
            staggered(number, repeats * 4).await;
            replace(&list, listed(is_on).as_bytes())?;
            let began = Instant::now();
            soon("the list in force", async || {
                let answer = node.fetch(&path).await.ok()?;
                (answer.status == status).then_some(())
            })
            .await?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        report.add(name, times);
    }
    Ok(report)
}

/// Waits for a part of the time between two of a mirror's looks at its files, another one each time: else what changes right after the
/// last change was seen always has the longest way.
async fn staggered(number: u32, count: u32) {
    tokio::time::sleep(BETWEEN_LOOKS * number / count).await;
}

/// A folder with small images, and nodes on loopback that have them.
struct Place {
    scratch: Scratch,
    small: Vec<(Digest, Digest)>,
}

impl Place {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let small = write_small(&scratch.path().join("small"))?;
        Ok(Self { scratch, small })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// What a node with three policies is asked for its small images and decides, all of it: a log.
    async fn record(&self) -> Result<PathBuf> {
        let log = self.path("recorded.jsonl");
        let mut config = three(&policy("allow-list"), "");
        config["policies"]["decisions"] = json!({"path": log, "sample": 1});
        let mut node = self.node(&config).await?;
        let small = self.small.iter();
        let paths = small
            .flat_map(|(manifest, config)| [manifest_path("small", manifest), blob_path("small", config)]);
        let paths: Vec<String> = paths.collect();
        let asked = paths.len();
        load::with(None, node.registry(), move |client| {
            paths.iter().try_for_each(|path| {
                let answer = client.request("HEAD", path)?;
                ensure!(answer.status == 200, "{path}: status {}", answer.status);
                Ok(())
            })
        })
        .await?;
        soon("all are recorded", async || {
            let text = fs::read_to_string(&log).ok()?;
            (text.lines().count() >= asked).then_some(())
        })
        .await?;
        node.kill();
        Ok(log)
    }

    async fn node(&self, config: &Value) -> Result<Node> {
        let mut plan = Plan::on_loopback("node-1", &format!("layout:{}", self.path("small").display()))?;
        plan.merge(config);
        // What is refused at first is not in force, and would be measured as if it were.
        plan.merge(&json!({"policies": {"startup": "require"}}));
        let node = plan.start().await?;
        // It is ready before it has read its folder, and would be measured at something else.
        let (_, config) = self.small.last().context("no image")?;
        let path = blob_path("small", config);
        soon("its images", async || (node.fetch(&path).await.ok()?.status == 200).then_some(())).await?;
        Ok(node)
    }
}

/// Three policies that all have something to say of what is asked for: whether it may be had, how its tags are resolved, and a plan with
/// three sources. `message`: of the first, to who is refused.
fn three(allow_list: &Path, message: &str) -> Value {
    let all = format!("{REGISTRY}/**");
    let mut settings = allowed();
    settings["message"] = message.into();
    let upstream = |name: &str| json!({"name": name, "address": "http://127.0.0.1:9", "repositories": ["/"]});
    json!({
        "upstreams": [upstream("near"), upstream("far")],
        "policies": {
            "max-change": 100,
            "registry": [
                {"name": "allow-list", "path": allow_list, "settings": settings, "failure": "deny"},
                plugin("tag-freshness", &json!({"rules": [{"match": [all], "max-age": "1h"}]})),
                plugin("upstream-order", &ordered()),
            ],
        },
    })
}

fn plugin(component: &str, settings: &Value) -> Value {
    json!({"name": component, "path": policy(component), "settings": settings, "failure": "deny"})
}

/// Settings of three sources for all images here.
fn ordered() -> Value {
    json!({"rules": [{"match": [format!("{REGISTRY}/**")], "upstreams": [{"name": "near"}, {"name": "far"}]}]})
}

/// Settings of an allow list whose last globs are those of the images here.
fn allowed() -> Value {
    let others = (2..GLOBS).map(|team| format!("{REGISTRY}/team-{team}/*"));
    let globs: Vec<_> = others.chain([format!("{REGISTRY}/bench/*"), format!("{REGISTRY}/small")]).collect();
    json!({"allow": globs})
}

/// The same as a file; the small images are on it or not.
fn listed(small: bool) -> String {
    let others = (1..GLOBS).map(|team| format!("{REGISTRY}/team-{team}/*\n"));
    others.chain(small.then(|| format!("{REGISTRY}/small\n"))).collect()
}

/// At once: who reads it finds the old one or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    Ok(fs::rename(new, path)?)
}

/// Waits for what is measured: looks more often than the laboratory does elsewhere.
async fn soon(what: &str, mut condition: impl AsyncFnMut() -> Option<()>) -> Result<()> {
    let began = Instant::now();
    while condition().await.is_none() {
        ensure!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn usage(node: &Node) -> Result<Usage> {
    node.usage().context("a node ended")
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
