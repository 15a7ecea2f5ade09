//! The use case: a request of the runtime is answered from here, else from peers, else by "not here", so that the
//! runtime goes to its next host. One hop only: a peer's request is answered from this node's store alone.
//!
//! Finds holders, chooses and races them, resumes, verifies what they send, and tells the network what is held here.
//! It speaks no HTTP and names no adapter: store, network, transfer and upstream are traits.

pub mod metrics;

use std::io;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;
use futures::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::oci::{ByteRange, Descriptor, Digest, Name, RangeError, RangeHeader, Tag};

/// How the mirror decides and fetches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Globs over `registry/repository` whose manifests are never served to the runtime, so that upstream checks the
    /// pod's secret; their layers still come from peers.
    pub private: Vec<String>,
    /// Globs over `registry/repository` whose tags are asked of trusted peers although their registry answers.
    pub tags_peers_first: Vec<String>,
    /// Verify content from peers against its digest while it streams.
    pub verify: bool,
    /// Bytes asked of a peer at once: 64KiB to 64MiB.
    #[schemars(with = "String")]
    pub segment: ByteSize,
    /// Bytes that all downloads together may hold in memory ahead of their clients.
    #[schemars(with = "String")]
    pub prefetch_budget: ByteSize,
    /// A peer that gives less than 256 KiB in this time, while the client reads, has stalled: 100ms to 1m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub stall: Duration,
    /// How long to wait for busy peers before the answer is "not here".
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub busy_wait: Duration,
}

/// What the runtime asks for by a manifest path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By tag.
    Tag(Tag),
    /// By digest.
    Digest(Digest),
}

/// A body and what it is.
pub struct Answer {
    /// The whole content.
    pub descriptor: Descriptor,
    /// The bytes that `body` carries.
    pub range: ByteRange,
    /// Exactly the bytes of `range`, or an error, after which the connection must end short. Empty for HEAD.
    pub body: BoxStream<'static, io::Result<Bytes>>,
    /// Where it comes from.
    pub source: Source,
}

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// This node's store.
    Local,
    /// One or more peers.
    Peers,
}

/// Why the runtime has to go to its next host. Each is a named cause in metrics, log and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NotHere {
    /// No live and trusted node holds it.
    Unknown,
    /// A manifest of a repository that is configured as private.
    Private,
    /// The tag's registry answers, so it is the one to ask.
    TagUpstream,
    /// Peers disagree about what the tag means.
    TagDisputed,
    /// All holders failed.
    PeersFailed,
    /// All holders are busy.
    PeersBusy,
    /// It is held here but cannot be read now.
    StoreFailed,
    /// No answer in time.
    Deadline,
    /// The request is for what Peili does not serve: lists, pushes, names that are none.
    Unsupported,
}

/// How a request ends without a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 404.
    NotHere(NotHere),
    /// 416.
    Range(RangeError),
}

/// A request for a blob.
#[derive(Clone, Debug)]
pub struct BlobRequest {
    /// The repository that the request names.
    pub name: Name,
    /// The blob.
    pub digest: Digest,
    /// The range that is asked for, if it is one.
    pub range: Option<RangeHeader>,
    /// Only the header is wanted.
    pub head: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            private: Vec::new(),
            tags_peers_first: Vec::new(),
            verify: true,
            segment: ByteSize::mib(8),
            prefetch_budget: ByteSize::mib(32),
            stall: Duration::from_secs(1),
            busy_wait: Duration::from_secs(2),
        }
    }
}

/// The mirror of one node.
pub struct Mirror {}

impl Mirror {
    /// Answers a request for a manifest.
    pub async fn manifest(&self, _name: &Name, _target: &Target, _head: bool) -> Result<Answer, Refusal> {
        std::future::ready(Err(Refusal::NotHere(NotHere::Unknown))).await
    }

    /// Answers a request for a blob.
    pub async fn blob(&self, _request: BlobRequest) -> Result<Answer, Refusal> {
        std::future::ready(Err(Refusal::NotHere(NotHere::Unknown))).await
    }
}
