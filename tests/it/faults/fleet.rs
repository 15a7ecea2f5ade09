//! Nodes on OCI layouts: one that asks, some that hold, and an origin; and `peili pull` as the runtime of the first.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use peili::oci::Digest;
use peili_lab::netns::Addresses;
use peili_lab::node::{Plan, binary};
use peili_lab::peer::Hold;
use peili_lab::scratch::Scratch;
use peili_lab::{Image, Liar, Network, Node, Origin, hosts, wait};
use serde_json::{Value, json};

use super::When;
use crate::cluster::REGISTRY;

/// Longest that nodes may take to know of each other.
const KNOWN: Duration = Duration::from_secs(20);

/// A peer that was suspected again and again is tried again after 30 s at the latest.
const BELIEVED: Duration = Duration::from_secs(45);

/// What holders and the origin send in cases that need a middle of a body: 16 MiB take a third of a second.
const RATE: u64 = 400_000_000;

/// Node 0 asks, the others hold the image, and the last namespace has the origin. In the order in which they must go.
pub(super) struct Fleet {
    pub(super) nodes: Vec<Node>,
    _origin: Origin,
    pub(super) network: Network,
    pub(super) image: Image,
    /// What the node that asks holds itself.
    unrelated: Image,
    /// An upload of the first holder that is taken.
    pub(super) hold: Option<Hold>,
    scratch: Scratch,
    pulls: u32,
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
    /// Held by the first holder alone.
    pub(super) other: Option<Image>,
    /// Changes of all configurations.
    pub(super) config: Value,
    /// A further namespace has a liar that claims to hold the image.
    pub(super) liar: bool,
    /// Holders, the liar and the origin send no faster than [`RATE`].
    pub(super) limited: bool,
}

impl When {
    /// An image that such a moment can be found in.
    pub(super) fn image(self) -> Image {
        let image = Image::builder("library/app", "v1");
        let image = match self {
            // Many layers, so that what is paid per layer shows.
            Self::Before => image.layers(12, 256 << 10),
            // Two segments.
            Self::MidBody => image.layer(16 << 20),
            // Three are there, three are on their way, and three are still to be asked for.
            Self::BetweenLayers => image.layers(9, 3 << 19),
        };
        image.build().unwrap()
    }
}

impl Setup {
    pub(super) fn new(holders: usize, image: Image) -> Self {
        Self { holders, image, other: None, config: json!({}), liar: false, limited: false }
    }

    /// With an image for this moment.
    pub(super) fn at(when: When, holders: usize) -> Self {
        Self { limited: when != When::Before, ..Self::new(holders, when.image()) }
    }

    /// The fleet once all know what the others hold, and the liar if one is wanted.
    pub(super) async fn start(self) -> (Fleet, Option<Liar>) {
        let (fleet, liar) = self.start_apart(|_| {}).await;
        fleet.settled(liar.as_ref()).await;
        (fleet, liar)
    }

    /// The fleet without waiting; `change` sees the plans before the start.
    pub(super) async fn start_apart(self, change: impl FnOnce(&mut Vec<Plan>)) -> (Fleet, Option<Liar>) {
        let Self { holders, image, other, config, liar, limited } = self;
        let network = Network::new(holders + 3, Addresses::V4).unwrap();
        let last = &network.nodes[holders + 2];
        let origin = Origin::start_at(Some(&last.namespace), &[(last.address(), 80).into()]).unwrap();
        origin.add(&image);
        let scratch = Scratch::new().unwrap();
        let unrelated = Image::builder("library/other", "v1").layer(4096).seed(99).build().unwrap();
        let certs = scratch.path().join("certs.d");
        hosts::write(&certs, REGISTRY, &origin.url(), &["http://127.0.0.1:5000"]).unwrap();
        hosts::write(&scratch.path().join("direct.d"), REGISTRY, &origin.url(), &[]).unwrap();
        let mut plans: Vec<_> = (0..=holders)
            .map(|number| {
                let node = &network.nodes[number];
                let folder = scratch.path().join(format!("layout-{number}"));
                let images = match (number, &other) {
                    (0, _) => vec![&unrelated],
                    (1, Some(other)) => vec![&image, other],
                    _ => vec![&image],
                };
                crate::cli::layout(&folder, &images);
                let store = format!("layout:{}", folder.display());
                let name = format!("node-{number}");
                let mut plan = Plan::in_namespace(&name, &store, &node.namespace, node.address()).unwrap();
                // The first holder is asked first: it alone is in the zone of the node that asks.
                let zone = if number < 2 { "near" } else { "far" };
                plan.merge(&json!({
                    "node": {"zone": zone},
                    "upstream": {"hosts-dirs": [certs]},
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
        if limited {
            for node in 1..holders + 3 {
                network.set_rate(node, Some(RATE)).unwrap();
            }
        }
        (Fleet { nodes, _origin: origin, network, image, unrelated, hold: None, scratch, pulls: 0 }, liar)
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

    /// The file of the image's layer at a node that holds it.
    pub(super) fn layer_file(&self, node: usize, index: usize) -> PathBuf {
        let layer = self.image.layers[index].hex();
        self.scratch.path().join(format!("layout-{node}")).join("blobs/sha256").join(layer)
    }

    /// The path of the image's layer at the registry.
    pub(super) fn layer(&self, index: usize) -> String {
        format!("/v2/library/app/blobs/{}?ns={REGISTRY}", self.image.layers[index])
    }

    /// The path of a layer that the node that asks holds itself.
    pub(super) fn unrelated_layer(&self) -> String {
        format!("/v2/library/other/blobs/{}?ns={REGISTRY}", self.unrelated.layers[0])
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
    pub(super) async fn pull(&mut self) -> Pulled {
        self.begin("certs.d").await
    }

    /// A pull from the origin alone: the control without Peili.
    pub(super) async fn direct(&mut self) -> Duration {
        let pull = self.begin("direct.d").await;
        assert_eq!(pull.mirrored, 0);
        pull.elapsed
    }

    /// A pull without a fault that took all from peers. Connections are warm after it; on a busy machine the first
    /// handshakes of a debug build may take longer than a peer is given.
    pub(super) async fn warm(&mut self) -> Pulled {
        let pull = async || Some(self.pull().await).filter(|pull| pull.upstream == 0);
        wait::until("a pull from peers alone", BELIEVED, pull).await.unwrap()
    }

    /// The time of the control without Peili; peers are warm then.
    pub(super) async fn control(&mut self) -> Duration {
        let warm = self.warm().await.elapsed;
        let direct = self.direct().await;
        println!("without Peili {direct:?}, from peers {warm:?}");
        direct
    }

    /// Pulls, and strikes at that moment of the pull.
    pub(super) async fn struck(&mut self, when: When, strike: impl AsyncFnOnce(&mut Self)) -> Pulled {
        let (before, folder) = (self.peer_bytes().await, self.next_pull());
        let moment = async |fleet: &mut Self| match when {
            When::Before => {}
            When::MidBody => fleet.in_mid_body(before, 4e6).await,
            When::BetweenLayers => fleet.between_layers(&folder).await,
        };
        if when == When::Before {
            strike(self).await;
            return self.pull().await;
        }
        let pull = self.struck_at(moment, strike).await;
        assert!(pull.mirrored >= 3 << 20, "nothing came before the fault: {pull:?}");
        pull
    }

    /// Pulls, and strikes as soon as `moment` is there.
    pub(super) async fn struck_at(
        &mut self,
        moment: impl AsyncFnOnce(&mut Self),
        strike: impl AsyncFnOnce(&mut Self),
    ) -> Pulled {
        let pull = self.begin("certs.d");
        let at = async {
            moment(self).await;
            strike(self).await;
        };
        tokio::join!(pull, at).0
    }

    /// Waits until so many bytes more than `before` came from peers.
    pub(super) async fn in_mid_body(&self, before: f64, bytes: f64) {
        wait::until("the middle of a body", KNOWN, async || {
            (self.peer_bytes().await - before >= bytes).then_some(())
        })
        .await
        .unwrap();
    }

    /// Waits until the pull into this folder has three layers.
    async fn between_layers(&self, folder: &std::path::Path) {
        wait::until("some layers are there", KNOWN, async || {
            let there = |layer: &&Digest| folder.join("blobs/sha256").join(layer.hex()).is_file();
            (self.image.layers.iter().filter(there).count() >= 3).then_some(())
        })
        .await
        .unwrap();
    }

    /// Bytes that came from peers so far.
    pub(super) async fn peer_bytes(&self) -> f64 {
        self.asker().metric("peili_mirror_peer_bytes_total", "").await.unwrap()
    }

    /// Waits until `/status` of the node that asks says something with one of these texts.
    pub(super) async fn says(&self, texts: &[&str]) {
        let said = async || {
            let status = self.asker().status().await.ok()?;
            let said = format!("{} {}", status["problems"], status["causes"]);
            texts.iter().any(|text| said.contains(text)).then_some(())
        };
        let result = wait::until(&format!("the status says one of {texts:?}"), KNOWN, said).await;
        if let Err(error) = result {
            panic!("{error}: {:#}", self.asker().status().await.unwrap());
        }
    }

    fn next_pull(&self) -> PathBuf {
        self.scratch.path().join(format!("pull-{}", self.pulls))
    }

    /// Begins a pull by the hosts in a folder; it goes on only while it is awaited, and borrows nothing.
    fn begin(&mut self, hosts: &str) -> impl Future<Output = Pulled> + use<> {
        let (to, hosts) = (self.next_pull(), self.scratch.path().join(hosts));
        self.pulls += 1;
        let mut command = Command::new("timeout");
        command.arg("40").arg(binary().unwrap()).arg("pull").arg(self.image.digest_reference(REGISTRY));
        command.arg("--to").arg(format!("layout:{}", to.display())).arg("--hosts-dir").arg(hosts);
        command.args(["--json", "--quiet"]);
        let (namespace, blobs) = (self.network.nodes[0].namespace.clone(), self.image.blobs.clone());
        async move {
            let run = move || namespace.run(move || command.output());
            let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "the pull failed: {error}");
            for digest in blobs.keys() {
                let path = to.join("blobs").join(digest.algorithm().as_str()).join(digest.hex());
                let bytes = std::fs::read(path).unwrap();
                assert_eq!(Digest::of(digest.algorithm(), &bytes), *digest, "wrong bytes");
            }
            let _ = std::fs::remove_dir_all(to);
            Pulled::read(&serde_json::from_slice(&output.stdout).unwrap())
        }
    }
}

impl Pulled {
    fn read(summary: &Value) -> Self {
        let contents = summary["contents"].as_array().unwrap();
        let bytes = |wanted: bool| {
            let parts = contents.iter().flat_map(|content| content["parts"].as_array().unwrap());
            let of = parts.filter(|part| part["host"].as_str().unwrap().contains("127.0.0.1") == wanted);
            of.map(|part| part["bytes"].as_u64().unwrap()).sum()
        };
        Self {
            elapsed: Duration::from_secs_f64(summary["millis"].as_f64().unwrap() / 1000.0),
            mirrored: bytes(true),
            upstream: bytes(false),
            resumed: contents.iter().map(|content| content["resumed"].as_u64().unwrap()).sum(),
        }
    }
}
