//! What this node knows of its peers as sources: who is suspected, who is slow, who lied about what.
//!
//! Pure bookkeeping over a clock that is passed in; it asks nobody and sends nothing. A peer that failed is suspected:
//! it is left out for a while that doubles with each failure, then tried once at a time and with a short limit, so that
//! a dead peer costs once and not per layer. A peer that has not got what it claims, or sent wrong bytes, is left out
//! for that content only.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

use crate::network::Peer;
use crate::oci::{Digest, PeerId};

/// First suspicion; doubles with each failure in a row.
const SUSPICION_MIN: Duration = Duration::from_secs(1);
/// Longest suspicion: a peer that comes back is used again after this time at the latest.
const SUSPICION_MAX: Duration = Duration::from_secs(30);
/// How long a peer that sent wrong bytes is left out for that content.
const LIE_TTL: Duration = Duration::from_secs(600);
/// How long a peer that had not got what it claims is left out for that content.
const MISS_TTL: Duration = Duration::from_secs(5);
/// Contents for which exclusions are remembered; the oldest go first.
const EXCLUSIONS: usize = 4096;
/// Contents per peer of which bytes went to the runtime before they were verified; the oldest are forgotten first.
const UNVERIFIED: usize = 64;
/// First-byte times that the hedging delay is taken from.
const SAMPLES: usize = 64;
/// Hedging delay while there are no samples, and the bounds that it is kept in.
const HEDGE_DEFAULT: Duration = Duration::from_millis(50);
const HEDGE_MIN: Duration = Duration::from_millis(10);
const HEDGE_MAX: Duration = Duration::from_millis(100);
/// Hedges may be this many in a row, and are earned at one per ten requests: under overload, when every answer is
/// late, hedging must not double the load.
const HEDGE_TOKENS: f64 = 10.0;
const HEDGE_EARNED: f64 = 0.1;

/// The table. Cheap to lock: nothing is awaited or allocated at length inside.
#[derive(Debug)]
pub(crate) struct Peers {
    table: Mutex<Table>,
    zone: String,
}

#[derive(Debug, Default)]
struct Table {
    records: HashMap<PeerId, Record>,
    excluded: HashMap<Digest, Exclusion>,
    /// Contents by peer of which bytes were taken and not verified to the end: the client hung up, or asked for a part.
    unverified: HashMap<PeerId, VecDeque<Digest>>,
    first_bytes: Vec<Duration>,
    next_sample: usize,
    hedge_tokens: f64,
}

#[derive(Clone, Debug, Default)]
struct Record {
    /// Failures in a row.
    failures: u32,
    suspected_until: Option<Instant>,
    /// When it last answered anything.
    answered: Option<Instant>,
    /// A trial of a suspected peer is under way.
    on_trial: bool,
    /// Requests of this node that it is working at.
    in_flight: u32,
    /// Length of its queue as it last said, and when.
    queue: Option<(u32, Instant)>,
    conduct: Conduct,
}

#[derive(Debug, Default)]
struct Exclusion {
    peers: Vec<(PeerId, Instant)>,
}

/// What was seen of a peer since this node started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Conduct {
    /// Bytes of content taken from it.
    pub bytes: u64,
    /// Contents with a wrong digest that it had a part in.
    pub digest_mismatches: u64,
    /// Requests that it did not answer in time, or connections that failed or stalled.
    pub failures: u64,
    /// Answers that contradict the request or the protocol.
    pub protocol_errors: u64,
    /// Content that it claimed and had not got.
    pub misses: u64,
    /// Whether it is suspected now.
    pub suspected: bool,
}

/// A peer to ask, and how long it may take to its first byte.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) peer: Arc<Peer>,
    /// It is suspected, and this is its trial.
    pub(crate) trial: bool,
}

/// One request's load on a peer; counts the bytes that came by it.
#[derive(Debug)]
pub(crate) struct Load {
    peers: Arc<Peers>,
    peer: PeerId,
    bytes: u64,
}

/// How a request to a peer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The first byte came after this time.
    FirstByte(Duration),
    /// It has not got it.
    Miss,
    /// It is busy, with so many waiting.
    Busy(u32),
    /// Silent for too long, though it answered others meanwhile: it is no worse than busy.
    Slow,
    /// Unreachable, silent or stalled.
    Failed,
    /// It broke the protocol, or another identity answered.
    Broken,
}

impl Peers {
    pub(crate) fn new(zone: String) -> Self {
        let table = Table { hedge_tokens: HEDGE_TOKENS, ..Table::default() };
        Self { table: Mutex::new(table), zone }
    }

    /// Orders holders for one request: those of this node's zone first, each picked as the less loaded of two random
    /// ones, so that many requesters do not run for the same one. Suspected peers whose time is over come last, one
    /// trial at a time; the others that are suspected or excluded for this content are left out.
    pub(crate) fn candidates(
        &self,
        holders: Vec<Arc<Peer>>,
        digest: &Digest,
        now: Instant,
    ) -> Vec<Candidate> {
        let mut table = self.lock();
        let excluded = table.excluded.get(digest);
        let holders: Vec<_> =
            holders.into_iter().filter(|peer| !excluded.is_some_and(|e| e.contains(&peer.id, now))).collect();
        let (mut near, mut far, mut trials) = (Vec::new(), Vec::new(), Vec::new());
        for peer in holders {
            let record = table.records.entry(peer.id.clone()).or_default();
            match record.suspected_until {
                None if !self.zone.is_empty() && peer.zone == self.zone => {
                    near.push((record.load(now), peer));
                }
                None => far.push((record.load(now), peer)),
                Some(until) if until <= now && !record.on_trial => trials.push(peer),
                Some(_) => {}
            }
        }
        drop(table);
        let mut candidates = Vec::new();
        for mut group in [near, far] {
            while let Some(peer) = pick(&mut group) {
                candidates.push(Candidate { peer, trial: false });
            }
        }
        candidates.extend(trials.into_iter().map(|peer| Candidate { peer, trial: true }));
        candidates
    }

    /// A request to `candidate` begins: it counts as load until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>, candidate: &Candidate) -> Load {
        let mut table = self.lock();
        table.hedge_tokens = (table.hedge_tokens + HEDGE_EARNED).min(HEDGE_TOKENS);
        let record = table.records.entry(candidate.peer.id.clone()).or_default();
        record.in_flight += 1;
        record.on_trial |= candidate.trial;
        Load { peers: Arc::clone(self), peer: candidate.peer.id.clone(), bytes: 0 }
    }

    /// A request got to its first byte, or failed. Returns whether the peer is suspected from now on.
    pub(crate) fn end(&self, peer: &PeerId, digest: &Digest, outcome: Outcome, now: Instant) -> bool {
        let mut table = self.lock();
        let record = table.records.entry(peer.clone()).or_default();
        record.on_trial = false;
        if matches!(outcome, Outcome::FirstByte(_) | Outcome::Miss | Outcome::Busy(_)) {
            record.answered = Some(now);
        }
        match outcome {
            Outcome::Slow => false,
            Outcome::FirstByte(after) => {
                record.suspected_until = None;
                record.queue = None;
                table.sample(after);
                false
            }
            Outcome::Miss => {
                record.conduct.misses += 1;
                table.exclude(digest, peer, now + MISS_TTL, now);
                false
            }
            Outcome::Busy(queue) => {
                record.queue = Some((queue, now));
                false
            }
            Outcome::Failed => {
                record.conduct.failures += 1;
                record.suspect(now)
            }
            Outcome::Broken => {
                record.conduct.protocol_errors += 1;
                let suspected = record.suspect(now);
                table.exclude(digest, peer, now + LIE_TTL, now);
                suspected
            }
        }
    }

    /// Whether `peer` answered anything after `began`: one that is dead or hangs cannot have.
    pub(crate) fn answered_since(&self, peer: &PeerId, began: Instant) -> bool {
        self.lock().records.get(peer).and_then(|record| record.answered).is_some_and(|at| at > began)
    }

    /// Bytes of `digest` come from `peer`.
    pub(crate) fn took(&self, peer: &PeerId, digest: &Digest) {
        let mut table = self.lock();
        let digests = table.unverified.entry(peer.clone()).or_default();
        if !digests.contains(digest) {
            digests.push_back(*digest);
            if digests.len() > UNVERIFIED {
                digests.pop_front();
            }
        }
    }

    /// The bytes of `digest` from `peer` are right.
    pub(crate) fn verified(&self, peer: &PeerId, digest: &Digest) {
        if let Some(digests) = self.lock().unverified.get_mut(peer) {
            digests.retain(|taken| taken != digest);
        }
    }

    /// `peers` had a part in content whose digest is wrong: which one lied cannot be told, so all are left out for it.
    /// Returns what else is in doubt: where it can be told, what came from the liar and was not verified.
    pub(crate) fn lied(&self, peers: &[PeerId], digest: &Digest, now: Instant) -> Vec<Digest> {
        let mut table = self.lock();
        for peer in peers {
            table.records.entry(peer.clone()).or_default().conduct.digest_mismatches += 1;
            table.exclude(digest, peer, now + LIE_TTL, now);
        }
        let [liar] = peers else { return Vec::new() };
        let mut doubted = Vec::from(table.unverified.remove(liar).unwrap_or_default());
        doubted.retain(|other| other != digest);
        for other in &doubted {
            table.exclude(other, liar, now + LIE_TTL, now);
        }
        doubted
    }

    /// How long to wait for a first byte before another holder is asked too: the 95th percentile of what was seen.
    pub(crate) fn hedge_after(&self) -> Duration {
        let mut samples = self.lock().first_bytes.clone();
        if samples.len() < 8 {
            return HEDGE_DEFAULT;
        }
        samples.sort_unstable();
        samples[samples.len() * 95 / 100].clamp(HEDGE_MIN, HEDGE_MAX)
    }

    /// Takes leave for one hedge.
    pub(crate) fn may_hedge(&self) -> bool {
        let mut table = self.lock();
        let may = table.hedge_tokens >= 1.0;
        if may {
            table.hedge_tokens -= 1.0;
        }
        may
    }

    /// What was seen of each peer.
    pub(crate) fn conduct(&self, now: Instant) -> HashMap<PeerId, Conduct> {
        let seen = |record: &Record| Conduct {
            suspected: record.suspected_until.is_some_and(|until| until > now),
            ..record.conduct
        };
        self.lock().records.iter().map(|(id, record)| (id.clone(), seen(record))).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn sample(&mut self, after: Duration) {
        if self.first_bytes.len() < SAMPLES {
            self.first_bytes.push(after);
        } else {
            self.first_bytes[self.next_sample] = after;
        }
        self.next_sample = (self.next_sample + 1) % SAMPLES;
    }

    fn exclude(&mut self, digest: &Digest, peer: &PeerId, until: Instant, now: Instant) {
        if self.excluded.len() >= EXCLUSIONS && !self.excluded.contains_key(digest) {
            self.excluded.retain(|_, exclusion| exclusion.peers.iter().any(|(_, until)| *until > now));
            if self.excluded.len() >= EXCLUSIONS {
                let any = self.excluded.keys().next().copied();
                any.map(|digest| self.excluded.remove(&digest));
            }
        }
        let peers = &mut self.excluded.entry(*digest).or_default().peers;
        peers.retain(|(id, kept)| *kept > now && (id != peer || *kept > until));
        if !peers.iter().any(|(id, _)| id == peer) {
            peers.push((peer.clone(), until));
        }
    }
}

impl Load {
    /// All that was asked for came. Only this forgives former failures: a peer that answers and then stalls is
    /// suspected for longer each time.
    pub(crate) fn complete(self) {
        if let Some(record) = self.peers.lock().records.get_mut(&self.peer) {
            record.failures = 0;
        }
    }

    /// Bytes came: while they do, silence of another request to this peer means that it is slow, not that it is gone.
    pub(crate) fn count(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        if let Some(record) = self.peers.lock().records.get_mut(&self.peer) {
            record.answered = Some(now);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(record) = self.peers.lock().records.get_mut(&self.peer) {
            record.in_flight = record.in_flight.saturating_sub(1);
            record.conduct.bytes += self.bytes;
        }
    }
}

impl Exclusion {
    fn contains(&self, peer: &PeerId, now: Instant) -> bool {
        self.peers.iter().any(|(id, until)| id == peer && *until > now)
    }
}

impl Record {
    fn suspect(&mut self, now: Instant) -> bool {
        // Requests that were under way together fail together: they count as one failure.
        if self.suspected_until.is_some_and(|until| until > now) {
            return false;
        }
        let time = SUSPICION_MIN.saturating_mul(1 << self.failures.min(10)).min(SUSPICION_MAX);
        self.failures += 1;
        self.suspected_until = Some(now + time);
        true
    }

    /// What it is said to be busy with; a queue length is believed for a second.
    fn load(&self, now: Instant) -> u32 {
        let queue = self.queue.filter(|(_, at)| now.duration_since(*at) < Duration::from_secs(1));
        self.in_flight + queue.map_or(0, |(length, _)| length.saturating_add(8))
    }
}

/// Removes the less loaded of two random members.
fn pick(group: &mut Vec<(u32, Arc<Peer>)>) -> Option<Arc<Peer>> {
    if group.is_empty() {
        return None;
    }
    let mut random = rand::rng();
    let (a, b) = (random.random_range(0..group.len()), random.random_range(0..group.len()));
    let chosen = if group[b].0 < group[a].0 { b } else { a };
    Some(group.swap_remove(chosen).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(letter: char, zone: &str) -> Arc<Peer> {
        let id = format!("12D3KooW{}", letter.to_string().repeat(44));
        Arc::new(Peer {
            id: id.parse().unwrap(),
            transfer: Vec::new(),
            node: String::new(),
            zone: zone.into(),
            version: String::new(),
        })
    }

    fn names(candidates: &[Candidate]) -> Vec<&str> {
        candidates.iter().map(|candidate| candidate.peer.id.short()).collect()
    }

    #[test]
    fn a_failed_peer_is_left_out_then_tried_once_then_used() {
        let (peers, digest, now) = (Arc::new(Peers::new(String::new())), Digest::sha256(b""), Instant::now());
        let holders = || vec![peer('a', "")];
        let first = peers.candidates(holders(), &digest, now);
        drop(peers.begin(&first[0]));
        peers.end(&first[0].peer.id, &digest, Outcome::Failed, now);
        assert!(peers.candidates(holders(), &digest, now).is_empty());

        let later = now + SUSPICION_MIN;
        let trial = peers.candidates(holders(), &digest, later);
        assert!(trial[0].trial);
        drop(peers.begin(&trial[0]));
        assert!(peers.candidates(holders(), &digest, later).is_empty(), "one trial at a time");
        peers.end(&trial[0].peer.id, &digest, Outcome::Failed, later);
        assert!(peers.candidates(holders(), &digest, later + SUSPICION_MIN).is_empty(), "doubled");

        let later = later + SUSPICION_MIN * 2;
        let trial = peers.candidates(holders(), &digest, later);
        let load = peers.begin(&trial[0]);
        peers.end(&trial[0].peer.id, &digest, Outcome::FirstByte(Duration::ZERO), later);
        load.complete();
        assert!(!peers.candidates(holders(), &digest, later)[0].trial);
    }

    #[test]
    fn failures_of_one_moment_count_once() {
        let (peers, now) = (Peers::new(String::new()), Instant::now());
        for _ in 0..20 {
            peers.end(&peer('a', "").id, &Digest::sha256(b""), Outcome::Failed, now);
        }
        assert_eq!(peers.candidates(vec![peer('a', "")], &Digest::sha256(b""), now + SUSPICION_MIN).len(), 1);
    }

    #[test]
    fn a_liar_is_left_out_for_that_content_only() {
        let (peers, now) = (Peers::new(String::new()), Instant::now());
        let (wrong, other) = (Digest::sha256(b"wrong"), Digest::sha256(b"other"));
        peers.lied(&[peer('a', "").id.clone()], &wrong, now);
        assert_eq!(names(&peers.candidates(vec![peer('a', ""), peer('b', "")], &wrong, now)), ["bbbbbbbb"]);
        assert_eq!(peers.candidates(vec![peer('a', "")], &other, now).len(), 1);
        assert_eq!(peers.candidates(vec![peer('a', "")], &wrong, now + LIE_TTL).len(), 1);
        assert_eq!(peers.conduct(now)[&peer('a', "").id].digest_mismatches, 1);
    }

    #[test]
    fn own_zone_first_and_the_less_loaded_of_two() {
        let (peers, digest, now) = (Peers::new("z1".into()), Digest::sha256(b""), Instant::now());
        peers.end(&peer('a', "").id, &digest, Outcome::Busy(9), now);
        let mut first = HashMap::new();
        for _ in 0..200 {
            let candidates =
                peers.candidates(vec![peer('a', "z1"), peer('b', "z1"), peer('c', "z2")], &digest, now);
            assert_eq!(candidates.len(), 3);
            assert_eq!(candidates[2].peer.id, peer('c', "").id);
            *first.entry(candidates[0].peer.id.short().to_owned()).or_insert(0) += 1;
        }
        // Two random choices pick the loaded one only if both fall on it: a quarter of the time.
        assert!(first["bbbbbbbb"] > 110, "{first:?}");
    }

    #[test]
    fn exclusions_are_bounded() {
        let (peers, now) = (Peers::new(String::new()), Instant::now());
        for number in 0..EXCLUSIONS as u32 + 50 {
            peers.lied(&[peer('a', "").id.clone()], &Digest::sha256(&number.to_be_bytes()), now);
        }
        assert!(peers.lock().excluded.len() <= EXCLUSIONS);
    }

    #[test]
    fn hedges_follow_the_samples_and_are_limited() {
        let (peers, digest, now) = (Peers::new(String::new()), Digest::sha256(b""), Instant::now());
        assert_eq!(peers.hedge_after(), HEDGE_DEFAULT);
        for _ in 0..SAMPLES {
            peers.end(&peer('a', "").id, &digest, Outcome::FirstByte(Duration::from_millis(20)), now);
        }
        assert_eq!(peers.hedge_after(), Duration::from_millis(20));
        assert_eq!((0..100).filter(|_| peers.may_hedge()).count(), 10);
    }
}
