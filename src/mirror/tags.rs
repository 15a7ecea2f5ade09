//! What a tag means: by its home, by the upstreams of a plan, or by trusted peers. Peers are only asked where upstream cannot be,
//! or policy says so: a tag is a name that its registry may change at any time, and only the registry checks the pod's right to it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use tokio::time::{Instant, interval, timeout, timeout_at};

use super::metrics::TagAnswer;
use super::{Mirror, NotHere, Refusal, Shared, Target};
use crate::network::{ResolveError, TagQuestion, Tagged};
use crate::oci::{Action, Descriptor, Home, MANIFEST_LIMIT, Name, Reference, Registry, Tag, is_manifest};
use crate::policy::registry::{Plan, Source};
use crate::upstream::hosts::is_loopback;

/// Peers asked about one tag at once: more than agree by chance, few enough for a large cluster.
const ASKED: usize = 16;
/// How long peers may take, all that are asked together; those that are silent have no say.
const LIMIT: Duration = Duration::from_millis(250);
/// Once one has answered, the others have so long to agree or not.
const AGREE: Duration = Duration::from_millis(50);
/// How long the home of a tag may take, which asks a registry.
const HOME_LIMIT: Duration = Duration::from_secs(2);
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

/// How often what the runtime got from registries is looked at; it may be some minutes old.
const SETTLE: Duration = Duration::from_secs(60);

impl Mirror {
    /// Follows what the runtime gets for the tags that it is sent to registries with. Runs until it is dropped.
    pub async fn follow_tags(self) {
        let mut every = interval(SETTLE);
        loop {
            every.tick().await;
            let shared = &self.shared;
            shared.tags.ages().settle(|name| shared.store.resolve(name), SystemTime::now());
        }
    }
}

impl Shared {
    /// The descriptor of a tag, if this node is the one to answer, and whether the tag's home told it.
    pub(super) async fn tag(
        &self,
        name: &Name,
        tag: &Tag,
        plan: &Plan,
    ) -> Result<(Descriptor, bool), NotHere> {
        if let Some(fresh) = plan.home_age()
            && !is_local(&name.registry)
            && let Some(target) = self.home_tag(name, tag, plan, fresh).await
        {
            return Ok((target, true));
        }
        self.tag_of_any(name, tag, plan).await.map(|target| (target, false))
    }

    async fn tag_of_any(&self, name: &Name, tag: &Tag, plan: &Plan) -> Result<Descriptor, NotHere> {
        let peers_first = plan.prefers_peers_for_tags() || self.rules.load().is_peers_first(name);
        let asks_peers = plan.asks_peers_for_tags();
        if plan.routes().next().is_some() {
            let begins_with_peers = plan.steps().next() == Some(&Source::Peers);
            if asks_peers
                && peers_first
                && begins_with_peers
                && let Ok(target) = self.known_tag(name, tag, plan).await
            {
                return Ok(target);
            }
            return match self.tags.by_routes(name, tag, plan).await {
                Ok(target) => Ok(target),
                // As where a registry does not answer; and if there is one that may be asked, it must not.
                Err(NotHere::UpstreamsFailed)
                    if asks_peers
                        && !(plan.leaves_to_origin() && self.upstream.answers(&name.registry).await) =>
                {
                    self.known_tag(name, tag, plan).await.map_err(|cause| cause.or(NotHere::UpstreamsFailed))
                }
                Err(cause) => Err(cause),
            };
        }
        // A registry that must not be asked is not looked at either.
        let may_answer = plan.leaves_to_origin();
        if asks_peers && may_answer && peers_first && plan.max_tag_age.is_some() {
            // What is too old is for the registry, if that answers.
            return match self.known_tag(name, tag, plan).await {
                Err(NotHere::TagTooOld) if self.upstream.answers(&name.registry).await => {
                    self.metrics.tag(TagAnswer::Upstream);
                    Err(NotHere::TagUpstream)
                }
                answer => answer,
            };
        }
        if !asks_peers || !peers_first && may_answer && self.upstream.answers(&name.registry).await {
            self.metrics.tag(TagAnswer::Upstream);
            return Err(NotHere::TagUpstream);
        }
        self.known_tag(name, tag, plan).await
    }

    /// What the tag's home says; `None`: it leaves it to this node, or no home answers.
    async fn home_tag(&self, name: &Name, tag: &Tag, plan: &Plan, fresh: Duration) -> Option<Descriptor> {
        let reference = Reference::tagged(name.clone(), tag.clone());
        let key = reference.to_string();
        for is_first in [true, false] {
            let home =
                if is_first { self.homes.home(key.as_bytes()) } else { self.homes.runner_up(key.as_bytes()) };
            let peer = match home {
                Home::Here => {
                    let answer = timeout(HOME_LIMIT, self.tags.at_home(name, tag, plan, fresh)).await;
                    return answer.ok()?.ok().map(|tagged| tagged.target);
                }
                // Its word is a peer's.
                Home::Peer(_) if !plan.asks_peers() => return None,
                Home::Nobody => return None,
                Home::Peer(peer) => peer,
            };
            // One that is not believed about tags is no home of this node's.
            let is_suspected = self.fetcher.peers.is_suspected(&peer, Instant::now());
            if is_suspected || self.tags.is_silent(&peer) || !self.gate.allows(&peer, Action::Tags) {
                continue;
            }
            let question = TagQuestion { name: reference.clone(), home: Some(fresh) };
            // More at once would wait for each other here, and that is no silence of the home's.
            let place = self.tags.place(&peer);
            let _place = timeout(HOME_LIMIT, place.acquire()).await.ok()?;
            match self.fetcher.network.resolve(&peer, &question, HOME_LIMIT).await {
                Ok(Some(Tagged { target, age: Some(age) }))
                    if age <= fresh.max(Duration::from_secs(1))
                        && (1..=MANIFEST_LIMIT).contains(&target.size)
                        && is_manifest(&target.media_type) =>
                {
                    self.metrics.tag(TagAnswer::Home);
                    self.tags.ages().told(&reference, &target, Some(age), SystemTime::now());
                    return Some(target);
                }
                Ok(_) | Err(ResolveError::Denied) => return None,
                Err(error @ (ResolveError::Unreachable(_) | ResolveError::Timeout)) => {
                    tracing::debug!(%peer, image = %reference, %error, "the home of a tag does not answer");
                    self.tags.silent(peer);
                }
            }
        }
        None
    }

    /// What this node and trusted peers say that a tag stands for, as far as they know it to be as young as the plan wants it.
    async fn known_tag(&self, name: &Name, tag: &Tag, plan: &Plan) -> Result<Descriptor, NotHere> {
        let reference = Reference::tagged(name.clone(), tag.clone());
        let now = SystemTime::now();
        let here = self.store.resolve(&reference).map(|target| {
            let age = self.tags.ages().of(&reference, &target, now);
            Tagged { target, age }
        });
        let mut answers: Vec<Tagged> = here.into_iter().collect();
        answers.extend(self.ask(&reference).await);
        let all = answers.len();
        if let Some(limit) = plan.max_tag_age {
            answers.retain(|answer| answer.age.is_some_and(|age| age <= limit));
        }
        let Some(first) = answers.first() else {
            let (answer, cause) = if all == 0 {
                (TagAnswer::Unknown, NotHere::Unknown)
            } else {
                (TagAnswer::TooOld, NotHere::TagTooOld)
            };
            self.metrics.tag(answer);
            return Err(cause);
        };
        if answers.iter().any(|answer| answer.target.digest != first.target.digest) {
            self.metrics.tag(TagAnswer::Disputed);
            let digests: BTreeSet<_> = answers.iter().map(|answer| answer.target.digest).collect();
            if self.disputes.is_new(&reference, Instant::now()) {
                tracing::warn!(image = %reference, ?digests, "nodes disagree about a tag; it is refused");
            }
            return Err(NotHere::TagDisputed);
        }
        self.metrics.tag(TagAnswer::Known);
        let age = answers.iter().filter_map(|answer| answer.age).min();
        let target = answers.swap_remove(0).target;
        self.tags.ages().told(&reference, &target, age, SystemTime::now());
        Ok(target)
    }

    /// Notes that the runtime goes to the registry itself with a tag.
    pub(super) fn sent(&self, name: &Name, target: &Target, refusal: &Refusal) {
        let (Target::Tag(tag), Refusal::NotHere(_)) = (target, refusal) else { return };
        let reference = Reference::tagged(name.clone(), tag.clone());
        let here = self.store.resolve(&reference);
        self.tags.ages().sent(&reference, here.as_ref(), SystemTime::now());
    }

    /// What peers answer: [`ASKED`] at a time, until some know the tag or all were asked.
    async fn ask(&self, reference: &Reference) -> Vec<Tagged> {
        let mut peers = self.fetcher.network.tag_peers();
        peers.retain(|peer| self.gate.allows(&peer.id, Action::Tags));
        self.fetcher.peers.retain_unsuspected(&mut peers, Instant::now());
        peers.shuffle(&mut rand::rng());
        let question = TagQuestion { name: reference.clone(), home: None };
        let mut end = Instant::now() + LIMIT;
        let mut known = Vec::new();
        for asked in peers.chunks(ASKED) {
            let network = &self.fetcher.network;
            let mut answers: FuturesUnordered<_> =
                asked.iter().map(|peer| network.resolve(&peer.id, &question, LIMIT)).collect();
            while let Ok(Some(answer)) = timeout_at(end, answers.next()).await {
                if let Ok(Some(tagged)) = answer {
                    known.push(tagged);
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

/// Whether the name means another registry on each node, so that no node can speak for all.
pub(super) fn is_local(registry: &Registry) -> bool {
    is_loopback(registry.host())
}
