//! How the strict role stands, as it is published.

use std::sync::Arc;

use super::{Cause, Fault, Guard, Notes};
use crate::election::lease::{Ms, Standing, Token};

/// How the strict role stands on this node. Times are as of a second ago at most.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What keeps the lock, for people: `Lease peili`.
    pub lock: Arc<str>,
    /// Whether the lease has been healthy for long enough to be relied on.
    pub relied_on: bool,
    /// What is wrong, or was before it was relied on.
    pub fault: Option<Fault>,
    /// Why changes are not told, so that they have to be asked for.
    pub blind: Option<Fault>,
    /// Whether this node reaches the API server; `None`: not known.
    pub reached: Option<bool>,
    /// The part of this node.
    pub standing: Option<Standing>,
    /// Who holds the lease, as it was seen last; `None`: nobody, or it is not known.
    pub holder: Option<Arc<str>>,
    /// For how long this node has seen the same holder.
    pub tenure: Ms,
    /// How long ago the holder was last seen to renew.
    pub age: Option<Ms>,
    /// How long a renewal counts for those who see it.
    pub duration: Ms,
    /// The lease was read, and its time is over, it was given away, or there is none. An observer, which reads seldom, takes it for held
    /// until it would have read it again.
    pub free: bool,
    /// For how long.
    pub free_for: Ms,
    /// The term of this process.
    pub leadership: Option<Guard>,
    /// The work of a term of this process has not ended.
    pub working: bool,
    /// How long ago the lock was read, or a change of it was told.
    pub read: Option<Ms>,
    /// What the holder publishes.
    pub notes: Arc<Notes>,
    /// How the Lease stands by itself, where the lock of old counts too.
    pub own: Option<Arc<Self>>,
    /// How the lock of old stands, where that counts too.
    pub beside: Option<Arc<Self>>,
}

impl State {
    /// Why it is not relied on.
    pub fn cause(&self) -> Cause {
        self.fault.as_ref().map_or(Cause::Starting, |fault| fault.cause)
    }

    /// Whether this process has a term.
    pub fn leads(&self) -> bool {
        self.leadership.is_some()
    }

    /// The token of this process's term.
    pub fn token(&self) -> Option<&Token> {
        self.leadership.as_ref().map(Guard::token)
    }

    /// As it counts now.
    pub(super) fn at(mut self, now: Ms) -> Self {
        self.leadership.take_if(|guard| guard.check(now).is_none());
        for lock in [&mut self.own, &mut self.beside] {
            *lock = lock.take().map(|state| Arc::new(Arc::unwrap_or_clone(state).at(now)));
        }
        self
    }

    /// Whether somebody else would have to look again.
    pub(super) fn differs(&self, other: &Self) -> bool {
        let short = |state: &Self| {
            (
                state.relied_on,
                state.fault.as_ref().map(|fault| fault.cause),
                state.blind.is_some(),
                state.reached,
                state.standing,
                state.free,
                state.working,
            )
        };
        short(self) != short(other)
            || self.holder != other.holder
            || self.token() != other.token()
            || self.notes != other.notes
            || [(&self.own, &other.own), (&self.beside, &other.beside)].into_iter().any(|pair| match pair {
                (Some(old), Some(new)) => old.differs(new),
                (old, new) => old.is_some() != new.is_some(),
            })
    }
}
