//! The upstreams of the configuration: registries that the mirror itself fetches from, by its operator's credentials.
//!
//! Which content comes from which is a plan's to say; address, authorities and password are never. It verifies nothing and
//! chooses nothing; it keeps to what each upstream may be asked for, and remembers how each does.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::{FutureExt, StreamExt};
use http::{Method, StatusCode};
use reqwest::{Response, Url};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use super::credentials::Credentials;
use super::endpoint::{self, Endpoint, Host, SendError, content_length, describe, media_type};
use super::health::State;
use super::hosts;
use super::metrics::Metrics;
use super::{FetchError, Fetched, Known, Route, Upstreams, Want, lock};
use crate::oci::{
    Algorithm, ByteRange, Descriptor, Health, MANIFEST_LIMIT, MANIFEST_MEDIA_TYPES, RangeHeader, Repository,
    Tag,
};

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(2);
/// How long the head of an answer may take. A token costs as much once more.
const HEADER: Duration = Duration::from_secs(5);
/// Time without a byte after which a body counts as cut.
const STALL: Duration = Duration::from_secs(10);
/// Repositories of one upstream whose tokens are kept. Requests name them.
const REPOSITORIES: usize = 256;

/// An upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Its name in plans, status and metrics: lower-case letters, digits and `-`.
    pub name: String,
    /// Where it is: `https://registry.corp.example`, with a path if it has one. Plain `http` without credentials only, except
    /// on loopback.
    pub address: String,
    /// PEM file of authorities that are trusted beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// File with the password, in the form of Docker's config.json, as Kubernetes mounts pull secrets. Whoever may pull
    /// through this node gets what it opens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<PathBuf>,
    /// Prefixes of the repositories that may be taken from it, as they are called there: `dockerhub/library`. `/` is before
    /// all.
    pub repositories: Vec<String>,
}

impl Config {
    /// Whether the address keeps what is sent there: it is `https`, or on loopback. `None`: it is no address.
    pub fn is_secure(&self) -> Option<bool> {
        let url = Url::parse(&self.address).ok()?;
        let host = url.host_str()?;
        let is_plain = url.username().is_empty() && url.password().is_none();
        if !is_plain || url.query().is_some() || url.fragment().is_some() {
            return None;
        }
        match url.scheme() {
            "https" => Some(true),
            "http" => Some(hosts::is_loopback(host)),
            _ => None,
        }
    }
}

/// The configured upstreams. Clones share them.
#[derive(Clone)]
pub struct Named {
    set: Arc<ArcSwap<Vec<Arc<One>>>>,
    metrics: Metrics,
}

struct One {
    name: Arc<str>,
    config: Config,
    repositories: Arc<[String]>,
    /// Made when it is first needed, and anew after a failure: certificates may have come or changed.
    host: Mutex<Option<Host>>,
    endpoints: Mutex<HashMap<Repository, Arc<Endpoint>>>,
    state: Mutex<State>,
}

impl Named {
    /// None yet.
    pub fn new(metrics: Metrics) -> Self {
        Self { set: Arc::default(), metrics }
    }

    /// Uses those of `configs` from now on. One that is the same keeps what is known of it.
    pub fn reconfigure(&self, configs: &[Config]) {
        let old = self.set.load();
        let set = configs.iter().map(|config| {
            let same = old.iter().find(|one| one.config == *config);
            same.map_or_else(|| Arc::new(One::new(config.clone())), Arc::clone)
        });
        self.set.store(Arc::new(set.collect()));
    }

    fn one(&self, route: &Route) -> Result<Arc<One>, FetchError> {
        let set = self.set.load();
        let one = set.iter().find(|one| one.name == route.upstream).ok_or(FetchError::Unknown)?;
        let is_allowed = one.repositories.iter().any(|prefix| route.repository.is_below(prefix));
        if is_allowed { Ok(Arc::clone(one)) } else { Err(FetchError::Unknown) }
    }
}

#[async_trait]
impl Upstreams for Named {
    fn is_empty(&self) -> bool {
        self.set.load().is_empty()
    }

    fn known(&self) -> Arc<[Known]> {
        let set = self.set.load();
        let known = |one: &Arc<One>| Known {
            name: Arc::clone(&one.name),
            repositories: Arc::clone(&one.repositories),
            state: one.state().now(Instant::now()),
        };
        set.iter().map(known).collect()
    }

    async fn resolve(&self, route: &Route, tag: &Tag) -> Result<Descriptor, FetchError> {
        let one = self.one(route)?;
        let result = one.resolve(&route.repository, tag).await;
        self.metrics.asked(&one.name, &result);
        result
    }

    async fn fetch(&self, route: &Route, want: &Want) -> Result<Fetched, FetchError> {
        let one = self.one(route)?;
        let result = one.fetch(&route.repository, want).await;
        self.metrics.asked(&one.name, &result);
        let received = self.metrics.bytes(&one.name);
        result.map(|fetched| Fetched {
            body: fetched
                .body
                .inspect(move |chunk| {
                    if let Ok(chunk) = chunk {
                        received.inc_by(chunk.len() as u64);
                    }
                })
                .boxed(),
            ..fetched
        })
    }

    fn blame(&self, upstream: &str, problem: &str) {
        if let Some(one) = self.set.load().iter().find(|one| *one.name == *upstream) {
            one.failed(Health::Degraded, problem.to_owned());
        }
    }
}

impl One {
    fn new(config: Config) -> Self {
        Self {
            name: config.name.as_str().into(),
            repositories: config.repositories.clone().into(),
            config,
            host: Mutex::default(),
            endpoints: Mutex::default(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Base of the API.
    fn url(&self) -> String {
        let address = self.config.address.trim_end_matches('/');
        if address.ends_with("/v2") { address.to_owned() } else { format!("{address}/v2") }
    }

    async fn endpoint(&self, repository: &Repository) -> Result<Arc<Endpoint>, String> {
        if let Some(endpoint) = lock(&self.endpoints).get(repository) {
            return Ok(Arc::clone(endpoint));
        }
        let host = self.host().await?;
        let authority = Url::parse(&host.url).ok().and_then(|url| {
            let name = url.host_str()?.to_owned();
            Some(url.port().map_or(name.clone(), |port| format!("{name}:{port}")))
        });
        let path = self.config.credentials.clone();
        let credentials = path.zip(authority).map(|(path, authority)| Credentials::new(path, authority));
        let endpoint = Arc::new(Endpoint::new(&host, repository.clone(), credentials, HEADER));
        let mut endpoints = lock(&self.endpoints);
        // All tokens are asked for anew then, which costs a request each.
        if endpoints.len() >= REPOSITORIES {
            endpoints.clear();
        }
        endpoints.insert(repository.clone(), Arc::clone(&endpoint));
        Ok(endpoint)
    }

    async fn host(&self) -> Result<Host, String> {
        if let Some(host) = lock(&self.host).clone() {
            return Ok(host);
        }
        let host = hosts::Host {
            ca: self.config.ca.iter().cloned().collect(),
            dial_timeout: Some(CONNECT),
            ..hosts::Host::new(&self.url())
        };
        let made = tokio::task::spawn_blocking(move || Host::new(&host)).await;
        let made = made.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        *lock(&self.host) = Some(made.clone());
        Ok(made)
    }

    /// One request, and what it says about how this upstream does.
    async fn send(
        &self,
        repository: &Repository,
        method: Method,
        path: &str,
        range: Option<RangeHeader>,
        is_manifest: bool,
    ) -> Result<Response, FetchError> {
        if !self.state().admit(Instant::now()) {
            return Err(FetchError::Held);
        }
        let began = Instant::now();
        let endpoint = self.endpoint(repository).await.map_err(|reason| self.unreachable(reason))?;
        let accept = if is_manifest { MANIFEST_MEDIA_TYPES.join(", ") } else { "*/*".into() };
        let error = match endpoint.send(method, path, &accept, range).await {
            Ok(response) => {
                self.state().answered(began.elapsed(), began);
                return Ok(response);
            }
            Err(error) => error,
        };
        Err(match error {
            SendError::Status(StatusCode::NOT_FOUND | StatusCode::GONE, _) => {
                self.state().answered(began.elapsed(), began);
                FetchError::NotFound
            }
            SendError::Status(StatusCode::RANGE_NOT_SATISFIABLE, _) => {
                self.state().answered(began.elapsed(), began);
                FetchError::Range
            }
            SendError::Status(StatusCode::TOO_MANY_REQUESTS, pause)
            | SendError::Token(StatusCode::TOO_MANY_REQUESTS, pause) => {
                self.state().limited(pause, Instant::now());
                FetchError::Held
            }
            // Of this repository, and not of all.
            SendError::Status(status, _) | SendError::Token(status, _) if status.is_client_error() => {
                let problem = format!("{error} for {repository}");
                self.note(&problem);
                self.state().refused(problem, began.elapsed(), began);
                FetchError::Refused(error.to_string())
            }
            SendError::Status(..) | SendError::Token(..) => {
                self.failed(Health::Degraded, error.to_string());
                FetchError::Failed(error.to_string())
            }
            SendError::Failed(reason) => self.unreachable(reason),
        })
    }

    fn unreachable(&self, reason: String) -> FetchError {
        self.failed(Health::Unreachable, reason.clone());
        *lock(&self.host) = None;
        lock(&self.endpoints).clear();
        FetchError::Failed(reason)
    }

    fn failed(&self, health: Health, problem: String) {
        self.note(&problem);
        self.state().failed(health, problem, Instant::now());
    }

    /// To the log, once for each change.
    fn note(&self, problem: &str) {
        if self.state().problem.as_deref() != Some(problem) {
            tracing::warn!(upstream = %self.name, problem, "an upstream does not do as it should");
        }
    }

    async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Descriptor, FetchError> {
        let path = format!("manifests/{tag}");
        let ask = |method| self.send(repository, method, &path, None, true).boxed();
        endpoint::target(ask, |reason| self.cut(reason), Algorithm::Sha256, STALL).await
    }

    /// An answer of no use, which says nothing about others.
    fn cut(&self, reason: String) -> FetchError {
        self.note(&reason);
        self.state().noted(reason.clone(), Instant::now());
        FetchError::Failed(reason)
    }

    /// The whole body of a manifest, which need not say how long it is.
    async fn manifest(&self, response: Response) -> Result<Vec<u8>, FetchError> {
        let limit = usize::try_from(MANIFEST_LIMIT).unwrap_or(usize::MAX);
        match timeout(STALL, endpoint::read(response, limit)).await {
            Ok(Ok(content)) => Ok(content),
            Ok(Err(reason)) => Err(self.cut(reason)),
            Err(_) => Err(self.cut("the body of a manifest stalls".into())),
        }
    }

    async fn fetch(self: &Arc<Self>, repository: &Repository, want: &Want) -> Result<Fetched, FetchError> {
        let Want { digest, is_manifest, start, end, head } = *want;
        let path = format!("{}/{digest}", if is_manifest { "manifests" } else { "blobs" });
        if head {
            let response = self.send(repository, Method::HEAD, &path, None, is_manifest).await?;
            let size = content_length(response.headers())
                .ok_or_else(|| self.cut("a HEAD without a Content-Length".into()))?;
            let descriptor = Descriptor::new(digest, size, media_type(response.headers()));
            let range = ByteRange::whole(size);
            return Ok(Fetched { descriptor, range, body: futures::stream::empty().boxed() });
        }
        let range = match (start, end) {
            (0, None) => None,
            (start, None) => Some(RangeHeader::From(start)),
            (start, Some(end)) => Some(RangeHeader::Between(start, end.saturating_sub(1))),
        };
        let response = self.send(repository, Method::GET, &path, range, is_manifest).await?;
        if is_manifest {
            let media_type = media_type(response.headers()).to_owned();
            let content = self.manifest(response).await?;
            let descriptor = Descriptor::new(digest, content.len() as u64, &media_type);
            let range = ByteRange::whole(descriptor.size);
            let body = futures::stream::iter([Ok(content.into())]).boxed();
            return Ok(Fetched { descriptor, range, body });
        }
        let (skip, size) = endpoint::begin(&response, start, None).map_err(|reason| self.cut(reason))?;
        if start > size || (start == size && size > 0) {
            return Err(FetchError::Range);
        }
        let range = ByteRange { start, end: end.unwrap_or(size).min(size) };
        let descriptor = Descriptor::new(digest, size, media_type(response.headers()));
        let body = Body { one: Arc::clone(self), response, skip, left: range.len() };
        Ok(Fetched { descriptor, range, body: body.into_stream() })
    }
}

/// The rest of an answer.
struct Body {
    one: Arc<One>,
    response: Response,
    /// Bytes that were not asked for.
    skip: u64,
    left: u64,
}

impl Body {
    fn into_stream(self) -> futures::stream::BoxStream<'static, io::Result<bytes::Bytes>> {
        futures::stream::try_unfold(self, |mut body| async move {
            Ok(body.next().await?.map(|chunk| (chunk, body)))
        })
        .boxed()
    }

    async fn next(&mut self) -> io::Result<Option<bytes::Bytes>> {
        while self.left > 0 {
            let mut chunk = match timeout(STALL, self.response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => return Err(self.cut("a body ends early".into())),
                Ok(Err(error)) => return Err(self.cut(describe(error))),
                Err(_) => {
                    let reason = format!("a body stalls for {} s", STALL.as_secs());
                    self.one.failed(Health::Degraded, reason.clone());
                    return Err(io::Error::other(reason));
                }
            };
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(chunk.len());
            drop(chunk.split_to(skipped));
            self.skip -= skipped as u64;
            chunk.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
            if !chunk.is_empty() {
                self.left -= chunk.len() as u64;
                return Ok(Some(chunk));
            }
        }
        Ok(None)
    }

    /// No reason to leave it alone: the rest is asked for at once.
    fn cut(&self, reason: String) -> io::Error {
        self.one.note(&reason);
        self.one.state().noted(reason.clone(), Instant::now());
        io::Error::other(reason)
    }
}
