//! `/metrics` is what `docs/metrics.md` says: names, types, labels and the values that labels may have.

use std::collections::{BTreeMap, BTreeSet};

use peili_lab::{Image, wait};
use serde_json::json;

use super::{CHANGE, Pair, Plan, http};
use crate::Case;
use crate::cluster::REGISTRY;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new("cli::metrics", &[], metrics)]
}

/// A family with labels is exported from its first event on; what leads to one of these is no exchange that goes well.
const RARE: [&str; 4] = [
    "peili_mirror_failovers_total",
    "peili_upstream_requests_total",
    "peili_upstream_received_bytes_total",
    "peili_doctor_verdicts",
];

/// Labels with the values that they may have; none: any.
type Labels = BTreeMap<String, BTreeSet<String>>;

async fn metrics() {
    let documented = documented();
    let image = Image::builder("library/app", "v1").layer(100_000).build().unwrap();
    // A policy that is not there counts as one that fails, and a monitored one changes nothing.
    let policy = json!({"name": "absent", "path": "/no/such/policy.wasm", "mode": "monitor"});
    let pair = Pair::start(&[&image], &json!({"policies": {"registry": [policy]}})).await;
    pair.known().await;
    // One that nobody trusts, and is refused.
    let mut stranger = Plan::on_loopback("stranger", "layout:/no/such/layout").unwrap();
    stranger.trust(&pair.holder.plan);
    let _stranger = stranger.launch().unwrap();
    wait::until("the stranger refused", CHANGE, async || {
        let refused = pair.holder.metric("peili_network_refused_connections_total", "").await.ok()?;
        (refused > 0.0).then_some(())
    })
    .await
    .unwrap();
    let absent = peili::oci::Digest::sha256(b"unknown");
    for node in [&pair.holder, &pair.other] {
        for path in [
            format!("/v2/library/app/manifests/v1?ns={REGISTRY}"),
            format!("/v2/library/app/blobs/{}?ns={REGISTRY}", image.layers[0]),
            format!("/v2/library/app/blobs/{absent}?ns={REGISTRY}"),
            "/v2/library/app/tags/list".into(),
            "/no/such/path".into(),
        ] {
            node.fetch(&path).await.unwrap();
        }
    }
    let mut exported = BTreeMap::new();
    for node in [&pair.holder, &pair.other] {
        let text = node.metrics().await.unwrap();
        exported.extend(text.lines().filter_map(family));
        assert!(
            !text.contains("library/app") && !text.contains(REGISTRY) && !text.contains("12D3"),
            "{text}"
        );
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, labels) = sample(line);
            let documented = documented.iter().find(|(family, (kind, _))| is_of(&name, family, kind));
            let (_, (_, allowed)) = documented.unwrap_or_else(|| panic!("{line}"));
            assert!(labels.keys().eq(allowed.keys()), "{line}: its labels are not {allowed:?}");
            for (label, value) in &labels {
                let values = &allowed[label];
                assert!(values.is_empty() || values.contains(value), "{line}: `{value}` is not documented");
            }
        }
    }
    let expected: BTreeMap<_, _> =
        documented.iter().map(|(name, (kind, _))| (name.clone(), kind.clone())).collect();
    for rare in RARE {
        exported.insert(rare.to_owned(), expected[rare].clone());
    }
    assert_eq!(exported, expected, "docs/metrics.md and the registry differ");
    assert!(pair.other.metric("peili_runtime_tasks", "").await.unwrap() >= 5.0);
    let admin = std::net::SocketAddr::from(([127, 0, 0, 1], pair.other.plan.ports.admin));
    let answer = http::request(admin, "GET", "/metrics").unwrap();
    assert!(answer.header("content-type").unwrap().starts_with("application/openmetrics-text"));
}

/// The table of the document: name -> type and labels.
fn documented() -> BTreeMap<String, (String, Labels)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let rows = rows.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[name, kind, labels, what] = cells.as_slice() else { panic!("{line}") };
        assert!(!what.is_empty(), "{line}");
        let labels = labels.split("; ").filter(|label| !label.is_empty()).map(|label| {
            let (name, values) = label.split_once(": ").unwrap_or((label, ""));
            let values = values.split(", ").filter(|value| !value.is_empty()).map(ToOwned::to_owned);
            (name.trim_matches('`').to_owned(), values.collect())
        });
        (name.trim_matches('`').to_owned(), (kind.to_owned(), labels.collect()))
    });
    rows.collect()
}

/// The name, as its samples have it, and the type of a family.
fn family(line: &str) -> Option<(String, String)> {
    let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
    let suffix = match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    };
    Some((format!("{name}{suffix}"), kind.to_owned()))
}

/// Whether samples of `family` are called `name`.
fn is_of(name: &str, family: &str, kind: &str) -> bool {
    let rest = name.strip_prefix(family);
    rest == Some("") || kind == "histogram" && matches!(rest, Some("_bucket" | "_sum" | "_count"))
}

/// The name and labels of a sample, without a histogram's bounds.
fn sample(line: &str) -> (String, BTreeMap<String, String>) {
    let (name, labels) = match line.split_once('{') {
        Some((name, rest)) => (name, rest.rsplit_once('}').unwrap().0),
        None => (line.split(' ').next().unwrap(), ""),
    };
    let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
        let (name, value) = label.split_once('=').unwrap();
        (name.to_owned(), value.trim_matches('"').to_owned())
    });
    (name.to_owned(), labels.filter(|(name, _)| name != "le").collect())
}
