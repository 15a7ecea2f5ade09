//! A real API server that refuses what Peili asks for reasons that are not its own: quotas, what webhooks make of the lock, and what
//! it gives each account to run at once.

use std::time::Duration;

use peili_lab::Requirement;
use peili_lab::kubernetes::Options;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::api::{HOOKS, webhook};
use super::server::{Manner, Server};
use super::{Doctor, in_cluster};
use crate::Case;
use crate::coordination::Cluster;

const QUOTAS: &str = "/api/v1/namespaces/peili/resourcequotas";
const MUTATING: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
const FLOWS: &str = "/apis/flowcontrol.apiserver.k8s.io";

pub(super) fn cases() -> Vec<Case> {
    let server = [Requirement::Kubernetes];
    vec![
        Case::new("doctor::quotas_and_what_webhooks_spoil_are_told_apart", &server, writes),
        Case::new("doctor::too_many_requests_are_named", &server, throttled).timed(),
    ]
}

async fn create(cluster: &Cluster, folder: &str, object: &Value) {
    let (status, said) = cluster.server.admin("POST", folder, Some(object)).await.unwrap();
    assert_eq!(status, 201, "{said}");
}

async fn delete(cluster: &Cluster, path: &str) {
    assert_eq!(cluster.server.admin("DELETE", path, None).await.unwrap().0, 200);
}

/// A quota of so many objects of this kind, with what a controller writes to its status elsewhere: how many are to count, and, unless it has not
/// counted yet, how many there are.
async fn quota(cluster: &Cluster, kind: &str, most: &str, is_counted: bool) {
    let count = format!("count/{kind}");
    let mut object = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {&count: most}},
    });
    create(cluster, QUOTAS, &object).await;
    object["status"] = json!({"hard": {&count: most}});
    if is_counted {
        object["status"]["used"] = json!({&count: "0"});
    }
    let path = format!("{QUOTAS}/few/status");
    let (status, said) = cluster.server.admin("PUT", &path, Some(&object)).await.unwrap();
    assert_eq!(status, 200, "{said}");
}

async fn writes() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let doctor = Doctor::new(&in_cluster(&cluster.server.url(), &folder));
    doctor.finds("all is well", &[]).await;

    let of = |few: &str| format!("{QUOTAS}/{few}");
    // The server looks at its quotas some time after they are made.
    for (what, kind, most, is_counted, expected) in [
        ("a quota without a place for the lock", "leases.coordination.k8s.io", "0", true, &["quota"][..]),
        ("one that nobody has counted", "leases.coordination.k8s.io", "5", false, &["quota"]),
        ("one with a place for it", "leases.coordination.k8s.io", "1", true, &[]),
        ("one of another kind", "secrets", "0", true, &[]),
    ] {
        quota(&cluster, kind, most, is_counted).await;
        if expected.is_empty() {
            sleep(Duration::from_secs(1)).await;
        }
        doctor.comes_to(what, &[], expected).await;
        delete(&cluster, &of("few")).await;
        doctor.comes_to("no quota any more", expected, &[]).await;
    }

    let spoiling = Server::start(Manner::Spoils).await;
    let url = format!("https://{}/", spoiling.address);
    let mut hook = webhook("spoils", &url, Some(&spoiling.authority), 5);
    hook["kind"] = json!("MutatingWebhookConfiguration");
    create(&cluster, MUTATING, &hook).await;
    let found = doctor.comes_to("a webhook spoils the lock", &[], &["write-refused"]).await;
    let evidence = found.verdict("write-refused")["evidence"].to_string();
    assert!(evidence.contains("leaseDurationSeconds"), "the server's words are shown: {evidence}");
    delete(&cluster, &format!("{MUTATING}/spoils")).await;
    doctor.comes_to("no such webhook any more", &["write-refused"], &[]).await;
}

/// The account has a share of what the server runs at once, and something else of the same account uses it up.
async fn throttled() {
    let mut options = Options::on_loopback();
    options.flags.push("--enable-priority-and-fairness=true".to_owned());
    options.flags.push("--runtime-config=api/beta=true".to_owned());
    options.flags.push("--max-requests-inflight=20".to_owned());
    options.flags.push("--max-mutating-requests-inflight=20".to_owned());
    let cluster = Cluster::start(options).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let doctor = Doctor::new(&in_cluster(&cluster.server.url(), &folder));
    doctor.finds("all is well", &[]).await;

    let (status, group) = cluster.server.admin("GET", FLOWS, None).await.unwrap();
    assert_eq!(status, 200, "{group}");
    let version = group["preferredVersion"]["groupVersion"].as_str().unwrap();
    let folder_of = |kind: &str| format!("/apis/{version}/{kind}");
    let limited = json!({
        "apiVersion": version, "kind": "PriorityLevelConfiguration", "metadata": {"name": "few"},
        "spec": {"type": "Limited", "limited": {"limitResponse": {"type": "Reject"}}},
    });
    create(&cluster, &folder_of("prioritylevelconfigurations"), &limited).await;
    let flow = json!({
        "apiVersion": version, "kind": "FlowSchema", "metadata": {"name": "few"},
        "spec": {
            "priorityLevelConfiguration": {"name": "few"},
            "matchingPrecedence": 2,
            "rules": [{
                "subjects": [{"kind": "ServiceAccount", "serviceAccount": {"name": "peili", "namespace": "peili"}}],
                "resourceRules": [{
                    "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true,
                }],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
            }],
        },
    });
    create(&cluster, &folder_of("flowschemas"), &flow).await;

    // Requests that take long: a webhook hangs that is asked about ConfigMaps.
    let hanging = Server::start(Manner::Silent).await;
    let mut hook = webhook("slow", &format!("https://{}/", hanging.address), Some(&hanging.authority), 30);
    hook["webhooks"][0]["rules"] = json!([{
        "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"],
    }]);
    create(&cluster, HOOKS, &hook).await;
    let token = std::fs::read_to_string(folder.join("token")).unwrap();
    let busy: Vec<_> = (0..16)
        .map(|number| {
            let client = cluster.server.client(&token);
            AbortOnDropHandle::new(tokio::spawn(async move {
                let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("n{number}")}});
                loop {
                    let _ = client.send("POST", "/api/v1/namespaces/peili/configmaps?dryRun=All", Some(&object)).await;
                    sleep(Duration::from_millis(250)).await;
                }
            }))
        })
        .collect();
    let found = doctor.comes_to("others use up the account's share", &[], &["throttled"]).await;
    assert!(found.verdict("throttled")["fix"].as_str().unwrap().contains("FlowSchema"));
    drop(busy);
    doctor.comes_to("nobody does any more", &["throttled"], &[]).await;
}
