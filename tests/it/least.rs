//! Least privilege, shown: a rendered policy, that of the host firewall or that of pods, as a filter of packets that denies all else. With it a
//! fleet works; without any one of its rules something breaks, and doctor names it where this node can know. A rule that nothing needs would fail this test.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use peili_lab::kubernetes::Options;
use peili_lab::netns::{Addresses, Namespace, Network};
use peili_lab::node::Plan;
use peili_lab::scratch::Scratch;
use peili_lab::{Dns, Generation, Image, Node, Origin, Requirement, chart, http, wait};
use serde_json::{Value, json};

use crate::Case;
use crate::chart::parse;
use crate::cli::layout;
use crate::cluster::REGISTRY;
use crate::coordination::Cluster;
use crate::doctor::Doctor;

mod mounts;
mod pod;

/// Who is who in the network. The mirrors stand first.
const MIRRORS: usize = 2;
const SERVER: usize = 2;
const NAMES: usize = 3;
/// The registry's machine, which Prometheus is on, too.
const OUTSIDE: usize = 4;
/// Longest until a change is seen in all that it breaks or mends: a member that is silent is gone after some seconds, and looked for every 3 s.
const SOON: Duration = Duration::from_secs(60);
/// More than one datagram holds, as a fleet has them: names need TCP, too.
const ADDRESSES: u8 = 60;

pub(crate) fn cases() -> Vec<Case> {
    let needs = [
        Requirement::Root,
        Requirement::Iproute2,
        Requirement::Iptables,
        Requirement::Kubernetes,
        Requirement::Helm,
    ];
    let long = Duration::from_secs(600);
    let of_mounts =
        [&needs[..], &[Requirement::Cluster, Requirement::Containerd(Generation::V2), Requirement::Policies]]
            .concat();
    vec![
        Case::new("least::each_rule_of_the_host_firewall_is_needed", &needs, host_firewall).within(long),
        Case::new("least::each_rule_of_the_network_policy_is_needed", &needs, network_policy).within(long),
        Case::new("least::each_mount_is_needed", &of_mounts, mounts::each_is_needed).within(long),
        Case::new("least::each_mount_on_talos_is_needed", &of_mounts, mounts::each_on_talos_is_needed)
            .within(long),
    ]
}

/// One rule: what a node may begin with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// `ingress` or `egress`, whom, and the port: for people.
    name: String,
    sends: bool,
    peers: Vec<IpAddr>,
    /// Protocol and port; `None`: all of TCP.
    port: Option<(String, String)>,
}

/// The rules of the policy, each port by itself.
fn rules_of(policy: &Value, network: &Network) -> Vec<Rule> {
    let addresses =
        |nodes: &[usize]| nodes.iter().map(|node| network.nodes[*node].address()).collect::<Vec<_>>();
    let named = |entity: &str| match entity {
        "remote-node" => addresses(&[0, 1]),
        "kube-apiserver" => addresses(&[SERVER]),
        "cluster" => addresses(&[0, 1, NAMES, OUTSIDE]),
        "world" => addresses(&[OUTSIDE]),
        entity => panic!("unknown entity {entity}"),
    };
    let mut rules = Vec::new();
    for direction in ["ingress", "egress"] {
        let sends = direction == "egress";
        for rule in policy["spec"][direction].as_array().unwrap() {
            let side = if sends { "to" } else { "from" };
            let (whom, peers) = if let Some(entities) = rule[format!("{side}Entities")].as_array() {
                let names: Vec<&str> = entities.iter().map(|entity| entity.as_str().unwrap()).collect();
                (names.join(","), names.into_iter().flat_map(named).collect())
            } else if let Some(blocks) = rule[format!("{side}CIDR")].as_array() {
                let peers = blocks.iter().map(|block| block.as_str().unwrap().split('/').next().unwrap());
                ("registries".to_owned(), peers.map(|address| address.parse().unwrap()).collect())
            } else if let Some(endpoints) = rule[format!("{side}Endpoints")].as_array() {
                let labels = &endpoints[0]["matchLabels"];
                if labels["k8s-app"] == "kube-dns" {
                    ("kube-dns".to_owned(), addresses(&[NAMES]))
                } else {
                    assert_eq!(labels["app.kubernetes.io/component"], "mirror", "{rule:#}");
                    ("mirrors".to_owned(), addresses(&[0, 1]))
                }
            } else {
                // As a NetworkPolicy names them; who is not named is all.
                match rule[side].as_array().map(|peers| &peers[0]) {
                    None => ("all".to_owned(), addresses(&[0, 1, SERVER, NAMES, OUTSIDE])),
                    Some(peer) if peer["namespaceSelector"] == json!({}) => {
                        ("pods".to_owned(), addresses(&[0, 1, NAMES, OUTSIDE]))
                    }
                    Some(peer) => {
                        let labels = &peer["podSelector"]["matchLabels"];
                        assert_eq!(labels["app.kubernetes.io/component"], "mirror", "{rule:#}");
                        ("mirrors".to_owned(), addresses(&[0, 1]))
                    }
                }
            };
            let lists = match (rule["toPorts"].as_array(), rule["ports"].as_array()) {
                (Some(lists), None) => {
                    lists.iter().flat_map(|list| list["ports"].as_array().unwrap()).collect()
                }
                (None, Some(ports)) => ports.iter().collect(),
                (_, _) => Vec::new(),
            };
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let mut ports: Vec<_> = lists
                .into_iter()
                .map(|port: &Value| Some((text(&port["protocol"]).to_lowercase(), text(&port["port"]))))
                .collect();
            if ports.is_empty() {
                ports.push(None);
            }
            for port in ports {
                let at =
                    port.as_ref().map(|(protocol, port)| format!(" {port}/{protocol}")).unwrap_or_default();
                let name = format!("{direction} {whom}{at}");
                rules.push(Rule { name, sends, peers: peers.clone(), port });
            }
        }
    }
    rules
}

/// Lets the mirrors send and receive what the rules allow, and answers to it, and nothing else. It remembers no connections, so that a rule that
/// is taken away counts for those that there are, too.
fn enforce(network: &Network, rules: &[Rule]) {
    let mut text = "*filter\n:INPUT DROP [0:0]\n:OUTPUT DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n-A OUTPUT -o lo -j ACCEPT\n".to_owned();
    for rule in rules {
        let (there, back) = if rule.sends { ("OUTPUT -d", "INPUT -s") } else { ("INPUT -s", "OUTPUT -d") };
        for peer in &rule.peers {
            let (protocol, to, from) = match &rule.port {
                None => ("tcp", String::new(), String::new()),
                Some((protocol, port)) => {
                    (protocol.as_str(), format!(" --dport {port}"), format!(" --sport {port}"))
                }
            };
            let answers = if protocol == "tcp" { " ! --syn" } else { "" };
            text.push_str(&format!("-A {there} {peer} -p {protocol}{to} -j ACCEPT\n"));
            text.push_str(&format!("-A {back} {peer} -p {protocol}{from}{answers} -j ACCEPT\n"));
        }
    }
    text.push_str("COMMIT\n");
    for place in network.nodes.iter().take(MIRRORS) {
        let restored = place.namespace.run(|| {
            let mut command = Command::new("iptables-restore").stdin(Stdio::piped()).spawn()?;
            command.stdin.take().unwrap().write_all(text.as_bytes())?;
            command.wait()
        });
        assert!(restored.unwrap().unwrap().success(), "{text}");
    }
}

/// What a fleet has to be able to do.
struct Fleet {
    nodes: Vec<Node>,
    images: Vec<Image>,
    network: Network,
    origin: Origin,
    _cluster: Cluster,
    _dns: Dns,
    _scratch: Scratch,
}

impl Fleet {
    /// What does not work, for each node: one may see later than the other what has changed.
    async fn broken(&self) -> Vec<BTreeSet<&'static str>> {
        let mut all = Vec::new();
        let mut leads = 0;
        for (number, node) in self.nodes.iter().enumerate() {
            let mut broken = BTreeSet::new();
            let status = node.status().await.unwrap();
            let network = &status["network"];
            if network["members"] != MIRRORS {
                broken.insert("members");
            }
            // The addresses that nobody has are problems, too: `a peer of NAME at ADDRESS`.
            let is_of_name = |problem: &Value| {
                problem
                    .as_str()
                    .is_some_and(|text| text.contains("peers.peili.svc") && !text.starts_with("a peer of"))
            };
            if network["problems"].as_array().unwrap().iter().any(is_of_name) {
                broken.insert("names");
            }
            if status["election"]["mode"] != "lease" {
                broken.insert("lease");
            }
            leads += usize::from(node.metric("leader_election_master_status", "").await.unwrap() > 0.5);
            // What the other one has, and no registry.
            let image = &self.images[1 - number];
            let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
            if node.fetch(&path).await.unwrap().status != 200 {
                broken.insert("content");
            }
            let place = &self.network.nodes[number];
            // While it answers, its tags are left to it.
            let path = format!("/v2/library/unknown/manifests/1?ns={}", self.origin.address());
            let is_left = node.fetch(&path).await.unwrap().text().contains("tag-upstream");
            if !is_left {
                broken.insert("registry");
            }
            // As the runtime of this node would pull from it.
            if !reaches(&place.namespace, self.origin.address()) {
                broken.insert("pulls");
            }
            let outside = &self.network.nodes[OUTSIDE].namespace;
            let metrics = SocketAddr::new(place.address(), node.plan.ports.admin);
            let scraped = reaches(outside, metrics)
                && http::get(Some(outside), metrics, "/metrics")
                    .await
                    .is_ok_and(|answer| answer.status == 200);
            if !scraped {
                broken.insert("metrics");
            }
            all.push(broken);
        }
        if leads != 1 {
            all.iter_mut().for_each(|broken| broken.extend(["lease"]));
        }
        all
    }

    /// Waits until exactly this is broken.
    async fn comes_to(&self, rule: &str, expected: &[&'static str]) {
        let expected: BTreeSet<_> = expected.iter().copied().collect();
        let mut last = Vec::new();
        let waited = wait::until(rule, SOON, async || {
            last = self.broken().await;
            last.iter().all(|broken| *broken == expected).then_some(())
        });
        if let Err(error) = waited.await {
            panic!("{error}: broken is {last:?} instead of {expected:?}");
        }
    }

    async fn says(&self, rule: &str, expected: &[&str]) {
        for node in &self.nodes {
            Doctor::of(&node.plan).finds(&format!("without {rule}"), expected).await;
        }
    }
}

fn reaches(namespace: &Namespace, address: SocketAddr) -> bool {
    let limit = Duration::from_millis(700);
    namespace.run(|| std::net::TcpStream::connect_timeout(&address, limit)).unwrap().is_ok()
}

/// The rules of the policy of this kind in a rendering of the chart with these settings.
fn rendered(preset: &str, set: &str, kind: &str, network: &Network) -> (Value, Vec<Rule>) {
    let values = chart::values(preset).display().to_string();
    let rendered = chart::render(&["--values", &values, "--set", set]).unwrap();
    let policy = parse(&rendered).into_iter().find(|object| object["kind"] == kind).unwrap();
    let rules = rules_of(&policy, network);
    (policy, rules)
}

/// A rule, what breaks without it (who sees no other member has the mode `alone`), and what doctor says on the nodes, which cannot know that
/// Prometheus does not reach them.
type Needed = (&'static str, &'static [&'static str], &'static [&'static str]);

async fn host_firewall() {
    let network = Network::new(OUTSIDE + 1, Addresses::V4).unwrap();
    let set = format!(
        "ciliumHostFirewall.enabled=true,ciliumHostFirewall.defaultDeny=true,metrics.expose=true,ciliumHostFirewall.registries={{{}/32}}",
        network.nodes[OUTSIDE].address()
    );
    let (policy, rules) = rendered("default", &set, "CiliumClusterwideNetworkPolicy", &network);
    // Of all nodes: Cilium has no label of kubernetes.io to choose by.
    assert_eq!(policy["spec"]["nodeSelector"], json!({}));
    assert_eq!(policy["spec"]["enableDefaultDeny"], json!({"ingress": true, "egress": true}));
    let expected: [Needed; 9] = [
        ("ingress remote-node 5001/tcp", &["members", "content", "lease"], &["mirror-alone"]),
        ("ingress remote-node 5002/tcp", &["content"], &["peer-port-unreachable"]),
        ("ingress cluster 5003/tcp", &["metrics"], &[]),
        ("egress remote-node 5001/tcp", &["members", "content", "lease"], &["mirror-alone"]),
        ("egress remote-node 5002/tcp", &["content"], &["peer-port-unreachable"]),
        ("egress kube-apiserver", &["lease"], &["api-unreachable"]),
        ("egress kube-dns 53/udp", &["names"], &["dns-silent"]),
        ("egress kube-dns 53/tcp", &["names"], &["dns-failing"]),
        ("egress registries", &["pulls", "registry"], &["registries-silent"]),
    ];
    each_is_needed(network, &rules, &expected).await;
}

async fn network_policy() {
    let network = Network::new(OUTSIDE + 1, Addresses::V4).unwrap();
    // The ports of the API server and of the registry here.
    let set = "metrics.expose=true,networkPolicy.ports={6443,5000}";
    let (policy, rules) = rendered("pod-network", set, "NetworkPolicy", &network);
    assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
    let expected: [Needed; 9] = [
        ("ingress mirrors 5001/tcp", &["members", "content", "lease"], &["mirror-alone"]),
        ("ingress mirrors 5002/tcp", &["content"], &["peer-port-unreachable"]),
        ("ingress pods 5003/tcp", &["metrics"], &[]),
        ("egress mirrors 5001/tcp", &["members", "content", "lease"], &["mirror-alone"]),
        ("egress mirrors 5002/tcp", &["content"], &["peer-port-unreachable"]),
        ("egress all 53/udp", &["names"], &["dns-silent"]),
        ("egress all 53/tcp", &["names"], &["dns-failing"]),
        ("egress all 6443/tcp", &["lease"], &["api-unreachable"]),
        ("egress all 5000/tcp", &["pulls", "registry"], &["registries-silent"]),
    ];
    // Cilium's kind says the same, with names for whom it knows.
    let (_, same) = rendered("pod-network-cilium", set, "CiliumNetworkPolicy", &network);
    let names: Vec<String> = same.into_iter().map(|rule| rule.name).collect();
    let named = |name: &str| match name {
        "egress all 53/udp" => "egress kube-dns 53/udp".to_owned(),
        "egress all 53/tcp" => "egress kube-dns 53/tcp".to_owned(),
        name => name.replace("ingress pods", "ingress cluster").replace("egress all", "egress world,cluster"),
    };
    let mut of_cilium: Vec<String> = expected.iter().map(|(name, ..)| named(name)).collect();
    of_cilium.insert(5, "egress kube-apiserver".into());
    assert_eq!(names, of_cilium);
    each_is_needed(network, &rules, &expected).await;
}

async fn each_is_needed(network: Network, rules: &[Rule], expected: &[Needed]) {
    let names: Vec<&str> = rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, expected.iter().map(|(name, ..)| *name).collect::<Vec<_>>());
    let fleet = fleet(network, rules).await;
    fleet.comes_to("with all rules", &[]).await;
    for (name, breaks, says) in expected {
        let without: Vec<Rule> = rules.iter().filter(|rule| rule.name != *name).cloned().collect();
        enforce(&fleet.network, &without);
        fleet.comes_to(name, breaks).await;
        fleet.says(name, says).await;
        enforce(&fleet.network, rules);
        fleet.comes_to(&format!("{name} again"), &[]).await;
    }
    fleet.says("nothing", &[]).await;
}

/// Mirrors behind these rules, and all that they need beyond them.
async fn fleet(network: Network, rules: &[Rule]) -> Fleet {
    let scratch = Scratch::new().unwrap();
    let (server, outside) = (network.nodes[SERVER].clone(), network.nodes[OUTSIDE].clone());
    let cluster = Cluster::start(Options::in_namespace(&server.namespace, server.address())).await;
    cluster.allow_all().await;
    let credentials = cluster.credentials("account").await;
    let dns = Dns::start(&network.nodes[NAMES].namespace, network.nodes[NAMES].address()).unwrap();
    dns.set("kubernetes.default.svc.cluster.local", Some(vec![server.address()]));
    let IpAddr::V4(first) = network.nodes[0].address() else { panic!("a network of IPv4") };
    let [a, b, c, _] = first.octets();
    let absent = (0..ADDRESSES).map(|last| IpAddr::from([a, b, c, 100 + last]));
    let present = network.nodes.iter().take(MIRRORS).map(peili_lab::netns::NetworkNode::address);
    dns.set("peers.peili.svc.cluster.local", Some(present.chain(absent).collect()));
    let origin =
        Origin::start_at(Some(&outside.namespace), &[SocketAddr::new(outside.address(), 5000)]).unwrap();

    let hosts = scratch.path().join("hosts");
    let of_origin = hosts.join(origin.address().to_string());
    std::fs::create_dir_all(&of_origin).unwrap();
    std::fs::write(of_origin.join("hosts.toml"), format!("server = \"http://{}\"\n", origin.address()))
        .unwrap();
    let key = scratch.path().join("cluster.key");
    std::fs::write(&key, "a key of the cluster for tests, 32 bytes at least").unwrap();
    let (mut plans, mut images) = (Vec::new(), Vec::new());
    for (number, place) in network.nodes.iter().take(MIRRORS).enumerate() {
        let name = format!("library/app-{number}");
        let image = Image::builder(&name, "1").layer(4_096).seed(number as u64).build().unwrap();
        let folder = scratch.path().join(format!("layout-{number}"));
        layout(&folder, &[&image]);
        let store = format!("layout:{}", folder.display());
        let mut plan =
            Plan::in_namespace(&format!("node-{number}"), &store, &place.namespace, place.address()).unwrap();
        plan.merge(&json!({
            "network": {"cluster-key": [key], "dns": ["peers.peili.svc:5001"]},
            "kubernetes": {"service": format!("{}:6443", server.address()), "credentials": credentials},
            "admin": {"listen": ["0.0.0.0:5003"], "clients": "all"},
            "upstream": {"hosts-dirs": [hosts], "cache": "2s"},
        }));
        plan.set_resolver(dns.address()).unwrap();
        plans.push(plan);
        images.push(image);
    }
    enforce(&network, rules);
    let mut nodes = Vec::new();
    for plan in plans {
        nodes.push(plan.start().await.unwrap());
    }
    Fleet { nodes, images, network, origin, _cluster: cluster, _dns: dns, _scratch: scratch }
}
