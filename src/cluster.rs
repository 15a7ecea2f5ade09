//! Everything that talks to the Kubernetes API: where it is, by whose rights, and the objects that Peili keeps there.
//!
//! Nothing waits for it, and nothing of it ends the process: each call has a limit of time and of bytes, and comes to an answer or to a
//! [`Fault`] by name. It decides nothing: who leads is the election's.

mod account;
mod api;
mod classify;
mod configmap;
mod coordinator;
mod daemonset;
mod effects;
mod events;
mod examine;
mod lease;
mod node;
mod object;
mod reach;
mod summary;

use std::net::IpAddr;
use std::path::PathBuf;

use http::Uri;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::election::strict::{Cause, Fault};
pub use account::{Account, account};
pub use api::{Api, Response};
pub use coordinator::{Coordinator, Fleet, Node};
pub use daemonset::{Rollout, rollout};
pub use examine::{Examiner, Refusal, Review, Right, Write};
pub use node::node_label;
pub use object::{Kind, ObjectLock};
pub use reach::{Handshake, Obstacle, Reach, reach};
pub use summary::name as summary_name;

/// Where Talos answers for the API server on each node (KubePrism), for whoever is in the node's network.
const KUBEPRISM: &str = "https://127.0.0.1:7445";
/// Endpoints that may be named.
pub const ENDPOINTS: usize = 16;

/// The Kubernetes API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Address and port of the API server's Service. Empty: `$KUBERNETES_SERVICE_HOST` and `$KUBERNETES_SERVICE_PORT`; without these
    /// and without endpoints this node is in no Kubernetes cluster.
    pub service: String,
    /// API servers that are asked before the Service, by address: `https://10.0.0.2:6443`. At most 16. After them and the Service comes
    /// `https://127.0.0.1:7445`, where Talos has one.
    pub endpoints: Vec<String>,
    /// Folder with `token`, `ca.crt` and `namespace`, as a service account's token is mounted.
    pub credentials: PathBuf,
    /// Namespace of Peili's objects. Empty: as the credentials say.
    pub namespace: String,
    /// Ask for the zone of this node where neither `node.zone` nor the pod's labels say it: once, by `node.name`. Needs the right to `get`
    /// that Node.
    pub read_node: bool,
}

/// What names an address of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `kubernetes.endpoints`.
    Endpoint,
    /// The Service: `kubernetes.service`, or the environment.
    Service,
    /// Nobody: it is where Talos has one.
    KubePrism,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            service: String::new(),
            endpoints: Vec::new(),
            credentials: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
            namespace: String::new(),
            read_node: false,
        }
    }
}

impl Config {
    /// Whether there is a Kubernetes API to be asked, as far as the configuration and the environment say.
    pub fn is_in_cluster(&self) -> bool {
        !self.service.is_empty() || !self.endpoints.is_empty()
    }

    /// All addresses, in the order in which they are asked, each with what names it. Those that are none are left out: the check of the
    /// configuration has said so.
    pub(crate) fn places(&self) -> Vec<(Origin, Uri)> {
        let endpoints = self.endpoints.iter().map(|address| (Origin::Endpoint, address.clone()));
        let service =
            (!self.service.is_empty()).then(|| (Origin::Service, format!("https://{}", self.service)));
        let named = endpoints.chain(service);
        let mut all: Vec<_> =
            named.filter_map(|(origin, address)| Some((origin, endpoint(&address)?))).collect();
        // Where the configuration names it, it is asked in that place.
        if let Some(address) = endpoint(KUBEPRISM)
            && !all.iter().any(|(_, named)| named.authority() == address.authority())
        {
            all.push((Origin::KubePrism, address));
        }
        all
    }
}

/// The address of an API server: `https`, a host, perhaps a port and a path, and nothing else.
pub fn endpoint(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let authority = uri.authority()?;
    let is_plain = uri.query().is_none() && !authority.as_str().contains('@') && !authority.host().is_empty();
    (uri.scheme_str() == Some("https") && is_plain).then_some(uri)
}

/// Host and port as an address: IPv6 ones in brackets.
pub fn service(host: &str, port: &str) -> String {
    match host.parse() {
        Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
        _ => format!("{host}:{port}"),
    }
}

/// Whether a text can be the name of an object or a namespace (RFC 1123), so that it can stand in a path.
pub fn is_name(text: &str) -> bool {
    let is_outer = |char: char| char.is_ascii_lowercase() || char.is_ascii_digit();
    let is_label = |label: &str| {
        label.chars().all(|char| is_outer(char) || char == '-')
            && label.starts_with(is_outer)
            && label.ends_with(is_outer)
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_asked_in_their_order() {
        let config = Config {
            service: service("fd00::1", "443"),
            endpoints: vec!["https://10.0.0.2:6443".into()],
            ..Config::default()
        };
        let all = |config: &Config| -> Vec<String> {
            config.places().iter().map(|(_, address)| address.to_string()).collect()
        };
        assert_eq!(
            all(&config),
            ["https://10.0.0.2:6443/", "https://[fd00::1]:443/", "https://127.0.0.1:7445/"]
        );
        let named = Config { service: "127.0.0.1:7445".into(), ..config.clone() };
        assert_eq!(all(&named), ["https://10.0.0.2:6443/", "https://127.0.0.1:7445/"], "once");
        assert!(config.is_in_cluster() && !Config::default().is_in_cluster());
        for text in ["http://a", "https://", "a", "https://a?b", "https://u:p@a", ""] {
            assert!(endpoint(text).is_none(), "{text}");
        }
    }

    #[test]
    fn names_can_stand_in_a_path() {
        for name in ["peili", "kube-system", "a.b", "1"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a/b", "a?b", "..", "a..b", "a.-b", "ä", &"a".repeat(254)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
