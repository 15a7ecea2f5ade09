//! The use case: a request of the runtime is answered from here, else from peers, else by "not here", so that the
//! runtime goes to its next host. One hop only: a peer's request is answered from this node's store alone.
//!
//! Finds holders, chooses and races them, resumes, verifies what they send, and tells the network what is held here.
//! It speaks no HTTP and names no adapter: store, network, transfer and upstream are traits.

mod advertise;
mod cache;
mod download;
mod fetch;
mod metrics;
mod peers;
mod pieces;
mod policy;
mod remote;
mod serve;
mod tags;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use bytesize::ByteSize;
use futures::StreamExt;
use futures::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::network::Network;
use crate::oci::{
    ByteRange, Descriptor, Digest, Gate, MANIFEST_LIMIT, Name, PatternError, Patterns, PeerId, RangeError,
    RangeHeader, Tag, is_manifest,
};
use crate::policy::Reason;
use crate::policy::registry::{Operation, Plan, Reference, RegistryPolicy};
use crate::store::{self, Provider};
use crate::transfer::Transfer;
use crate::upstream::Upstream;

pub use advertise::advertise;
use cache::Cache;
use fetch::Fetcher;
pub use metrics::Metrics;
use peers::Peers;
pub use peers::{Conduct, Faults};
use pieces::Pieces;
pub use policy::Explained;
pub use serve::{Callers, Serve};

/// Referrers in one list; each is read from the disk.
const REFERRERS: usize = 64;
/// Bytes of content from peers that are in memory whole, while they are verified and until their clients have them, in KiB.
/// Where this is used up the answer is "not here".
const COLLECTED: usize = 32 << 10;

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
    /// A policy leaves it to the registry.
    Bypassed,
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

/// What the mirror is made of; `app` chooses the adapters.
pub struct Parts {
    /// This node's content.
    pub store: Arc<dyn Provider>,
    /// The other nodes.
    pub network: Arc<dyn Network>,
    /// Bytes from them.
    pub transfer: Arc<dyn Transfer>,
    /// Whether registries answer.
    pub upstream: Arc<dyn Upstream>,
    /// How far peers are trusted.
    pub gate: Arc<dyn Gate>,
    /// What is mirrored, and how.
    pub policy: Arc<dyn RegistryPolicy>,
    /// This node's zone; empty: unknown.
    pub zone: String,
    /// Counters.
    pub metrics: Metrics,
}

/// The mirror of one node. Clones share everything.
#[derive(Clone)]
pub struct Mirror {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Provider>,
    upstream: Arc<dyn Upstream>,
    gate: Arc<dyn Gate>,
    policy: Arc<dyn RegistryPolicy>,
    plans: policy::Plans,
    fetcher: Fetcher,
    rules: Arc<ArcSwap<Rules>>,
    cache: Cache,
    metrics: Metrics,
    prefetches: Arc<Semaphore>,
    /// In KiB.
    collected: Arc<Semaphore>,
    disputes: tags::Disputes,
    pieces: Pieces,
}

/// The configuration in force; clones share it, and it is swapped whole when it changes.
#[derive(Clone)]
pub struct Settings(Arc<ArcSwap<Rules>>);

/// The configuration, compiled.
struct Rules {
    private: Patterns,
    peers_first: Patterns,
    verify: bool,
    segment: u64,
    stall: Duration,
    busy_wait: Duration,
    prefetches: usize,
    serve_unowned: bool,
}

impl Mirror {
    /// A mirror of `parts`. The prefetch budget is the one that `settings` have now.
    pub fn new(settings: &Settings, parts: Parts) -> Self {
        let prefetches = settings.0.load().prefetches;
        let fetcher = Fetcher {
            network: parts.network,
            transfer: parts.transfer,
            gate: Arc::clone(&parts.gate),
            peers: Arc::new(Peers::new(parts.zone)),
            metrics: parts.metrics.clone(),
            tasks: TaskTracker::new(),
        };
        let shared = Shared {
            store: parts.store,
            upstream: parts.upstream,
            gate: parts.gate,
            policy: parts.policy,
            plans: policy::Plans::default(),
            fetcher,
            rules: Arc::clone(&settings.0),
            cache: Cache::default(),
            metrics: parts.metrics,
            prefetches: Arc::new(Semaphore::new(prefetches)),
            collected: Arc::new(Semaphore::new(COLLECTED)),
            disputes: tags::Disputes::default(),
            pieces: Pieces::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// How much is held here.
    pub fn counts(&self) -> store::Counts {
        self.shared.store.view().counts()
    }

    /// What was seen of each peer as a source.
    pub fn conduct(&self) -> HashMap<PeerId, Conduct> {
        self.shared.fetcher.peers.conduct(Instant::now())
    }

    /// Tags of `name` that are held here; none of a private repository.
    pub fn tags(&self, name: &Name) -> Vec<Tag> {
        let allowed = || self.shared.allows_list(Operation::Tags, name, None);
        if self.shared.rules.load().is_private(name) || !allowed() {
            Vec::new()
        } else {
            self.shared.store.view().tags(name)
        }
    }

    /// Manifests held here under `name` that are about `digest`, with their bytes; of those, none that is known under a
    /// private repository too.
    ///
    /// # Errors
    /// The repository is private, or a policy says no: an empty list would say that there are none, and the runtime would not
    /// ask elsewhere.
    pub async fn referrers(&self, name: &Name, digest: &Digest) -> Result<Vec<(Descriptor, Bytes)>, NotHere> {
        if self.shared.rules.load().is_private(name) {
            return Err(NotHere::Private);
        }
        if !self.shared.allows_list(Operation::Referrers, name, Some(digest)) {
            return Err(NotHere::Bypassed);
        }
        let mut referrers = Vec::new();
        for descriptor in self.shared.store.view().referrers(name, digest).into_iter().take(REFERRERS) {
            if self.shared.is_private_content(&descriptor.digest) {
                continue;
            }
            if let Some(content) = self.shared.read(&descriptor).await {
                referrers.push((descriptor, content));
            }
        }
        Ok(referrers)
    }

    /// Answers a request for a manifest.
    ///
    /// # Errors
    /// Why the runtime has to go to its next host.
    pub async fn manifest(&self, name: &Name, target: &Target, head: bool) -> Result<Answer, Refusal> {
        let reference = match target {
            Target::Tag(tag) => Reference::Tag(tag.clone()),
            Target::Digest(digest) => Reference::Digest(*digest),
        };
        let plan = self.shared.plan_manifest(name, reference).map_err(|refusal| match (target, refusal) {
            // A list of referrers by its old name: any answer but 404 ends what containerd is about.
            (Target::Tag(tag), Refusal::Denied(_)) if tag.is_referrers() => {
                Refusal::NotHere(NotHere::Bypassed)
            }
            (_, refusal) => refusal,
        })?;
        let answer = self.shared.manifest(name, target, head, &plan).await;
        let is_list = matches!(target, Target::Tag(tag) if tag.is_referrers());
        answer
            .map_err(Refusal::NotHere)
            .map_err(|refusal| if is_list { refusal } else { plan.closes(refusal) })
    }

    /// Answers a request for a blob.
    ///
    /// # Errors
    /// Why the runtime has to go to its next host, or that the range is outside of the content.
    pub async fn blob(&self, request: BlobRequest) -> Result<Answer, Refusal> {
        let plan = self.shared.plan_blob(&request.name, &request.digest, request.range)?;
        self.shared.blob(&request, &plan).await.map_err(|refusal| plan.closes(refusal))
    }
}

impl Shared {
    async fn blob(&self, request: &BlobRequest, plan: &Plan) -> Result<Answer, Refusal> {
        if self.is_private_manifest(request) {
            return Err(Refusal::NotHere(NotHere::Private));
        }
        match self.local(&request.digest, request.range, request.head).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => self.peer_blob(request, plan, NotHere::Unknown).await,
            Err(Refusal::NotHere(cause)) => self.peer_blob(request, plan, cause).await,
            Err(refusal) => Err(refusal),
        }
    }

    async fn manifest(
        &self,
        name: &Name,
        target: &Target,
        head: bool,
        plan: &Plan,
    ) -> Result<Answer, NotHere> {
        if self.rules.load().is_private(name) {
            return Err(NotHere::Private);
        }
        let digest = match target {
            Target::Digest(digest) => *digest,
            Target::Tag(tag) => self.tag(name, tag, plan).await?.digest,
        };
        // The name in the request is the client's word; the repositories that this node knows the manifest under count too.
        if self.is_private_content(&digest) {
            return Err(NotHere::Private);
        }
        if self.store.describe(&digest).is_some_and(|blob| blob.descriptor.size <= MANIFEST_LIMIT) {
            match self.local(&digest, None, head).await {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => {}
                // A store that fails here is no reason not to ask the peers; should they fail too, they are the cause.
                Err(_) => tracing::debug!(%digest, "the store failed, peers are asked"),
            }
        }
        if !plan.asks_peers() {
            return Err(NotHere::Bypassed);
        }
        // Whose it is, nobody knows any more.
        let cached = self.cache.get(&digest, Instant::now()).filter(|_| plan.limits().takes_all());
        let (descriptor, content) = match cached {
            Some(cached) => cached,
            None => self.peer_manifest(&digest, plan.limits()).await?,
        };
        Ok(whole(descriptor, content, head, Source::Peers))
    }

    /// Whether content that is held here is known under a private repository, whatever others it is known under.
    fn is_private_content(&self, digest: &Digest) -> bool {
        let held = self.store.describe(digest);
        held.is_some_and(|blob| self.rules.load().is_private_content(&blob.repositories))
    }

    /// Whether a manifest of a private repository is asked for as a blob, as a runtime does that got no manifest.
    fn is_private_manifest(&self, request: &BlobRequest) -> bool {
        let rules = self.rules.load();
        self.store.describe(&request.digest).is_some_and(|blob| {
            is_manifest(&blob.descriptor.media_type)
                && (rules.is_private(&request.name) || rules.is_private_content(&blob.repositories))
        })
    }

    /// The whole of a small local content.
    async fn read(&self, descriptor: &Descriptor) -> Option<Bytes> {
        if descriptor.size > MANIFEST_LIMIT {
            return None;
        }
        let mut stream = self.store.open(&descriptor.digest, 0).await.ok()?.into_stream(descriptor.size);
        let mut content = Vec::new();
        while let Some(chunk) = stream.next().await {
            content.extend_from_slice(&chunk.ok()?);
        }
        Some(content.into())
    }

    /// Local content; `Ok(None)`: there is none.
    async fn local(
        &self,
        digest: &Digest,
        range: Option<RangeHeader>,
        head: bool,
    ) -> Result<Option<Answer>, Refusal> {
        let Some(blob) = self.store.describe(digest) else { return Ok(None) };
        let descriptor = blob.descriptor.clone();
        let range = resolve(range, descriptor.size)?;
        let content = match self.store.open(digest, range.start).await {
            Ok(content) => content,
            Err(store::Error::NotFound(_)) => return Ok(None),
            Err(error) => {
                tracing::debug!(%digest, %error, "content that is held here cannot be read");
                return Err(Refusal::NotHere(NotHere::StoreFailed));
            }
        };
        let metrics = self.metrics.clone();
        let body = if head { empty() } else { content.into_stream(range.len()).boxed() };
        let body = body.inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                metrics.bytes_local.inc_by(chunk.len() as u64);
            }
        });
        Ok(Some(Answer { descriptor, range, body: body.boxed(), source: Source::Local }))
    }
}

impl Settings {
    /// Compiles `config`. `serve_unowned`: content of unknown repositories is for peers too.
    ///
    /// # Errors
    /// A pattern that cannot be used.
    pub fn new(config: &Config, serve_unowned: bool) -> Result<Self, PatternError> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(Rules::compile(config, serve_unowned)?))))
    }

    /// Uses another configuration from the next request on; the prefetch budget needs a restart.
    ///
    /// # Errors
    /// A pattern that cannot be used; then nothing changes.
    pub fn replace(&self, config: &Config, serve_unowned: bool) -> Result<(), PatternError> {
        self.0.store(Arc::new(Rules::compile(config, serve_unowned)?));
        Ok(())
    }
}

impl Rules {
    fn compile(config: &Config, serve_unowned: bool) -> Result<Self, PatternError> {
        Ok(Self {
            private: Patterns::new(&config.private)?,
            peers_first: Patterns::new(&config.tags_peers_first)?,
            verify: config.verify,
            segment: config.segment.as_u64(),
            stall: config.stall,
            busy_wait: config.busy_wait,
            prefetches: usize::try_from(config.prefetch_budget.as_u64() / download::PREFETCHED)
                .unwrap_or(usize::MAX)
                .min(Semaphore::MAX_PERMITS),
            serve_unowned,
        })
    }

    fn is_private(&self, name: &Name) -> bool {
        self.private.matches(name)
    }

    /// Content that is known under a private repository, whatever others it is known under.
    fn is_private_content(&self, repositories: &[Name]) -> bool {
        repositories.iter().any(|name| self.is_private(name))
    }

    fn is_peers_first(&self, name: &Name) -> bool {
        self.peers_first.matches(name)
    }
}

fn resolve(range: Option<RangeHeader>, size: u64) -> Result<ByteRange, Refusal> {
    range.map_or(Ok(ByteRange::whole(size)), |range| range.resolve(size)).map_err(Refusal::Range)
}

fn whole(descriptor: Descriptor, content: Bytes, head: bool, source: Source) -> Answer {
    let range = ByteRange::whole(descriptor.size);
    let body = if head { empty() } else { futures::stream::iter([Ok(content)]).boxed() };
    Answer { descriptor, range, body, source }
}

fn empty() -> BoxStream<'static, io::Result<Bytes>> {
    futures::stream::empty().boxed()
}

#[cfg(test)]
mod tests;
