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

use super::discard::Discarding;
use super::fetch::{Fetcher, Flow, Limits, NoFlow, Want};
use super::metrics::{Failover, Verification};
use super::pieces::{Piece, Pieces};
use super::verify::{Mismatch, Verifier};
use crate::network::Peer;
use crate::oci::{ByteRange, Digest, PeerId};

/// Less than this within `stall` is a stall (issue 3: 256 KiB/s over 1 s while the client reads).
const STALL_BYTES: u64 = 256 << 10;
/// The next segment is asked for when so much of the last one is left: enough to cover a round trip at 1 GB/s.
const PREFETCH_AT: u64 = 2 << 20;
/// What a segment that is prefetched holds in this process's memory: the connection's read buffer. The rest waits in
/// the kernel's socket buffers and at the peer.
pub(crate) const PREFETCHED: u64 = 1 << 20;
/// A client that did not read for this long may have let its peer run into the write limit.
const CLIENT_PAUSE: Duration = Duration::from_secs(10);
/// After a stall, busy peers are waited for no longer than both together may cost (2 s).
const AFTER_STALL: Duration = Duration::from_millis(700);
/// What is asked for first where a client may want only a piece: containerd's parallel fetch asks for open ranges and hangs up
/// after its chunk. What it leaves is drained or costs the connection; segments double up to the configured size.
pub(super) const FIRST_SEGMENT: u64 = 1 << 20;
/// How long the end of a stream waits for the first look at the downloads that it poisoned.
pub(super) const DISCARD: Duration = Duration::from_secs(2);
/// Failovers within one content; more and the connection to the client ends short.
const FAILOVERS: u32 = 16;

/// What a download needs besides the fetcher.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) fetcher: Fetcher,
    pub(crate) discarding: Discarding,
    pub(crate) stall: Duration,
    pub(crate) busy: Duration,
    /// Most bytes of a segment.
    pub(crate) segment: u64,
    pub(crate) limits: Limits,
    /// One permit for each segment that may be prefetched at a time.
    pub(crate) prefetches: Arc<Semaphore>,
    /// Told which contents go to the runtime.
    pub(crate) pieces: Pieces,
}

/// A range of some content that flows.
pub(crate) struct Download {
    context: Context,
    digest: Digest,
    size: u64,
    position: u64,
    end: u64,
    /// Bytes of the next segment.
    segment: u64,
    current: Option<Current>,
    next: Option<Next>,
    /// Peers whose bytes are in it.
    contributors: Vec<Arc<Peer>>,
    verifier: Option<Verifier>,
    failovers: u32,
    last_read: Instant,
    /// When the client last went on after a long pause.
    paused: Option<Instant>,
    /// Bytes go to the runtime before the digest is known to be right.
    is_streamed: bool,
    /// Its place among the contents that flow, if they do.
    piece: Option<Piece>,
    /// And some did.
    is_passed_on: bool,
    /// From a source that was not believed any more then.
    is_doubted: bool,
    /// The digest is known to be right, or known to be wrong.
    is_judged: bool,
}

struct Current {
    flow: Flow,
    start: u64,
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
    Mismatch(#[from] Box<Mismatch>),
    #[error("no peer goes on with it: {0:?}")]
    NoFlow(NoFlow),
}

impl Download {
    /// A download that goes on from `flow`, which begins at `range.start`. `verify`: `range` is the whole content, and
    /// its digest is checked.
    pub(crate) fn new(context: Context, digest: Digest, flow: Flow, range: ByteRange, verify: bool) -> Self {
        let size = flow.size();
        if range == ByteRange::whole(size) {
            context.fetcher.peers.begins_anew(&digest);
        }
        if !verify {
            context.fetcher.metrics.verified(Verification::Unverified);
        }
        let mut download = Self {
            context,
            digest,
            size,
            position: range.start,
            end: range.end,
            segment: flow.segment.range.len(),
            current: None,
            next: None,
            contributors: Vec::new(),
            verifier: verify.then(|| Verifier::new(&digest)),
            failovers: 0,
            last_read: Instant::now(),
            paused: None,
            is_streamed: false,
            piece: None,
            is_passed_on: false,
            is_doubted: false,
            is_judged: false,
        };
        download.adopt(flow);
        download
    }

    /// Reads the whole into memory, in `limit`; for content of at most a few MiB, of which nothing was passed on yet. A peer
    /// that has not stalled by then is slow, and not at fault.
    pub(crate) async fn collect(mut self, limit: Duration) -> Result<Bytes, Failure> {
        let mut chunks = Vec::new();
        let read = async {
            while let Some(chunk) = self.next().await? {
                chunks.push(chunk);
            }
            Ok::<_, Failure>(())
        };
        let began = Instant::now();
        if let Ok(result) = timeout(limit, read).await {
            result?;
            return Ok(if chunks.len() == 1 { chunks.remove(0) } else { chunks.concat().into() });
        }
        if self.position as f64 <= STALL_BYTES as f64 * began.elapsed().as_secs_f64() {
            self.blame(Failover::Stalled);
        }
        Err(Failure::NoFlow(NoFlow::Failed))
    }

    /// The bytes as a stream. After an error there is nothing more.
    pub(crate) fn into_stream(mut self) -> BoxStream<'static, io::Result<Bytes>> {
        self.is_streamed = true;
        self.piece = Some(self.context.pieces.begin(&self.digest));
        futures::stream::try_unfold(self, |mut download| async move {
            let chunk = download.next().await.map_err(io::Error::other)?;
            Ok(chunk.map(|chunk| (chunk, download)))
        })
        .boxed()
    }

    /// The next bytes that may be passed on.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.last_read.elapsed() > CLIENT_PAUSE {
            self.paused = Some(Instant::now());
        }
        let result = self.advance().await;
        self.last_read = Instant::now();
        match &result {
            Ok(chunk) => {
                if self.is_streamed && chunk.is_some() && !std::mem::replace(&mut self.is_passed_on, true) {
                    self.doubt_until_judged();
                }
            }
            Err(failure) => self.report(failure).await,
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
        if !self.is_judged {
            self.is_judged = true;
            verifier.finish()?;
            self.context.fetcher.metrics.verified(Verification::Right);
            self.context.fetcher.peers.begins_anew(&self.digest);
            self.current = None;
        }
        Ok(verifier.pop_rest())
    }

    /// The next chunk from whichever peer gives it.
    async fn read(&mut self) -> Result<Bytes, Failure> {
        loop {
            self.prefetch();
            let Some(current) = &mut self.current else {
                self.reopen().await?;
                continue;
            };
            // Grants change while bytes flow: what comes from then on is not taken.
            if !self.context.fetcher.may_ask(&current.flow.peer, self.context.limits) {
                self.leave();
                if self.failovers > FAILOVERS {
                    return Err(Failure::NoFlow(NoFlow::Failed));
                }
                continue;
            }
            let failover = match current.read(self.context.stall).await {
                Ok(Some(chunk)) => {
                    self.context.fetcher.metrics.bytes_from_peers.inc_by(chunk.len() as u64);
                    return Ok(chunk);
                }
                // A peer that gives nothing of a range that there is would be asked for ever.
                Ok(None) if self.position == current.start => Failover::Broken,
                Ok(None) => {
                    self.current = None;
                    continue;
                }
                Err(failover) => failover,
            };
            self.blame(failover);
            if self.failovers > FAILOVERS {
                return Err(Failure::NoFlow(NoFlow::Failed));
            }
        }
    }

    /// The present flow failed: its peer is suspected, unless the client let it wait.
    fn blame(&mut self, failover: Failover) {
        // The next segment may come from the same peer, and would then stall once more.
        self.next = None;
        let Some(Current { flow, .. }) = self.current.take() else { return };
        self.failovers += 1;
        let fetcher = &self.context.fetcher;
        fetcher.metrics.failover(failover);
        let waited = self.paused.is_some_and(|paused| flow.opened <= paused);
        if !waited && fetcher.peers.failed(&flow.peer.id, Instant::now()) {
            let (peer, node) = (&flow.peer.id, &flow.peer.node);
            tracing::warn!(%peer, node, reason = ?failover, "a peer failed in mid-body and is suspected");
        }
    }

    /// The peer of the present flow is not trusted any more, which is no fault of it.
    fn leave(&mut self) {
        (self.next, self.current) = (None, None);
        self.failovers += 1;
        self.context.fetcher.metrics.failover(Failover::Distrusted);
    }

    /// Gets the part from `position` on flowing: the prefetched one if there is one.
    async fn reopen(&mut self) -> Result<(), Failure> {
        if let Some(next) = self.next.take_if(|next| next.start == self.position) {
            match next.flow.await {
                // One that has waited long for a slow client may have run into its peer's limit.
                Ok(Ok(flow)) if flow.opened.elapsed() < CLIENT_PAUSE => {
                    self.adopt(flow);
                    return Ok(());
                }
                // They were waited for.
                Ok(Err(NoFlow::Busy)) => return Err(Failure::NoFlow(NoFlow::Busy)),
                _ => {}
            }
        }
        let want = self.want(self.position);
        let fetcher = &self.context.fetcher;
        let holders = fetcher.holders_or(&self.digest, &self.contributors);
        let flow = fetcher.open(want, holders).await.map_err(Failure::NoFlow)?;
        self.adopt(flow);
        Ok(())
    }

    /// The segment at `start`. Content of another size than the first flow's is another content.
    fn want(&self, start: u64) -> Want {
        Want {
            digest: self.digest,
            start,
            length: (self.end - start).min(self.segment),
            sizes: Arc::new([self.size]),
            busy: if self.failovers > 0 { self.context.busy.min(AFTER_STALL) } else { self.context.busy },
            streamed: self.is_streamed,
            goes_on: self.is_passed_on,
            limits: self.context.limits,
        }
    }

    fn adopt(&mut self, flow: Flow) {
        if self.contributors.iter().all(|peer| peer.id != flow.peer.id) {
            self.contributors.push(Arc::clone(&flow.peer));
            if self.is_passed_on {
                self.doubt_until_judged();
            }
        }
        let end = flow.segment.range.end.min(self.end);
        self.segment = self.segment.saturating_mul(2).min(self.context.segment);
        self.current = Some(Current { flow, start: self.position, end, window: (0, Duration::ZERO) });
    }

    /// Asks for the next segment if the present one is about to end and there is a budget for it.
    fn prefetch(&mut self) {
        let Some(current) = &self.current else { return };
        let start = current.end;
        if self.next.is_some() || start >= self.end || start - self.position > PREFETCH_AT {
            return;
        }
        let Ok(permit) = Arc::clone(&self.context.prefetches).try_acquire_owned() else { return };
        let want = self.want(start);
        let fetcher = self.context.fetcher.clone();
        let holders = fetcher.holders_or(&self.digest, &self.contributors);
        let flow = AbortOnDropHandle::new(tokio::spawn(async move { fetcher.open(want, holders).await }));
        self.next = Some(Next { start, flow, _permit: permit });
    }

    /// Bytes of its sources are with the runtime: should one of them turn out to lie meanwhile, they go with its other
    /// ones, before the runtime's next attempt can begin on top of them.
    fn doubt_until_judged(&mut self) {
        let peers = &self.context.fetcher.peers;
        self.is_doubted |= peers.left_unverified(&self.sources(), &self.digest, Instant::now());
    }

    /// Peers that had a part in it.
    fn sources(&self) -> Vec<PeerId> {
        self.contributors.iter().map(|peer| peer.id.clone()).collect()
    }

    /// Draws the consequences of a failure: liars are left out, and what the runtime got of them is discarded.
    async fn report(&mut self, failure: &Failure) {
        self.next = None;
        if let Some(piece) = &mut self.piece {
            piece.cut();
        }
        let mismatch = match failure {
            Failure::Mismatch(mismatch) => mismatch,
            Failure::NoFlow(reason) => {
                tracing::info!(digest = %self.digest, ?reason, at = self.position, "no peer goes on with a content");
                return;
            }
        };
        let Context { fetcher, discarding, .. } = &self.context;
        let sources = self.sources();
        fetcher.metrics.verified(Verification::Mismatch);
        tracing::error!(
            digest = %mismatch.wanted, found = %mismatch.found, peers = ?sources,
            "peers sent wrong content; they are left out for it"
        );
        let mut poisoned = fetcher.peers.lied(&sources, &self.digest, Instant::now());
        // What is held was right, whoever gave it. Of content that was not streamed the runtime got nothing: its own
        // download has begun all the same, and is about to get the right bytes.
        poisoned.retain(|digest| discarding.store.describe(digest).is_none());
        poisoned.extend(self.is_streamed.then_some(self.digest));
        // In a task, since the client may go away meanwhile. The stream does not end before the first look, or the runtime
        // would be at its next attempt.
        let discards = poisoned.into_iter().map(|digest| {
            let discarding = discarding.clone();
            async move { discarding.now(&digest).await }
        });
        let discarded = fetcher.tasks.spawn(futures::future::join_all(discards.collect::<Vec<_>>()));
        let _ = timeout(DISCARD, discarded).await;
    }
}

/// Where the runtime was left with bytes that nobody has judged, the mirror looks after its download.
impl Drop for Download {
    fn drop(&mut self) {
        if !self.is_passed_on || self.is_judged {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (context, digest, sources) = (self.context.clone(), self.digest, self.sources());
        let peers = Arc::clone(&context.fetcher.peers);
        // A lie since then has discarded it already, and by now the next attempt may be under way.
        let is_doubted = self.is_doubted;
        let look_after = async move {
            if is_doubted {
                return context.discarding.now(&digest).await;
            }
            if context.discarding.if_stuck(&digest).await {
                tracing::error!(
                    %digest, peers = ?sources,
                    "a download with a part from peers came to a wrong end; they are left out for it"
                );
                peers.lied(&sources, &digest, Instant::now());
            }
        };
        self.context.fetcher.tasks.spawn_on(look_after, &runtime);
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
        self.flow.load.count(chunk.len() as u64, Instant::now());
        Ok(Some(chunk))
    }
}
