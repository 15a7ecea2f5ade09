//! Content from upstreams that a plan names: the mirror asks them itself, goes on at another one where one breaks off, and
//! verifies as it does with peers.
//!
//! Nothing is kept: what comes is the runtime's, and is there for peers once the runtime has it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::{Instant, sleep, timeout};

use super::discard::Discarding;
use super::download::DISCARD;
use super::metrics::Verification;
use super::remote::Collected;
use super::verify::Verifier;
use super::{Answer, BlobRequest, NotHere, Refusal, Shared, Source, empty, resolve};
use crate::oci::{ByteRange, Descriptor, Digest, MANIFEST_LIMIT, Name, RangeHeader, is_manifest};
use crate::policy::registry::{self as policy, Plan};
use crate::upstream::{FetchError, Fetched, Route, Upstreams, Want};

/// How long a manifest may take from its head to its end.
const MANIFEST_BODY: Duration = Duration::from_secs(5);
/// How often the rest of one content is asked for.
const RESUMES: u32 = 8;
/// So many bytes of one answer are progress, after which it may be asked for anew as often as at first.
const PROGRESS: u64 = 8 << 20;
/// Wrong contents that are remembered, and for how long.
const LIES: usize = 256;
const LEFT_OUT: Duration = Duration::from_secs(600);
/// Pause before all upstreams are asked again for the rest: their own first pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// Contents that were wrong, and from which upstreams: those are not asked for them again, as peers are not.
#[derive(Clone, Debug, Default)]
pub(super) struct Liars(Arc<Mutex<VecDeque<Lie>>>);

/// An upstream, what it sent wrong, and when.
type Lie = (Arc<str>, Digest, Instant);

impl Liars {
    fn add(&self, upstream: &Arc<str>, digest: &Digest) {
        let mut liars = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if liars.len() >= LIES {
            liars.pop_front();
        }
        liars.push_back((Arc::clone(upstream), *digest, Instant::now()));
    }

    /// Leaves all out for it that had a part in it, and alone for a while.
    fn blame(&self, upstreams: &dyn Upstreams, contributors: &[Arc<str>], digest: &Digest) {
        for upstream in contributors {
            self.add(upstream, digest);
            upstreams.blame(upstream, &format!("it had a part in wrong content for {digest}"));
        }
    }

    fn has(&self, upstream: &Arc<str>, digest: &Digest) -> bool {
        let liars = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        liars.iter().any(|(known, of, at)| known == upstream && of == digest && at.elapsed() < LEFT_OUT)
    }
}

/// The upstreams, as policies see them.
pub(super) fn described(upstreams: &dyn Upstreams) -> Arc<[policy::Upstream]> {
    if upstreams.is_empty() {
        return Arc::default();
    }
    let known = upstreams.known();
    let described = known.iter().map(|known| policy::Upstream {
        name: Arc::clone(&known.name),
        repositories: Arc::clone(&known.repositories),
        health: known.state.health,
        latency: known.state.latency,
    });
    described.collect()
}

/// Where `name` is at the upstream of a plan.
pub(super) fn route(route: &policy::Route, name: &Name) -> Route {
    Route {
        upstream: Arc::clone(&route.upstream),
        repository: route.repository.clone().unwrap_or_else(|| name.repository.clone()),
    }
}

/// Why no upstream gives it.
pub(super) fn cause(route: &Route, digest: &dyn std::fmt::Display, error: &FetchError) -> NotHere {
    tracing::debug!(upstream = %route.upstream, repository = %route.repository, content = %digest, %error, "not from an upstream");
    match error {
        FetchError::NotFound | FetchError::Range => NotHere::Unknown,
        FetchError::Refused(_) => NotHere::UpstreamsRefused,
        _ => NotHere::UpstreamsFailed,
    }
}

impl Shared {
    /// A whole, verified manifest from an upstream.
    pub(super) async fn upstream_manifest(
        &self,
        at: &Route,
        digest: &Digest,
    ) -> Result<(Descriptor, Bytes), NotHere> {
        if self.liars.has(&at.upstream, digest) {
            return Err(NotHere::UpstreamsFailed);
        }
        let want = Want { digest: *digest, is_manifest: true, start: 0, end: None, head: false };
        let fetched = self.upstreams.fetch(at, &want).await.map_err(|error| cause(at, digest, &error))?;
        let size = fetched.descriptor.size;
        if size > MANIFEST_LIMIT {
            return Err(NotHere::Unsupported);
        }
        let share = self.share(size).ok_or(NotHere::UpstreamsFailed)?;
        let content = match timeout(MANIFEST_BODY, whole(fetched.body, size)).await {
            Ok(Ok(content)) => Bytes::from_owner(Collected::new(content, share)),
            Ok(Err(error)) => return Err(cause(at, digest, &FetchError::Failed(error.to_string()))),
            Err(_) => return Err(cause(at, digest, &FetchError::Failed("it takes too long".into()))),
        };
        let found = Digest::of(digest.algorithm(), &content);
        if found != *digest {
            self.wrong(at, digest, &found);
            return Err(NotHere::UpstreamsFailed);
        }
        self.metrics.verified(Verification::Right);
        let claimed = &fetched.descriptor.media_type;
        Ok((self.keep_manifest(digest, claimed, &content, Source::Upstream), content))
    }

    /// A blob from the upstream `first`, and from all others of the plan where that breaks off.
    pub(super) async fn upstream_blob(
        &self,
        request: &BlobRequest,
        plan: &Plan,
        first: &Route,
    ) -> Result<Answer, Refusal> {
        let digest = &request.digest;
        if self.liars.has(&first.upstream, digest) {
            return Err(Refusal::NotHere(NotHere::UpstreamsFailed));
        }
        let fail = |error: &FetchError| Refusal::NotHere(cause(first, digest, error));
        let (start, end) = match request.range {
            // Where a suffix begins is known only with the size.
            Some(RangeHeader::Suffix(_)) => (0, Some(1)),
            Some(RangeHeader::From(start)) => (start, None),
            Some(RangeHeader::Between(start, last)) => (start, Some(last.saturating_add(1))),
            None => (0, None),
        };
        let want = Want { digest: *digest, is_manifest: false, start, end, head: request.head };
        let mut fetched = match self.upstreams.fetch(first, &want).await {
            Ok(fetched) => fetched,
            // The registry knows better than this node how long its content is.
            Err(FetchError::Range) => {
                let want = Want { head: true, start: 0, end: None, ..want };
                self.upstreams.fetch(first, &want).await.map_err(|error| fail(&error))?
            }
            Err(error) => return Err(fail(&error)),
        };
        let size = fetched.descriptor.size;
        let sizes = self.sizes(digest);
        if !sizes.is_empty() && !sizes.contains(&size) {
            tracing::debug!(upstream = %first.upstream, %digest, size, "an upstream has another size of a content");
            return Err(Refusal::NotHere(NotHere::UpstreamsFailed));
        }
        if is_manifest(&fetched.descriptor.media_type) && self.rules.load().is_private(&request.name) {
            return Err(Refusal::NotHere(NotHere::Private));
        }
        let range = resolve(request.range, size)?;
        let descriptor = fetched.descriptor.clone();
        if request.head {
            return Ok(Answer { descriptor, range, body: empty(), source: Source::Upstream });
        }
        if fetched.range.start != range.start {
            let want = Want { start: range.start, end: Some(range.end), ..want };
            fetched = self.upstreams.fetch(first, &want).await.map_err(|error| fail(&error))?;
        }
        let verify = range == ByteRange::whole(size) && (plan.always_verify || self.rules.load().verify);
        if !verify {
            self.metrics.verified(Verification::Unverified);
        }
        let mut routes: Vec<Route> = plan.routes().map(|at| route(at, &request.name)).collect();
        routes.retain(|at| at != first && !self.liars.has(&at.upstream, digest));
        routes.insert(0, first.clone());
        let pour = Pour {
            upstreams: Arc::clone(&self.upstreams),
            liars: self.liars.clone(),
            contributors: vec![Arc::clone(&first.upstream)],
            discarding: self.discarding.clone(),
            digest: *digest,
            size,
            routes,
            at: 0,
            body: Some(fetched.body),
            position: range.start,
            end: range.end,
            verifier: verify.then(|| Verifier::new(digest)),
            resumes: 0,
            began: range.start,
            is_passed_on: false,
            is_judged: false,
        };
        Ok(Answer { descriptor, range, body: pour.into_stream(), source: Source::Upstream })
    }

    fn wrong(&self, at: &Route, wanted: &Digest, found: &Digest) {
        self.metrics.verified(Verification::Mismatch);
        tracing::error!(%wanted, %found, upstream = %at.upstream, "an upstream sent wrong content");
        self.liars.blame(&*self.upstreams, std::slice::from_ref(&at.upstream), wanted);
    }
}

async fn whole(mut body: BoxStream<'static, io::Result<Bytes>>, size: u64) -> io::Result<Bytes> {
    let mut content = Vec::new();
    while let Some(chunk) = body.next().await {
        content.extend_from_slice(&chunk?);
    }
    if content.len() as u64 == size { Ok(content.into()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// A range of a content that flows from upstreams. Driven by its reader alone, so that memory does not grow with its size.
struct Pour {
    upstreams: Arc<dyn Upstreams>,
    liars: Liars,
    /// Whose bytes are in it.
    contributors: Vec<Arc<str>>,
    discarding: Discarding,
    digest: Digest,
    size: u64,
    /// Where it may come from; the rest comes from there in turn.
    routes: Vec<Route>,
    at: usize,
    body: Option<BoxStream<'static, io::Result<Bytes>>>,
    position: u64,
    end: u64,
    verifier: Option<Verifier>,
    resumes: u32,
    /// Where the present answer began.
    began: u64,
    /// The runtime has bytes of it.
    is_passed_on: bool,
    /// The digest is known to be right, or to be wrong.
    is_judged: bool,
}

impl Pour {
    fn into_stream(self) -> BoxStream<'static, io::Result<Bytes>> {
        futures::stream::try_unfold(self, |mut pour| async move {
            let chunk = pour.next().await?;
            pour.is_passed_on |= chunk.is_some();
            Ok(chunk.map(|chunk| (chunk, pour)))
        })
        .boxed()
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(chunk) = self.verifier.as_mut().and_then(Verifier::pop) {
                return Ok(Some(chunk));
            }
            if self.position == self.end {
                return self.finish().await;
            }
            let chunk = match &mut self.body {
                Some(body) => body.next().await,
                None => {
                    self.resume().await?;
                    continue;
                }
            };
            match chunk {
                Some(Ok(chunk)) => {
                    self.position += chunk.len() as u64;
                    match &mut self.verifier {
                        Some(verifier) => verifier.push(chunk),
                        None => return Ok(Some(chunk)),
                    }
                }
                Some(Err(_)) | None => self.body = None,
            }
        }
    }

    /// Asks for the rest where it came from, then elsewhere; the other way round where nothing came.
    async fn resume(&mut self) -> io::Result<()> {
        let want = Want {
            digest: self.digest,
            is_manifest: false,
            start: self.position,
            end: Some(self.end),
            head: false,
        };
        let skip = usize::from(self.position == self.began);
        if self.position - self.began >= PROGRESS {
            self.resumes = 0;
        }
        while self.resumes < RESUMES {
            self.resumes += 1;
            for turn in 0..self.routes.len() {
                let at = (self.at + turn + skip) % self.routes.len();
                match self.upstreams.fetch(&self.routes[at], &want).await {
                    Ok(Fetched { descriptor, range, body }) if self.goes_on(&descriptor, range) => {
                        tracing::debug!(digest = %self.digest, upstream = %self.routes[at].upstream, at = self.position, "resumed");
                        (self.at, self.body, self.began) = (at, Some(body), self.position);
                        let upstream = &self.routes[at].upstream;
                        if !self.contributors.contains(upstream) {
                            self.contributors.push(Arc::clone(upstream));
                        }
                        return Ok(());
                    }
                    Ok(_) | Err(_) => {}
                }
            }
            sleep(PAUSE).await;
        }
        tracing::info!(digest = %self.digest, at = self.position, "no upstream goes on with a content");
        Err(io::Error::other("no upstream goes on with it"))
    }

    fn goes_on(&self, descriptor: &Descriptor, range: ByteRange) -> bool {
        descriptor.size == self.size && range == ByteRange { start: self.position, end: self.end }
    }

    /// Everything came: the tail is released once its digest is right.
    async fn finish(&mut self) -> io::Result<Option<Bytes>> {
        let Some(verifier) = &mut self.verifier else { return Ok(None) };
        if !self.is_judged {
            self.is_judged = true;
            if let Err(mismatch) = verifier.finish() {
                self.wrong(&mismatch.found).await;
                return Err(io::Error::other(mismatch));
            }
            self.discarding.metrics.verified(Verification::Right);
        }
        Ok(verifier.pop_rest())
    }

    /// Whoever had a part in it is left alone for a while, and what the runtime got is discarded before its next attempt.
    async fn wrong(&mut self, found: &Digest) {
        self.discarding.metrics.verified(Verification::Mismatch);
        tracing::error!(wanted = %self.digest, %found, upstreams = ?self.contributors, "wrong content from upstreams");
        self.liars.blame(&*self.upstreams, &self.contributors, &self.digest);
        // In a task, since the client may go away meanwhile.
        let (discarding, digest) = (self.discarding.clone(), self.digest);
        let discarded = self.discarding.tasks.spawn(async move { discarding.now(&digest).await });
        let _ = timeout(DISCARD, discarded).await;
    }
}

/// What the runtime was left with may be wrong, and would then stay in the way of all later downloads.
impl Drop for Pour {
    fn drop(&mut self) {
        if !self.is_passed_on || self.is_judged {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (discarding, digest, upstreams) =
            (self.discarding.clone(), self.digest, Arc::clone(&self.upstreams));
        let (liars, contributors) = (self.liars.clone(), std::mem::take(&mut self.contributors));
        let look_after = async move {
            if discarding.if_stuck(&digest).await {
                tracing::error!(%digest, upstreams = ?contributors, "a download from upstreams came to a wrong end");
                liars.blame(&*upstreams, &contributors, &digest);
            }
        };
        self.discarding.tasks.spawn_on(look_after, &runtime);
    }
}
