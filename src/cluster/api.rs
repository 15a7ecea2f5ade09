//! Calls to the API server: which of its addresses answers, the connection, the token, and the bounds of all of it.
//!
//! Configuration, TLS and the token are kube's. What is sent, how long it may take and what its failure is called are here, since an
//! election has to tell a request that was never sent from one that may still be carried out. It never sends twice.

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use serde_json::Value;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tokio_util::io::StreamReader;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceBuilder, ServiceExt};

use super::account;
use super::classify::{classify, refusal};
use super::{Cause, Config, Fault, Origin};

/// Bytes of an answer: objects have at most 1.5 MiB in etcd, and Peili's have a few KiB.
const ANSWER: usize = 1 << 20;
/// Bytes of a namespace's name, and of what a file of it may hold.
const NAMESPACE: usize = 512;
/// Bytes of a token, or of the authority's certificates.
pub(super) const CREDENTIAL: u64 = 1 << 20;
/// How long an open stream may be silent before its first line.
const HEAD: Duration = Duration::from_secs(5);
/// So long a refusal, or an ICMP answer, explains the silence that follows it: Linux sends one ICMP answer a second to each address
/// (`icmp_ratelimit`), and Peili may try twice in that time.
const ECHO: Duration = Duration::from_secs(10);

type Service = BoxCloneSyncService<Request<Full<Bytes>>, http::Response<Incoming>, BoxError>;

/// The API of a cluster.
pub struct Api {
    config: Config,
    endpoints: Vec<Endpoint>,
    /// The one that is asked next.
    current: AtomicUsize,
    /// Milliseconds: the least that a call was given. A connection that a stream asks for is waited for as long, since calls wait for it, too.
    patience: AtomicU64,
    /// As it was read; it never changes for a pod.
    namespace: OnceLock<String>,
}

struct Endpoint {
    origin: Origin,
    address: Uri,
    /// Made when it is needed, and anew after a failure: certificates, tokens and connections may be others by then.
    service: Mutex<Option<Service>>,
    /// Why it did not answer, and when that was found.
    fault: Mutex<Option<(Fault, Instant)>>,
}

/// A stream of lines of JSON.
pub struct Lines {
    address: Uri,
    lines: FramedRead<StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>, LinesCodec>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Its status.
    pub status: StatusCode,
    /// After which time the server wants to be asked again.
    pub retry_after: Option<Duration>,
    /// Its body; `Null`: it is no JSON.
    pub body: Value,
}

impl Api {
    /// Asks nothing yet.
    pub fn new(config: &Config) -> Self {
        Self::at(config, config.places())
    }

    /// Asks these addresses and no others.
    pub(super) fn at(config: &Config, places: Vec<(Origin, Uri)>) -> Self {
        let endpoint = |(origin, address)| Endpoint {
            origin,
            address,
            service: Mutex::default(),
            fault: Mutex::default(),
        };
        Self {
            endpoints: places.into_iter().map(endpoint).collect(),
            config: config.clone(),
            current: AtomicUsize::new(0),
            patience: AtomicU64::new(u64::MAX),
            namespace: OnceLock::new(),
        }
    }

    /// The namespace of Peili's objects.
    ///
    /// # Errors
    /// It is configured nowhere.
    pub fn namespace(&self) -> Result<String, Fault> {
        let config = &self.config;
        if !config.namespace.is_empty() {
            return Ok(config.namespace.clone());
        }
        if let Some(name) = self.namespace.get() {
            return Ok(name.clone());
        }
        let path = config.credentials.join("namespace");
        let missing = |text: String| Fault::new(Cause::NoCredentials, text);
        let read = || -> io::Result<String> {
            let mut bytes = account::read(&path)?;
            bytes.truncate(NAMESPACE);
            String::from_utf8(bytes).map_err(io::Error::other)
        };
        let text = read().map_err(|error| missing(format!("{}: {error}", path.display())))?;
        let name = text.trim();
        if super::is_name(name) {
            Ok(self.namespace.get_or_init(|| name.to_owned()).clone())
        } else {
            Err(missing(format!("{}: no name of a namespace", path.display())))
        }
    }

    /// Sends a request, once, to the address that answered last, and reads the answer. An answer of any status is one. Where no connection
    /// comes about the next address is tried in the time that is left.
    ///
    /// # Errors
    /// What is wrong where there is none.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Response, Fault> {
        let end = Instant::now() + limit;
        let patience = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.patience.fetch_min(patience, Ordering::Relaxed);
        let mut tried = 0;
        loop {
            let (index, endpoint) = self.endpoint()?;
            let left = end.saturating_duration_since(Instant::now());
            let result = timeout(left, self.call_at(endpoint, method.clone(), path, body, end)).await;
            let result = result.unwrap_or_else(|_| Err(self.late(endpoint, limit)));
            self.settle(index, endpoint, &result.as_ref().map(|response| response.status));
            tried += 1;
            match result {
                // Nothing was sent, so that the next address may be asked in the same call.
                Err(fault)
                    if fault.cause.knocks() && tried < self.endpoints.len() && Instant::now() < end => {}
                result => return result.map_err(|fault| self.all(fault)),
            }
        }
    }

    async fn call_at(
        &self,
        endpoint: &Endpoint,
        method: Method,
        path: &str,
        body: Option<&Value>,
        end: Instant,
    ) -> Result<Response, Fault> {
        let limit = end.saturating_duration_since(Instant::now());
        let response = endpoint.send(&self.config, request(method, path, body)?, limit).await?;
        let status = response.status();
        let retry_after = response.headers().get(header::RETRY_AFTER).and_then(seconds);
        let body = Limited::new(response.into_body(), ANSWER).collect().await;
        let body = body.map_err(|error| classify(&endpoint.address, error.as_ref()))?.to_bytes();
        Ok(Response { status, retry_after, body: serde_json::from_slice(&body).unwrap_or_default() })
    }

    /// Opens a stream of lines of JSON.
    ///
    /// # Errors
    /// What is wrong where there is none.
    pub async fn stream(&self, path: &str) -> Result<Lines, Fault> {
        let (index, endpoint) = self.endpoint()?;
        let request = request(Method::GET, path, None)?;
        let patience = HEAD.min(Duration::from_millis(self.patience.load(Ordering::Relaxed)));
        let sent = timeout(HEAD, endpoint.send(&self.config, request, patience)).await;
        let sent = sent.unwrap_or_else(|_| Err(self.late(endpoint, HEAD)));
        // A proxy may hold back what streams and pass on everything else.
        if !sent.as_ref().is_err_and(|fault| fault.cause == Cause::NoAnswer) {
            self.settle(index, endpoint, &sent.as_ref().map(http::Response::status));
        }
        let response = sent?;
        let status = response.status();
        if status != StatusCode::OK {
            let body = timeout(HEAD, Limited::new(response.into_body(), ANSWER).collect()).await;
            let body =
                body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
            return Err(refusal(status, &serde_json::from_slice(&body).unwrap_or_default()));
        }
        let body =
            StreamReader::new(response.into_body().into_data_stream().map_err(io::Error::other).boxed());
        let lines = FramedRead::new(body, LinesCodec::new_with_max_length(ANSWER));
        Ok(Lines { address: endpoint.address.clone(), lines })
    }

    /// Whether any address takes a connection; the first that does is asked next.
    pub async fn knock(&self, limit: Duration) -> bool {
        let tries = self.endpoints.iter().map(|endpoint| async move {
            let host = endpoint.address.host().unwrap_or_default().trim_matches(['[', ']']);
            let port = endpoint.address.port_u16().unwrap_or(443);
            matches!(timeout(limit, TcpStream::connect((host, port))).await, Ok(Ok(_)))
        });
        let answers = join_all(tries).await;
        let first = answers.iter().position(|answers| *answers);
        if let Some(first) = first {
            self.current.store(first, Ordering::Relaxed);
        }
        first.is_some()
    }

    /// The addresses, for people.
    pub fn place(&self) -> String {
        let all: Vec<&str> = self.shown().filter_map(Endpoint::authority).collect();
        all.join(", ")
    }

    fn endpoint(&self) -> Result<(usize, &Endpoint), Fault> {
        let index = self.current.load(Ordering::Relaxed);
        let missing = || Fault::new(Cause::Unresolved, "no address of an API server is known");
        self.endpoints.get(index).map(|endpoint| (index, endpoint)).ok_or_else(missing)
    }

    fn late(&self, endpoint: &Endpoint, limit: Duration) -> Fault {
        let address = endpoint.authority().unwrap_or_default();
        Fault::new(
            Cause::NoAnswer,
            format!(
                "{address} has a connection of this node and did not answer within {:.1} s",
                limit.as_secs_f64()
            ),
        )
    }

    /// Remembers how it went: who did not answer is not asked next.
    fn settle(&self, index: usize, endpoint: &Endpoint, result: &Result<StatusCode, &Fault>) {
        let fault = match result {
            Ok(StatusCode::UNAUTHORIZED) => {
                // The token may be another one by now.
                *lock(&endpoint.service) = None;
                None
            }
            Ok(status) => {
                if status.is_server_error() {
                    // Behind this connection, or this address, may be the one that is not well.
                    *lock(&endpoint.service) = None;
                    let is_named = |endpoint: &&Endpoint| endpoint.origin != Origin::KubePrism;
                    let named = self.endpoints.iter().filter(is_named).count();
                    if index < named {
                        let next = (index + 1) % named;
                        let _ =
                            self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
                    }
                }
                None
            }
            Err(fault) => {
                *lock(&endpoint.service) = None;
                let next = (index + 1) % self.endpoints.len().max(1);
                // Another call may have found one that answers.
                let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
                Some(endpoint.explained(fault))
            }
        };
        if fault.is_none() {
            // What was wrong elsewhere before this one answered explains nothing any more.
            self.endpoints.iter().for_each(|other| *lock(&other.fault) = None);
        }
        *lock(&endpoint.fault) = fault;
    }

    /// All but KubePrism where nobody has it: what is not there on this node is no clue for who reads of it.
    fn shown(&self) -> impl Iterator<Item = &Endpoint> {
        let is_absent = |endpoint: &Endpoint| {
            endpoint.origin == Origin::KubePrism
                && matches!(&*lock(&endpoint.fault), Some((fault, _)) if fault.cause == Cause::Refused)
        };
        self.endpoints.iter().filter(move |endpoint| !is_absent(endpoint))
    }

    /// What is wrong with the first address, and with the others in words: whether one of them is there is the cluster's matter.
    fn all(&self, last: Fault) -> Fault {
        let faults: Vec<Fault> =
            self.shown().filter_map(|endpoint| Some(lock(&endpoint.fault).clone()?.0)).collect();
        let Some(first) = faults.first() else { return last };
        let texts: Vec<&str> = faults.iter().map(|fault| fault.text.as_str()).collect();
        Fault::new(first.cause, texts.join("; "))
    }
}

impl Lines {
    /// The next one; `None`: the server has ended the stream.
    ///
    /// # Errors
    /// What broke it.
    pub async fn next(&mut self) -> Result<Option<Value>, Fault> {
        let Some(line) = self.lines.next().await else { return Ok(None) };
        let line = line.map_err(|error| match error {
            LinesCodecError::MaxLineLengthExceeded => {
                Fault::new(Cause::Malformed, "a line of the stream has more than 1 MiB")
            }
            LinesCodecError::Io(error) => classify(&self.address, &error),
        })?;
        let value = serde_json::from_str(&line);
        value.map(Some).map_err(|error| {
            Fault::new(Cause::Malformed, format!("a line of the stream is no JSON: {error}"))
        })
    }
}

impl Endpoint {
    /// `limit`: of the call, of which a connection may take a part.
    async fn send(
        &self,
        config: &Config,
        request: Request<Full<Bytes>>,
        limit: Duration,
    ) -> Result<http::Response<Incoming>, Fault> {
        if lock(&self.service).is_none() {
            self.resolve(limit * 2 / 3).await?;
        }
        let service = self.service(config, limit)?;
        service.oneshot(request).await.map_err(|error| classify(&self.address, error.as_ref()))
    }

    /// Resolves a name before a connection is made, so that a silent DNS is not taken for a silent server.
    async fn resolve(&self, limit: Duration) -> Result<(), Fault> {
        let host = self.address.host().unwrap_or_default();
        if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            return Ok(());
        }
        let lookup = lookup_host((host, self.address.port_u16().unwrap_or(443)));
        let fault = |text: String| Fault::new(Cause::Unresolved, format!("{host}: {text}"));
        match timeout(limit, lookup).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(fault(error.to_string())),
            Err(_) => Err(fault(format!("not resolved within {limit:?}"))),
        }
    }

    fn service(&self, config: &Config, limit: Duration) -> Result<Service, Fault> {
        let mut made = lock(&self.service);
        if let Some(service) = &*made {
            return Ok(service.clone());
        }
        let service = connect(&self.address, config, limit)?;
        *made = Some(service.clone());
        Ok(service)
    }

    /// `fault`, or what was answered shortly before where this is silence.
    fn explained(&self, fault: &Fault) -> (Fault, Instant) {
        let is_silence = matches!(fault.cause, Cause::Timeout | Cause::NoAnswer);
        let is_answer = |cause| matches!(cause, Cause::Refused | Cause::Unroutable);
        match &*lock(&self.fault) {
            Some((before, at)) if is_silence && is_answer(before.cause) && at.elapsed() < ECHO => {
                (before.clone(), *at)
            }
            _ => (fault.clone(), Instant::now()),
        }
    }

    fn authority(&self) -> Option<&str> {
        self.address.authority().map(http::uri::Authority::as_str)
    }
}

fn connect(address: &Uri, config: &Config, limit: Duration) -> Result<Service, Fault> {
    let missing = |error: kube::Error| {
        // Its words do not name the file that it was given.
        let folder = config.credentials.display();
        Fault::new(Cause::NoCredentials, format!("the credentials in {folder} cannot be used: {error}"))
    };
    // Without one kube's configuration of TLS would panic, since two are compiled in.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // An error: somebody else has just done it.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    let mut kube = kube::Config::new(address.clone());
    let authority = config.credentials.join("ca.crt");
    for path in [&authority, &config.credentials.join("token")] {
        // A pipe would not end, and kube reads to the end.
        let wrong = |what: String| Fault::new(Cause::NoCredentials, format!("{}: {what}", path.display()));
        let file = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
        if !file.is_file() || file.len() > CREDENTIAL {
            return Err(wrong("no regular file of at most 1 MiB".into()));
        }
        std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    }
    kube.root_cert_file = Some(authority);
    kube.auth_info.token_file = Some(config.credentials.join("token").to_string_lossy().into_owned());
    kube.default_retry = false;
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    // A part of the time of the first call, so that "no connection" can be told from "no answer".
    connector.set_connect_timeout(Some(limit * 2 / 3));
    let connector = kube.rustls_https_connector_with_connector(connector).map_err(missing)?;
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(kube.base_uri_layer())
        .option_layer(kube.auth_layer().map_err(missing)?)
        .map_err(BoxError::from)
        .service(client);
    Ok(BoxCloneSyncService::new(service))
}

fn request(method: Method, path: &str, body: Option<&Value>) -> Result<Request<Full<Bytes>>, Fault> {
    let bytes = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::ACCEPT, HeaderValue::from_static("application/json"))
        .header(header::USER_AGENT, HeaderValue::from_static(concat!("peili/", env!("CARGO_PKG_VERSION"))))
        .header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let request = request.body(Full::new(Bytes::from(bytes)));
    request.map_err(|error| Fault::new(Cause::Malformed, format!("{path} is no path: {error}")))
}

fn seconds(value: &HeaderValue) -> Option<Duration> {
    value.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(600);

    async fn fault(config: &Config) -> Fault {
        Api::new(config).call(Method::GET, "/version", None, SHORT).await.unwrap_err()
    }

    /// Each by what is found first; none takes longer than it may.
    #[tokio::test]
    async fn what_is_wrong_before_a_connection_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |address: &str| Config {
            endpoints: vec![address.into()],
            credentials: folder.path().to_owned(),
            ..Config::default()
        };
        let unresolved = fault(&at("https://no-such-host.invalid:6443")).await;
        assert_eq!(unresolved.cause, Cause::Unresolved, "{unresolved}");
        let none = fault(&at("https://127.0.0.1:1")).await;
        assert_eq!(none.cause, Cause::NoCredentials, "{none}");
        assert!(none.text.contains("ca.crt"), "{none}");
        // A pipe would never end, and what is too long would fill memory.
        std::fs::File::create(folder.path().join("ca.crt")).unwrap().set_len(CREDENTIAL + 1).unwrap();
        assert_eq!(fault(&at("https://127.0.0.1:1")).await.cause, Cause::NoCredentials);
        let nowhere = Config { endpoints: Vec::new(), ..at("") };
        assert_eq!(fault(&nowhere).await.cause, Cause::NoCredentials, "Talos' address is always there");
    }

    #[test]
    fn the_namespace_is_read_once_and_must_be_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { credentials: folder.path().to_owned(), ..Config::default() };
        let api = Api::new(&config);
        assert_eq!(api.namespace().unwrap_err().cause, Cause::NoCredentials);
        for wrong in ["", "a/b", &"a".repeat(600)] {
            std::fs::write(folder.path().join("namespace"), wrong).unwrap();
            assert_eq!(api.namespace().unwrap_err().cause, Cause::NoCredentials, "{wrong}");
        }
        std::fs::write(folder.path().join("namespace"), "peili\n").unwrap();
        assert_eq!(api.namespace().unwrap(), "peili");
        std::fs::remove_file(folder.path().join("namespace")).unwrap();
        assert_eq!(api.namespace().unwrap(), "peili");
        assert_eq!(Api::new(&Config { namespace: "b".into(), ..config }).namespace().unwrap(), "b");
    }

    /// One ICMP answer a second is all that a kernel sends.
    #[test]
    fn an_answer_explains_the_silence_after_it_for_a_while() {
        let api = Api::new(&Config { endpoints: vec!["https://10.0.0.1:1".into()], ..Config::default() });
        let endpoint = &api.endpoints[0];
        let said = |result: Result<StatusCode, Cause>| {
            let result = result.map_err(|cause| Fault::new(cause, "text"));
            api.settle(0, endpoint, &result.as_ref().copied());
            lock(&endpoint.fault).as_ref().map(|(fault, _)| fault.cause)
        };
        assert_eq!(said(Err(Cause::Timeout)), Some(Cause::Timeout));
        assert_eq!(said(Err(Cause::Unroutable)), Some(Cause::Unroutable));
        assert_eq!(said(Err(Cause::Timeout)), Some(Cause::Unroutable));
        assert_eq!(said(Err(Cause::NoAnswer)), Some(Cause::Unroutable));
        assert_eq!(said(Err(Cause::Refused)), Some(Cause::Refused), "another answer");
        assert_eq!(said(Err(Cause::Tls)), Some(Cause::Tls), "no silence");
        assert_eq!(said(Err(Cause::Refused)), Some(Cause::Refused));
        assert_eq!(said(Err(Cause::Timeout)), Some(Cause::Refused));
        if let Some((_, at)) = &mut *lock(&endpoint.fault) {
            *at -= ECHO;
        }
        assert_eq!(said(Err(Cause::Timeout)), Some(Cause::Timeout), "nothing but silence since");
        assert_eq!(said(Err(Cause::Refused)), Some(Cause::Refused));
        assert_eq!(said(Ok(StatusCode::OK)), None);
        assert_eq!(said(Err(Cause::Timeout)), Some(Cause::Timeout), "it was well in between");
    }

    /// An address that answers with errors is not kept where there is another one, and forgets nothing that was not asked for.
    #[test]
    fn addresses_that_do_not_do_are_left() {
        let endpoints = vec!["https://10.0.0.1:1".into(), "https://10.0.0.2:1".into()];
        let api = Api::new(&Config { endpoints, ..Config::default() });
        let settle = |result: Result<StatusCode, Cause>| {
            let (index, endpoint) = api.endpoint().unwrap();
            let result = result.map_err(|cause| Fault::new(cause, endpoint.address.to_string()));
            api.settle(index, endpoint, &result.as_ref().copied());
            (index, api.endpoint().unwrap().0)
        };
        assert_eq!(settle(Ok(StatusCode::OK)), (0, 0));
        assert_eq!(settle(Ok(StatusCode::NOT_FOUND)), (0, 0));
        assert_eq!(settle(Ok(StatusCode::INTERNAL_SERVER_ERROR)), (0, 1));
        assert_eq!(settle(Ok(StatusCode::INTERNAL_SERVER_ERROR)), (1, 0), "not where Talos has one");
        assert_eq!(settle(Err(Cause::Timeout)), (0, 1));
        assert_eq!(settle(Err(Cause::Refused)), (1, 2));
        // What is said is wrong with the first; the others are in the text.
        let all = api.all(Fault::new(Cause::Refused, "last"));
        assert_eq!(all.cause, Cause::Timeout);
        assert!(all.text.contains("10.0.0.1") && all.text.contains("10.0.0.2"), "{all}");
        // Off Talos nobody is at KubePrism's port, which explains nothing.
        assert_eq!(settle(Err(Cause::Refused)), (2, 0));
        let shown = || format!("{} {}", api.all(Fault::new(Cause::Refused, "last")), api.place());
        assert!(!shown().contains("7445"), "{}", shown());
        assert_eq!((settle(Err(Cause::Timeout)), settle(Err(Cause::Timeout))), ((0, 1), (1, 2)));
        assert_eq!(settle(Err(Cause::Tls)), (2, 0));
        assert_eq!(shown().matches("7445").count(), 2, "somebody is there: {}", shown());
        assert_eq!(settle(Ok(StatusCode::OK)), (0, 0));
        assert_eq!(
            api.all(Fault::new(Cause::Refused, "last")).cause,
            Cause::Refused,
            "what was before says nothing"
        );
    }
}
