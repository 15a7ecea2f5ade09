//! Health, metrics and status over HTTP, on loopback. Reads everything, changes nothing.
//!
//! - `/livez`: 200 as long as the executor runs.
//! - `/readyz`: 200 if the registry listens and the store was read once, else 503 with the reason ([`readiness`]).
//! - `/metrics`: OpenMetrics text.
//! - `/status`: [`Status`] as JSON; [`fetch`] reads it and [`render`] prints it for people.
//!
//! What policies decide, and why, is asked at a socket of its own: [`ExplainServer`].

mod client;
mod explain;
mod render;
mod status;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::listener::{self, Body, Clients, Limits, NotLoopback, Sockets};
use crate::store::Health;
use crate::watchdog::Watchdog;

pub use client::{FetchError, fetch};
pub use explain::{
    ExplainError, ExplainServer, Explainers, election_status, explain_peer, explain_pull, explain_role,
    yield_role,
};
pub use render::{render, render_election, render_explained, render_peer, render_pull};
pub use status::{AskedRegistry, Diagnosis, Node, Served, Status, Store, StoreHealth, Upstream, Verdict};

/// The setting that names the addresses, as messages name it.
const LISTEN: &str = "admin.listen";

/// Connections at once: a few probes and scrapers.
const CONNECTIONS: usize = 64;

const TEXT: &str = "text/plain; charset=utf-8";
/// What prometheus-client writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where health, metrics and status are served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses. Those that are not loopback need other `clients`.
    pub listen: Vec<SocketAddr>,
    /// Who may connect: who does sees peers, addresses and the names of images.
    pub clients: Clients,
}

/// What is shown; `app` knows where it comes from. None of the functions may block.
#[derive(Clone)]
pub struct Sources {
    /// Whether this node is ready, or why not: see [`readiness`].
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// The state of the node.
    pub status: Arc<dyn Fn() -> Status + Send + Sync>,
    /// The metrics.
    pub metrics: Arc<Registry>,
}

/// The running server.
pub struct Server {
    listener: listener::Server,
}

/// The rule of `/readyz`: the registry listens, and the store's view was read once. A store that was read and then
/// degrades stays ready, for it serves what it knows, and a node that is taken out for it would serve less. Peers and
/// APIs are never asked.
///
/// # Errors
/// Why the node is not ready.
pub fn readiness(listening: bool, was_read: bool, store: &Health) -> Result<(), String> {
    match store {
        _ if !listening => Err("the registry does not listen".into()),
        _ if was_read => Ok(()),
        Health::Degraded(reason) => Err(format!("the store was not read yet: {reason}")),
        Health::Starting | Health::Ready => Err("the store was not read yet".into()),
    }
}

impl Config {
    /// Checks the values; logs the risk of addresses that are not loopback.
    ///
    /// # Errors
    /// An address that is not loopback, without leave.
    pub fn check(&self) -> Result<(), NotLoopback> {
        self.clients.check(
            &self.listen,
            (LISTEN, "admin.clients"),
            "whoever reaches it sees peers, addresses and the names of images",
        )
    }

    /// Whether going from this configuration to `new` needs a restart.
    pub fn needs_restart(&self, new: &Self) -> bool {
        self.listen != new.listen || self.clients != new.clients
    }

    /// Binds the configured addresses. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub fn bind(&self) -> Result<Sockets, listener::BindError> {
        Sockets::bind(LISTEN, &self.listen)
    }
}

impl Server {
    /// Serves `sources` on `sockets`. Its accept loops are hearts of `watchdog`: probes depend on them.
    pub fn start(sockets: Sockets, config: &Config, sources: Sources, watchdog: Option<&Watchdog>) -> Self {
        let handler: listener::Handler = Arc::new(move |request| {
            let response = sources.answer(&request);
            std::future::ready(response).boxed()
        });
        let limits = Limits::new(config.clients.admission(Counter::default()), CONNECTIONS);
        Self { listener: listener::Server::start(sockets, limits, &handler, "admin accept", watchdog) }
    }

    /// The addresses that are bound, with their real ports.
    pub fn addresses(&self) -> &[SocketAddr] {
        self.listener.addresses()
    }

    /// Stops accepting and lets answers end for at most `limit`; whether all of them did.
    pub async fn drain(self, limit: Duration) -> bool {
        self.listener.drain(limit).await
    }
}

impl Sources {
    fn answer(&self, request: &Parts) -> Response<Body> {
        let head = request.method == Method::HEAD;
        if !head && request.method != Method::GET {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n", head);
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri.path() {
            "/livez" => text(StatusCode::OK, "ok\n", head),
            "/readyz" => match (self.ready)() {
                Ok(()) => text(StatusCode::OK, "ok\n", head),
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"), head),
            },
            "/metrics" => {
                let mut metrics = String::new();
                match prometheus_client::encoding::text::encode(&mut metrics, &self.metrics) {
                    Ok(()) => document(StatusCode::OK, OPEN_METRICS, metrics, head),
                    Err(_) => {
                        text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n", head)
                    }
                }
            }
            "/status" => match serde_json::to_vec(&(self.status)()) {
                Ok(status) => document(StatusCode::OK, "application/json", status, head),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"), head),
            },
            "/" => text(StatusCode::OK, "peili: /livez /readyz /metrics /status\n", head),
            _ => text(StatusCode::NOT_FOUND, "not found: there are /livez /readyz /metrics /status\n", head),
        }
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>, head: bool) -> Response<Body> {
    document(status, TEXT, text, head)
}

fn document(
    status: StatusCode,
    media_type: &'static str,
    bytes: impl Into<Bytes>,
    head: bool,
) -> Response<Body> {
    let bytes = bytes.into();
    let length = bytes.len();
    let mut response = Response::new(if head { Body::empty() } else { Body::full(bytes) });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

impl Config {
    /// Where a program of this node asks; `None`: it is listened nowhere.
    pub fn local(&self) -> Option<SocketAddr> {
        let mut address = self.listen.first().copied()?;
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        Some(address)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: vec![([127, 0, 0, 1], 5003).into()], clients: Clients::Loopback }
    }
}

#[cfg(test)]
mod tests;
