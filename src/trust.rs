//! Facts about a peer -> how far it is trusted. Implements the [`Gate`] that `network` and `transfer` call.
//!
//! The rule here: peers that the configuration names are trusted for tags, all others for nothing. Which repositories
//! may be sent to them is decided by patterns; `deny` wins. Answers are reads of a table that is replaced whole.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use arc_swap::ArcSwap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::oci::{Action, Gate, Level, Name, PatternError, Patterns, PeerId};

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

/// The gate of configured peers.
#[derive(Debug)]
pub struct PinnedTrust {
    table: ArcSwap<Table>,
}

#[derive(Debug)]
struct Table {
    config: Config,
    peers: BTreeSet<PeerId>,
    allow: Patterns,
    deny: Patterns,
}

impl PinnedTrust {
    /// Trusts `peers` for tags and nobody else.
    pub fn new(config: Config, peers: impl IntoIterator<Item = PeerId>) -> Result<Self, PatternError> {
        Ok(Self { table: ArcSwap::from_pointee(Table::new(config, peers)?) })
    }

    /// Puts a new configuration in force at once, or none of it; tells whether anything changed.
    pub fn replace(
        &self,
        config: Config,
        peers: impl IntoIterator<Item = PeerId>,
    ) -> Result<bool, PatternError> {
        let table = Table::new(config, peers)?;
        let old = self.table.load();
        if old.config == table.config && old.peers == table.peers {
            return Ok(false);
        }
        self.table.store(table.into());
        Ok(true)
    }

    /// Whether content of which this node does not know the repository may be sent to trusted peers.
    pub fn unowned(&self) -> bool {
        self.table.load().config.unowned
    }
}

impl Gate for PinnedTrust {
    fn level(&self, peer: &PeerId, _action: Action) -> Level {
        if self.table.load().peers.contains(peer) { Level::Tags } else { Level::None }
    }

    fn serves(&self, peer: &PeerId, repository: &Name) -> bool {
        let table = self.table.load();
        table.peers.contains(peer)
            && !table.deny.matches(repository)
            && (table.config.allow.is_empty() || table.allow.matches(repository))
    }

    fn serves_portless(&self, peer: &PeerId, repository: &Name) -> bool {
        self.serves(peer, repository) && !self.table.load().deny.matches_any_port(repository)
    }
}

impl Table {
    fn new(config: Config, peers: impl IntoIterator<Item = PeerId>) -> Result<Self, PatternError> {
        let (allow, deny) = (Patterns::new(&config.allow)?, Patterns::new(&config.deny)?);
        Ok(Self { config, peers: peers.into_iter().collect(), allow, deny })
    }
}
