//! `peili pull`: fetches an image into an OCI image layout as containerd would.
//!
//! As containerd does: hosts in the order of its `hosts.toml`; a tag by HEAD, then the manifest by GET of its digest,
//! then config and layers, three at once; any status above 399 or a failure leads to the next host; a body that ends
//! early is resumed by `Range: bytes=N-`. Unlike containerd, a digest mismatch starts again at byte 0 at once, and a reset
//! connection is resumed like an early end.
//!
//! It never sends a secret: where a registry asks for a bearer token, an anonymous one is fetched. It does not
//! unpack, verify signatures, or follow the URLs of layers that are not distributable.
//!
//! ```no_run
//! use peili::pull::{Destination, Host, Options, Silent, pull};
//!
//! # async fn example() -> anyhow::Result<()> {
//! let image: peili::oci::Reference = "ghcr.io/acme/app:v1".parse()?;
//! let hosts = Host::load(&["/etc/containerd/certs.d".into()], &image.name.registry)?;
//! let options = Options::new(image, hosts, Destination::Layout("/srv/images".into()));
//! let summary = pull(options, &Silent).await?;
//! println!("{} has {} bytes", summary.digest, summary.bytes);
//! # Ok(())
//! # }
//! ```

mod destination;
mod fetch;
mod platform;
mod progress;
mod sink;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::time::Instant;

use crate::oci::{Descriptor, Digest, MANIFEST_MEDIA_TYPES, Manifest, ManifestError, Reference, is_manifest};

use destination::Folder;
use fetch::Session;

pub use crate::upstream::endpoint::Host;
pub use platform::{Platform, PlatformError, Platforms};
pub use progress::{Bars, Event, Progress, Silent};

/// Indexes within indexes that are followed. Known images have two levels.
const DEPTH_LIMIT: usize = 4;

/// Manifests of one image, all platforms and attestations together. The largest official images have about 40.
const MANIFESTS_LIMIT: usize = 1000;

/// Children of all manifests of one pull together: each manifest may have 20,000.
const CHILDREN_LIMIT: usize = 100_000;

/// What to pull, from where and to where.
#[derive(Debug)]
pub struct Options {
    /// The image.
    pub reference: Reference,
    /// Hosts in the order in which they are asked.
    pub hosts: Vec<Host>,
    /// Where the content goes.
    pub destination: Destination,
    /// Which of an index's images.
    pub platforms: Platforms,
    /// Blobs fetched at once: at least 1; containerd's default is 3.
    pub concurrency: usize,
    /// Time until a host must have sent its header.
    pub header_limit: Duration,
    /// Time without a byte in a body, after which the body counts as cut.
    pub stall_limit: Duration,
}

/// Where pulled content goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An OCI image layout folder; made if it is not there. Unfinished downloads stay in its `ingest` folder and are
    /// resumed by the next pull.
    Layout(PathBuf),
    /// Nowhere: for measurements. Manifests are always verified.
    Discard {
        /// Hash the blobs and compare, else only count their bytes.
        verify: bool,
    },
}

/// What was pulled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The image.
    pub reference: String,
    /// What its name stands for.
    pub digest: Digest,
    /// Media type of that manifest or index.
    pub media_type: String,
    /// URL of the host that resolved the name.
    pub resolved_by: String,
    /// Hosts that did not resolve the name, each with its reason.
    pub failures: Vec<Failure>,
    /// Manifests, configs and layers, in the order in which they were finished.
    pub contents: Vec<Fetched>,
    /// Bytes that came over the network.
    pub bytes: u64,
    /// Whole time in milliseconds.
    pub millis: f64,
}

/// One content that was pulled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fetched {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its size in bytes.
    pub size: u64,
    /// It was in the destination already, whole and right.
    pub held: bool,
    /// Bytes that an earlier pull had left.
    pub kept: u64,
    /// Where the bytes came from, in order.
    pub parts: Vec<Part>,
    /// How often a body that ended early was resumed.
    pub resumed: u32,
    /// Hosts that failed, each with its reason.
    pub failures: Vec<Failure>,
    /// Milliseconds from the start to the first byte of a body.
    pub first_byte_millis: Option<f64>,
    /// Milliseconds from the start until it was verified and in place.
    pub millis: f64,
}

/// Bytes that one host sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// URL of the host.
    pub host: String,
    /// How many.
    pub bytes: u64,
}

/// A host that did not give what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// URL of the host.
    pub host: String,
    /// Why, one line.
    pub reason: String,
}

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No host resolves the name.
    #[error("no host resolves {reference}: {}", Listed(failures))]
    Unresolved {
        /// The image.
        reference: String,
        /// Each host with its reason.
        failures: Vec<Failure>,
    },
    /// No host gives this content.
    #[error("no host gives {digest}: {}", Listed(failures))]
    NotFetched {
        /// The content.
        digest: Digest,
        /// Each host with its reason.
        failures: Vec<Failure>,
    },
    /// A manifest that is right by its digest but cannot be read.
    #[error("the manifest {digest} cannot be read: {source}")]
    Manifest {
        /// The manifest.
        digest: Digest,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A manifest or its tree is of a kind or size that is refused.
    #[error("the manifest {digest} is refused: {reason}")]
    Refused {
        /// The manifest.
        digest: Digest,
        /// Why.
        reason: String,
    },
    /// The index has no image for the wanted platform.
    #[error("the index {digest} has no image for {wanted}; it has {available}")]
    Platform {
        /// The index.
        digest: Digest,
        /// What was looked for.
        wanted: Box<Platform>,
        /// What is there.
        available: String,
    },
    /// The destination cannot be used.
    #[error("{}: {reason}", path.display())]
    Destination {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Reading or writing the destination failed.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

struct Listed<'a>(&'a [Failure]);

impl Options {
    /// Options for a pull into a layout folder with containerd's defaults, for this machine's platform.
    pub fn new(reference: Reference, hosts: Vec<Host>, destination: Destination) -> Self {
        Self {
            reference,
            hosts,
            destination,
            platforms: Platforms::One(Platform::host()),
            concurrency: 3,
            header_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
        }
    }
}

/// Pulls an image. Nothing is lost by dropping the future: what has come stays in `ingest` for the next pull.
///
/// # Errors
/// See [`Error`]; content that is complete by then stays in the layout, but the image is not named in its index.
pub async fn pull(options: Options, progress: &dyn Progress) -> Result<Summary, Error> {
    let begin = Instant::now();
    let folder = match &options.destination {
        Destination::Layout(path) => Some(Folder::open(path.clone()).await?),
        Destination::Discard { .. } => None,
    };
    let verify = options.destination != Destination::Discard { verify: false };
    let session = Session::new(&options, progress);
    let resolved = session.resolve(&options.reference).await?;
    progress.event(&Event::Resolved { target: &resolved.target, host: &resolved.host });

    let mut walk = Walk::new(&session, folder.as_ref(), &options.platforms);
    let target = walk.run(resolved.target).await?;
    let Walk { blobs, mut contents, .. } = walk;
    let bytes = blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
    progress.event(&Event::Planned { blobs: blobs.len(), bytes });

    // Collected first: a closure within the stream would keep the whole future from being `Send`.
    let fetches: Vec<_> =
        blobs.iter().map(|blob| Box::pin(session.blob(blob, folder.as_ref(), verify))).collect();
    let blobs: Vec<Fetched> =
        futures::stream::iter(fetches).buffer_unordered(options.concurrency.max(1)).try_collect().await?;
    contents.extend(blobs);
    if let Some(folder) = &folder {
        folder.record(&options.reference, &target).await?;
    }
    let summary = Summary {
        reference: options.reference.to_string(),
        digest: target.digest,
        media_type: target.media_type.to_string(),
        resolved_by: resolved.host,
        failures: resolved.failures,
        bytes: contents.iter().flat_map(|content| &content.parts).map(|part| part.bytes).sum(),
        contents,
        millis: millis(begin),
    };
    progress.event(&Event::Done(&summary));
    Ok(summary)
}

/// Finds the blobs of an image: fetches its manifests from the root down.
struct Walk<'a> {
    session: &'a Session<'a>,
    folder: Option<&'a Folder>,
    platforms: &'a Platforms,
    seen: HashSet<Digest>,
    manifests: usize,
    children: usize,
    blobs: Vec<Descriptor>,
    contents: Vec<Fetched>,
}

impl<'a> Walk<'a> {
    fn new(session: &'a Session<'a>, folder: Option<&'a Folder>, platforms: &'a Platforms) -> Self {
        Self {
            session,
            folder,
            platforms,
            seen: HashSet::new(),
            manifests: 0,
            children: 0,
            blobs: Vec::new(),
            contents: Vec::new(),
        }
    }

    /// The root as it is recorded: with the media type that its content shows if the host's answer had none.
    async fn run(&mut self, root: Descriptor) -> Result<Descriptor, Error> {
        let mut target = root.clone();
        let mut left = vec![(root, 0)];
        while let Some((descriptor, depth)) = left.pop() {
            if !self.seen.insert(descriptor.digest) {
                continue;
            }
            if depth > 0 && !is_manifest(&descriptor.media_type) {
                self.blobs.push(descriptor);
                continue;
            }
            self.manifests += 1;
            let digest = descriptor.digest;
            let refused = |reason: &str| Error::Refused { digest, reason: reason.into() };
            if depth > DEPTH_LIMIT {
                return Err(refused("its image has more than 4 levels of indexes"));
            }
            if self.manifests > MANIFESTS_LIMIT {
                return Err(refused("its image has more than 1000 manifests"));
            }
            let (bytes, fetched) = self.session.manifest(&descriptor, self.folder).await?;
            self.contents.push(fetched);
            let mut manifest =
                Manifest::parse(&bytes).map_err(|source| Error::Manifest { digest, source })?;
            let media_type = kind(&descriptor, &manifest, &bytes)
                .ok_or_else(|| refused("it is neither an image manifest nor an index"))?;
            if depth == 0 {
                target = Descriptor { media_type: Arc::clone(&media_type), ..descriptor };
            }
            if is_index(&media_type) {
                manifest.children = self.platforms.choose(digest, &bytes, manifest.children)?;
            }
            self.children += manifest.children.len();
            if self.children > CHILDREN_LIMIT {
                return Err(refused("its image has more than 100000 parts"));
            }
            // The first child is next, so that contents come in the order of their manifests.
            left.extend(manifest.children.into_iter().rev().map(|child| (child, depth + 1)));
        }
        Ok(target)
    }
}

/// What a manifest is: as its parent or host says, else as it says itself, else by its shape, as OCI manifests need
/// not name their own type.
fn kind(descriptor: &Descriptor, manifest: &Manifest, bytes: &[u8]) -> Option<Arc<str>> {
    #[derive(serde::Deserialize)]
    struct Shape {
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    if is_manifest(&descriptor.media_type) {
        return Some(Arc::clone(&descriptor.media_type));
    }
    if let Some(media_type) = &manifest.media_type {
        return is_manifest(media_type).then(|| Arc::clone(media_type));
    }
    let shape: Shape = serde_json::from_slice(bytes).ok()?;
    match (shape.manifests, shape.layers) {
        (Some(_), None) => Some(MANIFEST_MEDIA_TYPES[0].into()),
        (None, Some(_)) => Some(MANIFEST_MEDIA_TYPES[1].into()),
        _ => None,
    }
}

fn is_index(media_type: &str) -> bool {
    [MANIFEST_MEDIA_TYPES[0], MANIFEST_MEDIA_TYPES[2]].contains(&media_type)
}

fn millis(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no host is configured for it");
        }
        for (i, failure) in self.0.iter().enumerate() {
            write!(f, "{}{failure}", if i > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.host, self.reason)
    }
}
