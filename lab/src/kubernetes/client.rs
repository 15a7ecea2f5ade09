//! A small client of the API: JSON there and back, each request on a connection of its own, all of it bounded. It retries
//! nothing and follows nothing, so that a test sees what the server said.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::netns::Namespace;

/// Limit of a request, with its connection.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Most that is read of an answer.
const BODY_LIMIT: usize = 16 << 20;
/// A name that each server's certificate has.
const NAME: &str = "kubernetes.default.svc";

/// A client of one server, with an identity. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    address: SocketAddr,
    namespace: Option<Namespace>,
    tls: Arc<ClientConfig>,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(address: SocketAddr, namespace: Option<Namespace>, tls: Arc<ClientConfig>) -> Self {
        Self { address, namespace, tls, token: None }
    }

    pub(super) fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Seen from another namespace.
    #[must_use]
    pub fn from_namespace(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// Sends a request: the status and body of the answer, whatever they are. A body that is no JSON becomes a string. PATCH
    /// merges.
    pub async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let answer = timeout(CALL_LIMIT, self.exchange(method, path, body)).await;
        answer
            .map_err(|_| anyhow!("not within {CALL_LIMIT:?}"))
            .flatten()
            .with_context(|| format!("{method} {path}"))
    }

    async fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let stream = tokio::net::TcpStream::from_std(self.connect().await?)?;
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector.connect(ServerName::try_from(NAME)?, stream).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await?;
        // Ends with this call.
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let mut request = http::Request::builder().method(method).uri(path).header("host", NAME);
        request = request.header("user-agent", "peili-lab").header("accept", "application/json");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if body.is_some() {
            let is_patch = method == "PATCH";
            let kind = if is_patch { "application/merge-patch+json" } else { "application/json" };
            request = request.header("content-type", kind);
        }
        let body = body.map(ToString::to_string).unwrap_or_default();
        let answer = sender.send_request(request.body(Full::from(body))?).await?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), BODY_LIMIT).collect().await;
        let body = body.map_err(|error| anyhow!("its body: {error}"))?.to_bytes();
        let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
        Ok((status, serde_json::from_slice(&body).unwrap_or_else(|_| text())))
    }

    async fn connect(&self) -> Result<TcpStream> {
        let (address, namespace) = (self.address, self.namespace.clone());
        let connect = move || {
            let stream = TcpStream::connect_timeout(&address, CALL_LIMIT)?;
            stream.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(stream)
        };
        let stream = tokio::task::spawn_blocking(move || match namespace {
            Some(namespace) => namespace.run(connect)?.map_err(Into::into),
            None => Ok::<_, anyhow::Error>(connect()?),
        });
        stream.await?.with_context(|| format!("cannot reach {address}"))
    }
}
