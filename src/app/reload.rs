//! Applies a changed configuration to what runs; says what needs a restart. What cannot be applied changes nothing.

use std::sync::atomic::Ordering;

use super::{App, electing, peers, warn_if_open};
use crate::config::{Config, Error, diff};
use crate::election::{self, Backend};
use crate::network::admission::Mode;
use crate::{mirror, network, registry, telemetry};

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
        self.config = in_force(&self.config, config);
    }

    fn apply(&self, config: &Config) -> anyhow::Result<()> {
        let mut registry = config.registry.clone();
        registry.default_registry.clone_from(&self.config.registry.default_registry);
        self.registry.apply(&registry)?;
        self.settings.replace(&config.mirror, config.trust.unowned)?;
        self.upstreams.reconfigure(&config.upstreams);
        if self.config.policies == config.policies {
            self.policies.again();
        } else {
            // It compiles: nothing here waits for that, a signal least of all. What cannot be loaded leaves the last good ones, and
            // the policies say so themselves.
            self.policies.want(&config.policies);
        }
        self.election.reconfigure(&elections_in_force(&self.config.election, config.election.clone()));
        self.looks.store(electing::looks(&config.network), Ordering::Relaxed);
        self.log.apply(&config.log)?;
        self.prober.reconfigure(config.upstream.clone());
        let trust = self.gate.replace(config.trust.clone(), peers(&config.network))?;
        let admission = self.admission.reconfigure(&config.network);
        let network = &self.config.network;
        if network.admission() != Mode::Open {
            warn_if_open(&config.network);
        }
        if network.peers != config.network.peers || network.dns != config.network.dns {
            self.network.set_peers(config.network.peers.clone(), config.network.dns.clone());
        }
        if trust || admission {
            self.network.recheck();
            self.uploads.recheck();
        }
        Ok(())
    }
}

/// `new` with the old values of what needs a restart, so that the next change is compared with what is in force.
fn in_force(old: &Config, new: Config) -> Config {
    let old = old.clone();
    Config {
        node: old.node,
        store: old.store,
        transfer: old.transfer,
        admin: old.admin,
        registry: registry::Config {
            listen: old.registry.listen,
            clients: old.registry.clients,
            default_registry: old.registry.default_registry,
            ..new.registry
        },
        network: network::Config {
            listen: old.network.listen,
            advertise: old.network.advertise,
            ..new.network
        },
        mirror: mirror::Config { prefetch_budget: old.mirror.prefetch_budget, ..new.mirror },
        log: telemetry::Config { format: old.log.format, ..new.log },
        upstream: new.upstream,
        upstreams: new.upstreams,
        policies: new.policies,
        election: elections_in_force(&old.election, new.election),
        kubernetes: old.kubernetes,
        trust: new.trust,
    }
}

/// The same for elections: their locks are chosen once.
fn elections_in_force(old: &election::Config, new: election::Config) -> election::Config {
    let is_other_lock = (old.backend == Backend::ConfigMap) != (new.backend == Backend::ConfigMap);
    election::Config {
        backend: if is_other_lock { old.backend } else { new.backend },
        lease: election::LeaseConfig { name: old.lease.name.clone(), ..new.lease },
        configmap: old.configmap.clone(),
        ..new
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::Inputs;

    /// Every key with another value than its default.
    const OTHER: &str = "
node: {name: a, zone: z, pod-labels: /x, data-dir: /x, drain: 1s, identity-recovery: true}
store: {source: layout:/x, socket: /x, namespaces: [a], content-root: /x}
registry:
  {listen: ['0.0.0.0:1'], clients: all, default-registry: r.test, lists: held, manifest-deadline: 2s,
  blob-deadline: 2s}
mirror:
  {private: [a/b], tags-peers-first: [a/b], verify: false, segment: 1MiB, prefetch-budget: 64MiB, stall: 3s,
  busy-wait: 3s}
network:
  {listen: ['0.0.0.0:2'], advertise: ['10.0.0.1:1'], dns: ['a:1'],
  peers: [{id: 12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp}], cluster-key: [/x], cluster: x,
  deny: [12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD]}
transfer: {listen: ['0.0.0.0:3'], uploads: 3, uploads-per-peer: 3, queue: 3, upload-rate: 3MiB}
upstream: {hosts-dirs: [/x], cache: 20s, limit: 1s}
upstreams: [{name: a, address: 'https://a.test', repositories: [/]}]
trust: {allow: [a/b], deny: [a/b], unowned: true}
policies:
  {registry: [{name: a, path: /x/a}], trust: [{name: a, path: /x/a}], election: [{name: a, path: /x/a}],
  startup: require, roots: [/x], max-change: 5, accept: 0123456789abcdef, decisions: {path: /x/a}}
election:
  {backend: static, nodes: [a], introducers: 2, labels: {a: b}, lease: {name: b, times: compat},
  configmap: {name: c, hold: both}}
kubernetes: {service: 'a:1', endpoints: ['https://a.test'], credentials: /x, namespace: a, read-node: true}
admin: {listen: ['0.0.0.0:4'], clients: all}
log: {level: debug, format: json}
";

    /// What the status says of a change, and what is done with it, are one.
    #[test]
    fn what_is_said_to_need_a_restart_is_what_is_kept() {
        let old = Config::default();
        let new = Inputs::default().parse(Some(OTHER)).unwrap().config;
        let said = diff(&old, &new);
        let sections = serde_json::to_value(&old).unwrap();
        let mut all: BTreeSet<String> = sections
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(section, keys)| match keys.as_object() {
                Some(keys) => keys.keys().map(|key| format!("{section}.{key}")).collect(),
                None => vec![section.clone()],
            })
            .collect();
        assert!(all.remove("election.lease"), "which has parts of both kinds");
        all.extend(["election.lease.name".to_owned(), "election.lease.times".to_owned()]);
        let changed: BTreeSet<String> = said.live.iter().chain(&said.restart).cloned().collect();
        assert_eq!(changed, all, "every key has another value in this test");

        let in_force = in_force(&old, new.clone());
        let (done, left) = (diff(&old, &in_force), diff(&in_force, &new));
        assert_eq!((done.live, done.restart), (said.live, vec![]));
        assert_eq!((left.live, left.restart), (vec![], said.restart));
    }

    #[test]
    fn another_lock_needs_a_restart() {
        let with = |backend| Config {
            election: election::Config { backend, ..Default::default() },
            ..Config::default()
        };
        for (old, new) in [(Backend::Auto, Backend::ConfigMap), (Backend::ConfigMap, Backend::Off)] {
            let (old, new) = (with(old), with(new));
            assert_eq!(diff(&old, &new).restart, ["election.backend"]);
            assert_eq!(in_force(&old, new).election.backend, old.election.backend);
        }
    }
}
