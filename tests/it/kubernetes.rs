//! The Kubernetes API server of the laboratory: that it is real where tests stand on it, and that it can be stopped, frozen and
//! started again. Nothing of Peili runs here.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use peili::cluster::Kind;
use peili::election::strict::Lock;
use peili_lab::kubernetes::{Options, Part, Rule, StandIn};
use peili_lab::netns::{Addresses, Network};
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement, wait};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::Case;
use crate::coordination::{LEASE, Place, lock, suite};

/// An hour.
const LONG: Duration = Duration::from_secs(3600);
/// Longest until the server acts by what it was told.
const SOON: Duration = Duration::from_secs(10);
/// In which a frozen server would have answered.
const SHORT: Duration = Duration::from_millis(500);
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/test/leases";
const LEADER: &str = "/apis/coordination.k8s.io/v1/namespaces/test/leases/leader";

pub(crate) fn cases() -> Vec<Case> {
    let node = [Requirement::Root, Requirement::Iproute2, Requirement::Kubernetes];
    vec![
        Case::new("kubernetes::leases_rights_and_tokens_are_real", &[Requirement::Kubernetes], real),
        Case::new("kubernetes::it_stops_freezes_and_comes_back", &node, comes_back),
        Case::new("kubernetes::the_stand_in_does_what_the_server_does", &[], stands_in),
    ]
}

fn lease(holder: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "leader"},
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": 15,
            "renewTime": "2026-01-01T00:00:00.000000Z",
        },
    })
}

fn version(object: &Value) -> String {
    object["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
}

/// One server for all that it is asked in order, since its start takes longest.
async fn real() {
    let began = Instant::now();
    let server = ApiServer::start(Options::on_loopback().named(&["api.test"])).await.unwrap();
    println!("kubernetes: {} is ready after {:?}", server.version(), began.elapsed());
    server.namespace("test").await.unwrap();
    let lease = leases(async |method, path, body| server.admin(method, path, body).await).await;
    rights(&server, lease).await;
    tokens(&server).await;
    // With a kubeconfig other programs find it.
    let config: Value = serde_json::from_slice(&std::fs::read(server.kubeconfig()).unwrap()).unwrap();
    assert_eq!(config["clusters"][0]["cluster"]["server"], server.url());
}

/// What the core of the strict role takes for granted of a Lease. `admin`: a request of the administrator of a server with the
/// namespace `test`. Returns the one that is left.
async fn leases(admin: impl AsyncFn(&str, &str, Option<&Value>) -> anyhow::Result<(u16, Value)>) -> Value {
    let (status, made) = admin("POST", LEASES, Some(&lease("a"))).await.unwrap();
    assert_eq!(status, 201, "{made}");
    let (status, again) = admin("POST", LEASES, Some(&lease("b"))).await.unwrap();
    assert_eq!((status, again["reason"].as_str()), (409, Some("AlreadyExists")), "{again}");

    let mut changed = made.clone();
    changed["spec"]["holderIdentity"] = "b".into();
    let (status, updated) = admin("PUT", LEADER, Some(&changed)).await.unwrap();
    assert_eq!((status, updated["spec"]["holderIdentity"].as_str()), (200, Some("b")), "{updated}");
    assert_ne!(version(&updated), version(&made));
    let (status, late) = admin("PUT", LEADER, Some(&made)).await.unwrap();
    assert_eq!((status, late["reason"].as_str()), (409, Some("Conflict")), "{late}");
    // What changes nothing is answered as a success, and is no write.
    let (status, same) = admin("PUT", LEADER, Some(&updated)).await.unwrap();
    assert_eq!((status, version(&same)), (200, version(&updated)), "{same}");

    let (status, _) = admin("DELETE", LEADER, None).await.unwrap();
    assert_eq!(status, 200);
    let (status, gone) = admin("PUT", LEADER, Some(&updated)).await.unwrap();
    assert_eq!((status, gone["reason"].as_str()), (409, Some("Conflict")), "{gone}");
    let (status, made) = admin("POST", LEASES, Some(&lease("c"))).await.unwrap();
    assert_eq!(status, 201, "{made}");
    // For show.
    let mut changed = made.clone();
    changed["spec"]["holderIdentity"] = "d".into();
    let (status, shown) = admin("PUT", &format!("{LEADER}?dryRun=All"), Some(&changed)).await.unwrap();
    assert_eq!((status, shown["spec"]["holderIdentity"].as_str()), (200, Some("d")), "{shown}");
    assert_eq!(admin("GET", LEADER, None).await.unwrap(), (200, made.clone()));
    made
}

/// The demonstration's server, where no real one is, is held to what this one and the lock of a real one are held to.
async fn stands_in() {
    let server = StandIn::start(None, "test").unwrap();
    leases(async |method, path, body| server.admin(method, path, body).await).await;
    suite(&StoodIn(StandIn::start(None, "peili").unwrap())).await;
}

struct StoodIn(StandIn);

#[async_trait]
impl Place for StoodIn {
    fn lock(&self) -> Arc<dyn Lock> {
        lock(Kind::Lease, self.0.url(), &self.0.credentials().unwrap())
    }

    async fn delete(&self) {
        assert_eq!(self.0.admin("DELETE", LEASE, None).await.unwrap().0, 200);
    }
}

/// An account may what its role says, of the object that it names, and nothing else; and the audit log has counted it.
async fn rights(server: &ApiServer, mut lease: Value) {
    server.service_account("test", "candidate").await.unwrap();
    let candidate = server.client(&server.token("test", "candidate", LONG).await.unwrap());
    let (status, refused) = candidate.send("GET", LEADER, None).await.unwrap();
    assert_eq!(status, 403, "{refused}");
    let rule =
        Rule { verbs: &["get", "update"], resources: &["leases.coordination.k8s.io"], names: &["leader"] };
    server.role("test", "elects", &[rule]).await.unwrap();
    server.role_binding("test", "elects", "candidate").await.unwrap();

    assert_eq!(candidate.send("GET", LEADER, None).await.unwrap().0, 200);
    for holder in ["d", "e", "f"] {
        lease["spec"]["holderIdentity"] = holder.into();
        let status;
        (status, lease) = candidate.send("PUT", LEADER, Some(&lease)).await.unwrap();
        assert_eq!(status, 200, "{lease}");
    }
    assert_eq!(candidate.send("GET", &format!("{LEASES}/other"), None).await.unwrap().0, 403);
    assert_eq!(candidate.send("POST", LEASES, Some(&self::lease("g"))).await.unwrap().0, 403);

    // By who asked for what, and with what success.
    let mut seen = Vec::new();
    let logged = wait::until("the audit log", SOON, async || {
        seen = server
            .requests(|request| request.user == "system:serviceaccount:test:candidate" && request.is_write())
            .unwrap();
        (seen.len() == 4).then_some(())
    });
    if let Err(error) = logged.await {
        panic!("{error}: {seen:#?}");
    }
    let updates = seen.iter().filter(|request| request.verb == "update" && request.code == 200);
    assert_eq!(updates.filter(|request| request.name == "leader").count(), 3, "{seen:#?}");
    assert_eq!((seen[3].verb.as_str(), seen[3].code), ("create", 403), "{seen:#?}");
    assert!(seen.iter().all(|request| request.resource == "leases" && request.namespace == "test"));
    let deleted = server.requests(|request| request.verb == "delete" && request.resource == "leases");
    assert_eq!(deleted.unwrap().len(), 1);
}

/// Tokens end, belong to an account that is there, and can be asked for.
async fn tokens(server: &ApiServer) {
    let ended = SystemTime::now() - Duration::from_secs(120);
    let ended = server.token_until("test", "candidate", ended).await.unwrap();
    assert_eq!(server.client(&ended).send("GET", LEADER, None).await.unwrap().0, 401);
    assert_eq!(server.client("no token").send("GET", LEADER, None).await.unwrap().0, 401);

    let account = "/api/v1/namespaces/test/serviceaccounts/candidate";
    let wish = json!({"spec": {"expirationSeconds": 600}});
    let (status, answer) = server.admin("POST", &format!("{account}/token"), Some(&wish)).await.unwrap();
    assert_eq!(status, 201, "{answer}");
    let requested = answer["status"]["token"].as_str().unwrap();
    assert_eq!(server.client(requested).send("GET", LEADER, None).await.unwrap().0, 200);

    let scratch = Scratch::new().unwrap();
    let folder = scratch.path().join("serviceaccount");
    server.write_service_account_dir(&folder, "first", "test").unwrap();
    server.write_service_account_dir(&folder, requested, "test").unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    assert_eq!((read("token").as_str(), read("namespace").as_str()), (requested, "test"));
    assert_eq!(read("ca.crt"), std::fs::read_to_string(server.authority()).unwrap());

    // Not one that was shown before: the server would remember for ten seconds that it was good.
    let unseen = server.client(&server.token("test", "candidate", LONG).await.unwrap());
    assert_eq!(server.admin("DELETE", account, None).await.unwrap().0, 200);
    assert_eq!(unseen.send("GET", LEADER, None).await.unwrap().0, 401);
}

/// In a namespace, asked from another: what is killed comes back with what it had, and what is frozen answers when it is thawed.
async fn comes_back() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let [here, there] = [&network.nodes[0], &network.nodes[1]];
    let options = Options::in_namespace(&here.namespace, here.address());
    let mut server = ApiServer::start(options).await.unwrap();
    server.namespace("test").await.unwrap();
    let (status, made) = server.admin("POST", LEASES, Some(&lease("a"))).await.unwrap();
    assert_eq!(status, 201, "{made}");
    server.service_account("test", "reader").await.unwrap();
    let rule = Rule { verbs: &["get"], resources: &["leases.coordination.k8s.io"], names: &[] };
    server.role("test", "reads", &[rule]).await.unwrap();
    server.role_binding("test", "reads", "reader").await.unwrap();
    let token = server.token("test", "reader", LONG).await.unwrap();
    let reader = server.client(&token).from_namespace(&there.namespace);
    let read = || reader.send("GET", LEADER, None);
    assert_eq!(read().await.unwrap(), (200, made.clone()));

    server.stop_hard(Part::Server);
    assert!(read().await.is_err());
    let began = Instant::now();
    server.start_again().await.unwrap();
    println!("kubernetes: ready again after {:?}", began.elapsed());
    assert_eq!(read().await.unwrap(), (200, made.clone()));

    for part in [Part::Server, Part::Storage] {
        server.freeze(part).unwrap();
        assert!(timeout(SHORT, read()).await.is_err(), "{part:?}");
        server.thaw(part).unwrap();
        assert_eq!(read().await.unwrap().0, 200, "{part:?}");
    }

    server.stop_hard(Part::Storage);
    let mut changed = made.clone();
    changed["spec"]["holderIdentity"] = "b".into();
    let written = timeout(SHORT, server.admin("PUT", LEADER, Some(&changed))).await;
    assert!(!matches!(written, Ok(Ok((200, _)))), "{written:?}");
    server.start_again().await.unwrap();
    let (status, kept) = read().await.unwrap();
    assert_eq!((status, &kept["metadata"]["uid"]), (200, &made["metadata"]["uid"]), "{kept}");
}
