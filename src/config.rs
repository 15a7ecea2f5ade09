//! The configuration: one YAML file, with the environment and flags on top.
//!
//! The only place that reads environment variables. Composes the `Config` of each module, checks what types cannot
//! say, knows where each value was said, and follows the file while the process runs. It starts nothing.

mod check;
mod decode;
mod error;
mod reload;
mod show;
mod tree;

pub mod watch;

#[cfg(test)]
mod tests;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, io};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    admin, cluster, election, mirror, network, policy, registry, store, telemetry, transfer, trust, upstream,
};

pub use error::{Error, Fault, Origin};
pub use reload::{Reload, diff};

/// Where the file is if nothing else is said; it may be absent then.
pub const DEFAULT_PATH: &str = "/etc/peili/config.yaml";
/// The name of this node, where no key has it.
const NODE_NAME: &str = "NODE_NAME";
/// Where kubelet says that the API server's Service is.
const SERVICE: (&str, &str) = ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT");
/// Largest file that is read: a ConfigMap cannot be larger.
const FILE_LIMIT: u64 = 1 << 20;

/// All settings of Peili. Every key has a default, so that an empty file is valid; unknown keys are errors.
///
/// `PEILI_<SECTION>__<KEY>` (`PEILI_MIRROR__TAGS_PEERS_FIRST`) overrides the file, `--set section.key=value` overrides
/// both. Lists are written `a,b` or as YAML, `[{id: ...}]`. Patterns are globs over `registry/repository` in which `*`
/// does not match `/` and `**` does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// This node.
    pub node: NodeConfig,
    /// Where this node's content is.
    pub store: store::Config,
    /// Where and how this node's own runtime is served.
    pub registry: registry::Config,
    /// How content is found, fetched and verified.
    pub mirror: mirror::Config,
    /// How this node finds its peers and is found.
    pub network: network::Config,
    /// The peer port and its limits.
    pub transfer: transfer::Config,
    /// Where the runtime's registry hosts are configured, and how they are probed.
    pub upstream: upstream::Config,
    /// Registries that policies may name, from which this node itself fetches.
    pub upstreams: Vec<upstream::named::Config>,
    /// What may be sent to trusted peers.
    pub trust: trust::Config,
    /// Policies: WebAssembly components that decide what is mirrored.
    pub policies: policy::Config,
    /// Who does for all nodes what one of them should do.
    pub election: election::Config,
    /// Where the Kubernetes API is, if this node is in a cluster; nothing but the strict role of elections needs it.
    pub kubernetes: cluster::Config,
    /// Where health, metrics and status are served.
    pub admin: admin::Config,
    /// How the process logs.
    pub log: telemetry::Config,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct NodeConfig {
    /// Its name, as other nodes show it. Empty: `$NODE_NAME`, else the host's name.
    pub name: String,
    /// Its zone: peers of the same zone are preferred. Empty: as the pod's labels say, or the API server (`kubernetes.read-node`), or as it
    /// was known in the last run; else it is unknown.
    pub zone: String,
    /// File with the pod's labels, as the downward API mounts them: `topology.kubernetes.io/zone` is the zone. It may be absent, and may
    /// come later.
    pub pod_labels: PathBuf,
    /// Folder for the identity and what is kept over restarts.
    pub data_dir: PathBuf,
    /// How long transfers may take to end after SIGTERM: at most 10m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub drain: Duration,
    /// Move a corrupt identity file aside and make a new identity, of which the other nodes must then be told. Without
    /// it, the node runs with a passing identity that is on no list, and the status says so.
    pub identity_recovery: bool,
}

/// What a configuration is made of.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The file. None: [`DEFAULT_PATH`], which may be absent.
    pub path: Option<PathBuf>,
    /// `key.path=value`, in order.
    pub set: Vec<String>,
    /// Environment variables; those without `PEILI_<SECTION>__<KEY>`, `NODE_NAME` and the two of the Kubernetes Service are ignored.
    pub environment: Vec<(String, String)>,
}

/// A checked configuration and what it was made of.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// What it was made of, to load it again.
    pub inputs: Inputs,
    /// The file that was read, if there was one.
    pub file: Option<PathBuf>,
    /// The file before it was read.
    stamp: watch::Stamp,
    tree: tree::Node,
    /// What named the node if no key did.
    name_source: &'static str,
    /// What named the Service of the API server if no key did.
    service_source: &'static str,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            zone: String::new(),
            pod_labels: "/etc/podinfo/labels".into(),
            data_dir: "/var/lib/peili".into(),
            drain: Duration::from_secs(10),
            identity_recovery: false,
        }
    }
}

impl Inputs {
    /// Inputs with this process's environment.
    pub fn new(path: Option<PathBuf>, set: Vec<String>) -> Self {
        let environment = env::vars_os()
            .filter_map(|(name, value)| {
                let name = name.into_string().ok()?;
                ([NODE_NAME, SERVICE.0, SERVICE.1].contains(&&*name) || name.starts_with("PEILI_"))
                    .then(|| (name, value.to_string_lossy().into_owned()))
            })
            .collect();
        Self { path, set, environment }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(DEFAULT_PATH))
    }

    /// Reads and checks. Blocks on the file.
    pub fn load(&self) -> Result<Loaded, Error> {
        let path = self.path();
        let stamp = watch::stamp(path);
        let text = match read(path) {
            Err(Error::Read { source, .. })
                if self.path.is_none() && source.kind() == io::ErrorKind::NotFound =>
            {
                None
            }
            Err(error) => return Err(error),
            Ok(text) => Some(text),
        };
        Ok(Loaded { stamp, ..self.parse(text.as_deref())? })
    }

    /// Checks `text` as if the file had it; `None`: there is no file. Reads nothing but the host's name.
    pub fn parse(&self, text: Option<&str>) -> Result<Loaded, Error> {
        let path = self.path();
        let with_excerpt = |faults: Vec<Fault>| {
            let text = text.unwrap_or_default();
            Error::Invalid(faults.into_iter().map(|fault| excerpted(fault, path, text)).collect())
        };
        let root = match text {
            Some(text) => tree::Node::parse(text).map_err(|fault| with_excerpt(vec![fault]))?,
            None => tree::Node::empty(),
        };
        let (tree, faults) = tree::overlay(root, &self.environment, &self.set);
        if !faults.is_empty() {
            return Err(with_excerpt(faults));
        }
        let mut config: Config = decode::decode(&tree).map_err(|fault| with_excerpt(vec![fault]))?;
        locate_settings(&mut config.policies, &tree);
        let mut name_source = "default";
        if config.node.name.is_empty() {
            (config.node.name, name_source) = self.node_name();
        }
        let mut service_source = "default";
        if config.kubernetes.service.is_empty()
            && let (Some(host), Some(port)) = (self.variable(SERVICE.0), self.variable(SERVICE.1))
        {
            config.kubernetes.service = cluster::service(host, port);
            service_source = SERVICE.0;
        }
        let faults = check::check(&config, &tree);
        if !faults.is_empty() {
            return Err(with_excerpt(faults));
        }
        let file = text.is_some().then(|| path.to_owned());
        Ok(Loaded { config, inputs: self.clone(), file, stamp: None, tree, name_source, service_source })
    }

    /// An environment variable that is not empty.
    fn variable(&self, wanted: &str) -> Option<&str> {
        let all = self.environment.iter().filter(|(name, value)| name == wanted && !value.is_empty());
        all.map(|(_, value)| value.as_str()).next()
    }

    fn node_name(&self) -> (String, &'static str) {
        match self.variable(NODE_NAME) {
            Some(name) => (name.to_owned(), NODE_NAME),
            None => {
                let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
                (name.trim().to_owned(), "host name")
            }
        }
    }
}

/// Lets what a policy refuses of its settings be named by its line.
fn locate_settings(policies: &mut policy::Config, tree: &tree::Node) {
    let policy::Config { registry, trust, election, .. } = policies;
    for (world, plugins) in [("registry", registry), ("trust", trust), ("election", election)] {
        let nodes = tree.get("policies").and_then(|policies| policies.get(world));
        for (plugin, node) in plugins.iter_mut().zip(nodes.map(tree::Node::items).unwrap_or_default()) {
            plugin.lines =
                node.get("settings").map(|settings| policy::Lines::new(settings.lines())).unwrap_or_default();
        }
    }
}

impl Loaded {
    /// The effective configuration as YAML, with where each value comes from as a comment.
    pub fn show(&self) -> String {
        show::show(self)
    }

    /// What is legal and should be known, one line each. Reads the files of the cluster keys.
    pub fn warnings(&self) -> Vec<String> {
        network::admission::warnings(&self.config.network)
    }
}

/// The JSON Schema of the file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Config).to_value()
}

fn read(path: &Path) -> Result<String, Error> {
    let error = |source| Error::Read { path: path.to_owned(), source };
    // Opening a pipe would wait for its other end.
    if !fs::metadata(path).map_err(error)?.is_file() {
        return Err(error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = fs::File::open(path).map_err(error)?;
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|_| error(io::Error::new(io::ErrorKind::InvalidData, "not UTF-8 text")))
}

/// Adds the line to a fault of the file.
fn excerpted(mut fault: Fault, path: &Path, text: &str) -> Fault {
    if let Origin::File { line, .. } = fault.origin {
        let number = usize::try_from(line).unwrap_or(0).saturating_sub(1);
        let line = text.lines().nth(number).unwrap_or_default();
        // Shown are 120 characters of at most 4 bytes.
        let line: String = line.chars().take(512).collect();
        fault.excerpt = Some(Box::new((path.to_owned(), line)));
    }
    fault
}
