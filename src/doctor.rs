//! What is wrong on this node, by name, with what to do about it: `peili doctor`.
//!
//! Probes look (`probe`), all bounded and none changing anything; a pure judge says what that means (`judge`); manifests mend what can be
//! mended by them (`fix`). "Unknown" is allowed, a wrong cause is not: where two causes look alike both are said.
//!
//! ```text
//! configuration --> probe --facts--> judge --verdicts--> render
//!                                      +--> fix
//! ```

pub mod code;
pub mod facts;
pub mod fix;
pub mod judge;
pub mod place;
mod probe;
mod render;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::config::Config;
use crate::listener::Clients;
use crate::{cluster, configure, election, registry, store};
use code::{Code, Confidence, Severity};
use fix::Manifest;
use place::Place;

/// Questions of one look to the API server at most: the version, whose account it is, each right, and of each lock and the fleet summary
/// whether it is there and may be written.
pub const REQUESTS: u32 = 20;

/// Causes that are named beside the first one.
pub const CAUSES: usize = 2;

/// What is looked at, and how it is configured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// `kubernetes`
    pub cluster: cluster::Config,
    /// `election`
    pub election: election::Config,
    /// `upstream.hosts-dirs`
    pub hosts: Vec<PathBuf>,
    /// `network.dns`
    pub dns: Vec<String>,
    /// `store`
    pub store: store::Config,
    /// `node.name`
    pub node: String,
    /// `node.pod-labels`
    pub pod_labels: PathBuf,
    /// Where the mirror that runs here is asked; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// The node's address with the registry's port, in a pod with a network of its own: who is at its hostPort is not to be reached there.
    pub host_port: Option<SocketAddr>,
    /// Whether the API server is asked anything, beyond whether there is a way to it.
    pub asks: bool,
    /// What the mirror knows, where it is that mirror that looks; `None`: it does not, or it reaches the API server.
    pub told: Option<Told>,
    /// Ports that policies of the network have to let through.
    pub ports: Ports,
    /// How `peili configure --check` looks at the runtime; `None`: the runtime is not looked at.
    pub configure: Option<configure::Options>,
}

/// What the mirror of this node knows of a loss of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Since when.
    pub lost: SystemTime,
    /// Other members that say that they reach it.
    pub reach: usize,
    /// Other members that say that they do not.
    pub lack: usize,
}

/// Ports that policies of the network have to let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Of `network.listen` and `transfer.listen`, and those at which peers are looked for.
    pub peers: Vec<u16>,
    /// Of `admin.listen`, where that is no loopback.
    pub metrics: Option<u16>,
    /// Of the API server and of registries.
    pub out: Vec<u16>,
}

/// HTTPS, HTTP, and kubeadm's port of the API server.
const OUT: [u16; 3] = [443, 80, 6443];

impl Subject {
    /// All that this configuration has to do with. `options`: see [`Self::configure`].
    pub fn new(config: Config, options: Option<configure::Options>) -> Self {
        Self {
            ports: Ports::new(&config),
            host_port: host_port(&config.registry),
            cluster: config.kubernetes,
            election: config.election,
            hosts: config.upstream.hosts_dirs,
            dns: config.network.dns,
            store: config.store,
            node: config.node.name,
            pod_labels: config.node.pod_labels,
            admin: config.admin.local(),
            asks: true,
            told: None,
            configure: options,
        }
    }
}

/// The node's address with the registry's port, where the registry is for the node alone and this is not the node's own network.
fn host_port(config: &registry::Config) -> Option<SocketAddr> {
    let address = SocketAddr::new(place::host_of_pod()?, config.listen.first()?.port());
    (config.clients == Clients::Node).then_some(address)
}

impl Ports {
    fn new(config: &Config) -> Self {
        let port = |text: &str| text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let listen = config.network.listen.iter().chain(&config.transfer.listen);
        let mut peers: Vec<u16> = listen.map(SocketAddr::port).filter(|port| *port != 0).collect();
        peers.extend(config.network.dns.iter().filter_map(|name| port(name)));
        let addresses = config.kubernetes.endpoints.iter().chain([&config.kubernetes.service]);
        let addresses = addresses.chain(config.upstreams.iter().map(|upstream| &upstream.address));
        let named = |address: &String| {
            let uri: Option<http::Uri> = address.parse().ok();
            uri.and_then(|uri| uri.port_u16())
        };
        let mut out: Vec<u16> = OUT.into_iter().chain(addresses.filter_map(named)).collect();
        for ports in [&mut peers, &mut out] {
            ports.sort_unstable();
            ports.dedup();
        }
        let wide = config.admin.listen.iter().find(|address| !address.ip().is_loopback());
        Self { peers, metrics: wide.map(SocketAddr::port), out }
    }
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Of this form. Fields are only ever added; a change of meaning is a new version.
    pub version: u32,
    /// Where this ran.
    pub place: Place,
    /// What is wrong, the worst first.
    pub verdicts: Vec<Verdict>,
    /// What was looked at and is well, or was not looked at and why; one line each.
    pub seen: Vec<String>,
    /// How long it took.
    pub millis: u64,
    /// Whether the API server was asked anything: at most [`REQUESTS`] questions then.
    #[serde(skip)]
    pub asked: bool,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Which.
    pub code: Code,
    /// Whether something has to be done.
    pub severity: Severity,
    /// How sure it is.
    pub confidence: Confidence,
    /// In one sentence.
    pub text: String,
    /// What was seen.
    pub evidence: Vec<String>,
    /// What else it could be, the likelier first; at most [`CAUSES`].
    pub other_causes: Vec<String>,
    /// What to do.
    pub fix: String,
    /// What to apply.
    pub manifests: Vec<Manifest>,
    /// One of the manifests is enough; the first gives the least.
    pub one_is_enough: bool,
}

impl Verdict {
    /// As [`Code::meaning`] has it.
    pub(crate) fn new(code: Code, confidence: Confidence, fix: impl Into<String>) -> Self {
        Self {
            code,
            severity: code.severity(),
            confidence,
            text: code.meaning().to_owned(),
            evidence: Vec::new(),
            other_causes: Vec::new(),
            fix: fix.into(),
            manifests: Vec::new(),
            one_is_enough: false,
        }
    }

    fn either(mut self) -> Self {
        self.one_is_enough = true;
        self
    }

    /// What mends it with the least that is given.
    pub fn needed(&self) -> &[Manifest] {
        let needed = if self.one_is_enough { 1 } else { self.manifests.len() };
        self.manifests.get(..needed).unwrap_or_default()
    }

    fn seen(mut self, evidence: impl Into<String>) -> Self {
        self.evidence.push(evidence.into());
        self
    }

    fn or(mut self, cause: &str) -> Self {
        if self.other_causes.len() < CAUSES {
            self.other_causes.push(cause.to_owned());
        }
        self
    }

    fn apply(mut self, manifests: impl IntoIterator<Item = Manifest>) -> Self {
        self.manifests.extend(manifests);
        self
    }
}

impl Report {
    /// Of what is written here.
    pub const VERSION: u32 = 1;

    /// The worst; `None`: there is nothing.
    pub fn severity(&self) -> Option<Severity> {
        self.verdicts.iter().map(|verdict| verdict.severity).max()
    }

    /// For people.
    pub fn render(&self) -> String {
        render::render(self)
    }
}

/// Looks, and judges. Ends within ten seconds whatever is wrong.
pub async fn examine(subject: &Subject) -> Report {
    let start = tokio::time::Instant::now();
    let facts = probe::look(subject).await;
    let (verdicts, seen) = judge::judge(&facts, &subject.ports);
    let (asked, millis) = (facts.answers.is_some(), millis(start.elapsed()));
    Report { version: Report::VERSION, place: facts.place, verdicts, seen, millis, asked }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
