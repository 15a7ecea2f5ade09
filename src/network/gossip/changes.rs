//! The last changes in their order: what links have still to be told, and what one that missed some is given again.

use std::collections::VecDeque;

/// One change.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Whose.
    pub member: u32,
    /// What changed.
    pub what: What,
    /// A bit for each link whose other end knows it.
    pub known: u16,
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// There is a record with this number.
    Record(u64),
    /// The record with this number is suspected.
    Suspicion(u64),
    /// Its inventory has got to this version.
    Content {
        /// The inventory's epoch.
        epoch: u32,
        /// The version that the change led to.
        version: u32,
        /// The content's key.
        content: u64,
        /// Held from then on, or no longer.
        held: bool,
    },
    /// Its inventory was taken whole: neighbours are told where it stands.
    Position,
}

/// A bounded log.
#[derive(Debug)]
pub struct Changes {
    log: VecDeque<Change>,
    /// The number of the oldest one.
    first: u64,
    limit: usize,
}

impl Changes {
    /// An empty log for so many changes.
    pub fn new(limit: usize) -> Self {
        Self { log: VecDeque::new(), first: 0, limit }
    }

    /// The number of the next change.
    pub fn end(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    /// Adds a change.
    pub fn push(&mut self, change: Change) {
        if self.log.len() >= self.limit {
            self.log.pop_front();
            self.first += 1;
        }
        self.log.push_back(change);
    }

    /// The changes from `cursor` on; `None`: the log does not reach back so far.
    pub fn since(&self, cursor: u64) -> Option<impl Iterator<Item = &Change>> {
        let skipped = cursor.checked_sub(self.first)?;
        Some(self.log.iter().skip(skipped as usize))
    }

    /// Notes that the other end of the link with this bit knows of `member` what `knows` says.
    pub fn known(&mut self, cursor: u64, member: u32, bit: u16, knows: impl Fn(&What) -> bool) {
        let skipped = cursor.saturating_sub(self.first) as usize;
        for change in self.log.iter_mut().skip(skipped) {
            if change.member == member && knows(&change.what) {
                change.known |= bit;
            }
        }
    }

    /// Whether there is something from `cursor` on that the link with this bit has to be told.
    pub fn any_unknown(&self, cursor: u64, bit: u16) -> bool {
        let skipped = cursor.saturating_sub(self.first) as usize;
        self.log.iter().skip(skipped).any(|change| change.known & bit == 0)
    }

    /// A link with this bit begins: what was known to the last one with it is nothing to it.
    pub fn begin(&mut self, bit: u16) {
        for change in &mut self.log {
            change.known &= !bit;
        }
    }

    /// The number of this member will be another's.
    pub fn forget(&mut self, member: u32) {
        for change in self.log.iter_mut().filter(|change| change.member == member) {
            change.member = u32::MAX;
        }
    }

    /// What led from `from` to `to` in the inventory of a member, if the log has all of it.
    pub fn contents(&self, member: u32, epoch: u32, from: u32, to: u32) -> Option<Vec<(u64, bool)>> {
        let mut found = Vec::new();
        let mut next = to;
        for change in self.log.iter().rev() {
            if next == from {
                break;
            }
            let What::Content { epoch: of, version, content, held } = change.what else { continue };
            if change.member == member && of == epoch && version == next {
                found.push((content, held));
                next -= 1;
            }
        }
        found.reverse();
        (next == from).then_some(found)
    }
}
