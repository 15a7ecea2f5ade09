//! Who may connect to the registry and the admin port, between network namespaces: the node itself and nobody else, whatever routes lead
//! others there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

use peili_lab::netns::{Addresses, Namespace, Network};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Node, Requirement, http};
use serde_json::json;

use crate::Case;
use crate::cli::layout;
use crate::doctor::Doctor;

pub(crate) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2];
    vec![
        Case::new("clients::loopback_is_closed_to_neighbours", &needs, neighbours),
        Case::new("clients::a_pod_serves_its_node_alone", &needs, pod),
        Case::new("clients::whoever_connects_probes_come_in", &needs, probes),
    ]
}

/// Whether the registry's answer came.
async fn answers(from: &Namespace, address: SocketAddr) -> bool {
    match http::get(Some(from), address, "/v2/").await {
        Ok(answer) => {
            assert_eq!(answer.status, 200, "{answer:?}");
            true
        }
        Err(_) => false,
    }
}

/// An empty store; it goes with the folder.
fn store() -> (Scratch, String) {
    let scratch = Scratch::new().unwrap();
    layout(scratch.path(), &[]);
    let store = format!("layout:{}", scratch.path().display());
    (scratch, store)
}

fn ip(namespace: &Namespace, arguments: &[&str]) {
    let output = namespace.run(|| Command::new("ip").args(arguments).output()).unwrap().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}

fn set(namespace: &Namespace, name: &str) {
    namespace.run(|| std::fs::write(format!("/proc/sys/net/ipv4/conf/all/{name}"), "1")).unwrap().unwrap();
}

async fn refused(node: &Node) -> f64 {
    node.metric("peili_registry_connections_refused_total", "").await.unwrap()
}

/// With `route_localnet`, which kube-proxy turns on, a neighbour's packets to 127.0.0.1 come in; without the look at their source it would
/// read every image.
async fn neighbours() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let [here, neighbour] = &network.nodes[..] else { unreachable!() };
    let (_scratch, store) = store();
    let node =
        Plan::in_namespace("here", &store, &here.namespace, here.address()).unwrap().start().await.unwrap();
    let loopback = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let (registry, admin) = (loopback(node.plan.ports.registry), loopback(node.plan.ports.admin));
    set(&here.namespace, "route_localnet");
    set(&neighbour.namespace, "route_localnet");
    ip(&neighbour.namespace, &["addr", "del", "127.0.0.1/8", "dev", "lo"]);
    let (by, own) = (here.address().to_string(), neighbour.address().to_string());
    ip(&neighbour.namespace, &["route", "add", "127.0.0.1/32", "via", &by, "src", &own]);

    assert!(answers(&here.namespace, registry).await, "the node itself");
    assert_eq!(refused(&node).await, 0.0);
    assert!(!answers(&neighbour.namespace, registry).await, "a neighbour");
    assert_eq!(refused(&node).await, 1.0, "its packets came in, and were not dropped before");
    assert!(http::get(Some(&neighbour.namespace), admin, "/status").await.is_err(), "the admin port");
    let problems = node.status().await.unwrap()["problems"].to_string();
    assert!(problems.contains(&format!("the last from {own}")), "{problems}");
    assert!(answers(&here.namespace, registry).await, "the node itself, still");
}

/// In a network of its own a node is asked by its host, which is its gateway or has the address in `HOST_IP`; and doctor sees a hostPort that
/// is open at the host's address.
async fn pod() {
    let network = Network::new(4, Addresses::V4).unwrap();
    let [pod, gateway, host, other] = &network.nodes[..] else { unreachable!() };
    let (_scratch, store) = store();
    ip(&pod.namespace, &["route", "add", "default", "via", &gateway.address().to_string()]);
    let planned = |told: IpAddr| {
        let mut plan = Plan::in_namespace("pod", &store, &pod.namespace, pod.address()).unwrap();
        let wide = |port: u16| json!({"listen": [format!("0.0.0.0:{port}")], "clients": "node"});
        plan.merge(&json!({"registry": wide(plan.ports.registry), "admin": wide(plan.ports.admin)}));
        plan.set_environment("HOST_IP", &told.to_string());
        plan
    };
    let node = planned(host.address()).start().await.unwrap();
    let registry = SocketAddr::new(pod.address(), node.plan.ports.registry);
    let admin = SocketAddr::new(pod.address(), node.plan.ports.admin);
    for (who, place, expected) in [
        ("the gateway", gateway, true),
        ("the host", host, true),
        ("another", other, false),
        ("itself by another address than loopback", pod, false),
    ] {
        assert_eq!(answers(&place.namespace, registry).await, expected, "{who}");
        let ready = http::get(Some(&place.namespace), admin, "/readyz").await;
        assert_eq!(ready.is_ok_and(|ready| ready.status == 200), expected, "{who}: a probe");
    }
    assert_eq!(refused(&node).await, 2.0);

    let doctor = |node: &Node, told: IpAddr| {
        Doctor::of(&node.plan)
            .with_environment("HOST_IP", &told.to_string())
            .with_environment("POD_IP", "192.0.2.1")
    };
    doctor(&node, host.address())
        .finds("nobody is at the host's address", &["mirror-alone", "no-cluster"])
        .await;
    drop(node);
    // The hostPort leads here by the host's address too, and the connection comes as the host's.
    let node = planned(pod.address()).start().await.unwrap();
    let found = doctor(&node, pod.address())
        .finds("a hostPort at all addresses", &["mirror-alone", "no-cluster", "registry-port-wide"])
        .await;
    let fix = found.verdict("registry-port-wide")["fix"].as_str().unwrap().to_owned();
    assert!(fix.contains(&format!("port {}", node.plan.ports.registry)), "{fix}");
}

/// Others hold all the connections that they get to an admin port that is open to them; the node's own probes are answered.
async fn probes() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let [here, other] = &network.nodes[..] else { unreachable!() };
    let (_scratch, store) = store();
    let mut plan = Plan::in_namespace("here", &store, &here.namespace, here.address()).unwrap();
    let admin = plan.ports.admin;
    plan.merge(&json!({"admin": {"listen": [format!("0.0.0.0:{admin}")], "clients": "all"}}));
    let node = plan.start().await.unwrap();
    let address = SocketAddr::new(here.address(), admin);
    assert!(http::get(Some(&other.namespace), address, "/metrics").await.is_ok(), "it is open to others");
    let held = other.namespace.run(|| {
        let connections = (0..300).map(|_| std::net::TcpStream::connect(address));
        connections.collect::<Vec<_>>()
    });
    let held = held.unwrap();
    assert!(held.iter().all(Result::is_ok));
    for _ in 0..20 {
        assert_eq!(node.admin("/livez").await.unwrap().status, 200);
    }
    assert!(
        http::get(Some(&other.namespace), address, "/metrics").await.is_err(),
        "others have no place left"
    );
    drop(held);
}
