//! What most cases stand on: nodes with a containerd and a `peili` each, and an origin, all in namespaces of their own.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use peili_lab::containerd::{Options, url};
use peili_lab::cri::Pulled;
use peili_lab::netns::Addresses;
use peili_lab::node::{Node, Plan};
use peili_lab::{Containerd, Generation, Image, Network, Origin, wait};
use serde_json::{Value, json};

/// The registry that the images are of; its `hosts.toml` names the origin's address, so it needs no DNS.
pub(crate) const REGISTRY: &str = "lab.test";

/// Longest pull of a case that does not say otherwise.
pub(crate) const PULL: Duration = Duration::from_secs(60);

/// Longest that nodes may take to know of each other, or of what another one holds.
const KNOWN: Duration = Duration::from_secs(20);

/// Waits until all these nodes say so of their elections; how long that took.
pub(crate) async fn elections(
    nodes: &[Node],
    what: &str,
    limit: Duration,
    is_so: impl Fn(&Value) -> bool,
) -> Duration {
    let start = Instant::now();
    let mut last = vec![Value::Null; nodes.len()];
    let found = wait::until(what, limit, async || {
        for (node, last) in nodes.iter().zip(&mut last) {
            *last = node.status().await.ok()?["election"].clone();
        }
        last.iter().all(&is_so).then_some(())
    });
    if let Err(error) = found.await {
        panic!("{error}: {last:#?}");
    }
    start.elapsed()
}

/// Waits until one of these nodes says that it leads; how long that took. (Who does not stand reads the lease twice a minute, and knows
/// later.)
pub(crate) async fn led(nodes: &[&Node], what: &str, limit: Duration) -> Duration {
    let start = Instant::now();
    wait::until(what, limit, async || {
        for node in nodes {
            if node.status().await.ok()?["election"]["lease"]["held"] == true {
                return Some(());
            }
        }
        None
    })
    .await
    .unwrap();
    start.elapsed()
}

/// What to start.
pub(crate) struct Setup {
    /// Nodes, beside the origin.
    pub(crate) count: usize,
    pub(crate) generation: Generation,
    pub(crate) addresses: Addresses,
    /// Changes of a node's containerd, by its number.
    pub(crate) containerd: fn(usize, &mut Options),
    /// Changes of all configurations.
    pub(crate) config: Value,
    /// Changes of single ones.
    pub(crate) configs: Vec<(usize, Value)>,
    /// Changes of the plans, once the addresses are known; else all nodes are peers of each other by identity.
    pub(crate) plans: Option<fn(&mut [Plan])>,
}

/// A node with its containerd.
pub(crate) struct Member {
    pub(crate) containerd: Containerd,
    pub(crate) peili: Node,
}

/// Nodes that know each other, and an origin.
pub(crate) struct Cluster {
    // In the order in which they must go: processes before the namespaces that they live in.
    pub(crate) nodes: Vec<Member>,
    pub(crate) origin: Origin,
    pub(crate) network: Network,
}

impl Setup {
    /// Two nodes on IPv4.
    pub(crate) fn new(generation: Generation) -> Self {
        Self {
            count: 2,
            generation,
            addresses: Addresses::V4,
            containerd: |_, _| {},
            config: json!({"log": {"level": "info,peili=debug"}}),
            configs: Vec::new(),
            plans: None,
        }
    }

    /// Starts all of it, and waits until the nodes are connected to each other.
    pub(crate) async fn start(self) -> Cluster {
        let cluster = self.start_apart().await;
        cluster.connected().await;
        cluster
    }

    /// Starts all of it.
    pub(crate) async fn start_apart(self) -> Cluster {
        let network = Network::new(self.count + 1, self.addresses).unwrap();
        let last = &network.nodes[self.count];
        let listen: Vec<_> = last.addresses().map(|address| (address, 80).into()).collect();
        let origin = Origin::start_at(Some(&last.namespace), &listen).unwrap();
        let (mut containerds, mut plans) = (Vec::new(), Vec::new());
        for (number, node) in network.nodes[..self.count].iter().enumerate() {
            let mut options = Options::new(self.generation).in_namespace(&node.namespace);
            (self.containerd)(number, &mut options);
            let containerd = Containerd::start(options).await.unwrap();
            let name = format!("node-{}", number + 1);
            let mut plan = Plan::in_namespace(&name, "containerd", &node.namespace, node.address())
                .unwrap()
                .with_containerd(&containerd);
            plan.merge(&json!({"registry": {"listen": [
                plan.config["registry"]["listen"][0],
                std::net::SocketAddr::from((Ipv6Addr::LOCALHOST, plan.ports.registry)),
            ]}}));
            plan.merge(&self.config);
            for (_, changes) in self.configs.iter().filter(|(of, _)| *of == number) {
                plan.merge(changes);
            }
            containerds.push(containerd);
            plans.push(plan);
        }
        match self.plans {
            Some(change) => change(&mut plans),
            None => Plan::introduce(&mut plans),
        }
        let mut nodes = Vec::new();
        for (containerd, plan) in containerds.into_iter().zip(plans) {
            nodes.push(Member { containerd, peili: plan.start().await.unwrap() });
        }
        let cluster = Cluster { nodes, origin, network };
        for number in 0..self.count {
            let mirror = if self.addresses == Addresses::V6 {
                url(Ipv6Addr::LOCALHOST.into(), cluster.nodes[number].peili.plan.ports.registry)
            } else {
                cluster.nodes[number].peili.registry_url()
            };
            cluster.mirror(number, REGISTRY, &mirror);
        }
        cluster
    }
}

impl Cluster {
    /// Writes the `hosts.toml` of a registry on one node: the mirror first, then the origin.
    pub(crate) fn mirror(&self, node: usize, registry: &str, mirror: &str) {
        self.nodes[node].containerd.set_hosts(registry, &self.origin.url(), &[mirror]).unwrap();
    }

    /// Waits until each node is connected to all others.
    pub(crate) async fn connected(&self) {
        self.all_pairs("is connected to", async |member, other| member.known(other).await.ok()?.map(drop))
            .await;
    }

    /// Waits until a node's store lists everything of `image` that its containerd has, and all others know it.
    pub(crate) async fn shared(&self, holder: usize, image: &Image) {
        let holder = &self.nodes[holder];
        let held: Vec<_> = image.blobs.keys().filter(|digest| holder.containerd.has_blob(digest)).collect();
        assert!(!held.is_empty(), "the holder has nothing of the image");
        for digest in held {
            let path = format!("/v2/{}/blobs/{digest}?ns={REGISTRY}", image.repository);
            wait::until(&format!("{digest} listed"), KNOWN, async || {
                let answer = holder.peili.request("HEAD", &path, &[]).await.ok()?;
                (answer.status == 200).then_some(())
            })
            .await
            .unwrap();
        }
        self.settled().await;
    }

    /// Waits until each node knows as many digests of each other as that one advertises.
    pub(crate) async fn settled(&self) {
        self.all_pairs("knows", async |member, holder| {
            let advertised = holder.advertised().await.ok()?;
            (member.known(holder).await.ok()? == Some(advertised)).then_some(())
        })
        .await;
    }

    async fn all_pairs(&self, what: &str, condition: impl AsyncFn(&Node, &Node) -> Option<()>) {
        for (index, Member { peili: one, .. }) in self.nodes.iter().enumerate() {
            for (_, Member { peili: other, .. }) in
                self.nodes.iter().enumerate().filter(|(at, _)| *at != index)
            {
                let what = format!("{} {what} {}", one.plan.name, other.plan.name);
                wait::until(&what, KNOWN, async || condition(one, other).await).await.unwrap();
            }
        }
    }

    /// Serves the image at the origin, pulls it on a node, and waits until the others know.
    pub(crate) async fn seed(&self, node: usize, image: &Image) {
        self.origin.add(image);
        self.nodes[node].pull(image).await;
        self.shared(node, image).await;
        self.origin.reset();
    }
}

impl Member {
    /// Pulls an image of [`REGISTRY`] by its tag.
    pub(crate) async fn pull(&self, image: &Image) -> Pulled {
        self.pull_as(&image.reference(REGISTRY)).await
    }

    /// Pulls an image by any reference.
    pub(crate) async fn pull_as(&self, reference: &str) -> Pulled {
        let pulled = self.containerd.cri().pull(reference, PULL).await;
        pulled.unwrap_or_else(|error| {
            panic!("{} cannot pull {reference}: {error}", self.peili.plan.name);
        })
    }

    /// Bytes that its runtime got from peers.
    pub(crate) async fn peer_bytes(&self) -> u64 {
        self.peili.status().await.unwrap()["served"]["from_peers"]["bytes"].as_u64().unwrap()
    }
}
