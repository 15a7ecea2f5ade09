//! Names of images: registry, repository, tag and digest, by the grammar of the OCI distribution specification
//! ("Pulling manifests") and the familiar forms of Docker Hub.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::Digest;

/// Longest host name with a port: 255 (RFC 1035) and `:65535`.
const REGISTRY_LIMIT: usize = 255 + 6;
/// The limit that registries and containerd share for a repository's name.
const REPOSITORY_LIMIT: usize = 255;
/// Distribution specification: a tag is at most 128 characters.
const TAG_LIMIT: usize = 128;
/// `host[:port]` of Docker Hub in image names and in containerd's `ns`.
const DOCKER_HUB: &str = "docker.io";

/// `host[:port]` of a registry as it stands in image names, in lower case: `docker.io`, `registry.local:5000`, `[::1]:5000`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Registry(Arc<str>);

/// The name of a repository within its registry: `library/nginx`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository(Arc<str>);

/// A tag: `1.27-alpine`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Arc<str>);

/// A repository and its registry: `docker.io/library/nginx`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// The registry.
    pub registry: Registry,
    /// The repository within it.
    pub repository: Repository,
}

/// The full name of an image: at least one of tag and digest is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Registry and repository.
    pub name: Name,
    /// The tag, if it has one.
    pub tag: Option<Tag>,
    /// The digest, if it has one; it decides where both are there.
    pub digest: Option<Digest>,
}

/// Why a text is not a name of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Not `host` or `host:port`.
    #[error("`{0}` is not a registry: a host name or address, with an optional port")]
    Registry(String),
    /// Not a repository by the specification's grammar.
    #[error(
        "`{0}` is not a repository: lower-case letters, digits and single separators, at most 255 characters"
    )]
    Repository(String),
    /// Not a tag by the specification's grammar.
    #[error("`{0}` is not a tag: letters, digits, `_`, `.` and `-`, at most 128 characters")]
    Tag(String),
    /// A digest that cannot be read.
    #[error(transparent)]
    Digest(#[from] super::DigestError),
    /// No registry where one is needed, as in the names that an import makes.
    #[error("`{0}` names no registry")]
    NoRegistry(String),
}

impl Registry {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Without the port: what containerd puts into `containerd.io/distribution.source.HOST`.
    pub fn host(&self) -> &str {
        match self.0.rfind(':') {
            Some(colon) if !self.0[colon..].contains(']') => &self.0[..colon],
            _ => &self.0,
        }
    }

    /// Whether `text`, the first component of a path, is a host and not a part of a repository: it has a dot or a
    /// colon, or is `localhost`. The rule of Docker's and containerd's references.
    pub fn is_host(text: &str) -> bool {
        text.contains(['.', ':']) || text == "localhost"
    }
}

impl FromStr for Registry {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let error = || ReferenceError::Registry(shorten(text));
        if text.is_empty() || text.len() > REGISTRY_LIMIT {
            return Err(error());
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or_else(error)?;
                address.parse::<std::net::Ipv6Addr>().map_err(|_| error())?;
                ("", if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(error)?) })
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !text.starts_with('[') && !host.split('.').all(label) {
            return Err(error());
        }
        if let Some(port) = port {
            let digits = (1..=5).contains(&port.len()) && port.bytes().all(|c| c.is_ascii_digit());
            if !digits || port.parse::<u16>().is_err() {
                return Err(error());
            }
        }
        let text = text.to_ascii_lowercase();
        Ok(Self(if text == "index.docker.io" { DOCKER_HUB.into() } else { text.into() }))
    }
}

impl Repository {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is `prefix` or below it. A prefix is of whole parts of the path; `/` is before all.
    pub fn is_below(&self, prefix: &str) -> bool {
        let prefix = prefix.trim_end_matches('/');
        let rest = self.0.strip_prefix(prefix);
        prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl FromStr for Repository {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.len() <= REPOSITORY_LIMIT && text.split('/').all(is_path_component) {
            Ok(Self(text.into()))
        } else {
            Err(ReferenceError::Repository(shorten(text)))
        }
    }
}

impl Tag {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the fallback tag of a referrers list or of cosign: `sha256-<hex>` with an optional suffix
    /// (distribution specification, "Unavailable Referrers API").
    pub fn is_referrers(&self) -> bool {
        ["sha256-", "sha512-"].iter().any(|prefix| {
            self.0.strip_prefix(prefix).is_some_and(|rest| {
                rest.len() >= 64
                    && rest.bytes().take(64).all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
            })
        })
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let valid = (1..=TAG_LIMIT).contains(&text.len())
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
            && !text.starts_with(['.', '-']);
        if valid { Ok(Self(text.into())) } else { Err(ReferenceError::Tag(shorten(text))) }
    }
}

impl Name {
    /// A name from its parts; `library/` is put before a repository of Docker Hub that has one component only.
    pub fn new(registry: Registry, repository: &str) -> Result<Self, ReferenceError> {
        let repository = if registry.as_str() == DOCKER_HUB && !repository.contains('/') {
            format!("library/{repository}").parse()?
        } else {
            repository.parse()?
        };
        Ok(Self { registry, repository })
    }
}

impl Reference {
    /// A reference by tag.
    pub fn tagged(name: Name, tag: Tag) -> Self {
        Self { name, tag: Some(tag), digest: None }
    }

    /// A reference by digest.
    pub fn digested(name: Name, digest: Digest) -> Self {
        Self { name, tag: None, digest: Some(digest) }
    }

    /// Parses a full name, as containerd's image records have them: a registry is a must, and so is a tag or a digest.
    pub fn parse_full(text: &str) -> Result<Self, ReferenceError> {
        match text.split_once('/') {
            Some((host, _)) if Registry::is_host(host) => {
                let reference = Self::parse(text)?;
                if reference.tag.is_none() && reference.digest.is_none() {
                    return Err(ReferenceError::Tag(String::new()));
                }
                Ok(reference)
            }
            _ => Err(ReferenceError::NoRegistry(shorten(text))),
        }
    }

    fn parse(text: &str) -> Result<Self, ReferenceError> {
        let (text, digest) = match text.split_once('@') {
            Some((text, digest)) => (text, Some(digest.parse()?)),
            None => (text, None),
        };
        // A colon after the last slash begins the tag; one before it belongs to a port.
        let slash = text.rfind('/').unwrap_or(0);
        let (text, tag) = match text[slash..].find(':') {
            Some(colon) => (&text[..slash + colon], Some(text[slash + colon + 1..].parse()?)),
            None => (text, None),
        };
        let name = match text.split_once('/') {
            Some((host, repository)) if Registry::is_host(host) => Name::new(host.parse()?, repository)?,
            _ => Name::new(Registry(DOCKER_HUB.into()), text)?,
        };
        Ok(Self { name, tag, digest })
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    /// Parses what people write: `nginx` is `docker.io/library/nginx:latest`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let mut reference = Self::parse(text)?;
        if reference.tag.is_none() && reference.digest.is_none() {
            reference.tag = Some(Tag("latest".into()));
        }
        Ok(reference)
    }
}

impl FromStr for Name {
    type Err = ReferenceError;

    /// Parses `registry/repository`, with Docker Hub's short forms.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let reference = Reference::parse(text)?;
        if reference.tag.is_some() || reference.digest.is_some() {
            return Err(ReferenceError::Repository(shorten(text)));
        }
        Ok(reference.name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
text!(Registry, Repository, Tag);

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(text: &str) -> bool {
    let is_alphanumeric = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !is_alphanumeric(first) || !is_alphanumeric(last) {
        return false;
    }
    bytes.split(|&c| is_alphanumeric(c)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&c| c == b'-')
    })
}

/// Bounds what an error message repeats of a hostile text.
fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn familiar_and_full_names() {
        let hex = Digest::sha256(b"").hex();
        let check = |text: &str, full: &str| {
            let reference: Reference = text.parse().expect(text);
            assert_eq!(reference.to_string(), full);
            assert_eq!(Reference::parse_full(full), Ok(reference));
        };
        check("nginx", "docker.io/library/nginx:latest");
        check("nginx:1.27", "docker.io/library/nginx:1.27");
        check("grafana/loki", "docker.io/grafana/loki:latest");
        check("index.docker.io/nginx:1", "docker.io/library/nginx:1");
        check("localhost/a:1", "localhost/a:1");
        check("LocalHost:5000/a/b_c:1", "localhost:5000/a/b_c:1");
        check("[::1]:5000/a:1", "[::1]:5000/a:1");
        check(&format!("ghcr.io/a/b@sha256:{hex}"), &format!("ghcr.io/a/b@sha256:{hex}"));
        check(&format!("ghcr.io/a/b:v1@sha256:{hex}"), &format!("ghcr.io/a/b:v1@sha256:{hex}"));
    }

    #[test]
    fn refuses_what_the_grammar_refuses() {
        for text in [
            "",
            "/",
            "a//b",
            "A/b",
            "a/B:1",
            "a:",
            "a:-x",
            "a_-b",
            "a___b",
            "ghcr.io/",
            "ghcr.io:x/a",
            "a@b",
            "-a.io/b",
            "x.io:99999/a",
            "[::z]:1/a",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        for text in
            ["sha256:abc", "import-2024-01-01@sha256:00", "nginx", "nginx:1", "library/nginx:1", "ghcr.io/a"]
        {
            assert!(Reference::parse_full(text).is_err(), "{text}");
        }
        assert!("a".repeat(300).parse::<Repository>().is_err());
        assert!("a".repeat(129).parse::<Tag>().is_err());
    }

    #[test]
    fn host_drops_the_port() {
        for (text, host) in
            [("a.io:5000", "a.io"), ("a.io", "a.io"), ("[::1]:5000", "[::1]"), ("[::1]", "[::1]")]
        {
            assert_eq!(text.parse::<Registry>().unwrap().host(), host);
        }
    }

    #[test]
    fn referrers_tags() {
        let hex = Digest::sha256(b"").hex();
        let is = |text: &str| text.parse::<Tag>().unwrap().is_referrers();
        assert!(is(&format!("sha256-{hex}")) && is(&format!("sha256-{hex}.sig")));
        assert!(!is("sha256-abc") && !is("v1") && !is(&format!("sha1-{hex}")));
    }
}
