//! Descriptors, media types, and the children of manifests and indexes.

use std::fmt;
use std::sync::Arc;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::Digest;

/// Largest manifest that is read: the 4 MiB that the distribution specification asks registries to accept at least.
pub const MANIFEST_LIMIT: u64 = 4 << 20;

/// The media type of content about which nothing is known.
pub const OCTET_STREAM: &str = "application/octet-stream";

/// What a client that pulls an image accepts as a manifest.
pub const MANIFEST_MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Media types are ASCII and short (RFC 6838: 127 characters on each side of the slash).
const MEDIA_TYPE_LIMIT: usize = 255;

/// Children that one manifest may name. The image specification sets no limit; 4 MiB hold about 20,000.
const CHILDREN_LIMIT: usize = 20_000;

/// Some content: its digest, its size in bytes and what it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// The digest.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Media type, [`OCTET_STREAM`] if unknown.
    pub media_type: Arc<str>,
}

/// What a manifest or index refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Its own `mediaType`; old OCI manifests have none.
    pub media_type: Option<Arc<str>>,
    /// Config and layers of a manifest, manifests of an index, in order.
    pub children: Vec<Descriptor>,
    /// The manifest that this one is about (a signature's image).
    pub subject: Option<Descriptor>,
}

/// Why a manifest cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Larger than [`MANIFEST_LIMIT`].
    #[error("a manifest of {0} bytes is larger than 4 MiB")]
    TooLarge(u64),
    /// Not JSON of the right shape.
    #[error("not an image manifest or index: {0}")]
    Form(String),
    /// Descriptors that are none, or have a digest of an unknown algorithm.
    #[error("a manifest has {0} descriptors that cannot be read")]
    Unknown(usize),
    /// More than 20,000 children.
    #[error("a manifest with {0} children is refused")]
    TooMany(usize),
}

/// Whether content of this media type is a manifest or index: something that may have children.
pub fn is_manifest(media_type: &str) -> bool {
    MANIFEST_MEDIA_TYPES.contains(&media_type)
}

impl Descriptor {
    /// A descriptor; a media type that cannot be one is replaced by [`OCTET_STREAM`].
    pub fn new(digest: Digest, size: u64, media_type: &str) -> Self {
        let valid = !media_type.is_empty()
            && media_type.len() <= MEDIA_TYPE_LIMIT
            && media_type.bytes().all(|c| c.is_ascii_graphic());
        Self { digest, size, media_type: if valid { media_type.into() } else { OCTET_STREAM.into() } }
    }

    /// Whether it is a manifest or index, or may be one of which nobody has said yet that it is: it is held before the record or the index
    /// that says so. For those who keep manifests back.
    pub fn may_be_manifest(&self) -> bool {
        is_manifest(&self.media_type) || (*self.media_type == *OCTET_STREAM && self.size <= MANIFEST_LIMIT)
    }
}

impl Manifest {
    /// The media type that it says, or else the one that its form leaves: those of Docker have to say theirs, those of OCI only should
    /// (image specification, "Image Manifest Property Descriptions" and "Image Index Property Descriptions"). `None`: it has not the form of either.
    pub fn form(&self) -> Option<&str> {
        let own = self.media_type.as_deref().filter(|own| is_manifest(own));
        let [index, manifest, ..] = MANIFEST_MEDIA_TYPES;
        own.or_else(|| {
            let is_index = self.children.iter().all(|child| is_manifest(&child.media_type));
            (!self.children.is_empty()).then_some(if is_index { index } else { manifest })
        })
    }

    /// Reads a manifest or an index, OCI's or Docker's. Unknown fields are ignored, as the specification asks.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        match Self::parse_known(bytes)? {
            (manifest, 0) => Ok(manifest),
            (_, unknown) => Err(ManifestError::Unknown(unknown)),
        }
    }

    /// Reads as [`Manifest::parse`], but leaves descriptors out that cannot be read, and tells how many. For those who ask
    /// what a manifest says about content that they have.
    pub fn parse_known(bytes: &[u8]) -> Result<(Self, usize), ManifestError> {
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(ManifestError::TooLarge(bytes.len() as u64));
        }
        let wire: Wire =
            serde_json::from_slice(bytes).map_err(|error| ManifestError::Form(error.to_string()))?;
        let mut unknown = wire.layers.unknown + wire.blobs.unknown + wire.manifests.unknown;
        let mut one = |lenient: Option<Lenient>| match lenient {
            Some(Lenient::Known(descriptor)) => Some(descriptor),
            Some(Lenient::Unknown(_)) => {
                unknown += 1;
                None
            }
            None => None,
        };
        let (config, subject) = (one(wire.config), one(wire.subject));
        let lists = [wire.layers, wire.blobs, wire.manifests];
        let children = config.into_iter().chain(lists.into_iter().flat_map(|list| list.known));
        let children: Vec<_> = children.map(Descriptor::from).collect();
        if children.len() > CHILDREN_LIMIT {
            return Err(ManifestError::TooMany(children.len()));
        }
        let media_type = wire.media_type.map(Into::into);
        Ok((Self { media_type, children, subject: subject.map(Into::into) }, unknown))
    }
}

#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    config: Option<Lenient>,
    #[serde(default)]
    layers: List,
    /// OCI artifact manifests of 1.1's release candidates.
    #[serde(default)]
    blobs: List,
    #[serde(default)]
    manifests: List,
    subject: Option<Lenient>,
}

/// A list of descriptors, `null` for an empty one, as Go writes it. Only those that can be read take memory.
#[derive(Default)]
struct List {
    known: Vec<WireDescriptor>,
    unknown: usize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Lenient {
    Known(WireDescriptor),
    Unknown(IgnoredAny),
}

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor)
    }
}

struct ListVisitor;

impl<'de> Visitor<'de> for ListVisitor {
    type Value = List;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of descriptors")
    }

    fn visit_unit<E>(self) -> Result<List, E> {
        Ok(List::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<List, A::Error> {
        let mut list = List::default();
        while let Some(item) = items.next_element()? {
            match item {
                Lenient::Known(descriptor) => list.known.push(descriptor),
                Lenient::Unknown(_) => list.unknown += 1,
            }
        }
        Ok(list)
    }
}

#[derive(Deserialize)]
struct WireDescriptor {
    digest: Digest,
    size: u64,
    #[serde(rename = "mediaType", default)]
    media_type: String,
}

impl From<WireDescriptor> for Descriptor {
    fn from(wire: WireDescriptor) -> Self {
        Self::new(wire.digest, wire.size, &wire.media_type)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_of_manifest_and_index() {
        let (config, layer) = (Digest::sha256(b"c"), Digest::sha256(b"l"));
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"{config}","size":3}},
            "layers":[{{"digest":"{layer}","size":5,"mediaType":"x y","extra":[1]}}],"annotations":{{}}}}"#
        );
        let manifest = Manifest::parse(manifest.as_bytes()).unwrap();
        assert_eq!(manifest.media_type, None);
        assert_eq!(
            manifest.children,
            [
                Descriptor::new(config, 3, "application/vnd.cncf.helm.config.v1+json"),
                Descriptor::new(layer, 5, OCTET_STREAM)
            ]
        );

        let index = format!(
            r#"{{"mediaType":"{0}","manifests":[{{"digest":"{config}","size":3,"mediaType":"{1}","platform":{{}}}}]}}"#,
            MANIFEST_MEDIA_TYPES[0], MANIFEST_MEDIA_TYPES[1]
        );
        let index = Manifest::parse(index.as_bytes()).unwrap();
        assert_eq!(index.media_type.as_deref(), Some(MANIFEST_MEDIA_TYPES[0]));
        assert_eq!(manifest.form(), Some(MANIFEST_MEDIA_TYPES[1]));
        assert_eq!(index.form(), Some(MANIFEST_MEDIA_TYPES[0]));
        let unsaid = |manifest: &Manifest| Manifest { media_type: None, ..manifest.clone() };
        assert_eq!(unsaid(&manifest).form(), Some(MANIFEST_MEDIA_TYPES[1]));
        assert_eq!(unsaid(&index).form(), Some(MANIFEST_MEDIA_TYPES[0]));
        assert_eq!(Manifest::default().form(), None);
        assert_eq!(index.children, [Descriptor::new(config, 3, MANIFEST_MEDIA_TYPES[1])]);
    }

    #[test]
    fn descriptors_that_cannot_be_read_cost_only_themselves() {
        let layer = Digest::sha256(b"l");
        let good = format!(r#"{{"digest":"{layer}","size":5,"mediaType":"a/b"}}"#);
        for bad in [r#"{"digest":"md5:00","size":1}"#, r#"{"size":1}"#, "1", "null", "[[]]"] {
            let text = format!(r#"{{"config":{bad},"layers":[{bad},{good}],"subject":{good}}}"#);
            let (manifest, unknown) = Manifest::parse_known(text.as_bytes()).unwrap();
            let expected = Descriptor::new(layer, 5, "a/b");
            assert_eq!((manifest.children, manifest.subject), (vec![expected.clone()], Some(expected)));
            assert_eq!(unknown, if bad == "null" { 1 } else { 2 }, "{bad}");
            assert_eq!(Manifest::parse(text.as_bytes()), Err(ManifestError::Unknown(unknown)), "{bad}");
        }
        // Go's nil slices.
        let text = r#"{"config":null,"layers":null,"manifests":null,"blobs":null,"subject":null}"#;
        assert_eq!(Manifest::parse(text.as_bytes()), Ok(Manifest::default()));
    }

    #[test]
    fn refuses_what_is_not_a_manifest() {
        for text in ["", "[]", "1", r#"{"layers":1}"#, r#"{"layers":{}}"#] {
            assert!(matches!(Manifest::parse(text.as_bytes()), Err(ManifestError::Form(_))), "{text}");
        }
        let large = vec![b' '; MANIFEST_LIMIT as usize + 1];
        assert_eq!(Manifest::parse(&large), Err(ManifestError::TooLarge(MANIFEST_LIMIT + 1)));
    }
}
