//! Content from peers: small content is verified whole before its first byte is passed on, larger content streams.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep};

use super::download::{Context, Download};
use super::fetch::{Flow, Limits, NoFlow, Want};
use super::{Answer, BlobRequest, NotHere, Refusal, Shared, Source, empty, resolve, whole};
use crate::oci::{ByteRange, Descriptor, Digest, MANIFEST_LIMIT, Manifest, OCTET_STREAM, RangeHeader};
use crate::policy::registry::Plan;

/// Holders that a small content is asked of before giving up, when each sends wrong bytes.
const SMALL_TRIES: usize = 4;
/// How long the body of a manifest, and of another content that is verified before it is passed on, may take: less than
/// the registry's deadlines (1 s and 3 s), so that another holder can be asked.
const MANIFEST_BODY: Duration = Duration::from_millis(400);
const SMALL_BODY: Duration = Duration::from_millis(1500);
/// How long a piece of a content that flows is waited for, whatever its holders do: less than the registry's deadline for
/// blobs, since without it the whole pull fails.
const PIECE_WAIT: Duration = Duration::from_millis(2500);
/// Pause before the holders of such a piece are asked again.
const PIECE_PAUSE: Duration = Duration::from_millis(100);
/// Busy peers are waited for less than the registry's deadline for manifests allows.
const MANIFEST_BUSY: Duration = Duration::from_millis(500);

/// A part of some content that is asked of peers.
struct Part<'a> {
    digest: &'a Digest,
    start: u64,
    length: u64,
    /// See [`Want::busy`].
    busy: Duration,
    /// See [`Want::streamed`].
    streamed: bool,
    /// See [`Want::limits`].
    limits: Limits,
}

/// Content in memory with its share of the budget, which is given back when nobody has the bytes any more.
pub(super) struct Collected {
    content: Bytes,
    _share: OwnedSemaphorePermit,
}

impl Collected {
    pub(super) fn new(content: Bytes, share: OwnedSemaphorePermit) -> Self {
        Self { content, _share: share }
    }
}

impl AsRef<[u8]> for Collected {
    fn as_ref(&self) -> &[u8] {
        &self.content
    }
}

impl Shared {
    /// A whole, verified manifest from peers.
    pub(super) async fn peer_manifest(
        &self,
        digest: &Digest,
        limits: Limits,
    ) -> Result<(Descriptor, Bytes), NotHere> {
        let busy = self.rules.load().busy_wait.min(MANIFEST_BUSY);
        let (claimed, content) = self.small(digest, busy, limits).await?;
        Ok((self.keep_manifest(digest, &claimed, &content, Source::Peers), content))
    }

    /// What a verified manifest is, which is kept for the next request. What it says of itself is bound to its digest; `claimed`,
    /// its source's word, is not.
    pub(super) fn keep_manifest(
        &self,
        digest: &Digest,
        claimed: &str,
        content: &Bytes,
        source: Source,
    ) -> Descriptor {
        let manifest = Manifest::parse(content).unwrap_or_default();
        let form = || manifest.form().filter(|_| claimed == OCTET_STREAM);
        let media_type = manifest.media_type.as_deref().or_else(form).unwrap_or(claimed);
        let descriptor = Descriptor::new(*digest, content.len() as u64, media_type);
        self.cache.put(descriptor.clone(), content.clone(), source, Instant::now());
        self.cache.learn(&manifest.children);
        descriptor
    }

    /// Content of at most [`MANIFEST_LIMIT`] bytes from peers, with the media type that its peer claims. A peer that
    /// sends wrong bytes is left out and the next one asked: nothing was passed on yet.
    async fn small(
        &self,
        digest: &Digest,
        busy: Duration,
        limits: Limits,
    ) -> Result<(Arc<str>, Bytes), NotHere> {
        for _ in 0..SMALL_TRIES {
            let part = Part { digest, start: 0, length: MANIFEST_LIMIT, busy, streamed: false, limits };
            let flow = self.open(&part, &self.sizes(digest)).await?;
            if flow.size() > MANIFEST_LIMIT {
                return Err(NotHere::Unsupported);
            }
            let claimed = Arc::clone(&flow.segment.descriptor.media_type);
            if let Some(content) = self.collect(&part, flow, MANIFEST_BODY).await? {
                return Ok((claimed, content));
            }
        }
        Err(NotHere::PeersFailed)
    }

    /// A blob from peers; `cause` is why it is not served from here. `is_last`: nobody else is asked after them.
    pub(super) async fn peer_blob(
        &self,
        request: &BlobRequest,
        plan: &Plan,
        cause: NotHere,
        is_last: bool,
    ) -> Result<Answer, Refusal> {
        let (verify, busy, segment) = {
            let rules = self.rules.load();
            (rules.verify || plan.always_verify, rules.busy_wait, rules.segment)
        };
        let limits = plan.limits();
        let digest = &request.digest;
        let began = Instant::now();
        // Nobody starts in the middle but a piece, and another attempt where an answer was cut.
        let is_piece = is_last
            && !request.head
            && matches!(request.range, Some(RangeHeader::From(1..) | RangeHeader::Between(1.., _)))
            && self.pieces.is_flowing(digest);
        let sizes = self.sizes(digest);
        let is_small = !sizes.is_empty() && sizes.iter().all(|size| *size <= MANIFEST_LIMIT);
        for _ in 0..SMALL_TRIES {
            // Where a suffix begins is known only with the size; its first answer is thrown away then.
            let (start, length) = match request.range {
                _ if request.head => (0, 1),
                None | Some(RangeHeader::From(0)) => (0, segment),
                // The client may hang up after a piece.
                Some(RangeHeader::From(start)) => (start, segment.min(super::download::FIRST_SEGMENT)),
                Some(RangeHeader::Between(start, last)) => {
                    (start, segment.min((last - start).saturating_add(1)))
                }
                Some(RangeHeader::Suffix(_)) => (0, 1),
            };
            let streamed = !request.head && (!verify || !is_small || request.range.is_some());
            let part = Part { digest, start, length, busy, streamed, limits };
            let mut opened = self.open(&part, &sizes).await;
            while is_piece && opened.is_err() && began.elapsed() < PIECE_WAIT {
                sleep(PIECE_PAUSE).await;
                let left = PIECE_WAIT.saturating_sub(began.elapsed());
                opened = self.open(&Part { busy: busy.min(left), ..part }, &sizes).await;
            }
            let mut flow = opened.map_err(|reason| {
                Refusal::NotHere(if reason == NotHere::Unknown { cause } else { reason })
            })?;
            let size = flow.size();
            let claimed = Descriptor::new(*digest, size, &flow.segment.descriptor.media_type);
            if claimed.may_be_manifest() && self.rules.load().is_private(&request.name) {
                return Err(Refusal::NotHere(NotHere::Private));
            }
            let range = resolve(request.range, size)?;
            if request.head {
                return Ok(Answer { descriptor: claimed, range, body: empty(), source: Source::Peers });
            }
            let is_whole = range == ByteRange::whole(size);
            let is_collected = verify && is_whole && size <= MANIFEST_LIMIT;
            if flow.segment.range.start != range.start {
                let part = Part { start: range.start, length: segment, ..part };
                flow = self.open(&part, &[size]).await.map_err(Refusal::NotHere)?;
            }
            if !is_collected {
                let body = self.download(&part, flow, range, verify && is_whole).into_stream();
                return Ok(Answer { descriptor: claimed, range, body, source: Source::Peers });
            }
            let collected = self.collect(&part, flow, SMALL_BODY).await;
            if let Some(content) = collected.map_err(Refusal::NotHere)? {
                drop(self.pieces.begin(digest));
                return Ok(whole(claimed, content, false, Source::Peers));
            }
        }
        Err(Refusal::NotHere(NotHere::PeersFailed))
    }

    /// Reads and verifies the whole of a small content; `None` if it was wrong or did not come.
    async fn collect(&self, part: &Part<'_>, flow: Flow, limit: Duration) -> Result<Option<Bytes>, NotHere> {
        let size = flow.size();
        let share = self.share(size).ok_or(NotHere::PeersBusy)?;
        let download = self.download(part, flow, ByteRange::whole(size), true);
        let content = download.collect(limit).await.ok();
        Ok(content.map(|content| Bytes::from_owner(Collected::new(content, share))))
    }

    /// The share of so many bytes in the budget of what is in memory whole; none: it is used up.
    pub(super) fn share(&self, size: u64) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(size.div_ceil(1024)).unwrap_or(u32::MAX);
        Arc::clone(&self.collected).try_acquire_many_owned(kib).ok()
    }

    /// Sizes that `digest` may have; none: not known.
    pub(super) fn sizes(&self, digest: &Digest) -> Vec<u64> {
        match (self.cache.sizes(digest), self.store.view().expected_sizes(digest)) {
            (Some(mut sizes), Some(more)) => {
                sizes.extend(more);
                sizes
            }
            _ => Vec::new(),
        }
    }

    async fn open(&self, part: &Part<'_>, sizes: &[u64]) -> Result<Flow, NotHere> {
        let Part { digest, start, length, busy, streamed, limits } = *part;
        let want = Want {
            digest: *digest,
            start,
            length,
            sizes: sizes.into(),
            busy,
            streamed,
            goes_on: false,
            limits,
        };
        let holders = self.fetcher.find(digest).await;
        self.fetcher.open(want, holders).await.map_err(|reason| match reason {
            NoFlow::Nobody => NotHere::Unknown,
            NoFlow::Failed => NotHere::PeersFailed,
            NoFlow::Busy => NotHere::PeersBusy,
        })
    }

    fn download(&self, part: &Part<'_>, flow: Flow, range: ByteRange, verify: bool) -> Download {
        let rules = self.rules.load();
        let context = Context {
            fetcher: self.fetcher.clone(),
            discarding: self.discarding.clone(),
            stall: rules.stall,
            busy: part.busy,
            limits: part.limits,
            segment: rules.segment,
            prefetches: Arc::clone(&self.prefetches),
            pieces: self.pieces.clone(),
        };
        Download::new(context, *part.digest, flow, range, verify)
    }
}
