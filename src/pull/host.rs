//! One registry host: requests with `ns` and, where it asks for one, an anonymous bearer token.

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, RANGE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Client, Response, Url};
use serde::Deserialize;
use tokio::time::timeout;

use crate::oci::{Name, RangeHeader, Registry};
use crate::upstream::hosts;

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

/// A host within one pull, which is of one repository.
pub(super) struct Endpoint {
    pub(super) url: String,
    pub(super) resolve: bool,
    pub(super) pull: bool,
    client: Client,
    elsewhere: hosts::Host,
    name: Name,
    header_limit: Duration,
    /// `ns` is sent to mirrors only, as containerd does.
    is_mirror: bool,
    token: Mutex<Option<HeaderValue>>,
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
    pub(super) fn new(host: &Host, name: Name, header_limit: Duration) -> Self {
        let url = host.url.trim_end_matches('/').to_owned();
        Self {
            is_mirror: is_mirror(&url, &name.registry),
            url,
            resolve: host.resolve,
            pull: host.pull,
            client: host.client.clone(),
            elsewhere: host.elsewhere.clone(),
            name,
            header_limit,
            token: Mutex::default(),
        }
    }

    /// Sends a request for `path` within the repository. An error, and any status above 399, is a reason to go to
    /// the next host.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        offset: u64,
    ) -> Result<Response, String> {
        let mut url = Url::parse(&format!("{}/{}/{path}", self.url, self.name.repository))
            .map_err(|error| format!("not a URL: {error}"))?;
        if self.is_mirror {
            url.query_pairs_mut().append_pair("ns", self.name.registry.as_str());
        }
        let mut asked = false;
        loop {
            let mut request = self.client.request(method.clone(), url.clone()).header(ACCEPT, accept);
            if offset > 0 {
                request = request.header(RANGE, RangeHeader::From(offset).to_string());
            }
            if let Some(token) = self.token() {
                request = request.header(AUTHORIZATION, token);
            }
            let response = self.within(request.send()).await?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED
                && !asked
                && let Some(challenge) = challenge(response.headers())
            {
                asked = true;
                drop(response);
                let token = self.fetch_token(&challenge).await?;
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
                continue;
            }
            if status.as_u16() > 399 {
                return Err(format!("answers {status}"));
            }
            return Ok(response);
        }
    }

    fn token(&self) -> Option<HeaderValue> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    async fn fetch_token(&self, challenge: &Challenge) -> Result<HeaderValue, String> {
        let mut url = Url::parse(&challenge.realm).map_err(|_| "asks for a token from what is no URL")?;
        if url.scheme() != "https" && self.url.starts_with("https:") {
            return Err("asks for a token over plain HTTP".into());
        }
        let scope = format!("repository:{}:pull", self.name.repository);
        url.query_pairs_mut().append_pair("scope", challenge.scope.as_deref().unwrap_or(&scope));
        if let Some(service) = &challenge.service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let prefix = |error: String| format!("its token server: {error}");
        let is_own = Url::parse(&self.url).is_ok_and(|own| own.origin() == url.origin());
        let client = if is_own {
            self.client.clone()
        } else {
            let host = hosts::Host { url: url.to_string(), ..self.elsewhere.clone() };
            let client = tokio::task::spawn_blocking(move || host.client()).await;
            let client = client.map_err(|error| prefix(error.to_string()))?;
            client.map_err(|error| prefix(error.to_string()))?
        };
        let response = self.within(client.get(url).send()).await.map_err(prefix)?;
        if !response.status().is_success() {
            return Err(prefix(format!("answers {}", response.status())));
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

/// Reads a whole body of at most `limit` bytes.
pub(super) async fn read(mut response: Response, limit: usize) -> Result<Vec<u8>, String> {
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
pub(super) fn describe(error: reqwest::Error) -> String {
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

/// The first challenge of the bearer scheme.
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    headers.get_all(WWW_AUTHENTICATE).iter().find_map(|value| parse_challenge(value.to_str().ok()?))
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
