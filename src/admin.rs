//! Health, metrics and status over HTTP, on loopback. Reads everything, changes nothing.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where health, metrics and status are served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses. All that are not loopback need `allow-wide`.
    pub listen: Vec<SocketAddr>,
    /// Allow addresses that are not loopback: whoever reaches them sees peers, addresses and the names of images.
    pub allow_wide: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: vec![([127, 0, 0, 1], 5003).into()], allow_wide: false }
    }
}
