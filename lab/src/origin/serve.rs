//! The origin's thread: listeners, connections, requests.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc as std_mpsc};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use http::{HeaderMap, Method, Response, StatusCode, header};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use peili::oci::{ByteRange, Digest, RangeHeader};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::{Behaviour, Challenge, Control, Repository, Request, Scope, State, lock};
use crate::image::{Blob, Content};

/// Bytes of a body handed on at once.
const CHUNK: usize = 256 << 10;
/// How long the bytes before a cut get to leave.
const FLUSH: Duration = Duration::from_millis(50);
/// The token that the Bearer endpoint gives for the right password. Not a secret: it opens test images.
const TOKEN: &str = "lab-token";

type Body = StreamBody<BoxStream<'static, io::Result<Frame<Bytes>>>>;

/// Runs until the sender of `commands` is gone.
pub(super) fn run(
    state: &Arc<State>,
    addresses: &[SocketAddr],
    ready: &std_mpsc::Sender<Result<Vec<SocketAddr>>>,
    commands: mpsc::UnboundedReceiver<Control>,
) {
    let started = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")
        .and_then(|runtime| Ok((runtime, bind(addresses)?)));
    match started {
        Ok((runtime, listeners)) => {
            let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>();
            let addresses = addresses.unwrap_or_default();
            let _ = ready.send(Ok(addresses.clone()));
            runtime.block_on(supervise(state, &addresses, listeners, commands));
            runtime.shutdown_background();
        }
        Err(error) => {
            let _ = ready.send(Err(error));
        }
    }
}

fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>> {
    let bind = |address: &SocketAddr| {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    addresses.iter().map(bind).collect()
}

async fn supervise(
    state: &Arc<State>,
    addresses: &[SocketAddr],
    listeners: Vec<TcpListener>,
    mut commands: mpsc::UnboundedReceiver<Control>,
) {
    let mut tasks = accept(state, listeners);
    while let Some(Control::Listen(listening, done)) = commands.recv().await {
        // Ends listeners and connections.
        tasks.shutdown().await;
        if listening && let Ok(listeners) = bind(addresses) {
            tasks = accept(state, listeners);
        }
        let _ = done.send(());
    }
}

fn accept(state: &Arc<State>, listeners: Vec<TcpListener>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for listener in listeners {
        let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { continue };
        let state = Arc::clone(state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, remote)) => {
                            state.connections.fetch_add(1, Ordering::Relaxed);
                            let _ = stream.set_nodelay(true);
                            connections.spawn(connection(Arc::clone(&state), stream, remote));
                        }
                        // Out of descriptors; the next accept may go better.
                        Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
    }
    tasks
}

async fn connection(state: Arc<State>, stream: tokio::net::TcpStream, remote: SocketAddr) {
    match state.tls.clone() {
        None => requests(state, stream, remote).await,
        Some(config) => {
            if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                requests(state, stream, remote).await;
            }
        }
    }
}

async fn requests(
    state: Arc<State>,
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    remote: SocketAddr,
) {
    let service = hyper::service::service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(handle(&state, request, remote).await) }
    });
    // A client that goes away, or a body cut on purpose, ends in an error that nobody needs.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn handle(state: &Arc<State>, request: http::Request<Incoming>, remote: SocketAddr) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let scope = match () {
        () if path.contains("/manifests/") => Some(Scope::Manifests),
        () if path.contains("/blobs/") => Some(Scope::Blobs),
        () => None,
    };
    let record = Request {
        method: request.method().to_string(),
        path: path.clone(),
        ns: query(request.uri().query(), "ns"),
        range: text(request.headers(), &header::RANGE),
        authorized: request.headers().contains_key(header::AUTHORIZATION),
        remote,
        status: 0,
    };
    let number = {
        let mut requests = lock(&state.requests);
        requests.push(record);
        requests.len() - 1
    };
    let behaviour = lock(&state.behaviour).clone();
    let applies = behaviour.scope == Scope::All || Some(behaviour.scope) == scope;
    let behaviour = if applies { behaviour } else { Behaviour::default() };
    tokio::time::sleep(behaviour.delay).await;
    if behaviour.hang {
        std::future::pending::<()>().await;
    }
    let response = match behaviour.status.and_then(|status| StatusCode::from_u16(status).ok()) {
        Some(status) => plain(status, "the laboratory says so"),
        None => answer(state, &request, &path, &behaviour),
    };
    if let Some(record) = lock(&state.requests).get_mut(number) {
        record.status = response.status().as_u16();
    }
    response
}

fn answer(
    state: &Arc<State>,
    request: &http::Request<Incoming>,
    path: &str,
    behaviour: &Behaviour,
) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only reading");
    }
    if path == "/v2/" || path == "/v2" {
        return plain(StatusCode::OK, "");
    }
    if path == "/token" {
        return token(state, request);
    }
    let Some((repository, kind, reference)) = split(path) else {
        return plain(StatusCode::NOT_FOUND, "no such endpoint");
    };
    let Some(content) = lock(&state.content).get(repository).cloned() else {
        return plain(StatusCode::NOT_FOUND, "no such repository");
    };
    if let Some(challenge) =
        refuse(&content, repository, request, if state.tls.is_some() { "https" } else { "http" })
    {
        return challenge;
    }
    let digest = match kind {
        "manifests" => reference
            .parse()
            .ok()
            .or_else(|| content.tags.get(reference).copied())
            .filter(|digest| content.manifests.contains(digest)),
        "blobs" => reference.parse::<Digest>().ok(),
        _ => None,
    };
    {
        let mut counts = lock(&state.counts);
        match kind {
            "manifests" => counts.manifest_requests += 1,
            _ => counts.blob_requests += 1,
        }
    }
    match digest.and_then(|digest| Some((digest, content.blobs.get(&digest)?))) {
        Some((digest, blob)) => serve(state, request, kind == "manifests", digest, blob, behaviour),
        None => plain(StatusCode::NOT_FOUND, "unknown"),
    }
}

fn serve(
    state: &Arc<State>,
    request: &http::Request<Incoming>,
    is_manifest: bool,
    digest: Digest,
    blob: &Blob,
    behaviour: &Behaviour,
) -> Response<Body> {
    let asked = text(request.headers(), &header::RANGE).and_then(|value| RangeHeader::parse(&value));
    let range = match asked.filter(|_| !is_manifest).map(|range| range.resolve(blob.size)) {
        None => None,
        Some(Ok(range)) => Some(range),
        Some(Err(_)) => return plain(StatusCode::RANGE_NOT_SATISFIABLE, "out of range"),
    };
    let bytes = range.unwrap_or(ByteRange::whole(blob.size));
    let body = if *request.method() == Method::HEAD {
        stream::empty().boxed()
    } else {
        body(Arc::clone(state), is_manifest, digest, blob.content.clone(), bytes, behaviour)
    };
    let media_type = if is_manifest { &blob.media_type[..] } else { peili::oci::OCTET_STREAM };
    let mut response = Response::builder()
        .status(if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
        .header(header::CONTENT_TYPE, media_type)
        .header(header::CONTENT_LENGTH, bytes.len())
        .header(header::ACCEPT_RANGES, "bytes")
        .header("docker-content-digest", digest.to_string());
    if let Some(range) = range {
        response = response.header(header::CONTENT_RANGE, range.content_range(blob.size));
    }
    response.body(StreamBody::new(body)).unwrap_or_else(|_| plain(StatusCode::BAD_GATEWAY, "a bad header"))
}

fn body(
    state: Arc<State>,
    is_manifest: bool,
    digest: Digest,
    content: Content,
    range: ByteRange,
    behaviour: &Behaviour,
) -> BoxStream<'static, io::Result<Frame<Bytes>>> {
    let rate = behaviour.rate;
    let end = behaviour.cut_after.map_or(range.end, |count| range.end.min(range.start + count));
    let cut = end < range.end;
    let step =
        rate.map_or(CHUNK, |rate| usize::try_from(rate / 20).map_or(CHUNK, |step| step.clamp(1, CHUNK)));
    let start = (Source::Closed(content), range.start);
    let chunks = stream::try_unfold(start, move |(source, offset)| {
        let state = Arc::clone(&state);
        async move {
            if offset >= end {
                if cut {
                    // hyper forgets what it has not sent yet when a body fails.
                    tokio::time::sleep(FLUSH).await;
                    return Err(io::Error::other("cut on purpose"));
                }
                return Ok(None);
            }
            let wanted = usize::try_from(end - offset).map_or(step, |left| left.min(step));
            let (source, bytes) = source.read(offset, wanted).await?;
            if let Some(rate) = rate {
                tokio::time::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate.max(1) as f64)).await;
            }
            let count = bytes.len() as u64;
            let mut counts = lock(&state.counts);
            *counts.bytes_by_digest.entry(digest).or_default() += count;
            *(if is_manifest { &mut counts.manifest_bytes } else { &mut counts.blob_bytes }) += count;
            drop(counts);
            Ok(Some((Frame::data(bytes), (source, offset + count))))
        }
    });
    chunks.boxed()
}

/// Content being read in order.
enum Source {
    Closed(Content),
    Open(tokio::fs::File),
}

impl Source {
    async fn read(self, offset: u64, count: usize) -> io::Result<(Self, Bytes)> {
        let mut file = match self {
            Self::Closed(Content::Memory(bytes)) => {
                let start = usize::try_from(offset).map_err(io::Error::other)?;
                let chunk = bytes.slice(start..start + count);
                return Ok((Self::Closed(Content::Memory(bytes)), chunk));
            }
            Self::Closed(Content::File(path)) => {
                let mut file = tokio::fs::File::open(path).await?;
                file.set_max_buf_size(CHUNK);
                file.seek(io::SeekFrom::Start(offset)).await?;
                file
            }
            Self::Open(file) => file,
        };
        let mut buffer = vec![0; count];
        file.read_exact(&mut buffer).await?;
        Ok((Self::Open(file), buffer.into()))
    }
}

/// The answer to who lacks the password of a private repository.
fn refuse(
    repository: &Repository,
    name: &str,
    request: &http::Request<Incoming>,
    scheme: &str,
) -> Option<Response<Body>> {
    let (user, password, challenge) = repository.password.as_ref()?;
    let given = text(request.headers(), &header::AUTHORIZATION).unwrap_or_default();
    let (expected, asked) = match challenge {
        Challenge::Basic => (basic(user, password), "Basic realm=\"lab\"".to_owned()),
        Challenge::Bearer => {
            let host = text(request.headers(), &header::HOST).unwrap_or_default();
            let scope = format!("scope=\"repository:{name}:pull\"");
            (
                format!("Bearer {TOKEN}"),
                format!("Bearer realm=\"{scheme}://{host}/token\",service=\"lab\",{scope}"),
            )
        }
    };
    if given == expected {
        return None;
    }
    let mut response = plain(StatusCode::UNAUTHORIZED, "who are you?");
    if let Ok(value) = asked.parse() {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
    }
    Some(response)
}

/// The Bearer token for whoever knows any private repository's password; a useless one for all others.
fn token(state: &State, request: &http::Request<Incoming>) -> Response<Body> {
    let given = text(request.headers(), &header::AUTHORIZATION).unwrap_or_default();
    let known = lock(&state.content)
        .values()
        .filter_map(|repository| repository.password.as_ref())
        .any(|(user, password, _)| given == basic(user, password));
    let token = if known { TOKEN } else { "anonymous" };
    plain(StatusCode::OK, &format!(r#"{{"token":"{token}","access_token":"{token}"}}"#))
}

fn plain(status: StatusCode, body: &str) -> Response<Body> {
    let bytes = Bytes::copy_from_slice(body.as_bytes());
    let length = bytes.len();
    let mut response = Response::new(StreamBody::new(stream::iter([Ok(Frame::data(bytes))]).boxed()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    response
}

/// Repository, endpoint and reference of a path.
fn split(path: &str) -> Option<(&str, &str, &str)> {
    let (rest, reference) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    Some((repository, kind, reference))
}

fn query(query: Option<&str>, key: &str) -> Option<String> {
    query?
        .split('&')
        .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
        .map(|value| value.replace("%3A", ":"))
}

fn text(headers: &HeaderMap, name: &header::HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(ToOwned::to_owned)
}

/// `Basic` credentials (RFC 7617).
fn basic(user: &str, password: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = "Basic ".to_owned();
    for chunk in format!("{user}:{password}").as_bytes().chunks(3) {
        let word = (0..3).fold(0, |word, at| word << 8 | u32::from(chunk.get(at).copied().unwrap_or(0)));
        for at in 0..4 {
            let index = (word >> (18 - 6 * at)) & 63;
            text.push(if at > chunk.len() { '=' } else { char::from(ALPHABET[index as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials() {
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("a", "b"), "Basic YTpi");
        assert_eq!(basic("a", "bc"), "Basic YTpiYw==");
    }

    #[test]
    fn paths_and_queries() {
        assert_eq!(split("/v2/a/b/manifests/v1"), Some(("a/b", "manifests", "v1")));
        assert_eq!(split("/v2/"), None);
        assert_eq!(query(Some("a=1&ns=lab.io%3A5000"), "ns").as_deref(), Some("lab.io:5000"));
    }
}
