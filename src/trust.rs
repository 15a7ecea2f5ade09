//! Facts about a peer -> how far it is trusted. Implements the [`Gate`] that `network` and `transfer` call.
//!
//! The rule here: peers that the configuration lists, and those that proved to be members by a cluster key until their
//! certificate ends, are trusted for tags. Of the others, where there is a key, each may connect to prove itself; where
//! there is neither a key nor a list, the network is open and all are trusted for blobs; else for nothing. Who is denied
//! gets nothing, whatever else holds. Which repositories may be sent to them is decided by patterns; `deny` wins there too.
//! Where there are trust policies, what they grant is the most that a peer gets, and admission the most that they can grant;
//! [`Judge`] asks them. Answers are reads of tables.

mod grants;
mod judge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use self::grants::Grants;
use crate::oci::{
    Action, Gate, KeyId, Level, Members, Name, PatternError, Patterns, PeerId, Proof, UploadLimits,
};

pub use judge::{Changed, Explained, Fact, Facts, Judge};

/// Members by key that are kept: above the few thousand nodes of a cluster, and about 3 MiB.
const MEMBERS: usize = 16_384;

/// What may be sent to trusted peers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Globs over `registry/repository` that may be served to peers. Empty: all.
    pub allow: Vec<String>,
    /// Globs over `registry/repository` that may not, even if `allow` names them.
    pub deny: Vec<String>,
    /// Serve content of which this node does not know the repository.
    pub unowned: bool,
}

/// Who is configured to be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// By name.
    pub listed: BTreeSet<PeerId>,
    /// Never, by name.
    pub denied: BTreeSet<PeerId>,
    /// Whether there is a cluster key, by which others prove themselves.
    pub by_key: bool,
}

/// The gate of listed peers and of members by key.
#[derive(Debug)]
pub struct PinnedTrust {
    table: ArcSwap<Table>,
    members: RwLock<HashMap<PeerId, Member>>,
    grants: Grants,
}

#[derive(Debug)]
struct Table {
    config: Config,
    peers: Peers,
    allow: Patterns,
    deny: Patterns,
}

/// Who proved itself by a certificate.
#[derive(Clone, Copy, Debug)]
struct Member {
    key: KeyId,
    until: Instant,
}

impl<T: IntoIterator<Item = PeerId>> From<T> for Peers {
    /// These by name, and nobody else.
    fn from(listed: T) -> Self {
        Self { listed: listed.into_iter().collect(), ..Self::default() }
    }
}

impl PinnedTrust {
    /// Trusts `peers`.
    pub fn new(config: Config, peers: impl Into<Peers>) -> Result<Self, PatternError> {
        let table = ArcSwap::from_pointee(Table::new(config, peers.into())?);
        Ok(Self { table, members: RwLock::default(), grants: Grants::default() })
    }

    /// Puts a new configuration in force at once, or none of it; tells whether anything changed. Who was admitted by a key
    /// stays so as long as there is one.
    pub fn replace(&self, config: Config, peers: impl Into<Peers>) -> Result<bool, PatternError> {
        let table = Table::new(config, peers.into())?;
        let old = self.table.load();
        if old.config == table.config && old.peers == table.peers {
            return Ok(false);
        }
        self.table.store(table.into());
        Ok(true)
    }

    /// Whether a [`Judge`] decides about each peer before it gets anything; one that was made decides that by itself.
    pub fn judge_first(&self, is_judged: bool) {
        self.grants.set_active(is_judged);
    }

    /// Whom the policies refuse or cannot judge, and why; for people.
    pub fn problems(&self) -> Vec<String> {
        self.grants.problems(Instant::now())
    }

    /// Whether content of which this node does not know the repository may be sent to trusted peers.
    pub fn unowned(&self) -> bool {
        self.table.load().config.unowned
    }
}

impl PinnedTrust {
    fn proof_at(&self, table: &Table, peer: &PeerId, now: Instant) -> Proof {
        let peers = &table.peers;
        if peers.denied.contains(peer) {
            return Proof::Denied;
        }
        if peers.listed.contains(peer) {
            return Proof::Listed;
        }
        if !peers.by_key {
            return if peers.listed.is_empty() { Proof::Open } else { Proof::None };
        }
        match self.members().get(peer) {
            Some(member) if member.until > now => Proof::Key(member.key),
            _ => Proof::None,
        }
    }

    fn level_at(&self, table: &Table, peer: &PeerId, action: Action, now: Instant) -> Level {
        let proof = self.proof_at(table, peer, now);
        let admitted = match proof {
            Proof::Denied => Level::None,
            Proof::Listed | Proof::Key(_) => Level::Tags,
            Proof::Open => Level::Blobs,
            Proof::None if table.peers.by_key && action == Action::Connect => Level::Introduce,
            Proof::None => Level::None,
        };
        if admitted == Level::None {
            return admitted;
        }
        self.grants.limit(peer, action, admitted, proof != Proof::None, now)
    }

    fn admit_at(&self, peer: &PeerId, key: KeyId, time: Duration, now: Instant) -> bool {
        if self.table.load().peers.denied.contains(peer) {
            return false;
        }
        let member = Member { key, until: now + time };
        let mut members = self.members_mut();
        // What it showed before may come late, on another connection. Certificates end at whole seconds.
        if members.get(peer).is_some_and(|known| known.until > member.until + Duration::from_secs(1)) {
            return true;
        }
        if members.len() >= MEMBERS && !members.contains_key(peer) {
            members.retain(|_, member| member.until > now);
            let first = members.iter().min_by_key(|(_, member)| member.until).map(|(peer, _)| peer.clone());
            if let Some(first) = first.filter(|_| members.len() >= MEMBERS) {
                members.remove(&first);
            }
        }
        members.insert(peer.clone(), member);
        true
    }

    fn sweep_at(&self, keys: &[KeyId], now: Instant) -> bool {
        let mut members = self.members_mut();
        let before = members.len();
        members.retain(|_, member| member.until > now && keys.contains(&member.key));
        members.len() < before
    }

    fn members(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Member>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn members_mut(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Member>> {
        self.members.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate for PinnedTrust {
    fn level(&self, peer: &PeerId, action: Action) -> Level {
        self.level_at(&self.table.load(), peer, action, Instant::now())
    }

    fn serves(&self, peer: &PeerId, repository: &Name) -> bool {
        let table = self.table.load();
        self.level_at(&table, peer, Action::Serve, Instant::now()) >= Level::Blobs
            && !table.deny.matches(repository)
            && (table.config.allow.is_empty() || table.allow.matches(repository))
    }

    fn serves_portless(&self, peer: &PeerId, repository: &Name) -> bool {
        self.serves(peer, repository) && !self.table.load().deny.matches_any_port(repository)
    }

    fn upload_limits(&self, peer: &PeerId) -> UploadLimits {
        self.grants.upload_limits(peer, Instant::now())
    }

    fn is_unjudged(&self, peer: &PeerId) -> bool {
        let now = Instant::now();
        let proof = self.proof_at(&self.table.load(), peer, now);
        !matches!(proof, Proof::None | Proof::Denied) && self.grants.is_unjudged(peer, now)
    }

    fn proof(&self, peer: &PeerId) -> Proof {
        self.proof_at(&self.table.load(), peer, Instant::now())
    }
}

impl Members for PinnedTrust {
    fn admit(&self, peer: &PeerId, key: KeyId, time: Duration) -> bool {
        self.admit_at(peer, key, time, Instant::now())
    }

    fn sweep(&self, keys: &[KeyId]) -> bool {
        self.sweep_at(keys, Instant::now())
    }
}

impl Table {
    fn new(config: Config, peers: Peers) -> Result<Self, PatternError> {
        let (allow, deny) = (Patterns::new(&config.allow)?, Patterns::new(&config.deny)?);
        Ok(Self { config, peers, allow, deny })
    }
}
