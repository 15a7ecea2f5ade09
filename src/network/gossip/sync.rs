//! What the tree has missed: hashes are compared, then positions, then what is behind is asked for. And the whole view for
//! one that is new.

use std::collections::VecDeque;

use bytes::Bytes;

use super::holdings::Holdings;
use super::members::{Member, bucket};
use super::wire::{BUCKETS, Bulk, BulkMember, Position, Summary};
use super::{Gossip, Key, Ms};

/// Positions in one summary; the rest is left to the next comparison.
const POSITIONS: usize = 4096;
/// Bytes of a page of the whole view.
const PAGE: usize = 96 << 10;
/// Neighbours that are given the whole view at once.
const BULKS: usize = 2;
/// How long a page may take before the next neighbour is asked, and a comparison before the whole view is.
pub(super) const PATIENCE: Ms = 5_000;

/// How much of the view is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completeness {
    /// Neighbours know more.
    Partial,
    /// Kept over a restart, and compared with no neighbour's yet, or since then.
    Restored(Option<Ms>),
    /// Nobody was there who knew more.
    Alone,
    /// As much as a neighbour had that said that it had all.
    Whole,
}

impl Completeness {
    /// Others may know more, and are about to say so.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Partial | Self::Restored(_))
    }
}

/// The whole view on its way to a neighbour.
pub(super) struct BulkOut {
    pages: VecDeque<Bulk>,
}

/// The whole view on its way from a neighbour.
pub(super) struct BulkIn {
    /// The members of the sender's table; `None`: what is known here is as good.
    places: Vec<Option<u32>>,
    heard: Ms,
}

impl<H: Holdings> Gossip<H> {
    /// A neighbour has said who it is: what one of both lacks is to be found.
    pub(super) fn begin_sync(&mut self, at: usize, members: usize, outbound: bool, now: Ms) {
        let lacks = match self.completeness {
            Completeness::Partial => true,
            Completeness::Alone => members > self.members.live(),
            Completeness::Whole | Completeness::Restored(_) => false,
        };
        let root = self.members.root();
        let busy = self.links.iter().any(|link| link.bulk_in.is_some());
        let link = &mut self.links[at];
        if lacks && link.is_complete {
            if !busy {
                self.ask_bulk(at, now);
            }
            return;
        }
        if link.guest {
            if outbound {
                self.take_leave(at, now);
            }
        } else if outbound {
            link.compare(root, now);
        }
    }

    fn ask_bulk(&mut self, at: usize, now: Ms) {
        let link = &mut self.links[at];
        link.out.bulk_wanted = true;
        link.bulk_in = Some(BulkIn { places: Vec::new(), heard: now });
        link.urgent(now);
    }

    /// Looks whether the whole view comes, and asks another neighbour for it if not.
    pub(super) fn see_to_bulk(&mut self, now: Ms) {
        let stale = self
            .links
            .iter()
            .position(|link| link.bulk_in.as_ref().is_some_and(|bulk| now >= bulk.heard + PATIENCE));
        if let Some(at) = stale {
            self.drop_bulk(at);
            self.links[at].is_complete = false;
        }
        self.see_to_kept(now);
        if self.completeness == Completeness::Whole || self.links.iter().any(|link| link.bulk_in.is_some()) {
            return;
        }
        if let Some(at) = self.links.iter().position(|link| link.ready && link.is_complete) {
            if self.completeness == Completeness::Partial {
                self.ask_bulk(at, now);
            }
        } else if self.completeness.is_open() && now >= self.started + super::ALONE {
            self.completeness = Completeness::Alone;
            self.tell_difference();
            self.compare_with_all(now);
        }
    }

    /// The whole view will not come by this link: what came of it is worth nothing.
    pub(super) fn drop_bulk(&mut self, at: usize) {
        let Some(bulk) = self.links[at].bulk_in.take() else { return };
        for index in bulk.places.into_iter().flatten() {
            self.clear(index);
        }
    }

    pub(super) fn give_bulk(&mut self, at: usize, now: Ms) {
        let given = self.links.iter().filter(|link| link.bulk_out.is_some()).count();
        let refuses = given >= BULKS || self.completeness.is_open();
        let pages = if refuses {
            VecDeque::from([Bulk { refused: true, last: true, ..Bulk::default() }])
        } else {
            self.bulk_pages()
        };
        self.links[at].bulk_out = Some(BulkOut { pages });
        self.links[at].urgent(now);
    }

    pub(super) fn bulk_pages(&self) -> VecDeque<Bulk> {
        let mut pages = VecDeque::new();
        let mut places = vec![u32::MAX; self.members.numbers() as usize];
        let (mut page, mut size, mut place) = (Bulk::default(), 0, 0);
        for (index, member) in self.members.iter().filter(|(_, member)| member.is_live()) {
            places[index as usize] = place;
            place += 1;
            let (record, (epoch, version)) = (member.record.signed.clone(), member.stamp());
            size += record.len() + 16;
            page.members.push(BulkMember { record, epoch, version });
            if size > PAGE {
                pages.push_back(std::mem::take(&mut page));
                size = 0;
            }
        }
        pages.push_back(page);
        let mut bytes = Vec::new();
        self.holdings.each(&mut |content, members| {
            // Both are in the order of the members' numbers.
            let members: Vec<u32> =
                members.map(|index| places[index as usize]).filter(|at| *at != u32::MAX).collect();
            if members.is_empty() {
                return;
            }
            bytes.extend(content.to_le_bytes());
            put_varint(&mut bytes, members.len() as u32);
            let mut last = 0;
            for place in members {
                put_varint(&mut bytes, place - last);
                last = place;
            }
            if bytes.len() > PAGE {
                pages.push_back(Bulk { holdings: std::mem::take(&mut bytes).into(), ..Bulk::default() });
            }
        });
        pages.push_back(Bulk { holdings: bytes.into(), last: true, ..Bulk::default() });
        pages
    }

    /// Adds to `frame` the next page for a neighbour.
    pub(super) fn bulk_page(&mut self, link: &mut super::link::Link, frame: &mut super::wire::Frame) {
        let Some(bulk) = &mut link.bulk_out else { return };
        frame.bulk = bulk.pages.pop_front();
        if bulk.pages.is_empty() {
            link.bulk_out = None;
        }
    }

    pub(super) fn take_bulk(&mut self, bulk: &Bulk, at: usize, now: Ms) {
        let Some(mut state) = self.links[at].bulk_in.take() else { return };
        state.heard = now;
        if bulk.refused {
            self.links[at].is_complete = false;
            if self.completeness == Completeness::Alone {
                // Nobody else was asked, and the next look at what differs is 10 s away.
                let root = self.members.root();
                self.links[at].compare(root, now);
            }
            return;
        }
        let bit = self.links[at].bit;
        for member in &bulk.members {
            let place = self.take_bulk_member(member, bit, now);
            state.places.push(place);
        }
        if self.take_bulk_holdings(&bulk.holdings, &state.places).is_none() {
            self.counts.refused += 1;
        }
        if !bulk.last {
            self.links[at].bulk_in = Some(state);
            return;
        }
        let alone = self.completeness == Completeness::Alone;
        self.completeness = Completeness::Whole;
        if !alone {
            self.tell_difference();
        }
        self.tell(now);
        self.compare_with_all(now);
        if self.links[at].guest && self.links[at].outbound {
            self.take_leave(at, now);
        }
    }

    fn take_bulk_member(&mut self, member: &BulkMember, bit: u16, now: Ms) -> Option<u32> {
        // A copy: a record is not to keep the whole page in memory.
        let Ok(record) = self.notary.open(&Bytes::copy_from_slice(&member.record)) else {
            self.counts.refused += 1;
            return None;
        };
        let key = record.key;
        if key == self.draft.key {
            let knows_more = (member.epoch, member.version) > self.members.own().stamp();
            self.take_record(record, None, bit, now);
            if !knows_more || self.completeness == Completeness::Alone {
                return None;
            }
            self.adopt(member.epoch, member.version, now);
            return Some(0);
        }
        self.take_record(record, None, bit, now);
        let index = self.members.find(key)?;
        let known = self.members.get(index)?;
        if known.record.epoch != member.epoch || known.version >= member.version {
            return None;
        }
        self.clear(index);
        self.members.update(index, |known| known.version = member.version);
        Some(index)
    }

    /// `None`: the bytes are not what they should be.
    pub(super) fn take_bulk_holdings(&mut self, bytes: &Bytes, places: &[Option<u32>]) -> Option<()> {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (content, after) = rest.split_first_chunk::<8>()?;
            let content = u64::from_le_bytes(*content);
            rest = after;
            let count = take_varint(&mut rest)?;
            let mut place = 0_u32;
            for _ in 0..count {
                place = place.checked_add(take_varint(&mut rest)?)?;
                if let Some(index) = places.get(place as usize)? {
                    self.load(*index, content);
                }
            }
        }
        Some(())
    }

    /// Puts a content into what is known of a member, whatever the version.
    pub(super) fn load(&mut self, index: u32, content: u64) {
        if let Some(version) = self.members.get(index).map(|member| member.version) {
            self.take(index, version, content, true);
        }
    }

    /// Others know this node's inventory from an earlier life: it goes on from there.
    pub(super) fn adopt(&mut self, epoch: u32, version: u32, now: Ms) {
        self.clear(0);
        if self.draft.epoch != epoch {
            self.draft.epoch = epoch;
            self.reseal(self.draft.seq + 1, now);
        }
        self.members.update(0, |own| own.version = version);
    }

    /// What others know of this node's inventory is in the table: what it is not is to be told. Not before all that it is was
    /// said: a node that has just started has not looked at its store yet.
    pub(super) fn tell_difference(&mut self) {
        if !self.listed {
            return;
        }
        let told: std::collections::HashSet<u64> = self.holdings.of(0).into_iter().collect();
        self.untold = told.difference(&self.held).map(|content| (*content, false)).collect();
        self.untold.extend(self.held.difference(&told).map(|content| (*content, true)));
    }

    /// What has changed on one side only is to be found now, by all.
    fn compare_with_all(&mut self, now: Ms) {
        let root = self.members.root();
        for link in self.links.iter_mut().filter(|link| link.is_neighbour()) {
            link.compare(root, now);
        }
    }

    /// Compares the view with that of a neighbour that is chosen at random.
    pub(super) fn compare_with_one(&mut self, now: Ms) {
        let root = self.members.root();
        let count = self.links.iter().filter(|link| link.is_neighbour()).count();
        if count == 0 {
            return;
        }
        let chosen = rand::RngExt::random_range(&mut self.rng, 0..count);
        if let Some(link) = self.links.iter_mut().filter(|link| link.is_neighbour()).nth(chosen) {
            link.compare(root, now);
        }
    }

    pub(super) fn own_buckets(&self) -> Bytes {
        self.members.buckets().flat_map(u32::to_le_bytes).collect::<Vec<u8>>().into()
    }

    pub(super) fn on_buckets(&mut self, theirs: &Bytes, at: usize, now: Ms) {
        self.compared(at, false, now);
        let mut mask = vec![0_u8; BUCKETS / 8];
        let own: Vec<u32> = self.members.buckets().collect();
        for (number, (own, theirs)) in own.iter().zip(theirs.chunks_exact(4)).enumerate() {
            if own.to_le_bytes() != *theirs {
                mask[number / 8] |= 1 << (number % 8);
            }
        }
        let live = self.members.iter().map(|(_, member)| member).filter(|member| member.is_live());
        let differing = live.filter(|member| is_in(&mask, member.key));
        let mut positions: Vec<Position> = differing.map(Member::position).collect();
        if positions.len() > POSITIONS {
            // The buckets that do not fit are left out whole.
            positions.sort_unstable_by_key(|position| bucket(position.key));
            let first_out = bucket(positions[POSITIONS].key);
            positions.retain(|position| bucket(position.key) < first_out);
            for number in first_out..BUCKETS {
                mask[number / 8] &= !(1 << (number % 8));
            }
        }
        if mask.iter().any(|bits| *bits != 0) {
            self.counts.differences += 1;
            let link = &mut self.links[at];
            link.out.summary = Some(Summary { buckets: mask.into(), positions });
            link.urgent(now);
        }
    }

    pub(super) fn on_summary(&mut self, summary: &Summary, at: usize, now: Ms) {
        self.compared(at, false, now);
        let mut listed: Vec<Key> = Vec::with_capacity(summary.positions.len());
        for theirs in &summary.positions {
            listed.push(theirs.key);
            if theirs.key == self.draft.key {
                self.hear_of_self(theirs, at, now);
                continue;
            }
            let Some(member) = self.members.by_key(theirs.key) else {
                self.links[at].want(Position { key: theirs.key, ..Position::default() }, now);
                continue;
            };
            let own = member.position();
            let (stamp, of_theirs) = (member.stamp(), (theirs.epoch, theirs.version));
            // Of two that differ in one version, the one with the larger hash is taken, for want of a better reason; its owner
            // sees to it that it is right.
            let yields = stamp == of_theirs && own.hash < theirs.hash && member.count < self.limits.contents;
            let leads = stamp == of_theirs && own.hash > theirs.hash;
            if theirs.seq > own.seq || of_theirs > stamp || yields {
                self.links[at].want(own, now);
            }
            if theirs.seq < own.seq || of_theirs < stamp || leads || !member.is_live() {
                self.links[at].answer(*theirs, now);
            }
        }
        listed.sort_unstable();
        for (_, member) in self.members.iter().filter(|(_, member)| member.is_live()) {
            if is_in(&summary.buckets, member.key) && listed.binary_search(&member.key).is_err() {
                let position = Position { key: member.key, ..Position::default() };
                self.links[at].answer(position, now);
            }
        }
    }
}

fn is_in(mask: &[u8], key: Key) -> bool {
    let number = bucket(key);
    mask[number / 8] & (1 << (number % 8)) != 0
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0_u32;
    for shift in (0..35).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u32::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
