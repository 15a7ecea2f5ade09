//! The view as it is kept over a restart: what of it is written, and what it is worth when it is read again.

use bytes::Bytes;

use super::holdings::Holdings;
use super::members::State;
use super::sync::{Completeness, PATIENCE};
use super::wire::{Bulk, BulkMember};
use super::{Gossip, Ms};

/// How long a comparison with a neighbour may take until the view that was kept counts as complete.
const SETTLE: Ms = 1_000;

impl<H: Holdings> Gossip<H> {
    /// The live members, and what each holds, in parts as a neighbour would get them.
    pub fn kept(&self) -> impl Iterator<Item = Bulk> + use<H> {
        self.bulk_pages().into_iter()
    }

    /// Takes a view that was kept; nothing else has happened yet. `fresh`: so lately that who was there is probably there, and
    /// that the others still know of those who are not. It is made complete by a comparison. Of an older one only the members
    /// are taken, as those who may know more. Returns how many members were taken.
    pub fn restore(&mut self, pages: impl IntoIterator<Item = Bulk>, fresh: bool, now: Ms) -> usize {
        let mut places = Vec::new();
        for page in pages {
            for member in &page.members {
                let place = self.restore_member(member, fresh, now);
                places.push(place);
            }
            if self.take_bulk_holdings(&page.holdings, &places).is_none() {
                self.counts.refused += 1;
            }
        }
        let taken = self.members.known() - 1;
        if fresh && taken > 0 {
            self.completeness = Completeness::Restored(None);
        }
        taken
    }

    /// Begins only now: reading what was kept may have taken its time.
    pub fn begin(&mut self, now: Ms) {
        (self.started, self.expected) = (now, now);
    }

    fn restore_member(&mut self, member: &BulkMember, fresh: bool, now: Ms) -> Option<u32> {
        // A copy: a record is not to keep the whole file in memory.
        let Ok(record) = self.notary.open(&Bytes::copy_from_slice(&member.record)) else {
            self.counts.refused += 1;
            return None;
        };
        if record.key == self.draft.key {
            self.reseal(self.draft.seq.max(record.seq + 1), now);
            if fresh {
                self.adopt(member.epoch, member.version, now);
            }
            return fresh.then_some(0);
        }
        if self.members.known() >= self.limits.members || self.members.find(record.key).is_some() {
            return None;
        }
        let state = if fresh { State::Alive } else { State::Remembered };
        let known = fresh && record.epoch == member.epoch;
        let index = self.members.add(record, state, now);
        self.renewed.push(index);
        if known {
            self.members.update(index, |known| known.version = member.version);
        }
        known.then_some(index)
    }

    /// A neighbour compares its view with this one.
    pub(super) fn compared(&mut self, at: usize, is_equal: bool, now: Ms) {
        if !self.links[at].is_complete {
            return;
        }
        if let Completeness::Restored(since) = &mut self.completeness {
            since.get_or_insert(now);
            if is_equal {
                self.settle(now);
            }
        }
    }

    /// Sees to it that a view that was kept becomes complete.
    pub(super) fn see_to_kept(&mut self, now: Ms) {
        match self.completeness {
            Completeness::Restored(Some(since)) if now >= since + SETTLE => self.settle(now),
            Completeness::Restored(None) if now >= self.started + PATIENCE => {
                self.completeness = Completeness::Partial;
            }
            _ => {}
        }
    }

    /// When that is to be looked at.
    pub(super) fn kept_due(&self) -> Option<Ms> {
        match self.completeness {
            Completeness::Restored(Some(since)) => Some(since + SETTLE),
            Completeness::Restored(None) => Some(self.started + PATIENCE),
            _ => None,
        }
    }

    fn settle(&mut self, now: Ms) {
        self.completeness = Completeness::Whole;
        self.tell_difference();
        self.tell(now);
    }
}
