//! The table of members: who they are, whether they live, and how much is known of what they hold.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use super::holdings::{KeyHasher, mix};
use super::record::{Record, Suspicion};
use super::wire::{BUCKETS, Position};

/// How a member is, by what was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Kept over a restart for too long to be believed, and not heard of since.
    Remembered,
    /// It lives.
    Alive,
    /// A neighbour found it silent; dead if it does not say otherwise soon.
    Suspected,
    /// It did not.
    Dead,
    /// It said that it goes.
    Left,
}

/// One member.
#[derive(Clone, Debug)]
pub struct Member {
    /// See [`super::Key`].
    pub key: u64,
    /// Its last record.
    pub record: Arc<Record>,
    /// The process that its records were from before that of the last one.
    pub before: u64,
    /// How it is.
    pub state: State,
    /// Since when, in milliseconds of the gossip's clock.
    pub since: u64,
    /// Version of what is known of its inventory, in the record's epoch.
    pub version: u32,
    /// Sum of the mixed keys of what it holds.
    pub hash: u64,
    /// How many contents those are.
    pub count: u32,
    /// Why it is suspected or dead.
    pub suspicion: Option<Arc<Suspicion>>,
}

/// All members, by number and by key. Number 0 is this node.
#[derive(Debug)]
pub struct Members {
    slots: Vec<Option<Member>>,
    free: Vec<u32>,
    by_key: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    /// Sum of the marks of the live members of each bucket.
    buckets: Vec<u64>,
    live: usize,
}

impl Member {
    /// Whether it counts: it lives, or is not known to be dead.
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Alive | State::Suspected)
    }

    /// Epoch and version of what is known of its inventory.
    pub fn stamp(&self) -> (u32, u32) {
        (self.record.epoch, self.version)
    }

    /// How much is known of it.
    pub fn position(&self) -> Position {
        Position {
            key: self.key,
            seq: self.record.seq,
            epoch: self.record.epoch,
            version: self.version,
            hash: self.hash as u32,
        }
    }

    fn mark(&self) -> u64 {
        if !self.is_live() {
            return 0;
        }
        let stamp = u64::from(self.record.epoch) << 32 | u64::from(self.version);
        mix(self.key ^ mix(self.record.seq ^ mix(stamp ^ mix(self.hash))))
    }
}

impl Members {
    /// A table with this node in it.
    pub fn new(own: Arc<Record>) -> Self {
        let mut members = Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::default(),
            buckets: vec![0; BUCKETS],
            live: 0,
        };
        members.add(own, State::Alive, 0);
        members
    }

    /// The number of a member.
    pub fn find(&self, key: u64) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// A member by number.
    pub fn get(&self, index: u32) -> Option<&Member> {
        self.slots.get(index as usize)?.as_ref()
    }

    /// A member by key.
    pub fn by_key(&self, key: u64) -> Option<&Member> {
        self.get(self.find(key)?)
    }

    /// This node.
    pub fn own(&self) -> &Member {
        match &self.slots[0] {
            Some(own) => own,
            None => unreachable!("this node is never removed"),
        }
    }

    /// Adds a member that is not there yet.
    pub fn add(&mut self, record: Arc<Record>, state: State, now: u64) -> u32 {
        let key = record.key;
        let member = Member {
            key,
            record,
            before: 0,
            state,
            since: now,
            version: 0,
            hash: 0,
            count: 0,
            suspicion: None,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.by_key.insert(key, index);
        self.live += usize::from(member.is_live());
        let bucket = &mut self.buckets[bucket(key)];
        *bucket = bucket.wrapping_add(member.mark());
        self.slots[index as usize] = Some(member);
        index
    }

    /// Changes a member, and the hashes with it.
    pub fn update<T>(&mut self, index: u32, change: impl FnOnce(&mut Member) -> T) -> Option<T> {
        let member = self.slots.get_mut(index as usize)?.as_mut()?;
        let (mark, live) = (member.mark(), member.is_live());
        let result = change(member);
        let bucket = &mut self.buckets[bucket(member.key)];
        *bucket = bucket.wrapping_sub(mark).wrapping_add(member.mark());
        self.live = self.live + usize::from(member.is_live()) - usize::from(live);
        Some(result)
    }

    /// Removes a member; its number is given again.
    pub fn remove(&mut self, index: u32) {
        self.update(index, |member| member.state = State::Dead);
        if let Some(member) = self.slots.get_mut(index as usize).and_then(Option::take) {
            self.by_key.remove(&member.key);
            self.free.push(index);
        }
    }

    /// All members with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Member)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(index, slot)| slot.as_ref().map(|member| (index as u32, member)))
    }

    /// Live members, this node included.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Members that are known, dead ones included.
    pub fn known(&self) -> usize {
        self.by_key.len()
    }

    /// Numbers up to this one may be in use.
    pub fn numbers(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The hash over all live members and what they hold.
    pub fn root(&self) -> u64 {
        self.buckets.iter().fold(0, |root, bucket| mix(root ^ bucket))
    }

    /// The hash of each bucket.
    pub fn buckets(&self) -> impl Iterator<Item = u32> + '_ {
        self.buckets.iter().map(|hash| mix(*hash) as u32)
    }
}

/// The bucket of a member.
pub fn bucket(key: u64) -> usize {
    (key >> 56) as usize % BUCKETS
}
