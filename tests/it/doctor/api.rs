//! Servers that are not there, not well or not the right ones, and what stands before the object that is written.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use peili_lab::kubernetes::{Options, Part};
use peili_lab::node::binary;
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use super::server::{Manner, Server};
use super::{Doctor, in_cluster};
use crate::Case;
use crate::coordination::Cluster;

pub(super) const HOOKS: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";

pub(super) fn cases() -> Vec<Case> {
    let server = [Requirement::Kubernetes];
    vec![
        Case::new("doctor::a_machine_without_a_cluster_has_a_verdict", &[], nothing),
        Case::new("doctor::who_answers_instead_of_an_api_server_is_seen", &[], impostors),
        Case::new("doctor::a_server_that_is_not_well_is_told_from_one_that_is_gone", &server, unwell)
            .within(Duration::from_secs(150)),
        Case::new("doctor::printed_policies_are_taken_by_a_server", &server, printed),
    ]
}

async fn nothing() {
    let scratch = Scratch::new().unwrap();
    let root = scratch.path().display().to_string();
    let mut doctor = Doctor::new(&json!({})).with_arguments(&["--root", &root]);
    doctor.finds("nothing is configured", &["no-cluster"]).await;
    doctor.merge(&json!({"election": {"backend": "gossip"}}));
    doctor.finds("no API is wanted", &[]).await;
    // As it comes: containerd, and no file at all.
    let socket = scratch.path().join("containerd.sock");
    doctor.merge(
        &json!({"election": {"backend": "auto"}, "store": {"source": "containerd", "socket": socket}}),
    );
    doctor.finds("a bare machine", &["no-cluster", "containerd-absent"]).await;
    // In the cluster of nobody.
    doctor
        .merge(&json!({"kubernetes": {"endpoints": ["https://127.0.0.1:1"], "credentials": scratch.path()}}));
    let all = ["no-token", "no-authority", "no-namespace", "api-refused", "containerd-absent"];
    doctor.finds("everything at once", &all).await;
    doctor.merge(&json!({"kubernetes": {"endpoints": ["https://no-such-host.invalid:6443"]}}));
    let all = ["no-token", "no-authority", "no-namespace", "api-unresolved", "containerd-absent"];
    doctor.finds("a name that is none", &all).await;
    // For people.
    let mut command = Command::new(binary().unwrap());
    command.args([
        "doctor",
        "--root",
        &root,
        "--set",
        "election.backend=gossip",
        "--set",
        "store.source=layout:/nowhere",
    ]);
    let output = command.env_remove("PEILI_CONFIG").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("nothing is wrong"), "{text}");
    command
        .args(["--set", "store.source=containerd", "--set"])
        .arg(format!("store.socket={}", socket.display()));
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.starts_with("problem containerd-absent: "), "{text}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("there are problems"), "what was found is no error of the program: {said}");
    // The report is there where the manifests cannot be written.
    let output = command.args(["--fix-manifests", "/proc/nowhere"]).output().unwrap();
    let (text, said) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("problem containerd-absent: "), "{text}");
    assert!(said.starts_with("error: cannot make /proc/nowhere"), "{said}");
}

async fn impostors() {
    let scratch = Scratch::new().unwrap();
    let says =
        [(Manner::Expired, "tls-time"), (Manner::Silent, "api-silent"), (Manner::Page, "not-an-api-server")];
    for (manner, code) in says {
        let server = Server::start(manner).await;
        let config = in_cluster(&format!("https://{}", server.address), &server.credentials(&scratch));
        Doctor::new(&config).finds(&format!("{manner:?}"), &[code]).await;
    }
    // One that speaks no TLS at all.
    let server = Server::start(Manner::Page).await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let _plain = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut part = [0; 64];
            let _ = stream.read(&mut part).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    }));
    let config = in_cluster(&format!("https://{address}"), &server.credentials(&scratch));
    Doctor::new(&config).finds("no TLS", &["tls-broken"]).await;
}

pub(super) fn webhook(name: &str, url: &str, authority: Option<&str>, seconds: u32) -> Value {
    use base64::Engine as _;
    let mut client = json!({"url": url});
    if let Some(authority) = authority {
        client["caBundle"] = json!(base64::engine::general_purpose::STANDARD.encode(authority));
    }
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [{
            "name": format!("{name}.peili.test"),
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "timeoutSeconds": seconds,
            "clientConfig": client,
            "rules": [{
                "apiGroups": ["coordination.k8s.io"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"],
                "resources": ["leases"],
            }],
        }],
    })
}

async fn unwell() {
    let mut cluster = Cluster::start(Options::on_loopback().named(&["api.test"])).await;
    cluster.allow_all().await;
    let folder = cluster.credentials("account").await;
    let url = cluster.server.url();
    let mut doctor = Doctor::new(&in_cluster(&url, &folder));
    doctor.finds("all is well", &[]).await;

    // One address of two.
    doctor.merge(&json!({"kubernetes": {"service": "127.0.0.1:1"}}));
    doctor.finds("the Service is dead", &["service-unreachable"]).await;
    let address = cluster.server.address().to_string();
    doctor.merge(&json!({"kubernetes": {"service": address, "endpoints": ["https://127.0.0.1:1"]}}));
    doctor.finds("an endpoint is dead", &["endpoint-unreachable"]).await;
    doctor.merge(&json!({"kubernetes": {"service": "", "endpoints": [url]}}));

    // Names: one that the certificate has, and one that it has not.
    let port = cluster.server.address().port();
    for (name, expected) in [("api.test", &[][..]), ("other.test", &["tls-name"])] {
        let config = in_cluster(&format!("https://{name}:{port}"), &folder);
        let named = Doctor::new(&config).with_file("/etc/hosts", &format!("127.0.0.1 {name}\n"));
        let found = named.finds(name, expected).await;
        if !expected.is_empty() {
            let evidence = found.verdict("tls-name")["evidence"].to_string();
            assert!(evidence.contains("api.test"), "its own names are shown: {evidence}");
        }
    }

    // The authority of another cluster.
    let other = ApiServer::start(Options::on_loopback()).await.unwrap();
    let foreign = cluster.credentials("foreign").await;
    std::fs::remove_file(foreign.join("ca.crt")).unwrap();
    std::fs::copy(other.authority(), foreign.join("ca.crt")).unwrap();
    drop(other);
    Doctor::new(&in_cluster(&url, &foreign)).finds("another authority", &["tls-issuer"]).await;

    // What is asked before an object is taken.
    let refusing = Server::start(Manner::Webhook).await;
    let hanging = Server::start(Manner::Silent).await;
    let at = |server: &Server| format!("https://{}/", server.address);
    let hooks = [
        ("dead", webhook("dead", "https://127.0.0.1:1/dead", None, 1), "webhook-dead"),
        ("no", webhook("no", &at(&refusing), Some(&refusing.authority), 5), "admission-denied"),
        ("slow", webhook("slow", &at(&hanging), Some(&hanging.authority), 20), "write-silent"),
    ];
    for (name, hook, code) in hooks {
        assert_eq!(cluster.server.admin("POST", HOOKS, Some(&hook)).await.unwrap().0, 201);
        doctor.comes_to(&format!("webhook {name}"), &[], &[code]).await;
        assert_eq!(cluster.server.admin("DELETE", &format!("{HOOKS}/{name}"), None).await.unwrap().0, 200);
        doctor.comes_to(&format!("no webhook {name} any more"), &[code], &[]).await;
    }

    // Two at once.
    let dead = webhook("dead", "https://127.0.0.1:1/dead", None, 1);
    assert_eq!(cluster.server.admin("POST", HOOKS, Some(&dead)).await.unwrap().0, 201);
    doctor.merge(&json!({"kubernetes": {"read-node": true}}));
    doctor
        .comes_to(
            "a dead webhook, and no right to the Node",
            &["rights-node"],
            &["rights-node", "webhook-dead"],
        )
        .await;
    doctor.merge(&json!({"kubernetes": {"read-node": false}}));
    assert_eq!(cluster.server.admin("DELETE", &format!("{HOOKS}/dead"), None).await.unwrap().0, 200);
    doctor.comes_to("well again", &["webhook-dead"], &[]).await;

    cluster.server.freeze(Part::Storage).unwrap();
    doctor.finds("the storage stands still", &["control-plane-unwell"]).await;
    cluster.server.thaw(Part::Storage).unwrap();
    cluster.server.freeze(Part::Server).unwrap();
    doctor.finds("the server stands still", &["tls-silent"]).await;
    cluster.server.thaw(Part::Server).unwrap();
    cluster.server.stop_hard(Part::Server);
    doctor.finds("the server is gone", &["api-refused"]).await;
}

/// Those of Cilium are of a kind that this server does not know.
async fn printed() {
    use peili::doctor::place::{Cni, Place};
    use peili::doctor::{Ports, fix};
    let mut options = Options::on_loopback();
    options.flags.push("--runtime-config=networking.k8s.io/v1=true".to_owned());
    let cluster = Cluster::start(options).await;
    let place = Place { cni: Cni::Unknown, label: ("app".into(), "peili".into()), ..Place::default() };
    let ports = Ports { peers: vec![5001, 5002], metrics: Some(5003), out: vec![80, 443, 6443] };
    let policies = fix::policies("peili", &place, &ports);
    let path = "/apis/networking.k8s.io/v1/namespaces/peili/networkpolicies?dryRun=All";
    let meant = &policies[0].objects[0];
    let (status, taken) = cluster.server.admin("POST", path, Some(meant)).await.unwrap();
    assert_eq!(status, 201, "{taken}");
    // What a server does not know it leaves out.
    assert_eq!(taken["spec"], meant["spec"]);
    let text = policies[0].text();
    let read: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(&read, meant);
}
