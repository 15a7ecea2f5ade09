//! What the network does to a node, by the kernel's own rules and routes between namespaces.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use futures::future::join_all;
use peili_lab::dns::Dns;
use peili_lab::kubernetes::{Options, Part, SERVICE_ADDRESS};
use peili_lab::netns::{Addresses, Namespace, Network};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, wait};
use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::task::AbortOnDropHandle;

use super::server::{Manner, Server};
use super::{Doctor, SOON, in_cluster};
use crate::Case;
use crate::coordination::Cluster;
use crate::truth::{SERVER, TROUBLES, Trouble};
use peili::cluster::Cause;

/// Of Talos, on each node's loopback.
const KUBEPRISM: (&str, u16) = ("127.0.0.1", 7_445);

pub(super) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Iproute2, Requirement::Iptables, Requirement::Kubernetes];
    let long = Duration::from_secs(150);
    vec![
        Case::new("doctor::each_way_to_be_cut_off_has_its_verdict", &needs, ways).within(long).timed(),
        Case::new("doctor::name_servers_are_told_apart", &needs[..3], names),
        Case::new("doctor::what_follows_from_dead_names_is_no_verdict", &needs[..3], dead_names),
        Case::new("doctor::kubeprism_is_named_where_it_answers", &needs, kubeprism).timed(),
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

/// The API server, the registries and the peers are all found by names.
async fn dead_names() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let (node, server) = (&network.nodes[0], &network.nodes[1]);
    let dns = Dns::start(&server.namespace, server.address()).unwrap();
    let block = |action: &str| {
        for protocol in ["udp", "tcp"] {
            filter(&server.namespace, action, "INPUT", protocol, "53", &["DROP"]);
        }
    };
    block("-A");
    let scratch = Scratch::new().unwrap();
    // Of nobody: none of them is ever shown to anybody.
    let credentials = Server::start(Manner::Page).await.credentials(&scratch);
    let layout = scratch.path().join("layout");
    crate::cli::layout(&layout, &[]);
    let layout = format!("layout:{}", layout.display());
    let mut plan = Plan::in_namespace("here", &layout, &node.namespace, node.address()).unwrap();
    plan.set_resolver(server.address()).unwrap();
    plan.merge(&json!({
        "network": {"dns": ["peers.peili.svc:5001"]},
        "election": {"backend": "gossip"},
        "upstream": {"hosts-dirs": [scratch.path().join("certs.d")]},
    }));
    let mut doctor = Doctor::of(&plan);
    let kubernetes = json!({"endpoints": ["https://api.test:6443"], "credentials": credentials});
    doctor.merge(&json!({"election": {"backend": "auto"}, "kubernetes": kubernetes}));
    let here = plan.start().await.unwrap();
    wait::until("it is alone", SOON, async || {
        (here.status().await.ok()?["election"]["mode"] == "alone").then_some(())
    })
    .await
    .unwrap();
    let tag = here.fetch("/v2/library/app/manifests/v1?ns=registry.test").await.unwrap();
    assert_eq!(tag.status, 404);
    let found = doctor.finds("no name is known any more", &["dns-silent"]).await;
    let evidence = found.verdict("dns-silent")["evidence"].to_string();
    for follows in ["api-unresolved", "registries-silent", "mirror-alone"] {
        assert!(evidence.contains(follows), "{follows}: {evidence}");
    }
    wait::until("the mirror has given up the name", SOON, async || {
        here.status().await.ok()?["network"]["problems"].to_string().contains("dns peers").then_some(())
    })
    .await
    .unwrap();
    doctor.finds("nor by then", &["dns-silent"]).await;
    // Beside another fault, which has nothing to do with names.
    let mut other = Doctor::of(&here.plan);
    let kubernetes =
        json!({"endpoints": [format!("https://{}:1", server.address())], "credentials": credentials});
    other.merge(&json!({"election": {"backend": "auto"}, "kubernetes": kubernetes}));
    other.finds("and nobody is where the API server was", &["api-refused", "dns-silent"]).await;

    // Each is a fault of its own where the name server says that there are no such names.
    block("-D");
    dns.set("kubernetes.default.svc.cluster.local", Some(vec![server.address()]));
    wait::until("that is seen by the mirror", SOON, async || {
        let found = doctor.run().await;
        (found.codes == super::sorted(&["api-unresolved", "dns-no-name", "registries-silent"])).then_some(())
    })
    .await
    .unwrap();
}

/// Whether doctor says anything of KubePrism's address, or how to have it.
fn names_kubeprism(verdict: &Value) -> bool {
    ["7445", "KubePrism"].iter().any(|word| verdict.to_string().contains(word))
}

/// What Talos has at 127.0.0.1:7445: connections to it go to the API server, past the Service.
fn pass_on(namespace: &Namespace, server: SocketAddr) -> AbortOnDropHandle<()> {
    let listener = namespace.run(|| std::net::TcpListener::bind(KUBEPRISM)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let (listener, namespace) = (TcpListener::from_std(listener).unwrap(), namespace.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let Ok(Ok(stream)) = namespace.run(|| std::net::TcpStream::connect(server)) else { continue };
            stream.set_nonblocking(true).unwrap();
            let mut stream = TcpStream::from_std(stream).unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut client, &mut stream).await });
        }
    }))
}

async fn kubeprism() {
    let network = Network::new(2, Addresses::V4).unwrap();
    let (node, server) = (&network.nodes[0].namespace, &network.nodes[1]);
    let options = Options::in_namespace(&server.namespace, server.address()).named(&["127.0.0.1"]);
    let cluster = Cluster::start(options).await;
    cluster.allow_all().await;
    // The Service's address leads to the server, as kube-proxy has it, and can be cut off alone.
    let service = SERVICE_ADDRESS.to_string();
    node.route(&format!("{service}/32"), server.address()).unwrap();
    server.namespace.own(&format!("{service}/32")).unwrap();
    let cut = |action: &str| filter(node, action, "OUTPUT", "tcp", "6443", &["DROP", "-d", &service]);
    let config = json!({"kubernetes": {"credentials": cluster.credentials("account").await}});
    let of_pod = |config: &Value| {
        Doctor::new(config)
            .in_namespace(node)
            .with_environment("KUBERNETES_SERVICE_HOST", &service)
            .with_environment("KUBERNETES_SERVICE_PORT", "6443")
    };
    let doctor = of_pod(&config);
    doctor.finds("the Service answers", &[]).await;
    cut("-A");
    let found = doctor.finds("the Service is cut off, and nobody has KubePrism", &["api-unreachable"]).await;
    assert!(!names_kubeprism(&found.report), "{:#}", found.report);

    // A node of Talos should have it.
    let host = Scratch::new().unwrap();
    std::fs::create_dir_all(host.path().join("etc/cri/conf.d/hosts")).unwrap();
    std::fs::write(host.path().join("etc/os-release"), "ID=talos\n").unwrap();
    let mut talos = of_pod(&config).with_arguments(&["--root", host.path().to_str().unwrap()]);
    talos.merge(&json!({"store": {"source": "containerd", "socket": host.path().join("containerd.sock")}}));
    let found = talos.run().await;
    let fix = found.verdict("api-unreachable")["fix"].as_str().unwrap();
    assert!(fix.contains("machine.features.kubePrism") && fix.contains("127.0.0.1:7445"), "{fix}");

    // Somebody else may be there.
    let other = node.run(|| std::net::TcpListener::bind(KUBEPRISM)).unwrap().unwrap();
    let found = doctor.finds("another program is at its port", &["api-unreachable"]).await;
    let verdict = found.verdict("api-unreachable");
    assert!(verdict["evidence"].to_string().contains("127.0.0.1:7445"), "{verdict}");
    assert!(!names_kubeprism(&verdict["fix"]), "{verdict}");
    drop(other);

    let _kubeprism = pass_on(node, cluster.server.address());
    let found = doctor.finds("KubePrism answers", &["service-unreachable"]).await;
    let verdict = found.verdict("service-unreachable");
    let fix = verdict["fix"].as_str().unwrap();
    assert!(fix.contains("`kubernetes.service: 127.0.0.1:7445`"), "{verdict}");
    let mut mended = of_pod(&config);
    mended.merge(&json!({"kubernetes": {"service": "127.0.0.1:7445"}}));
    let found = mended.finds("as the fix says", &[]).await;
    assert!(found.report["seen"].to_string().contains("127.0.0.1:7445 answers"), "{:#}", found.report);
    cut("-D");
    let found = doctor.finds("the Service answers again", &[]).await;
    assert!(!names_kubeprism(&found.report), "{:#}", found.report);
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
