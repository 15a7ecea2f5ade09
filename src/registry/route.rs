//! What a request asks for, read from its path and query.

use std::borrow::Cow;

use http::Uri;

use super::respond::Malformed;
use crate::mirror::Target;
use crate::oci::{Digest, Name, Registry};

/// Tags that one page lists at most; what registries that set a limit use.
const PAGE: usize = 1000;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v2/`: is this a registry?
    Base,
    /// `/v2/NAME/manifests/REFERENCE`
    Manifest(Name, Target),
    /// `/v2/NAME/blobs/DIGEST`
    Blob(Name, Digest),
    /// `/v2/NAME/tags/list`
    Tags(Name, Page),
    /// `/v2/NAME/referrers/DIGEST`
    Referrers(Name, Digest, Option<String>),
}

/// Which part of a tag list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// Tags at most.
    pub(super) limit: usize,
    /// The last tag of the page before.
    pub(super) last: Option<String>,
}

impl Route {
    /// Reads a request; `default` is the registry of one that names none.
    pub(super) fn parse(uri: &Uri, default: &Registry) -> Result<Self, Malformed> {
        let path = decode(uri.path()).ok_or(Malformed::Path)?;
        let rest = match path.strip_prefix("/v2") {
            Some("" | "/") => return Ok(Self::Base),
            Some(rest) => rest.strip_prefix('/').ok_or(Malformed::Path)?,
            None => return Err(Malformed::Path),
        };
        let query = Query::parse(uri.query().unwrap_or_default());
        let name = |text: &str| query.name(text, default);
        let (rest, last) = rest.rsplit_once('/').ok_or(Malformed::Path)?;
        let (repository, endpoint) = rest.rsplit_once('/').ok_or(Malformed::Path)?;
        match (endpoint, last) {
            ("manifests", reference) => Ok(Self::Manifest(name(repository)?, target(reference)?)),
            ("blobs", digest) => {
                Ok(Self::Blob(name(repository)?, digest.parse().map_err(Malformed::Digest)?))
            }
            ("tags", "list") => Ok(Self::Tags(name(repository)?, query.page())),
            ("referrers", digest) => {
                let digest = digest.parse().map_err(Malformed::Digest)?;
                Ok(Self::Referrers(name(repository)?, digest, query.get("artifactType").map(Into::into)))
            }
            _ => Err(Malformed::Path),
        }
    }
}

fn target(reference: &str) -> Result<Target, Malformed> {
    if reference.contains(':') {
        reference.parse().map(Target::Digest).map_err(Malformed::Digest)
    } else {
        reference.parse().map(Target::Tag).map_err(Malformed::Name)
    }
}

struct Query<'a>(Vec<(&'a str, Cow<'a, str>)>);

impl<'a> Query<'a> {
    /// Parameters that cannot be decoded are left out.
    fn parse(text: &'a str) -> Self {
        let pairs = text.split('&').filter_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            Some((key, decode(value)?))
        });
        Self(pairs.collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| *other == key).map(|(_, value)| &**value)
    }

    /// The registry is `ns` (containerd), else the path's first component if that is a host (CRI-O, Podman, BuildKit,
    /// which put the mirror's location before the name), else the default.
    fn name(&self, repository: &str, default: &Registry) -> Result<Name, Malformed> {
        let (registry, repository) = match self.get("ns").filter(|ns| !ns.is_empty()) {
            Some(ns) => (ns.parse().map_err(Malformed::Name)?, repository),
            None => match repository.split_once('/') {
                Some((host, repository)) if Registry::is_host(host) => {
                    (host.parse().map_err(Malformed::Name)?, repository)
                }
                _ => (default.clone(), repository),
            },
        };
        Name::new(registry, repository).map_err(Malformed::Name)
    }

    fn page(&self) -> Page {
        let limit = self.get("n").and_then(|n| n.parse().ok()).unwrap_or(PAGE).min(PAGE);
        Page { limit, last: self.get("last").map(Into::into) }
    }
}

/// Undoes percent encoding. `None`: a broken escape, or not UTF-8.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (high, low) = (char::from(rest.next()?).to_digit(16)?, char::from(rest.next()?).to_digit(16)?);
        bytes.push(u8::try_from(high << 4 | low).ok()?);
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Route, Malformed> {
        Route::parse(&text.parse().expect(text), &"docker.io".parse().unwrap())
    }

    #[test]
    fn registry_of_a_request() {
        let check = |text: &str, expected: &str| {
            let Ok(Route::Manifest(name, Target::Tag(tag))) = parse(text) else { panic!("{text}") };
            assert_eq!(format!("{name}:{tag}"), expected, "{text}");
        };
        check("/v2/library/nginx/manifests/1?ns=docker.io", "docker.io/library/nginx:1");
        check("/v2/nginx/manifests/1", "docker.io/library/nginx:1");
        check("/v2/nginx/manifests/1?ns=", "docker.io/library/nginx:1");
        check("/v2/a/b/manifests/1?x=y&ns=r.io%3A5000", "r.io:5000/a/b:1");
        check("/v2/ghcr.io/a/manifests/1", "ghcr.io/a:1");
        check("/v2/r%3A5000/a/b/manifests/1", "r:5000/a/b:1");
        check("/v2/localhost/a/manifests/1", "localhost/a:1");
        check("/v2/docker.io/nginx/manifests/1", "docker.io/library/nginx:1");
        // With `ns`, the path is all repository, whatever it looks like.
        check("/v2/a.b/c/manifests/1?ns=r.io", "r.io/a.b/c:1");
        check("/v2/blobs/manifests/manifests/1?ns=r.io", "r.io/blobs/manifests:1");
    }

    #[test]
    fn endpoints() {
        let digest = Digest::sha256(b"x");
        let name: Name = "r.io/a".parse().unwrap();
        let at = |path: &str| parse(&format!("/v2/a/{path}ns=r.io")).unwrap();
        assert_eq!(parse("/v2/"), Ok(Route::Base));
        assert_eq!(parse("/v2"), Ok(Route::Base));
        assert_eq!(at(&format!("blobs/{digest}?")), Route::Blob(name.clone(), digest));
        let escaped = digest.to_string().replace(':', "%3a");
        assert_eq!(
            at(&format!("manifests/{escaped}?")),
            Route::Manifest(name.clone(), Target::Digest(digest))
        );
        let page = |limit, last: Option<&str>| Page { limit, last: last.map(Into::into) };
        assert_eq!(at("tags/list?"), Route::Tags(name.clone(), page(1000, None)));
        assert_eq!(at("tags/list?n=2&last=v1&"), Route::Tags(name.clone(), page(2, Some("v1"))));
        assert_eq!(at("tags/list?n=-2&"), Route::Tags(name.clone(), page(1000, None)));
        assert_eq!(
            at(&format!("referrers/{digest}?artifactType=a%2Fb&")),
            Route::Referrers(name, digest, Some("a/b".into()))
        );
    }

    #[test]
    fn refuses_other_paths() {
        for text in [
            "/",
            "*",
            "/v1/",
            "/v2x/",
            "/v2//manifests/1",
            "/v2/manifests/1",
            "/v2/a/manifests/",
            "/v2/a/manifests/..%00",
            "/v2/a/manifests/%zz",
            "/v2/a/manifests/%ff",
            "/v2/A/manifests/1",
            "/v2/a/manifests/1?ns=a_-.io/",
            "/v2/a/blobs/sha256:00",
            "/v2/a/blobs/latest",
            "/v2/a/blobs/md5:00000000000000000000000000000000",
            "/v2/a/blobs/uploads/",
            "/v2/_catalog",
            "/v2/a/tags/other",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
