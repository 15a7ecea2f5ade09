//! The OCI distribution API for this node's own runtime: translates HTTP to `mirror` and back.
//!
//! To the runtime every "cannot serve" is 404, so that it goes to its next host; never 401, 405, 408, 429 or 5xx.

use std::net::SocketAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where and how the runtime is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Addresses that the runtime asks. Loopback stops pods without host networking; all others need `allow-wide`.
    pub listen: Vec<SocketAddr>,
    /// Allow addresses that are not loopback: whoever reaches them reads every image that this node and its peers hold.
    pub allow_wide: bool,
    /// The registry of a request that names none (neither `ns` nor a host in its path).
    pub default_registry: String,
    /// Tag lists and referrers: `upstream` answers 404 so that the runtime asks upstream, `held` lists what is held
    /// here, for registries that cannot be reached.
    pub lists: Lists,
    /// A manifest request without a header after this time is answered 404: 10ms to 1m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub manifest_deadline: Duration,
    /// A blob request without a header after this time is answered 404: 10ms to 1m.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub blob_deadline: Duration,
}

/// How lists are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Lists {
    /// 404: upstream has the whole list.
    Upstream,
    /// What is held here.
    Held,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![([127, 0, 0, 1], 5000).into(), (std::net::Ipv6Addr::LOCALHOST, 5000).into()],
            allow_wide: false,
            default_registry: "docker.io".into(),
            lists: Lists::Upstream,
            manifest_deadline: Duration::from_secs(1),
            blob_deadline: Duration::from_secs(3),
        }
    }
}
