//! The probe: an anonymous `GET /v2/` to each host that the runtime would ask after this node, all at once.
//!
//! Answers are cached for a while, one probe runs per registry at a time, and a cached answer that is asked for late in
//! its life is renewed in the background. It sends no credentials, no configured headers and no client certificate, and
//! reads no body. Proxy variables count here.

use std::collections::HashMap;
use std::error::Error as _;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::{StatusCode, Url};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::hosts::{self, Host};
use super::origin::Origins;
use super::{Config, FetchError, Upstream, lock};
use crate::oci::{Descriptor, Name, Registry, Tag};

/// Registries whose answer is kept: requests name them, so their number is the client's.
const REGISTRY_LIMIT: usize = 1000;
/// Probes at once; more registries wait within their limit.
const PROBE_LIMIT: usize = 32;
/// Threads that may read hosts files at once: a disk that hangs keeps them.
const READER_LIMIT: usize = 4;
/// How long a home of a tag waits for one of them.
const READ: Duration = Duration::from_secs(2);

/// Probes by the registry hosts that containerd is configured with.
pub struct Prober {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
}

struct Shared {
    /// Where this mirror listens.
    own: Vec<SocketAddr>,
    config: Mutex<Config>,
    entries: Mutex<HashMap<Registry, Entry>>,
    permits: Semaphore,
    /// Taken by a reading thread until it ends, whoever still waits for it.
    readers: Arc<Semaphore>,
    origins: Origins,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// One of the hosts answers.
    Yes,
    /// None does.
    No,
    /// The runtime has no host for it but this mirror, so that nobody was asked.
    Closed,
}

struct Entry {
    /// When the answer was asked for last.
    used: Instant,
    /// The last answer and when it came; `None`: the first probe runs.
    answer: watch::Receiver<Option<(Answer, Instant)>>,
    sender: Arc<watch::Sender<Option<(Answer, Instant)>>>,
    running: bool,
}

impl Prober {
    /// A prober; `own` is where this node's mirror listens. Hosts that lead there are never probed.
    pub fn new(config: Config, own: Vec<SocketAddr>) -> Self {
        let shared = Shared {
            own,
            config: Mutex::new(config),
            entries: Mutex::default(),
            permits: Semaphore::new(PROBE_LIMIT),
            readers: Arc::new(Semaphore::new(READER_LIMIT)),
            origins: Origins::default(),
        };
        Self { shared: Arc::new(shared), tasks: Mutex::default() }
    }

    /// Puts a changed configuration in force; cached answers are forgotten.
    pub fn reconfigure(&self, config: Config) {
        *lock(&self.shared.config) = config;
        lock(&self.shared.entries).clear();
        self.shared.origins.clear();
    }

    /// The registries that were asked for in the last `recent`, with whether they answered their last probe, the latest first; at most `limit`.
    /// One that did not is probed anew, so that who looks again sees that it does. Those that nobody is asked about are left out.
    pub fn asked(&self, recent: Duration, limit: usize) -> Vec<(Registry, bool)> {
        let config = self.config();
        let mut known = Vec::new();
        for (registry, entry) in lock(&self.shared.entries).iter_mut() {
            let Some((answer, _)) = *entry.answer.borrow() else { continue };
            if entry.used.elapsed() >= recent || answer == Answer::Closed {
                continue;
            }
            let answers = answer == Answer::Yes;
            if !answers && known.len() < limit {
                self.renew(registry, entry, &config);
            }
            known.push((entry.used, registry.clone(), answers));
        }
        known.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
        known.into_iter().take(limit).map(|(_, registry, answers)| (registry, answers)).collect()
    }

    fn config(&self) -> Config {
        lock(&self.shared.config).clone()
    }

    /// The answer as far as it is known, with a probe under way where it is not fresh.
    fn ask(&self, registry: &Registry, config: &Config) -> watch::Receiver<Option<(Answer, Instant)>> {
        let now = Instant::now();
        let mut entries = lock(&self.shared.entries);
        if !entries.contains_key(registry) && entries.len() >= REGISTRY_LIMIT {
            let oldest = entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                entries.remove(&oldest);
            }
        }
        let entry = entries.entry(registry.clone()).or_insert_with(|| {
            let (sender, answer) = watch::channel(None);
            Entry { used: now, answer, sender: Arc::new(sender), running: false }
        });
        entry.used = now;
        self.renew(registry, entry, config);
        entry.answer.clone()
    }

    /// Lets a probe run if the answer is in the last quarter of its life, so that a registry in use is always known.
    fn renew(&self, registry: &Registry, entry: &mut Entry, config: &Config) {
        let age = entry.answer.borrow().map(|(_, at)| at.elapsed());
        if entry.running || age.is_some_and(|age| age < config.cache * 3 / 4) {
            return;
        }
        entry.running = true;
        let (shared, sender) = (Arc::clone(&self.shared), Arc::clone(&entry.sender));
        let (registry, config) = (registry.clone(), config.clone());
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move { run(&shared, registry, config, &sender).await });
    }
}

#[async_trait]
impl Upstream for Prober {
    async fn answers(&self, registry: &Registry) -> bool {
        let config = self.config();
        let mut answer = self.ask(registry, &config);
        // An answer that is too old is not believed: the request waits for the probe that runs.
        let fresh =
            |found: &Option<(Answer, Instant)>| found.is_some_and(|(_, at)| at.elapsed() < config.cache);
        match timeout(config.limit, answer.wait_for(fresh)).await {
            Ok(Ok(found)) => found.is_some_and(|(answer, _)| answer == Answer::Yes),
            // No answer in time, or the probe was forgotten.
            Ok(Err(_)) | Err(_) => false,
        }
    }

    async fn resolve(&self, name: &Name, tag: &Tag) -> Result<Descriptor, FetchError> {
        let (dirs, own, registry) =
            (self.config().hosts_dirs, self.shared.own.clone(), name.registry.clone());
        let reader = timeout(READ, Arc::clone(&self.shared.readers).acquire_owned()).await;
        let Ok(Ok(reader)) = reader else {
            return Err(FetchError::Failed("the files of hosts cannot be read now".into()));
        };
        let load = move || {
            let _reader = reader;
            candidates(configured(&dirs, &registry), &own)
        };
        self.shared.origins.resolve(name, tag, load).await
    }

    async fn is_open(&self, registry: &Registry) -> bool {
        let (dirs, own, name) = (self.config().hosts_dirs, self.shared.own.clone(), registry.clone());
        let Ok(reader) = Arc::clone(&self.shared.readers).acquire_owned().await else { return true };
        let read = tokio::task::spawn_blocking(move || {
            let _reader = reader;
            !candidates(configured(&dirs, &name), &own).is_empty()
        });
        read.await.unwrap_or(true)
    }
}

/// One probe of one registry, within the limit, and its answer into the cache.
async fn run(
    shared: &Shared,
    registry: Registry,
    config: Config,
    sender: &Arc<watch::Sender<Option<(Answer, Instant)>>>,
) {
    let answer = timeout(config.limit, async {
        let _permit = shared.permits.acquire().await;
        probe(shared, &registry, config.hosts_dirs).await
    });
    let answer = answer.await.unwrap_or(Answer::No);
    let previous = sender.send_replace(Some((answer, Instant::now())));
    if previous.is_none_or(|(previous, _)| previous != answer) {
        tracing::debug!(%registry, ?answer, "probed a registry");
    }
    let mut entries = lock(&shared.entries);
    if let Some(entry) = entries.get_mut(&registry)
        && Arc::ptr_eq(&entry.sender, sender)
    {
        entry.running = false;
    }
}

/// Whether any candidate answers; the others are dropped at the first that does.
async fn probe(shared: &Shared, registry: &Registry, dirs: Vec<PathBuf>) -> Answer {
    let (name, own) = (registry.clone(), shared.own.clone());
    let Ok(reader) = Arc::clone(&shared.readers).acquire_owned().await else { return Answer::No };
    let clients = tokio::task::spawn_blocking(move || {
        let _reader = reader;
        clients(&dirs, &name, &own)
    });
    let Ok(clients) = clients.await else { return Answer::No };
    let Some(clients) = clients else { return Answer::Closed };
    let mut probes = JoinSet::new();
    for (client, url) in clients {
        probes.spawn(async move {
            match client.get(url).send().await {
                Ok(response) => counts(response.status()),
                Err(error) => is_refusal(&error),
            }
        });
    }
    while let Some(result) = probes.join_next().await {
        if matches!(result, Ok(true)) {
            return Answer::Yes;
        }
    }
    Answer::No
}

/// A server that refuses this anonymous request may well answer the pod's; one that is broken or overrun will not.
fn counts(status: StatusCode) -> bool {
    status.as_u16() < 500 && status != StatusCode::TOO_MANY_REQUESTS
}

/// Whether the server is there and ended the TLS handshake by an alert: it wants a client's certificate, and answers
/// whoever has one.
fn is_refusal(error: &reqwest::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = wrapped.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if matches!(tls, Some(rustls::Error::AlertReceived(_))) {
            return true;
        }
        source = cause.source();
    }
    false
}

/// The hosts that the runtime asks for `registry`.
fn configured(dirs: &[PathBuf], registry: &Registry) -> Vec<Host> {
    hosts::load(dirs, registry).unwrap_or_else(|error| {
        // containerd does the same: it logs the file's error and asks the registry itself.
        tracing::debug!(%registry, %error, "cannot use the hosts file");
        vec![Host::server(registry)]
    })
}

/// Who is asked, and where; none: the runtime has nobody else for it.
fn clients(
    dirs: &[PathBuf],
    registry: &Registry,
    own: &[SocketAddr],
) -> Option<Vec<(reqwest::Client, String)>> {
    let hosts = candidates(configured(dirs, registry), own);
    if hosts.is_empty() {
        return None;
    }
    let mut clients = Vec::new();
    for host in hosts {
        let host = host.anonymous();
        let client = host.client().or_else(|error| {
            tracing::debug!(url = host.url, %error, "probing without certificates");
            // Without authorities or with unreadable ones: nothing secret is sent, and who fakes an answer
            // gains that the runtime goes to its own upstream, which it checks by itself.
            Host { skip_verify: true, ..Host::new(&host.url) }.client()
        });
        match client {
            Ok(client) => clients.push((client, format!("{}/", host.url))),
            Err(error) => tracing::debug!(url = host.url, %error, "cannot probe"),
        }
    }
    Some(clients)
}

/// The hosts after this mirror; all but this mirror where it is not among them.
fn candidates(hosts: Vec<Host>, own: &[SocketAddr]) -> Vec<Host> {
    let after = hosts.iter().position(|host| is_own(host, own)).map_or(0, |index| index + 1);
    hosts.into_iter().skip(after).filter(|host| !is_own(host, own)).collect()
}

/// Whether a host leads to one of `own`, by any address of this machine where that is bound to all of them.
fn is_own(host: &Host, own: &[SocketAddr]) -> bool {
    let Ok(url) = Url::parse(&host.url) else { return false };
    let (Some(name), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return false };
    let mut own = own.iter().filter(|own| own.port() == port).map(|own| own.ip().to_canonical());
    if name == "localhost" {
        return own.any(|own| own.is_loopback() || own.is_unspecified());
    }
    let Ok(address) = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() else {
        return false;
    };
    let address = address.to_canonical();
    own.any(|own| {
        own == address
            || own.is_unspecified() && own.is_ipv4() == address.is_ipv4() && is_of_this_machine(address)
    })
}

/// Whether what is sent to `address` would come from it. Sends nothing. Binding it would be no proof: that works for
/// every address where `ip_nonlocal_bind` is set.
fn is_of_this_machine(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr =
        if address.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}
