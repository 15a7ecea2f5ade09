//! The use case: a request of the runtime is answered from here, else from peers, or from an upstream that a policy names, else
//! by "not here", so that the runtime goes to its next host. One hop only: a peer's request is answered from this node's store
//! alone.
//!
//! Finds holders, chooses and races them, resumes, verifies what they send, and tells the network what is held here.
//! It speaks no HTTP and names no adapter: store, network, transfer and upstream are traits.

mod advertise;
mod advisory;
mod ages;
mod answer;
mod cache;
mod discard;
mod download;
mod fetch;
mod home;
mod metrics;
mod peers;
mod pieces;
mod policy;
mod remote;
mod serve;
mod tags;
mod upstreams;
mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use bytesize::ByteSize;
use futures::StreamExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use crate::network::Network;
use crate::oci::{
    Descriptor, Digest, Gate, Homes, MANIFEST_LIMIT, Name, OCTET_STREAM, PatternError, Patterns, PeerId,
    RangeHeader, Tag,
};
use crate::policy::registry::{self as policies, Operation, Plan, Reference, RegistryPolicy};
use crate::store::{self, Provider};
use crate::transfer::Transfer;
use crate::upstream::{Upstream, Upstreams};

pub use advertise::advertise;
use advisory::Advisory;
pub use answer::{Answer, BlobRequest, NotHere, Refusal, Source, Target};
use answer::{empty, resolve, whole};
use cache::Cache;
use discard::Discarding;
use fetch::Fetcher;
pub use home::Tags;
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

/// How long a request may take that an upstream answers: a token, the head of two answers, and a manifest.
const UPSTREAM_DEADLINE: Duration = Duration::from_secs(15);
/// How long one may take that the home of a tag answers, or the next one after it.
const HOME_DEADLINE: Duration = Duration::from_secs(5);

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
    /// Registries that policies may name.
    pub upstreams: Arc<dyn Upstreams>,
    /// What is known of tags.
    pub tags: Tags,
    /// Who asks a registry about a tag for all nodes.
    pub homes: Arc<dyn Homes>,
    /// How far peers are trusted.
    pub gate: Arc<dyn Gate>,
    /// What is mirrored, and how.
    pub policy: Arc<dyn RegistryPolicy>,
    /// This node's zone, as it is known at the start; empty: unknown.
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
    upstreams: Arc<dyn Upstreams>,
    tags: Tags,
    homes: Arc<dyn Homes>,
    gate: Arc<dyn Gate>,
    policy: Arc<dyn RegistryPolicy>,
    plans: policy::Plans,
    advisory: Arc<Advisory>,
    fetcher: Fetcher,
    discarding: Discarding,
    liars: upstreams::Liars,
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
            discarding: Discarding {
                store: Arc::clone(&parts.store),
                metrics: parts.metrics.clone(),
                tasks: fetcher.tasks.clone(),
            },
            liars: upstreams::Liars::default(),
            store: parts.store,
            upstream: parts.upstream,
            upstreams: parts.upstreams,
            tags: parts.tags,
            homes: parts.homes,
            gate: parts.gate,
            policy: parts.policy,
            plans: policy::Plans::default(),
            advisory: Arc::default(),
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

    /// This node is in that zone; empty: it is unknown.
    pub fn set_zone(&self, zone: &str) {
        self.shared.fetcher.peers.set_zone(zone);
    }

    /// What was seen of each peer as a source.
    pub fn conduct(&self) -> HashMap<PeerId, Conduct> {
        self.shared.fetcher.peers.conduct(Instant::now())
    }

    /// Denials that do not bind, since the runtime has another host for the registry; one line each.
    pub fn advisory_denials(&self) -> Vec<String> {
        self.shared.advisory.told(Instant::now())
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

    /// How long a request may take where a plan names upstreams, or the home of a tag; zero where none can.
    pub fn allowance(&self) -> Duration {
        if !self.shared.upstreams.is_empty() {
            UPSTREAM_DEADLINE
        } else if self.shared.policy.is_active() {
            HOME_DEADLINE
        } else {
            Duration::ZERO
        }
    }

    /// Answers a request for a manifest, in `limit`, or in [`Mirror::allowance`] where a plan names upstreams.
    ///
    /// # Errors
    /// Why the runtime has to go to its next host.
    pub async fn manifest(
        &self,
        name: &Name,
        target: &Target,
        head: bool,
        limit: Duration,
    ) -> Result<Answer, Refusal> {
        let reference = match target {
            Target::Tag(tag) => Reference::Tag(tag.clone()),
            Target::Digest(digest) => Reference::Digest(*digest),
        };
        let plan = self.shared.plan_manifest(name, reference);
        let plan = plan.inspect_err(|refusal| self.shared.sent(name, target, refusal));
        let plan = plan.map_err(|refusal| match (target, refusal) {
            // A list of referrers by its old name: any answer but 404 ends what containerd is about.
            (Target::Tag(tag), Refusal::Denied(_)) if tag.is_referrers() => {
                Refusal::NotHere(NotHere::Bypassed)
            }
            (_, refusal) => refusal,
        })?;
        let answer = timeout(plan.deadline(limit), self.shared.manifest(name, target, head, &plan)).await;
        let answer = answer.unwrap_or(Err(NotHere::Deadline));
        let is_list = matches!(target, Target::Tag(tag) if tag.is_referrers());
        answer
            .map_err(Refusal::NotHere)
            .map_err(|refusal| if is_list { refusal } else { plan.closes(refusal) })
            .inspect_err(|refusal| self.shared.sent(name, target, refusal))
    }

    /// Answers a request for a blob, in `limit`, or in [`Mirror::allowance`] where a plan names upstreams.
    ///
    /// # Errors
    /// Why the runtime has to go to its next host, or that the range is outside of the content.
    pub async fn blob(&self, request: BlobRequest, limit: Duration) -> Result<Answer, Refusal> {
        let plan = self.shared.plan_blob(&request.name, &request.digest, request.range)?;
        let answer = timeout(plan.deadline(limit), self.shared.blob(&request, &plan)).await;
        let answer = answer.unwrap_or(Err(Refusal::NotHere(NotHere::Deadline)));
        answer.map_err(|refusal| plan.closes(refusal))
    }
}

impl Shared {
    async fn blob(&self, request: &BlobRequest, plan: &Plan) -> Result<Answer, Refusal> {
        if self.is_private_manifest(request) {
            return Err(Refusal::NotHere(NotHere::Private));
        }
        let mut cause = match self.local(&request.digest, request.range, request.head).await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => NotHere::Unknown,
            Err(Refusal::NotHere(cause)) => cause,
            Err(refusal) => return Err(refusal),
        };
        let mut steps = plan.steps().peekable();
        if steps.peek().is_none() {
            return Err(Refusal::NotHere(NotHere::Bypassed));
        }
        while let Some(step) = steps.next() {
            let answer = match step {
                policies::Source::Upstream(at) => {
                    self.upstream_blob(request, plan, &upstreams::route(at, &request.name)).await
                }
                _ => self.peer_blob(request, plan, cause, steps.peek().is_none()).await,
            };
            match answer {
                Err(Refusal::NotHere(other)) if other != NotHere::Private => cause = other.or(cause),
                answer => return answer,
            }
        }
        Err(Refusal::NotHere(cause))
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
        let (digest, told) = match target {
            Target::Digest(digest) => (*digest, None),
            Target::Tag(tag) => {
                let (target, by_home) = self.tag(name, tag, plan).await?;
                (target.digest, by_home.then_some(target))
            }
        };
        // The name in the request is the client's word; the repositories that this node knows the manifest under count too.
        if self.is_private_content(&digest) {
            return Err(NotHere::Private);
        }
        // What it is it has to be called: a runtime that is told of mere bytes takes an image to have no layers.
        let is_told = |blob: &Descriptor| blob.size <= MANIFEST_LIMIT && *blob.media_type != *OCTET_STREAM;
        if self.store.describe(&digest).is_some_and(|blob| is_told(&blob.descriptor)) {
            match self.local(&digest, None, head).await {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => {}
                // A store that fails here is no reason not to ask the peers; should they fail too, they are the cause.
                Err(_) => tracing::debug!(%digest, "the store failed, peers are asked"),
            }
        }
        // The runtime wants to know what the tag means, and gets the content by its digest then, wherever it is.
        if let Some(target) = told.filter(|_| head && plan.leaves_to_origin()) {
            return Ok(whole(target, Bytes::new(), true, Source::Peers));
        }
        if plan.steps().next().is_none() {
            return Err(NotHere::Bypassed);
        }
        // Whose it is, nobody knows any more.
        let cached = self.cache.get(&digest, Instant::now()).filter(|_| plan.limits().takes_all());
        if let Some((descriptor, content, source)) = cached {
            return Ok(whole(descriptor, content, head, source));
        }
        let mut cause = NotHere::Unknown;
        for step in plan.steps() {
            let (answer, source) = match step {
                policies::Source::Upstream(at) => {
                    (self.upstream_manifest(&upstreams::route(at, name), &digest).await, Source::Upstream)
                }
                _ => (self.peer_manifest(&digest, plan.limits()).await, Source::Peers),
            };
            match answer {
                Ok((descriptor, content)) => return Ok(whole(descriptor, content, head, source)),
                Err(other) => cause = other.or(cause),
            }
        }
        Err(cause)
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
            blob.descriptor.may_be_manifest()
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

#[cfg(test)]
mod tests;
