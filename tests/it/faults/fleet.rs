//! Nodes on OCI layouts: one that asks, some that hold, and an origin; and `peili pull` as the runtime of the first.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use peili_lab::netns::Addresses;
use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Liar, Network, Node, Origin, hosts, wait};
use serde_json::{Value, json};

use crate::cluster::REGISTRY;

/// Longest that nodes may take to know of each other.
const KNOWN: Duration = Duration::from_secs(20);

/// A peer that was suspected again and again is tried again after 30 s at the latest.
const BELIEVED: Duration = Duration::from_secs(45);

/// Node 0 asks, the others hold the image, and the last namespace has the origin. In the order in which they must go.
pub(super) struct Fleet {
    pub(super) nodes: Vec<Node>,
    _origin: Origin,
    pub(super) network: Network,
    pub(super) image: Image,
    scratch: Scratch,
    pulls: std::cell::Cell<u32>,
}

/// A pull that is over.
#[derive(Debug)]
pub(super) struct Pulled {
    pub(super) elapsed: Duration,
    /// Bytes that came by the node's mirror.
    pub(super) mirrored: u64,
    /// Bytes that came from the origin.
    pub(super) upstream: u64,
    /// Bodies that ended early.
    pub(super) resumed: u64,
}

/// What to start.
pub(super) struct Setup {
    pub(super) holders: usize,
    pub(super) image: Image,
    /// Changes of all configurations.
    pub(super) config: Value,
    /// A further namespace has a liar that claims to hold the image.
    pub(super) liar: bool,
}

impl Setup {
    pub(super) fn new(holders: usize, image: Image) -> Self {
        Self { holders, image, config: json!({}), liar: false }
    }

    /// The fleet once all know what the others hold, and the liar if one is wanted.
    pub(super) async fn start(self) -> (Fleet, Option<Liar>) {
        let (fleet, liar) = self.start_apart(|_| {}).await;
        fleet.settled(liar.as_ref()).await;
        (fleet, liar)
    }

    /// The fleet without waiting; `change` sees the plans before the start.
    pub(super) async fn start_apart(self, change: impl FnOnce(&mut Vec<Plan>)) -> (Fleet, Option<Liar>) {
        let Self { holders, image, config, liar } = self;
        let network = Network::new(holders + 3, Addresses::V4).unwrap();
        let last = &network.nodes[holders + 2];
        let origin = Origin::start_at(Some(&last.namespace), &[(last.address(), 80).into()]).unwrap();
        origin.add(&image);
        let scratch = Scratch::new().unwrap();
        let full = scratch.path().join("full");
        image.write_layout(&full, Some(&image.reference(REGISTRY))).unwrap();
        let empty = scratch.path().join("empty");
        let other = Image::builder("library/other", "v1").layer(4096).seed(99).build().unwrap();
        other.write_layout(&empty, Some(&other.reference(REGISTRY))).unwrap();
        let hosts_dir = scratch.path().join("certs.d");
        hosts::write(&hosts_dir, REGISTRY, &origin.url(), &["http://127.0.0.1:5000"]).unwrap();
        let mut plans: Vec<_> = (0..=holders)
            .map(|number| {
                let node = &network.nodes[number];
                let folder = if number == 0 { &empty } else { &full };
                let store = format!("layout:{}", folder.display());
                let name = format!("node-{number}");
                let mut plan = Plan::in_namespace(&name, &store, &node.namespace, node.address()).unwrap();
                // The first holder is asked first: it alone is in the zone of the node that asks.
                let zone = if number < 2 { "near" } else { "far" };
                plan.merge(&json!({
                    "node": {"zone": zone},
                    "upstream": {"hosts-dirs": [hosts_dir]},
                    "log": {"level": "info,peili=debug"},
                }));
                plan.merge(&config);
                plan
            })
            .collect();
        Plan::introduce(&mut plans);
        let liar = liar.then(|| {
            let node = &network.nodes[holders + 1];
            let liar = Liar::start(&node.namespace, node.address(), &[&image]).unwrap();
            trust(&mut plans[0], liar.peer_id(), liar.address());
            liar
        });
        change(&mut plans);
        let mut nodes = Vec::new();
        for plan in plans {
            nodes.push(plan.start().await.unwrap());
        }
        (Fleet { nodes, _origin: origin, network, image, scratch, pulls: std::cell::Cell::new(0) }, liar)
    }
}

/// Adds a peer to a plan.
pub(super) fn trust(plan: &mut Plan, peer_id: &str, address: SocketAddr) {
    let peers = plan.config["network"]["peers"].as_array_mut().unwrap();
    peers.push(json!({"id": peer_id, "addresses": [address.to_string()]}));
}

impl Fleet {
    /// The node that asks.
    pub(super) fn asker(&self) -> &Node {
        &self.nodes[0]
    }

    /// The folder of the holders' content.
    pub(super) fn layout(&self) -> PathBuf {
        self.scratch.path().join("full")
    }

    /// Waits until the node that asks knows what all holders hold.
    pub(super) async fn settled(&self, liar: Option<&Liar>) {
        let holders = self.nodes[1..].iter().map(|node| node.plan.peer_id.as_str());
        for peer in holders.chain(liar.map(Liar::peer_id)) {
            wait::until("the asker knows what a holder holds", KNOWN, async || {
                (self.peer(peer).await?["holds"].as_u64()? >= self.image.blobs.len() as u64).then_some(())
            })
            .await
            .unwrap();
        }
    }

    /// What the node that asks says of a peer.
    pub(super) async fn peer(&self, id: &str) -> Option<Value> {
        let status = self.asker().status().await.ok()?;
        let peers = status["network"]["peers"].as_array()?;
        peers.iter().find(|peer| peer["id"] == *id).cloned()
    }

    /// Pulls the image by its digest into a new folder, as the runtime of the node that asks; checks every byte.
    pub(super) async fn pull(&self) -> Pulled {
        let number = self.pulls.replace(self.pulls.get() + 1);
        let to = self.scratch.path().join(format!("pull-{number}"));
        let mut command = Command::new("timeout");
        command.arg("40").arg(binary().unwrap()).arg("pull").arg(self.image.digest_reference(REGISTRY));
        command.arg("--to").arg(format!("layout:{}", to.display())).arg("--hosts-dir");
        command.arg(self.scratch.path().join("certs.d")).args(["--json", "--quiet"]);
        let namespace = self.network.nodes[0].namespace.clone();
        let run = move || namespace.run(move || command.output());
        let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the pull failed: {error}");
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        for (digest, blob) in &self.image.blobs {
            let path = to.join("blobs").join(digest.algorithm().as_str()).join(digest.hex());
            assert_eq!(std::fs::metadata(path).unwrap().len(), blob.size);
        }
        let _ = std::fs::remove_dir_all(to);
        let contents = summary["contents"].as_array().unwrap();
        let bytes = |wanted: bool| {
            let parts = contents.iter().flat_map(|content| content["parts"].as_array().unwrap());
            let of = parts.filter(|part| part["host"].as_str().unwrap().contains("127.0.0.1") == wanted);
            of.map(|part| part["bytes"].as_u64().unwrap()).sum()
        };
        Pulled {
            elapsed: Duration::from_secs_f64(summary["millis"].as_f64().unwrap() / 1000.0),
            mirrored: bytes(true),
            upstream: bytes(false),
            resumed: contents.iter().map(|content| content["resumed"].as_u64().unwrap()).sum(),
        }
    }

    /// A pull without a fault that took all from peers: what the others are compared with. Connections are warm after it;
    /// on a busy machine the first handshakes of a debug build may take longer than a peer is given.
    pub(super) async fn control(&self) -> Pulled {
        self.pull().await;
        let pull = async || Some(self.pull().await).filter(|pull| pull.upstream == 0);
        wait::until("a pull from peers alone", BELIEVED, pull).await.unwrap()
    }

    /// Waits until so many bytes more than `before` came from peers.
    pub(super) async fn in_mid_body(&self, before: f64, bytes: f64) {
        wait::until("the middle of a body", KNOWN, async || {
            (self.peer_bytes().await - before >= bytes).then_some(())
        })
        .await
        .unwrap();
    }

    /// Bytes that came from peers so far.
    pub(super) async fn peer_bytes(&self) -> f64 {
        self.asker().metric("peili_mirror_peer_bytes_total", "").await.unwrap()
    }
}
