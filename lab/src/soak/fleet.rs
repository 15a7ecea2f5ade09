//! The nodes of a soak, the images that they pull, and what went wrong so far.

use std::collections::VecDeque;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use peili_lab::hosts;
use peili_lab::image::{Image, write_empty_layout};
use peili_lab::node::{Node, Plan};
use peili_lab::origin::Origin;
use peili_lab::process::Usage;
use peili_lab::scratch::Scratch;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::RwLock;

/// The registry of all images.
pub(super) const REGISTRY: &str = "registry.soak";
/// Images of a run.
const IMAGES: u64 = 24;
/// Images that a node keeps; then it removes the oldest.
const KEPT: usize = 6;
/// How long a node may take to end by SIGTERM. Its drain takes up to 2 s here.
const TERMINATE_LIMIT: Duration = Duration::from_secs(15);
/// A peer may be connected twice for a while, where both called each other; each connection is a task or two.
const TASKS_SLACK: f64 = 6.0;
const DESCRIPTORS_SLACK: usize = 6;
/// Violations after which it is no use to go on.
const HOPELESS: usize = 20;

/// Everything that runs. Dropped: gone.
pub(super) struct Fleet {
    pub(super) slots: Vec<Slot>,
    pub(super) images: Vec<Pooled>,
    pub(super) origin: Origin,
    violations: Mutex<Vec<String>>,
}

/// A node and its layout.
pub(super) struct Slot {
    pub(super) name: String,
    /// It is never killed.
    pub(super) stable: bool,
    pub(super) registry: SocketAddr,
    /// Pulls hold it shared; whoever removes content holds it alone, as containerd's leases do.
    pub(super) content: RwLock<()>,
    node: tokio::sync::Mutex<Node>,
    /// Images here, the oldest first.
    kept: Mutex<VecDeque<usize>>,
    panicked: AtomicBool,
    restarts: AtomicU64,
    pub(super) pulls: AtomicU64,
    pub(super) hang_ups: AtomicU64,
    scratch: Scratch,
}

/// What a node holds on to at some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rest {
    /// Peers that it is connected to.
    pub(super) peers: usize,
    /// Requests and uploads that run.
    work: f64,
    /// Tasks that have not ended.
    tasks: f64,
    descriptors: usize,
}

/// An image that may be at the registry.
pub(super) struct Pooled {
    pub(super) image: Image,
    /// Whether it is there. Pulls hold it shared, so that it does not go while they run.
    pub(super) present: RwLock<bool>,
}

impl Fleet {
    /// Starts all nodes; half of the images are there.
    pub(super) async fn start(stable: usize, churned: usize, seed: u64) -> Result<Self> {
        let origin = Origin::start()?;
        let mut random = StdRng::seed_from_u64(seed);
        let mut images = Vec::new();
        for number in 0..IMAGES {
            let mut builder = Image::builder(&format!("soak/app-{number}"), "v1").seed(seed << 8 | number);
            for _ in 0..random.random_range(1..4) {
                builder = builder.layer(random.random_range(64 << 10..6 << 20));
            }
            let image = builder.build()?;
            let present = number % 2 == 0;
            if present {
                origin.add(&image);
            }
            images.push(Pooled { image, present: RwLock::new(present) });
        }
        let (mut plans, mut scratches) = (Vec::new(), Vec::new());
        for index in 0..stable + churned {
            let scratch = Scratch::new()?;
            write_empty_layout(&scratch.path().join("layout"))?;
            let store = format!("layout:{}", scratch.path().join("layout").display());
            let mut plan = Plan::on_loopback(&format!("node-{}", index + 1), &store)?;
            let mirror = format!("http://127.0.0.1:{}", plan.ports.registry);
            hosts::write(&scratch.path().join("hosts"), REGISTRY, &origin.url(), &[&mirror])?;
            plan.merge(&json!({
                "node": {"drain": "2s"},
                "upstream": {"hosts-dirs": [scratch.path().join("hosts")]},
            }));
            plans.push(plan);
            scratches.push(scratch);
        }
        Plan::introduce(&mut plans);
        let mut slots = Vec::new();
        for (plan, scratch) in plans.into_iter().zip(scratches) {
            let node = plan.start().await?;
            slots.push(Slot {
                name: node.plan.name.clone(),
                stable: slots.len() < stable,
                registry: node.registry(),
                content: RwLock::default(),
                node: tokio::sync::Mutex::new(node),
                kept: Mutex::default(),
                panicked: AtomicBool::new(false),
                restarts: AtomicU64::new(0),
                pulls: AtomicU64::new(0),
                hang_ups: AtomicU64::new(0),
                scratch,
            });
        }
        Ok(Self { slots, images, origin, violations: Mutex::default() })
    }

    /// Notes what must not be.
    pub(super) fn violation(&self, what: String) {
        let mut violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        if violations.len() < HOPELESS && !violations.contains(&what) {
            println!("soak: violation: {what}");
            violations.push(what);
        }
    }

    /// What must not be and was.
    pub(super) fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether so much went wrong that going on shows nothing new.
    pub(super) fn is_hopeless(&self) -> bool {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).len() >= HOPELESS
    }

    /// Looks for panics in the logs of all nodes, earlier lives included.
    pub(super) fn check_logs(&self) {
        for slot in &self.slots {
            if let Some(line) = slot.panic() {
                self.violation(format!("{} panicked: {line}", slot.name));
            }
        }
    }

    /// Starts what is down.
    pub(super) async fn revive(&self) {
        for slot in &self.slots {
            let mut node = slot.node.lock().await;
            if node.process().is_none()
                && let Err(error) = node.restart().await
            {
                self.violation(format!("{} does not start again: {error:#}", slot.name));
            }
        }
    }

    /// How far it is, for people.
    pub(super) fn line(&self) -> String {
        let sum = |count: fn(&Slot) -> &AtomicU64| -> u64 {
            self.slots.iter().map(|slot| count(slot).load(Ordering::Relaxed)).sum()
        };
        let counts = self.origin.counts();
        format!(
            "{} pulls, {} clients hung up, {} restarts, {} MiB from upstream, {} violations",
            sum(|slot| &slot.pulls),
            sum(|slot| &slot.hang_ups),
            sum(|slot| &slot.restarts),
            (counts.blob_bytes + counts.manifest_bytes) >> 20,
            self.violations().len()
        )
    }
}

impl Rest {
    /// Whether nothing runs, and nothing is held that was not `before`.
    pub(super) fn is_back_at(&self, before: &Self) -> bool {
        self.peers == before.peers
            && self.work == 0.0
            && self.tasks <= before.tasks + TASKS_SLACK
            && self.descriptors <= before.descriptors + DESCRIPTORS_SLACK
    }
}

impl std::fmt::Display for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { peers, work, tasks, descriptors } = self;
        write!(f, "{peers} peers, {work} requests, {tasks} tasks, {descriptors} descriptors")
    }
}

impl Slot {
    /// Its layout.
    pub(super) fn layout(&self) -> PathBuf {
        self.scratch.path().join("layout")
    }

    /// Its `config_path`.
    pub(super) fn hosts(&self) -> PathBuf {
        self.scratch.path().join("hosts")
    }

    /// Restarts, pulls and clients that hung up.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let [restarts, pulls, hang_ups] =
            [&self.restarts, &self.pulls, &self.hang_ups].map(|count| count.load(Ordering::Relaxed));
        (restarts, pulls, hang_ups)
    }

    /// What its process uses; `None` if there is none, or if it is being restarted.
    pub(super) fn usage(&self) -> Option<Usage> {
        self.node.try_lock().ok()?.usage().ok()
    }

    /// What it holds on to; `None` if it does not answer.
    pub(super) async fn rest(&self) -> Option<Rest> {
        let node = self.node.lock().await;
        let metric = async |name: &str| node.metric(name, "").await.ok();
        let status = node.status().await.ok()?;
        let peers = status["network"]["peers"].as_array()?;
        Some(Rest {
            peers: peers.iter().filter(|peer| peer["connected"] == true).count(),
            work: metric("peili_registry_in_flight").await? + metric("peili_transfer_uploads_active").await?,
            // There are always some: without any the metric has another name now.
            tasks: metric("peili_runtime_tasks").await.filter(|tasks| *tasks > 0.0)?,
            descriptors: node.usage().ok()?.descriptors,
        })
    }

    /// Kills it or asks it to end, waits for `down`, and starts it again.
    pub(super) async fn restart(&self, gently: bool, down: Duration) -> Result<()> {
        let mut node = self.node.lock().await;
        if gently {
            let status = node.terminate(TERMINATE_LIMIT).await.context("SIGTERM")?;
            anyhow::ensure!(status.success(), "SIGTERM ended it with {status}");
        } else {
            node.kill();
        }
        tokio::time::sleep(down).await;
        node.restart().await.context("it does not start again")?;
        self.restarts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Image `index` is here now. Returns one that is too many.
    pub(super) fn keep(&self, index: usize) -> Option<usize> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|other| *other != index);
        kept.push_back(index);
        if kept.len() > KEPT { kept.pop_front() } else { None }
    }

    /// Removes an image from the layout. Nobody may pull into it meanwhile.
    pub(super) fn remove(&self, image: &Image) -> Result<()> {
        let path = self.layout().join("index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path)?)?;
        let root = image.root.to_string();
        if let Some(manifests) = index["manifests"].as_array_mut() {
            manifests.retain(|entry| entry["digest"] != root.as_str());
        }
        let new = self.layout().join("ingest").join("index.new");
        fs::create_dir_all(self.layout().join("ingest"))?;
        fs::write(&new, index.to_string())?;
        fs::rename(new, path)?;
        for digest in image.blobs.keys() {
            let blob = self.layout().join("blobs").join(digest.algorithm().as_str()).join(digest.hex());
            match fs::remove_file(blob) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The first line of a panic that was not told yet.
    fn panic(&self) -> Option<String> {
        let log = self.node.try_lock().ok()?.process()?.log();
        let line = log.lines().find(|line| line.contains("panicked at"))?.to_owned();
        (!self.panicked.swap(true, Ordering::Relaxed)).then_some(line)
    }
}
