//! What peers get from this node: content of its own store, one hop only, and only under repositories that *this*
//! node knows it by. A peer cannot name a repository to get at another one's content.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::StreamExt;

use super::metrics::Metrics;
use super::policy::peer_request;
use super::tags::is_local;
use super::upstreams::described;
use super::{Rules, Settings, Tags};
use crate::network::{TagSource, Tagged};
use crate::oci::{Action, ByteRange, Digest, Gate, Name, PeerId, Reference, Tag};
use crate::policy::Node;
use crate::policy::registry::{self as policy, NoPolicy, Plan, RegistryPolicy, Requester, Way};
use crate::store::{Blob, Error, Provider};
use crate::transfer::{Segment, Source};
use crate::upstream::Upstreams;

/// Names of one content about which policies are asked, until one may be served.
const NAMES: usize = 8;

/// Tells who a peer is that asks for content.
pub trait Callers: Send + Sync {
    /// What is known of it; at least its ID. Must not block.
    fn node(&self, peer: &PeerId) -> Node;
}

/// Answers peers from the store.
pub struct Serve {
    store: Arc<dyn Provider>,
    gate: Arc<dyn Gate>,
    rules: Arc<ArcSwap<Rules>>,
    metrics: Metrics,
    policy: Arc<dyn RegistryPolicy>,
    callers: Arc<dyn Callers>,
    upstreams: Option<Arc<dyn Upstreams>>,
    tags: Tags,
}

/// Nothing but their IDs.
pub(super) struct Strangers;

impl Callers for Strangers {
    fn node(&self, peer: &PeerId) -> Node {
        Node { id: peer.to_string(), ..Node::default() }
    }
}

impl Serve {
    /// What peers get from `store`, and of `tags`, as `settings` and `gate` allow.
    pub fn new(
        settings: &Settings,
        store: Arc<dyn Provider>,
        gate: Arc<dyn Gate>,
        tags: Tags,
        metrics: Metrics,
    ) -> Self {
        Self {
            tags,
            store,
            gate,
            rules: Arc::clone(&settings.0),
            metrics,
            policy: Arc::new(NoPolicy),
            callers: Arc::new(Strangers),
            upstreams: None,
        }
    }

    /// The same, where policies allow it too, which are told what `callers` knows of the peer, and may name `upstreams`.
    pub fn under(
        self,
        policy: Arc<dyn RegistryPolicy>,
        callers: Arc<dyn Callers>,
        upstreams: Arc<dyn Upstreams>,
    ) -> Self {
        Self { policy, callers, upstreams: Some(upstreams), ..self }
    }

    /// Whether policies let `peer` have content under a repository that this node knows it by.
    fn is_allowed(
        &self,
        peer: &PeerId,
        name: &Name,
        reference: policy::Reference,
        blob: Option<&Blob>,
        tag_age: Option<Duration>,
    ) -> bool {
        if !self.policy.is_active() {
            return true;
        }
        let node = self.callers.node(peer);
        let requester = Requester::Peer(node, self.gate.level(peer, Action::Serve));
        let descriptor = blob.map(|blob| (&blob.descriptor.media_type, blob.descriptor.size));
        let upstreams = self.upstreams.as_deref().map(described).unwrap_or_default();
        let request = peer_request(requester, name, reference, descriptor, tag_age, upstreams);
        matches!(self.policy.decide(&request).way, Way::Mirror(_))
    }

    /// Content of unknown repositories is for peers only if configured; all other if at least one of its repositories is.
    fn may(&self, peer: &PeerId, blob: &Blob) -> bool {
        let rules = self.rules.load();
        if blob.repositories.is_empty() {
            return rules.serve_unowned;
        }
        // Manifests of private repositories are nobody's but upstream's to give, under whatever other name they are
        // known too: anybody can make an index that names a manifest.
        let is_private = || {
            rules.is_private_content(&blob.repositories)
                || blob.portless.iter().any(|name| rules.private.matches_any_port(name))
        };
        if blob.descriptor.may_be_manifest() && is_private() {
            return false;
        }
        let digest = blob.descriptor.digest;
        let allowed = blob.repositories.iter().filter(|name| {
            if blob.portless.contains(name) {
                self.gate.serves_portless(peer, name)
            } else {
                self.gate.serves(peer, name)
            }
        });
        let reference = || policy::Reference::Digest(digest);
        let mut allowed =
            allowed.take(NAMES).map(|name| self.is_allowed(peer, name, reference(), Some(blob), None));
        // A manifest is the image, under whatever name; a layer is in many images.
        if blob.descriptor.may_be_manifest() && self.policy.is_active() {
            let first = allowed.next();
            first == Some(true) && allowed.all(|allowed| allowed)
        } else {
            allowed.any(|allowed| allowed)
        }
    }
}

#[async_trait]
impl Source for Serve {
    async fn open(
        &self,
        peer: &PeerId,
        digest: &Digest,
        start: u64,
        length: u64,
    ) -> Result<Option<Segment>, io::Error> {
        let Some(blob) = self.store.describe(digest).filter(|blob| self.may(peer, blob)) else {
            return Ok(None);
        };
        let size = blob.descriptor.size;
        let start = start.min(size);
        let range = ByteRange { start, end: start.saturating_add(length).min(size) };
        let content = match self.store.open(digest, start).await {
            Ok(content) => content,
            Err(Error::NotFound(_)) => return Ok(None),
            Err(error) => return Err(io::Error::other(error)),
        };
        self.metrics.served.inc();
        let metrics = self.metrics.clone();
        let body = content.into_stream(range.len()).inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                metrics.bytes_to_peers.inc_by(chunk.len() as u64);
            }
        });
        Ok(Some(Segment { descriptor: blob.descriptor.clone(), range, body: body.boxed() }))
    }
}

impl Serve {
    /// Whether `peer` may know what a name means, which is known here for so long.
    fn may_know(&self, peer: &PeerId, name: &Reference, age: Option<Duration>) -> bool {
        self.gate.allows(peer, Action::Tags)
            && !self.rules.load().is_private(&name.name)
            && self.gate.serves(peer, &name.name)
            && name.tag.as_ref().is_none_or(|tag| {
                self.is_allowed(peer, &name.name, policy::Reference::Tag(tag.clone()), None, age)
            })
    }

    /// How this node itself would have the tag resolved, if by its home, and how new the answer has to be.
    fn home_plan(&self, name: &Reference) -> Option<(Tag, Plan, Duration)> {
        if !self.policy.is_active() || is_local(&name.name.registry) {
            return None;
        }
        let tag = name.tag.clone().filter(|_| name.digest.is_none())?;
        let upstreams = self.upstreams.as_deref().map(described).unwrap_or_default();
        let request =
            policy::Request::manifest(name, Requester::Runtime, policy::Availability::default(), upstreams);
        match self.policy.decide(&request).way {
            Way::Mirror(plan) => plan.home_age().map(|age| (tag, plan, age)),
            Way::Bypass | Way::Deny(_) => None,
        }
    }
}

#[async_trait]
impl TagSource for Serve {
    fn tag(&self, peer: &PeerId, name: &Reference) -> Option<Tagged> {
        let target = self.store.resolve(name)?;
        let age = self.tags.ages().of(name, &target, SystemTime::now());
        self.may_know(peer, name, age).then_some(Tagged { target, age })
    }

    async fn home_tag(&self, peer: &PeerId, name: &Reference, fresh: Duration) -> Option<Tagged> {
        if !self.may_know(peer, name, None) {
            return None;
        }
        let (tag, plan, age) = self.home_plan(name)?;
        // No peer makes this node ask more often than it would itself.
        self.tags.at_home(&name.name, &tag, &plan, fresh.max(age)).await.ok()
    }
}
