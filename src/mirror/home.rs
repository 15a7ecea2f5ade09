//! What the registry of a tag says, asked by this node: by the upstreams of a plan, or as the home of a tag that asks for all nodes.
//!
//! A home asks once per freshness time, however many ask it at once, and keeps in mind for a while that it is not let: then each
//! node asks for itself. It asks only for tags whose own plan says `home`, so that no peer can send it anywhere else.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::ages::Ages;
use super::metrics::{Metrics, TagAnswer};
use super::upstreams::{cause, route};
use super::{NotHere, UPSTREAM_DEADLINE};
use crate::network::Tagged;
use crate::oci::{Descriptor, Name, PeerId, Reference, Tag};
use crate::policy::registry::{Plan, TagResolution};
use crate::upstream::{FetchError, Upstream, Upstreams};

/// How old a tag's meaning may be where the plan does not say.
const FRESH: Duration = Duration::from_secs(60);
/// Nobody asks a registry more often, whatever a plan says.
const LEAST: Duration = Duration::from_secs(1);
/// Questions to one home at once: fewer than the control plane lets there be, which others use too.
const QUESTIONS: usize = 2;
/// Homes whose queue is kept although nobody is in it.
const HOMES: usize = 1024;
/// How long a registry that does not let this node know a tag is not asked about it.
const REFUSED: Duration = Duration::from_secs(30);
const REFUSALS: usize = 1024;
/// How long a home that did not answer is passed over: it costs a tag, and not each.
const SILENT: Duration = Duration::from_secs(10);

/// What is known of tags and who may be asked about them. Clones share it: the mirror and what peers get from it.
#[derive(Clone)]
pub struct Tags(Arc<Shared>);

struct Shared {
    ages: Ages,
    upstream: Arc<dyn Upstream>,
    upstreams: Arc<dyn Upstreams>,
    metrics: Metrics,
    /// Whoever asks a registry about a tag has its lock.
    asking: Mutex<HashMap<Reference, Arc<tokio::sync::Mutex<()>>>>,
    refused: Mutex<VecDeque<(Reference, Instant, NotHere)>>,
    /// Homes that did not answer, and when.
    silent: Mutex<HashMap<PeerId, Instant>>,
    /// For questions to each home.
    places: Mutex<HashMap<PeerId, Arc<Semaphore>>>,
}

impl Tags {
    /// Nothing is known yet. `upstream`: the registries, asked as anybody may; `upstreams`: those of the configuration.
    pub fn new(upstream: Arc<dyn Upstream>, upstreams: Arc<dyn Upstreams>, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            ages: Ages::default(),
            upstream,
            upstreams,
            metrics,
            asking: Mutex::default(),
            refused: Mutex::default(),
            silent: Mutex::default(),
            places: Mutex::default(),
        }))
    }

    /// A home did not answer.
    pub(super) fn silent(&self, home: PeerId) {
        let mut silent = self.0.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.retain(|_, at| at.elapsed() < SILENT);
        silent.insert(home, Instant::now());
    }

    /// Where a question to a home waits for its turn.
    pub(super) fn place(&self, home: &PeerId) -> Arc<Semaphore> {
        let mut places = self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        // Homes that nobody asks now need none.
        if places.len() > HOMES {
            places.retain(|_, place| Arc::strong_count(place) > 1);
        }
        Arc::clone(places.entry(home.clone()).or_insert_with(|| Arc::new(Semaphore::new(QUESTIONS))))
    }

    pub(super) fn is_silent(&self, home: &PeerId) -> bool {
        let silent = self.0.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.get(home).is_some_and(|at| at.elapsed() < SILENT)
    }

    pub(super) fn ages(&self) -> &Ages {
        &self.0.ages
    }

    /// What a tag stands for by the first upstream of the plan that says so.
    pub(super) async fn by_routes(&self, name: &Name, tag: &Tag, plan: &Plan) -> Result<Descriptor, NotHere> {
        let mut last = NotHere::Unknown;
        for at in plan.routes().map(|at| route(at, name)) {
            match self.0.upstreams.resolve(&at, tag).await {
                Ok(target) => {
                    self.learn(name, tag, &target);
                    return Ok(target);
                }
                Err(error) => last = cause(&at, tag, &error).or(last),
            }
        }
        Err(last)
    }

    /// What the registry said within `fresh`, or says now: by the upstreams of the plan, or where it names none, by the registry
    /// itself, asked as anybody may.
    pub(super) async fn at_home(
        &self,
        name: &Name,
        tag: &Tag,
        plan: &Plan,
        fresh: Duration,
    ) -> Result<Tagged, NotHere> {
        let fresh = fresh.max(LEAST);
        let reference = Reference::tagged(name.clone(), tag.clone());
        let (tags, tag, plan) = (self.clone(), tag.clone(), plan.clone());
        // In a task: whoever waits for it may give it up, and the answer is for the next one then.
        let asked = tokio::spawn(async move {
            let alone = tags.lock(&reference).lock_owned().await;
            let known = tags.0.ages.within(&reference, fresh, SystemTime::now());
            let answer = match (known, tags.refusal(&reference)) {
                (Some(known), _) => Ok(known),
                (None, Some(refused)) => Err(refused),
                (None, None) => timeout(UPSTREAM_DEADLINE, tags.ask(&reference, &tag, &plan))
                    .await
                    .unwrap_or(Err(NotHere::UpstreamsFailed)),
            };
            drop(alone);
            let mut asking = tags.0.asking.lock().unwrap_or_else(PoisonError::into_inner);
            if asking.get(&reference).is_some_and(|lock| Arc::strong_count(lock) == 1) {
                asking.remove(&reference);
            }
            answer
        });
        asked.await.unwrap_or(Err(NotHere::UpstreamsFailed))
    }

    async fn ask(&self, reference: &Reference, tag: &Tag, plan: &Plan) -> Result<Tagged, NotHere> {
        let name = &reference.name;
        let answer = if plan.routes().next().is_some() {
            self.by_routes(name, tag, plan).await
        } else if plan.leaves_to_origin() {
            self.by_origin(name, tag).await
        } else {
            Err(NotHere::Bypassed)
        };
        let answer = answer.inspect_err(|cause| {
            let mut refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
            if refused.len() >= REFUSALS {
                refused.pop_front();
            }
            refused.push_back((reference.clone(), Instant::now(), *cause));
        });
        answer.map(|target| Tagged { target, age: Some(Duration::ZERO) })
    }

    async fn by_origin(&self, name: &Name, tag: &Tag) -> Result<Descriptor, NotHere> {
        // Known for ten seconds: one that is down is not waited for by each tag.
        if !self.0.upstream.answers(&name.registry).await {
            return Err(NotHere::UpstreamsFailed);
        }
        match self.0.upstream.resolve(name, tag).await {
            Ok(target) => {
                self.learn(name, tag, &target);
                Ok(target)
            }
            Err(error) => {
                tracing::debug!(%name, %tag, %error, "the registry does not tell a home what a tag means");
                Err(match error {
                    FetchError::Failed(_) | FetchError::Held => NotHere::UpstreamsFailed,
                    _ => NotHere::TagUpstream,
                })
            }
        }
    }

    /// A registry said so.
    fn learn(&self, name: &Name, tag: &Tag, target: &Descriptor) {
        self.0.metrics.tag(TagAnswer::Resolved);
        let reference = Reference::tagged(name.clone(), tag.clone());
        self.0.ages.resolved(&reference, target, SystemTime::now());
    }

    fn lock(&self, reference: &Reference) -> Arc<tokio::sync::Mutex<()>> {
        let mut asking = self.0.asking.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(asking.entry(reference.clone()).or_default())
    }

    fn refusal(&self, reference: &Reference) -> Option<NotHere> {
        let mut refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
        while refused.front().is_some_and(|(_, at, _)| at.elapsed() >= REFUSED) {
            refused.pop_front();
        }
        refused.iter().find(|(of, ..)| of == reference).map(|(.., cause)| *cause)
    }
}

impl Plan {
    /// How old the meaning of a tag may be, if it is its home that says it.
    pub(super) fn home_age(&self) -> Option<Duration> {
        (self.tag_resolution == Some(TagResolution::Home)).then(|| self.max_tag_age.unwrap_or(FRESH))
    }
}
