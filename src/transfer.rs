//! Bytes from a peer and to a peer, over HTTP/1.1 in mutual TLS 1.3 on a port of its own.
//!
//! Both ends prove their libp2p identity in the handshake; the client's connections are pinned to the peer that it
//! expects and pooled by it. Content is asked for in bounded segments, so that hedging, resume, stall detection,
//! fairness and cancelling work per segment. Knows nothing of stores and decides nothing: what may be served comes
//! from [`Source`], who may connect and ask from the [`Gate`](crate::oci::Gate).

pub mod client;
pub mod conformance;
pub mod memory;
pub mod metrics;
pub mod server;

mod rate;
mod slots;
mod stream;
mod tls;
mod wire;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use bytesize::ByteSize;
use futures::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::network::Peer;
use crate::oci::{ByteRange, Descriptor, Digest, PeerId};

pub use tls::TlsError;

/// Fetches from peers.
#[async_trait]
pub trait Transfer: Send + Sync {
    /// Asks `peer` for the bytes of `digest` from `start` up to `start + length`, or to the end if that is nearer.
    /// Ends when the response's header is there: within `limit`, connecting included.
    async fn fetch(
        &self,
        peer: &Peer,
        digest: &Digest,
        start: u64,
        length: u64,
        limit: Duration,
    ) -> Result<Segment, FetchError>;
}

/// Part of some content, on its way from a peer. Dropping it early neither closes the connection nor counts as a
/// failure: what is left of it is drained in the background.
pub struct Segment {
    /// The content as the peer describes it: the digest that was asked for, the peer's word for size and media type.
    pub descriptor: Descriptor,
    /// The bytes that come.
    pub range: ByteRange,
    /// Exactly the bytes of `range`, or an error. Has no time limit of its own.
    pub body: BoxStream<'static, io::Result<Bytes>>,
}

/// Why a peer gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It answered that it has not got the content, or may not give it: the two look the same from outside.
    #[error("the peer does not have it")]
    NotFound,
    /// All of its uploads are taken; `queue` requests wait before this one.
    #[error("the peer is busy, {queue} requests wait")]
    Busy {
        /// Length of its queue.
        queue: u32,
    },
    /// This node has so many requests to the peer that it was not asked within the limit. Says nothing about the peer.
    #[error("too many requests of this node to the peer")]
    Queued,
    /// No answer came within the limit, though the peer showed since the request that it lives: it shook hands, or
    /// answered another request.
    #[error("the peer lives, and did not answer in time")]
    Slow,
    /// Nothing listens, the connection broke, or no answer came within the limit.
    #[error("the peer cannot be reached: {0}")]
    Unreachable(String),
    /// Another identity than the expected one answered, or none was proved.
    #[error("the peer's identity is wrong: {0}")]
    Identity(String),
    /// It broke the protocol: an answer that contradicts the request.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}

/// What the server may hand out; implemented by `mirror`.
#[async_trait]
pub trait Source: Send + Sync {
    /// Opens `digest` for `peer` at `start`, for at most `length` bytes. `None`: not held, or not for this peer.
    /// A `start` beyond the content is an empty range.
    async fn open(
        &self,
        peer: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> Result<Option<Segment>, io::Error>;
}

/// The peer port and its limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses of the peer port. Port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Uploads at once: 1 to 4096.
    pub uploads: u32,
    /// Uploads at once to one peer: 1 to 4096.
    pub uploads_per_peer: u32,
    /// Requests that may wait for an upload; more are answered "busy".
    pub queue: u32,
    /// Bytes per second that all uploads together may take; 0: no limit.
    #[schemars(with = "String")]
    pub upload_rate: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![([0, 0, 0, 0], 5002).into(), (std::net::Ipv6Addr::UNSPECIFIED, 5002).into()],
            uploads: 64,
            uploads_per_peer: 8,
            queue: 64,
            upload_rate: ByteSize::b(0),
        }
    }
}
