//! One content on its way from peers: segment after segment, the next one asked for before the last one ends, from
//! another peer when one fails, verified as it goes by.
//!
//! Driven by its reader alone: nothing is read from a peer that the client has not asked for, so memory does not grow
//! with the size of a layer, and time in which the client does not read never counts as a stall of a peer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::fetch::{Fetcher, Flow, NoFlow, Want};
use super::metrics::{Failover, Verification};
use super::peers::Outcome;
use super::verify::{Mismatch, Verifier};
use crate::oci::{ByteRange, Digest, PeerId};
use crate::store::Provider;

/// Less than this within `stall` is a stall (issue 3: 256 KiB/s over 1 s while the client reads).
const STALL_BYTES: u64 = 256 << 10;
/// The next segment is asked for when so much of the last one is left: enough to cover a round trip at 1 GB/s.
const PREFETCH_AT: u64 = 2 << 20;
/// What a segment that is prefetched holds in this process's memory: the connection's read buffer. The rest waits in
/// the kernel's socket buffers and at the peer.
pub(crate) const PREFETCHED: u64 = 1 << 20;
/// A client that did not read for this long may have let its peer run into the write limit.
const CLIENT_PAUSE: Duration = Duration::from_secs(10);
/// Failovers within one content; more and the connection to the client ends short.
const FAILOVERS: u32 = 16;

/// What a download needs besides the fetcher.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) fetcher: Fetcher,
    pub(crate) store: Arc<dyn Provider>,
    pub(crate) stall: Duration,
    pub(crate) busy: Duration,
    /// Bytes of a segment.
    pub(crate) segment: u64,
    /// One permit for each segment that may be prefetched at a time.
    pub(crate) prefetches: Arc<Semaphore>,
}

/// A range of some content that flows.
pub(crate) struct Download {
    context: Context,
    digest: Digest,
    size: u64,
    position: u64,
    end: u64,
    current: Option<Current>,
    next: Option<Next>,
    /// Peers whose bytes are in it.
    contributors: Vec<PeerId>,
    verifier: Option<Verifier>,
    failovers: u32,
    last_read: Instant,
    done: bool,
}

struct Current {
    flow: Flow,
    /// Offset after its last byte.
    end: u64,
    /// Bytes and waiting time in the present stall window.
    window: (u64, Duration),
}

struct Next {
    start: u64,
    flow: AbortOnDropHandle<Result<Flow, NoFlow>>,
    _permit: OwnedSemaphorePermit,
}

/// Why a content cannot be passed on whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    #[error("no peer goes on with it: {0:?}")]
    NoFlow(NoFlow),
    #[error("peers disagree about its size")]
    Size,
}

impl Download {
    /// A download that goes on from `flow`, which begins at `range.start`. `verify`: `range` is the whole content, and
    /// its digest is checked.
    pub(crate) fn new(context: Context, digest: Digest, flow: Flow, range: ByteRange, verify: bool) -> Self {
        let size = flow.size();
        if !verify {
            context.fetcher.metrics.verified(Verification::Unverified);
        }
        let mut download = Self {
            context,
            digest,
            size,
            position: range.start,
            end: range.end,
            current: None,
            next: None,
            contributors: Vec::new(),
            verifier: verify.then(|| Verifier::new(&digest)),
            failovers: 0,
            last_read: Instant::now(),
            done: false,
        };
        download.adopt(flow);
        download
    }

    /// Reads the whole into memory; for content of at most a few MiB.
    pub(crate) async fn collect(mut self) -> Result<Bytes, Failure> {
        let mut chunks = Vec::new();
        while let Some(chunk) = self.next().await? {
            chunks.push(chunk);
        }
        Ok(if chunks.len() == 1 { chunks.remove(0) } else { chunks.concat().into() })
    }

    /// The bytes as a stream. After an error there is nothing more.
    pub(crate) fn into_stream(self) -> BoxStream<'static, io::Result<Bytes>> {
        futures::stream::try_unfold(self, |mut download| async move {
            let chunk = download.next().await.map_err(io::Error::other)?;
            Ok(chunk.map(|chunk| (chunk, download)))
        })
        .boxed()
    }

    /// The next bytes that may be passed on.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let result = self.advance().await;
        self.last_read = Instant::now();
        if let Err(failure) = &result {
            self.done = true;
            self.report(failure).await;
        }
        result
    }

    async fn advance(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            if let Some(chunk) = self.verifier.as_mut().and_then(Verifier::pop) {
                return Ok(Some(chunk));
            }
            if self.position == self.end {
                return self.finish();
            }
            let chunk = self.read().await?;
            self.position += chunk.len() as u64;
            match &mut self.verifier {
                Some(verifier) => verifier.push(chunk),
                None => return Ok(Some(chunk)),
            }
        }
    }

    /// Everything came: the tail is released once its digest is right.
    fn finish(&mut self) -> Result<Option<Bytes>, Failure> {
        let Some(verifier) = &mut self.verifier else { return Ok(None) };
        if !self.done {
            self.done = true;
            verifier.finish()?;
            self.context.fetcher.metrics.verified(Verification::Right);
            self.current = None;
        }
        Ok(verifier.pop_rest())
    }

    /// The next chunk from whichever peer gives it.
    async fn read(&mut self) -> Result<Bytes, Failure> {
        loop {
            self.prefetch();
            let paused = self.last_read.elapsed() > CLIENT_PAUSE;
            let Some(current) = &mut self.current else {
                self.reopen().await?;
                continue;
            };
            let failover = match current.read(self.context.stall).await {
                Ok(Some(chunk)) => {
                    self.context.fetcher.metrics.bytes_from_peers.inc_by(chunk.len() as u64);
                    return Ok(chunk);
                }
                Ok(None) => {
                    self.current = None;
                    continue;
                }
                Err(failover) => failover,
            };
            let peer = Arc::clone(&current.flow.peer);
            self.current = None;
            // It may come from the same peer, and would then stall once more.
            self.next = None;
            self.failovers += 1;
            self.context.fetcher.metrics.failover(failover);
            if !paused {
                let peers = &self.context.fetcher.peers;
                if peers.end(&peer.id, &self.digest, Outcome::Failed, Instant::now()) {
                    tracing::warn!(peer = %peer.id, node = peer.node, reason = ?failover, "a peer failed in mid-body and is suspected");
                }
            }
            if self.failovers > FAILOVERS {
                return Err(Failure::NoFlow(NoFlow::Failed));
            }
        }
    }

    /// Gets the part from `position` on flowing: the prefetched one if it begins there.
    async fn reopen(&mut self) -> Result<(), Failure> {
        if let Some(next) = self.next.take_if(|next| next.start == self.position)
            && let Ok(Ok(flow)) = next.flow.await
        {
            return self.checked(flow);
        }
        let stop = self.next.as_ref().map_or(self.end, |next| next.start.clamp(self.position, self.end));
        let want = Want {
            digest: self.digest,
            start: self.position,
            length: (stop - self.position).min(self.context.segment),
            busy: self.context.busy,
        };
        let flow = self.context.fetcher.open(want).await.map_err(Failure::NoFlow)?;
        self.checked(flow)
    }

    /// A flow of another size than the first one's cannot belong to the same content.
    fn checked(&mut self, flow: Flow) -> Result<(), Failure> {
        if flow.size() == self.size && flow.segment.range.start == self.position {
            self.adopt(flow);
            return Ok(());
        }
        self.contributors.push(flow.peer.id.clone());
        Err(Failure::Size)
    }

    fn adopt(&mut self, flow: Flow) {
        if !self.contributors.contains(&flow.peer.id) {
            self.contributors.push(flow.peer.id.clone());
        }
        let end = flow.segment.range.end.min(self.end);
        self.current = Some(Current { flow, end, window: (0, Duration::ZERO) });
    }

    /// Asks for the next segment if the present one is about to end and there is a budget for it.
    fn prefetch(&mut self) {
        let Some(current) = &self.current else { return };
        let start = current.end;
        if self.next.is_some() || start >= self.end || start - self.position > PREFETCH_AT {
            return;
        }
        let Ok(permit) = Arc::clone(&self.context.prefetches).try_acquire_owned() else { return };
        let want = Want {
            digest: self.digest,
            start,
            length: (self.end - start).min(self.context.segment),
            busy: self.context.busy,
        };
        let fetcher = self.context.fetcher.clone();
        let flow = AbortOnDropHandle::new(tokio::spawn(async move { fetcher.open(want).await }));
        self.next = Some(Next { start, flow, _permit: permit });
    }

    /// Draws the consequences of a failure: liars are left out, and what the runtime got of it is discarded.
    async fn report(&mut self, failure: &Failure) {
        self.next = None;
        let fetcher = &self.context.fetcher;
        match failure {
            Failure::Mismatch(mismatch) => {
                fetcher.metrics.verified(Verification::Mismatch);
                fetcher.peers.lied(&self.contributors, &self.digest, Instant::now());
                tracing::error!(
                    digest = %mismatch.wanted, found = %mismatch.found, peers = ?self.contributors,
                    "peers sent wrong content; they are left out for it"
                );
            }
            Failure::Size => {
                fetcher.peers.lied(&self.contributors, &self.digest, Instant::now());
                tracing::error!(digest = %self.digest, peers = ?self.contributors, "peers disagree about a size");
            }
            Failure::NoFlow(reason) => {
                tracing::info!(digest = %self.digest, ?reason, at = self.position, "no peer goes on with a content");
                return;
            }
        }
        match self.context.store.discard_ingests(&self.digest).await {
            Ok(count) => {
                fetcher.metrics.discarded.inc_by(count as u64);
            }
            Err(error) => {
                tracing::error!(digest = %self.digest, %error, "cannot discard a poisoned download");
            }
        }
    }
}

impl Current {
    /// The next chunk, `None` at the segment's end.
    async fn read(&mut self, stall: Duration) -> Result<Option<Bytes>, Failover> {
        let chunk = match self.flow.first.take() {
            Some(chunk) => chunk,
            None => loop {
                let (bytes, waited) = &mut self.window;
                if *bytes >= STALL_BYTES {
                    (*bytes, *waited) = (0, Duration::ZERO);
                }
                let began = Instant::now();
                let result = timeout(stall.saturating_sub(*waited), self.flow.segment.body.next()).await;
                *waited += began.elapsed();
                match result {
                    Ok(Some(Ok(chunk))) if chunk.is_empty() => {}
                    Ok(Some(Ok(chunk))) => break chunk,
                    Ok(Some(Err(_))) => return Err(Failover::Broken),
                    Ok(None) => return Ok(None),
                    Err(_) => return Err(Failover::Stalled),
                }
            },
        };
        self.window.0 += chunk.len() as u64;
        self.flow.load.bytes += chunk.len() as u64;
        Ok(Some(chunk))
    }
}
