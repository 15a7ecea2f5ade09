//! Looks at everything at once. Each probe has a limit of its own, so that one that hangs costs the others nothing.

mod api;
mod node;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use http::Uri;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::facts::Facts;
use super::place::Place;
use super::{Subject, Told};
use crate::network::swarm::{Unresolved, resolve};
use crate::network::{MemberState, PeerStatus};
use crate::oci::Registry;
use crate::upstream::hosts;
use crate::{admin, cluster};

/// For one probe.
const LIMIT: Duration = Duration::from_secs(2);
/// Names of peers that are tried.
const NAMES: usize = 8;
/// Members that are tried, and addresses of each.
const MEMBERS: usize = 8;
const ADDRESSES: usize = 4;
/// Bytes of an answer that are read.
const ANSWER: u64 = 1024;
/// A name that the DNS of each cluster knows.
const CLUSTER_NAME: &str = "kubernetes.default.svc";

/// Looks.
pub(super) async fn look(subject: &Subject) -> Facts {
    let wanted = api::wanted(subject);
    // First, by a thread of its own: a folder that hangs would hold up all that reads it later.
    let config = subject.cluster.clone();
    let account = match timeout(LIMIT, spawn_blocking(move || cluster::account(&config))).await {
        Ok(account) => account.unwrap_or_default(),
        Err(_) => cluster::Account {
            token: subject.cluster.credentials.join("token"),
            unread: Some(format!("it was not read within {LIMIT:?}")),
            ..cluster::Account::default()
        },
    };
    let hangs = account.token.as_os_str().is_empty() || account.authority.as_os_str().is_empty();
    let asked = async {
        if wanted.is_some() && subject.cluster.is_in_cluster() && !hangs {
            let namespace = api::namespace(&subject.cluster).await;
            let (reaches, unnamed) =
                tokio::join!(cluster::reach(&subject.cluster), api::unnamed(&subject.cluster));
            let answers = api::ask(subject, &reaches, wanted.as_ref(), namespace.as_deref().ok()).await;
            (namespace, reaches, answers, unnamed)
        } else {
            (Err("it was not looked for".to_owned()), Vec::new(), None, Vec::new())
        }
    };
    let members = async {
        let status = mirror(subject).await;
        let Ok(known) = &status else { return (status, Vec::new(), Vec::new()) };
        let silent = known.registries.iter().filter(|registry| !registry.answers);
        let silent = silent.map(|registry| registry.name.clone()).take(NAMES).collect();
        let (ports, unnamed) =
            tokio::join!(peer_ports(&known.network.peers), unnamed(subject.hosts.clone(), silent));
        (status, ports, unnamed)
    };
    let hosts = subject.hosts.clone();
    let registries = timeout(LIMIT, spawn_blocking(move || hosts::ports(&hosts)));
    let host_port = async {
        let address = subject.host_port?;
        Some((address, timeout(LIMIT, is_peili(address)).await.is_ok_and(|answer| answer)))
    };
    let (
        (namespace, reaches, answers, mut unnamed),
        (names, cluster_name),
        runtime,
        (mirror, peer_ports, registries_unnamed),
        host_port,
        registries,
    ) = tokio::join!(asked, names(&subject.dns), node::runtime(subject), members, host_port, registries);
    unnamed.extend(registries_unnamed);
    let report = runtime.as_ref().and_then(|runtime| runtime.report.as_deref().ok().cloned());
    let root = subject.configure.as_ref().map_or_else(|| "/".into(), |options| options.root.clone());
    let labels = subject.pod_labels.clone();
    let place = spawn_blocking(move || Place::look(&root, &labels, report.as_ref()));
    let now = SystemTime::now();
    let told = |diagnosis: &admin::Diagnosis| {
        let lost = now.checked_sub(Duration::from_secs(diagnosis.unreached_seconds?))?;
        Some(Told { lost, reach: diagnosis.members_reach, lack: diagnosis.members_lack })
    };
    Facts {
        now,
        told: subject.told.or_else(|| told(&mirror.as_ref().ok()?.diagnosis)),
        place: timeout(LIMIT, place).await.ok().and_then(Result::ok).unwrap_or_default(),
        wanted,
        in_cluster: subject.cluster.is_in_cluster(),
        account,
        namespace,
        reaches,
        answers,
        names,
        cluster_name,
        unnamed,
        registries: registries.ok().and_then(Result::ok).unwrap_or_default(),
        runtime,
        mirror,
        peer_ports,
        host_port,
    }
}

/// Whether a registry of Peili answers at `address`: by the reason phrase of what it has not.
async fn is_peili(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address).await else { return false };
    if stream.write_all(b"GET /v2/peili HTTP/1.1\r\nhost: peili\r\nconnection: close\r\n\r\n").await.is_err()
    {
        return false;
    }
    let mut answer = Vec::new();
    // What was read counts, however it ends.
    let _ = stream.take(ANSWER).read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).contains("(peili: ")
}

type Found = Result<usize, Unresolved>;

async fn names(dns: &[String]) -> (Vec<(String, Found)>, Option<Found>) {
    let ask = async |host: &str| resolve(host, LIMIT).await.map(|addresses| addresses.len());
    // An address needs no name server.
    let hosts = dns.iter().filter(|name| name.parse::<SocketAddr>().is_err());
    let hosts: Vec<&str> =
        hosts.map(|name| name.rsplit_once(':').map_or(name.as_str(), |(host, _)| host)).take(NAMES).collect();
    if hosts.is_empty() {
        return (Vec::new(), None);
    }
    let all = join_all(hosts.iter().map(|host| async { ((*host).to_owned(), ask(host).await) }));
    let (all, cluster_name) = tokio::join!(all, ask(CLUSTER_NAME));
    (all, Some(cluster_name))
}

/// Why no name server says where a host is; `None`: it does, or says that there is none.
async fn silence(host: &str) -> Option<Unresolved> {
    resolve(host, LIMIT).await.err().filter(|why| matches!(why, Unresolved::Silent | Unresolved::Other(_)))
}

/// Those of these registries none of whose hosts is found, for want of a name server.
async fn unnamed(folders: Vec<PathBuf>, registries: Vec<String>) -> Vec<(String, Unresolved)> {
    let tries = registries.into_iter().map(async |name| {
        let (folders, registry) = (folders.clone(), name.parse::<Registry>().ok()?);
        let read = spawn_blocking(move || hosts::load(&folders, &registry));
        let hosts = timeout(LIMIT, read).await.ok()?.ok()?.ok()?;
        // Peili itself is among them.
        let hosts: Vec<String> = hosts
            .iter()
            .filter_map(|host| Some(host.url.parse::<Uri>().ok()?.host()?.to_owned()))
            .filter(|host| !hosts::is_loopback(host))
            .take(ADDRESSES)
            .collect();
        let silences = join_all(hosts.iter().map(|host| silence(host))).await;
        let why = silences.first()?.clone()?;
        silences.iter().all(Option::is_some).then_some((name, why))
    });
    join_all(tries).await.into_iter().flatten().collect()
}

async fn mirror(subject: &Subject) -> Result<Box<admin::Status>, String> {
    let Some(address) = subject.admin else { return Err("`admin.listen` is empty".to_owned()) };
    match timeout(LIMIT, admin::fetch(address)).await {
        Ok(Ok(status)) => Ok(Box::new(status)),
        // The first line; the rest is a hint for another command.
        Ok(Err(error)) => Err(error.to_string().lines().next().unwrap_or_default().to_owned()),
        Err(_) => Err(format!("{address} did not answer within {LIMIT:?}")),
    }
}

/// Whether some of the members that live are reached where they give content, by their names.
async fn peer_ports(peers: &[PeerStatus]) -> Vec<(String, Result<(), String>)> {
    let is_member = |peer: &&PeerStatus| peer.state == Some(MemberState::Alive) && !peer.transfer.is_empty();
    let tries = peers.iter().filter(is_member).take(MEMBERS).map(async |peer| {
        let name = if peer.node.is_empty() { &peer.id } else { &peer.node };
        (name.clone(), peer_port(&peer.transfer).await)
    });
    join_all(tries).await
}

/// Whether one of a member's addresses takes a connection.
async fn peer_port(addresses: &[SocketAddr]) -> Result<(), String> {
    let tries = addresses.iter().take(ADDRESSES).map(async |address| {
        match timeout(LIMIT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("{address}: {error}")),
            Err(_) => Err(format!("{address}: no answer within {LIMIT:?}")),
        }
    });
    let answers = join_all(tries).await;
    match answers.iter().find_map(|answer| answer.as_ref().err()) {
        Some(error) if answers.iter().all(Result::is_err) => Err(error.clone()),
        _ => Ok(()),
    }
}
