//! Say here what the policy decides. As it begins: peers whose name a glob of `deny` matches are refused.
//!
//! It is asked about each peer: when it is met, when what is known of it changes, and when its grant is about to end. All that it
//! may know is in the request; its verdict must depend on that and on the settings alone.

use std::time::Duration;

use peili_policy::trust::{Policy, Request, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError};
use serde::Deserialize;

/// How long who is denied stays refused before it is asked about again.
const REFUSED: Duration = Duration::from_secs(60);

/// What the operator may say in the configuration, under `settings`. An unknown key is an error that names it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Globs over names of nodes: `gpu-*`.
    pub deny: Vec<String>,
    /// Whether a name counts that is only the peer's own word.
    pub claimed: bool,
}

/// The policy, made of its settings.
#[derive(Debug)]
pub struct MyPolicy {
    deny: Globs,
    claimed: bool,
}

impl Policy for MyPolicy {
    type Settings = Settings;

    /// Once for each instance: what is costly belongs here. What is wrong is told with its place in the settings.
    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let wrong =
            |GlobError { index, message }| vec![SettingError { pointer: format!("/deny/{index}"), message }];
        Ok(Self { deny: Globs::new(&settings.deny).map_err(wrong)?, claimed: settings.claimed })
    }

    /// One line for `peili status`.
    fn summary(&self) -> String {
        format!("denies {} globs of names", self.deny.len())
    }

    /// Without an opinion, abstain: others decide, at last admission. `Verdict::allow` with a `Grant` sets limits; it never gives
    /// more than admission does.
    fn evaluate(&mut self, request: &Request) -> Verdict {
        let name = request.peer.trusted_name(self.claimed);
        if name.is_some_and(|name| self.deny.matches(name)) {
            return Verdict::deny(REFUSED, "denied", "its name is on the list");
        }
        Verdict::abstain()
    }
}

peili_policy::export_trust_policy!(MyPolicy);

#[cfg(test)]
mod tests {
    use peili_policy::trust::{Conduct, Decision};
    use peili_policy::{Provenance, TrustLevel};

    use super::*;

    fn request(name: &str) -> Request {
        Request {
            peer: Node {
                id: "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".into(),
                name: name.into(),
                name_provenance: Provenance::Claimed,
                version: "0.1.0".into(),
                labels: vec![],
            },
            observed_addresses: vec![],
            announced_addresses: vec![],
            evidence: vec![],
            conduct: Conduct {
                bytes_verified: 0,
                digest_mismatches: 0,
                timeouts: 0,
                protocol_errors: 0,
                since_last_fault: None,
            },
            policy_hash: None,
            level: TrustLevel::None,
            now: 0,
            attributes: vec![],
        }
    }

    #[test]
    fn whose_name_is_on_the_list_is_denied() {
        let settings = serde_json::from_str(r#"{"deny": ["gpu-*"], "claimed": true}"#).unwrap();
        let mut policy = MyPolicy::new(settings, None).unwrap();
        assert_eq!(policy.evaluate(&request("gpu-1")).decision, Decision::Deny(60_000));
        assert_eq!(policy.evaluate(&request("cpu-1")), Verdict::abstain());
    }

    #[test]
    fn a_name_that_nobody_checked_counts_only_where_claims_do() {
        let settings = Settings { deny: vec!["**".into()], claimed: false };
        assert_eq!(MyPolicy::new(settings, None).unwrap().evaluate(&request("gpu-1")), Verdict::abstain());
    }
}
