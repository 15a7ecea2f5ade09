//! This node's own record and inventory, and what is taken of others' inventories.

use std::collections::HashSet;

use super::changes::What;
use super::holdings::{Holdings, mix};
use super::record::Record;
use super::sync::Completeness;
use super::{ALONE, Gossip, Ms};

/// Pause between two refutations.
const REFUTE_PAUSE: Ms = 1_000;

impl<H: Holdings> Gossip<H> {
    /// Changes this node's record: `change` gets the draft.
    pub fn amend(&mut self, change: impl FnOnce(&mut Record), now: Ms) {
        let before = self.draft.clone();
        change(&mut self.draft);
        if self.draft != before {
            self.reseal(self.draft.seq + 1, now);
        }
    }

    /// Says that this node goes away; what is flushed after it tells the neighbours.
    pub fn leave(&mut self, now: Ms) {
        self.amend(|draft| draft.leaving = true, now);
        for link in &mut self.links {
            // There is no time to be asked by those who are only told what there is.
            link.eager = true;
            link.at_once(now);
        }
    }

    /// This node holds `content`, or holds it no more.
    pub fn hold(&mut self, content: u64, held: bool, now: Ms) {
        let changed = if held { self.held.insert(content) } else { self.held.remove(&content) };
        if changed {
            self.untold.push_back((content, held));
        }
        self.tell(now);
    }

    /// This node holds exactly `contents`.
    pub fn hold_all(&mut self, contents: &HashSet<u64>, now: Ms) {
        let is_first = !std::mem::replace(&mut self.listed, true);
        let gone: Vec<u64> = self.held.difference(contents).copied().collect();
        for content in gone {
            self.hold(content, false, now);
        }
        for content in contents {
            self.hold(*content, true, now);
        }
        if is_first {
            self.tell_difference();
            self.tell(now);
        }
    }

    /// Where the present state is known to others from an earlier life, what is told is the difference: so nothing is told
    /// before that is known, or nobody is there who could know it.
    pub(super) fn tells(&self, now: Ms) -> bool {
        self.completeness == Completeness::Whole || now >= self.started + ALONE
    }

    /// Whether what others know of this node's inventory is what this process told them: not before it has looked at its store.
    pub(super) fn has_told(&self, now: Ms) -> bool {
        self.tells(now) && self.listed
    }

    pub(super) fn tell(&mut self, now: Ms) {
        if !self.tells(now) {
            return;
        }
        while let Some((content, held)) = self.untold.pop_front() {
            let (epoch, version) = self.members.own().stamp();
            if version == u32::MAX {
                self.new_epoch(epoch + 1, now);
                return;
            }
            if self.take(0, version + 1, content, held) {
                let what = What::Content { epoch, version: version + 1, content, held };
                self.push(0, what, 0, now);
            }
        }
    }

    /// Notes one change of what a member holds; `false`: it is beyond a limit, or no change of this node.
    pub(super) fn take(&mut self, index: u32, version: u32, content: u64, held: bool) -> bool {
        let Some(member) = self.members.get(index) else { return false };
        let full = member.count >= self.limits.contents || self.holdings.pairs() >= self.limits.pairs;
        if held && full {
            self.counts.excess += 1;
            // Its version goes on: what it holds beyond the limit is not told of, and not asked for again and again.
            if index != 0 {
                self.members.update(index, |member| member.version = version);
            }
            return index != 0;
        }
        let new = self.holdings.set(index, content, held);
        if index == 0 && !new {
            return false;
        }
        self.members.update(index, |member| {
            member.version = version;
            if new && held {
                member.hash = member.hash.wrapping_add(mix(content));
                member.count += 1;
            } else if new {
                member.hash = member.hash.wrapping_sub(mix(content));
                member.count -= 1;
            }
        });
        true
    }

    /// Forgets what a member holds; what it holds in `epoch` will come.
    pub(super) fn clear(&mut self, index: u32) {
        self.holdings.forget(index);
        self.members.update(index, |member| (member.version, member.hash, member.count) = (0, 0, 0));
    }

    /// What others know of this node's inventory is wrong: it is told anew.
    pub(super) fn new_epoch(&mut self, epoch: u32, now: Ms) {
        self.draft.epoch = epoch;
        self.clear(0);
        self.untold = self.held.iter().map(|content| (*content, true)).collect();
        self.reseal(self.draft.seq + 1, now);
        self.tell(now);
    }

    pub(super) fn reseal(&mut self, seq: u64, now: Ms) {
        self.draft.seq = seq;
        let record = self.notary.seal(self.draft.clone());
        self.members.update(0, |own| own.record = record);
        self.push(0, What::Record(seq), 0, now);
    }

    /// Says that a word about this node is not so.
    pub(super) fn refute(&mut self, seq: u64, now: Ms) {
        if self.refuted.is_some_and(|at| now < at + REFUTE_PAUSE) {
            return;
        }
        self.refuted = Some(now);
        self.counts.refuted += 1;
        self.reseal(seq + 1, now);
    }
}
