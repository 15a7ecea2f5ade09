//! What a change of the configuration means for a process that runs.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Config;

/// Keys, and sections by their first part with a dot, that are applied while the process runs.
const LIVE: [&str; 24] = [
    "network.peers",
    "network.cluster-key",
    "network.cluster",
    "network.deny",
    "network.dns",
    "trust.",
    "policies.",
    "election.backend",
    "election.nodes",
    "election.introducers",
    "election.labels",
    "election.lease.times",
    "mirror.private",
    "mirror.tags-peers-first",
    "mirror.verify",
    "mirror.segment",
    "mirror.stall",
    "mirror.busy-wait",
    "log.level",
    "registry.lists",
    "registry.manifest-deadline",
    "registry.blob-deadline",
    "upstream.",
    "upstreams",
];

/// Keys that differ between two configurations, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reload {
    /// Applied while the process runs.
    pub live: Vec<String>,
    /// Applied by a restart only.
    pub restart: Vec<String>,
}

/// Compares two configurations.
pub fn diff(old: &Config, new: &Config) -> Reload {
    let (old, new) = (sections(old), sections(new));
    let mut changed = BTreeSet::new();
    for (section, keys) in old.as_object().into_iter().flatten() {
        if !keys.is_object() && new[section] != *keys {
            changed.insert(section.clone());
        }
        for (key, value) in keys.as_object().into_iter().flatten() {
            if new[section][key] != *value {
                changed.insert(format!("{section}.{key}"));
            }
        }
    }
    // One part of it needs a restart.
    if changed.remove("election.lease") {
        let parts = ["name", "times"].into_iter();
        let differs = |part: &&str| old["election"]["lease"][part] != new["election"]["lease"][part];
        changed.extend(parts.filter(differs).map(|part| format!("election.lease.{part}")));
    }
    // The locks are chosen once.
    let is_locked = [&old, &new].iter().any(|config| config["election"]["backend"] == "configmap");
    let is_live = |key: &String| {
        !(is_locked && key == "election.backend")
            && LIVE.iter().any(|live| if live.ends_with('.') { key.starts_with(live) } else { key == live })
    };
    let (live, restart) = changed.into_iter().partition(is_live);
    Reload { live, restart }
}

/// The configuration as section -> key -> value, or a list in the place of the keys.
fn sections(config: &Config) -> Value {
    serde_json::to_value(config).expect("settings are texts, numbers, lists and tables with text keys")
}
