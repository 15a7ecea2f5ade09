//! The real `peili` program, configured, started, watched and hurt.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
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
    /// What its environment has besides that of this process.
    environment: Vec<(&'static str, PathBuf)>,
    /// As [`Plan::files`] has it.
    files: Vec<(PathBuf, &'static str)>,
    /// Where it runs; `None`: on loopback of this machine.
    pub namespace: Option<Namespace>,
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
        let environment = Vec::new();
        let files = Vec::new();
        Ok(Self { name, peer_id, address, ports, config, environment, files, namespace, binary, scratch })
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

    /// Lets [`Node::set_clock`] move its time of day, and nothing else: the monotonic clock stays right.
    pub fn let_clock_jump(&mut self) -> Result<()> {
        let library = requirements::faketime().context("no libfaketime on this machine")?;
        let clock = self.clock_path();
        std::fs::write(&clock, "+0")?;
        self.environment = vec![
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", clock),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ];
        Ok(())
    }

    /// Lets the system's resolver know these names, and no other program see it. Takes root. Counts at once when called again.
    pub fn set_hosts(&mut self, names: &[(IpAddr, &str)]) -> Result<()> {
        let lines: String = names.iter().map(|(address, name)| format!("{address} {name}\n")).collect();
        self.set_file("/etc/hosts", &lines)
    }

    /// Lets the system's resolver ask this name server, with the search list of a pod. Takes root. Counts at once when called again.
    pub fn set_resolver(&mut self, server: IpAddr) -> Result<()> {
        let search = "search peili.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5";
        self.set_file("/etc/resolv.conf", &format!("nameserver {server}\n{search}\n"))
    }

    /// Files that it has in the place of this machine's: what they are, and where it finds them.
    pub fn files(&self) -> &[(PathBuf, &'static str)] {
        &self.files
    }

    fn set_file(&mut self, at: &'static str, text: &str) -> Result<()> {
        let path = self.scratch.path().join(at.trim_start_matches('/').replace('/', "-"));
        // In place: a mount shows the file that was there.
        std::fs::write(&path, text)?;
        if self.files.iter().all(|(_, other)| *other != at) {
            self.files.push((path, at));
        }
        Ok(())
    }

    fn clock_path(&self) -> PathBuf {
        self.scratch.path().join("clock")
    }

    /// Lays `changes` over the configuration: objects are merged, all else is replaced.
    pub fn merge(&mut self, changes: &Value) {
        merge(&mut self.config, changes);
    }

    /// Where peers reach its control plane.
    pub fn control(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.network)
    }

    /// Adds a peer, with the address of its control plane.
    pub fn trust(&mut self, other: &Self) {
        let address = other.control().to_string();
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

    /// Lets it have a variable more in its environment.
    pub fn set_environment(&mut self, name: &'static str, value: &str) {
        self.environment.push((name, value.into()));
    }

    /// Lets another program be started from now on, as an upgrade does.
    pub fn set_binary(&mut self, binary: PathBuf) {
        self.binary = binary;
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

    /// The sum of a metric over all its labels that contain `label` (`""`: all). A metric of another name is an error.
    pub async fn metric(&self, name: &str, label: &str) -> Result<f64> {
        sum(&self.metrics().await?, name, label)
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

    /// Everything that it wrote, also before a restart.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
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
        self.relaunch()?;
        self.ready(READY_LIMIT).await
    }

    /// Starts it again, after [`Self::kill`] if it still runs, without waiting.
    pub fn relaunch(&mut self) -> Result<()> {
        self.kill();
        self.launch()
    }

    /// Writes the configuration anew while it runs.
    pub fn rewrite(&self) -> Result<()> {
        write(&self.plan.config_path(), &self.plan.config)
    }

    /// Moves its time of day from now on: `+1d`, `-1h`. It was planned with [`Plan::let_clock_jump`].
    pub fn set_clock(&self, offset: &str) -> Result<()> {
        // At once: half a file would be another time.
        let new = self.plan.clock_path().with_extension("new");
        std::fs::write(&new, offset)?;
        Ok(std::fs::rename(new, self.plan.clock_path())?)
    }

    /// What it uses right now.
    pub fn usage(&self) -> Result<Usage> {
        self.process.as_ref().context("it does not run")?.usage()
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.plan.scratch.path().join("log")
    }

    fn launch(&mut self) -> Result<()> {
        self.rewrite()?;
        let mut command = Command::new(&self.plan.binary);
        if !self.plan.files.is_empty() {
            // A mount namespace of its own, in which these files are others.
            command = Command::new("unshare");
            let script = "while [ \"$1\" != -- ]; do mount --bind \"$1\" \"$2\" || exit; shift 2; done; shift; exec \"$@\"";
            command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
            for (path, at) in &self.plan.files {
                command.arg(path).arg(at);
            }
            command.arg("--").arg(&self.plan.binary);
        }
        command.arg("run").arg("--config").arg(self.plan.config_path());
        command.envs(self.plan.environment.iter().map(|(name, value)| (name, value)));
        let log = self.log_path();
        self.process = Some(Process::spawn(&self.plan.name, command, &log, self.plan.namespace.as_ref())?);
        Ok(())
    }
}

impl Drop for Node {
    /// Peili goes on after a panic of a task, so that only its log tells of it. A policy's is the policy's.
    fn drop(&mut self) {
        let log = self.log();
        let of_peili = |line: &&str| line.contains("panicked at") && !line.contains("\"policy\":");
        let panic = log.lines().find(of_peili);
        if let Some(panic) = panic.filter(|_| !std::thread::panicking()) {
            panic!("{} panicked: {panic}", self.plan.name);
        }
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

fn sum(metrics: &str, name: &str, label: &str) -> Result<f64> {
    // The family of a counter is named without the `_total` of its samples.
    let family = name.strip_suffix("_total").unwrap_or(name);
    let mut types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    if !types.any(|known| known == family || known == name) {
        bail!("there is no metric {name}");
    }
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        labels.contains(label).then(|| value.trim().parse::<f64>().ok())?
    });
    Ok(values.sum())
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
        let text = "# HELP x y\n# TYPE x gauge\nx{a=\"1\"} 2\nx{a=\"2\",b=\"} 9\"} 3\nxy 5\n# TYPE z counter\nz_total 7\n";
        let check = |name: &str, label: &str, value: f64| {
            assert!((sum(text, name, label).unwrap() - value).abs() < 1e-9, "{name}");
        };
        check("x", "", 5.0);
        check("x", "a=\"1\"", 2.0);
        check("x", "a=\"3\"", 0.0);
        check("z_total", "", 7.0);
        assert!(sum(text, "q", "").is_err(), "a renamed metric must not count as 0");
    }
}
