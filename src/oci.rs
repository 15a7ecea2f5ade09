//! The vocabulary of the OCI specifications, and of trust between peers.
//!
//! Pure: it parses, compares and hashes, and never reads a file, a clock or a socket. Everything here that comes from
//! outside (a client, a peer, a registry, a label of containerd) is parsed by a bounded parser, and those are fuzzed.
//!
//! ```
//! use peili::oci::{Digest, Reference};
//!
//! let image: Reference = "nginx:1.27".parse()?;
//! assert_eq!(image.to_string(), "docker.io/library/nginx:1.27");
//! assert_eq!(image.name.registry.as_str(), "docker.io");
//!
//! let digest = Digest::sha256(b"content");
//! assert_eq!(digest.to_string().parse(), Ok(digest));
//! # Ok::<(), peili::oci::ReferenceError>(())
//! ```
//!
//! It also holds the one question that enforcement points ask about a peer, [`Gate`], so that `network` and
//! `transfer` can enforce what `trust` decides without knowing it.
//!
//! ```
//! use peili::oci::{Digest, Reference};
//!
//! // Docker Hub's short names are written out.
//! let reference: Reference = "alpine:3".parse()?;
//! assert_eq!(reference.to_string(), "docker.io/library/alpine:3");
//!
//! let digest = Digest::sha256(b"a layer");
//! assert_eq!(digest.to_string().parse::<Digest>()?, digest);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod descriptor;
mod digest;
mod gate;
mod health;
mod home;
mod membership;
mod pattern;
mod range;
mod reference;

pub use descriptor::{
    Descriptor, MANIFEST_LIMIT, MANIFEST_MEDIA_TYPES, Manifest, ManifestError, OCTET_STREAM, is_manifest,
};
pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use gate::{Action, Gate, Level, PeerId, PeerIdError, UploadLimits};
pub use health::Health;
pub use home::{Home, Homes};
pub use membership::{KeyId, KeyIdError, Members, Proof};
pub use pattern::{PatternError, Patterns};
pub use range::{ByteRange, RangeError, RangeHeader};
pub use reference::{Name, Reference, ReferenceError, Registry, Repository, Tag};
