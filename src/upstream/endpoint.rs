//! One registry host: requests with `ns` and, where it asks for one, a bearer token or a password.
//!
//! Without credentials the token is an anonymous one. It retries nothing but the request that was asked for a token.

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Client, Response, Url};
use serde::Deserialize;
use tokio::time::timeout;

use super::credentials::Credentials;
use super::hosts;
use crate::oci::{
    Algorithm, ByteRange, Descriptor, Digest, MANIFEST_LIMIT, Name, OCTET_STREAM, RangeHeader, Registry,
    Repository,
};

/// Largest answer of a token server that is read. Docker Hub's have 3 to 5 KiB.
const TOKEN_LIMIT: usize = 256 << 10;

/// A host to pull from, with the capabilities that `hosts.toml` gives it.
#[derive(Clone, Debug)]
pub struct Host {
    /// Base URL up to and including `/v2`.
    pub url: String,
    /// It may be asked what a tag stands for.
    pub resolve: bool,
    /// It may be asked for content by digest.
    pub pull: bool,
    /// The client with the host's CA, client certificate, headers and timeouts.
    pub client: Client,
    /// For token servers elsewhere: what this host is sent, and what it is forgiven, is not theirs.
    elsewhere: hosts::Host,
}

/// A host and one of its repositories.
pub struct Endpoint {
    host: Host,
    repository: Repository,
    /// The registry that it is asked about: sent as `ns`, and to mirrors only, as containerd does.
    about: Option<Registry>,
    header_limit: Duration,
    credentials: Option<Credentials>,
    /// The last `Authorization` that was asked for.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Why a host gives no answer that is of use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendError {
    /// A status above 399, and how long the host wants to be left alone.
    Status(StatusCode, Option<Duration>),
    /// The same of the server that gives its tokens.
    Token(StatusCode, Option<Duration>),
    /// It cannot be reached, does not answer in time, or does not speak as it should.
    Failed(String),
}

/// How a host asks who asks.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Token(Challenge),
    Password,
}

/// What a `WWW-Authenticate` header of the bearer scheme asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Challenge {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Host {
    /// A host as it is configured. Reads its certificates and blocks.
    ///
    /// # Errors
    /// A certificate, key or header that cannot be used.
    pub fn new(host: &hosts::Host) -> Result<Self, hosts::Error> {
        Ok(Self {
            url: host.url.clone(),
            resolve: host.resolve,
            pull: host.pull,
            client: host.client()?,
            elsewhere: hosts::Host { skip_verify: false, ..host.anonymous() },
        })
    }

    /// The hosts that `config_path` gives for a registry, the registry itself last. Reads files and blocks.
    ///
    /// # Errors
    /// A configuration that cannot be read or used; containerd would not pull either.
    pub fn load(dirs: &[PathBuf], registry: &Registry) -> Result<Vec<Self>, hosts::Error> {
        hosts::load(dirs, registry)?.iter().map(Self::new).collect()
    }
}

impl Endpoint {
    /// The repository of `name` at `host`, which is told of what registry it is, if it is a mirror. A header must come within
    /// `header_limit`.
    pub fn mirroring(host: &Host, name: &Name, header_limit: Duration) -> Self {
        let about = is_mirror(&host.url, &name.registry).then(|| name.registry.clone());
        Self { about, ..Self::new(host, name.repository.clone(), None, header_limit) }
    }

    /// A repository at `host`, which is told who asks if it wants to know.
    pub fn new(
        host: &Host,
        repository: Repository,
        credentials: Option<Credentials>,
        header_limit: Duration,
    ) -> Self {
        let host = Host { url: host.url.trim_end_matches('/').to_owned(), ..host.clone() };
        Self { host, repository, about: None, header_limit, credentials, authorization: Mutex::default() }
    }

    /// Base URL up to and including `/v2`.
    pub fn url(&self) -> &str {
        &self.host.url
    }

    /// Whether it may be asked what a tag stands for.
    pub fn resolves(&self) -> bool {
        self.host.resolve
    }

    /// Whether it may be asked for content by digest.
    pub fn pulls(&self) -> bool {
        self.host.pull
    }

    /// Sends a request for `path` within the repository.
    ///
    /// # Errors
    /// Any status above 399 is one: a reason to go to the next host.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        range: Option<RangeHeader>,
    ) -> Result<Response, SendError> {
        let mut url = Url::parse(&format!("{}/{}/{path}", self.host.url, self.repository))
            .map_err(|error| format!("not a URL: {error}"))?;
        if let Some(registry) = &self.about {
            url.query_pairs_mut().append_pair("ns", registry.as_str());
        }
        let (mut asked, mut dropped) = (false, false);
        loop {
            let mut request = self.host.client.request(method.clone(), url.clone()).header(ACCEPT, accept);
            if let Some(range) = range {
                request = request.header(RANGE, range.to_string());
            }
            if let Some(authorization) = self.authorization() {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.within(request.send()).await?;
            let status = response.status();
            // Some registries say so of a token that has ended.
            if status == StatusCode::FORBIDDEN && !dropped && self.forget() {
                dropped = true;
                continue;
            }
            // Who is asked elsewhere, by a redirect, is not told who asks.
            if status == StatusCode::UNAUTHORIZED
                && !asked
                && response.url().origin() == url.origin()
                && let Some(authorization) = self.authorize(response.headers()).await?
            {
                asked = true;
                *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
                continue;
            }
            if status.as_u16() > 399 {
                return Err(SendError::Status(status, retry_after(response.headers())));
            }
            return Ok(response);
        }
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Drops what was asked for last; tells whether there was something.
    fn forget(&self) -> bool {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// What the host wants to see; `None`: it does not say, or wants a password that nobody has.
    async fn authorize(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, SendError> {
        match challenge(headers) {
            Some(Asked::Token(challenge)) => self.fetch_token(&challenge).await.map(Some),
            Some(Asked::Password) => match &self.credentials {
                Some(credentials) => Ok(Some(credentials.basic().await?)),
                None => Ok(None),
            },
            None => Ok(None),
        }
    }

    async fn within(
        &self,
        answer: impl Future<Output = reqwest::Result<Response>>,
    ) -> Result<Response, String> {
        match timeout(self.header_limit, answer).await {
            Ok(answer) => answer.map_err(describe),
            Err(_) => Err(format!("no answer within {}", humantime::format_duration(self.header_limit))),
        }
    }

    async fn fetch_token(&self, challenge: &Challenge) -> Result<HeaderValue, SendError> {
        let mut url =
            Url::parse(&challenge.realm).map_err(|_| "asks for a token from what is no URL".to_owned())?;
        let is_own = Url::parse(&self.host.url).is_ok_and(|own| own.origin() == url.origin());
        let is_secret = self.credentials.is_some() && !is_own;
        if url.scheme() != "https" && (self.host.url.starts_with("https:") || is_secret) {
            return Err("asks for a token over plain HTTP".to_owned().into());
        }
        let scope = format!("repository:{}:pull", self.repository);
        url.query_pairs_mut().append_pair("scope", challenge.scope.as_deref().unwrap_or(&scope));
        if let Some(service) = &challenge.service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let prefix = |error: String| format!("its token server: {error}");
        let client = if is_own {
            self.host.client.clone()
        } else {
            let host = hosts::Host { url: url.to_string(), ..self.host.elsewhere.clone() };
            let client = tokio::task::spawn_blocking(move || host.client()).await;
            let client = client.map_err(|error| prefix(error.to_string()))?;
            client.map_err(|error| prefix(error.to_string()))?
        };
        let mut request = client.get(url);
        if let Some(credentials) = &self.credentials {
            request = request.header(AUTHORIZATION, credentials.basic().await?);
        }
        let response = self.within(request.send()).await.map_err(prefix)?;
        if !response.status().is_success() {
            return Err(SendError::Token(response.status(), retry_after(response.headers())));
        }
        let body = timeout(self.header_limit, read(response, TOKEN_LIMIT))
            .await
            .map_err(|_| prefix("stalls".into()))?
            .map_err(prefix)?;
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| prefix("its answer is not JSON".into()))?;
        let token = answer.token.or(answer.access_token).ok_or_else(|| prefix("gives no token".into()))?;
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| prefix("its token is no header value".into()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl From<String> for SendError {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status, _) => write!(f, "answers {status}"),
            Self::Token(status, _) => write!(f, "its token server: answers {status}"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

/// How many bytes of the body come before `offset`, since a host may ignore the range, and the size of the whole content. An
/// answer that cannot be the rest of this content is refused before a byte of it is taken. `size`: what it must be.
///
/// # Errors
/// What is wrong with the answer.
pub fn begin(response: &Response, offset: u64, size: Option<u64>) -> Result<(u64, u64), String> {
    let headers = response.headers();
    let right = |stated: u64| match size {
        Some(size) if size != stated => Err(format!("offers {stated} bytes where the content has {size}")),
        _ => Ok(stated),
    };
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let (range, stated) = header(headers, CONTENT_RANGE.as_str())
                .and_then(ByteRange::parse_content_range)
                .ok_or("answers a range without a usable Content-Range")?;
            let stated = right(stated)?;
            if range.start != offset {
                return Err(format!("answers from byte {} when asked from byte {offset}", range.start));
            }
            Ok((0, stated))
        }
        StatusCode::OK => match (content_length(headers), size) {
            (Some(stated), _) => Ok((offset, right(stated)?)),
            (None, Some(size)) => Ok((offset, size)),
            (None, None) => Err("does not say how many bytes it sends".into()),
        },
        status => Err(format!("answers {status}")),
    }
}

/// A header as text.
fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// `Content-Length`.
pub fn content_length(headers: &HeaderMap) -> Option<u64> {
    header(headers, CONTENT_LENGTH.as_str())?.parse().ok()
}

/// What a name stands for: by the head of an answer to HEAD, or where that does not tell, by the content. `ask` sends a request,
/// and `cut` makes an error of a body that is of no use.
///
/// # Errors
/// Those of `ask` and `cut`.
pub async fn target<'a, E>(
    ask: impl Fn(Method) -> BoxFuture<'a, Result<Response, E>>,
    cut: impl Fn(String) -> E,
    algorithm: Algorithm,
    stall: Duration,
) -> Result<Descriptor, E> {
    let head = ask(Method::HEAD).await?;
    let said = described(head.headers());
    let target = match said {
        Some(target) => target,
        None => {
            let response = ask(Method::GET).await?;
            let media_type = media_type(response.headers()).to_owned();
            let limit = usize::try_from(MANIFEST_LIMIT).unwrap_or(usize::MAX);
            let content = match timeout(stall, read(response, limit)).await {
                Ok(content) => content.map_err(&cut)?,
                Err(_) => return Err(cut("stalls in the body of a manifest".into())),
            };
            Descriptor::new(Digest::of(algorithm, &content), content.len() as u64, &media_type)
        }
    };
    if target.size > MANIFEST_LIMIT {
        return Err(cut(format!("offers a manifest of {} bytes, more than 4 MiB", target.size)));
    }
    Ok(target)
}

/// What the head of an answer about a manifest says that it is; registries need not say.
fn described(headers: &HeaderMap) -> Option<Descriptor> {
    let digest: Digest = header(headers, "docker-content-digest")?.parse().ok()?;
    let size = content_length(headers).filter(|size| *size > 0)?;
    Some(Descriptor::new(digest, size, media_type(headers)))
}

/// The media type without parameters.
pub fn media_type(headers: &HeaderMap) -> &str {
    let text = header(headers, CONTENT_TYPE.as_str()).unwrap_or(OCTET_STREAM);
    text.split(';').next().unwrap_or(text).trim()
}

/// `Retry-After` in seconds; the form with a date is not taken.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    header(headers, RETRY_AFTER.as_str())?.trim().parse().ok().map(Duration::from_secs)
}

/// Reads a whole body of at most `limit` bytes.
///
/// # Errors
/// It is longer, or ends early.
pub async fn read(mut response: Response, limit: usize) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(describe)? {
        if body.len() + chunk.len() > limit {
            return Err(format!("sends more than {limit} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The error with its causes, on one line and without the URL, which may carry a signature of a storage service.
pub fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Several layers repeat their cause in their own text.
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// Whether a host is another than the registry itself; `registry-1.docker.io` is Docker Hub's own.
fn is_mirror(url: &str, registry: &Registry) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split('/').next().unwrap_or(authority);
    let own = registry.as_str();
    authority != own && !(own == "docker.io" && authority == "registry-1.docker.io")
}

/// The first challenge of the bearer scheme, else one for a password.
fn challenge(headers: &HeaderMap) -> Option<Asked> {
    let texts = || headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let is_basic =
        |text: &str| text.split(' ').next().is_some_and(|scheme| scheme.eq_ignore_ascii_case("basic"));
    let token = texts().find_map(parse_challenge).map(Asked::Token);
    token.or_else(|| texts().any(is_basic).then_some(Asked::Password))
}

/// `Bearer realm="...",service="...",scope="..."` (RFC 6750 section 3), values quoted or not.
fn parse_challenge(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut challenge = Challenge::default();
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        let Some((key, after)) = rest.split_once('=') else { break };
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_at(after.find(',').unwrap_or(after.len())),
        };
        match key.to_ascii_lowercase().as_str() {
            "realm" => challenge.realm = value.into(),
            "service" => challenge.service = Some(value.into()),
            "scope" => challenge.scope = Some(value.into()),
            _ => {}
        }
        rest = after;
    }
    (!challenge.realm.is_empty()).then_some(challenge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let challenge = parse_challenge(
            r#"bearer realm="https://auth.x.io/token",service="registry.x.io",scope="repository:a/b:pull,push""#,
        );
        let expected = Challenge {
            realm: "https://auth.x.io/token".into(),
            service: Some("registry.x.io".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(challenge, Some(expected));
        let challenge = parse_challenge("Bearer realm=https://x/t, error=\"invalid_token\"").unwrap();
        assert_eq!((challenge.realm.as_str(), challenge.service), ("https://x/t", None));
        for text in ["", "Bearer", "Basic realm=\"x\"", "Bearer service=\"x\"", "Bearer realm=\"x"] {
            assert_eq!(parse_challenge(text), None, "{text}");
        }
    }

    #[test]
    fn a_registry_is_not_its_own_mirror() {
        let check = |url: &str, registry: &str| is_mirror(url, &registry.parse().unwrap());
        assert!(!check("https://ghcr.io/v2", "ghcr.io"));
        assert!(!check("https://registry-1.docker.io/v2", "docker.io"));
        assert!(check("http://127.0.0.1:5000/v2", "docker.io"));
        assert!(check("https://registry-1.docker.io/v2", "ghcr.io"));
    }
}
