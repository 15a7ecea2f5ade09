//! Rights, objects and credentials, on a real API server.

use std::time::{Duration, SystemTime};

use peili_lab::Requirement;
use peili_lab::kubernetes::{Options, StandIn};
use peili_lab::scratch::Scratch;
use serde_json::{Value, json};

use super::{Doctor, in_cluster};
use crate::Case;
use crate::coordination::{Cluster, LEASE};

const FLEET: &str = "/api/v1/namespaces/peili/configmaps/peili-fleet";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

pub(super) fn cases() -> Vec<Case> {
    let server = [Requirement::Kubernetes];
    let long = Duration::from_secs(150);
    vec![
        Case::new("doctor::each_missing_right_is_named_and_its_fix_clears_it", &server, rights).within(long),
        Case::new("doctor::an_authorizer_that_fails_is_not_one_that_forbids", &server, unsure),
        Case::new("doctor::the_stand_in_says_what_the_real_one_says", &[], stand_in),
        Case::new("doctor::credentials_and_namespaces_are_told_apart", &server, credentials).within(long),
        Case::new(
            "doctor::a_clock_that_is_behind_is_seen_by_the_token",
            &[Requirement::Kubernetes, Requirement::Faketime],
            clock,
        ),
    ]
}

/// Where objects of this kind are.
fn folder(object: &Value) -> String {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    match object["kind"].as_str().unwrap() {
        "Role" => format!("{RBAC}/namespaces/{namespace}/roles"),
        "RoleBinding" => format!("{RBAC}/namespaces/{namespace}/rolebindings"),
        "ClusterRole" => format!("{RBAC}/clusterroles"),
        "ClusterRoleBinding" => format!("{RBAC}/clusterrolebindings"),
        "Lease" => format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"),
        "ConfigMap" => format!("/api/v1/namespaces/{namespace}/configmaps"),
        other => panic!("{other}"),
    }
}

async fn apply(cluster: &Cluster, objects: &[Value]) {
    for object in objects {
        let (status, said) = cluster.server.admin("POST", &folder(object), Some(object)).await.unwrap();
        assert_eq!(status, 201, "{said}");
    }
}

async fn delete(cluster: &Cluster, objects: &[Value]) {
    for object in objects {
        let path = format!("{}/{}", folder(object), object["metadata"]["name"].as_str().unwrap());
        assert_eq!(cluster.server.admin("DELETE", &path, None).await.unwrap().0, 200);
    }
}

/// All rights that docs/elections.md has, each as a rule of its own: group, resource, name, verb.
const RULES: [(&str, &str, &str, &str); 8] = [
    ("coordination.k8s.io", "leases", "peili", "get"),
    ("coordination.k8s.io", "leases", "peili", "update"),
    ("coordination.k8s.io", "leases", "peili", "watch"),
    ("coordination.k8s.io", "leases", "", "create"),
    ("", "configmaps", "peili-fleet", "get"),
    ("", "configmaps", "peili-fleet", "update"),
    ("", "configmaps", "", "create"),
    ("events.k8s.io", "events", "", "create"),
];
/// What is said without each of them, where neither object is there.
const WITHOUT: [&str; 8] = [
    "rights-lock",
    "rights-lock",
    "rights-watch",
    "lock-missing",
    "rights-coordinator",
    "rights-coordinator",
    "summary-missing",
    "rights-coordinator",
];

fn rules(without: Option<usize>) -> Value {
    let all = RULES.iter().enumerate().filter(|(number, _)| Some(*number) != without);
    all.map(|(_, (group, resource, name, verb))| {
        let mut rule = json!({"apiGroups": [group], "resources": [resource], "verbs": [verb]});
        if !name.is_empty() {
            rule["resourceNames"] = json!([name]);
        }
        rule
    })
    .collect()
}

async fn rights() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    let folder = cluster.credentials("account").await;
    let config = in_cluster(&cluster.server.url(), &folder);
    let mut doctor = Doctor::new(&config);
    let none = ["rights-lock", "rights-watch", "rights-coordinator"];
    let found = doctor.finds("no right at all", &none).await;
    // What is printed is all that is needed: nobody wrote these Roles but the doctor.
    let mut made = Vec::new();
    for code in none {
        for objects in found.manifests(code) {
            apply(&cluster, &objects).await;
            made.push(objects);
        }
    }
    let written = Scratch::new().unwrap();
    let folder = written.path().join("fix");
    let writing = Doctor::new(&config).with_arguments(&["--fix-manifests", folder.to_str().unwrap()]);
    let missing = ["lock-missing", "summary-missing"];
    let mut found = doctor.run().await;
    while found.codes != super::sorted(&missing) {
        assert!(
            found.codes.iter().all(|code| none.contains(&&**code) || missing.contains(&&**code)),
            "{found:#?}"
        );
        found = doctor.run().await;
    }
    let report = writing.finds("manifests as files", &missing).await.report;
    let verdicts = report["verdicts"].as_array().unwrap();
    // One of two is enough, and the first gives no right.
    assert!(verdicts.iter().all(|verdict| verdict["one-is-enough"] == true), "{verdicts:#?}");
    let manifests: Vec<&Value> = verdicts.iter().map(|verdict| &verdict["manifests"][0]).collect();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), manifests.len(), "a file for each");
    for manifest in manifests {
        let text = std::fs::read_to_string(folder.join(manifest["file"].as_str().unwrap())).unwrap();
        let read: Vec<Value> = text.split("---\n").map(|one| serde_saphyr::from_str(one).unwrap()).collect();
        assert_eq!(json!(read), manifest["objects"], "{text}");
    }
    for code in missing {
        // The first of two: either does.
        apply(&cluster, &found.manifests(code)[0]).await;
    }
    doctor.finds("with the objects that are printed", &[]).await;
    for objects in &made {
        delete(&cluster, objects).await;
    }
    let mut lease = cluster.lease().await.unwrap();
    lease["spec"] = json!({"holderIdentity": "spegel-7f2k", "leaseDurationSeconds": 15});
    assert_eq!(cluster.server.admin("PUT", LEASE, Some(&lease)).await.unwrap().0, 200);
    doctor.comes_to("and then nothing again", &[], &none).await;

    cluster.allow_all().await;
    let found = doctor.comes_to("a lease of somebody else", &none, &["lock-foreign"]).await;
    assert!(found.verdict("lock-foreign")["evidence"].to_string().contains("spegel-7f2k"), "{found:?}");
    for path in [LEASE, FLEET] {
        assert_eq!(cluster.server.admin("DELETE", path, None).await.unwrap().0, 200);
    }
    doctor.finds("all rights, and no object yet", &[]).await;

    let role = format!("{RBAC}/namespaces/peili/roles/elects");
    for (number, code) in WITHOUT.iter().enumerate() {
        let what = format!("without {} {}", RULES[number].3, RULES[number].1);
        let body = json!({"metadata": {"name": "elects"}, "rules": rules(Some(number))});
        assert_eq!(cluster.server.admin("PUT", &role, Some(&body)).await.unwrap().0, 200);
        let found = doctor.comes_to(&what, &[], &[code]).await;
        assert_eq!(found.verdict(code)["confidence"], "high");
        // The last one is a Role, where it is not the only one.
        let fix = found.manifests(code).pop().unwrap();
        let given = fix[0]["rules"].as_array().unwrap();
        assert!(
            given.len() == 1 && given[0]["verbs"] == json!([RULES[number].3]),
            "only what is missing: {fix:?}"
        );
        apply(&cluster, &fix).await;
        doctor.comes_to(&format!("{what}, mended"), &[code], &[]).await;
        delete(&cluster, &fix).await;
        let body = json!({"metadata": {"name": "elects"}, "rules": rules(None)});
        assert_eq!(cluster.server.admin("PUT", &role, Some(&body)).await.unwrap().0, 200);
        doctor.comes_to(&format!("{what}, given back"), &[code], &[]).await;
    }
    // Who may not make what is there lacks nothing.
    let lease = json!({"kind": "Lease", "metadata": {"name": "peili", "namespace": "peili"}});
    apply(&cluster, &[lease]).await;
    let body = json!({"metadata": {"name": "elects"}, "rules": rules(Some(3))});
    assert_eq!(cluster.server.admin("PUT", &role, Some(&body)).await.unwrap().0, 200);
    doctor.finds("the Lease is there, and may not be made", &[]).await;

    doctor.merge(&json!({"kubernetes": {"read-node": true}}));
    let found = doctor.finds("may not read its Node", &["rights-node"]).await;
    let fix = found.manifests("rights-node").pop().unwrap();
    apply(&cluster, &fix).await;
    doctor.comes_to("may read its Node", &["rights-node"], &[]).await;

    // Who may not ask what it may do.
    let path = format!("{RBAC}/clusterrolebindings/system:basic-user");
    assert_eq!(cluster.server.admin("DELETE", &path, None).await.unwrap().0, 200);
    doctor.comes_to("no reviews", &[], &["review-refused"]).await;
}

/// Roles are asked first, and a webhook after them that nobody answers.
async fn unsure() {
    let scratch = Scratch::new().unwrap();
    let file = scratch.path().join("webhook");
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "dead", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "server"}],
        "contexts": [{"name": "only", "context": {"cluster": "dead", "user": "server"}}],
        "current-context": "only",
    });
    std::fs::write(&file, config.to_string()).unwrap();
    let mut options = Options::on_loopback();
    options.flags.push("--authorization-mode=Webhook".to_owned());
    options.flags.push(format!("--authorization-webhook-config-file={}", file.display()));
    let cluster = Cluster::start(options).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let doctor = Doctor::new(&in_cluster(&cluster.server.url(), &folder));
    doctor.finds("Roles allow all", &[]).await;
    let role = format!("{RBAC}/namespaces/peili/roles/elects");
    let watch = RULES.iter().position(|(_, _, _, verb)| *verb == "watch");
    let body = json!({"metadata": {"name": "elects"}, "rules": rules(watch)});
    assert_eq!(cluster.server.admin("PUT", &role, Some(&body)).await.unwrap().0, 200);
    let found = doctor.comes_to("without a Role, the webhook is asked", &[], &["rights-watch"]).await;
    let verdict = found.verdict("rights-watch");
    assert!(verdict["evidence"].to_string().contains("127.0.0.1:1"), "{verdict}");
    assert_eq!(verdict["confidence"], "medium", "{verdict}");
}

/// The demonstration takes it where there is no real one.
async fn stand_in() {
    let server = StandIn::start(None, "peili").unwrap();
    let doctor = Doctor::new(&in_cluster(&server.url(), &server.credentials().unwrap()));
    doctor.finds("all is well", &[]).await;
    server.forbid(Some(("update", "leases")));
    let found = doctor.finds("the lock may not be replaced", &["rights-lock"]).await;
    for object in found.manifests("rights-lock").iter().flatten() {
        assert_eq!(server.admin("POST", &folder(object), Some(object)).await.unwrap().0, 201);
    }
    doctor.finds("what is printed is there", &[]).await;
}

async fn credentials() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let mut doctor = Doctor::new(&in_cluster(&cluster.server.url(), &folder));
    doctor.finds("all is well", &[]).await;
    let token = |token: &str| cluster.server.write_service_account_dir(&folder, token, "peili").unwrap();

    // The server takes it a minute longer, so it was over before.
    let over = SystemTime::now() - Duration::from_secs(3_600);
    token(&cluster.server.token_until("peili", "peili", over).await.unwrap());
    let found = doctor.finds("a token that is over", &["token-expired"]).await;
    assert!(found.report.to_string().contains("system:serviceaccount:peili:peili"));
    let text = std::fs::read_to_string(folder.join("token")).unwrap();
    assert!(!found.report.to_string().contains(text.trim()), "the token is shown");

    let path = "/api/v1/namespaces/peili/serviceaccounts/peili/token";
    let body = json!({"spec": {"audiences": ["vault"]}});
    let (status, made) = cluster.server.admin("POST", path, Some(&body)).await.unwrap();
    assert_eq!(status, 201, "{made}");
    token(made["status"]["token"].as_str().unwrap());
    doctor.finds("a token for others", &["token-audience"]).await;

    cluster.server.service_account("peili", "gone").await.unwrap();
    token(&cluster.server.token("peili", "gone", Duration::from_secs(600)).await.unwrap());
    let path = "/api/v1/namespaces/peili/serviceaccounts/gone";
    assert_eq!(cluster.server.admin("DELETE", path, None).await.unwrap().0, 200);
    doctor.finds("an account that is gone", &["token-rejected"]).await;

    let missing = [("token", "no-token"), ("ca.crt", "no-authority"), ("namespace", "no-namespace")];
    for (file, code) in missing {
        let folder = cluster.credentials(&format!("without-{file}")).await;
        std::fs::remove_file(folder.join(file)).unwrap();
        doctor.merge(&json!({"kubernetes": {"credentials": folder}}));
        doctor.finds(&format!("no {file}"), &[code]).await;
    }
    let folder = cluster.credentials("no-certificate").await;
    std::fs::remove_file(folder.join("ca.crt")).unwrap();
    std::fs::write(folder.join("ca.crt"), "no certificate").unwrap();
    doctor.merge(&json!({"kubernetes": {"credentials": folder}}));
    doctor.finds("a ca.crt without a certificate", &["no-authority"]).await;
    // Whoever opened it would wait for ever.
    let folder = cluster.credentials("pipe").await;
    std::fs::remove_file(folder.join("namespace")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(folder.join("namespace")).status().unwrap();
    assert!(made.success());
    doctor.merge(&json!({"kubernetes": {"credentials": folder}}));
    doctor.finds("a pipe in the place of the namespace", &["no-namespace"]).await;
    let folder = cluster.credentials("account").await;
    doctor.merge(&json!({"kubernetes": {"credentials": folder, "namespace": "nowhere"}}));
    // Whether it is there is nothing that who has no rights in it is told.
    let none = ["rights-lock", "rights-watch", "rights-coordinator"];
    let found = doctor.finds("a namespace without rights", &none).await;
    let verdict = found.verdict("rights-lock");
    assert_eq!(verdict["confidence"], "medium");
    assert!(verdict["other-causes"].to_string().contains("namespace"), "{verdict}");

    let everywhere = json!({
        "metadata": {"name": "peili-everywhere"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "namespace": "peili", "name": "peili"}],
    });
    let path = format!("{RBAC}/clusterrolebindings");
    assert_eq!(cluster.server.admin("POST", &path, Some(&everywhere)).await.unwrap().0, 201);
    doctor.comes_to("a namespace that is not there", &none, &["namespace-missing"]).await;
    cluster.server.namespace("ends").await.unwrap();
    doctor.merge(&json!({"kubernetes": {"namespace": "ends"}}));
    doctor.finds("a namespace that is there", &[]).await;
    // No controller is there to end it.
    assert_eq!(cluster.server.admin("DELETE", "/api/v1/namespaces/ends", None).await.unwrap().0, 200);
    doctor.finds("a namespace that is being deleted", &["namespace-terminating"]).await;
}

async fn clock() {
    let cluster = Cluster::start(Options::on_loopback()).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let mut doctor = Doctor::new(&in_cluster(&cluster.server.url(), &folder));
    doctor.finds("the clock is right", &[]).await;
    let library = peili_lab::requirements::faketime().unwrap();
    doctor.environment = vec![
        ("LD_PRELOAD".into(), library.display().to_string()),
        ("FAKETIME".into(), "-300".into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()),
    ];
    doctor.finds("the clock is five minutes behind", &["clock-behind"]).await;
    // As where it has no battery: no certificate counts yet, which is no other fault.
    doctor.environment[1].1 = "@1970-01-02 00:00:00".into();
    let found = doctor.finds("the clock begins anew", &["clock-behind"]).await;
    let verdict = found.verdict("clock-behind");
    assert_eq!(verdict["severity"], "problem", "{verdict}");
    assert!(verdict["evidence"].to_string().contains("tls-time"), "{verdict}");
}
