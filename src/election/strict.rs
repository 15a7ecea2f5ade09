//! Leadership that is never held twice: drives the core ([`super::lease`]) over a lock, by the boot-time clock.
//!
//! ```text
//!   standing, settings, notes -> Driver { core } <-> Lock (the API server)
//!                                   |-> State: who holds it, what is wrong, whether the lease is to be relied on
//!                                   `-> Duty: the work of whoever leads, ended before the lease is given away
//! ```
//!
//! It never gives up and never ends the process. It decides nothing that the core decides: it sends what the core says, brings
//! the answers, and adds what the core does not see: a watch, a knock at a server that is gone, and the words for people.

mod beside;
mod clock;
mod driver;
mod fault;
mod guard;
mod lock;
mod memory;
mod metrics;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::lease::{Settings, Standing};

pub use beside::{Beside, Pair};
pub use clock::{BootClock, Clock};
pub use driver::Driver;
pub use fault::{Cause, Fault};
pub use guard::Guard;
pub use lock::{BOOK, BOOK_LIMIT, Change, Lock, Notes, Reply};
pub use memory::{Memory, Trouble};
pub use metrics::LeaseMetrics;
pub use state::State;

/// How long giving a lease away may take: a shutdown waits for it.
const LEAVE: Duration = Duration::from_secs(1);

/// What whoever leads does.
#[async_trait]
pub trait Duty: Send + Sync {
    /// Works until it is dropped, which happens when the term is over. It asks the guard before each effect. If it ends by itself,
    /// the lease is given away.
    async fn lead(&self, guard: Guard);

    /// Whether it is meant to end by itself, and says why.
    fn ends(&self) -> bool {
        false
    }

    /// What has to be done when that was dropped, or has returned, before the lease is given away or taken again.
    async fn end(&self) {}
}

/// Nothing: for whoever only wants to know who leads.
#[derive(Clone, Copy, Debug)]
pub struct Idle;

#[async_trait]
impl Duty for Idle {
    async fn lead(&self, _: Guard) {
        std::future::pending::<()>().await;
    }
}

/// What a driver works with.
pub struct Parts {
    /// Where the lease is.
    pub lock: Arc<dyn Lock>,
    /// By which it counts.
    pub clock: Arc<dyn Clock>,
    /// The work.
    pub duty: Arc<dyn Duty>,
    /// Counters.
    pub metrics: LeaseMetrics,
    /// For pauses.
    pub seed: u64,
}

/// The strict role of this node. Clones are one.
#[derive(Clone)]
pub struct Strict {
    identity: Arc<str>,
    standing: watch::Sender<Option<Standing>>,
    settings: watch::Sender<Settings>,
    notes: watch::Sender<Notes>,
    /// The longest wait after the last hint.
    hints: watch::Sender<Duration>,
    leave: mpsc::Sender<Leave>,
    state: watch::Sender<State>,
    clock: Arc<dyn Clock>,
}

/// A wish to give the lease away.
pub(super) struct Leave {
    for_good: bool,
    done: oneshot::Sender<()>,
}

impl Strict {
    /// A role and who drives it. `identity`: see [`super::lease::Candidate::new`]. It waits until it is told where it stands.
    pub fn new(identity: &str, settings: &Settings, parts: Parts) -> (Self, Driver) {
        let (leave, leaving) = mpsc::channel(4);
        let strict = Self {
            identity: identity.into(),
            standing: watch::Sender::new(None),
            settings: watch::Sender::new(settings.clone()),
            notes: watch::Sender::default(),
            hints: watch::Sender::default(),
            leave,
            state: watch::Sender::default(),
            clock: Arc::clone(&parts.clock),
        };
        let driver = Driver::new(strict.clone(), leaving, parts);
        (strict, driver)
    }

    /// The part of this node in the election.
    pub fn stand(&self, standing: Standing) {
        self.standing.send_if_modified(|now| now.replace(standing) != Some(standing));
    }

    /// Other times.
    pub fn configure(&self, settings: &Settings) {
        self.settings.send_if_modified(|now| {
            let differs = now != settings;
            now.clone_from(settings);
            differs
        });
    }

    /// What it publishes while it leads.
    pub fn note(&self, notes: Notes) {
        self.notes.send_if_modified(|now| {
            let differs = *now != notes;
            *now = notes;
            differs
        });
    }

    /// Another node has found the API server again: this one looks too, if it has to, at a random time within `spread`.
    pub fn hint(&self, spread: Duration) {
        self.hints.send_replace(spread);
    }

    /// How it stands, without a term whose time is over: its driver says so only when it runs again.
    pub fn state(&self) -> State {
        let state = self.state.borrow().clone();
        state.at(self.clock.now())
    }

    /// Changes whenever that changes.
    pub fn changes(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The name of this process in the lease.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Gives the lease away, if this node holds it, and does not take it again for its whole duration, or ever (`for_good`). Ends when it is
    /// given away, or after a second.
    ///
    /// Returns whether it was: else the lease is free when its time is over.
    pub async fn leave(&self, for_good: bool) -> bool {
        let (done, ended) = oneshot::channel();
        if self.leave.send(Leave { for_good, done }).await.is_err() {
            return false;
        }
        timeout(LEAVE, ended).await.is_ok_and(|ended| ended.is_ok())
    }
}
