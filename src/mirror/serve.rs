//! What peers get from this node: content of its own store, one hop only, and only under repositories that *this*
//! node knows it by. A peer cannot name a repository to get at another one's content.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::StreamExt;

use super::metrics::Metrics;
use super::policy::peer_request;
use super::upstreams::described;
use super::{Rules, Settings};
use crate::network::TagSource;
use crate::oci::{Action, ByteRange, Descriptor, Digest, Gate, Name, PeerId, Reference, is_manifest};
use crate::policy::Node;
use crate::policy::registry::{self as policy, NoPolicy, RegistryPolicy, Requester, Way};
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
}

/// Nothing but their IDs.
struct Strangers;

impl Callers for Strangers {
    fn node(&self, peer: &PeerId) -> Node {
        Node { id: peer.to_string(), ..Node::default() }
    }
}

impl Serve {
    /// What peers get from `store`, as `settings` and `gate` allow.
    pub fn new(settings: &Settings, store: Arc<dyn Provider>, gate: Arc<dyn Gate>, metrics: Metrics) -> Self {
        Self {
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
    ) -> bool {
        if !self.policy.is_active() {
            return true;
        }
        let node = self.callers.node(peer);
        let requester = Requester::Peer(node, self.gate.level(peer, Action::Serve));
        let descriptor = blob.map(|blob| (&blob.descriptor.media_type, blob.descriptor.size));
        let upstreams = self.upstreams.as_deref().map(described).unwrap_or_default();
        let request = peer_request(requester, name, reference, descriptor, upstreams);
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
        if is_manifest(&blob.descriptor.media_type) && is_private() {
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
            allowed.take(NAMES).map(|name| self.is_allowed(peer, name, reference(), Some(blob)));
        // A manifest is the image, under whatever name; a layer is in many images.
        if is_manifest(&blob.descriptor.media_type) && self.policy.is_active() {
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

impl TagSource for Serve {
    fn tag(&self, peer: &PeerId, name: &Reference) -> Option<Descriptor> {
        let told = self.gate.allows(peer, Action::Tags)
            && !self.rules.load().is_private(&name.name)
            && self.gate.serves(peer, &name.name)
            && name.tag.as_ref().is_none_or(|tag| {
                self.is_allowed(peer, &name.name, policy::Reference::Tag(tag.clone()), None)
            });
        told.then(|| self.store.resolve(name)).flatten()
    }
}
