//! The runtime's registry configuration on this node: finds it, writes Peili into it, takes it out again.
//!
//! What is there is kept, and put back byte for byte where nobody changed it since. Every change is on record before it
//! is made, and is made whole or not at all, so that a run that is killed is finished or undone by the next one. It
//! starts nothing, restarts nothing, and never edits `config.toml`: what is needed there is said.

mod apply;
mod disk;
mod edit;
mod find;
mod format;
mod journal;
mod plan;
mod report;
pub mod runtime;
mod tree;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::oci::Registry;
use crate::upstream::hosts;

pub use disk::DiskError;
pub use edit::Fault;
pub use find::{Distribution, Node};
pub use format::Format;
pub use report::{Action, Change, Code, Finding, Report};

use disk::Disk;

/// Folder of all registries that have none of their own.
pub const DEFAULT: &str = "_default";

/// What is to be set up, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Prefix of the host's files: `/`, or where a pod has them mounted.
    pub root: PathBuf,
    /// Folder of the records; not below `root`.
    pub state: PathBuf,
    /// Values of `config_path`, each one or more folders separated by `:`, as the host names them. Empty: as found.
    pub config_paths: Vec<String>,
    /// For which registries. Empty: those that were set up before, else all.
    pub targets: Vec<Target>,
    /// Where Peili answers.
    pub mirror: Mirror,
    /// Whether it is the only host. `None`: as it was set up before, else it is the first.
    pub mode: Option<Mode>,
    /// What Peili itself is configured with: socket and content root of containerd, and its folders of hosts.
    pub settings: Settings,
}

/// What Peili itself is configured with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `store.socket`
    pub socket: PathBuf,
    /// `upstream.hosts-dirs`
    pub hosts_dirs: Vec<PathBuf>,
    /// `store.source` is containerd.
    pub containerd: bool,
    /// Names of `policies.registry` whose verdicts count.
    pub policies: Vec<String>,
}

/// A registry, or all that have no folder of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `_default`
    Default,
    /// One registry.
    Registry(Registry),
}

/// Whom the runtime asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Peili first, then all others.
    First,
    /// Peili only.
    Only,
}

/// The address at which the runtime asks Peili: `http://127.0.0.1:5000`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mirror(String);

/// Why a node cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was found at any of the places where containerd is.
    #[error(
        "no containerd found below {}\nhint: name its folder of hosts by --config-path, or the host's files by --root",
        .0.display()
    )]
    NoRuntime(PathBuf),
    /// The distribution writes the folder itself.
    #[error(
        "{} writes its folder of hosts itself and would remove Peili from it\nhint: give it what `peili configure \
         --format {}` prints; to write the folder all the same, name it by --config-path", .0.name(), .1.name()
    )]
    Owned(Distribution, Format),
    /// containerd's configuration cannot be read.
    #[error("{0}\nhint: repair it, or name the folder of hosts by --config-path")]
    Runtime(#[from] runtime::RuntimeError),
    /// A hosts.toml to which Peili cannot be added, or from which it cannot be taken.
    #[error("{}:{fault}\nhint: nothing was written; containerd ignores a file that it cannot read, so repair it first", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: Fault,
    },
    /// A folder of hosts that cannot be read.
    #[error(transparent)]
    Hosts(#[from] hosts::Error),
    /// A folder of hosts whose parent is not there either.
    #[error("{} is not there, and neither is the folder that it would be in\nhint: is --config-path right, and --root?", .0.display())]
    NoFolder(PathBuf),
    /// A file that was written as a registry's only configuration, and then changed.
    #[error(
        "{} was changed since `--mode only` wrote it\nhint: `peili cleanup` first, which keeps the change",
        .0.display()
    )]
    Edited(PathBuf),
    /// A record that cannot be read.
    #[error("{}: not a record of this program: {reason}\nhint: move it away; cleanup then takes out entries, and restores nothing", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another one runs.
    #[error("another `peili configure` or `peili cleanup` runs ({} is locked)", .0.display())]
    Busy(PathBuf),
    /// A folder or a file that cannot be read or written.
    #[error("{}{}", .0, hint(.0))]
    Disk(#[from] DiskError),
}

/// Sets the node up, or finds that it is.
pub fn configure(options: &Options) -> Result<Report, Error> {
    apply::configure(options, &Disk::default())
}

/// What [`configure`] would do. Writes nothing.
pub fn preview(options: &Options) -> Result<Report, Error> {
    apply::preview(options, &Disk::default())
}

/// Whether the node is set up and would stay so. Writes nothing.
pub fn check(options: &Options) -> Result<Report, Error> {
    apply::check(options, &Disk::default())
}

/// Takes Peili out again, for all registries or for these only. Only says what it would do if `dry`.
pub fn cleanup(options: &Options, dry: bool) -> Result<Report, Error> {
    apply::cleanup(options, dry, &Disk::default())
}

impl Target {
    /// Its name: of the registry, or `_default`.
    pub fn name(&self) -> &str {
        match self {
            Self::Default => DEFAULT,
            Self::Registry(registry) => registry.as_str(),
        }
    }

    /// A registry for which this counts; for `_default` one that has no folder anywhere.
    fn sample(&self) -> Registry {
        match self {
            Self::Default => "any.invalid".parse().expect("a registry"),
            Self::Registry(registry) => registry.clone(),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            DEFAULT | "*" => Ok(Self::Default),
            text => text
                .parse()
                .map(Self::Registry)
                .map_err(|error: crate::oci::ReferenceError| error.to_string()),
        }
    }
}

impl Mirror {
    /// The address for a registry that listens there. Loopback of IPv6 is called by its name: containerd 1.6 and 1.7
    /// take no `]` in the name of a table.
    pub fn of(listen: &[SocketAddr]) -> Option<Self> {
        let reached = |address: &SocketAddr| match address {
            SocketAddr::V4(v4) if v4.ip().is_unspecified() => format!("http://127.0.0.1:{}", v4.port()),
            SocketAddr::V6(v6) if v6.ip().is_unspecified() || v6.ip().is_loopback() => {
                format!("http://localhost:{}", v6.port())
            }
            address => format!("http://{address}"),
        };
        let first = listen.iter().find(|address| address.is_ipv4()).or(listen.first());
        first.map(|address| Self(reached(address)))
    }

    /// The address, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.0
    }

    /// Whether a host's name or address in a hosts.toml leads there.
    fn is(&self, host: &str) -> bool {
        let clean = |text: &str| {
            let text = text.trim_end_matches('/');
            text.strip_suffix("/v2").unwrap_or(text).trim_end_matches('/').to_ascii_lowercase()
        };
        clean(host) == clean(&self.0)
    }

    fn has_brackets(&self) -> bool {
        self.0.contains('[')
    }
}

impl FromStr for Mirror {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "the form is http://HOST:PORT".to_owned();
        let url: http::Uri = text.parse().map_err(|_| form())?;
        let authority = url.authority().ok_or_else(form)?;
        let is_plain = matches!(url.path(), "" | "/" | "/v2" | "/v2/") && url.query().is_none();
        if !matches!(url.scheme_str(), Some("http" | "https"))
            || authority.as_str().contains('@')
            || !is_plain
        {
            return Err(form());
        }
        Ok(Self(format!("{}://{authority}", url.scheme_str().unwrap_or("http")).to_ascii_lowercase()))
    }
}

impl TryFrom<String> for Mirror {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mirror> for String {
    fn from(mirror: Mirror) -> Self {
        mirror.0
    }
}

impl Error {
    fn file(path: &Path, fault: Fault) -> Self {
        Self::File { path: path.to_owned(), fault }
    }
}

/// What helps against a disk that refuses.
fn hint(error: &DiskError) -> &'static str {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
    match error.source.kind() {
        PermissionDenied => "\nhint: run it as root",
        ReadOnlyFilesystem => {
            "\nhint: the distribution may write this folder itself: see `peili configure --format`; in a pod, mount it writable"
        }
        StorageFull => {
            "\nhint: free some space and run it again; what is half done is finished or undone then"
        }
        _ => "",
    }
}
