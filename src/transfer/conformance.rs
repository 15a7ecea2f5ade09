//! One suite for all transfers: what the mirror relies on. Panics where a transfer falls short.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::task::JoinSet;

use super::memory::Contents;
use super::{FetchError, Transfer};
use crate::network::Peer;
use crate::oci::{Action, ByteRange, Descriptor, Digest, Gate, Level, Name, OCTET_STREAM, PeerId};

/// Longer than any step takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(10);
/// Uploads that the peer has to allow at once; requests beyond them must not wait.
pub const UPLOADS: u32 = 2;
/// Larger than what sockets and buffers on the way hold, so that an unread segment keeps its upload.
const LARGE: usize = 48 << 20;

/// A node, and a peer of it that serves `contents` behind `gate`, [`UPLOADS`] at once and without a queue.
pub struct Fixture {
    /// The node's transfer.
    pub transfer: Arc<dyn Transfer>,
    /// The peer.
    pub peer: Peer,
    /// What the peer holds.
    pub contents: Arc<Contents>,
    /// The peer's gate.
    pub gate: Arc<Dial>,
    /// To be called after the gate changed.
    pub recheck: Box<dyn Fn() + Send + Sync>,
}

/// A gate that gives every peer one level, which can be turned.
#[derive(Debug)]
pub struct Dial(AtomicU8);

impl Dial {
    /// A gate at `level`.
    pub fn new(level: Level) -> Arc<Self> {
        Arc::new(Self(AtomicU8::new(level as u8)))
    }

    /// Another level from now on.
    pub fn turn(&self, level: Level) {
        self.0.store(level as u8, Ordering::SeqCst);
    }
}

impl Gate for Dial {
    fn level(&self, _peer: &PeerId, _action: Action) -> Level {
        let level = self.0.load(Ordering::SeqCst);
        let all = [Level::None, Level::Introduce, Level::Blobs, Level::Tags];
        all.into_iter().find(|known| *known as u8 == level).unwrap_or(Level::None)
    }

    fn serves(&self, peer: &PeerId, _repository: &Name) -> bool {
        self.allows(peer, Action::Serve)
    }
}

impl Fixture {
    /// A peer without addresses or claims, for transfers that need none.
    pub fn peer(id: PeerId) -> Peer {
        Peer { id, transfer: Vec::new(), node: String::new(), zone: String::new(), version: String::new() }
    }

    /// Runs the whole suite.
    pub async fn run(&self) {
        self.ranges().await;
        self.unknown().await;
        self.many_at_once().await;
        self.early_drop().await;
        self.busy().await;
        self.gate().await;
    }

    async fn fetch(
        &self,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> Result<(Descriptor, ByteRange, Vec<u8>), FetchError> {
        let segment = self.transfer.fetch(&self.peer, digest, start, length, LIMIT).await?;
        let chunks: Vec<Bytes> = segment.body.try_collect().await.expect("the body ends well");
        Ok((segment.descriptor, segment.range, chunks.concat()))
    }

    /// Whole, parts, past the end, nothing at all.
    async fn ranges(&self) {
        let content: Vec<u8> = (0..700_001_u32).map(|i| (i % 251) as u8).collect();
        let size = content.len() as u64;
        let descriptor = self.contents.insert(content.clone(), "application/vnd.oci.image.layer.v1.tar+zstd");
        for (start, length) in [
            (0, size),
            (0, 1 << 20),
            (1, 1),
            (300_000, 100_000),
            (size - 1, 10),
            (size, 1),
            (size + 9, 1),
            (5, 0),
        ] {
            let end = (start + length).min(size).max(start);
            let expected = content.get(start as usize..end as usize).unwrap_or_default();
            let (described, range, body) = self.fetch(&descriptor.digest, start, length).await.expect("held");
            assert_eq!(
                (described, range),
                (descriptor.clone(), ByteRange { start, end }),
                "{start}+{length}"
            );
            assert!(body == expected, "{start}+{length}: the bytes differ");
        }
        let nothing = self.contents.insert(Bytes::new(), OCTET_STREAM);
        let (described, range, body) = self.fetch(&nothing.digest, 0, 1).await.expect("held");
        assert_eq!((described, range, body), (nothing, ByteRange::whole(0), Vec::new()));
    }

    async fn unknown(&self) {
        let outcome = self.fetch(&Digest::sha256(b"nobody has this"), 0, 10).await;
        assert!(matches!(outcome, Err(FetchError::NotFound)), "{outcome:?}");
    }

    /// Fifty tasks: each gets its bytes, or is told that the peer is busy and tries again.
    async fn many_at_once(&self) {
        let descriptor = self.contents.insert(vec![7; 300_000], OCTET_STREAM);
        let mut tasks = JoinSet::new();
        for start in 0..50 {
            let (transfer, peer) = (Arc::clone(&self.transfer), self.peer.clone());
            tasks.spawn(async move {
                loop {
                    match transfer.fetch(&peer, &descriptor.digest, start, 200_000, LIMIT).await {
                        Ok(segment) => {
                            let chunks: Vec<Bytes> =
                                segment.body.try_collect().await.expect("the body ends well");
                            return chunks.iter().map(Bytes::len).sum::<usize>();
                        }
                        Err(FetchError::Busy { .. }) => tokio::task::yield_now().await,
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        let all = tokio::time::timeout(LIMIT, tasks.join_all()).await.expect("no fetch starves");
        assert_eq!(all, vec![200_000; 50]);
    }

    /// A segment that nobody wants any more disturbs nothing.
    async fn early_drop(&self) {
        let descriptor = self.contents.insert(vec![3; 4 << 20], OCTET_STREAM);
        for _ in 0..3 {
            let mut segment = self.open(&descriptor.digest, 4 << 20).await;
            let first = segment.body.try_next().await.expect("the body begins well").expect("it has bytes");
            assert!(!first.is_empty());
        }
        let last = self.open(&descriptor.digest, 100).await;
        assert_eq!(last.range.len(), 100);
    }

    /// Uploads are limited; a dropped or finished one makes room.
    async fn busy(&self) {
        let descriptor = self.contents.insert(vec![9; LARGE], OCTET_STREAM);
        let mut held = Vec::new();
        for _ in 0..UPLOADS {
            held.push(self.open(&descriptor.digest, LARGE as u64).await);
        }
        let outcome = self.fetch(&descriptor.digest, 0, 10).await;
        assert!(matches!(outcome, Err(FetchError::Busy { queue: 0 })), "{outcome:?}");
        // A busy peer says so in any limit: silence would look like a peer that hangs.
        let short = Duration::from_millis(250);
        let outcome = self.transfer.fetch(&self.peer, &descriptor.digest, 0, 10, short).await.map(|_| ());
        assert!(matches!(outcome, Err(FetchError::Busy { .. })), "{outcome:?}");
        drop(held);
        let _room = self.open(&descriptor.digest, 10).await;
    }

    /// Opens a segment as soon as an upload is free.
    async fn open(&self, digest: &Digest, length: u64) -> super::Segment {
        let opened = tokio::time::timeout(LIMIT, async {
            loop {
                match self.transfer.fetch(&self.peer, digest, 0, length, LIMIT).await {
                    Ok(segment) => return segment,
                    Err(FetchError::Busy { .. }) => tokio::task::yield_now().await,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        opened.await.expect("an upload comes free")
    }

    /// What is not allowed looks like what is not there, and a change acts at once.
    async fn gate(&self) {
        let descriptor = self.contents.insert(vec![5; LARGE], OCTET_STREAM);
        assert!(self.fetch(&descriptor.digest, 0, 10).await.is_ok());
        self.gate.turn(Level::Introduce);
        let outcome = self.fetch(&descriptor.digest, 0, 10).await;
        assert!(matches!(outcome, Err(FetchError::NotFound)), "{outcome:?}");
        self.gate.turn(Level::None);
        (self.recheck)();
        let outcome = self.fetch(&descriptor.digest, 0, 10).await;
        assert!(matches!(outcome, Err(FetchError::Unreachable(_) | FetchError::NotFound)), "{outcome:?}");
        self.gate.turn(Level::Blobs);
        assert!(self.fetch(&descriptor.digest, 0, 10).await.is_ok(), "allowed again");
    }
}
