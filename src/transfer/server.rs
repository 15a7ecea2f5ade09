//! The peer port: accepts proved peers, asks the gate, and hands out what the source gives, within limits.
//!
//! Every task belongs to the [`ServerHandle`]; dropping it ends them all. What a peer can make it hold is bounded:
//! handshakes, connections, header bytes, waiting requests, uploads, and the time that each of them may take.

mod connections;
mod place;
mod upload;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RANGE};
use http::{Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use self::connections::{Connections, Handshakes, Ticket};
use self::place::{NoMember, Place};
use self::upload::{Reply, Upload};
use super::metrics::{Answered, Handshake, Metrics};
use super::rate::{PeerRates, Rate};
use super::slots::{Busy, Limits, Slots};
use super::stream::{Guarded, Requests, StallLimits};
use super::tls::{Tls, TlsError, proved_peer};
use super::{Config, Segment, Source, wire};
use crate::network::admission::Admission;
use crate::network::identity::Identity;
use crate::oci::{Action, Digest, Gate, PeerId, RangeHeader, UploadLimits};

/// TCP and TLS, from accept to the peer's proof.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// From there to the membership certificate of a peer that is not known: its first request.
const PROOF_LIMIT: Duration = Duration::from_secs(2);
/// A request's header, from its first byte to its last.
const HEADER_TIME_LIMIT: Duration = Duration::from_secs(5);
/// A connection without a request. Above the 30 s after which the client closes it.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// A peer that takes less than 64 KiB in this time has stalled.
const WRITE_STALL_LIMIT: Duration = Duration::from_secs(30);
/// A request waits this long for an upload slot, as long as a requester waits for busy peers.
const QUEUE_LIMIT: Duration = Duration::from_secs(2);
/// The store opens content in milliseconds; one that hangs must not hold requests for ever.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a failure to accept that lasts, such as no free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Encrypted bytes that TLS holds ahead of the socket: one chunk of a file, written in one call.
const TLS_BUFFER: usize = 288 << 10;
/// Plain bytes that HTTP holds ahead of TLS.
const WRITE_BUFFER: usize = 256 << 10;

/// Starts peer ports.
#[derive(Debug)]
pub struct Server;

/// A running peer port.
pub struct ServerHandle {
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    addresses: Vec<SocketAddr>,
}

/// Who may come in.
#[derive(Clone)]
pub struct Access {
    /// Asked about every peer.
    pub gate: Arc<dyn Gate>,
    /// By which those prove themselves that the gate does not know.
    pub admission: Admission,
}

struct Shared {
    acceptor: TlsAcceptor,
    gate: Arc<dyn Gate>,
    admission: Admission,
    source: Arc<dyn Source>,
    metrics: Metrics,
    slots: Arc<Slots>,
    rate: Option<Arc<Rate>>,
    peer_rates: PeerRates,
    handshakes: Handshakes,
    connections: Arc<Connections>,
    stall_limits: StallLimits,
}

impl Server {
    /// Serves `source` on `listeners` to the peers that `access` lets in. Must be called in a tokio runtime.
    pub fn spawn(
        listeners: Vec<TcpListener>,
        identity: &Identity,
        config: &Config,
        access: Access,
        source: Arc<dyn Source>,
        metrics: Metrics,
    ) -> Result<ServerHandle, TlsError> {
        Self::spawn_with(
            listeners,
            identity,
            config,
            access,
            source,
            metrics,
            StallLimits { header: HEADER_TIME_LIMIT, write: WRITE_STALL_LIMIT },
        )
    }

    /// With other stall limits, for tests on real sockets, which cannot pause time.
    pub(super) fn spawn_with(
        listeners: Vec<TcpListener>,
        identity: &Identity,
        config: &Config,
        access: Access,
        source: Arc<dyn Source>,
        metrics: Metrics,
        stall_limits: StallLimits,
    ) -> Result<ServerHandle, TlsError> {
        let limits = Limits {
            total: config.uploads.clamp(1, 4096) as usize,
            per_peer: config.uploads_per_peer.clamp(1, 4096) as usize,
            queue: config.queue as usize,
        };
        let shared = Arc::new(Shared {
            acceptor: TlsAcceptor::from(Tls::new(identity)?.server()),
            gate: access.gate,
            admission: access.admission,
            source,
            slots: Slots::new(limits),
            rate: Rate::new(config.upload_rate.as_u64()).map(Arc::new),
            peer_rates: PeerRates::default(),
            handshakes: Handshakes::default(),
            connections: Connections::new(metrics.connections.clone()),
            metrics,
            stall_limits,
        });
        let stop = CancellationToken::new();
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(accept(listener, Arc::clone(&shared), stop.clone()));
        }
        Ok(ServerHandle { shared, stop, tasks, addresses })
    }
}

impl Access {
    /// Whoever `gate` knows, and nobody else.
    pub fn by(gate: Arc<dyn Gate>) -> Self {
        Self { gate, admission: Admission::off() }
    }
}

impl ServerHandle {
    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Asks the gate again about every live connection, and closes those that are no longer allowed. To be called when levels change.
    pub fn recheck(&self) {
        self.shared.recheck();
    }

    /// The same as a function that outlives this borrow.
    pub fn rechecker(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.recheck()
    }

    /// How many hundredths of the upload slots are taken; outlives this borrow.
    pub fn load(&self) -> impl Fn() -> u32 + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.slots.load()
    }

    /// Requests of peers that wait for an upload slot.
    pub fn queued(&self) -> u32 {
        self.shared.slots.queued()
    }

    /// Accepts nothing more, lets running uploads end within `limit`, then closes everything.
    pub async fn shutdown(mut self, limit: Duration) {
        self.stop.cancel();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(limit, ended).await.is_err() {
            tracing::info!(
                connections = self.shared.connections.len(),
                "closing uploads that did not end in time"
            );
        }
        self.tasks.shutdown().await;
    }
}

impl Shared {
    fn recheck(&self) {
        let gate = &self.gate;
        self.connections
            .close_unless(|peer| gate.allows(peer, Action::Connect) && gate.allows(peer, Action::Serve));
        self.peer_rates.update(|peer| gate.upload_limits(peer).per_second);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("the peer port accepts connections again");
                }
                let ticket = shared.handshakes.enter();
                connections.spawn(connection(Arc::clone(&shared), stream, ticket, stop.clone()));
            }
            // The other end gave up before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                shared.metrics.accept_errors.inc();
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the peer port cannot accept connections");
                }
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// One connection, from accept to its end.
async fn connection(shared: Arc<Shared>, stream: TcpStream, ticket: Ticket, stop: CancellationToken) {
    let accepted = tokio::select! {
        () = ticket.displaced() => Err(Handshake::Displaced),
        () = stop.cancelled() => return,
        accepted = timeout(HANDSHAKE_LIMIT, handshake(&shared, stream)) => {
            accepted.unwrap_or(Err(Handshake::Timeout))
        }
    };
    let (stream, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(outcome) => return shared.metrics.handshake(outcome),
    };
    if !shared.gate.allows(&peer, Action::Connect) {
        tracing::debug!(%peer, "refused a connection: the peer is not trusted");
        return shared.metrics.handshake(Handshake::Denied);
    }
    let place = Place::default();
    if !shared.gate.is_unproved(&peer) && !place.enter(&shared, &peer) {
        return;
    }

    let requests = Requests::default();
    let stream = Guarded::new(stream, requests.clone(), shared.stall_limits);
    let service = service_fn(|request| {
        let (shared, peer, place, requests) = (&shared, &peer, &place, &requests);
        async move {
            place.prove(shared, peer, &request)?;
            Ok::<_, NoMember>(respond(shared, peer, requests, &request).await)
        }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_LIMIT)
        .max_headers(wire::HEADER_FIELDS)
        .max_header_size(wire::HEADER_LIMIT)
        .max_buf_size(WRITE_BUFFER)
        .writev(true)
        .auto_date_header(false);
    let mut http = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut closed = std::pin::pin!(place.closed(ticket));
    let mut stopping = false;
    loop {
        tokio::select! {
            result = &mut http => {
                if let Err(error) = result {
                    tracing::debug!(%peer, %error, "a connection of a peer broke");
                }
                break;
            }
            () = &mut closed => break,
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
    place.end(&peer, &shared.metrics);
}

async fn handshake(
    shared: &Shared,
    stream: TcpStream,
) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, PeerId), Handshake> {
    let from = stream.peer_addr().ok();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let mut stream = shared.acceptor.accept(stream).await.map_err(|error| {
        tracing::debug!(?from, %error, "a handshake at the peer port failed");
        Handshake::Failed
    })?;
    let tls = stream.get_mut().1;
    tls.set_buffer_limit(Some(TLS_BUFFER));
    let peer = proved_peer(tls).ok_or_else(|| {
        tracing::debug!(?from, "a connection to the peer port does not speak its protocol");
        Handshake::Failed
    })?;
    Ok((stream, peer))
}

async fn respond<B>(
    shared: &Arc<Shared>,
    peer: &PeerId,
    requests: &Requests,
    request: &Request<B>,
) -> Response<Reply> {
    let answering = requests.begin();
    let (outcome, mut response) = match answer(shared, peer, request).await {
        Ok(Answer::Upload(upload, response)) => {
            let (parts, ()) = response.into_parts();
            let upload = Reply::Upload(Box::new(upload.during(answering)));
            (Answered::Served, Response::from_parts(parts, upload))
        }
        Ok(Answer::Empty(response)) => (Answered::Served, response.map(|()| Reply::Empty)),
        Err(refusal) => (refusal.outcome(), refusal.response().map(|()| Reply::Empty)),
    };
    shared.metrics.answered(outcome);
    response.headers_mut().insert(wire::VERSION_HEADER, wire::VERSION);
    response
}

enum Answer {
    Empty(Response<()>),
    Upload(Upload, Response<()>),
}

enum Refusal {
    /// Not a request of the protocol.
    Invalid,
    Denied,
    NotFound,
    Failed,
    Busy(Busy),
}

impl Refusal {
    fn outcome(&self) -> Answered {
        match self {
            Self::Invalid => Answered::Invalid,
            Self::Denied => Answered::Denied,
            Self::NotFound => Answered::NotFound,
            Self::Failed => Answered::Failed,
            Self::Busy(_) => Answered::Busy,
        }
    }

    /// The peer sees no difference between what is not held and what is not for it.
    fn response(&self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::NOT_FOUND;
        if let Self::Busy(Busy(queue)) = self {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response.headers_mut().insert(wire::QUEUE_HEADER, HeaderValue::from(*queue));
        }
        response
    }
}

async fn answer<B>(shared: &Arc<Shared>, peer: &PeerId, request: &Request<B>) -> Result<Answer, Refusal> {
    let digest = wire::parse_content_path(request.uri().path()).ok_or(Refusal::Invalid)?;
    let head = match *request.method() {
        Method::GET => false,
        Method::HEAD => true,
        _ => return Err(Refusal::Invalid),
    };
    if !shared.gate.allows(peer, Action::Serve) {
        // What is not here would be left out for seconds.
        let is_unjudged = shared.gate.is_unjudged(peer);
        return Err(if is_unjudged { Refusal::Busy(Busy(0)) } else { Refusal::Denied });
    }
    if head {
        let segment = open(shared, peer, &digest, 0, 0).await?;
        let mut response = describe(&segment);
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(segment.descriptor.size));
        return Ok(Answer::Empty(response));
    }
    let (start, length) = wanted(request).ok_or(Refusal::Invalid)?;
    // Opened before it waits for a slot: that something is not here must not depend on who else is served.
    let segment = open(shared, peer, &digest, start, length).await?;
    let size = segment.descriptor.size;
    let mut response = describe(&segment);
    let content_range = if segment.range.is_empty() {
        *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
        wire::empty_range(size)
    } else {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        segment.range.content_range(size)
    };
    let content_range = HeaderValue::try_from(content_range).map_err(|_| Refusal::Failed)?;
    response.headers_mut().insert(CONTENT_RANGE, content_range);
    if segment.range.is_empty() {
        return Ok(Answer::Empty(response));
    }
    let UploadLimits { at_once, .. } = shared.gate.upload_limits(peer);
    let slot = shared.slots.acquire(peer, at_once, wait(request)).await.map_err(Refusal::Busy)?;
    // It may have waited long.
    if !shared.gate.allows(peer, Action::Serve) {
        return Err(Refusal::Denied);
    }
    let per_second = shared.gate.upload_limits(peer).per_second;
    let own = per_second.and_then(|per_second| shared.peer_rates.of(peer, per_second));
    let upload = Upload::new(segment, slot, [own, shared.rate.clone()], &shared.metrics);
    Ok(Answer::Upload(upload, response))
}

/// How long the request may wait for an upload.
fn wait<B>(request: &Request<B>) -> Duration {
    let value = request.headers().get(wire::WAIT_HEADER);
    let wait = value.and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_millis);
    wait.map_or(QUEUE_LIMIT, |wait| wait.min(QUEUE_LIMIT))
}

/// Start and length of what is asked for. `None`: a range that the protocol does not know.
fn wanted<B>(request: &Request<B>) -> Option<(u64, u64)> {
    let Some(range) = request.headers().get(RANGE) else { return Some((0, wire::SEGMENT_LIMIT)) };
    match RangeHeader::parse(range.to_str().ok()?)? {
        RangeHeader::From(start) => Some((start, wire::SEGMENT_LIMIT)),
        RangeHeader::Between(start, last) => {
            Some((start, (last - start).saturating_add(1).min(wire::SEGMENT_LIMIT)))
        }
        RangeHeader::Suffix(_) => None,
    }
}

async fn open(
    shared: &Shared,
    peer: &PeerId,
    digest: &Digest,
    start: u64,
    length: u64,
) -> Result<Segment, Refusal> {
    let opened = timeout(OPEN_LIMIT, shared.source.open(peer, digest, start, length)).await;
    match opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(Some(segment)) => Ok(segment),
        Ok(None) => Err(Refusal::NotFound),
        Err(error) => {
            // Per request, so not louder: the store itself says when its state changes.
            tracing::debug!(%digest, %error, "cannot open content for a peer");
            Err(Refusal::Failed)
        }
    }
}

fn describe(segment: &Segment) -> Response<()> {
    let mut response = Response::new(());
    if let Ok(media_type) = HeaderValue::from_str(&segment.descriptor.media_type) {
        response.headers_mut().insert(CONTENT_TYPE, media_type);
    }
    response
}
