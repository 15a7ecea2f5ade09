//! For which contents a peer is left out, and which contents it gave that nobody has judged. Bounded; the entries that end
//! soonest go first.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::oci::{Digest, PeerId};

/// How long a peer that sent wrong bytes is left out for that content.
pub(super) const LIE_TTL: Duration = Duration::from_secs(600);
/// How long a peer that had not got what it claims is left out for that content.
pub(super) const MISS_TTL: Duration = Duration::from_secs(5);
/// Contents for which exclusions are remembered.
pub(super) const EXCLUSIONS: usize = 4096;
/// Contents per peer of which bytes went to the runtime and were never verified; the oldest are forgotten first.
const UNVERIFIED: usize = 64;

/// The table's part about single contents.
#[derive(Debug, Default)]
pub(super) struct Exclusions {
    excluded: HashMap<Digest, Vec<(PeerId, Instant)>>,
    /// Contents by peer of which bytes went to the runtime and were not verified to the end: the client hung up, or asked
    /// for a part, or no peer went on.
    unverified: HashMap<PeerId, VecDeque<Digest>>,
}

impl Exclusions {
    /// Leaves `peer` out for `digest`.
    pub(super) fn add(&mut self, digest: &Digest, peer: &PeerId, until: Instant, now: Instant) {
        if self.excluded.len() >= EXCLUSIONS && !self.excluded.contains_key(digest) {
            self.excluded.retain(|_, peers| peers.iter().any(|(_, until)| *until > now));
            if self.excluded.len() >= EXCLUSIONS {
                let last = |peers: &Vec<(PeerId, Instant)>| peers.iter().map(|(_, until)| *until).max();
                let soonest = self.excluded.iter().min_by_key(|(_, peers)| last(peers));
                let soonest = soonest.map(|(digest, _)| *digest);
                soonest.map(|digest| self.excluded.remove(&digest));
            }
        }
        let peers = self.excluded.entry(*digest).or_default();
        peers.retain(|(id, kept)| *kept > now && (id != peer || *kept > until));
        if !peers.iter().any(|(id, _)| id == peer) {
            peers.push((peer.clone(), until));
        }
    }

    /// Whether `peer` is left out for `digest`.
    pub(super) fn contains(&self, digest: &Digest, peer: &PeerId, now: Instant) -> bool {
        let peers = self.excluded.get(digest);
        peers.is_some_and(|peers| peers.iter().any(|(id, until)| id == peer && *until > now))
    }

    /// Bytes of `digest` from `peer` went to the runtime, and whether they are right will never be known here.
    pub(super) fn left_unverified(&mut self, peer: &PeerId, digest: &Digest) {
        let digests = self.unverified.entry(peer.clone()).or_default();
        if !digests.contains(digest) {
            digests.push_back(*digest);
            if digests.len() > UNVERIFIED {
                digests.pop_front();
            }
        }
    }

    /// The runtime asks for the whole of `digest`: what it got of it before does not count any more.
    pub(super) fn begins_anew(&mut self, digest: &Digest) {
        for digests in self.unverified.values_mut() {
            digests.retain(|left| left != digest);
        }
    }

    /// Takes out what came from `peers` and was never judged, and leaves each out for its part of it.
    pub(super) fn doubt(&mut self, peers: &[PeerId], until: Instant, now: Instant) -> HashSet<Digest> {
        let mut doubted = HashSet::new();
        for peer in peers {
            for digest in self.unverified.remove(peer).unwrap_or_default() {
                self.add(&digest, peer, until, now);
                doubted.insert(digest);
            }
        }
        doubted
    }

    /// Forgets what peers gave that are not `known` any more.
    pub(super) fn retain(&mut self, known: impl Fn(&PeerId) -> bool) {
        self.unverified.retain(|peer, _| known(peer));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.excluded.len()
    }
}
