//! What this node knows of its peers as sources: who is suspected, who is slow, who lied about what.
//!
//! Pure bookkeeping over a clock that is passed in; it asks nobody and sends nothing. A peer that failed is suspected:
//! it is left out for a while that doubles with each failure, then tried once at a time and with a short limit, so that
//! a dead peer costs once and not per layer. A peer that has not got what it claims is left out for that content only; one
//! that sent wrong bytes also for all that would go to the runtime before it is verified.

mod exclusions;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

use self::exclusions::{Exclusions, LIE_TTL, MISS_TTL};
use crate::network::Peer;
use crate::oci::{Digest, PeerId};

/// First suspicion; doubles with each failure in a row.
const SUSPICION_MIN: Duration = Duration::from_secs(1);
/// Longest suspicion: a peer that comes back is used again after this time at the latest.
const SUSPICION_MAX: Duration = Duration::from_secs(30);
/// After this time without a failure, former ones do not count: not after a mere success, or a peer that answers and then
/// stalls would cost a stall in every layer.
const FORGIVEN: Duration = Duration::from_secs(60);
/// A peer that sends to some and has answered nothing new for so long is as bad as one that is gone.
const SLOW_LIMIT: Duration = Duration::from_secs(1);
/// After this time without a fault, policies are told of none: what a peer did months ago is no news.
const REMEMBERED: Duration = Duration::from_hours(6);
/// Until the end of a request that another peer was asked for too is known.
const SILENCE: Duration = Duration::from_millis(250);
/// After a wait for a busy peer that was in vain; a first byte from it ends this.
const WEARIED: Duration = Duration::from_secs(10);
/// Peers that are remembered; of more, those that are not in use are forgotten.
const RECORDS: usize = 16_384;
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
}

#[derive(Debug, Default)]
struct Table {
    /// Of this node; empty: unknown.
    zone: String,
    records: HashMap<PeerId, Record>,
    exclusions: Exclusions,
    first_bytes: Vec<Duration>,
    next_sample: usize,
    hedge_tokens: f64,
}

#[derive(Clone, Debug, Default)]
struct Record {
    /// Failures in a row.
    failures: u32,
    suspected_until: Option<Instant>,
    failed_at: Option<Instant>,
    /// Since when it was only slow.
    slow_since: Option<Instant>,
    /// When it last answered anything.
    answered: Option<Instant>,
    /// A request had no word of it for so long that another peer was asked too; until its end is known, or then, others
    /// are asked first.
    silent_until: Option<Instant>,
    /// When it last gave a first byte.
    served: Option<Instant>,
    /// It was waited for as long as anybody waits for busy peers; until then nobody waits for it again.
    wearied_until: Option<Instant>,
    /// A trial of a suspected peer is under way.
    on_trial: bool,
    /// Requests of this node that it is working at.
    in_flight: u32,
    /// Length of its queue as it last said, and when.
    queue: Option<(u32, Instant)>,
    /// It had a part in wrong content; until then it is not believed.
    doubted_until: Option<Instant>,
    /// It alone gave that: it is left out for all content that goes to the runtime before it is verified.
    liar_until: Option<Instant>,
    /// When it had the last of its faults.
    fault_at: Option<Instant>,
    conduct: Conduct,
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
    /// Those of its faults that are its own for sure, until there was none for a while; for the policies.
    #[serde(skip)]
    pub faults: Faults,
}

/// Faults that nobody else can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Contents with a wrong digest that came from it alone: of several sources, which one lied cannot be told.
    pub digest_mismatches: u32,
    /// Times that it was suspected: requests that fail together are one.
    pub timeouts: u32,
    /// Answers that contradict the request or the protocol.
    pub protocol_errors: u32,
    /// Since the last of them.
    pub since: Option<Duration>,
}

/// A peer to ask, and how long it may take to its first byte.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) peer: Arc<Peer>,
    /// It is suspected, or was busy for too long, and this is its trial.
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
    /// This node has too many requests to it: it was not asked.
    Queued,
    /// Unreachable, silent or stalled.
    Failed,
    /// Another identity answered at its address.
    Stranger,
    /// It broke the protocol.
    Broken,
}

impl Peers {
    pub(crate) fn new(zone: String) -> Self {
        let table = Table { hedge_tokens: HEDGE_TOKENS, zone, ..Table::default() };
        Self { table: Mutex::new(table) }
    }

    /// This node is in that zone; empty: it is unknown.
    pub(crate) fn set_zone(&self, zone: &str) {
        zone.clone_into(&mut self.lock().zone);
    }

    /// Orders holders for one request: those of this node's zone first, each picked as the less loaded of two random
    /// ones, so that many requesters do not run for the same one. Suspected peers whose time is over come last, and those
    /// that were busy for too long, one trial at a time; the others that are suspected or excluded for this content are
    /// left out. `streamed`: bytes go to the runtime before they are verified, and known liars are left out.
    pub(crate) fn candidates(
        &self,
        mut holders: Vec<Arc<Peer>>,
        digest: &Digest,
        streamed: bool,
        now: Instant,
    ) -> Vec<Candidate> {
        let mut table = self.lock();
        holders.retain(|peer| !table.exclusions.contains(digest, &peer.id, now));
        table.forget_some();
        let zone = table.zone.clone();
        let is_here = |peer: &Peer| !zone.is_empty() && peer.zone == zone;
        let (mut near, mut far, mut silent, mut trials) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for peer in holders {
            let record = table.records.entry(peer.id.clone()).or_default();
            if streamed && record.liar_until.is_some_and(|until| until > now) {
                continue;
            }
            let is_silent = record.silent_until.is_some_and(|until| until > now);
            let is_wearied = record.wearied_until.is_some_and(|until| until > now);
            match record.suspected_until {
                None if is_wearied && record.on_trial => {}
                None if is_wearied => trials.push(peer),
                None if is_silent => silent.push((record.load(now), peer)),
                None if is_here(&peer) => {
                    near.push((record.load(now), peer));
                }
                None => far.push((record.load(now), peer)),
                Some(until) if until <= now && !record.on_trial => trials.push(peer),
                Some(_) => {}
            }
        }
        drop(table);
        let mut candidates = Vec::new();
        for mut group in [near, far, silent] {
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
    pub(crate) fn end(&self, candidate: &Candidate, digest: &Digest, outcome: Outcome, now: Instant) -> bool {
        let peer = &candidate.peer.id;
        let mut table = self.lock();
        let record = table.records.entry(peer.clone()).or_default();
        record.on_trial &= !candidate.trial;
        if matches!(outcome, Outcome::FirstByte(_) | Outcome::Miss | Outcome::Busy(_)) {
            record.answered = Some(now);
            record.slow_since = None;
            record.silent_until = None;
        }
        match outcome {
            Outcome::Queued => false,
            Outcome::Slow => {
                let since = *record.slow_since.get_or_insert(now);
                now.duration_since(since) > SLOW_LIMIT && record.fail(now)
            }
            Outcome::FirstByte(after) => {
                record.suspected_until = None;
                record.queue = None;
                record.served = Some(now);
                record.wearied_until = None;
                table.sample(after);
                false
            }
            Outcome::Miss => {
                record.conduct.misses += 1;
                table.exclusions.add(digest, peer, now + MISS_TTL, now);
                false
            }
            Outcome::Busy(queue) => {
                record.queue = Some((queue, now));
                false
            }
            Outcome::Failed | Outcome::Stranger => record.fail(now),
            Outcome::Broken => {
                record.conduct.protocol_errors += 1;
                record.fault(now).protocol_errors += 1;
                let suspected = record.suspect(now);
                table.exclusions.add(digest, peer, now + LIE_TTL, now);
                suspected
            }
        }
    }

    /// `peer` has not answered a request for so long that another one is asked too.
    pub(crate) fn silent(&self, peer: &PeerId, now: Instant) {
        self.lock().records.entry(peer.clone()).or_default().silent_until = Some(now + SILENCE);
    }

    /// `peers` were busy since `began`, for as long as anybody waits. One that served another request meanwhile is
    /// loaded, and worth a wait the next time too.
    pub(crate) fn wearied<'a>(&self, peers: impl Iterator<Item = &'a PeerId>, began: Instant, now: Instant) {
        let mut table = self.lock();
        for peer in peers {
            let record = table.records.entry(peer.clone()).or_default();
            if record.served.is_none_or(|at| at < began) {
                record.wearied_until = Some(now + WEARIED);
            }
        }
    }

    /// Whether all of `peers` were busy for too long, so that none is waited for: that costs once, and not per layer.
    pub(crate) fn are_wearied<'a>(&self, mut peers: impl Iterator<Item = &'a PeerId>, now: Instant) -> bool {
        let table = self.lock();
        let until = |peer| table.records.get(peer).and_then(|record: &Record| record.wearied_until);
        peers.all(|peer| until(peer).is_some_and(|until| until > now))
    }

    /// `peer` failed in mid-body. Returns whether it is suspected from now on.
    pub(crate) fn failed(&self, peer: &PeerId, now: Instant) -> bool {
        self.lock().records.entry(peer.clone()).or_default().fail(now)
    }

    /// Whether `peer` answered anything after `began`: one that is dead or hangs cannot have.
    pub(crate) fn answered_since(&self, peer: &PeerId, began: Instant) -> bool {
        self.lock().records.get(peer).and_then(|record| record.answered).is_some_and(|at| at > began)
    }

    /// Bytes of `digest` from `peers` went to the runtime, and whether they are right is not known, be it yet or for ever.
    /// Returns whether one of them is not believed any more; that one is left out for it.
    pub(crate) fn left_unverified(&self, peers: &[PeerId], digest: &Digest, now: Instant) -> bool {
        let mut table = self.lock();
        let mut is_doubted = false;
        for peer in peers {
            table.exclusions.left_unverified(peer, digest);
            let doubted = table.records.get(peer).and_then(|record| record.doubted_until);
            if let Some(until) = doubted.filter(|until| *until > now) {
                table.exclusions.add(digest, peer, until, now);
                is_doubted = true;
            }
        }
        is_doubted
    }

    /// The runtime asks for the whole of `digest`, or has it and it is right: what it got before does not count any more.
    pub(crate) fn begins_anew(&self, digest: &Digest) {
        self.lock().exclusions.begins_anew(digest);
    }

    /// `peers` had a part in content whose digest is wrong: which one lied cannot be told, so all are left out for it; one
    /// that was alone is a known liar. Returns what else is in doubt: what the runtime got of them and was never judged.
    pub(crate) fn lied(&self, peers: &[PeerId], digest: &Digest, now: Instant) -> HashSet<Digest> {
        let mut table = self.lock();
        for peer in peers {
            let record = table.records.entry(peer.clone()).or_default();
            record.conduct.digest_mismatches += 1;
            record.doubted_until = Some(now + LIE_TTL);
            if peers.len() == 1 {
                record.fault(now).digest_mismatches += 1;
                record.liar_until = Some(now + LIE_TTL);
            }
            table.exclusions.add(digest, peer, now + LIE_TTL, now);
        }
        let mut doubted = table.exclusions.doubt(peers, now + LIE_TTL, now);
        doubted.remove(digest);
        doubted
    }

    /// Leaves those out that are suspected now.
    pub(crate) fn retain_unsuspected(&self, peers: &mut Vec<Arc<Peer>>, now: Instant) {
        let table = self.lock();
        peers.retain(|peer| !table.is_suspected(&peer.id, now));
    }

    /// Whether `peer` failed a moment ago.
    pub(crate) fn is_suspected(&self, peer: &PeerId, now: Instant) -> bool {
        self.lock().is_suspected(peer, now)
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
            suspected: record.is_suspected(now),
            faults: record.faults_at(now),
            ..record.conduct
        };
        self.lock().records.iter().map(|(id, record)| (id.clone(), seen(record))).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn is_suspected(&self, peer: &PeerId, now: Instant) -> bool {
        self.records.get(peer).is_some_and(|record| record.is_suspected(now))
    }

    fn sample(&mut self, after: Duration) {
        if self.first_bytes.len() < SAMPLES {
            self.first_bytes.push(after);
        } else {
            self.first_bytes[self.next_sample] = after;
        }
        self.next_sample = (self.next_sample + 1) % SAMPLES;
    }

    /// Makes room where peers come and go for ever.
    fn forget_some(&mut self) {
        if self.records.len() > RECORDS {
            self.records.retain(|_, record| record.in_flight > 0);
            let records = &self.records;
            self.exclusions.retain(|peer| records.contains_key(peer));
        }
    }
}

impl Load {
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

impl Record {
    fn is_suspected(&self, now: Instant) -> bool {
        self.suspected_until.is_some_and(|until| until > now)
    }

    fn fail(&mut self, now: Instant) -> bool {
        self.conduct.failures += 1;
        let is_new = self.suspect(now);
        if is_new {
            self.fault(now).timeouts += 1;
        }
        is_new
    }

    /// Counts a fault of its own.
    fn fault(&mut self, now: Instant) -> &mut Faults {
        self.conduct.faults = self.faults_at(now);
        self.fault_at = Some(now);
        &mut self.conduct.faults
    }

    fn faults_at(&self, now: Instant) -> Faults {
        let since = self.fault_at.map(|at| now.saturating_duration_since(at));
        match since {
            Some(since) if since < REMEMBERED => Faults { since: Some(since), ..self.conduct.faults },
            _ => Faults::default(),
        }
    }

    fn suspect(&mut self, now: Instant) -> bool {
        // Requests that were under way together fail together: they count as one failure.
        if self.is_suspected(now) {
            return false;
        }
        if self.failed_at.is_none_or(|at| now.duration_since(at) > FORGIVEN) {
            self.failures = 0;
        }
        self.failed_at = Some(now);
        self.slow_since = None;
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
mod tests;
