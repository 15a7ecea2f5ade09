//! Which zone this node is in: by its configuration, else the labels of its pod, else what the API server says of its Node, else as it was
//! known in an earlier run. Nothing waits for it: what becomes known later is told then, and unknown is legal.
//!
//! It does not say what a zone is good for; a file that is absent or no label is no problem, since nobody has to have one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::{Api, Cause, Fault, node_label};
use crate::config::Config;
use crate::mirror::Mirror;
use crate::network::swarm::SwarmNetwork;
use crate::policy::{Policies, ZONE_LABEL};

/// Name of the file within the state folder.
const FILE: &str = "zone";
/// Bytes of a label's value (Kubernetes), and of a file of labels.
const VALUE: usize = 63;
const LABELS: u64 = 256 << 10;
/// How often the pod's labels are looked at.
const POLL: Duration = Duration::from_secs(5);
/// For one request.
const LIMIT: Duration = Duration::from_secs(5);
/// The nodes of a cluster that start together ask the API server within this time: where the zone was known before, and where not.
const SPREAD: Duration = Duration::from_secs(60);
const SPREAD_UNKNOWN: Duration = Duration::from_secs(10);
/// The first and the longest pause after a request that failed.
const AGAIN: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));

/// The problem of a node that is to ask and knows nobody to ask.
const NOBODY: &str = "zone: `kubernetes.read-node` is set and no API server is known: outside of a pod `kubernetes.endpoints` names it";

/// The zone of this node.
pub(super) struct Zone {
    now: watch::Sender<String>,
    problem: Mutex<Option<String>>,
    is_configured: bool,
    labels: PathBuf,
    data: PathBuf,
    node: String,
    /// `None`: it is not to be asked.
    api: Option<Api>,
}

/// The tasks that look for the zone of this node, and that tell the others, the mirror and the policies of it.
pub(super) fn follow(
    zone: &Arc<Zone>,
    network: &SwarmNetwork,
    mirror: &Mirror,
    policies: &Arc<Policies>,
) -> [AbortOnDropHandle<()>; 2] {
    let mut changes = zone.now.subscribe();
    let (network, mirror, policies) = (network.clone(), mirror.clone(), Arc::clone(policies));
    let telling = async move {
        while changes.changed().await.is_ok() {
            let zone = changes.borrow_and_update().clone();
            network.set_zone(&zone);
            mirror.set_zone(&zone);
            policies.set_zone(&zone);
        }
    };
    let zone = Arc::clone(zone);
    let locating = async move { zone.follow().await };
    [tokio::spawn(locating), tokio::spawn(telling)].map(AbortOnDropHandle::new)
}

impl Zone {
    /// With what this machine knows by itself.
    pub(super) fn new(config: &Config) -> Self {
        let (node, kubernetes) = (&config.node, &config.kubernetes);
        let is_configured = !node.zone.is_empty();
        let asks_nobody = kubernetes.read_node && !is_configured && !kubernetes.is_in_cluster();
        let zone = Self {
            now: watch::Sender::new(node.zone.clone()),
            problem: Mutex::new(asks_nobody.then(|| NOBODY.into())),
            is_configured,
            labels: node.pod_labels.clone(),
            data: node.data_dir.clone(),
            node: node.name.clone(),
            api: (kubernetes.read_node && kubernetes.is_in_cluster()).then(|| Api::new(kubernetes)),
        };
        if !zone.is_configured {
            let known = labelled(&zone.labels).or_else(|| kept(&zone.data)).unwrap_or_default();
            zone.now.send_replace(known);
        }
        zone
    }

    /// As it is known now; empty: it is not.
    pub(super) fn now(&self) -> String {
        self.now.borrow().clone()
    }

    /// Why the API server does not say it.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows what says it. Ends where the configuration does.
    async fn follow(&self) {
        if self.is_configured {
            return;
        }
        let spread = if self.now.borrow().is_empty() { SPREAD_UNKNOWN } else { SPREAD };
        let mut due = self.api.as_ref().map(|_| Instant::now() + spread.mul_f64(rand::random()));
        let mut pause = AGAIN.0;
        // As it stands in the file, or was tried to be put there.
        let mut kept = None;
        loop {
            let path = self.labels.clone();
            let found = tokio::task::spawn_blocking(move || labelled(&path)).await;
            let mut wait = POLL;
            if let Ok(Some(zone)) = found {
                self.learn(zone, "the pod's labels", &mut kept).await;
                self.set_problem(None);
            } else if let Some(api) =
                self.api.as_ref().filter(|_| due.is_some_and(|due| due <= Instant::now()))
            {
                match node_label(api, &self.node, ZONE_LABEL, LIMIT).await {
                    Ok(zone) => {
                        // It was told once, and a Node does not move.
                        due = None;
                        self.set_problem(None);
                        if let Some(zone) = zone.filter(|zone| is_value(zone)) {
                            self.learn(zone, "the API server", &mut kept).await;
                        }
                    }
                    Err(fault) => {
                        self.set_problem(Some(describe(&fault, &self.node)));
                        due = Some(Instant::now() + pause.mul_f64(rand::random_range(0.75..1.25)));
                        pause = (pause * 2).min(AGAIN.1);
                    }
                }
            } else if let Some(due) = due {
                wait = POLL.min(due.saturating_duration_since(Instant::now()));
            }
            sleep(wait).await;
        }
    }

    /// Tells it, and keeps it for the next start. What cannot be kept is tried again when it is another one.
    async fn learn(&self, zone: String, from: &str, kept: &mut Option<String>) {
        let is_new = self.now.send_if_modified(|now| {
            let is_new = *now != zone;
            now.clone_from(&zone);
            is_new
        });
        if is_new {
            tracing::info!(zone, from, "the zone of this node");
        }
        if kept.as_ref() == Some(&zone) {
            return;
        }
        *kept = Some(zone.clone());
        let folder = self.data.clone();
        let keeping = tokio::task::spawn_blocking(move || keep(&folder, &zone)).await;
        if let Ok(Err(error)) = keeping {
            tracing::info!(%error, "the zone cannot be kept for the next start");
        }
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

fn describe(fault: &Fault, node: &str) -> String {
    let remedy = match fault.cause {
        Cause::Forbidden => "allow `get` of this Node by a ClusterRole, or leave `kubernetes.read-node` out",
        Cause::NoObject => "let `node.name` be the Node's name (NODE_NAME by the downward API)",
        cause => cause.remedy(),
    };
    format!("zone: the API server does not say the zone of {node}: {fault}; {remedy}")
}

/// The zone in a file of the downward API: lines of `KEY="VALUE"`.
fn labelled(path: &Path) -> Option<String> {
    let text = read(path).ok()?;
    let value = |line: &str| {
        let rest = line.strip_prefix(ZONE_LABEL)?.strip_prefix("=\"")?;
        Some(rest.trim_end().strip_suffix('"')?.to_owned())
    };
    text.lines().find_map(value).filter(|zone| is_value(zone))
}

fn kept(folder: &Path) -> Option<String> {
    let text = read(&folder.join(FILE)).ok()?;
    Some(text.trim_end().to_owned()).filter(|zone| is_value(zone))
}

fn keep(folder: &Path, zone: &str) -> io::Result<()> {
    let new = folder.join("zone.new");
    fs::write(&new, format!("{zone}\n"))?;
    fs::rename(&new, folder.join(FILE))
}

/// A small regular file; a pipe would be waited for.
fn read(path: &Path) -> io::Result<String> {
    let about = fs::metadata(path)?;
    if !about.is_file() || about.len() > LABELS {
        return Err(io::Error::other("no regular file of a few KiB"));
    }
    fs::read_to_string(path)
}

/// Whether it can be a label's value, and is one.
fn is_value(text: &str) -> bool {
    let is_inner = |char: char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.');
    !text.is_empty() && text.len() <= VALUE && text.chars().all(is_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        let mut config = Config::default();
        config.node.data_dir = folder.to_owned();
        config.node.pod_labels = folder.join("labels");
        config
    }

    #[test]
    fn the_configuration_comes_first_then_the_labels_then_what_was_kept() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        assert_eq!(Zone::new(&config).now(), "", "unknown is legal");
        assert_eq!(Zone::new(&config).problem(), None);
        config.kubernetes.read_node = true;
        assert!(Zone::new(&config).problem().unwrap().contains("no API server is known"));
        keep(folder.path(), "kept").unwrap();
        assert_eq!(Zone::new(&config).now(), "kept");
        let labels =
            "app=\"peili\"\ntopology.kubernetes.io/zone=\"eu-1a\"\ntopology.kubernetes.io/region=\"eu\"\n";
        fs::write(folder.path().join("labels"), labels).unwrap();
        assert_eq!(Zone::new(&config).now(), "eu-1a");
        config.node.zone = "north".into();
        assert_eq!(Zone::new(&config).now(), "north");
        assert_eq!(Zone::new(&config).problem(), None, "nobody has to be asked");
        assert_eq!(kept(folder.path()).as_deref(), Some("kept"), "what is configured is not kept");
    }

    #[test]
    fn what_is_no_label_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labels");
        let long = "z".repeat(64);
        for value in ["", "\"", "\"\"", "\"a b\"", "a", "\"\u{1b}[2J\"", &format!("\"{long}\"")] {
            fs::write(&path, format!("topology.kubernetes.io/zone={value}\n")).unwrap();
            assert_eq!(labelled(&path), None, "{value}");
        }
        fs::write(&path, "xtopology.kubernetes.io/zone=\"a\"\ntopology.kubernetes.io/zones=\"a\"\n").unwrap();
        assert_eq!(labelled(&path), None);
        fs::remove_file(&path).unwrap();
        assert_eq!((labelled(&path), labelled(folder.path())), (None, None));
        fs::File::create(&path).unwrap().set_len(LABELS + 1).unwrap();
        assert_eq!(labelled(&path), None);
    }

    #[tokio::test]
    async fn labels_that_come_later_are_told_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let zone = Zone::new(&config(folder.path()));
        let mut changes = zone.now.subscribe();
        fs::write(folder.path().join("labels"), "topology.kubernetes.io/zone=\"eu-1b\"\n").unwrap();
        tokio::select! {
            () = zone.follow() => unreachable!("it is not configured"),
            changed = changes.changed() => changed.unwrap(),
        }
        assert_eq!(*changes.borrow(), "eu-1b");
        // Written after it was told.
        let path = folder.path().to_owned();
        zone.learn("eu-1b".into(), "test", &mut None).await;
        assert_eq!(kept(&path).as_deref(), Some("eu-1b"));
    }
}
