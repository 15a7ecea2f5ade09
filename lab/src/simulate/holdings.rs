//! Inventories for thousands of simulated views: 5,000 of them with 5 million pairs each do not fit into a machine, but they
//! nearly all agree. A set of contents is kept once and named by its hash; only what differs is a node's own.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use peili::network::gossip::holdings::{Holdings, Index, KeyHasher, mix};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// How long a set that nobody has is kept, in milliseconds: its owner is ahead of those who are about to have it.
const KEPT: u64 = 5_000;
/// Contents in all, and of one node in the mean (issue 4's workload).
pub(super) const DISTINCT: u64 = 20_000;
pub(super) const MEAN: usize = 1_000;

/// What some member holds.
pub(super) struct Set {
    /// Sorted.
    pub(super) contents: Vec<u64>,
    /// As the gossip computes it.
    pub(super) hash: u64,
}

/// All sets that somebody has.
#[derive(Default)]
pub(super) struct Pool {
    sets: HashMap<u64, (Arc<Set>, u64), BuildHasherDefault<KeyHasher>>,
    now: u64,
}

/// What one node knows of all members.
pub(super) struct Shared {
    pool: Rc<RefCell<Pool>>,
    members: Vec<Slot>,
    pairs: u64,
}

#[derive(Clone, Default)]
enum Slot {
    #[default]
    Empty,
    Pooled(Arc<Set>),
    /// On its way to a set that is in the pool.
    Own(Box<(HashSet<u64>, u64)>),
}

impl Pool {
    pub(super) fn put(&mut self, set: Set) -> Arc<Set> {
        let now = self.now;
        Arc::clone(&self.sets.entry(set.hash).or_insert_with(|| (Arc::new(set), now)).0)
    }

    /// Drops what nobody has any more.
    pub(super) fn purge(&mut self, now: u64) {
        self.now = now;
        self.sets.retain(|_, (set, since)| Arc::strong_count(set) > 1 || *since + KEPT > now);
    }
}

impl Set {
    /// A node's inventory: about a thousand contents, 2,000 at the 99th percentile, popular ones more often.
    pub(super) fn random(rng: &mut SmallRng) -> Self {
        let normal = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt()
            * (std::f64::consts::TAU * rng.random::<f64>()).cos();
        let count = (MEAN as f64 * (1.0 + 0.43 * normal)).clamp(50.0, 3.0 * MEAN as f64) as usize;
        let mut contents = HashSet::new();
        while contents.len() < count {
            let place: f64 = rng.random();
            contents.insert(content((place * place * DISTINCT as f64) as u64));
        }
        let mut contents: Vec<u64> = contents.into_iter().collect();
        contents.sort_unstable();
        let hash = contents.iter().fold(0_u64, |hash, content| hash.wrapping_add(mix(*content)));
        Self { contents, hash }
    }
}

/// The key of one of the contents that there are.
pub(super) fn content(number: u64) -> u64 {
    mix(1_000_000 + number)
}

impl Shared {
    pub(super) fn new(pool: Rc<RefCell<Pool>>) -> Self {
        Self { pool, members: Vec::new(), pairs: 0 }
    }

    /// Starts with what a member holds.
    pub(super) fn know(&mut self, member: u32, set: Arc<Set>) {
        self.pairs += set.contents.len() as u64;
        *self.slot(member) = Slot::Pooled(set);
    }

    fn slot(&mut self, member: u32) -> &mut Slot {
        let member = member as usize;
        if self.members.len() <= member {
            self.members.resize(member + 1, Slot::Empty);
        }
        &mut self.members[member]
    }
}

impl Holdings for Shared {
    fn set(&mut self, member: u32, content: u64, held: bool) -> bool {
        let pool = Rc::clone(&self.pool);
        let mut pool = pool.borrow_mut();
        let slot = self.slot(member);
        let (had, hash) = match slot {
            Slot::Empty => (false, 0),
            Slot::Pooled(set) => (set.contents.binary_search(&content).is_ok(), set.hash),
            Slot::Own(own) => (own.0.contains(&content), own.1),
        };
        if had == held {
            return false;
        }
        let hash = if held { hash.wrapping_add(mix(content)) } else { hash.wrapping_sub(mix(content)) };
        if let Some((set, _)) = pool.sets.get(&hash) {
            *slot = Slot::Pooled(Arc::clone(set));
        } else {
            let (mut contents, _) = match std::mem::take(slot) {
                Slot::Empty => (HashSet::new(), 0),
                Slot::Pooled(set) => (set.contents.iter().copied().collect(), 0),
                Slot::Own(own) => *own,
            };
            if held {
                contents.insert(content);
            } else {
                contents.remove(&content);
            }
            // Number 0 is the owner: where it is, the others will be.
            *slot = if member == 0 {
                let mut contents: Vec<u64> = contents.into_iter().collect();
                contents.sort_unstable();
                Slot::Pooled(pool.put(Set { contents, hash }))
            } else {
                Slot::Own(Box::new((contents, hash)))
            };
        }
        self.pairs = if held { self.pairs + 1 } else { self.pairs - 1 };
        true
    }

    fn of(&self, member: u32) -> Vec<u64> {
        match self.members.get(member as usize) {
            None | Some(Slot::Empty) => Vec::new(),
            Some(Slot::Pooled(set)) => set.contents.clone(),
            Some(Slot::Own(own)) => own.0.iter().copied().collect(),
        }
    }

    fn forget(&mut self, member: u32) {
        let count = match std::mem::take(self.slot(member)) {
            Slot::Empty => 0,
            Slot::Pooled(set) => set.contents.len(),
            Slot::Own(own) => own.0.len(),
        };
        self.pairs -= count as u64;
    }

    fn each(&self, each: &mut dyn FnMut(u64, &mut dyn Iterator<Item = u32>)) {
        let mut all: HashMap<u64, Vec<u32>, BuildHasherDefault<KeyHasher>> = HashMap::default();
        for member in 0..self.members.len() as u32 {
            for content in self.of(member) {
                all.entry(content).or_default().push(member);
            }
        }
        for (content, members) in all {
            each(content, &mut members.into_iter());
        }
    }

    fn pairs(&self) -> u64 {
        self.pairs
    }
}

/// What the inventories of so many members take in the memory of a real node, in MiB.
pub(super) fn measure(members: usize) -> Result<f64> {
    let before = resident()?;
    let mut rng = SmallRng::seed_from_u64(7);
    let mut index = Index::default();
    for member in 0..members {
        for content in Set::random(&mut rng).contents {
            index.set(member as u32, content, true);
        }
    }
    let after = resident()?;
    anyhow::ensure!(index.pairs() > 0, "nothing was put into the index");
    Ok(after.saturating_sub(before) as f64 / (1 << 20) as f64)
}

/// Bytes of this process in memory.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status says nothing of VmRSS")? << 10)
}
