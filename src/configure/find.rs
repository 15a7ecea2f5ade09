//! Which containerd this node has, and where: by files below a prefix, so that a pod sees the host's.
//!
//! The distributions' paths are from their documentation and sources (as of 2026); what containerd's own configuration
//! says wins over them. It asks no process and changes nothing.

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::disk;
use super::report::{Code, Finding};
use super::runtime::{Runtime, cri_names};
use super::{Error, Format, Mirror};

/// Links that are followed in one path, as the kernel does.
const LINK_LIMIT: usize = 40;
/// containerd's own place for hosts, where `config_path` does not name another.
pub(super) const HOSTS: &str = "/etc/containerd/certs.d";

/// The prefix below which the host's files are.
#[derive(Clone, Debug)]
pub(super) struct Root(PathBuf);

/// What runs containerd here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Distribution {
    /// containerd by itself: kubeadm, EKS, AKS, kind, none.
    Plain,
    /// k3s
    K3s,
    /// RKE2
    Rke2,
    /// k0s
    K0s,
    /// Talos Linux
    Talos,
    /// Bottlerocket
    Bottlerocket,
    /// MicroK8s
    Microk8s,
}

/// The node's containerd, in paths of the host.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Node {
    /// What runs it.
    pub distribution: Distribution,
    /// Its `config.toml`, whether it is there or not.
    pub config: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// Its content store: `blobs` and `ingest`.
    pub content_root: PathBuf,
    /// The folders of hosts that it reads, in order. Empty: none.
    pub config_path: Vec<PathBuf>,
    /// Whether it forgets layers once they are unpacked, as far as that is known.
    pub discard_unpacked_layers: Option<bool>,
    #[serde(skip)]
    pub(super) findings: Vec<Finding>,
    /// Version of containerd's configuration; 0 if there is none.
    #[serde(skip)]
    version: i64,
}

/// Where a distribution has its files, if nothing else is said.
struct Facts {
    distribution: Distribution,
    /// One of these is on every such node.
    signs: Vec<PathBuf>,
    config: PathBuf,
    socket: &'static str,
    state: PathBuf,
    hosts: PathBuf,
    /// Folders of hosts are read from `hosts` even where `config.toml` does not say so here.
    is_set: bool,
}

impl Root {
    pub(super) fn new(prefix: PathBuf) -> Self {
        Self(prefix)
    }

    /// Where a path of the host is here. Links are followed as on the host: absolute ones begin at the prefix again.
    pub(super) fn at(&self, path: &Path) -> PathBuf {
        let mut resolved = self.0.clone();
        let mut rest: Vec<OsString> = components(path);
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == ".." {
                if resolved != self.0 {
                    resolved.pop();
                }
                continue;
            }
            let next = resolved.join(&name);
            match fs::read_link(&next) {
                Ok(target) if links < LINK_LIMIT => {
                    links += 1;
                    if target.is_absolute() {
                        resolved = self.0.clone();
                    }
                    rest.extend(components(&target));
                }
                _ => resolved = next,
            }
        }
        resolved
    }

    fn exists(&self, path: &Path) -> bool {
        fs::symlink_metadata(self.at(path)).is_ok()
    }
}

/// Names of a path, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.collect::<Vec<_>>().into_iter().rev().collect()
}

impl Distribution {
    /// Its name, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "containerd",
            Self::K3s => "k3s",
            Self::Rke2 => "RKE2",
            Self::K0s => "k0s",
            Self::Talos => "Talos",
            Self::Bottlerocket => "Bottlerocket",
            Self::Microk8s => "MicroK8s",
        }
    }

    /// It writes the folder of hosts itself, and needs this instead.
    pub fn owner(self) -> Option<Format> {
        match self {
            Self::K3s => Some(Format::K3s),
            Self::Rke2 => Some(Format::Rke2),
            Self::Talos => Some(Format::Talos),
            Self::Bottlerocket => Some(Format::Bottlerocket),
            Self::Plain | Self::K0s | Self::Microk8s => None,
        }
    }
}

impl Node {
    /// Looks for it. `is_told`: the folders of hosts are named by the caller, so that no containerd need be found.
    pub(super) fn find(root: &Root, is_told: bool) -> Result<Self, Error> {
        let facts = facts(root);
        let found = facts.iter().find(|facts| facts.signs.iter().any(|sign| root.exists(sign)));
        let is_found = found.is_some();
        let Some(facts) = found.or(facts.last()) else { return Err(Error::NoRuntime(root.0.clone())) };
        let runtime = Runtime::load(root, &facts.config)?;
        if runtime.is_none() && !is_found && !is_told {
            return Err(Error::NoRuntime(root.0.clone()));
        }
        let runtime = runtime.unwrap_or_default();
        let state = runtime.root.as_ref().map_or(facts.state.clone(), PathBuf::from);
        let named = runtime.cri.config_path.as_deref().map(|path| split(path, facts));
        let by_default = if facts.is_set { vec![facts.hosts.clone()] } else { Vec::new() };
        let mut node = Self {
            distribution: facts.distribution,
            config: facts.config.clone(),
            socket: runtime.address.as_deref().unwrap_or(facts.socket).into(),
            content_root: state.join("io.containerd.content.v1.content"),
            config_path: named.unwrap_or(by_default),
            discard_unpacked_layers: runtime.cri.discard,
            findings: Vec::new(),
            version: runtime.version,
        };
        node.look_at(&runtime, &facts.hosts);
        node.look_for_spegel(root);
        Ok(node)
    }

    /// Certainly containerd 2.x.
    pub(super) fn is_2(&self) -> bool {
        self.version >= 3
    }

    /// What of containerd's configuration stops a mirror from working.
    fn look_at(&mut self, runtime: &Runtime, hosts: &Path) {
        let config = self.config.display().to_string();
        let hosts = self.config_path.first().map_or(hosts, PathBuf::as_path).to_owned();
        let lines = self.lines(&hosts);
        if runtime.cri_disabled {
            self.add(
                Code::CriDisabled,
                format!("{config}: disabled_plugins has CRI, so that kubelet does not pull through this containerd"),
                Some("take it out of disabled_plugins, and restart containerd".into()),
            );
        }
        if let Some(name) = &runtime.misplaced {
            let (version, read) = (runtime.version, cri_names(runtime.version)[0]);
            self.add(
                Code::ConfigPath,
                format!("{config}: config_path stands under `{name}`, which is not read in version {version}: there it is `{read}`"),
                Some(lines.clone()),
            );
        } else if self.config_path.is_empty() {
            let old = &runtime.cri.mirrors;
            let reason = if old.is_empty() {
                "config_path is not set: containerd before 2.2 reads no hosts.toml then, and later ones take two \
                 folders by default, which their transfer service takes for one (containerd issue 12808)"
                    .to_owned()
            } else {
                format!(
                    "registry.mirrors is set ({}), the old way, with which no hosts.toml is read",
                    old.join(", ")
                )
            };
            self.add(Code::ConfigPath, format!("{config}: {reason}"), Some(lines.clone()));
        } else if !runtime.cri.mirrors.is_empty() {
            self.add(
                Code::Mirrors,
                format!("{config}: both config_path and registry.mirrors are set, with which CRI does not start"),
                Some("move what registry.mirrors says into hosts.toml files, delete it, and restart containerd".into()),
            );
        }
        let discards = runtime.cri.discard == Some(true);
        let is_transferred = runtime.version >= 3 && runtime.cri.local_pull != Some(true) && !discards;
        if self.config_path.len() > 1 && is_transferred {
            let (count, only) = (self.config_path.len(), hosts.display());
            self.add(
                Code::ConfigPathList,
                format!(
                    "{config}: config_path names {count} folders, which the transfer service of containerd 2.1 and later \
                     takes for one: it finds no hosts.toml (containerd issues 12415 and 12808)"
                ),
                Some(format!("move all into {only}, and let config_path be that; or set use_local_image_pull = true")),
            );
        }
        if let Some((first, later)) = runtime.replaced.as_ref().filter(|_| runtime.version < 3) {
            self.add(
                Code::Imports,
                format!(
                    "{} sets config_path, and {} has the same plugin without it: containerd 1.x takes the plugin's \
                     settings from the last file only",
                    first.display(),
                    later.display()
                ),
                Some("let config_path stand in the last file that has the plugin".into()),
            );
        }
        if discards {
            let fix = if self.distribution == Distribution::Talos {
                "peili configure --format talos has the patch".into()
            } else {
                format!(
                    "set discard_unpacked_layers = false under `{}`, and restart containerd",
                    cri_names(runtime.version)[0]
                )
            };
            self.add(
                Code::Discard,
                format!("{config}: discard_unpacked_layers is true: this node pulls through Peili, and has no layers to give"),
                Some(fix),
            );
        }
    }

    /// What to write into containerd's configuration, so that it reads `hosts`.
    fn lines(&self, hosts: &Path) -> String {
        let version = if self.version == 0 { 2 } else { self.version };
        let name = cri_names(version)[0];
        let (file, note) = if self.distribution == Distribution::K0s {
            (PathBuf::from("/etc/k0s/containerd.d/peili.toml"), format!("version = {version}\n"))
        } else if self.version == 0 {
            (self.config.clone(), format!("version = {version}\n"))
        } else {
            (self.config.clone(), String::new())
        };
        format!(
            "let {} have these lines, and restart containerd:\n{note}[plugins.\"{name}\".registry]\n  config_path = \"{}\"",
            file.display(),
            hosts.display()
        )
    }

    /// The mirror that k3s and RKE2 have built in.
    fn look_for_spegel(&mut self, root: &Root) {
        let Some(name) = rancher(self.distribution) else { return };
        let flag = "--embedded-registry";
        let configured = configurations(root, name).iter().any(|config| {
            matches!(&config["embedded-registry"], Value::Bool(true)) || config["embedded-registry"] == "true"
        });
        let started =
            [name.to_owned(), format!("{name}-server"), format!("{name}-agent")].iter().any(|unit| {
                ["/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"]
                    .iter()
                    .any(|folder| {
                        let unit = Path::new(folder).join(format!("{unit}.service"));
                        disk::read(&root.at(&unit))
                            .ok()
                            .flatten()
                            .is_some_and(|unit| unit.text.contains(flag))
                    })
            });
        if configured || started {
            self.add(
                Code::EmbeddedMirror,
                format!(
                    "{} runs its own mirror (Spegel, `embedded-registry`): both are asked for what registries.yaml lists, \
                     and it takes port 5001, which is network.listen of Peili by default",
                    self.distribution.name()
                ),
                Some(format!("set `embedded-registry: false` in /etc/rancher/{name}/config.yaml of the servers, or let network.listen have another port")),
            );
        }
    }

    /// Whether the distribution itself was told of the mirror for this registry, so that it stays.
    pub(super) fn is_told_of(&self, root: &Root, target: &str, mirror: &Mirror) -> Option<bool> {
        let name = rancher(self.distribution)?;
        let file = Path::new("/etc/rancher").join(name).join("registries.yaml");
        let text = disk::read(&root.at(&file)).ok().flatten()?.text;
        let registries: Value = serde_saphyr::from_str(&text).ok()?;
        let name = if target == super::DEFAULT { "*" } else { target };
        let endpoints = registries["mirrors"][name]["endpoint"].as_array()?;
        Some(endpoints.iter().filter_map(Value::as_str).any(|endpoint| mirror.is(endpoint)))
    }

    fn add(&mut self, code: Code, text: String, fix: Option<String>) {
        self.findings.push(Finding { code, text, fix });
    }
}

/// Its folder in /etc/rancher.
fn rancher(distribution: Distribution) -> Option<&'static str> {
    match distribution {
        Distribution::K3s => Some("k3s"),
        Distribution::Rke2 => Some("rke2"),
        _ => None,
    }
}

/// The folders of a `config_path`.
fn split(path: &str, facts: &Facts) -> Vec<PathBuf> {
    let folders = path.split(':').filter(|folder| !folder.is_empty());
    // MicroK8s's template has a variable of the snap.
    folders.map(|folder| if folder.contains('$') { facts.hosts.clone() } else { folder.into() }).collect()
}

/// The distributions, those that are certain first, and containerd by itself last.
fn facts(root: &Root) -> Vec<Facts> {
    use Distribution::{Bottlerocket, K0s, K3s, Microk8s, Plain, Rke2, Talos};
    let path = |text: &str| PathBuf::from(text);
    let (plain, socket) = (path("/var/lib/containerd"), "/run/containerd/containerd.sock");
    let os = os_release(root);
    let mut all = Vec::new();
    let cri = "/etc/cri/conf.d/hosts";
    if os.as_deref() == Some("talos") {
        all.push(Facts {
            distribution: Talos,
            signs: vec![path("/")],
            config: path("/etc/cri/containerd.toml"),
            socket,
            state: plain.clone(),
            hosts: path(cri),
            is_set: true,
        });
    }
    let config = path("/etc/containerd/config.toml");
    if os.as_deref() == Some("bottlerocket") {
        all.push(Facts {
            distribution: Bottlerocket,
            signs: vec![path("/")],
            config: config.clone(),
            socket,
            state: plain.clone(),
            hosts: path(HOSTS),
            is_set: true,
        });
    }
    for (distribution, name) in [(Rke2, "rke2"), (K3s, "k3s")] {
        let data =
            configurations(root, name).iter().rev().find_map(|config| config["data-dir"].as_str().map(path));
        let agent = data.unwrap_or_else(|| Path::new("/var/lib/rancher").join(name)).join("agent");
        all.push(Facts {
            distribution,
            signs: vec![agent.clone(), Path::new("/etc/rancher").join(name)],
            config: agent.join("etc/containerd/config.toml"),
            socket: "/run/k3s/containerd/containerd.sock",
            state: agent.join("containerd"),
            hosts: agent.join("etc/containerd/certs.d"),
            is_set: true,
        });
    }
    all.push(Facts {
        distribution: K0s,
        signs: ["/etc/k0s/containerd.toml", "/var/lib/k0s/containerd", "/run/k0s/containerd.sock"]
            .map(path)
            .into(),
        config: path("/etc/k0s/containerd.toml"),
        socket: "/run/k0s/containerd.sock",
        state: path("/var/lib/k0s/containerd"),
        hosts: path("/etc/k0s/certs.d"),
        is_set: false,
    });
    let snap = "/var/snap/microk8s";
    all.push(Facts {
        distribution: Microk8s,
        signs: vec![path(snap)],
        config: Path::new(snap).join("current/args/containerd.toml"),
        socket: "/var/snap/microk8s/common/run/containerd.sock",
        state: Path::new(snap).join("common/var/lib/containerd"),
        hosts: Path::new(snap).join("current/args/certs.d"),
        is_set: true,
    });
    all.push(Facts {
        distribution: Plain,
        signs: vec![config.clone(), plain.clone(), path(socket)],
        config,
        socket,
        state: plain,
        hosts: path(HOSTS),
        is_set: false,
    });
    all
}

/// `ID` of os-release(5).
fn os_release(root: &Root) -> Option<String> {
    let text = ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|file| disk::read(&root.at(Path::new(file))).ok().flatten())?
        .text;
    let id = text.lines().find_map(|line| line.strip_prefix("ID="))?;
    Some(id.trim().trim_matches(['"', '\'']).to_owned())
}

/// `config.yaml` and what lies in `config.yaml.d`, of k3s or RKE2; those that cannot be read say nothing.
fn configurations(root: &Root, name: &str) -> Vec<Value> {
    let folder = Path::new("/etc/rancher").join(name);
    let more = fs::read_dir(root.at(&folder.join("config.yaml.d"))).into_iter().flatten().flatten();
    let mut files: Vec<_> = more
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".yaml") || name.ends_with(".yml"))
        .map(|name| folder.join("config.yaml.d").join(name))
        .collect();
    files.sort();
    files.insert(0, folder.join("config.yaml"));
    let texts = files.iter().filter_map(|file| disk::read(&root.at(file)).ok().flatten());
    texts.filter_map(|content| serde_saphyr::from_str(&content.text).ok()).collect()
}
