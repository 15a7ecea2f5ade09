//! When each tag was last resolved by its registry, as far as this node knows: what may be told to peers, and what a plan's limit
//! of a tag's age is compared with.
//!
//! It is known of what this node asked a registry itself, of what a peer told with an age, and of what the runtime resolved:
//! it was sent to the registry, and the tag stood for something else afterwards. All else has no age, which is older than any
//! limit. Nothing is kept on disk: after a start no age is known.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::network::Tagged;
use crate::oci::{Descriptor, Digest, Reference};

/// Tags that are remembered; some 500 bytes each.
const TAGS: usize = 4096;
/// How long after it was sent to a registry the runtime may have resolved a tag.
const SENT: Duration = Duration::from_secs(900);

/// What is known of tags, the oldest first out. By the time of day, which goes on while a machine sleeps.
#[derive(Debug, Default)]
pub(super) struct Ages(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    tags: HashMap<Reference, Entry>,
    /// In the order in which they were first known.
    order: VecDeque<Reference>,
}

#[derive(Debug, Default)]
struct Entry {
    /// What it stands for, and when its registry said so, if that is known.
    last: Option<(Descriptor, Option<SystemTime>)>,
    /// The registry said it to this node: what others said is not passed on as its word.
    own: bool,
    /// The runtime was sent to the registry, when the tag stood for this here.
    sent: Option<(SystemTime, Option<Digest>)>,
}

impl Ages {
    /// The registry said so to this node.
    pub(super) fn resolved(&self, name: &Reference, target: &Descriptor, now: SystemTime) {
        self.said(name, target, Some(now), true);
    }

    /// A peer said so, and the runtime believes it from now on: what it stores later is no word of the registry.
    pub(super) fn told(&self, name: &Reference, target: &Descriptor, age: Option<Duration>, now: SystemTime) {
        self.said(name, target, age.and_then(|age| now.checked_sub(age)), false);
    }

    fn said(&self, name: &Reference, target: &Descriptor, at: Option<SystemTime>, own: bool) {
        let mut known = self.lock();
        let entry = known.entry(name);
        entry.sent = None;
        entry.learn(target, at, own);
    }

    /// The runtime goes to the registry itself, and the tag stands for `here` at this node.
    pub(super) fn sent(&self, name: &Reference, here: Option<&Descriptor>, now: SystemTime) {
        let mut known = self.lock();
        let entry = known.entry(name);
        // What it got the last time.
        if let Some(target) = here {
            entry.settle(target, now);
        }
        let here = here.map(|target| target.digest);
        // The first of several counts, since any of them may have been answered.
        let is_under_way = matches!(entry.sent, Some((at, was)) if was == here && age(at, now).is_some_and(|age| age <= SENT));
        if !is_under_way {
            entry.sent = Some((now, here));
        }
    }

    /// How old it is that the tag stands for `target`, which is what it does at this node.
    pub(super) fn of(&self, name: &Reference, target: &Descriptor, now: SystemTime) -> Option<Duration> {
        let mut known = self.lock();
        let entry = known.tags.get_mut(name)?;
        entry.settle(target, now);
        let (_, at) = entry.last.as_ref().filter(|(of, _)| of.digest == target.digest)?;
        at.and_then(|at| age(at, now))
    }

    /// What the tag's registry said to this node within `fresh`.
    pub(super) fn within(&self, name: &Reference, fresh: Duration, now: SystemTime) -> Option<Tagged> {
        let known = self.lock();
        let (target, at) = known.tags.get(name).filter(|entry| entry.own)?.last.as_ref()?;
        let age = at.and_then(|at| age(at, now)).filter(|age| *age <= fresh)?;
        Some(Tagged { target: target.clone(), age: Some(age) })
    }

    /// Takes in what the runtime got for the tags that it was sent to registries with; `here`: what each stands for at this node.
    pub(super) fn settle(&self, here: impl Fn(&Reference) -> Option<Descriptor>, now: SystemTime) {
        for (name, entry) in self.lock().tags.iter_mut().filter(|(_, entry)| entry.sent.is_some()) {
            if let Some(target) = here(name) {
                entry.settle(&target, now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn entry(&mut self, name: &Reference) -> &mut Entry {
        if !self.tags.contains_key(name) {
            self.order.push_back(name.clone());
            while self.order.len() > TAGS {
                self.order.pop_front().map(|oldest| self.tags.remove(&oldest));
            }
        }
        self.tags.entry(name.clone()).or_default()
    }
}

impl Entry {
    /// It stands for `target`, by what its registry said at `at`, to this node or to another. Of the same the younger word counts.
    fn learn(&mut self, target: &Descriptor, at: Option<SystemTime>, own: bool) {
        let before = self.last.as_ref().filter(|(of, _)| of.digest == target.digest).and_then(|(_, at)| *at);
        if before.is_none() || at > before {
            self.own = own;
        }
        self.last = Some((target.clone(), at.max(before)));
    }

    /// It stands for `target` here. If that is something else than when the runtime was sent to the registry, it is from there.
    fn settle(&mut self, target: &Descriptor, now: SystemTime) {
        let Some((at, was)) = self.sent else { return };
        if was != Some(target.digest) {
            self.sent = None;
            if age(at, now).is_some_and(|age| age <= SENT) {
                self.learn(target, Some(at), true);
            }
        }
    }
}

/// `None`: `at` is in the future, since the clock was set.
fn age(at: SystemTime, now: SystemTime) -> Option<Duration> {
    now.duration_since(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn target(of: &str) -> Descriptor {
        Descriptor::new(Digest::sha256(of.as_bytes()), 10, "application/x")
    }

    fn name(tag: &str) -> Reference {
        format!("r.test/a/b:{tag}").parse().unwrap()
    }

    #[test]
    fn an_age_is_of_what_the_registry_said() {
        let (ages, now, name) = (Ages::default(), SystemTime::now(), name("v1"));
        let (old, new) = (target("old"), target("new"));
        assert_eq!(ages.of(&name, &old, now), None, "what was always here");
        ages.resolved(&name, &old, now);
        assert_eq!(ages.of(&name, &old, now + MINUTE), Some(MINUTE));
        assert_eq!(ages.of(&name, &new, now + MINUTE), None, "another content");
        assert_eq!(ages.of(&name, &old, now - MINUTE), None, "the clock was set back");
        // What a peer knows counts from when the registry said it, the youngest of both.
        ages.told(&name, &old, Some(3 * MINUTE), now + MINUTE);
        ages.told(&name, &old, None, now + MINUTE);
        assert_eq!(ages.of(&name, &old, now + MINUTE), Some(MINUTE));
        ages.told(&name, &new, Some(3 * MINUTE), now + MINUTE);
        assert_eq!(ages.of(&name, &new, now + 2 * MINUTE), Some(4 * MINUTE));
        ages.resolved(&name, &new, now);
        assert_eq!(ages.within(&name, 2 * MINUTE, now + 2 * MINUTE).unwrap().target, new);
        assert_eq!(ages.within(&name, MINUTE, now + 2 * MINUTE), None);
    }

    /// What the runtime stores after it was sent to the registry is the registry's word, and what it stores after a peer's word
    /// is not.
    #[test]
    fn the_runtime_resolves_what_it_was_sent_for() {
        let (ages, now, name) = (Ages::default(), SystemTime::now(), name("v1"));
        let (old, new) = (target("old"), target("new"));
        ages.sent(&name, Some(&old), now);
        assert_eq!(ages.of(&name, &old, now + MINUTE), None, "it may have got no answer");
        ages.sent(&name, Some(&old), now + MINUTE);
        assert_eq!(ages.of(&name, &new, now + 2 * MINUTE), Some(2 * MINUTE));
        assert_eq!(ages.of(&name, &new, now + 3 * MINUTE), Some(3 * MINUTE));
        ages.sent(&name, Some(&new), now + 3 * MINUTE);
        ages.told(&name, &old, None, now + 4 * MINUTE);
        assert_eq!(
            ages.of(&name, &old, now + 5 * MINUTE),
            None,
            "a peer said so, and did not know how old it is"
        );
        assert_eq!(ages.within(&name, Duration::MAX, now + 5 * MINUTE), None);
    }

    /// What was loaded by hand long after is nobody's word; what was pulled counts, whoever looks at it and when.
    #[test]
    fn what_comes_later_is_not_the_registrys() {
        let (ages, now, name) = (Ages::default(), SystemTime::now(), name("v1"));
        let (one, two) = (target("one"), target("two"));
        ages.sent(&name, None, now);
        assert_eq!(ages.of(&name, &one, now + SENT + MINUTE), None);
        ages.sent(&name, Some(&one), now);
        ages.settle(|_| Some(two.clone()), now + MINUTE);
        assert_eq!(ages.of(&name, &two, now + SENT + MINUTE), Some(SENT + MINUTE));
        ages.sent(&name, Some(&two), now + MINUTE);
        ages.sent(&name, Some(&one), now + 2 * MINUTE);
        assert_eq!(ages.of(&name, &one, now + 2 * MINUTE), Some(MINUTE), "it was pulled in between");
    }

    /// A home passes on what it was told itself, and not what others said that it believes.
    #[test]
    fn the_word_of_others_is_not_the_registrys() {
        let (ages, now, name) = (Ages::default(), SystemTime::now(), name("v1"));
        ages.told(&name, &target("x"), Some(Duration::ZERO), now);
        assert!(ages.within(&name, MINUTE, now).is_none() && ages.of(&name, &target("x"), now).is_some());
        ages.resolved(&name, &target("x"), now + MINUTE);
        assert!(ages.within(&name, MINUTE, now + MINUTE).is_some());
    }

    #[test]
    fn the_oldest_make_room() {
        let (ages, now) = (Ages::default(), SystemTime::now());
        for number in 0..=TAGS {
            ages.resolved(&name(&format!("v{number}")), &target("x"), now);
        }
        assert_eq!(ages.of(&name("v0"), &target("x"), now), None);
        assert!(ages.of(&name("v1"), &target("x"), now).is_some());
        assert_eq!(ages.lock().tags.len(), TAGS);
    }
}
