//! Which zone a node is in, on a real API server: as its Node says, then as its pod's labels say, and as it was known, after a start
//! without either; and that the others, and its own policies, hear of each change.

use std::time::{Duration, Instant};

use peili_lab::kubernetes::{Options, Part};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Node, Requirement, policy, wait};
use serde_json::json;

use crate::Case;
use crate::cli::layout;
use crate::coordination::Cluster;

/// A pause after a refusal, and how often the labels are looked at.
const SOON: Duration = Duration::from_secs(40);

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new(
        "zone::it_is_known_late_and_told_to_all",
        &[Requirement::Kubernetes, Requirement::Policies],
        told,
    )]
}

/// Waits until the node, its policy, and another one of it, says so.
async fn says(node: &Node, other: &Node, zone: &str) {
    let start = Instant::now();
    wait::until(&format!("zone {zone:?}"), SOON, async || {
        let (own, of_other) = (node.status().await.ok()?, other.status().await.ok()?);
        let peers = of_other["network"]["peers"].as_array()?.clone();
        let peer = peers.into_iter().find(|peer| peer["id"] == *node.plan.peer_id)?;
        let told = if zone.is_empty() { "zone is not known" } else { &format!("outside of zone {zone}") };
        let is_told = own["policies"].to_string().contains(told);
        (own["node"]["zone"] == zone && peer["zone"] == zone && is_told).then_some(())
    })
    .await
    .unwrap();
    println!("zone {zone:?} is told after {:?}", start.elapsed());
}

async fn told() {
    let mut cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow(&["get", "update", "watch"], true).await;
    let post = async |path: &str, body| {
        let (status, said) = cluster.server.admin("POST", path, Some(&body)).await.unwrap();
        assert_eq!(status, 201, "{said}");
    };
    post(
        "/api/v1/nodes",
        json!({"metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "eu-1a"}}}),
    )
    .await;
    let scratch = Scratch::new().unwrap();
    let (key, labels) = (scratch.path().join("key"), scratch.path().join("labels"));
    std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
    layout(&scratch.path().join("layout"), &[]);
    let store = format!("layout:{}", scratch.path().join("layout").display());
    let (mut here, mut other) =
        (Plan::on_loopback("here", &store).unwrap(), Plan::on_loopback("other", &store).unwrap());
    other.merge(&json!({"network": {"cluster-key": [key]}, "node": {"zone": "north"}}));
    here.merge(&json!({
        "node": {"pod-labels": labels},
        "network": {"cluster-key": [key], "dns": [other.control()]},
        "policies": {"trust": [{
            "name": "boundary", "path": policy("zone-boundary"), "settings": {"claimed": true},
        }]},
        "kubernetes": {
            "service": cluster.server.address(),
            "credentials": cluster.credentials("account").await,
            "read-node": true,
        },
    }));
    let other = other.start().await.unwrap();
    let mut here = here.start().await.unwrap();
    says(&here, &other, "").await;
    wait::until("that it may not be read", SOON, async || {
        let problems = here.status().await.ok()?["problems"].to_string();
        (problems.contains("zone: ") && problems.contains("allow `get` of this Node")).then_some(())
    })
    .await
    .unwrap();
    let rules =
        json!([{"apiGroups": [""], "resources": ["nodes"], "resourceNames": ["here"], "verbs": ["get"]}]);
    post(
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        json!({"metadata": {"name": "zone"}, "rules": rules}),
    )
    .await;
    post(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        json!({
            "metadata": {"name": "zone"},
            "subjects": [{"kind": "ServiceAccount", "namespace": "peili", "name": "peili"}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "zone"},
        }),
    )
    .await;
    says(&here, &other, "eu-1a").await;
    assert!(!here.status().await.unwrap()["problems"].to_string().contains("zone: "));
    let asked = async || {
        let of_node = |request: &peili_lab::kubernetes::Request| request.resource == "nodes";
        cluster.server.requests(of_node).unwrap().iter().filter(|request| request.verb == "get").count()
    };
    let before = asked().await;
    std::fs::write(&labels, "app=\"peili\"\ntopology.kubernetes.io/zone=\"eu-1b\"\n").unwrap();
    says(&here, &other, "eu-1b").await;
    assert_eq!(asked().await, before, "it is asked until it has answered, and not again");

    cluster.server.stop_hard(Part::Server);
    std::fs::remove_file(&labels).unwrap();
    here.restart().await.unwrap();
    assert_eq!(here.status().await.unwrap()["node"]["zone"], "eu-1b", "as it was known");
    says(&here, &other, "eu-1b").await;
}
