//! Is a registry answering? An anonymous `GET /v2/` to the hosts that the runtime would ask next.

pub mod hosts;
pub mod memory;
pub mod probe;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::oci::Registry;

/// Tells whether registries answer.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// Whether a host that the runtime would ask after this node answers for `registry`: status below 500, not 429.
    /// From a cache of 10 s; takes at most 300 ms.
    async fn answers(&self, registry: &Registry) -> bool;
}

/// Where the runtime's registry hosts are configured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// containerd's `config_path`: folders with one `hosts.toml` per registry.
    pub hosts_dirs: Vec<PathBuf>,
    /// How long one answer of a registry is believed.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub cache: Duration,
    /// How long a registry may take to answer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub limit: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hosts_dirs: vec!["/etc/containerd/certs.d".into()],
            cache: Duration::from_secs(10),
            limit: Duration::from_millis(300),
        }
    }
}
