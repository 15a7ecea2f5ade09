//! What an effect of the coordinator asks: whether its term goes on, under each lock that it takes.

use crate::election::lease::{Leadership, Ms, Permit, Token};

/// One term. Clones are the same term; once it is over under one of its locks, it is over.
#[derive(Clone, Debug)]
pub struct Guard {
    leadership: Leadership,
    /// Under the lock that whoever leads has to hold beside.
    beside: Option<Leadership>,
}

impl Guard {
    /// Asked immediately before each effect, and again after each wait: `None` once the term is over.
    pub fn check(&self, now: Ms) -> Option<Permit> {
        let mut permit = self.leadership.check(now)?;
        if let Some(beside) = &self.beside {
            permit.valid_until = permit.valid_until.min(beside.check(now)?.valid_until);
        }
        Some(permit)
    }

    /// The term's, by which effects are told apart.
    pub fn token(&self) -> &Token {
        self.leadership.token()
    }

    /// The same term, as long as the other one goes on too.
    #[must_use]
    pub(super) fn beside(self, other: &Self) -> Self {
        Self { beside: Some(other.leadership.clone()), ..self }
    }
}

impl From<Leadership> for Guard {
    fn from(leadership: Leadership) -> Self {
        Self { leadership, beside: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::election::lease::{Desk, Loss, Role};

    #[test]
    fn a_term_under_two_locks_ends_with_the_first_of_them() {
        let term = |version: u64, until: Ms| {
            let token = Token { uid: "u".into(), version, transitions: 1 };
            let mut desk = Desk::default();
            let leadership = desk.apply(&Role::Leader(token, until)).unwrap();
            (desk, Guard::from(leadership))
        };
        let (mut old_desk, old) = term(1, 100);
        let (mut desk, lease) = term(2, 200);
        let both = lease.clone().beside(&old);
        assert_eq!(both.token(), lease.token());
        assert_eq!(both.check(99).map(|permit| permit.valid_until), Some(100));
        assert_eq!(both.check(100), None);
        let later = old.token().clone();
        old_desk.apply(&Role::Leader(later, 300));
        assert_eq!(both.check(100).map(|permit| permit.valid_until), Some(200));
        old_desk.apply(&Role::Ended(Loss::Foreign));
        assert!(both.check(1).is_none() && lease.check(1).is_some());
        desk.apply(&Role::Ended(Loss::Yielded));
        assert!(lease.check(1).is_none());
    }
}
