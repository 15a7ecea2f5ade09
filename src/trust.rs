//! Facts about a peer -> how far it is trusted. Implements the [`Gate`](crate::oci::Gate) that `network` and
//! `transfer` call.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What may be sent to trusted peers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Globs over `registry/repository` that may be served to peers. Empty: all.
    pub allow: Vec<String>,
    /// Globs over `registry/repository` that may not, even if `allow` names them.
    pub deny: Vec<String>,
    /// Serve content of which this node does not know the repository.
    pub unowned: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { allow: Vec::new(), deny: Vec::new(), unowned: false }
    }
}
