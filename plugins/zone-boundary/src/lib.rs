//! What may cross zones: what is believed of peers in other zones, whether content goes to them, and how fast.
//!
//! Peers of this node's own zone, and all peers where that is not known, are left to the others. A peer's zone is its own
//! word, and counts only where `claimed` says so; one whose zone does not count is in another zone.

use peili_policy::trust::{Grant, MIN_RATE, Policy, Request, Verdict};
use peili_policy::{Node, SettingError, TrustLevel};
use serde::Deserialize;

/// The label of a zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What the operator says.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The label whose values are the zones.
    pub label: String,
    /// Whether a zone counts that is the peer's own word.
    pub claimed: bool,
    /// What is believed of peers in other zones.
    pub fetch: Level,
    /// Whether content goes to peers in other zones.
    pub serve: bool,
    /// Bytes a second that go to one of them.
    pub max_upload_rate: Option<u64>,
}

/// The levels of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Nothing is fetched.
    Introduce,
    /// Content that is bound to a digest.
    Blobs,
    /// Tags too.
    Tags,
}

impl Default for Settings {
    fn default() -> Self {
        Self { label: ZONE.into(), claimed: false, fetch: Level::Blobs, serve: true, max_upload_rate: None }
    }
}

/// The policy.
#[derive(Debug)]
pub struct ZoneBoundary {
    settings: Settings,
    zone: Option<String>,
}

impl Policy for ZoneBoundary {
    type Settings = Settings;

    fn new(settings: Settings, here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        if settings.max_upload_rate.is_some_and(|rate| rate < MIN_RATE) {
            return Err(vec![SettingError {
                pointer: "/max-upload-rate".into(),
                message: format!("must be at least {MIN_RATE}; `serve: false` sends nothing"),
            }]);
        }
        let zone = here.and_then(|here| here.trusted_label(&settings.label, true).map(str::to_owned));
        Ok(Self { settings, zone })
    }

    fn summary(&self) -> String {
        let serves = if self.settings.serve { "is served" } else { "is not served" };
        match &self.zone {
            Some(zone) => {
                format!("outside of zone {zone}: up to {:?}, {serves}", self.settings.fetch).to_lowercase()
            }
            None => "this node's zone is not known: leaves all to the others".into(),
        }
    }

    fn evaluate(&mut self, request: &Request) -> Verdict {
        let Some(zone) = &self.zone else { return Verdict::abstain() };
        let Settings { label, claimed, fetch, serve, max_upload_rate } = &self.settings;
        if request.peer.trusted_label(label, *claimed) == Some(zone) {
            return Verdict::abstain();
        }
        let level = match fetch {
            Level::Introduce => TrustLevel::Introduce,
            Level::Blobs => TrustLevel::Blobs,
            Level::Tags => TrustLevel::Tags,
        };
        Verdict::allow(Grant { serve: *serve, max_upload_rate: *max_upload_rate, ..Grant::all(level) })
    }
}

peili_policy::export_trust_policy!(ZoneBoundary);

#[cfg(test)]
mod tests {
    use peili_policy::trust::{Conduct, Decision};
    use peili_policy::{Label, Provenance};

    use super::*;

    fn node(zone: Option<&str>, provenance: Provenance) -> Node {
        let label = |value: &str| Label { key: ZONE.into(), value: value.into(), provenance };
        Node {
            id: "12D3KooWPeer".into(),
            name: String::new(),
            name_provenance: Provenance::Claimed,
            version: String::new(),
            labels: zone.map(label).into_iter().collect(),
        }
    }

    fn evaluate(settings: &str, here: Option<&str>, zone: Option<&str>) -> Decision {
        let here = Some(node(here, Provenance::Configured));
        let mut policy = ZoneBoundary::new(serde_json::from_str(settings).unwrap(), here).unwrap();
        let conduct = Conduct {
            bytes_verified: 0,
            digest_mismatches: 0,
            timeouts: 0,
            protocol_errors: 0,
            since_last_fault: None,
        };
        let request = Request {
            peer: node(zone, Provenance::Claimed),
            observed_addresses: vec![],
            announced_addresses: vec![],
            evidence: vec![],
            conduct,
            policy_hash: None,
            level: TrustLevel::None,
            now: 0,
            attributes: vec![],
        };
        policy.evaluate(&request).decision
    }

    #[test]
    fn the_own_zone_is_left_to_others_and_the_rest_limited() {
        let settings =
            r#"{"claimed": true, "fetch": "introduce", "serve": false, "max-upload-rate": 700000}"#;
        assert_eq!(evaluate(settings, Some("a"), Some("a")), Decision::Abstain);
        for other in [Some("b"), None] {
            let Decision::Allow(grant) = evaluate(settings, Some("a"), other) else { panic!("{other:?}") };
            assert_eq!(
                (grant.level, grant.serve, grant.max_upload_rate),
                (TrustLevel::Introduce, false, Some(700_000))
            );
        }
        assert_eq!(evaluate(settings, None, Some("b")), Decision::Abstain);
    }

    #[test]
    fn a_claimed_zone_counts_only_where_told_to() {
        assert!(matches!(evaluate("{}", Some("a"), Some("a")), Decision::Allow(_)));
        assert_eq!(evaluate(r#"{"claimed": true}"#, Some("a"), Some("a")), Decision::Abstain);
    }
}
