//! What the policies say about a request, and what that means here: a plan, "not here", or a refusal.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::fetch::Limits;
use super::upstreams::described;
use super::{HOME_DEADLINE, Mirror, NotHere, Refusal, Shared, UPSTREAM_DEADLINE};
use crate::oci::{Digest, Home, Level, Name, RangeHeader, Reference as Image, Registry, is_manifest};
use crate::policy::registry::{
    Availability, Operation, Plan, Reference, Request, Requester, Ruling, TagResolution, Upstream, Way,
};
use crate::policy::{Reason, Said};

/// Downloads whose plan is kept for their ranges, and for how long.
const KEPT: usize = 1024;
const KEEP: Duration = Duration::from_secs(300);

/// The plans of downloads, so that the ranges of one keep the decision about the whole.
#[derive(Debug, Default)]
pub(super) struct Plans(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// With the generation of the policies that it is of, and when it was made.
    plans: HashMap<(Name, Digest), (Plan, i64, Instant)>,
    order: VecDeque<(Name, Digest)>,
}

impl Plans {
    fn put(&self, name: &Name, digest: &Digest, plan: &Plan, generation: i64, now: Instant) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.clone(), *digest);
        if kept.plans.insert(key.clone(), (plan.clone(), generation, now)).is_none() {
            kept.order.push_back(key);
        }
        while kept.order.len() > KEPT
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.plans.remove(&oldest);
        }
    }

    fn get(&self, name: &Name, digest: &Digest, generation: i64, now: Instant) -> Option<Plan> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (plan, of, made) = kept.plans.get(&(name.clone(), *digest))?;
        (*of == generation && now.duration_since(*made) <= KEEP).then(|| plan.clone())
    }
}

impl Shared {
    /// How a manifest is mirrored, if it is.
    pub(super) fn plan_manifest(&self, name: &Name, reference: Reference) -> Result<Plan, Refusal> {
        if !self.policy.is_active() {
            return Ok(Plan::default());
        }
        self.rule(Operation::Manifests, name, Some(reference))
    }

    /// How a blob is mirrored, if it is. A range that goes on keeps the plan of the whole.
    pub(super) fn plan_blob(
        &self,
        name: &Name,
        digest: &Digest,
        range: Option<RangeHeader>,
    ) -> Result<Plan, Refusal> {
        if !self.policy.is_active() {
            return Ok(Plan::default());
        }
        let goes_on = matches!(range, Some(RangeHeader::From(1..) | RangeHeader::Between(1.., _)));
        let generation = self.policy.generation();
        if goes_on && let Some(plan) = self.plans.get(name, digest, generation, Instant::now()) {
            return Ok(plan);
        }
        let plan = self.rule(Operation::Blobs, name, Some(Reference::Digest(*digest)))?;
        self.plans.put(name, digest, &plan, generation, Instant::now());
        Ok(plan)
    }

    /// Whether a list of a repository may be answered.
    pub(super) fn allows_list(&self, operation: Operation, name: &Name, digest: Option<&Digest>) -> bool {
        let reference = digest.map(|digest| Reference::Digest(*digest));
        !self.policy.is_active() || self.rule(operation, name, reference).is_ok()
    }

    fn rule(&self, operation: Operation, name: &Name, reference: Option<Reference>) -> Result<Plan, Refusal> {
        let Ruling { way, by } = self.policy.decide(&self.request(operation, name, reference));
        match way {
            Way::Mirror(plan) => Ok(plan),
            Way::Bypass => Err(Refusal::NotHere(NotHere::Bypassed)),
            Way::Deny(reason) => {
                tracing::debug!(%name, policy = by.as_deref(), code = reason.code, "denied");
                self.note_denial(&name.registry, by.as_deref().unwrap_or_default());
                Err(Refusal::Denied(reason))
            }
        }
    }

    /// Finds out whether the denial binds, off the request's way.
    fn note_denial(&self, registry: &Registry, policy: &str) {
        if !self.advisory.denied(registry, policy, Instant::now()) {
            return;
        }
        let (advisory, upstream, registry) =
            (Arc::clone(&self.advisory), Arc::clone(&self.upstream), registry.clone());
        self.fetcher.tasks.spawn(async move {
            let is_open = upstream.is_open(&registry).await;
            advisory.found(&registry, is_open);
        });
    }

    /// A request of the runtime, with what is known of the content.
    fn request(&self, operation: Operation, name: &Name, reference: Option<Reference>) -> Request {
        let mut descriptor = (None, None);
        let mut availability = Availability::default();
        if let Some(Reference::Tag(tag)) = &reference {
            let image = Image::tagged(name.clone(), tag.clone());
            let here = self.store.resolve(&image);
            availability.tag_age =
                here.and_then(|target| self.tags.ages().of(&image, &target, SystemTime::now()));
        }
        if let Some(Reference::Digest(digest)) = &reference {
            availability.peers = u32::try_from(self.fetcher.holders(digest)).unwrap_or(u32::MAX);
            if let Some(blob) = self.store.describe(digest) {
                availability.local = true;
                descriptor = (Some(blob.descriptor.media_type.clone()), Some(blob.descriptor.size));
            }
        }
        Request {
            operation,
            requester: Requester::Runtime,
            name: name.clone(),
            reference,
            descriptor,
            availability,
            upstreams: described(&*self.upstreams),
            now: SystemTime::now(),
        }
    }
}

/// How the manifest of an image would be mirrored now, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explained {
    /// As it is asked about.
    pub image: String,
    /// Whether it is held here. Of a tag that is not known: the policies are asked before it is resolved.
    pub local: bool,
    /// Trusted peers that hold it. `None`: it is asked about by a tag, for which the network keeps no holders.
    pub peers: Option<u32>,
    /// What each policy said, in their order.
    pub said: Vec<Said>,
    /// What all say together.
    pub ruling: String,
    /// The policy that decided.
    pub by: Option<String>,
    /// What the runtime gets.
    pub enforced: String,
}

impl Mirror {
    /// How the manifest of `image` would be mirrored now. Policies take up to 10 ms.
    pub fn explain(&self, image: &Image) -> Explained {
        let reference = Reference::of(image);
        let is_tag = matches!(reference, Some(Reference::Tag(_)));
        let request = self.shared.request(Operation::Manifests, &image.name, reference);
        let (ruling, said) = self.shared.policy.explain(&request);
        let Availability { local, peers, .. } = request.availability;
        let enforced = match &ruling.way {
            Way::Bypass => "404: the runtime goes to the registry itself".to_owned(),
            Way::Deny(reason) => {
                let registry = &image.name.registry;
                let is_advice = self.shared.advisory.is_open(registry);
                let but = if is_advice { ". It is advice: the runtime goes on to the registry" } else { "" };
                format!("403: {reason}{but}")
            }
            Way::Mirror(_) if self.shared.rules.load().is_private(&image.name) => {
                "404: `mirror.private` keeps its manifests back, and the runtime goes to the registry"
                    .to_owned()
            }
            Way::Mirror(plan) => {
                let asks = if is_tag { plan.asks_peers_for_tags() } else { plan.asks_peers() };
                let asked = match (asks, is_tag) {
                    (false, _) => "peers are not asked",
                    (true, false) => "then from peers",
                    (true, true) => {
                        "then by peers, where the configuration or the plan lets them answer tags"
                    }
                };
                let routes: Vec<_> = plan.routes().map(|route| route.upstream.to_string()).collect();
                let asked = match (&routes[..], is_tag) {
                    ([], _) => asked.to_owned(),
                    (routes, true) => format!("the tag by {}; {asked}", routes.join(", then ")),
                    (routes, false) => format!("{asked}; from {}", routes.join(", then ")),
                };
                let asked = match self.shared.homes.home(image.to_string().as_bytes()) {
                    _ if !is_tag || plan.home_age().is_none() => asked,
                    Home::Here => format!("the tag by its home, this node; {asked}"),
                    Home::Peer(peer) => format!("the tag by its home, {peer}; {asked}"),
                    Home::Nobody => format!("the tag has no home; {asked}"),
                };
                let rest = if plan.leaves_to_origin() {
                    "else 404, and the runtime goes to the registry"
                } else {
                    "else 403: policy keeps the registry from being asked"
                };
                format!("from here; {asked}; {rest}")
            }
        };
        Explained {
            image: image.to_string(),
            local,
            peers: (!is_tag).then_some(peers),
            said,
            ruling: ruling.to_string(),
            by: ruling.by.as_deref().map(str::to_owned),
            enforced,
        }
    }
}

impl Plan {
    /// What it says about peers.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            least: self.min_trust.unwrap_or(Level::Blobs),
            fan_out: self.max_fan_out.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX),
        }
    }

    /// Whether peers are asked about tags although the registry answers.
    pub(super) fn prefers_peers_for_tags(&self) -> bool {
        self.tag_resolution == Some(TagResolution::Peers)
    }

    /// How long a request may take that may take `limit` without upstreams and homes.
    pub(super) fn deadline(&self, limit: Duration) -> Duration {
        if self.routes().next().is_some() {
            limit.max(UPSTREAM_DEADLINE)
        } else if self.home_age().is_some() {
            limit.max(HOME_DEADLINE)
        } else {
            limit
        }
    }

    /// What is said where there is no content: that the registry is to be asked, or that it must not be.
    pub(super) fn closes(&self, refusal: Refusal) -> Refusal {
        let Refusal::NotHere(cause) = refusal else { return refusal };
        if self.leaves_to_origin() {
            return Refusal::NotHere(cause);
        }
        let why = match cause {
            NotHere::Unknown if self.routes().next().is_some() => "no node and no upstream has it",
            NotHere::Unknown => "no node has it",
            NotHere::PeersFailed => "all nodes that have it failed",
            NotHere::PeersBusy => "all nodes that have it are busy",
            NotHere::UpstreamsFailed => "its upstreams fail (see `peili status`)",
            NotHere::UpstreamsRefused => "its upstreams refuse it (see `peili status`)",
            NotHere::StoreFailed => "it cannot be read here",
            NotHere::Deadline => "it did not come in time",
            NotHere::TagDisputed => "nodes disagree about the tag",
            NotHere::TagTooOld => "nobody knows the tag to be as young as it must be",
            NotHere::TagUpstream => "its tag is for the registry to resolve",
            NotHere::Private => "it is private",
            NotHere::Bypassed => "nothing is left to be asked",
            NotHere::Unsupported => "no mirror serves it",
        };
        let message = format!("{why}, and policy keeps the registry from being asked");
        Refusal::Denied(Reason { code: "not-mirrored".into(), message })
    }
}

/// What a peer asks for. `upstreams`: those of this node, which plans may name here too.
pub(super) fn peer_request(
    requester: Requester,
    name: &Name,
    reference: Reference,
    descriptor: Option<(&Arc<str>, u64)>,
    tag_age: Option<Duration>,
    upstreams: Arc<[Upstream]>,
) -> Request {
    let operation = match descriptor {
        Some((media_type, _)) if !is_manifest(media_type) => Operation::Blobs,
        _ => Operation::Manifests,
    };
    Request {
        operation,
        requester,
        name: name.clone(),
        reference: Some(reference),
        descriptor: descriptor
            .map_or((None, None), |(media_type, size)| (Some(media_type.clone()), Some(size))),
        availability: Availability { local: true, tag_age, ..Availability::default() },
        upstreams,
        now: SystemTime::now(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_of_one_generation_and_end() {
        let plans = Plans::default();
        let name = "r.test/a/b:v1".parse::<crate::oci::Reference>().unwrap().name;
        let (digest, now) = (Digest::sha256(b"a layer"), Instant::now());
        let plan = Plan { always_verify: true, ..Plan::default() };
        plans.put(&name, &digest, &plan, 1, now);
        assert_eq!(plans.get(&name, &digest, 1, now + KEEP), Some(plan.clone()));
        assert_eq!(plans.get(&name, &digest, 2, now), None, "what other policies said");
        assert_eq!(plans.get(&name, &digest, 1, now + KEEP + Duration::from_secs(1)), None);
        for number in 0..KEPT as u64 {
            plans.put(&name, &Digest::sha256(&number.to_le_bytes()), &plan, 1, now);
        }
        assert_eq!(plans.get(&name, &digest, 1, now), None, "the oldest made room");
        assert_eq!(plans.0.lock().unwrap().plans.len(), KEPT);
    }
}
