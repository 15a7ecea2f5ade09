//! A user and a password from a file in the form of Docker's `config.json`, as Kubernetes mounts pull secrets
//! (`.dockerconfigjson`).
//!
//! Read whenever a registry asks, so that a rotated secret counts at once. Credential helpers and identity tokens are not
//! supported.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde::Deserialize;

use super::hosts;

/// Names of Docker Hub in such files, and the one that it is reached by.
const DOCKER_HUB: [&str; 3] = ["index.docker.io", "docker.io", "registry-1.docker.io"];

/// Where the password of one registry is. Prints as its path.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    path: PathBuf,
    /// `host[:port]` of the registry.
    authority: String,
}

#[derive(Deserialize)]
struct File {
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl Credentials {
    /// Those for `authority` (`host[:port]`) in the file at `path`.
    pub fn new(path: PathBuf, authority: String) -> Self {
        Self { path, authority }
    }

    /// The value of an `Authorization` header of the basic scheme.
    ///
    /// # Errors
    /// The file cannot be used, or has nothing for this registry. No text of it is told.
    pub async fn basic(&self) -> Result<HeaderValue, String> {
        let (path, authority) = (self.path.clone(), self.authority.clone());
        let read = tokio::task::spawn_blocking(move || read(&path, &authority)).await;
        read.unwrap_or_else(|error| Err(error.to_string()))
            .map_err(|reason| format!("credentials {}: {reason}", self.path.display()))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

fn read(path: &Path, authority: &str) -> Result<HeaderValue, String> {
    let bytes = hosts::read(path).map_err(|error| error.to_string())?.ok_or("there is no such file")?;
    let pair = parse(&bytes, authority)?;
    let mut value = HeaderValue::from_str(&format!("Basic {pair}")).map_err(|_| "it is not base64")?;
    value.set_sensitive(true);
    Ok(value)
}

/// `user:password` in base64.
fn parse(bytes: &[u8], authority: &str) -> Result<String, String> {
    // The error of the parser could show what is in the file.
    let file: File = serde_json::from_slice(bytes)
        .map_err(|error| format!("line {}: not Docker's config.json with `auths`", error.line()))?;
    let is_hub = DOCKER_HUB.contains(&authority);
    let parts = |key: &str| -> (String, String) {
        let key = key.split_once("://").map_or(key, |(_, rest)| rest);
        let (host, path) = key.split_once('/').unwrap_or((key, ""));
        (host.to_owned(), path.trim_matches('/').to_owned())
    };
    let of_it = file.auths.into_iter().filter(|(key, _)| {
        let (host, path) = parts(key);
        // What Docker Desktop keeps beside its passwords.
        let is_token = path.ends_with("access-token") || path.ends_with("refresh-token");
        !is_token && (host == authority || is_hub && DOCKER_HUB.contains(&host.as_str()))
    });
    // The one for the host itself before those for a part of it.
    let entry = of_it.min_by_key(|(key, _)| parts(key).1.len());
    let (_, entry) = entry.ok_or_else(|| format!("`auths` has no entry for {authority}"))?;
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    match (filled(entry.auth), filled(entry.username), filled(entry.password)) {
        (Some(auth), ..) => Ok(auth.trim().to_owned()),
        (None, Some(user), Some(password)) => Ok(STANDARD.encode(format!("{user}:{password}"))),
        _ if filled(entry.identitytoken).is_some() => {
            Err(format!("the entry for {authority} is an identity token, and a password is needed"))
        }
        _ => Err(format!("the entry for {authority} has no password")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_host() {
        let file = br#"{"auths": {
            "https://index.docker.io/v1/access-token": {"auth": "eDp5"},
            "https://index.docker.io/v1/": {"auth": "aHViOng="}, "r.test:5000/a": {"auth": "eDp5"},
            "r.test:5000": {"username": "me", "password": "secret"},
            "t.test": {"identitytoken": "secret"}, "e.test": {}
        }}"#;
        let parse = |authority: &str| parse(file, authority);
        assert_eq!(parse("registry-1.docker.io").unwrap(), "aHViOng=");
        assert_eq!(parse("r.test:5000").unwrap(), STANDARD.encode("me:secret"));
        for authority in ["r.test", "t.test", "e.test", "x.test"] {
            let error = parse(authority).unwrap_err();
            assert!(error.contains(authority) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn errors_tell_nothing_of_the_file() {
        let error = parse(b"{\"auths\":\n \"hunter2\"}", "r.test").unwrap_err();
        assert_eq!(error, "line 2: not Docker's config.json with `auths`");
    }
}
