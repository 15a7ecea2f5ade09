//! What the policies said of each peer, and until when. Read for each request, written by the judge alone.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::oci::{Action, Level, PeerId, UploadLimits};
use crate::policy::Reason;
use crate::policy::trust::Grant;

/// Peers that are remembered: above the few thousand nodes of a cluster.
const GRANTS: usize = 16_384;
/// Peers that are shown in the status.
const SHOWN: usize = 16;
/// How often the judge is told of the same peer.
const MISSED: Duration = Duration::from_secs(1);
/// A grant is renewed so long before it ends, or when a quarter of its time is left: thousands may end at once.
const RENEWAL: Duration = Duration::from_millis(700);

/// The table of grants.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// Whether there are policies: without any, admission alone decides.
    active: AtomicBool,
    table: RwLock<HashMap<PeerId, Entry>>,
    /// Peers that were asked about and are not in the table, and when the judge was last told so.
    missed: Mutex<HashMap<PeerId, Instant>>,
    /// Tells the judge of them.
    pub(super) wake: Notify,
}

/// What the policies said of one peer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) standing: Standing,
    /// The policy that decided.
    pub(super) by: Option<Arc<str>>,
    pub(super) until: Instant,
    /// How long it stands in all.
    pub(super) time: Duration,
    /// Of the facts about which they were asked, and of the policies.
    pub(super) facts: u64,
    pub(super) generation: i64,
    /// Why they do not answer any more, and when they are asked again; the rest is what they said before.
    pub(super) failing: Option<(String, Instant)>,
}

/// Whether a peer is to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    No,
    Now,
    /// The policies did not answer about it, and may do now.
    Again,
}

/// How a peer stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Standing {
    /// As admission says: all abstain.
    Admitted,
    /// Not more than that.
    Granted(Grant),
    /// Refused.
    Refused(Reason),
    /// Not judged yet, or not any more, since they do not answer.
    Unjudged,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admitted => f.write_str("as admission says"),
            Self::Granted(grant) => write!(f, "{grant}"),
            Self::Refused(reason) => write!(f, "refused ({reason})"),
            Self::Unjudged => f.write_str("not judged"),
        }
    }
}

impl Grants {
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Puts the table in force, or out of it.
    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// There are no policies any more.
    pub(super) fn clear(&self) {
        self.set_active(false);
        self.table_mut().clear();
    }

    /// What `peer` gets for `action` of the level to which it was admitted. `is_member`: it can be judged; who has yet to prove
    /// itself cannot.
    pub(super) fn limit(
        &self,
        peer: &PeerId,
        action: Action,
        admitted: Level,
        is_member: bool,
        now: Instant,
    ) -> Level {
        if !self.is_active() {
            return admitted;
        }
        let table = self.table();
        let standing = table.get(peer).filter(|entry| entry.until > now).map(|entry| &entry.standing);
        match standing {
            Some(Standing::Admitted) => admitted,
            Some(Standing::Refused(_)) => Level::None,
            Some(Standing::Granted(grant)) if action != Action::Serve => admitted.min(grant.level),
            Some(Standing::Granted(grant)) if grant.serve => admitted.min(Level::Blobs),
            Some(Standing::Granted(grant)) => admitted.min(grant.level).min(Level::Introduce),
            Some(Standing::Unjudged) => admitted.min(Level::Introduce),
            // It may say who it is, which the policies are then asked about.
            None => {
                drop(table);
                if is_member {
                    self.miss(peer, now);
                }
                admitted.min(Level::Introduce)
            }
        }
    }

    /// Whether nothing was said of `peer` yet, or nothing is said any more.
    pub(super) fn is_unjudged(&self, peer: &PeerId, now: Instant) -> bool {
        let table = self.table();
        let entry = table.get(peer).filter(|entry| entry.until > now);
        self.is_active() && entry.is_none_or(|entry| entry.standing == Standing::Unjudged)
    }

    pub(super) fn upload_limits(&self, peer: &PeerId, now: Instant) -> UploadLimits {
        if !self.is_active() {
            return UploadLimits::default();
        }
        match self.table().get(peer).filter(|entry| entry.until > now).map(|entry| &entry.standing) {
            Some(Standing::Granted(grant)) => {
                UploadLimits { at_once: grant.max_uploads, per_second: grant.max_upload_rate }
            }
            _ => UploadLimits::default(),
        }
    }

    fn miss(&self, peer: &PeerId, now: Instant) {
        let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        if missed.get(peer).is_some_and(|at| now.saturating_duration_since(*at) < MISSED) {
            return;
        }
        // In an open network anybody makes up peers: what is forgotten costs the judge a look at most.
        if missed.len() >= GRANTS {
            missed.clear();
        }
        missed.insert(peer.clone(), now);
        self.wake.notify_one();
    }

    pub(super) fn get(&self, peer: &PeerId) -> Option<Entry> {
        self.table().get(peer).cloned()
    }

    /// Whether the policies are to be asked about `peer`: never so far, with other facts or policies, or soon no more.
    pub(super) fn is_due(&self, peer: &PeerId, facts: u64, generation: i64, now: Instant) -> Due {
        let table = self.table();
        let Some(entry) = table.get(peer) else { return Due::Now };
        if entry.generation != generation {
            return Due::Now;
        }
        if let Some((_, again)) = &entry.failing {
            return if *again <= now { Due::Again } else { Due::No };
        }
        let is_refused = matches!(entry.standing, Standing::Refused(_));
        let ends = if is_refused { now } else { now + RENEWAL.max(entry.time / 4) };
        if (entry.facts != facts && !is_refused) || entry.until <= ends { Due::Now } else { Due::No }
    }

    /// Notes what they say; tells whether it is something else than before.
    pub(super) fn put(&self, peer: &PeerId, entry: Entry, now: Instant) -> bool {
        let mut table = self.table_mut();
        if table.len() >= GRANTS && !table.contains_key(peer) {
            table.retain(|_, entry| entry.until > now);
            // Whoever is refused is so again when it comes back; a grant that goes costs an honest peer its trust.
            let rank = |entry: &Entry| (!matches!(entry.standing, Standing::Refused(_)), entry.until);
            let first = table.iter().min_by_key(|(_, entry)| rank(entry)).map(|(peer, _)| peer.clone());
            if let Some(first) = first.filter(|_| table.len() >= GRANTS) {
                table.remove(&first);
            }
        }
        let new = entry.standing.clone();
        let old = table.insert(peer.clone(), entry).filter(|entry| entry.until > now);
        let old = old.map(|entry| entry.standing);
        match (&old, &new) {
            (Some(Standing::Granted(old)), Standing::Granted(new)) => Grant { ttl: new.ttl, ..*old } != *new,
            _ => old.as_ref() != Some(&new),
        }
    }

    /// Forgets peers that are gone and whose time is over.
    pub(super) fn sweep(&self, is_known: impl Fn(&PeerId) -> bool, now: Instant) {
        self.table_mut().retain(|peer, entry| entry.until > now || is_known(peer));
    }

    pub(super) fn problems(&self, now: Instant) -> Vec<String> {
        if !self.is_active() {
            return Vec::new();
        }
        let table = self.table();
        let by = |entry: &Entry| entry.by.as_deref().unwrap_or_default().to_owned();
        let mut problems: Vec<String> = table
            .iter()
            .filter(|(_, entry)| entry.until > now || entry.failing.is_some())
            .filter_map(|(peer, entry)| match (&entry.standing, &entry.failing) {
                (_, Some((failure, _))) => {
                    Some(format!("trust: the policy `{}` does not judge peer {peer}: {failure}", by(entry)))
                }
                (Standing::Refused(reason), None) => Some(format!(
                    "trust: the policy `{}` refuses peer {peer} ({}): {}",
                    by(entry),
                    reason.code,
                    reason.message
                )),
                _ => None,
            })
            .collect();
        problems.sort_unstable();
        let more = problems.len().saturating_sub(SHOWN);
        problems.truncate(SHOWN);
        if more > 0 {
            problems.push(format!("trust: and {more} more peers"));
        }
        problems
    }

    fn table(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Entry>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Entry>> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}
