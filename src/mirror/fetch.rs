//! Gets a part of some content flowing from whichever holder gives it first.
//!
//! Holders are tried in the order of [`Peers::candidates`]: the next one when one fails, and also when one has not
//! answered after the hedging delay. A request that lost the race runs on to its own end in the background, so that
//! its outcome is learnt; a client that hangs up therefore never looks like a failure of a peer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use super::metrics::Metrics;
use super::peers::{Candidate, Load, Outcome, Peers};
use crate::network::{Network, Peer};
use crate::oci::{Action, Digest, Gate, Level, PeerId};
use crate::transfer::{FetchError, Segment, Transfer};

/// How long one peer may take from the request to the first byte of the body, connecting included: less than the 300 ms
/// that a peer which is not yet suspected may cost (DESIGN.md, promise 1).
const FIRST_BYTE: Duration = Duration::from_millis(230);
/// How long a request waits for the trial of a peer that is suspected (promise 1: at most 50 ms). The trial itself goes
/// on to [`FIRST_BYTE`], so that a peer that is well but far away is believed again.
const TRIAL_PATIENCE: Duration = Duration::from_millis(45);
/// When a request gives up on all peers that are not busy: enough to ask two more after the first one died in silence,
/// less than the registry's deadline for manifests (1 s).
const GIVE_UP: Duration = Duration::from_millis(750);
/// How long a neighbour is asked who holds something, by a node that has just joined (issue 4: one round trip, 20 ms).
const FIND: Duration = Duration::from_millis(20);
/// What an attempt's end may take to be known beyond its limit.
const MARGIN: Duration = Duration::from_millis(20);
/// Pause before busy peers are asked again; they queue requests themselves for longer than this.
const BUSY_PAUSE: Duration = Duration::from_millis(25);

/// Content that claims to be larger is not taken from peers: where no manifest says a size, only this keeps a lying
/// peer from filling the disk before the digest can be checked.
const SIZE_LIMIT: u64 = 64 << 30;

/// What requests to peers need.
#[derive(Clone)]
pub(crate) struct Fetcher {
    pub(crate) network: Arc<dyn Network>,
    pub(crate) transfer: Arc<dyn Transfer>,
    pub(crate) gate: Arc<dyn Gate>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) metrics: Metrics,
    /// Owns the requests that lost a race, for at most [`FIRST_BYTE`] or the busy limit, and what looks after downloads
    /// that the runtime was left with.
    pub(crate) tasks: TaskTracker,
}

/// What a policy says about the peers that are asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Peers below this level are not asked.
    pub(crate) least: Level,
    /// Peers that are asked at once.
    pub(crate) fan_out: usize,
}

impl Limits {
    /// Whether what any peer gave may be used.
    pub(crate) fn takes_all(self) -> bool {
        self.least <= Level::Blobs
    }
}

/// A part that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) digest: Digest,
    pub(crate) start: u64,
    pub(crate) length: u64,
    /// Sizes that the whole content may have; empty: not known. A peer that has it in another size has not got it.
    pub(crate) sizes: Arc<[u64]>,
    /// How long to wait for busy peers.
    pub(crate) busy: Duration,
    /// Its bytes go to the runtime before they are verified.
    pub(crate) streamed: bool,
    /// What comes before it is with the runtime already.
    pub(crate) goes_on: bool,
    /// Who may be asked, and how many at once.
    pub(crate) limits: Limits,
}

/// A segment whose first bytes are here.
pub(crate) struct Flow {
    pub(crate) peer: Arc<Peer>,
    pub(crate) segment: Segment,
    /// The first chunk; taken out by the reader. `None` for an empty range.
    pub(crate) first: Option<Bytes>,
    pub(crate) load: Load,
    pub(crate) opened: Instant,
}

/// Why no part flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFlow {
    /// Nobody who may be asked says that they hold it.
    Nobody,
    /// All that hold it failed, are suspected, or had not got it after all.
    Failed,
    /// All that are left are busy.
    Busy,
}

/// `None`: given up, with or without an outcome.
type Attempt = BoxFuture<'static, Option<Result<Flow, (Candidate, Outcome)>>>;

impl Fetcher {
    /// Gets `want` flowing from one of `holders`, or says why not, in [`GIVE_UP`] or the busy limit.
    pub(crate) async fn open(&self, want: Want, mut holders: Vec<Arc<Peer>>) -> Result<Flow, NoFlow> {
        let began = Instant::now();
        holders.retain(|peer| self.may_ask(peer, want.limits));
        if holders.is_empty() {
            return Err(NoFlow::Nobody);
        }
        let ids: Vec<PeerId> = holders.iter().map(|peer| peer.id.clone()).collect();
        let mut candidates = self.peers.candidates(holders, &want.digest, want.streamed, began).into_iter();
        let mut attempts: FuturesUnordered<Attempt> = FuturesUnordered::new();
        let mut asked: Vec<PeerId> = Vec::new();
        let mut busy: Vec<Candidate> = Vec::new();
        // Whether one was busy by its own word: it may then take as long as the limit to answer.
        let mut is_queueing = false;
        let mut was_busy = false;
        let mut give_up = began + GIVE_UP;
        // In mid-body a stall may cost more (2 s), and there is nobody else: one that is only slow is worth the wait.
        let is_last_hope = want.goes_on && ids.len() == 1;
        let mut limit = if is_last_hope { GIVE_UP - 2 * MARGIN } else { FIRST_BYTE };
        let mut next = candidates.next();
        loop {
            if attempts.is_empty() {
                match next.take() {
                    Some(candidate) => {
                        asked.push(candidate.peer.id.clone());
                        attempts.push(self.attempt(candidate, &want, limit));
                        next = candidates.next();
                    }
                    None if busy.is_empty() && self.peers.are_wearied(ids.iter(), began) => {
                        return Err(NoFlow::Busy);
                    }
                    None if busy.is_empty() => return Err(NoFlow::Failed),
                    None => {
                        let now = Instant::now();
                        let left = (began + want.busy).saturating_duration_since(now);
                        let waited_for = || busy.iter().map(|candidate| &candidate.peer.id);
                        if left.is_zero() {
                            self.peers.wearied(waited_for(), began, now);
                            return Err(NoFlow::Busy);
                        }
                        if self.peers.are_wearied(waited_for(), now) {
                            return Err(NoFlow::Busy);
                        }
                        tokio::time::sleep(BUSY_PAUSE.min(left)).await;
                        // The order of `busy` is that of their answers; two random choices decide anew.
                        let peers = busy.drain(..).map(|candidate| candidate.peer).collect();
                        let now = Instant::now();
                        candidates =
                            self.peers.candidates(peers, &want.digest, want.streamed, now).into_iter();
                        next = candidates.next();
                        limit = if is_queueing { left.max(FIRST_BYTE) } else { FIRST_BYTE };
                        give_up = Instant::now() + limit + 2 * MARGIN;
                        if next.is_none() {
                            return Err(NoFlow::Failed);
                        }
                        continue;
                    }
                }
            }
            let hedge_at = Instant::now() + self.peers.hedge_after();
            tokio::select! {
                Some(result) = attempts.next() => match result {
                    Some(Ok(flow)) => return Ok(flow),
                    Some(Err((candidate, outcome @ (Outcome::Busy(_) | Outcome::Slow | Outcome::Queued)))) => {
                        was_busy = true;
                        is_queueing |= matches!(outcome, Outcome::Busy(_));
                        busy.push(candidate);
                    }
                    Some(Err(_)) | None => {}
                },
                () = sleep_until(hedge_at),
                    if next.is_some() && limit == FIRST_BYTE && attempts.len() < want.limits.fan_out =>
                {
                    // A peer that answers others is slow, and a hedge may double the load. One that is silent may be gone.
                    let is_silent = matches!(&asked[..], [peer] if !self.peers.answered_since(peer, began));
                    if is_silent {
                        self.peers.silent(&asked[0], Instant::now());
                    }
                    if (is_silent || self.peers.may_hedge()) && let Some(candidate) = next.take() {
                        self.metrics.hedges.inc();
                        asked.push(candidate.peer.id.clone());
                        attempts.push(self.attempt(candidate, &want, limit));
                        next = candidates.next();
                    }
                }
                () = sleep_until(give_up) => {
                    if is_queueing {
                        self.peers.wearied(asked.iter(), began, Instant::now());
                    }
                    return Err(if was_busy { NoFlow::Busy } else { NoFlow::Failed });
                }
            }
        }
    }

    /// Whether content may be taken from `peer`.
    pub(crate) fn may_ask(&self, peer: &Peer, limits: Limits) -> bool {
        self.gate.level(&peer.id, Action::Fetch) >= limits.least.max(Level::Blobs)
    }

    /// How many peers hold `digest` by what is known now.
    pub(crate) fn holders(&self, digest: &Digest) -> usize {
        self.allowed(self.network.holders(digest)).len()
    }

    /// Who may be asked for `digest`. Where the view is not complete yet, that is a neighbour's word.
    pub(crate) async fn find(&self, digest: &Digest) -> Vec<Arc<Peer>> {
        self.allowed(self.network.find(digest, FIND).await)
    }

    /// Who may be asked for the rest of `digest`: those that gave other parts of it where the network knows of no holder,
    /// since bytes may flow where the control plane is down.
    pub(crate) fn holders_or(&self, digest: &Digest, sources: &[Arc<Peer>]) -> Vec<Arc<Peer>> {
        let holders = self.allowed(self.network.holders(digest));
        if holders.is_empty() { self.allowed(sources.to_vec()) } else { holders }
    }

    fn allowed(&self, mut peers: Vec<Arc<Peer>>) -> Vec<Arc<Peer>> {
        peers.retain(|peer| self.gate.allows(&peer.id, Action::Fetch));
        peers
    }

    fn attempt(&self, candidate: Candidate, want: &Want, limit: Duration) -> Attempt {
        let (limit, patience) =
            if candidate.trial { (FIRST_BYTE, TRIAL_PATIENCE) } else { (limit, limit + 2 * MARGIN) };
        let (sender, receiver) = oneshot::channel();
        let (fetcher, want) = (self.clone(), want.clone());
        let load = self.peers.begin(&candidate);
        self.tasks.spawn(async move {
            let began = Instant::now();
            // The transfer keeps to the limit itself and knows better what the time went to.
            let first_byte = fetcher.first_byte(&candidate.peer, &want, limit);
            let result = match timeout(limit + MARGIN, first_byte).await {
                Ok(result) => result,
                Err(_) => Err(FetchError::Unreachable(format!("no byte within {} ms", limit.as_millis()))),
            };
            let outcome = match &result {
                Ok(_) => Outcome::FirstByte(began.elapsed()),
                Err(FetchError::NotFound) => Outcome::Miss,
                Err(FetchError::Busy { queue }) => Outcome::Busy(*queue),
                Err(FetchError::Unreachable(_)) if fetcher.peers.answered_since(&candidate.peer.id, began) => {
                    Outcome::Slow
                }
                Err(FetchError::Unreachable(_)) => Outcome::Failed,
                Err(FetchError::Queued) => Outcome::Queued,
                Err(FetchError::Slow) => Outcome::Slow,
                Err(FetchError::Identity(_)) => Outcome::Stranger,
                Err(FetchError::Protocol(_)) => Outcome::Broken,
            };
            fetcher.metrics.fetched(outcome);
            let suspected = fetcher.peers.end(&candidate, &want.digest, outcome, Instant::now());
            if let (true, Err(error)) = (suspected, &result) {
                tracing::warn!(peer = %candidate.peer.id, node = candidate.peer.node, %error, "a peer is suspected");
            }
            let result = match result {
                Ok((segment, first)) => {
                    Ok(Flow { peer: candidate.peer, segment, first, load, opened: Instant::now() })
                },
                Err(_) => Err((candidate, outcome)),
            };
            // A receiver that is gone has its part from elsewhere: the segment is dropped and drained.
            drop(sender.send(result));
        });
        async move { timeout(patience, receiver).await.ok()?.ok() }.boxed()
    }

    async fn first_byte(
        &self,
        peer: &Peer,
        want: &Want,
        limit: Duration,
    ) -> Result<(Segment, Option<Bytes>), FetchError> {
        let mut segment = self.transfer.fetch(peer, &want.digest, want.start, want.length, limit).await?;
        let size = segment.descriptor.size;
        if size > SIZE_LIMIT || !(want.sizes.is_empty() || want.sizes.contains(&size)) {
            // Not its fault for sure: a crafted manifest may have named the size that was expected.
            tracing::debug!(peer = %peer.id, digest = %want.digest, size, "a peer has another size of a content");
            return Err(FetchError::NotFound);
        }
        let first = match segment.body.next().await {
            Some(Ok(chunk)) => Some(chunk),
            Some(Err(error)) => return Err(FetchError::Unreachable(error.to_string())),
            None if segment.range.is_empty() => None,
            None => return Err(FetchError::Protocol("an empty body".into())),
        };
        Ok((segment, first))
    }
}

impl Flow {
    /// Size of the whole content by the peer's word.
    pub(crate) fn size(&self) -> u64 {
        self.segment.descriptor.size
    }
}
