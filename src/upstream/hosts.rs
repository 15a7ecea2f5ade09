//! containerd's registry host configuration (`config_path`, `hosts.toml`), as containerd 2.x reads it. Read only.
//!
//! Which hosts a pull asks, in which order, and how each is reached. It writes nothing, contacts nobody, and does not
//! repeat the quirks of 1.6 and 1.7. Everything here reads files and blocks: call it off the executor.

mod client;
mod parse;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;

use crate::oci::Registry;

pub use parse::{document, line};

/// Largest `hosts.toml`, certificate or key that is read; real ones have a few KiB.
const FILE_LIMIT: u64 = 1 << 20;
/// Hosts in one `hosts.toml`. containerd has no limit; a pull asks them one after the other.
const HOST_LIMIT: usize = 100;
/// Registries whose ports are looked for.
const REGISTRY_LIMIT: usize = 256;
/// Files in a folder of certificates that are looked at.
const FOLDER_LIMIT: usize = 10_000;

/// One host that a pull asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Base of the API, up to and including `/v2` (unless `override_path` says otherwise), without a trailing slash.
    pub url: String,
    /// It may be asked for content by digest.
    pub pull: bool,
    /// It may be asked what a tag means.
    pub resolve: bool,
    /// PEM files of authorities that are trusted beside the system's.
    pub ca: Vec<PathBuf>,
    /// Client certificates: a PEM file and its key, which is in the same file if `None`. The first is presented.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    /// The server's certificate is not checked.
    pub skip_verify: bool,
    /// Headers of every request.
    pub headers: Vec<(String, String)>,
    /// Limit of a TCP connect; containerd's own is 30 s.
    pub dial_timeout: Option<Duration>,
}

/// Why the configuration of hosts cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder cannot be read. Only "not found" is not an error.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file that is larger than 1 MiB.
    #[error("{path} is larger than 1 MiB")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not what containerd reads.
    #[error("{path}:{line}: {message}")]
    Form {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A certificate, a key or a header that cannot be used.
    #[error("cannot connect to {url}: {message}")]
    Client {
        /// The host.
        url: String,
        /// What is wrong.
        message: String,
    },
}

/// TCP ports of the hosts that are configured in `dirs` for any registry, each once; of [`REGISTRY_LIMIT`] registries at most. What cannot be
/// read is left out.
pub fn ports(dirs: &[PathBuf]) -> Vec<u16> {
    let folders =
        dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten().take(REGISTRY_LIMIT);
    let registry = |folder: fs::DirEntry| {
        let name = folder.file_name().into_string().ok()?;
        // `host_port_`, as containerd has it too.
        let with_port = name.strip_suffix('_').and_then(|name| name.rsplit_once('_'));
        with_port.map_or(name.clone(), |(host, port)| format!("{host}:{port}")).parse::<Registry>().ok()
    };
    let names = folders.filter_map(registry);
    let hosts = names.flat_map(|registry| load(dirs, &registry).unwrap_or_default());
    let port = |host: Host| Url::parse(&host.url).ok()?.port_or_known_default();
    let ports: BTreeSet<u16> = hosts.filter_map(port).collect();
    ports.into_iter().collect()
}

/// The hosts that a pull from `registry` asks, in order. `dirs` are the folders of `config_path`.
///
/// Within each folder the candidates are `host_port_`, `host` and `_default`; the first that exists is the one, even
/// if it has no `hosts.toml`: then its certificate files count. The registry itself, or what `server` names, is last.
pub fn load(dirs: &[PathBuf], registry: &Registry) -> Result<Vec<Host>, Error> {
    let Some(folder) = folder(dirs, registry)? else { return Ok(vec![Host::server(registry)]) };
    let file = folder.join("hosts.toml");
    match read(&file)? {
        // containerd takes an empty file for none.
        Some(bytes) if !bytes.is_empty() => parse(&folder, &bytes, registry),
        _ => certificates(&folder, registry),
    }
}

/// The hosts that a `hosts.toml` of `folder` with this text means for `registry`. Reads nothing.
pub fn parse(folder: &Path, text: &[u8], registry: &Registry) -> Result<Vec<Host>, Error> {
    parse::hosts(folder, &folder.join("hosts.toml"), text, registry)
}

/// The folder that configures `registry`: the first candidate that exists.
fn folder(dirs: &[PathBuf], registry: &Registry) -> Result<Option<PathBuf>, Error> {
    let name = registry.as_str();
    let with_port = match name.rfind(':') {
        Some(colon) if !name[colon..].contains(']') => {
            Some(format!("{}_{}_", &name[..colon], &name[colon + 1..]))
        }
        _ => None,
    };
    for dir in dirs {
        for candidate in with_port.as_deref().into_iter().chain([name, "_default"]) {
            let path = dir.join(candidate);
            match fs::metadata(&path) {
                Ok(_) => return Ok(Some(path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::Read { path, source }),
            }
        }
    }
    Ok(None)
}

/// A folder without `hosts.toml`: Docker's layout, `.crt` for authorities and `.cert` with `.key` for the client. The one
/// host is the registry itself.
pub fn certificates(folder: &Path, registry: &Registry) -> Result<Vec<Host>, Error> {
    let error = |source| Error::Read { path: folder.to_owned(), source };
    let mut host = Host::server(registry);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(vec![host]),
        Err(source) => return Err(error(source)),
    };
    let mut paths = Vec::new();
    for entry in entries.take(FOLDER_LIMIT) {
        let entry = entry.map_err(error)?;
        if !entry.file_type().map_err(error)?.is_dir() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in &paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(path.clone()),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = paths.contains(&key).then_some(key);
                host.client.push((path.clone(), key));
            }
            _ => {}
        }
    }
    Ok(vec![host])
}

/// The content of a regular file of at most [`FILE_LIMIT`]; `None` if it does not exist.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let error = |source| Error::Read { path: path.to_owned(), source };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error(source)),
    };
    // Opening a pipe would wait for its other end.
    if !metadata.is_file() {
        return Err(error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(error)?;
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    Ok(Some(bytes))
}

impl Host {
    /// A host by the base of its API, with all capabilities and nothing else configured.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            pull: true,
            resolve: true,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
            dial_timeout: None,
        }
    }

    /// This host without what says who asks: headers and client certificates.
    #[must_use]
    pub fn anonymous(&self) -> Self {
        Self { headers: Vec::new(), client: Vec::new(), ..self.clone() }
    }

    /// The registry itself, as containerd reaches it where nothing is configured: Docker Hub has an address of its
    /// own; on loopback it is plain HTTP, unless the port is 443 or none is given.
    pub fn server(registry: &Registry) -> Self {
        let name = registry.as_str();
        if name == "docker.io" {
            return Self::new("https://registry-1.docker.io/v2");
        }
        let loopback = is_loopback(registry.host());
        let port = name[registry.host().len()..].strip_prefix(':');
        let scheme = if loopback && !matches!(port, None | Some("443")) { "http" } else { "https" };
        // containerd does not check certificates on loopback.
        Self { skip_verify: loopback && port != Some("80"), ..Self::new(&format!("{scheme}://{name}/v2")) }
    }
}

/// Whether a host, an address or a name, is this machine.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
