//! The lock of old beside the Lease, while a cluster goes from the one to the other: two drivers, and the rule that joins them.
//!
//! ```text
//!   held:     standing -> ConfigMap; whoever holds it stands for the Lease; whoever holds both works
//!   observed: standing -> Lease, while nobody holds the ConfigMap, which is never written
//! ```
//!
//! Each lock is held by its own core, so that what is true of one is true of both. Where both are held the work is under both, and ends
//! before either is given away: the Lease first, so that electors that hold both as well see one leader.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Driver, Duty, Guard, Idle, LEAVE, Lock, Notes, Parts, State, Strict};
use crate::election::lease::{Ms, Settings, Standing};

/// Between two looks at what changes without a word: ages and times.
const LOOK: Duration = Duration::from_millis(500);
/// Candidates read an observed lock about so often.
const OFTEN: Ms = 3_000;
/// An observed lock that was not read for so long says nothing about now.
const STALE: Ms = 3 * OFTEN;

/// Whoever got the lock of old waits so much longer than two durations for the Lease: as long as the core waits beyond the duration of an
/// elector that it does not know (`FOREIGN` of the lease's settings).
const PATIENCE: Duration = Duration::from_secs(10);

/// What becomes of the lock of old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Whoever leads holds both.
    Held,
    /// Nobody stands for the Lease while another elector holds it.
    Observed,
}

/// Drives two locks as one role. Ends never.
pub struct Pair {
    old: Driver,
    lease: Driver,
    joint: Joint,
}

struct Joint {
    how: Beside,
    whole: Strict,
    old: Strict,
    lease: Strict,
    held: watch::Receiver<Option<Guard>>,
}

/// The work of whoever holds the lock of old: it has this node stand for the Lease.
struct Elector {
    lease: Strict,
    held: watch::Sender<Option<Guard>>,
}

/// The work of the coordinator, under both.
struct Under {
    duty: Arc<dyn Duty>,
    held: watch::Receiver<Option<Guard>>,
}

impl Strict {
    /// A role under two locks: as [`Strict::new`], with the lock of old beside the one of `parts`.
    pub fn beside(
        identity: &str,
        settings: &Settings,
        how: Beside,
        old: Arc<dyn Lock>,
        parts: Parts,
    ) -> (Self, Pair) {
        let (holds, held) = watch::channel(None);
        let duty = Under { duty: Arc::clone(&parts.duty), held: held.clone() };
        let old_parts = Parts {
            lock: old,
            clock: Arc::clone(&parts.clock),
            duty: Arc::new(Idle),
            metrics: parts.metrics.beside(),
            seed: !parts.seed,
        };
        let (lease_parts, is_held) = match how {
            Beside::Held => (Parts { duty: Arc::new(duty), ..parts }, true),
            Beside::Observed => (parts, false),
        };
        let (lease, lease_driver) = Self::new(identity, settings, lease_parts);
        let (leave, leaving) = mpsc::channel(4);
        // Times, notes and hints are told once, for both.
        let old = Self {
            standing: watch::Sender::new(None),
            leave,
            state: watch::Sender::default(),
            ..lease.clone()
        };
        let elector = Elector { lease: lease.clone(), held: holds };
        let old_parts = if is_held { Parts { duty: Arc::new(elector), ..old_parts } } else { old_parts };
        let old_driver = Driver::new(old.clone(), leaving, old_parts);
        let state = watch::Sender::default();
        let whole = match how {
            // What is said of the role is said to the elector: it gives the Lease away before its own lock.
            Beside::Held => Self { state, ..old.clone() },
            Beside::Observed => Self { state, standing: watch::Sender::new(None), ..lease.clone() },
        };
        let joint = Joint { how, whole: whole.clone(), old, lease, held };
        (whole, Pair { old: old_driver, lease: lease_driver, joint })
    }
}

impl Pair {
    /// Leads when it can. Ends never.
    pub async fn run(self) {
        tokio::join!(self.old.run(), self.lease.run(), self.joint.run());
    }
}

impl Joint {
    async fn run(mut self) {
        let mut standing = self.whole.standing.subscribe();
        let (mut old, mut lease) = (self.old.changes(), self.lease.changes());
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.stand();
            self.publish();
            tokio::select! {
                Ok(()) = standing.changed() => {}
                Ok(()) = old.changed() => {}
                Ok(()) = lease.changed() => {}
                Ok(()) = self.held.changed() => {}
                _ = looks.tick() => {}
            }
        }
    }

    fn stand(&self) {
        let Some(standing) = *self.whole.standing.borrow() else { return };
        // Candidates for the one lock see soon who holds the other.
        let near = Standing::Observer(self.lease.settings.borrow().duration);
        let lease = match (self.how, standing) {
            (Beside::Held, _) if self.held.borrow().is_some() => Standing::Candidate(0),
            (Beside::Held, Standing::Candidate(_)) => near,
            (Beside::Observed, Standing::Candidate(_))
                if !is_free(&self.old.state(), self.lease.state().leads()) =>
            {
                near
            }
            (Beside::Held | Beside::Observed, standing) => standing,
        };
        self.lease.stand(lease);
        if self.how == Beside::Observed {
            self.old.stand(match standing {
                Standing::Candidate(_) => Standing::Observer(OFTEN),
                Standing::Observer(_) => standing,
            });
        }
    }

    fn publish(&self) {
        let (old, lease) = (self.old.state(), self.lease.state());
        let state = State { standing: *self.whole.standing.borrow(), ..merged(self.how, old, lease) };
        self.whole.state.send_if_modified(|before| {
            let differs = before.differs(&state);
            *before = state;
            differs
        });
    }
}

/// Whether an observed lock was read just now, and nobody holds it. After a pause of this process all holders look as if their time was
/// over. Whoever `leads` goes on over a read that failed, as under the Lease alone.
fn is_free(old: &State, leads: bool) -> bool {
    old.free && (leads || old.fault.is_none()) && old.read.is_some_and(|age| age < STALE)
}

/// Both as one: who holds the Lease leads, or else, as of old, who holds the other.
fn merged(how: Beside, old: State, lease: State) -> State {
    let leadership = match how {
        Beside::Held => lease
            .leadership
            .as_ref()
            .zip(old.leadership.as_ref())
            .map(|(term, under)| term.clone().beside(under)),
        Beside::Observed => lease.leadership.clone(),
    };
    let is_by_lease = old.free || (!lease.free && lease.holder.is_some());
    let holder = if is_by_lease { &lease } else { &old };
    State {
        relied_on: old.relied_on && lease.relied_on,
        fault: lease.fault.clone().or_else(|| old.fault.clone()),
        blind: lease.blind.clone().or_else(|| old.blind.clone()),
        reached: match (old.reached, lease.reached) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (old, lease) => lease.or(old),
        },
        holder: holder.holder.clone(),
        tenure: holder.tenure,
        age: holder.age,
        duration: holder.duration,
        free: old.free && lease.free,
        free_for: old.free_for.min(lease.free_for),
        leadership,
        notes: if *lease.notes == Notes::default() {
            Arc::clone(&old.notes)
        } else {
            Arc::clone(&lease.notes)
        },
        own: Some(Arc::new(lease.clone())),
        beside: Some(Arc::new(old)),
        ..lease
    }
}

impl Elector {
    /// Waits for the Lease, and for as long as somebody else holds it. Returns whether this node has it.
    async fn gets(&self, changes: &mut watch::Receiver<State>, limit: Duration) -> bool {
        loop {
            if let Ok(held) = timeout(limit, changes.wait_for(State::leads)).await {
                return held.is_ok();
            }
            let state = changes.borrow();
            let is_anothers = state.holder.as_deref().is_some_and(|holder| holder != self.lease.identity());
            if state.free || !is_anothers {
                return false;
            }
        }
    }
}

#[async_trait]
impl Duty for Elector {
    async fn lead(&self, guard: Guard) {
        self.held.send_replace(Some(guard));
        let mut changes = self.lease.changes();
        let duration = || Duration::from_millis(self.lease.settings.borrow().duration);
        let mut limit = 2 * duration() + PATIENCE;
        // In an outage the other lock is lost as soon; if it is not, another node may do better.
        while self.gets(&mut changes, limit).await {
            if changes.wait_for(|state| !state.leads()).await.is_err() {
                return;
            }
            limit = duration() / 2;
        }
        tracing::warn!(lock = "Lease", "could not be held beside the ConfigMap, which is given away");
    }

    fn ends(&self) -> bool {
        true
    }

    async fn end(&self) {
        self.held.send_replace(None);
        let mut changes = self.lease.changes();
        let here = Some(self.lease.identity());
        // Whether or not the Lease can be given away, its work has ended. Whoever waits for both to be given away waits no longer than `LEAVE`.
        let _ =
            timeout(LEAVE / 2, changes.wait_for(|state| !state.working && state.holder.as_deref() != here))
                .await;
        let _ = changes.wait_for(|state| !state.working).await;
    }
}

#[async_trait]
impl Duty for Under {
    async fn lead(&self, guard: Guard) {
        let under = self.held.borrow().clone();
        match under {
            Some(under) => self.duty.lead(guard.beside(&under)).await,
            // It is over, and this node is about to hear of it.
            None => std::future::pending().await,
        }
    }

    async fn end(&self) {
        self.duty.end().await;
    }
}

#[cfg(test)]
mod tests;
