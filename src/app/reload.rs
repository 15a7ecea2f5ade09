//! Applies a changed configuration to what runs; says what needs a restart. What cannot be applied changes nothing.

use super::App;
use crate::config::{Config, Error, diff};

impl App {
    /// Takes over what can be changed live.
    pub(super) fn reload(&mut self, change: Result<Config, Error>) {
        let config = match change {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, "the changed configuration cannot be used; the last good one stays");
                return self.problems.set_configuration(Some(format!("configuration: {error}")));
            }
        };
        let changes = diff(&self.config, &config);
        if let Err(error) = self.apply(&config) {
            tracing::error!(%error, "the changed configuration cannot be applied");
            return self.problems.set_configuration(Some(format!("configuration: {error}")));
        }
        if !changes.live.is_empty() {
            tracing::info!(keys = ?changes.live, "configuration applied");
        }
        let problem = (!changes.restart.is_empty()).then(|| {
            tracing::warn!(keys = ?changes.restart, "these changes need a restart");
            format!("configuration: a restart is needed for {}", changes.restart.join(", "))
        });
        self.problems.set_configuration(problem);
        // What needs a restart keeps its old value, so that the next change is compared with what is in force.
        let old = std::mem::replace(&mut self.config, config);
        self.config.node = old.node;
        self.config.store = old.store;
        self.config.transfer = old.transfer;
        self.config.admin = old.admin;
        self.config.registry.listen = old.registry.listen;
        self.config.registry.allow_wide = old.registry.allow_wide;
        self.config.registry.default_registry = old.registry.default_registry;
        self.config.network.listen = old.network.listen;
        self.config.network.advertise = old.network.advertise;
        self.config.mirror.prefetch_budget = old.mirror.prefetch_budget;
        self.config.log.format = old.log.format;
    }

    fn apply(&self, config: &Config) -> anyhow::Result<()> {
        let mut registry = config.registry.clone();
        registry.default_registry.clone_from(&self.config.registry.default_registry);
        self.registry.apply(&registry)?;
        self.settings.replace(&config.mirror, config.trust.unowned)?;
        self.log.apply(&config.log)?;
        self.prober.reconfigure(config.upstream.clone());
        let peers = config.network.peers.iter().map(|peer| peer.id.clone());
        let trust = self.gate.replace(config.trust.clone(), peers)?;
        let network = &self.config.network;
        if network.peers != config.network.peers || network.dns != config.network.dns {
            self.network.set_peers(config.network.peers.clone(), config.network.dns.clone());
        }
        if trust {
            self.network.recheck();
            self.uploads.recheck();
        }
        Ok(())
    }
}
