//! Which of an index's images is pulled.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::Error;
use crate::oci::{Descriptor, Digest, ManifestError};

/// Platforms that an error names; an index may list thousands.
const LISTED: usize = 20;

/// An operating system and processor by the names of Go, as image indexes have them: `linux/arm64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`
    pub os: String,
    /// `amd64`
    pub architecture: String,
    /// `v7`
    pub variant: Option<String>,
}

/// Which of an index's images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platforms {
    /// All of them.
    All,
    /// The one that fits best.
    One(Platform),
}

/// A text that is no platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a platform: write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, as linux/arm/v7")]
pub struct PlatformError(String);

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    platform: Option<Wire>,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "powerpc64" => ("ppc64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: std::env::consts::OS.into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
        }
    }

    /// How well an image for `other` fits here: `None` if it does not run, 0 if it is just this.
    fn distance(&self, other: &Self) -> Option<u32> {
        if (&self.os, &self.architecture) != (&other.os, &other.architecture) {
            return None;
        }
        let (here, there) = (self.level(), other.level());
        match (number(here), number(there)) {
            (Some(here), Some(there)) => here.checked_sub(there),
            _ => (here == there).then_some(0),
        }
    }

    /// The variant, or what its absence means (image specification, "Platform Variants").
    fn level(&self) -> &str {
        match (self.variant.as_deref(), self.architecture.as_str()) {
            (Some(variant), _) if !variant.is_empty() => variant,
            (_, "arm") => "v7",
            (_, "arm64") => "v8",
            (_, "amd64") => "v1",
            _ => "",
        }
    }
}

impl Platforms {
    /// The children of an index that are pulled. As containerd does, an entry without a platform fits if no other
    /// does.
    pub(super) fn choose(
        &self,
        index: Digest,
        bytes: &[u8],
        children: Vec<Descriptor>,
    ) -> Result<Vec<Descriptor>, Error> {
        let Self::One(wanted) = self else { return Ok(children) };
        let wire: Index = serde_json::from_slice(bytes).map_err(|error| Error::Manifest {
            digest: index,
            source: ManifestError::Form(error.to_string()),
        })?;
        // `Manifest::parse` puts an index's manifests last.
        let first = children.len().saturating_sub(wire.manifests.len());
        let entries = || wire.manifests.iter().zip(&children[first..]);
        let platforms = || entries().filter_map(|(entry, child)| Some((entry.platform.as_ref()?, child)));
        let best = platforms()
            .filter_map(|(platform, child)| Some((wanted.distance(&Platform::from(platform))?, child)))
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, child)| child);
        let child = best.or_else(|| entries().find(|(entry, _)| entry.platform.is_none()).map(|(_, c)| c));
        match child {
            Some(child) => Ok(vec![child.clone()]),
            None => {
                let mut available: Vec<String> =
                    platforms().map(|(platform, _)| Platform::from(platform).to_string()).collect();
                available.dedup();
                let more = available.len().saturating_sub(LISTED);
                available.truncate(LISTED);
                let available = match (available.is_empty(), more) {
                    (true, _) => "none".into(),
                    (_, 0) => available.join(", "),
                    _ => format!("{} and {more} more", available.join(", ")),
                };
                Err(Error::Platform { digest: index, wanted: Box::new(wanted.clone()), available })
            }
        }
    }
}

impl From<&Wire> for Platform {
    fn from(wire: &Wire) -> Self {
        let short = |text: &str| text.chars().filter(char::is_ascii_graphic).take(32).collect::<String>();
        Self {
            os: short(&wire.os),
            architecture: short(&wire.architecture),
            variant: wire.variant.as_deref().map(short).filter(|variant| !variant.is_empty()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let mut parts = text.split('/').map(str::to_ascii_lowercase);
        let platform = (parts.next(), parts.next(), parts.next(), parts.next());
        let (Some(os), Some(architecture), variant, None) = platform else {
            return Err(PlatformError(text.chars().take(80).collect()));
        };
        let valid = |part: &String| {
            !part.is_empty()
                && part.len() <= 32
                && part.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'))
        };
        if ![Some(&os), Some(&architecture), variant.as_ref()].into_iter().flatten().all(valid) {
            return Err(PlatformError(text.chars().take(80).collect()));
        }
        Ok(Self { os, architecture, variant })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

/// `v8` is 8.
fn number(variant: &str) -> Option<u32> {
    variant.strip_prefix('v')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{MANIFEST_MEDIA_TYPES, Manifest};

    fn choose(wanted: &str, offered: &[Option<&str>]) -> Result<usize, String> {
        let digest = |i: usize| Digest::sha256(&[u8::try_from(i).unwrap()]);
        let entries: Vec<String> = offered
            .iter()
            .enumerate()
            .map(|(i, platform)| {
                let platform = platform.map_or(String::new(), |platform| {
                    let platform: Platform = platform.parse().unwrap();
                    format!(
                        r#","platform":{{"os":"{}","architecture":"{}","variant":"{}"}}"#,
                        platform.os,
                        platform.architecture,
                        platform.variant.unwrap_or_default()
                    )
                });
                format!(
                    r#"{{"digest":"{}","size":1,"mediaType":"{}"{platform}}}"#,
                    digest(i),
                    MANIFEST_MEDIA_TYPES[1]
                )
            })
            .collect();
        let index = format!(r#"{{"manifests":[{}]}}"#, entries.join(","));
        let children = Manifest::parse(index.as_bytes()).unwrap().children;
        let chosen = Platforms::One(wanted.parse().unwrap())
            .choose(Digest::sha256(b""), index.as_bytes(), children)
            .map_err(|error| error.to_string())?;
        let [chosen] = chosen.as_slice() else { panic!("one is chosen: {chosen:?}") };
        Ok((0..offered.len()).find(|&i| digest(i) == chosen.digest).unwrap())
    }

    #[test]
    fn the_best_platform_is_chosen() {
        assert_eq!(choose("linux/amd64", &[Some("linux/arm64"), Some("linux/amd64")]), Ok(1));
        assert_eq!(choose("linux/amd64", &[Some("linux/amd64/v3"), Some("linux/amd64")]), Ok(1));
        assert_eq!(choose("linux/arm64", &[Some("linux/arm/v7"), Some("linux/arm64/v8")]), Ok(1));
        assert_eq!(choose("linux/arm/v7", &[Some("linux/arm/v5"), Some("linux/arm/v6")]), Ok(1));
        assert_eq!(choose("linux/amd64", &[None, Some("linux/amd64")]), Ok(1), "a platform wins");
        assert_eq!(choose("linux/amd64", &[Some("unknown/unknown"), None]), Ok(1));
        let error = choose("linux/s390x", &[Some("linux/arm/v7"), Some("windows/amd64")]).unwrap_err();
        assert!(
            error.ends_with("has no image for linux/s390x; it has linux/arm/v7, windows/amd64"),
            "{error}"
        );
    }

    #[test]
    fn texts() {
        assert_eq!("Linux/ARM/v7".parse::<Platform>().unwrap().to_string(), "linux/arm/v7");
        for text in ["", "linux", "linux/", "/amd64", "a/b/c/d", "a/b/", "linux/a b"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
