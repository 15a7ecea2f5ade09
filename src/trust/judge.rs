//! Asks the trust policies about each peer: when it is known, when its facts change, when its grant ends, and when other
//! policies are in force. Puts into the table what they say, and tells who enforces it that it changed.
//!
//! A peer is judged once it said who it is; until then it may connect and say so, and gets nothing. Where a policy does not
//! answer, the last grant stands until its time is over.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::PinnedTrust;
use super::grants::{Due, Entry, Standing};
use crate::oci::{Action, Level, PeerId, Proof};
use crate::policy::trust::{Claim, Conduct, Evidence, Method, Request, Ruling, TTL_LIMIT, TrustPolicy, Way};
use crate::policy::{Failure, Node, Provenance, Said};

/// Between two looks at the facts: what changes acts within a second.
const INTERVAL: Duration = Duration::from_millis(250);
/// Between two looks, whoever wakes the judge: one takes some milliseconds where there are thousands of peers.
const PAUSE: Duration = Duration::from_millis(100);
/// How soon a policy that did not answer about a peer is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// Failures after which a look ends, since each may take 10 ms; the next one goes on.
pub(super) const FAILURES: usize = 10;
/// How often a policy is asked whose time was up: on a busy machine that need not be its fault, and costs a peer its trust.
const ATTEMPTS: usize = 3;

/// What is known of a peer beside its proof.
#[derive(Clone, Debug)]
pub struct Fact {
    /// Proved by its connection or its signature.
    pub id: PeerId,
    /// What it says of itself.
    pub node: Node,
    /// Where its live connections come from.
    pub observed: Vec<IpAddr>,
    /// Where it says that it is reached, as multiaddrs.
    pub announced: Vec<String>,
    /// How it behaved.
    pub conduct: Conduct,
}

/// Tells what is known of peers.
pub trait Facts: Send + Sync {
    /// Of all that said who they are. May take milliseconds.
    fn facts(&self) -> Vec<Fact>;
}

/// Whose standing is another than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Perhaps everybody's: there are policies, or there are none any more.
    All,
    /// Of these.
    Of(Vec<PeerId>),
}

/// How a peer stands, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explained {
    /// Its ID.
    pub peer: String,
    /// Its node name, by its own word.
    pub node: String,
    /// By what it is admitted; empty: by nothing.
    pub proof: String,
    /// What each policy says now, in their order.
    pub said: Vec<Said>,
    /// What all say now together.
    pub ruling: String,
    /// What they said last, and what is in force; empty: nothing yet.
    pub standing: String,
    /// How long that stands, in seconds.
    pub seconds: u64,
    /// What is believed and fetched from it.
    pub level: Level,
    /// Whether content goes to it.
    pub serve: bool,
}

/// Keeps the table of grants. Clones share it.
#[derive(Clone)]
pub struct Judge {
    trust: Arc<PinnedTrust>,
    policy: Arc<dyn TrustPolicy>,
    facts: Arc<dyn Facts>,
}

impl Judge {
    /// Asks `policy` about the peers of `facts` that `trust` admits.
    pub fn new(trust: Arc<PinnedTrust>, policy: Arc<dyn TrustPolicy>, facts: Arc<dyn Facts>) -> Self {
        Self { trust, policy, facts }
    }

    /// Judges until it is dropped. `changed` is told whose standing is another.
    pub async fn follow(self, changed: impl Fn(Changed) + Send + Sync + 'static) {
        let changed = Arc::new(changed);
        loop {
            let woken = self.trust.grants.wake.notified();
            // An error is the end of the interval.
            let _ = tokio::time::timeout(INTERVAL, woken).await;
            if !self.policy.is_active() && !self.trust.grants.is_active() {
                continue;
            }
            let (judge, changed) = (self.clone(), Arc::clone(&changed));
            // A panic is logged by the hook, and the next look is a new one.
            let _ = tokio::task::spawn_blocking(move || match judge.look(Instant::now()) {
                Changed::Of(peers) if peers.is_empty() => {}
                some => changed(some),
            })
            .await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// How `peer` stands, and what the policies say of it now. `None`: it never said who it is.
    pub fn explain(&self, peer: &PeerId) -> Option<Explained> {
        let now = Instant::now();
        let fact = self.facts.facts().into_iter().find(|fact| fact.id == *peer)?;
        let (trust, table) = (&self.trust, self.trust.table.load());
        let proof = trust.proof_at(&table, peer, now);
        let level = trust.level_at(&table, peer, Action::Fetch, now);
        let (ruling, said) = match evidence(proof) {
            Some(evidence) if self.policy.is_active() => {
                let (ruling, said) = self.policy.explain(&request(&fact, evidence, level));
                (ruling.to_string(), said)
            }
            _ => ("as admission says".into(), Vec::new()),
        };
        let entry = trust.grants.get(peer).filter(|entry| entry.until > now);
        Some(Explained {
            peer: peer.to_string(),
            node: fact.node.name,
            proof: proof.to_string(),
            said,
            ruling,
            standing: entry.as_ref().map(|entry| entry.standing.to_string()).unwrap_or_default(),
            seconds: entry.map_or(0, |entry| entry.until.saturating_duration_since(now).as_secs()),
            level,
            serve: trust.level_at(&table, peer, Action::Serve, now) >= Level::Blobs,
        })
    }

    /// Asks where that is due; tells what changed.
    pub(super) fn look(&self, now: Instant) -> Changed {
        let grants = &self.trust.grants;
        let was_active = grants.is_active();
        if !self.policy.is_active() {
            grants.clear();
            return if was_active { Changed::All } else { Changed::Of(Vec::new()) };
        }
        let began = Instant::now();
        let generation = self.policy.generation();
        let facts = self.facts.facts();
        let mut due = Vec::new();
        for fact in &facts {
            let proof = self.trust.proof_at(&self.trust.table.load(), &fact.id, now);
            let Some(evidence) = evidence(proof) else { continue };
            let hash = hash(fact, &evidence);
            match grants.is_due(&fact.id, hash, generation, now) {
                Due::No => {}
                how => due.push((how == Due::Again, grants.get(&fact.id), fact, evidence, hash)),
            }
        }
        // Those on which the policies failed before come last: what they cost is nobody else's. First come those whose grant is
        // about to end.
        due.sort_by_key(|(again, last, ..)| (*again, last.is_none(), last.as_ref().map(|last| last.until)));
        let (mut changed, mut failures) = (Vec::new(), 0);
        for (_, last, fact, evidence, hash) in due {
            // A grant begins when it is given, and not when the look did.
            let now = now + began.elapsed();
            let (is_other, has_failed) = self.judge(fact, last.as_ref(), evidence, (hash, generation), now);
            changed.extend(is_other.then(|| fact.id.clone()));
            failures += usize::from(has_failed);
            if failures >= FAILURES {
                break;
            }
        }
        let known: HashSet<&PeerId> = facts.iter().map(|fact| &fact.id).collect();
        grants.sweep(|peer| known.contains(peer), now);
        // After they were judged, so that nobody is without a grant meanwhile.
        let is_active = self.policy.enforces();
        grants.set_active(is_active);
        if is_active == was_active { Changed::Of(changed) } else { Changed::All }
    }

    /// Asks about one peer; tells whether its standing is another, and whether a policy failed.
    fn judge(
        &self,
        fact: &Fact,
        known: Option<&Entry>,
        evidence: Vec<Evidence>,
        (hash, generation): (u64, i64),
        now: Instant,
    ) -> (bool, bool) {
        let trust = &self.trust;
        let level = trust.level_at(&trust.table.load(), &fact.id, Action::Fetch, now);
        let request = request(fact, evidence, if known.is_some() { level } else { Level::None });
        let mut ruling = self.policy.evaluate(&request);
        for _ in 1..ATTEMPTS {
            if matches!(ruling.way, Way::Failed(Failure::Time)) {
                ruling = self.policy.evaluate(&request);
            }
        }
        let Ruling { way, by } = ruling;
        let said = |standing, time| Entry {
            standing,
            by,
            until: now + time,
            time,
            facts: hash,
            generation,
            failing: None,
        };
        let entry = match way {
            Way::BuiltIn => said(Standing::Admitted, TTL_LIMIT),
            Way::Allow(grant) => said(Standing::Granted(grant), grant.ttl),
            Way::Deny(time, reason) => said(Standing::Refused(reason), time),
            Way::Failed(failure) => failed(known, fact, said, failure.to_string(), now),
        };
        if let Standing::Refused(reason) = &entry.standing
            && known.map(|known| &known.standing) != Some(&entry.standing)
        {
            tracing::warn!(
                peer = %fact.id, node = %fact.node.name.escape_debug(), policy = entry.by.as_deref(),
                code = reason.code, message = reason.message, "a policy refuses a peer"
            );
        }
        let has_failed = entry.failing.is_some();
        (trust.grants.put(&fact.id, entry, now), has_failed)
    }
}

/// What stands where a policy does not answer: what was granted before, until it ends; for who has nothing, nothing.
fn failed(
    known: Option<&Entry>,
    fact: &Fact,
    said: impl FnOnce(Standing, Duration) -> Entry,
    failure: String,
    now: Instant,
) -> Entry {
    let was_failing = known.and_then(|known| known.failing.as_ref()).map(|(failure, _)| failure);
    if was_failing != Some(&failure) {
        tracing::warn!(peer = %fact.id, failure, "a policy does not judge a peer");
    }
    let last = known.filter(|last| last.until > now && last.standing != Standing::Unjudged);
    let failing = Some((failure, now + RETRY));
    let new = said(Standing::Unjudged, TTL_LIMIT);
    match last {
        Some(last) => {
            let Entry { until, time, .. } = *last;
            Entry { failing, standing: last.standing.clone(), until, time, ..new }
        }
        None => Entry { failing, ..new },
    }
}

fn request(fact: &Fact, evidence: Vec<Evidence>, level: Level) -> Request {
    Request {
        peer: fact.node.clone(),
        observed: fact.observed.clone(),
        announced: fact.announced.clone(),
        evidence,
        conduct: fact.conduct,
        level,
        now: SystemTime::now(),
    }
}

/// What was proved; `None`: nothing, or it is denied.
fn evidence(proof: Proof) -> Option<Vec<Evidence>> {
    match proof {
        Proof::None | Proof::Denied => None,
        Proof::Open => Some(Vec::new()),
        Proof::Listed => Some(vec![Evidence { method: Method::PeerIdList, claims: Vec::new() }]),
        Proof::Key(key) => {
            Some(vec![Evidence { method: Method::ClusterKey, claims: vec![(Claim::KeyId, key.to_string())] }])
        }
    }
}

/// Of all that makes the policies be asked again. Bytes that come are none of it.
fn hash(fact: &Fact, evidence: &[Evidence]) -> u64 {
    let mut hasher = DefaultHasher::new();
    let Node { id, name, name_provenance, version, labels } = &fact.node;
    let provenance = |from: &Provenance| *from as u8;
    (id, name, provenance(name_provenance), version).hash(&mut hasher);
    for label in labels {
        (&label.key, &label.value, provenance(&label.provenance)).hash(&mut hasher);
    }
    let Conduct { digest_mismatches, timeouts, protocol_errors, bytes: _, since_last_fault: _ } =
        fact.conduct;
    (&fact.observed, &fact.announced, evidence).hash(&mut hasher);
    (digest_mismatches, timeouts, protocol_errors).hash(&mut hasher);
    hasher.finish()
}
