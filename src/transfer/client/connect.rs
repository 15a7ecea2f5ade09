//! Opens a connection to a peer: its addresses in order, the next one soon after, the first proved one wins.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::super::stream::{Gather, Prefetch};
use super::super::tls::{Tls, server_name};
use super::pool::Connection;
use crate::oci::PeerId;
use crate::transfer::{FetchError, wire};

/// Until the next address is tried too (RFC 8305 section 5 allows 100 ms at least).
const STAGGER: Duration = Duration::from_millis(100);
/// Addresses of one peer that are tried; a peer claims them itself.
const ADDRESSES: usize = 8;
/// Largest read, and so the largest chunk that a segment's body gives.
const READ_BUFFER: usize = 256 << 10;

/// Connects to `peer` at one of `addresses`. Has no time limit of its own.
pub(super) async fn connect(
    tls: &Tls,
    peer: &PeerId,
    addresses: &[SocketAddr],
) -> Result<Connection, FetchError> {
    let config = tls.client(peer).map_err(|error| FetchError::Unreachable(error.to_string()))?;
    let mut addresses = addresses.iter().take(ADDRESSES);
    let mut attempts = FuturesUnordered::new();
    let mut failure = FetchError::Unreachable("no address of it is known".into());
    loop {
        let next = addresses.next();
        let more = next.is_some();
        if let Some(&address) = next {
            attempts.push(attempt(Arc::clone(&config), address));
        }
        let finished = tokio::select! {
            finished = attempts.next() => finished,
            () = tokio::time::sleep(STAGGER), if more => continue,
        };
        match finished {
            Some(Ok(connection)) => return Ok(connection),
            // That somebody else answers there says more than that nobody does.
            Some(Err(error)) => {
                if !matches!(failure, FetchError::Identity(_)) {
                    failure = error;
                }
            }
            None if more => {}
            None => return Err(failure),
        }
    }
}

async fn attempt(config: Arc<ClientConfig>, address: SocketAddr) -> Result<Connection, FetchError> {
    let unreachable = |error: io::Error| FetchError::Unreachable(format!("{address}: {error}"));
    let stream = TcpStream::connect(address).await.map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    let stream = TlsConnector::from(config)
        .connect(server_name(), Prefetch::new(stream))
        .await
        .map_err(|error| handshake_error(address, &error))?;
    if !wire::is_spoken(stream.get_ref().1.alpn_protocol()) {
        return Err(FetchError::Protocol(format!("{address} does not speak the peer protocol")));
    }
    let (sender, connection) = http1::Builder::new()
        .max_headers(wire::HEADER_FIELDS)
        .max_header_size(wire::HEADER_LIMIT)
        .max_buf_size(READ_BUFFER)
        .handshake(TokioIo::new(Gather::new(stream)))
        .await
        .map_err(|error| FetchError::Unreachable(format!("{address}: {error}")))?;
    Ok(Connection::new(sender, connection))
}

fn handshake_error(address: SocketAddr, error: &io::Error) -> FetchError {
    match error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => {
            FetchError::Unreachable(format!("{address} refused the handshake: {alert:?}"))
        }
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(cause))) => {
            FetchError::Identity(format!("{address}: {}", cause.0))
        }
        Some(error) => FetchError::Identity(format!("{address}: {error}")),
        None => FetchError::Unreachable(format!("{address}: {error}")),
    }
}
