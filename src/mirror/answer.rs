//! What the runtime asks for, what it gets, and why it gets nothing.

use std::io;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::oci::{ByteRange, Descriptor, Digest, Name, RangeError, RangeHeader, Tag};
use crate::policy::Reason;

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
    /// An upstream of the configuration.
    Upstream,
}

/// Why the runtime has to go to its next host. Each is a named cause in metrics, log and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NotHere {
    /// No live and trusted node holds it.
    Unknown,
    /// A manifest of a repository that is configured as private.
    Private,
    /// A policy leaves it to the registry.
    Bypassed,
    /// The tag's registry answers, so it is the one to ask.
    TagUpstream,
    /// Peers disagree about what the tag means.
    TagDisputed,
    /// Nobody knows the tag to be as young as a policy wants it.
    TagTooOld,
    /// All holders failed.
    PeersFailed,
    /// All holders are busy.
    PeersBusy,
    /// The upstreams that a policy names fail.
    UpstreamsFailed,
    /// They do not let this node have it.
    UpstreamsRefused,
    /// It is held here but cannot be read now.
    StoreFailed,
    /// No answer in time.
    Deadline,
    /// The request is for what Peili does not serve: lists, pushes, names that are none.
    Unsupported,
}

/// How a request ends without a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 404.
    NotHere(NotHere),
    /// 403: a policy denies it.
    Denied(Reason),
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

impl NotHere {
    /// This cause, or `other` where this one says nothing.
    pub(super) fn or(self, other: Self) -> Self {
        if self == Self::Unknown { other } else { self }
    }
}

pub(super) fn resolve(range: Option<RangeHeader>, size: u64) -> Result<ByteRange, Refusal> {
    range.map_or(Ok(ByteRange::whole(size)), |range| range.resolve(size)).map_err(Refusal::Range)
}

pub(super) fn whole(descriptor: Descriptor, content: Bytes, head: bool, source: Source) -> Answer {
    let range = ByteRange::whole(descriptor.size);
    let body = if head { empty() } else { futures::stream::iter([Ok(content)]).boxed() };
    Answer { descriptor, range, body, source }
}

pub(super) fn empty() -> BoxStream<'static, io::Result<Bytes>> {
    futures::stream::empty().boxed()
}
