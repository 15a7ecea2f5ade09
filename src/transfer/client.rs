//! Fetches segments from peers over pooled connections that are pinned to the peer's identity.
//!
//! No proxy variable is ever read. Each fetch runs in a task of its own, so that a caller that loses interest (a
//! hedge that lost, a client that hung up) does not cost the connection: what still comes is drained within limits.

mod body;
mod connect;
mod pool;

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, RANGE, TRANSFER_ENCODING};
use http::{HeaderValue, Method, Request, StatusCode, response};
use http_body::Body as _;
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use self::body::Body;
use self::pool::{Connection, Permit, Pool, Way};
use super::metrics::{Connected, Fetched, Metrics};
use super::tls::{Tls, TlsError};
use super::{FetchError, Segment, Transfer, wire};
use crate::network::Peer;
use crate::network::admission::Admission;
use crate::network::identity::Identity;
use crate::oci::{ByteRange, Descriptor, Digest, OCTET_STREAM, PeerId};

/// Bytes that all drains together may still have to read.
const DRAIN_BUDGET: usize = 64 << 20;
/// The part of a request's limit that it may wait at a busy peer; the rest is for the way there and back.
const WAIT_SHARE: f32 = 0.6;
/// How often idle connections are looked through.
const REAP_INTERVAL: Duration = Duration::from_secs(10);
/// The authority of a request; the identity is the address.
const HOST_NAME: HeaderValue = HeaderValue::from_static("peer.invalid");

/// Fetches from peers. Dropping it ends its idle connections and its drains.
pub struct Client {
    shared: Arc<Shared>,
    _stop: DropGuard,
    _reaper: AbortOnDropHandle<()>,
}

struct Shared {
    tls: Tls,
    admission: Admission,
    pool: Arc<Pool>,
    metrics: Metrics,
    /// In KiB.
    drains: Arc<Semaphore>,
    stop: CancellationToken,
}

/// One request.
struct Wanted {
    peer: PeerId,
    addresses: Vec<SocketAddr>,
    digest: Digest,
    start: u64,
    length: u64,
    /// How long it may wait at the peer for an upload.
    wait: Duration,
}

impl Client {
    /// A client that proves `identity`. Must be called in a tokio runtime.
    pub fn new(identity: &Identity, metrics: Metrics) -> Result<Self, TlsError> {
        Self::presenting(Admission::off(), identity, metrics)
    }

    /// One that also shows that it is a member of the cluster. Must be called in a tokio runtime.
    pub fn presenting(admission: Admission, identity: &Identity, metrics: Metrics) -> Result<Self, TlsError> {
        let pool = Arc::new(Pool::default());
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            tls: Tls::new(identity)?,
            admission,
            pool: Arc::clone(&pool),
            metrics,
            drains: Arc::new(Semaphore::new(DRAIN_BUDGET >> 10)),
            stop: stop.clone(),
        });
        let reaper = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                tokio::time::sleep(REAP_INTERVAL).await;
                pool.reap();
            }
        }));
        Ok(Self { shared, _stop: stop.drop_guard(), _reaper: reaper })
    }

    #[cfg(test)]
    pub(super) fn idle(&self, peer: &PeerId) -> usize {
        self.shared.pool.idle(peer)
    }
}

#[async_trait]
impl Transfer for Client {
    async fn fetch(
        &self,
        peer: &Peer,
        digest: &Digest,
        start: u64,
        length: u64,
        limit: Duration,
    ) -> Result<Segment, FetchError> {
        let wanted = Wanted {
            peer: peer.id.clone(),
            addresses: peer.transfer.clone(),
            digest: *digest,
            start,
            length: length.min(wire::SEGMENT_LIMIT),
            wait: limit.mul_f32(WAIT_SHARE),
        };
        let shared = Arc::clone(&self.shared);
        let stop = shared.stop.clone();
        let task = tokio::spawn(async move {
            let outcome = stop.run_until_cancelled_owned(shared.fetch(&wanted, limit)).await;
            let outcome =
                outcome.unwrap_or_else(|| Err(FetchError::Unreachable("this node is stopping".into())));
            shared.metrics.fetched(Fetched::of(&outcome));
            outcome
        });
        task.await.unwrap_or_else(|error| Err(FetchError::Unreachable(error.to_string())))
    }
}

impl Fetched {
    fn of(outcome: &Result<Segment, FetchError>) -> Self {
        match outcome {
            Ok(_) => Self::Content,
            Err(FetchError::NotFound) => Self::NotFound,
            Err(FetchError::Busy { .. }) => Self::Busy,
            Err(FetchError::Queued) => Self::Queued,
            Err(FetchError::Slow) => Self::Slow,
            Err(FetchError::Unreachable(_)) => Self::Unreachable,
            Err(FetchError::Identity(_)) => Self::Identity,
            Err(FetchError::Protocol(_)) => Self::Protocol,
        }
    }
}

impl Shared {
    async fn fetch(self: &Arc<Self>, wanted: &Wanted, limit: Duration) -> Result<Segment, FetchError> {
        let began = Instant::now();
        let deadline = began + limit;
        let queued = |_| FetchError::Queued;
        let permit = timeout_at(deadline, self.pool.permit(&wanted.peer)).await.map_err(queued)?;
        loop {
            let way = timeout_at(deadline, self.pool.way(&wanted.peer)).await.map_err(queued)?;
            let asked = Instant::now();
            if asked >= deadline {
                // Its turn came because the time of those before it was up.
                return Err(FetchError::Queued);
            }
            match timeout_at(deadline, self.request(wanted, way)).await {
                Ok(Ok(Some((answer, connection)))) => {
                    return self.segment(wanted, answer, connection, permit);
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => return Err(error),
                // The peer had little of the time.
                Err(_) if asked - began > limit / 2 => return Err(FetchError::Queued),
                Err(_) if self.pool.lives_since(&wanted.peer, began) => return Err(FetchError::Slow),
                Err(_) => {
                    self.pool.close(&wanted.peer, began);
                    return Err(FetchError::Unreachable(format!(
                        "no answer within {} ms",
                        limit.as_millis()
                    )));
                }
            }
        }
    }

    /// An answer, and the connection that its body comes by. `None`: the connection from the pool was closed meanwhile.
    async fn request(
        &self,
        wanted: &Wanted,
        way: Way,
    ) -> Result<Option<(http::Response<Incoming>, Connection)>, FetchError> {
        let dialing = match way {
            Way::Pooled(mut connection) => {
                let request = wanted.request(connection.show(self.admission.own()))?;
                return match connection.send(request).await {
                    Ok(answer) => {
                        self.pool.lives(&wanted.peer);
                        self.metrics.connected(Connected::Reused);
                        Ok(Some((answer, connection)))
                    }
                    // The peer closed it meanwhile, or is gone; a new connection tells which.
                    Err(error) => {
                        tracing::debug!(peer = %wanted.peer, %error, "a pooled connection was closed");
                        Ok(None)
                    }
                };
            }
            Way::Dial(permit) => permit,
        };
        let connection = connect::connect(&self.tls, &wanted.peer, &wanted.addresses).await;
        self.metrics.connected(if connection.is_ok() { Connected::New } else { Connected::Failed });
        let mut connection = connection?;
        self.pool.lives(&wanted.peer);
        drop(dialing);
        let request = wanted.request(connection.show(self.admission.own()))?;
        let answer = connection.send(request).await.map_err(|error| request_error(&error))?;
        self.pool.lives(&wanted.peer);
        Ok(Some((answer, connection)))
    }

    /// Checks the answer against the request.
    fn segment(
        self: &Arc<Self>,
        wanted: &Wanted,
        answer: http::Response<Incoming>,
        connection: Connection,
        permit: Permit,
    ) -> Result<Segment, FetchError> {
        let (parts, incoming) = answer.into_parts();
        let checked = wanted.check(&parts);
        if incoming.is_end_stream() {
            // A busy or empty-handed peer's connection is as good as any.
            self.pool.put(&wanted.peer, connection);
            let (descriptor, range) = checked?;
            if !range.is_empty() {
                return Err(FetchError::Protocol("an answer without its body".into()));
            }
            return Ok(Segment { descriptor, range, body: futures::stream::empty().boxed() });
        }
        let (descriptor, range) = checked?;
        let body =
            Body::new(Arc::clone(self), wanted.peer.clone(), incoming, range.len(), connection, permit);
        Ok(Segment { descriptor, range, body: body.boxed() })
    }
}

impl Wanted {
    fn request(&self, certificate: Option<Bytes>) -> Result<Request<Empty<Bytes>>, FetchError> {
        let mut request = Request::builder()
            .uri(wire::content_path(&self.digest))
            .header(HOST, HOST_NAME)
            .header(wire::VERSION_HEADER, wire::VERSION)
            .header(wire::WAIT_HEADER, u64::try_from(self.wait.as_millis()).unwrap_or(u64::MAX));
        if let Some(certificate) = certificate {
            request = request.header(wire::CERTIFICATE_HEADER, wire::certificate(&certificate));
        }
        request = if self.length == 0 {
            request.method(Method::HEAD)
        } else {
            let last = self.start.saturating_add(self.length - 1);
            request.header(RANGE, format!("bytes={}-{last}", self.start))
        };
        request.body(Empty::new()).map_err(|error| FetchError::Protocol(error.to_string()))
    }

    fn check(&self, answer: &response::Parts) -> Result<(Descriptor, ByteRange), FetchError> {
        let protocol = |what: &str| Err(FetchError::Protocol(what.into()));
        let headers = &answer.headers;
        // It overrides Content-Length, so that a body would have no end that was agreed on.
        if headers.contains_key(TRANSFER_ENCODING) {
            return protocol("an answer with Transfer-Encoding");
        }
        let number =
            |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()?.parse().ok());
        let empty = ByteRange { start: self.start, end: self.start };
        let (range, size) = match answer.status {
            StatusCode::NOT_FOUND => return Err(FetchError::NotFound),
            StatusCode::SERVICE_UNAVAILABLE => {
                let queue = number(wire::QUEUE_HEADER).and_then(|queue: u64| u32::try_from(queue).ok());
                return Err(FetchError::Busy { queue: queue.unwrap_or(0) });
            }
            StatusCode::OK if self.length == 0 => match number(CONTENT_LENGTH) {
                Some(size) => (empty, size),
                None => return protocol("an answer to HEAD without Content-Length"),
            },
            StatusCode::PARTIAL_CONTENT if self.length > 0 => {
                let Some((range, size)) = wire::parse_range(headers) else {
                    return protocol("206 without a valid Content-Range");
                };
                let end = self.start.saturating_add(self.length).min(size);
                if range != (ByteRange { start: self.start, end }) {
                    return protocol("a Content-Range that was not asked for");
                }
                if number(CONTENT_LENGTH) != Some(range.len()) {
                    return protocol("a Content-Length that contradicts Content-Range");
                }
                (range, size)
            }
            StatusCode::RANGE_NOT_SATISFIABLE if self.length > 0 => match wire::parse_empty_range(headers) {
                Some(size) if size <= self.start => (empty, size),
                _ => return protocol("416 for bytes that exist"),
            },
            status => return protocol(&format!("an answer with status {}", status.as_u16())),
        };
        let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        Ok((Descriptor::new(self.digest, size, media_type.unwrap_or(OCTET_STREAM)), range))
    }
}

/// Why a request on a new connection got no answer.
fn request_error(error: &hyper::Error) -> FetchError {
    if error.is_parse() {
        return FetchError::Protocol(error.to_string());
    }
    let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match cause.and_then(io::Error::get_ref).and_then(|source| source.downcast_ref::<rustls::Error>()) {
        // In TLS 1.3 the server judges the client's certificate after the client's handshake has ended.
        Some(rustls::Error::AlertReceived(alert)) => {
            FetchError::Unreachable(format!("the peer refused this node: {alert:?}"))
        }
        Some(error) => FetchError::Protocol(error.to_string()),
        None => FetchError::Unreachable(match cause {
            Some(cause) => cause.to_string(),
            None => error.to_string(),
        }),
    }
}
