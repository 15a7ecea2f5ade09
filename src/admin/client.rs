//! Reads the status of a running node.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::Status;

/// All of it: a node answers from memory.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Far above what a node with thousands of peers writes.
const SIZE_LIMIT: usize = 64 << 20;

/// Why the status of a node cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nothing answers there.
    #[error(
        "cannot connect to {address}: {reason}\nhint: is peili running on this node? `admin.listen` of its configuration says where it answers"
    )]
    Connect {
        /// Where.
        address: SocketAddr,
        /// The system's; not its source, which would be said again behind the hint.
        reason: io::Error,
    },
    /// It took too long.
    #[error(
        "{address} did not answer within 5 s\nhint: the process hangs or the machine is overloaded; its log and `/livez` say more"
    )]
    Timeout {
        /// Where.
        address: SocketAddr,
    },
    /// Something else than Peili's status.
    #[error(
        "what answers at {address} is not peili's admin port: {reason}\nhint: `admin.listen` of the node's configuration says where it answers"
    )]
    Answer {
        /// Where.
        address: SocketAddr,
        /// What is wrong with it.
        reason: String,
    },
    /// A status of another version.
    #[error(
        "{address} writes version {version} of the status, this program reads version {}\nhint: use the `peili` of that node",
        Status::VERSION
    )]
    Version {
        /// Where.
        address: SocketAddr,
        /// Its version.
        version: u32,
    },
}

/// Asks the node whose admin port is at `address`.
///
/// # Errors
/// Why it cannot be read, with a hint.
pub async fn fetch(address: SocketAddr) -> Result<Status, FetchError> {
    fetch_within(address, TIME_LIMIT).await
}

pub(super) async fn fetch_within(address: SocketAddr, limit: Duration) -> Result<Status, FetchError> {
    tokio::time::timeout(limit, ask(address)).await.map_err(|_| FetchError::Timeout { address })?
}

async fn ask(address: SocketAddr) -> Result<Status, FetchError> {
    let stream =
        TcpStream::connect(address).await.map_err(|reason| FetchError::Connect { address, reason })?;
    let wrong = |reason: String| FetchError::Answer { address, reason };
    let (status, body) =
        send(stream, &address.to_string(), (Method::GET, "/status"), SIZE_LIMIT).await.map_err(wrong)?;
    if status != StatusCode::OK {
        return Err(wrong(format!("status {status}")));
    }
    let status: Status = serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?;
    match status.version {
        Status::VERSION => Ok(status),
        0 => Err(wrong("it has no `version`".into())),
        version => Err(FetchError::Version { address, version }),
    }
}

/// Status and body of the answer to a GET. The body may have `limit` bytes.
pub(super) async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    host: &str,
    (method, path): (Method, &str),
    limit: usize,
) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request =
        Request::builder().method(method).uri(path).header(header::HOST, host).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), limit);
    let body = body.collect().await.map_err(|error| error.to_string())?;
    Ok((status, body.to_bytes()))
}
