//! What the coordinator does: it keeps a summary of the fleet where everybody can read it ([`super::summary`]), and tells as Kubernetes Events
//! what has happened ([`super::events`]), also for members that cannot reach the API server.
//!
//! None of it ends a term: what is wrong is said once in the log, shown among the problems, and tried again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::time::{MissedTickBehavior, interval};

use super::effects::{Effects, Server, Stop};
use super::events::Reporter;
use super::summary::{Content, Summaries};
use super::{Api, Cause, Kind, is_name};
use crate::election::strict::{Clock, Duty, Guard, LeaseMetrics};
use crate::oci::PeerId;

#[cfg(test)]
mod tests;

/// Between two looks at the members.
const LOOK: Duration = Duration::from_secs(5);

/// A live member, as the coordinator tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Who it is.
    pub id: PeerId,
    /// Its name, claimed; empty: unknown.
    pub name: String,
    /// Its version of Peili, claimed.
    pub version: String,
    /// Whether it says that it reaches the API server; `None`: it does not say.
    pub reached: Option<bool>,
    /// Stands for the policies that it ranks by.
    pub policy: String,
}

/// Who is there; implemented by `app`. It may not block.
pub trait Fleet: Send + Sync {
    /// Live members, this node among them.
    fn members(&self) -> Vec<Node>;
}

/// The work of the coordinator.
pub struct Coordinator {
    fleet: Arc<dyn Fleet>,
    lease: String,
    /// Name of this node.
    here: String,
    effects: Effects,
    /// Of one term at a time, since the work of the last one has ended when the next begins.
    work: tokio::sync::Mutex<Work>,
    troubles: Mutex<BTreeMap<What, Trouble>>,
}

struct Work {
    summaries: Summaries,
    reporter: Reporter,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Summary,
    Events,
}

/// What is wrong with it.
#[derive(Clone, Debug, Default)]
struct Trouble {
    /// What the log was told last; outlives the term.
    said: Option<(Option<Cause>, String)>,
    /// For people.
    text: Option<String>,
}

/// Nobody does the work of a term that is over.
struct Term<'a>(&'a Coordinator);

impl Node {
    /// Its name where it can be the name of a node, and else its ID: others read it, and it is the member's own word.
    pub(super) fn label(&self) -> String {
        if is_name(&self.name) { self.name.clone() } else { self.id.to_string() }
    }
}

impl What {
    const fn text(self) -> &'static str {
        match self {
            Self::Summary => "the fleet summary is not written",
            Self::Events => "Kubernetes Events are not written",
        }
    }
}

impl Coordinator {
    /// Of the fleet that elects by the lease of this name; `lock`: under what the work is done. `api`: not the one by which the lease is renewed, so that a request that fails here does not make the lease
    /// ask elsewhere. `here`: name of this node.
    pub fn new(
        api: Api,
        lease: &str,
        lock: (Kind, &str),
        here: &str,
        fleet: Arc<dyn Fleet>,
        clock: Arc<dyn Clock>,
        metrics: LeaseMetrics,
    ) -> Self {
        Self::with(Arc::new(api), lease, lock, here, fleet, clock, metrics)
    }

    fn with(
        server: Arc<dyn Server>,
        lease: &str,
        lock: (Kind, &str),
        here: &str,
        fleet: Arc<dyn Fleet>,
        clock: Arc<dyn Clock>,
        metrics: LeaseMetrics,
    ) -> Self {
        let work = Work { summaries: Summaries::new(lease), reporter: Reporter::new(lock.0, lock.1) };
        Self {
            fleet,
            lease: lease.to_owned(),
            here: here.to_owned(),
            effects: Effects { server, clock, metrics },
            work: tokio::sync::Mutex::new(work),
            troubles: Mutex::default(),
        }
    }

    /// What is wrong while this node leads, one line each, with what to do about it.
    pub fn problems(&self) -> Vec<String> {
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.values().filter_map(|trouble| trouble.text.clone()).collect()
    }

    /// One look at the members, and what follows from it.
    async fn turn(&self, work: &mut Work, guard: &Guard, wall: SystemTime) {
        let members = self.fleet.members();
        let Work { summaries, reporter } = work;
        let content = Content::of(&members);
        let written = summaries.turn(&self.effects, guard, content, &self.here, wall).await;
        self.note(What::Summary, written);
        let told = reporter.turn(&self.effects, guard, &members, &self.here, wall).await;
        self.note(What::Events, told);
    }

    /// `Ok(false)`: nothing was to be done.
    fn note(&self, what: What, result: Result<bool, Stop>) {
        let (cause, text, remedy) = match result {
            Ok(false) | Err(Stop::Over) => return,
            Ok(true) => {
                let trouble = self.troubles.lock().unwrap_or_else(PoisonError::into_inner).remove(&what);
                if trouble.is_some() {
                    tracing::info!(role = "coordinator", "no longer: {}", what.text());
                }
                return;
            }
            Err(Stop::Fault(fault, remedy)) => (Some(fault.cause), fault.to_string(), remedy),
            Err(Stop::Fenced(later)) => {
                let text = format!("it was written under {later}, which is later than this node's term");
                let remedy = format!(
                    "another node leads, or etcd was restored from a backup: if no other one does, delete the ConfigMap {}-fleet",
                    self.lease
                );
                (None, text, remedy)
            }
        };
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let trouble = troubles.entry(what).or_default();
        // The words of a server may differ each time; what is to be done is the same as long as that is.
        let said = Some((cause, remedy.clone()));
        if trouble.said != said {
            tracing::warn!(role = "coordinator", remedy, "{}: {text}", what.text());
            trouble.said = said;
        }
        trouble.text = Some(format!("elections: {}: {text}; {remedy}", what.text()));
    }
}

impl Drop for Term<'_> {
    fn drop(&mut self) {
        let mut troubles = self.0.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.values_mut().for_each(|trouble| trouble.text = None);
    }
}

#[async_trait]
impl Duty for Coordinator {
    async fn lead(&self, guard: Guard) {
        let mut work = self.work.lock().await;
        let _term = Term(self);
        work.summaries.begin();
        work.reporter.begin();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.turn(&mut work, &guard, SystemTime::now()).await;
        }
    }
}
