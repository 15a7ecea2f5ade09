//! What the network does to a node, by the kernel's own rules and routes between namespaces.

use std::process::Command;
use std::time::Duration;

use futures::future::join_all;
use peili_lab::dns::Dns;
use peili_lab::kubernetes::{Options, Part};
use peili_lab::netns::{Addresses, Namespace, Network};
use peili_lab::{Requirement, wait};
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

use super::{Doctor, SOON, in_cluster};
use crate::Case;
use crate::coordination::Cluster;
use crate::truth::{SERVER, TROUBLES, Trouble};
use peili::cluster::Cause;

pub(super) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables, Requirement::Kubernetes];
    let long = Duration::from_secs(150);
    vec![
        Case::new("doctor::each_way_to_be_cut_off_has_its_verdict", &needs, ways).within(long).timed(),
        Case::new("doctor::name_servers_are_told_apart", &needs[..3], names),
    ]
}

/// Lets a namespace do something with packets to a port.
fn filter(namespace: &Namespace, action: &str, chain: &str, protocol: &str, port: &str, to: &[&str]) {
    let rule = [&["-w", action, chain, "-p", protocol, "--dport", port, "-j"], to].concat();
    let output = namespace.run(|| Command::new("iptables").args(rule).output()).unwrap().unwrap();
    assert!(output.status.success(), "{output:?}");
}

async fn ways() {
    let network = Network::new(SERVER + 1, Addresses::V4).unwrap();
    let server = network.nodes[SERVER].clone();
    let mut cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
    cluster.allow_all().await;
    let config = in_cluster(&cluster.server.url(), &cluster.credentials("account").await);
    let at = |node: usize| Doctor::new(&config).in_namespace(&network.nodes[node].namespace);
    at(0).finds("all is well", &[]).await;

    let expected = |trouble: &Trouble, cause: &Cause| match (trouble, cause) {
        // The kernel gives up its neighbour after three seconds, which is later than a verdict.
        (Trouble::Unplugged, _) | (_, Cause::Timeout) => "api-unreachable",
        (_, Cause::Refused) => "api-refused",
        (_, Cause::Unroutable) => "api-unroutable",
        (_, other) => panic!("{other:?}"),
    };
    let troubles: Vec<_> =
        TROUBLES.iter().enumerate().filter(|(_, (trouble, _))| *trouble != Trouble::Cut).collect();
    for (node, (trouble, _)) in &troubles {
        match trouble {
            Trouble::Blocked(block) => network.block(*node, SERVER, *block).unwrap(),
            Trouble::Unplugged => network.set_link(*node, false).unwrap(),
            Trouble::Cut => {}
        }
    }
    // A few at once: each is a process, and there are two cores.
    for some in troubles.chunks(4) {
        let looks = some.iter().map(async |(node, (trouble, cause))| {
            let code = expected(trouble, cause);
            at(*node).finds(&format!("{trouble:?}"), &[code]).await
        });
        for found in join_all(looks).await {
            let verdict = &found.report["verdicts"][0];
            // From one node alone a policy is not told from a server that is off.
            assert_ne!(verdict["confidence"], "high", "{verdict}");
            assert_eq!(verdict["other-causes"].as_array().unwrap().len(), 2, "{verdict}");
        }
    }
    for (node, (trouble, _)) in &troubles {
        match trouble {
            Trouble::Blocked(block) => network.unblock(*node, SERVER, *block).unwrap(),
            Trouble::Unplugged => network.set_link(*node, true).unwrap(),
            Trouble::Cut => {}
        }
    }
    at(0).finds("all is well again", &[]).await;

    // The port alone, while the control plane lives; and never where the control plane is off.
    let node = &network.nodes[1].namespace;
    filter(node, "-A", "OUTPUT", "tcp", "6443", &["DROP"]);
    at(1).finds("one port is dropped", &["api-blocked"]).await;
    filter(node, "-D", "OUTPUT", "tcp", "6443", &["DROP"]);
    at(1).finds("and let through", &[]).await;
    cluster.server.stop_hard(Part::Server);
    at(1).finds("the server is off", &["api-refused"]).await;
    network.set_link(SERVER, false).unwrap();
    at(2).finds("its host is off", &["api-unreachable"]).await;

    let other = json!({"kubernetes": {"endpoints": ["https://[fd00::1]:6443"]}});
    let mut doctor = at(3);
    doctor.merge(&other);
    doctor.finds("an address of another family", &["address-family"]).await;
}

async fn names() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let (node, server) = (&network.nodes[0], &network.nodes[1]);
    let dns = Dns::start(&server.namespace, server.address()).unwrap();
    let resolver = |server: &str| {
        let search = "search peili.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5";
        format!("nameserver {server}\n{search}\n")
    };
    let config: Value = json!({
        "network": {"dns": ["peers.peili.svc:5001"], "peers": []},
        "election": {"backend": "gossip"},
    });
    let doctor = Doctor::new(&config)
        .in_namespace(&node.namespace)
        .with_file("/etc/resolv.conf", &resolver(&server.address().to_string()));
    doctor.finds("neither name is known", &["dns-not-the-clusters"]).await;
    let some = || Some(vec![server.address()]);
    dns.set("kubernetes.default.svc.cluster.local", some());
    doctor.finds("the peers' name is not known", &["dns-no-name"]).await;
    dns.set("peers.peili.svc.cluster.local", some());
    doctor.finds("both are", &[]).await;
    // At the server, since a sender is told of what its own rules drop.
    for to in [&["DROP"][..], &["REJECT", "--reject-with", "icmp-port-unreachable"]] {
        for protocol in ["udp", "tcp"] {
            filter(&server.namespace, "-A", "INPUT", protocol, "53", to);
        }
        let found = doctor.finds(&format!("port 53: {to:?}"), &["dns-silent"]).await;
        let verdict = found.verdict("dns-silent");
        assert_eq!(verdict["other-causes"].as_array().unwrap().len(), 2, "{verdict}");
        for protocol in ["udp", "tcp"] {
            filter(&server.namespace, "-D", "INPUT", protocol, "53", to);
        }
    }
    doctor.finds("port 53 is open again", &[]).await;
    drop(dns);
    let failing = server.namespace.run(|| std::net::UdpSocket::bind((server.address(), 53))).unwrap();
    let failing = wait::until("its port", SOON, async || match &failing {
        Ok(socket) => socket.try_clone().ok(),
        Err(_) => server.namespace.run(|| std::net::UdpSocket::bind((server.address(), 53))).unwrap().ok(),
    });
    let failing = failing.await.unwrap();
    failing.set_nonblocking(true).unwrap();
    let failing = UdpSocket::from_std(failing).unwrap();
    let _failing = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut question = [0; 512];
        while let Ok((length, from)) = failing.recv_from(&mut question).await {
            // The question again, as an answer that the server has failed (RFC 1035).
            (question[2], question[3]) = (0x81, 0x82);
            let _ = failing.send_to(&question[..length], from).await;
        }
    }));
    doctor.finds("the server fails", &["dns-failing"]).await;
    // An address needs no name server.
    let config =
        json!({"network": {"dns": ["10.0.0.1:5001"], "peers": []}, "election": {"backend": "gossip"}});
    Doctor::new(&config).in_namespace(&node.namespace).finds("addresses alone", &[]).await;
}
