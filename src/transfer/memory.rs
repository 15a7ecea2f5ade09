//! The in-memory twin: fetches from other nodes' sources without sockets, with faults to switch on; and content in memory.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{FetchError, Segment, Source, Transfer};
use crate::network::Peer;
use crate::oci::{Action, ByteRange, Descriptor, Digest, Gate, PeerId};

/// Bytes in one chunk of a body from [`Contents`].
const CHUNK: usize = 256 << 10;

/// One node's way to all the others.
pub struct Memory {
    node: PeerId,
    peers: RwLock<HashMap<PeerId, Node>>,
}

/// What is wrong with a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Nothing listens there.
    Dead,
    /// It accepts and never answers.
    Hung,
    /// It answers after this time.
    Late(Duration),
    /// Another identity answers.
    Impostor,
    /// All uploads are taken and so many requests wait.
    Busy(u32),
    /// It sends so many bytes of each segment, then nothing.
    StallAfter(u64),
    /// It sends so many bytes of each segment, then the connection breaks.
    BreakAfter(u64),
    /// It sends wrong bytes.
    Lie,
}

/// Content in memory, given to every peer.
#[derive(Default)]
pub struct Contents {
    held: RwLock<HashMap<Digest, (Descriptor, Bytes)>>,
}

#[derive(Clone)]
struct Node {
    source: Arc<dyn Source>,
    gate: Arc<dyn Gate>,
    uploads: Arc<Semaphore>,
    fault: Fault,
    requests: u64,
}

impl Memory {
    /// The transfer of `node`.
    pub fn new(node: PeerId) -> Self {
        Self { node, peers: RwLock::default() }
    }

    /// Makes a node reachable that serves `source` to whom its `gate` allows, so many `uploads` at once.
    pub fn add(&self, peer: PeerId, source: Arc<dyn Source>, gate: Arc<dyn Gate>, uploads: usize) {
        let uploads = Arc::new(Semaphore::new(uploads));
        let node = Node { source, gate, uploads, fault: Fault::None, requests: 0 };
        self.peers.write().unwrap_or_else(PoisonError::into_inner).insert(peer, node);
    }

    /// Switches a fault of a node on or off, for fetches from now on.
    pub fn set(&self, peer: &PeerId, fault: Fault) {
        if let Some(node) = self.peers.write().unwrap_or_else(PoisonError::into_inner).get_mut(peer) {
            node.fault = fault;
        }
    }

    /// How many fetches from a node were tried.
    pub fn requests(&self, peer: &PeerId) -> u64 {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        peers.get(peer).map_or(0, |node| node.requests)
    }

    fn node(&self, peer: &PeerId) -> Option<Node> {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let node = peers.get_mut(peer)?;
        node.requests += 1;
        Some(node.clone())
    }
}

#[async_trait]
impl Transfer for Memory {
    async fn fetch(
        &self,
        peer: &Peer,
        digest: &Digest,
        start: u64,
        length: u64,
        limit: Duration,
    ) -> Result<Segment, FetchError> {
        let unreachable = |why: &str| FetchError::Unreachable(why.into());
        let node = self.node(&peer.id).ok_or_else(|| unreachable("no such node"))?;
        match node.fault {
            Fault::Dead => return Err(unreachable("connection refused")),
            Fault::Impostor => return Err(FetchError::Identity("another peer answered".into())),
            Fault::Busy(queue) => return Err(FetchError::Busy { queue }),
            Fault::Hung => {
                tokio::time::sleep(limit).await;
                return Err(unreachable("no answer in time"));
            }
            Fault::Late(time) if time > limit => {
                tokio::time::sleep(limit).await;
                return Err(unreachable("no answer in time"));
            }
            Fault::Late(time) => tokio::time::sleep(time).await,
            Fault::None | Fault::StallAfter(_) | Fault::BreakAfter(_) | Fault::Lie => {}
        }
        if !node.gate.allows(&self.node, Action::Connect) {
            return Err(unreachable("the peer closed the connection"));
        }
        if !node.gate.allows(&self.node, Action::Serve) {
            return Err(FetchError::NotFound);
        }
        let opened = tokio::time::timeout(limit, node.source.open(&self.node, digest, start, length)).await;
        let segment = match opened {
            Ok(Ok(Some(segment))) => segment,
            // The peer port says the same of content that it cannot read.
            Ok(Ok(None) | Err(_)) => return Err(FetchError::NotFound),
            Err(_) => return Err(unreachable("no answer in time")),
        };
        if segment.range.is_empty() {
            return Ok(segment);
        }
        let slot = node.uploads.try_acquire_owned().map_err(|_| FetchError::Busy { queue: 0 })?;
        Ok(Segment { body: disturb(segment.body, &node.fault, slot), ..segment })
    }
}

impl Contents {
    /// Holds `content` from now on.
    pub fn insert(&self, content: impl Into<Bytes>, media_type: &str) -> Descriptor {
        let content = content.into();
        let descriptor = Descriptor::new(Digest::sha256(&content), content.len() as u64, media_type);
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.insert(descriptor.digest, (descriptor.clone(), content));
        descriptor
    }

    /// Holds `digest` no longer. What is open stays readable.
    pub fn remove(&self, digest: &Digest) {
        self.held.write().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }
}

#[async_trait]
impl Source for Contents {
    async fn open(
        &self,
        _peer: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> Result<Option<Segment>, io::Error> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let Some((descriptor, content)) = held.get(digest) else { return Ok(None) };
        let end = start.saturating_add(length).min(descriptor.size).max(start);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let mut rest = content.slice(index(start)..index(end));
        let chunks =
            std::iter::from_fn(move || (!rest.is_empty()).then(|| Ok(rest.split_to(rest.len().min(CHUNK)))));
        Ok(Some(Segment {
            descriptor: descriptor.clone(),
            range: ByteRange { start, end },
            body: stream::iter(chunks).boxed(),
        }))
    }
}

/// The body of a peer with `fault`; holds the upload `slot` until it is dropped or has ended.
fn disturb(
    body: BoxStream<'static, io::Result<Bytes>>,
    fault: &Fault,
    slot: OwnedSemaphorePermit,
) -> BoxStream<'static, io::Result<Bytes>> {
    let lies = *fault == Fault::Lie;
    let body = body.map(move |chunk| {
        let _ = &slot;
        if lies {
            chunk.map(|chunk| chunk.iter().map(|byte| !byte).collect::<BytesMut>().freeze())
        } else {
            chunk
        }
    });
    match *fault {
        Fault::StallAfter(bytes) => first(body, bytes).chain(stream::pending()).boxed(),
        Fault::BreakAfter(bytes) => {
            let broken = stream::iter([Err(io::ErrorKind::ConnectionReset.into())]);
            first(body, bytes).chain(broken).boxed()
        }
        _ => body.boxed(),
    }
}

/// The first `bytes` of a body.
fn first(
    body: impl futures::Stream<Item = io::Result<Bytes>> + Send + 'static,
    bytes: u64,
) -> impl futures::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    body.map(move |chunk| {
        chunk.map(|mut chunk| {
            chunk.truncate(left);
            left -= chunk.len();
            chunk
        })
    })
    .take_while(|chunk| std::future::ready(chunk.as_ref().map_or(true, |chunk| !chunk.is_empty())))
}
