//! The registry world: what is mirrored, from where and for whom. Requests, verdicts, and how verdicts become one ruling.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::text::clean;
use super::world::World;
use super::{Config, Failing, Failure, Node, Plugin, Reason, Said, describe, least};
use crate::oci::{Digest, Health, Level, Name, Repository, Tag};

/// What is asked about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// A manifest.
    #[default]
    Manifests,
    /// A blob.
    Blobs,
    /// The list of tags.
    Tags,
    /// The list of what refers to a manifest.
    Referrers,
}

/// Which content of the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// By tag.
    Tag(Tag),
    /// By digest.
    Digest(Digest),
}

impl Reference {
    /// By digest, where the name of an image has one.
    pub fn of(image: &crate::oci::Reference) -> Option<Self> {
        match (&image.digest, &image.tag) {
            (Some(digest), _) => Some(Self::Digest(*digest)),
            (None, tag) => tag.clone().map(Self::Tag),
        }
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requester {
    /// This node's container runtime.
    Runtime,
    /// A peer, for content held here.
    Peer(Node, Level),
}

/// What is known of where the content is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Availability {
    /// In this node's store.
    pub local: bool,
    /// At so many trusted peers.
    pub peers: u32,
    /// Of a tag that this node knows: since its registry said what it stands for, as far as that is known.
    pub tag_age: Option<Duration>,
}

/// A registry that a plan may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upstream {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// Prefixes of the repositories that may be taken from it; policies are not told.
    pub repositories: Arc<[String]>,
    /// How it does.
    pub health: Health,
    /// From a request to the head of its answer.
    pub latency: Option<Duration>,
}

/// A repository at an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The upstream's name.
    pub upstream: Arc<str>,
    /// As it is called there; `None`: as in the request.
    pub repository: Option<Repository>,
}

/// One request, as policies see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked about.
    pub operation: Operation,
    /// Who asks.
    pub requester: Requester,
    /// The repository, by the client's word where the runtime asks, by this node's knowledge where a peer does.
    pub name: Name,
    /// Which content; none for a list of tags.
    pub reference: Option<Reference>,
    /// Media type and size, as far as they are known.
    pub descriptor: (Option<Arc<str>>, Option<u64>),
    /// Where it is.
    pub availability: Availability,
    /// Those that a plan may name.
    pub upstreams: Arc<[Upstream]>,
    /// The time of day.
    pub now: SystemTime,
}

impl Request {
    /// For the manifest of an image of which nothing is known.
    pub fn manifest(
        image: &crate::oci::Reference,
        requester: Requester,
        availability: Availability,
        upstreams: Arc<[Upstream]>,
    ) -> Self {
        Self {
            operation: Operation::Manifests,
            requester,
            name: image.name.clone(),
            reference: Reference::of(image),
            descriptor: (None, None),
            availability,
            upstreams,
            now: SystemTime::now(),
        }
    }
}

/// What one policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its decision.
    pub decision: Decision,
    /// Why.
    pub reason: Option<Reason>,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// None.
    Abstain,
    /// Mirrored so; for a peer: served.
    Mirror(Plan),
    /// Not Peili's: the runtime goes to the registry, a peer is not served.
    Bypass,
    /// Refused.
    Deny,
}

/// How something is mirrored. The default is Peili's own way, without a constraint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Where it may come from, in this order; `None`: peers, then the registry.
    pub sources: Option<Vec<Source>>,
    /// Peers are not asked.
    pub without_peers: bool,
    /// No upstream is asked.
    pub without_upstreams: bool,
    /// The registry is not to be asked, as far as Peili can prevent it.
    pub without_origin: bool,
    /// How tags are resolved.
    pub tag_resolution: Option<TagResolution>,
    /// How old a peer's word about a tag may be.
    pub max_tag_age: Option<Duration>,
    /// Least level of a peer whose content is taken.
    pub min_trust: Option<Level>,
    /// Verified while it streams, whatever the configuration says.
    pub always_verify: bool,
    /// Peers that are asked at once.
    pub max_fan_out: Option<u32>,
}

/// Where content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Peers.
    Peers,
    /// An upstream of the configuration: this node goes there itself.
    Upstream(Route),
    /// The registry: the runtime goes there itself.
    Origin,
}

/// How a tag is resolved; the strictest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TagResolution {
    /// Peers are asked although the registry answers.
    Peers,
    /// By the tag's home node, which asks the registry for all.
    Home,
    /// By the registry, asked for each request: an upstream of the plan, else the runtime asks.
    Revalidated,
    /// Never by peers.
    UpstreamOnly,
}

/// What all policies together say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruling {
    /// What is to be done.
    pub way: Way,
    /// The policy that decided; none where all abstained.
    pub by: Option<Arc<str>>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Mirrored so.
    Mirror(Plan),
    /// Not Peili's.
    Bypass,
    /// Refused.
    Deny(Reason),
}

/// Answers whether and how something is mirrored. It may take 10 ms, and does not wait for anything but its own work.
pub trait RegistryPolicy: Send + Sync {
    /// Whether there is any policy: without one a request need not be described.
    fn is_active(&self) -> bool;

    /// Another number whenever other policies are in force.
    fn generation(&self) -> i64;

    /// The ruling.
    fn decide(&self, request: &Request) -> Ruling;

    /// The ruling, and what each policy said; it counts nowhere.
    fn explain(&self, request: &Request) -> (Ruling, Vec<Said>) {
        (self.decide(request), Vec::new())
    }
}

/// No policies.
#[derive(Clone, Copy, Debug)]
pub struct NoPolicy;

impl RegistryPolicy for NoPolicy {
    fn is_active(&self) -> bool {
        false
    }

    fn generation(&self) -> i64 {
        0
    }

    fn decide(&self, _: &Request) -> Ruling {
        Ruling::default()
    }
}

/// The world.
pub(super) struct Registry;

impl World for Registry {
    const NAME: &'static str = "registry";
    const OUTCOMES: &'static [&'static str] = &["abstain", "mirror", "bypass", "deny"];

    type Request = Request;
    type Verdict = Verdict;
    type Ruling = Ruling;
    type Merge = Merge;

    fn input(request: &Request) -> impl std::hash::Hash {
        let asked = format!("{:?}", (&request.requester, request.operation, &request.reference));
        (request.name.clone(), asked)
    }

    fn check(request: &Request, verdict: &Verdict) -> Result<(), String> {
        match &verdict.decision {
            Decision::Mirror(plan) => plan.check(request),
            _ => Ok(()),
        }
    }

    fn outcome(verdict: &Verdict) -> usize {
        match verdict.decision {
            Decision::Abstain => 0,
            Decision::Mirror(_) => 1,
            Decision::Bypass => 2,
            Decision::Deny => 3,
        }
    }

    fn describe(verdict: &Verdict) -> String {
        let decision = match &verdict.decision {
            Decision::Abstain => "abstain".into(),
            Decision::Mirror(plan) => format!("mirror {plan}").trim_end().to_owned(),
            Decision::Bypass => "bypass".into(),
            Decision::Deny => "deny".into(),
        };
        describe(&decision, verdict.reason.as_ref())
    }

    fn add(merge: &mut Merge, policy: &Arc<str>, answer: Result<Verdict, Failure>, failing: Failing) {
        merge.add(policy, answer.unwrap_or_else(|_| Verdict::failed(failing)));
    }

    fn ruling(merge: Merge) -> Ruling {
        merge.ruling()
    }

    fn plugins(config: &Config) -> &[Plugin] {
        &config.registry
    }
}

impl Default for Ruling {
    fn default() -> Self {
        Self { way: Way::Mirror(Plan::default()), by: None }
    }
}

/// What is set, for people.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(sources) = &self.sources {
            let names = sources.iter().map(|source| match source {
                Source::Peers => "peers".to_owned(),
                Source::Origin => "origin".to_owned(),
                Source::Upstream(Route { upstream, repository: None }) => upstream.to_string(),
                Source::Upstream(Route { upstream, repository: Some(name) }) => format!("{upstream}/{name}"),
            });
            parts.push(format!("sources={}", names.collect::<Vec<_>>().join(",")));
        }
        parts.extend(self.without_peers.then(|| "without-peers".into()));
        parts.extend(self.without_upstreams.then(|| "without-upstreams".into()));
        parts.extend(self.without_origin.then(|| "without-origin".into()));
        parts.extend(self.tag_resolution.map(|resolution| {
            let resolution = match resolution {
                TagResolution::Peers => "peers",
                TagResolution::Home => "home",
                TagResolution::Revalidated => "revalidated",
                TagResolution::UpstreamOnly => "upstream-only",
            };
            format!("tag-resolution={resolution}")
        }));
        parts.extend(self.max_tag_age.map(|age| format!("max-tag-age={}ms", age.as_millis())));
        parts.extend(self.min_trust.map(|level| format!("min-trust={level}")));
        parts.extend(self.always_verify.then(|| "always-verify".into()));
        parts.extend(self.max_fan_out.map(|most| format!("max-fan-out={most}")));
        f.write_str(&parts.join(" "))
    }
}

impl fmt::Display for Ruling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::Mirror(plan) if *plan == Plan::default() => f.write_str("mirror"),
            Way::Mirror(plan) => write!(f, "mirror {plan}"),
            Way::Bypass => f.write_str("bypass"),
            Way::Deny(reason) => write!(f, "deny ({reason})"),
        }
    }
}

impl Verdict {
    /// Of a policy that did not answer.
    pub(super) fn failed(failing: Failing) -> Self {
        let decision = match failing {
            Failing::Bypass => Decision::Bypass,
            Failing::Deny => Decision::Deny,
        };
        let message = "the policy that decides this does not answer; see `peili status`".into();
        Self { decision, reason: Some(Reason { code: "policy-failed".into(), message }) }
    }
}

impl Plan {
    /// What is asked, in this order, before the registry is left to the runtime; peers, where nothing else is said.
    pub fn steps(&self) -> impl Iterator<Item = &Source> + Clone {
        let sources = self.sources.as_deref().unwrap_or(&[Source::Peers]);
        sources.iter().take_while(|source| **source != Source::Origin).filter(|source| match source {
            Source::Peers => !self.without_peers,
            Source::Upstream(_) => !self.without_upstreams,
            Source::Origin => false,
        })
    }

    /// Whether peers are asked.
    pub fn asks_peers(&self) -> bool {
        self.steps().any(|source| *source == Source::Peers)
    }

    /// Where upstreams are asked, in this order.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.steps().filter_map(|source| match source {
            Source::Upstream(route) => Some(route),
            Source::Peers | Source::Origin => None,
        })
    }

    /// Whether each of its upstreams is one that `request` may be taken from.
    fn check(&self, request: &Request) -> Result<(), String> {
        for source in self.sources.iter().flatten() {
            let Source::Upstream(Route { upstream, repository }) = source else { continue };
            let known = request.upstreams.iter().find(|known| known.name == *upstream);
            let known =
                known.ok_or_else(|| format!("the upstream `{}` is not configured", clean(upstream, 64)))?;
            let repository = repository.as_ref().unwrap_or(&request.name.repository);
            if !known.repositories.iter().any(|prefix| repository.is_below(prefix)) {
                return Err(format!("the upstream `{upstream}` is not configured for `{repository}`"));
            }
        }
        Ok(())
    }

    /// Whether the runtime may go to the registry for what Peili has not got.
    pub fn leaves_to_origin(&self) -> bool {
        !self.without_origin && self.sources.as_ref().is_none_or(|sources| sources.contains(&Source::Origin))
    }

    /// Whether peers may say what a tag means where its registry does not, as far as they know it to be young enough.
    pub fn asks_peers_for_tags(&self) -> bool {
        self.asks_peers()
            && !matches!(self.tag_resolution, Some(resolution) if resolution > TagResolution::Home)
    }

    /// `self` as it is if `other` counts too: its sources if there are none yet, and of each constraint the stricter one.
    fn merged(self, other: Self) -> Self {
        Self {
            sources: self.sources.or(other.sources),
            without_peers: self.without_peers || other.without_peers,
            without_upstreams: self.without_upstreams || other.without_upstreams,
            without_origin: self.without_origin || other.without_origin,
            tag_resolution: stricter(self.tag_resolution, other.tag_resolution),
            max_tag_age: least(self.max_tag_age, other.max_tag_age),
            min_trust: self.min_trust.max(other.min_trust),
            always_verify: self.always_verify || other.always_verify,
            max_fan_out: least(self.max_fan_out, other.max_fan_out),
        }
    }
}

/// Peili's own way, to ask peers where the registry does not answer, is stricter than to ask them always.
fn stricter(one: Option<TagResolution>, other: Option<TagResolution>) -> Option<TagResolution> {
    match (one, other) {
        (None, Some(TagResolution::Peers)) | (Some(TagResolution::Peers), None) => None,
        (one, other) => one.max(other),
    }
}

/// What a chain says so far.
#[derive(Debug, Default)]
pub(super) struct Merge {
    ruling: Option<Ruling>,
}

impl Merge {
    /// Adds what the next policy says. Any denial wins, the first one's reason is told; otherwise the first that mirrors or
    /// bypasses, and the plans of all that mirror count.
    pub(super) fn add(&mut self, policy: &Arc<str>, verdict: Verdict) {
        let by = Some(Arc::clone(policy));
        let way = match (self.ruling.take(), verdict.decision) {
            (Some(ruling @ Ruling { way: Way::Deny(_), .. }), _) | (Some(ruling), Decision::Abstain) => {
                self.ruling = Some(ruling);
                return;
            }
            (None, Decision::Abstain) => return,
            (_, Decision::Deny) => Way::Deny(verdict.reason.unwrap_or_else(|| Reason {
                code: "denied".into(),
                message: format!("the policy `{policy}` denies it"),
            })),
            (Some(Ruling { way: Way::Mirror(plan), by }), Decision::Mirror(more)) => {
                self.ruling = Some(Ruling { way: Way::Mirror(plan.merged(more)), by });
                return;
            }
            (Some(ruling), _) => {
                self.ruling = Some(ruling);
                return;
            }
            (None, Decision::Mirror(plan)) => Way::Mirror(plan),
            (None, Decision::Bypass) => Way::Bypass,
        };
        self.ruling = Some(Ruling { way, by });
    }

    /// What all say.
    pub(super) fn ruling(self) -> Ruling {
        self.ruling.unwrap_or_default()
    }
}
