//! The real `peili` program, configured, started, watched and hurt.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::netns::Namespace;
use crate::process::{Process, Usage};
use crate::scratch::Scratch;
use crate::{http, requirements, wait};

/// Longest start until ready.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// The ports of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// OCI distribution, for the runtime.
    pub registry: u16,
    /// The control plane.
    pub network: u16,
    /// The peer port.
    pub transfer: u16,
    /// Health, metrics, status.
    pub admin: u16,
}

/// A node before its start: it has an identity, ports and a configuration.
#[derive(Debug)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its peer ID.
    pub peer_id: String,
    /// The address at which peers reach it.
    pub address: IpAddr,
    /// Its ports.
    pub ports: Ports,
    /// Its whole configuration; change what a test wants otherwise. Written as JSON, which is YAML too.
    pub config: Value,
    namespace: Option<Namespace>,
    binary: PathBuf,
    scratch: Scratch,
}

/// A node that was started. Dropped: killed, and its files are gone.
#[derive(Debug)]
pub struct Node {
    // Before the plan, so that its log is still there when it is dropped.
    process: Option<Process>,
    /// How it was planned; a change of its configuration counts from the next [`Node::restart`] or [`Node::rewrite`].
    pub plan: Plan,
}

impl Ports {
    /// The defaults, for a node that has a namespace to itself.
    pub const DEFAULT: Self = Self { registry: 5000, network: 5001, transfer: 5002, admin: 5003 };

    /// Ports of loopback that are free now.
    pub fn free() -> Result<Self> {
        // All are held until all are known, so that they differ.
        let listeners = (0..4)
            .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .collect::<std::io::Result<Vec<_>>>()?;
        let port = |index: usize| listeners[index].local_addr().map(|address| address.port());
        Ok(Self { registry: port(0)?, network: port(1)?, transfer: port(2)?, admin: port(3)? })
    }
}

impl Plan {
    /// A node on loopback, with free ports.
    pub fn on_loopback(name: &str, store: &str) -> Result<Self> {
        Self::new(name, store, None, Ipv4Addr::LOCALHOST.into(), Ports::free()?)
    }

    /// A node with a namespace to itself, reached at `address`.
    pub fn in_namespace(name: &str, store: &str, namespace: &Namespace, address: IpAddr) -> Result<Self> {
        Self::new(name, store, Some(namespace.clone()), address, Ports::DEFAULT)
    }

    fn new(
        name: &str,
        store: &str,
        namespace: Option<Namespace>,
        address: IpAddr,
        ports: Ports,
    ) -> Result<Self> {
        let (scratch, binary) = (Scratch::new()?, binary()?);
        let data = scratch.path().join("data");
        let peer_id = identity(&binary, &data)?;
        let at = |port| SocketAddr::new(address, port);
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let config = json!({
            "node": {"name": name, "data-dir": data},
            "store": {"source": store},
            "registry": {"listen": [loopback(ports.registry)]},
            "network": {"listen": [at(ports.network)], "peers": []},
            "transfer": {"listen": [at(ports.transfer)]},
            "admin": {"listen": [loopback(ports.admin)]},
        });
        let name = name.to_owned();
        Ok(Self { name, peer_id, address, ports, config, namespace, binary, scratch })
    }

    /// Lets the store be this containerd, and its hosts.toml folders be read.
    #[must_use]
    pub fn with_containerd(mut self, containerd: &crate::Containerd) -> Self {
        let hosts_dirs: Vec<_> =
            [containerd.hosts_dir()].into_iter().chain(containerd.second_hosts_dir()).collect();
        self.merge(&json!({
            "store": {
                "source": "containerd",
                "socket": containerd.socket(),
                "content-root": containerd.content_root(),
            },
            "upstream": {"hosts-dirs": hosts_dirs},
        }));
        self
    }

    /// Lays `changes` over the configuration: objects are merged, all else is replaced.
    pub fn merge(&mut self, changes: &Value) {
        merge(&mut self.config, changes);
    }

    /// Adds a peer, with the address of its control plane.
    pub fn trust(&mut self, other: &Self) {
        let address = SocketAddr::new(other.address, other.ports.network).to_string();
        if let Some(peers) = self.config["network"]["peers"].as_array_mut() {
            peers.push(json!({"id": other.peer_id, "addresses": [address]}));
        }
    }

    /// Makes all nodes peers of each other.
    pub fn introduce(plans: &mut [Self]) {
        for index in 0..plans.len() {
            let (before, rest) = plans.split_at_mut(index);
            let Some((plan, after)) = rest.split_first_mut() else { continue };
            for other in before.iter().chain(after.iter()) {
                plan.trust(other);
            }
        }
    }

    /// Its data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.scratch.path().join("peili.yaml")
    }

    /// Starts it without waiting.
    pub fn launch(self) -> Result<Node> {
        let mut node = Node { plan: self, process: None };
        node.launch()?;
        Ok(node)
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Result<Node> {
        let mut node = self.launch()?;
        node.ready(READY_LIMIT).await?;
        Ok(node)
    }
}

impl Node {
    /// Its registry, as the runtime on this node reaches it.
    pub fn registry(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.plan.ports.registry).into()
    }

    /// `http://ADDRESS` of its registry.
    pub fn registry_url(&self) -> String {
        format!("http://{}", self.registry())
    }

    /// The process; `None` between [`Self::kill`] and [`Self::restart`].
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// The process, to wait for its end.
    pub fn process_mut(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// GET from its admin port.
    pub async fn admin(&self, path: &str) -> Result<http::Answer> {
        let address = (Ipv4Addr::LOCALHOST, self.plan.ports.admin).into();
        http::get(self.plan.namespace.as_ref(), address, path).await
    }

    /// GET from its registry port, as the runtime on this node would.
    pub async fn fetch(&self, path: &str) -> Result<http::Answer> {
        http::get(self.plan.namespace.as_ref(), self.registry(), path).await
    }

    /// Any request to its registry port, with header lines.
    pub async fn request(&self, method: &str, path: &str, headers: &[&str]) -> Result<http::Answer> {
        http::send(self.plan.namespace.as_ref(), self.registry(), method, path, headers).await
    }

    /// `/status`.
    pub async fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.admin("/status").await?.body)?)
    }

    /// How many digests it says that it holds.
    pub async fn advertised(&self) -> Result<u64> {
        self.status().await?["network"]["advertised"].as_u64().context("its status has no inventory")
    }

    /// How many digests it knows `other` to hold; `None`: it is not connected to it.
    pub async fn known(&self, other: &Self) -> Result<Option<u64>> {
        let status = self.status().await?;
        let peers = status["network"]["peers"].as_array().context("its status has no peers")?;
        let peer = peers.iter().find(|peer| peer["id"] == *other.plan.peer_id);
        Ok(peer.filter(|peer| peer["connected"] == true).and_then(|peer| peer["holds"].as_u64()))
    }

    /// `/metrics`.
    pub async fn metrics(&self) -> Result<String> {
        Ok(self.admin("/metrics").await?.text())
    }

    /// The sum of a metric over all its labels that contain `label` (`""`: all); 0 if there is none.
    pub async fn metric(&self, name: &str, label: &str) -> Result<f64> {
        Ok(sum(&self.metrics().await?, name, label))
    }

    /// Waits until `/readyz` answers 200.
    pub async fn ready(&mut self, limit: Duration) -> Result<()> {
        let what = format!("{} ready", self.plan.name);
        let ready = wait::until(&what, limit, async || {
            if !self.process.as_mut().is_some_and(Process::is_running) {
                return Some(false);
            }
            let answer = self.admin("/readyz").await;
            answer.is_ok_and(|answer| answer.status == 200).then_some(true)
        })
        .await;
        let ready = ready.with_context(|| format!("its log:\n{}", self.log_tail()))?;
        ensure!(ready, "{} ended; its log:\n{}", self.plan.name, self.log_tail());
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        let status = self.process.as_mut().context("it does not run")?.terminate(limit).await;
        self.process = None;
        status
    }

    /// Starts it again, after [`Self::kill`] if it still runs, and waits until it is ready.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        self.launch()?;
        self.ready(READY_LIMIT).await
    }

    /// Writes the configuration anew while it runs.
    pub fn rewrite(&self) -> Result<()> {
        write(&self.plan.config_path(), &self.plan.config)
    }

    /// What it uses right now.
    pub fn usage(&self) -> Result<Usage> {
        self.process.as_ref().context("it does not run")?.usage()
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }

    fn launch(&mut self) -> Result<()> {
        self.rewrite()?;
        let mut command = Command::new(&self.plan.binary);
        command.arg("run").arg("--config").arg(self.plan.config_path());
        let log = self.plan.scratch.path().join("log");
        self.process = Some(Process::spawn(&self.plan.name, command, &log, self.plan.namespace.as_ref())?);
        Ok(())
    }
}

/// The program: `PEILI_BIN`, else what was built beside the running test.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PEILI_BIN") {
        return Ok(path.into());
    }
    // A test runs from target/PROFILE/deps, the laboratory's program from target/PROFILE.
    let current = std::env::current_exe()?;
    let beside = current.ancestors().skip(1).take(2).map(|folder| folder.join("peili"));
    let built = ["debug", "release"].map(|profile| requirements::target().join(profile).join("peili"));
    beside
        .chain(built)
        .find(|path| path.is_file())
        .context("no peili program: build it (cargo build) or name it by PEILI_BIN")
}

/// Makes the identity in a data folder, or reads it, and returns its peer ID.
fn identity(binary: &Path, data: &Path) -> Result<String> {
    let output = Command::new(binary).arg("identity").arg("--data-dir").arg(data).output();
    let output = output.with_context(|| format!("cannot run {}", binary.display()))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "peili identity: {}", error.trim());
    let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(!id.is_empty(), "peili identity printed nothing");
    Ok(id)
}

fn write(path: &Path, config: &Value) -> Result<()> {
    std::fs::write(path, format!("{config:#}")).with_context(|| format!("cannot write {}", path.display()))
}

fn merge(target: &mut Value, changes: &Value) {
    match (target, changes) {
        (Value::Object(target), Value::Object(changes)) => {
            for (key, value) in changes {
                merge(target.entry(key).or_insert(Value::Null), value);
            }
        }
        (target, changes) => *target = changes.clone(),
    }
}

fn sum(metrics: &str, name: &str, label: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        labels.contains(label).then(|| value.trim().parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_laid_over_a_configuration() {
        let mut config = json!({"a": {"b": 1, "c": [1]}});
        merge(&mut config, &json!({"a": {"c": [2], "d": 3}, "e": {"f": 4}}));
        assert_eq!(config, json!({"a": {"b": 1, "c": [2], "d": 3}, "e": {"f": 4}}));
    }

    #[test]
    fn metrics_are_summed_by_name_and_label() {
        let text = "# HELP x y\nx{a=\"1\"} 2\nx{a=\"2\",b=\"} 9\"} 3\nxy 5\nz 7\n";
        let check = |name: &str, label: &str, value: f64| {
            assert!((sum(text, name, label) - value).abs() < 1e-9, "{name}");
        };
        check("x", "", 5.0);
        check("x", "a=\"1\"", 2.0);
        check("z", "", 7.0);
        check("q", "", 0.0);
    }
}
