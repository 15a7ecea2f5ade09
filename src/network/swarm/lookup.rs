//! `host:port` -> addresses, both families, within a time limit.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::net::NetError;

/// A name server that hangs costs only this; it is asked again.
const LIMIT: Duration = Duration::from_secs(5);
/// Within it a server that is silent is asked once a second, whatever `resolv.conf` says, so that one that comes back is heard soon.
const ATTEMPT: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 5;

/// Where addresses of names come from.
#[async_trait]
pub(super) trait Names: Send + Sync {
    /// All addresses of `host`, or why there are none.
    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String>;
}

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// The name does not exist.
    #[error("no such host")]
    NoSuchHost,
    /// The name exists and has no address.
    #[error("the name has no addresses")]
    NoAddresses,
    /// No name server says anything.
    #[error("no name server answers")]
    Silent,
    /// Something else, in the words of who found it.
    #[error("{0}")]
    Other(String),
}

/// `/etc/hosts` and the name servers of `/etc/resolv.conf`, which is read again each time and never cached: the
/// addresses of a headless service change with its pods.
pub(super) struct SystemNames;

#[async_trait]
impl Names for SystemNames {
    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        ask(host, ATTEMPTS).await.map_err(|error| error.to_string())
    }
}

/// Asks once, as the node does when it looks for others, and says what came of it. `limit`: of all of it.
pub async fn resolve(host: &str, limit: Duration) -> Result<Vec<IpAddr>, Unresolved> {
    tokio::time::timeout(limit, ask(host, 1)).await.unwrap_or(Err(Unresolved::Silent))
}

async fn ask(host: &str, attempts: usize) -> Result<Vec<IpAddr>, Unresolved> {
    let resolver = tokio::task::spawn_blocking(move || {
        let mut builder = TokioResolver::builder_tokio()?;
        let options = builder.options_mut();
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        (options.timeout, options.attempts) = (ATTEMPT, attempts);
        builder.build()
    });
    let resolver = resolver
        .await
        .map_err(|error| Unresolved::Other(error.to_string()))?
        .map_err(|error| Unresolved::Other(format!("cannot read /etc/resolv.conf: {error}")))?;
    match resolver.lookup_ip(host).await {
        Ok(found) => Ok(found.iter().collect()),
        Err(error) if error.is_nx_domain() => Err(Unresolved::NoSuchHost),
        Err(error) if error.is_no_records_found() => Err(Unresolved::NoAddresses),
        // Its own words for a server that is silent or refuses say nothing about servers.
        Err(NetError::Timeout | NetError::NoConnections) => Err(Unresolved::Silent),
        Err(error) => Err(Unresolved::Other(error.to_string())),
    }
}

/// The addresses of `target`, a `host:port`.
pub(super) async fn look_up(names: Arc<dyn Names>, target: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = target.parse::<SocketAddr>() {
        return Ok(vec![address]);
    }
    let parts = target.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let Some((host, port)) = parts.filter(|(host, port)| !host.is_empty() && *port != 0) else {
        return Err("not of the form host:port".into());
    };
    match tokio::time::timeout(LIMIT, names.addresses(host)).await {
        Ok(Ok(found)) if found.is_empty() => Err("the name has no addresses".into()),
        Ok(Ok(found)) => Ok(found.into_iter().map(|address| SocketAddr::new(address, port)).collect()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(format!("no name server answers within {} s", LIMIT.as_secs())),
    }
}
