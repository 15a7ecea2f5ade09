//! What the acts play on: an origin registry, an API server, three nodes and their runtimes, and what is known of them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use peili::oci::{Digest, Reference};
use peili::pull::{self, Destination, Host, Silent};
use peili_lab::containerd::{self, Containerd};
use peili_lab::cri::Cri;
use peili_lab::image::{Image, write_empty_layout};
use peili_lab::netns::{Addresses, Block, Namespace, Network};
use peili_lab::node::{Node, Plan};
use peili_lab::origin::Origin;
use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Requirement, hosts, require, wait};
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use super::coordinator;
use super::meter::Meter;
use super::screen::{Screen, bytes};
use crate::api::Api;

/// The registry of all images; no machine has this name.
pub(crate) const REGISTRY: &str = "registry.demo";
/// Bytes per second that each node and each answer of the registry may send: so slow that one can watch.
pub(crate) const RATE: u64 = 48 << 20;
const NODES: usize = 3;
/// The API server's place in the network.
const API: usize = NODES + 2;
/// Longest that any single step may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Everything that runs. Dropped: gone. Fields are dropped in this order: what uses comes before what is used.
pub(crate) struct Stage {
    /// Shows.
    pub(crate) screen: Arc<Screen>,
    /// Reads the nodes.
    pub(crate) meter: Arc<Meter>,
    _watch: AbortOnDropHandle<()>,
    /// The nodes.
    pub(crate) nodes: Vec<Member>,
    /// The registry.
    pub(crate) origin: Arc<Origin>,
    /// The API server.
    pub(crate) api: Api,
    network: Option<Network>,
    secret: Scratch,
    /// The runtime's name.
    pub(crate) runtime: String,
    /// The main image's way.
    pub(crate) main: Main,
    /// Bytes of all images that were pulled.
    pub(crate) pulled: u64,
    /// The main image, as long as acts may ask for it.
    pub(crate) image: Option<Image>,
    /// Attempts so far, of all acts.
    attempts: u64,
    is_cut: bool,
}

/// How the main image came to all nodes, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Main {
    /// Its size.
    pub(crate) image: u64,
    /// What came from upstream.
    pub(crate) upstream: u64,
    /// What came from other nodes.
    pub(crate) peers: u64,
}

/// A node with its runtime.
pub(crate) struct Member {
    /// Its Peili.
    pub(crate) node: Node,
    runtime: Runtime,
    /// What it must hold by now.
    holds: BTreeSet<Digest>,
}

enum Runtime {
    Layout(Scratch),
    Containerd(Box<Containerd>),
}

/// Pulls as one node's runtime does.
pub(crate) enum Puller {
    Layout { folder: PathBuf, hosts: PathBuf },
    Containerd(Cri),
}

impl Stage {
    /// Starts everything; the nodes may not know each other yet.
    pub(crate) async fn start(containerd: bool, screen: Arc<Screen>) -> Result<Self> {
        if containerd {
            require(&[Requirement::Root, Requirement::Iproute2]).map_err(|reason| anyhow!(reason))?;
        }
        // One more for the registry, one for a stranger, and one for the API server.
        let network = if containerd { Some(Network::new(NODES + 3, Addresses::V4)?) } else { None };
        let api =
            Api::start(network.as_ref().map(|network| &network.nodes[API]), &["peili".to_owned()]).await?;
        let account =
            json!({"kubernetes": {"endpoints": [api.url()], "credentials": api.credentials().await?}});
        let origin = Arc::new(match &network {
            Some(network) => {
                let place = &network.nodes[NODES];
                Origin::start_at(Some(&place.namespace), &[(place.address(), 80).into()])?
            }
            None => Origin::start()?,
        });
        origin.behave(|behaviour| behaviour.rate = Some(RATE));
        let generation = Generation::ALL.into_iter().rev().find(|generation| generation.binary().is_some());
        let runtime = match (&network, generation) {
            (None, _) => "image layouts".to_owned(),
            (Some(_), Some(generation)) => generation.to_string(),
            (Some(_), None) => {
                return Err(anyhow!("no containerd on this machine; `cargo xtask setup` gets one"));
            }
        };
        let (mut plans, mut runtimes) = (Vec::new(), Vec::new());
        for index in 0..NODES {
            let name = format!("node-{}", index + 1);
            let (mut plan, runtime, hosts) = match (&network, generation) {
                (Some(network), Some(generation)) => {
                    let place = &network.nodes[index];
                    let options = containerd::Options::new(generation).in_namespace(&place.namespace);
                    let containerd = Containerd::start(options).await?;
                    let plan = Plan::in_namespace(&name, "containerd", &place.namespace, place.address())?;
                    let hosts = containerd.hosts_dir();
                    (plan.with_containerd(&containerd), Runtime::Containerd(Box::new(containerd)), hosts)
                }
                _ => {
                    let scratch = Scratch::new()?;
                    write_empty_layout(&scratch.path().join("layout"))?;
                    let store = format!("layout:{}", scratch.path().join("layout").display());
                    let hosts = scratch.path().join("hosts");
                    (Plan::on_loopback(&name, &store)?, Runtime::Layout(scratch), hosts)
                }
            };
            let mirror = format!("http://127.0.0.1:{}", plan.ports.registry);
            hosts::write(&hosts, REGISTRY, &origin.url(), &[&mirror])?;
            plan.merge(&json!({
                "transfer": {"upload-rate": RATE.to_string()},
                // Peili notices that a registry is gone within this time: 10 s unless told otherwise.
                "upstream": {"hosts-dirs": [hosts], "cache": "1s"},
            }));
            plans.push(plan);
            runtimes.push(runtime);
        }
        let secret = Scratch::new()?;
        let key = secret.path().join("cluster.key");
        std::fs::write(&key, "the key of the cluster of this demonstration")?;
        let first = plans.first().map(Plan::control);
        for (index, plan) in plans.iter_mut().enumerate() {
            let dns: Vec<_> = first.iter().filter(|_| index > 0).collect();
            plan.merge(&json!({"network": {"cluster-key": [&key], "dns": dns}}));
            plan.merge(&account);
            plan.merge(&coordinator::configuration(index)?);
        }
        let mut nodes = Vec::new();
        for (plan, runtime) in plans.into_iter().zip(runtimes) {
            nodes.push(Member { node: plan.start().await?, runtime, holds: BTreeSet::new() });
        }
        let namespace = |index: usize| network.as_ref().map(|network| network.nodes[index].namespace.clone());
        let read: Vec<(&Node, Option<Namespace>)> =
            nodes.iter().enumerate().map(|(index, member)| (&member.node, namespace(index))).collect();
        let meter = Arc::new(Meter::new(&read, Arc::clone(&origin)));
        let watch = tokio::spawn(Arc::clone(&meter).watch(Arc::clone(&screen)));
        Ok(Self {
            screen,
            meter,
            _watch: AbortOnDropHandle::new(watch),
            nodes,
            origin,
            api,
            network,
            secret,
            runtime,
            main: Main::default(),
            pulled: 0,
            image: None,
            attempts: 0,
            is_cut: false,
        })
    }

    /// What runs, for people.
    pub(crate) fn setting(&self) -> String {
        format!(
            "A registry at {}, {}, and {} nodes with {}. To be watched, each sends {}/s at most.",
            self.origin.url(),
            self.api.name(),
            self.nodes.len(),
            self.runtime,
            bytes(RATE)
        )
    }

    /// Before each attempt of an act: all that an earlier one may have killed runs again.
    pub(crate) async fn prepare(&mut self) -> Result<()> {
        self.attempts += 1;
        self.origin.accept();
        self.cut_api(false)?;
        for index in 0..self.nodes.len() {
            if self.nodes[index].node.process().is_none() {
                self.restart(index).await?;
            }
        }
        Ok(())
    }

    /// Cuts all nodes off from the API server: their packets to it are dropped, or, on loopback, it stands still. `false`: undoes it.
    pub(crate) fn cut_api(&mut self, cuts: bool) -> Result<()> {
        if self.is_cut == cuts {
            return Ok(());
        }
        self.is_cut = cuts;
        let Some(network) = &self.network else { return self.api.freeze(cuts) };
        let set = if cuts { Network::block } else { Network::unblock };
        (0..NODES).try_for_each(|node| set(network, node, API, Block::Drop))
    }

    /// For images of this attempt, which no node may have of an earlier one.
    pub(crate) fn seed(&self) -> u64 {
        self.attempts
    }

    /// A tag for images of this attempt.
    pub(crate) fn tag(&self) -> String {
        format!("v{}", self.attempts)
    }

    /// Where node `index` is; `None`: on loopback.
    pub(crate) fn namespace(&self, index: usize) -> Option<&Namespace> {
        self.network.as_ref().map(|network| &network.nodes[index].namespace)
    }

    /// The cluster's key.
    pub(crate) fn key(&self) -> PathBuf {
        self.secret.path().join("cluster.key")
    }

    /// Where one is who is none of the nodes; `None`: on loopback.
    pub(crate) fn elsewhere(&self) -> Option<&Namespace> {
        self.namespace(NODES + 1)
    }

    /// One who is none of the nodes, with an empty layout in `scratch` and with this key, and knows where these nodes are.
    pub(crate) fn outsider(
        &self,
        name: &str,
        scratch: &Scratch,
        key: &Path,
        known: &[Member],
    ) -> Result<Plan> {
        let layout = scratch.path().join("layout");
        write_empty_layout(&layout)?;
        let store = format!("layout:{}", layout.display());
        let mut plan = match &self.network {
            Some(network) => {
                let place = &network.nodes[NODES + 1];
                Plan::in_namespace(name, &store, &place.namespace, place.address())?
            }
            None => Plan::on_loopback(name, &store)?,
        };
        let addresses: Vec<_> = known.iter().map(|member| member.node.plan.control()).collect();
        plan.merge(&json!({
            "upstream": {"hosts-dirs": [scratch.path().join("hosts")]},
            "network": {"cluster-key": [key], "dns": addresses},
        }));
        Ok(plan)
    }

    /// Bytes that the registry served.
    pub(crate) fn upstream_bytes(&self) -> u64 {
        let counts = self.origin.counts();
        counts.blob_bytes + counts.manifest_bytes
    }

    /// Node `index` has pulled `image`: checks that it holds all of it, byte by byte where files are at hand.
    pub(crate) fn arrived(&mut self, index: usize, image: &Image) -> Result<()> {
        let member = &mut self.nodes[index];
        member.check(image).with_context(|| format!("on {}", member.node.plan.name))?;
        member.holds.extend(image.blobs.keys());
        self.pulled += size(image);
        Ok(())
    }

    /// Waits until every node that lives knows what the others hold.
    pub(crate) async fn settle(&self) -> Result<()> {
        wait::until("all nodes know what the others hold", LIMIT, async || {
            let living = || self.nodes.iter().filter(|member| member.node.process().is_some());
            for Member { node: holder, holds, .. } in living() {
                let holds = holds.len() as u64;
                if holder.advertised().await.ok()? < holds {
                    return None;
                }
                for Member { node, .. } in living().filter(|other| !std::ptr::eq(&other.node, holder)) {
                    if node.known(holder).await.ok()?? < holds {
                        return None;
                    }
                }
            }
            Some(())
        })
        .await
    }

    /// SIGKILL for node `index`.
    pub(crate) fn kill(&mut self, index: usize) {
        self.nodes[index].node.kill();
        self.meter.killed(index);
    }

    /// Starts node `index` again.
    pub(crate) async fn restart(&mut self, index: usize) -> Result<()> {
        self.nodes[index].node.restart().await?;
        self.meter.started(index);
        Ok(())
    }

    /// Reads the nodes and shows what they are at.
    pub(crate) async fn show(&self) {
        self.meter.read().await;
        self.meter.show(&self.screen);
    }

    /// The ends of all logs.
    pub(crate) fn logs(&self) -> String {
        let log = |member: &Member| {
            let lines: Vec<_> = member.node.log_tail().lines().rev().take(12).map(str::to_owned).collect();
            let lines: Vec<_> = lines.into_iter().rev().collect();
            format!("--- log of {}\n{}", member.node.plan.name, lines.join("\n"))
        };
        self.nodes.iter().map(log).collect::<Vec<_>>().join("\n")
    }
}

impl Member {
    /// Its runtime's way to pull.
    pub(crate) fn puller(&self) -> Puller {
        match &self.runtime {
            Runtime::Layout(scratch) => {
                Puller::Layout { folder: scratch.path().join("layout"), hosts: scratch.path().join("hosts") }
            }
            Runtime::Containerd(containerd) => Puller::Containerd(containerd.cri().clone()),
        }
    }

    fn check(&self, image: &Image) -> Result<()> {
        for (digest, blob) in &image.blobs {
            match &self.runtime {
                Runtime::Layout(scratch) => {
                    let folder = scratch.path().join("layout/blobs").join(digest.algorithm().as_str());
                    let content = std::fs::read(folder.join(digest.hex()))?;
                    let right = content.len() as u64 == blob.size
                        && Digest::of(digest.algorithm(), &content) == *digest;
                    ensure!(right, "{digest} is not what it should be");
                }
                // containerd verifies what it commits.
                Runtime::Containerd(containerd) => {
                    ensure!(containerd.has_blob(digest), "{digest} is missing");
                }
            }
        }
        Ok(())
    }
}

impl Puller {
    /// Pulls `image` by its tag: this node's Peili first, then the registry. Returns how long it took.
    pub(crate) async fn pull(&self, image: &Image) -> Result<Duration> {
        let begin = Instant::now();
        match self {
            Self::Layout { folder, hosts } => {
                let reference: Reference = image.reference(REGISTRY).parse()?;
                let (dirs, registry) = (vec![hosts.clone()], reference.name.registry.clone());
                let hosts = tokio::task::spawn_blocking(move || Host::load(&dirs, &registry)).await??;
                let options = pull::Options::new(reference, hosts, Destination::Layout(folder.clone()));
                let summary = tokio::time::timeout(LIMIT, pull::pull(options, &Silent))
                    .await
                    .with_context(|| format!("no pull within {LIMIT:?}"))??;
                ensure!(summary.digest == image.root, "another image came: {}", summary.digest);
            }
            Self::Containerd(cri) => {
                cri.pull(&image.reference(REGISTRY), LIMIT).await?;
            }
        }
        Ok(begin.elapsed())
    }
}

/// Bytes of everything that belongs to an image.
pub(crate) fn size(image: &Image) -> u64 {
    image.blobs.values().map(|blob| blob.size).sum()
}

/// What a peer ID's owner says of itself: one entry of its `/status`.
pub(crate) fn peer<'a>(status: &'a Value, id: &str) -> Option<&'a Value> {
    status["network"]["peers"].as_array()?.iter().find(|peer| peer["id"] == id)
}
