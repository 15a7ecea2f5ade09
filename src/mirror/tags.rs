//! What a tag means: by the upstreams of a plan, or by trusted peers. Peers are only asked where upstream cannot be, or policy
//! says so: a tag is a name that its registry may change at any time, and only the registry checks the pod's right to it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use tokio::time::{Instant, timeout_at};

use super::metrics::TagAnswer;
use super::{NotHere, Shared};
use crate::oci::{Action, Descriptor, Name, Reference, Tag};
use crate::policy::registry::{Plan, Source};

/// Peers asked about one tag at once: more than agree by chance, few enough for a large cluster.
const ASKED: usize = 16;
/// How long peers may take, all that are asked together; those that are silent have no say.
const LIMIT: Duration = Duration::from_millis(250);
/// Once one has answered, the others have so long to agree or not.
const AGREE: Duration = Duration::from_millis(50);
/// A dispute is told again after this time.
const DISPUTE_AGAIN: Duration = Duration::from_secs(300);
const DISPUTES: usize = 256;

/// Disputes that were told lately, so that the log has each once and not per request.
#[derive(Debug, Default)]
pub(super) struct Disputes(Mutex<VecDeque<(Reference, Instant)>>);

impl Disputes {
    fn is_new(&self, reference: &Reference, now: Instant) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|(_, at)| now.duration_since(*at) < DISPUTE_AGAIN);
        let is_new = !told.iter().any(|(of, _)| of == reference);
        if is_new {
            told.push_back((reference.clone(), now));
            if told.len() > DISPUTES {
                told.pop_front();
            }
        }
        is_new
    }
}

impl Shared {
    /// The descriptor of a tag, if this node is the one to answer.
    pub(super) async fn tag(&self, name: &Name, tag: &Tag, plan: &Plan) -> Result<Descriptor, NotHere> {
        let peers_first = plan.prefers_peers_for_tags() || self.rules.load().is_peers_first(name);
        let asks_peers = plan.asks_peers_for_tags();
        if plan.routes().next().is_some() {
            let begins_with_peers = plan.steps().next() == Some(&Source::Peers);
            if asks_peers
                && peers_first
                && begins_with_peers
                && let Ok(target) = self.known_tag(name, tag).await
            {
                return Ok(target);
            }
            return match self.upstream_tag(name, tag, plan).await {
                Ok(target) => Ok(target),
                // As where a registry does not answer; and if there is one that may be asked, it must not.
                Err(NotHere::UpstreamsFailed)
                    if asks_peers
                        && !(plan.leaves_to_origin() && self.upstream.answers(&name.registry).await) =>
                {
                    self.known_tag(name, tag).await.map_err(|cause| cause.or(NotHere::UpstreamsFailed))
                }
                Err(cause) => Err(cause),
            };
        }
        // A registry that must not be asked is not looked at either.
        let may_answer = !peers_first && plan.leaves_to_origin();
        if !asks_peers || may_answer && self.upstream.answers(&name.registry).await {
            self.metrics.tag(TagAnswer::Upstream);
            return Err(NotHere::TagUpstream);
        }
        self.known_tag(name, tag).await
    }

    /// What this node and trusted peers say that a tag stands for.
    async fn known_tag(&self, name: &Name, tag: &Tag) -> Result<Descriptor, NotHere> {
        let reference = Reference::tagged(name.clone(), tag.clone());
        let mut answers: Vec<Descriptor> = self.store.resolve(&reference).into_iter().collect();
        answers.extend(self.ask(&reference).await);
        let Some(first) = answers.first() else {
            self.metrics.tag(TagAnswer::Unknown);
            return Err(NotHere::Unknown);
        };
        if answers.iter().any(|answer| answer.digest != first.digest) {
            self.metrics.tag(TagAnswer::Disputed);
            let digests: BTreeSet<_> = answers.iter().map(|answer| answer.digest).collect();
            if self.disputes.is_new(&reference, Instant::now()) {
                tracing::warn!(image = %reference, ?digests, "nodes disagree about a tag; it is refused");
            }
            return Err(NotHere::TagDisputed);
        }
        self.metrics.tag(TagAnswer::Known);
        Ok(answers.swap_remove(0))
    }

    /// What peers answer: [`ASKED`] at a time, until some know the tag or all were asked.
    async fn ask(&self, reference: &Reference) -> Vec<Descriptor> {
        let mut peers = self.fetcher.network.tag_peers();
        peers.retain(|peer| self.gate.allows(&peer.id, Action::Tags));
        self.fetcher.peers.retain_unsuspected(&mut peers, Instant::now());
        peers.shuffle(&mut rand::rng());
        let mut end = Instant::now() + LIMIT;
        let mut known = Vec::new();
        for asked in peers.chunks(ASKED) {
            let network = &self.fetcher.network;
            let mut answers: FuturesUnordered<_> =
                asked.iter().map(|peer| network.resolve(&peer.id, reference, LIMIT)).collect();
            while let Ok(Some(answer)) = timeout_at(end, answers.next()).await {
                if let Ok(Some(target)) = answer {
                    known.push(target);
                    end = end.min(Instant::now() + AGREE);
                }
            }
            if !known.is_empty() || Instant::now() >= end {
                break;
            }
        }
        known
    }
}
