//! What this node holds, as its peers are told, and what one peer holds, as it told us. Pure state, no I/O.
//!
//! The owner counts its changes. It pushes; the receiver answers each push with the position that it has reached, so
//! whatever was lost or restarted, the next push starts from there: by a change, or by the whole in pages where the
//! owner's log does not reach back.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};

use super::message::{Inventory, PAGE, Position, State};
use crate::network::Advertisement;
use crate::oci::Digest;

/// Digests of one node; 200,000 are about 10,000 images. More are neither told nor believed.
pub(super) const INVENTORY_LIMIT: usize = 200_000;
/// Changes that are remembered; a peer that is further behind is sent the whole.
const LOG_LIMIT: usize = 16_384;

/// This node's inventory.
pub(super) struct Own {
    position: Position,
    held: HashSet<Digest>,
    /// The last changes: the digest, and whether it was added. The last one led to `position.version`.
    log: VecDeque<(Digest, bool)>,
    /// Lives as long as a transfer uses it.
    snapshot: Option<(u64, Weak<[Digest]>)>,
    limit: usize,
    left_out: bool,
}

/// The whole inventory at a version, shared by the transfers to all peers.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub version: u64,
    pub digests: Arc<[Digest]>,
}

/// A peer's inventory.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub digests: HashSet<Digest>,
    /// It claimed more than the limit.
    pub excess: bool,
    position: Position,
    staging: Option<Staging>,
}

/// Pages of a whole that is not complete yet.
#[derive(Debug)]
struct Staging {
    position: Position,
    pages: u32,
    digests: HashSet<Digest>,
    excess: bool,
}

impl Own {
    /// Nothing held, in a new incarnation.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            position: Position { incarnation: rand::random_range(1..=u64::MAX), version: 0 },
            held: HashSet::new(),
            log: VecDeque::new(),
            snapshot: None,
            limit,
            left_out: false,
        }
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether something is held that peers are not told, because it is more than the limit.
    pub(super) fn left_out(&self) -> bool {
        self.left_out
    }

    /// Takes a change; `false`: nothing changed.
    pub(super) fn apply(&mut self, change: Advertisement) -> bool {
        let before = self.position.version;
        match change {
            Advertisement::Added(digest) => self.add(digest),
            Advertisement::Removed(digest) => self.remove(&digest),
            Advertisement::All(digests) => {
                let all: HashSet<Digest> = digests.into_iter().collect();
                self.left_out = false;
                let gone: Vec<Digest> = self.held.difference(&all).copied().collect();
                for digest in &gone {
                    self.remove(digest);
                }
                for digest in all {
                    self.add(digest);
                }
            }
        }
        self.position.version != before
    }

    /// What leads from `version` to now, or part of the way; `None`: only the whole does.
    pub(super) fn since(&self, version: u64) -> Option<Inventory> {
        let behind = usize::try_from(self.position.version.checked_sub(version)?).ok()?;
        let start = self.log.len().checked_sub(behind)?;
        let count = behind.min(PAGE);
        // The last change of a digest counts.
        let mut net: HashMap<Digest, bool> = HashMap::with_capacity(count);
        net.extend(self.log.iter().skip(start).take(count).copied());
        let (added, removed): (Vec<_>, Vec<_>) = net.into_iter().partition(|(_, added)| *added);
        Some(Inventory {
            incarnation: self.position.incarnation,
            from: version,
            to: version + count as u64,
            page: None,
            last: true,
            added: added.into_iter().map(|(digest, _)| digest).collect(),
            removed: removed.into_iter().map(|(digest, _)| digest).collect(),
        })
    }

    /// The whole of now.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        let version = self.position.version;
        if let Some((of, digests)) = &self.snapshot
            && *of == version
            && let Some(digests) = digests.upgrade()
        {
            return Snapshot { version, digests };
        }
        let digests: Arc<[Digest]> = self.held.iter().copied().collect();
        self.snapshot = Some((version, Arc::downgrade(&digests)));
        Snapshot { version, digests }
    }

    fn add(&mut self, digest: Digest) {
        if self.held.len() >= self.limit && !self.held.contains(&digest) {
            self.left_out = true;
        } else if self.held.insert(digest) {
            self.record(digest, true);
        }
    }

    fn remove(&mut self, digest: &Digest) {
        if self.held.remove(digest) {
            self.record(*digest, false);
        }
    }

    fn record(&mut self, digest: Digest, added: bool) {
        self.position.version += 1;
        self.log.push_back((digest, added));
        if self.log.len() > LOG_LIMIT {
            self.log.pop_front();
        }
    }
}

impl Snapshot {
    /// A page of it; beyond the last one: an empty last one.
    pub(super) fn page(&self, incarnation: u64, page: u32) -> Inventory {
        let start = (page as usize).saturating_mul(PAGE).min(self.digests.len());
        let end = (start + PAGE).min(self.digests.len());
        Inventory {
            incarnation,
            from: 0,
            to: self.version,
            page: Some(page),
            last: end == self.digests.len(),
            added: self.digests[start..end].to_vec(),
            removed: Vec::new(),
        }
    }
}

impl Held {
    /// What is known, as the peer is told.
    pub(super) fn state(&self) -> State {
        State { have: self.position, pages: self.staging.as_ref().map_or(0, |staging| staging.pages) }
    }

    /// The peer runs in this incarnation: what an earlier one held counts no more.
    pub(super) fn incarnation(&mut self, incarnation: u64) {
        if self.position.incarnation != incarnation {
            *self = Self::default();
        }
    }

    /// Takes a push, and says where that leads to.
    pub(super) fn apply(&mut self, inventory: Inventory, limit: usize) -> State {
        let position = Position { incarnation: inventory.incarnation, version: inventory.to };
        match inventory.page {
            None => {
                let from = Position { incarnation: inventory.incarnation, version: inventory.from };
                if self.position == from {
                    for digest in &inventory.removed {
                        self.digests.remove(digest);
                    }
                    self.excess |= insert(&mut self.digests, inventory.added, limit);
                    self.position = position;
                }
            }
            Some(page) => {
                let next = match self.staging.take() {
                    Some(staging) if staging.position == position && staging.pages == page => Some(staging),
                    _ if page == 0 => {
                        Some(Staging { position, pages: 0, digests: HashSet::new(), excess: false })
                    }
                    _ => None,
                };
                if let Some(mut staging) = next {
                    staging.excess |= insert(&mut staging.digests, inventory.added, limit);
                    staging.pages += 1;
                    if inventory.last {
                        self.digests = staging.digests;
                        self.excess = staging.excess;
                        self.position = position;
                    } else {
                        self.staging = Some(staging);
                    }
                }
            }
        }
        self.state()
    }
}

/// `true`: some did not fit.
fn insert(digests: &mut HashSet<Digest>, added: Vec<Digest>, limit: usize) -> bool {
    let mut excess = false;
    for digest in added {
        if digests.len() < limit || digests.contains(&digest) {
            digests.insert(digest);
        } else {
            excess = true;
        }
    }
    excess
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: usize) -> Digest {
        Digest::sha256(&n.to_be_bytes())
    }

    /// Pushes until the receiver is there; how many messages that took.
    fn push(own: &mut Own, held: &mut Held) -> usize {
        let mut messages = 0;
        while held.state().have != own.position() {
            let have = held.state().have;
            let same = have.incarnation == own.position().incarnation;
            let change = if same { own.since(have.version) } else { None };
            if let Some(change) = change {
                held.apply(change, INVENTORY_LIMIT);
                messages += 1;
            } else {
                let snapshot = own.snapshot();
                while held.state().have.version != snapshot.version
                    || held.state().have.incarnation != own.position().incarnation
                {
                    let page = snapshot.page(own.position().incarnation, held.state().pages);
                    held.apply(page, INVENTORY_LIMIT);
                    messages += 1;
                }
            }
            assert!(messages < 100, "it does not get there");
        }
        assert_eq!(held.digests, own.held);
        messages
    }

    #[test]
    fn changes_then_gap_then_the_whole() {
        let (mut own, mut held) = (Own::new(INVENTORY_LIMIT), Held::default());
        assert_eq!(push(&mut own, &mut held), 1);
        assert!(own.apply(Advertisement::All((0..20_000).map(digest).collect())));
        assert_eq!(push(&mut own, &mut held), 20_000usize.div_ceil(PAGE));
        own.apply(Advertisement::Added(digest(20_000)));
        own.apply(Advertisement::Removed(digest(5)));
        own.apply(Advertisement::Added(digest(5)));
        own.apply(Advertisement::Removed(digest(6)));
        assert!(!own.apply(Advertisement::Removed(digest(6))));
        assert_eq!(push(&mut own, &mut held), 1);
        // Further behind than the log reaches.
        for n in 0..=LOG_LIMIT {
            own.apply(Advertisement::Removed(digest(n + 20)));
            own.apply(Advertisement::Added(digest(n + 20)));
        }
        assert!(own.since(held.state().have.version).is_none());
        assert_eq!(push(&mut own, &mut held), 20_000usize.div_ceil(PAGE));
    }

    #[test]
    fn a_change_that_does_not_fit_is_not_applied() {
        let (mut own, mut held) = (Own::new(INVENTORY_LIMIT), Held::default());
        push(&mut own, &mut held);
        own.apply(Advertisement::Added(digest(1)));
        own.apply(Advertisement::Added(digest(2)));
        let lost = own.since(1).unwrap();
        held.apply(lost.clone(), INVENTORY_LIMIT);
        assert!(held.digests.is_empty());
        held.apply(Inventory { incarnation: lost.incarnation ^ 1, ..lost }, INVENTORY_LIMIT);
        assert!(held.digests.is_empty());
        push(&mut own, &mut held);
    }

    #[test]
    fn pages_out_of_order_start_again() {
        let mut own = Own::new(INVENTORY_LIMIT);
        own.apply(Advertisement::All((0..3 * PAGE).map(digest).collect()));
        let (snapshot, incarnation) = (own.snapshot(), own.position().incarnation);
        let mut held = Held::default();
        held.apply(snapshot.page(incarnation, 0), INVENTORY_LIMIT);
        assert_eq!(held.apply(snapshot.page(incarnation, 2), INVENTORY_LIMIT), State::default());
        assert!(held.digests.is_empty());
        push(&mut own, &mut held);
    }

    #[test]
    fn more_than_the_limit_is_neither_told_nor_believed() {
        let mut own = Own::new(10);
        own.apply(Advertisement::All((0..20).map(digest).collect()));
        assert_eq!((own.len(), own.left_out()), (10, true));
        own.apply(Advertisement::All((0..5).map(digest).collect()));
        assert!(!own.left_out());

        let mut liar = Own::new(100);
        liar.apply(Advertisement::All((0..50).map(digest).collect()));
        let mut held = Held::default();
        held.apply(liar.snapshot().page(liar.position().incarnation, 0), 10);
        assert_eq!((held.digests.len(), held.excess), (10, true));
        liar.apply(Advertisement::Added(digest(90)));
        held.apply(liar.since(held.state().have.version).unwrap(), 10);
        assert_eq!((held.digests.len(), held.state().have), (10, liar.position()));
    }
}
