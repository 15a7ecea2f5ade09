//! Leadership as a value: what an effect asks before it happens, and the token that it carries.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Memory};

use super::Ms;

/// Tells terms apart: whoever receives effects refuses those with a lower one. Ordered by the version of the write that
/// began the term, which grows over deletion and re-creation too. After a restore of etcd it may go back: a receiver
/// that sees another uid with a lower version leaves that to its operator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Of the Lease.
    pub uid: Arc<str>,
    /// Its resourceVersion after the write that began the term.
    pub version: u64,
    /// Its `leaseTransitions`, for people.
    pub transitions: u32,
}

impl PartialOrd for Token {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Token {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.version, &self.uid, self.transitions).cmp(&(other.version, &other.uid, other.transitions))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}/{}", self.uid, self.version, self.transitions)
    }
}

/// What an effect carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    /// The term's.
    pub token: Token,
    /// Until when, by the boot-time clock of this machine.
    pub valid_until: Ms,
}

/// One term. Clones are the same term; once it is over, it is over for all of them.
#[derive(Clone, Debug)]
pub struct Leadership {
    token: Token,
    /// 0: revoked.
    until: Arc<AtomicU64>,
}

impl Leadership {
    /// Asked immediately before each effect, and again after each wait: `None` once the term is over.
    pub fn check(&self, now: Ms) -> Option<Permit> {
        let valid_until = self.until.load(Memory::SeqCst);
        (now < valid_until).then(|| Permit { token: self.token.clone(), valid_until })
    }

    /// The term's.
    pub fn token(&self) -> &Token {
        &self.token
    }
}

/// A change of this process's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Leads, or goes on leading, until then.
    Leader(Token, Ms),
    /// Leads no more. Its work is to end; [`super::Input::Joined`] says that it has.
    Ended(Loss),
}

/// Why a term ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// No renewal was confirmed in time.
    Expired,
    /// Another holds the lease, or nobody.
    Foreign,
    /// The object is gone.
    Deleted,
    /// Another object has its name.
    Replaced,
    /// The API server's coordinator wants another holder.
    Preferred,
    /// Given away: asked to, or this node is no candidate any more.
    Yielded,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Expired, Self::Foreign, Self::Deleted, Self::Replaced, Self::Preferred, Self::Yielded];
}

/// Carries the changes of the role to those who hold the [`Leadership`]. The core puts a role that ends or shrinks before
/// the request that it has to precede.
#[derive(Debug, Default)]
pub struct Desk {
    current: Option<Leadership>,
}

impl Desk {
    /// Takes a change over. Returns a term that has just begun.
    pub fn apply(&mut self, role: &Role) -> Option<Leadership> {
        match role {
            Role::Ended(_) => {
                self.revoke();
                None
            }
            Role::Leader(token, until) => {
                if let Some(current) = self.current.as_ref().filter(|current| current.token == *token) {
                    current.until.store(*until, Memory::SeqCst);
                    return None;
                }
                self.revoke();
                let begun = Leadership { token: token.clone(), until: Arc::new(AtomicU64::new(*until)) };
                self.current = Some(begun.clone());
                Some(begun)
            }
        }
    }

    /// The present term.
    pub fn current(&self) -> Option<&Leadership> {
        self.current.as_ref()
    }

    fn revoke(&mut self) {
        if let Some(current) = self.current.take() {
            current.until.store(0, Memory::SeqCst);
        }
    }
}

/// Whoever drops the desk leads no more.
impl Drop for Desk {
    fn drop(&mut self) {
        self.revoke();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(version: u64) -> Token {
        Token { uid: "u".into(), version, transitions: 1 }
    }

    #[test]
    fn a_term_is_over_for_all_who_hold_it() {
        let mut desk = Desk::default();
        let first = desk.apply(&Role::Leader(token(1), 100)).unwrap();
        let clone = first.clone();
        assert_eq!(clone.check(99), Some(Permit { token: token(1), valid_until: 100 }));
        assert_eq!(clone.check(100), None);
        assert!(desk.apply(&Role::Leader(token(1), 200)).is_none());
        assert!(clone.check(199).is_some());
        assert!(desk.apply(&Role::Leader(token(1), 150)).is_none());
        assert!(clone.check(150).is_none());
        desk.apply(&Role::Ended(Loss::Foreign));
        assert!(first.check(1).is_none() && clone.check(1).is_none());
        // A new term does not bring an old one back.
        let second = desk.apply(&Role::Leader(token(2), 300)).unwrap();
        assert!(second.check(200).is_some() && first.check(200).is_none());
        drop(desk);
        assert!(second.check(200).is_none());
    }

    #[test]
    fn tokens_are_ordered_by_the_version() {
        let other = Token { uid: "a".into(), version: 2, transitions: 0 };
        assert!(token(1) < other && other < token(3));
    }
}
