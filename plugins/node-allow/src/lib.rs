//! Which peers are trusted, and how far: by what they proved, by ID, name, network and version, and by how they behaved.
//!
//! The first rule that a peer matches gives its grant; who matches none, or one of `deny`, is refused. Names and versions are a
//! peer's own word, and count only where `claimed` says so.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use peili_policy::trust::{Conduct, Grant, MIN_RATE, Policy, Request, Verdict, Verification};
use peili_policy::{GlobError, Globs, Node, SettingError, TrustLevel};
use semver::{Version, VersionReq};
use serde::Deserialize;

/// How long who matches no rule is refused, before it is looked at again.
const REFUSED: Duration = Duration::from_secs(60);
/// How soon who was not seen at any address is looked at again.
const UNSEEN: Duration = Duration::from_secs(10);
/// What a wrong content weighs, where a request that was not answered weighs 1.
const MISMATCH: f64 = 10.0;
/// What an answer that breaks the protocol weighs.
const PROTOCOL: f64 = 3.0;

/// What the operator says.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The rules, in order. Empty: all that are not denied are left to admission.
    pub allow: Vec<Rule>,
    /// Peers that are refused, whatever `allow` says.
    pub deny: Vec<Who>,
    /// Whether names and versions count, which are the peer's own word.
    pub claimed: bool,
    /// Keeps those out that misbehave.
    pub quarantine: Option<Quarantine>,
}

/// Peers, and what they may.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Whom it is about.
    #[serde(default, rename = "match")]
    pub who: Who,
    /// What is believed of them.
    #[serde(default)]
    pub level: Level,
    /// Whether content goes to them.
    #[serde(default = "yes")]
    pub serve: bool,
    /// Contents that go to one of them at once.
    pub max_uploads: Option<u32>,
    /// Bytes a second that go to one of them.
    pub max_upload_rate: Option<u64>,
}

/// Which peers: those of which all that is given is true. Nothing given: all.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Who {
    /// Peer IDs.
    pub ids: Vec<String>,
    /// Globs over node names.
    pub names: Vec<String>,
    /// Networks: in a rule of `allow`, all addresses are in one that the peer is seen at; in one of `deny`, any.
    pub networks: Vec<IpNet>,
    /// Versions of Peili, as Cargo writes requirements.
    pub version: Option<VersionReq>,
    /// What they proved: `peer-id-list`, `cluster-key`; one of these.
    pub evidence: Vec<String>,
}

/// Who is kept out for its conduct. A wrong content weighs 10, an answer that breaks the protocol 3, a request that was not
/// answered 1; the sum halves with each `half-life-minutes` since the last of them.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Quarantine {
    /// From this weight on.
    pub weight: f64,
    /// In which the weight halves.
    pub half_life_minutes: f64,
}

/// The levels of the contract.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Its membership records only.
    Introduce,
    /// Content that is bound to a digest.
    Blobs,
    /// Tags too.
    #[default]
    Tags,
}

/// The policy.
#[derive(Debug)]
pub struct NodeAllow {
    allow: Vec<(Matcher, Grant)>,
    deny: Vec<Matcher>,
    claimed: bool,
    quarantine: Option<Quarantine>,
}

#[derive(Debug)]
struct Matcher {
    who: Who,
    names: Globs,
}

fn yes() -> bool {
    true
}

impl Policy for NodeAllow {
    type Settings = Settings;

    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let mut errors = Vec::new();
        let mut matcher = |who: Who, place: String, claimed: bool| {
            let names = Globs::new(&who.names).unwrap_or_else(|GlobError { index, message }| {
                errors.push(SettingError { pointer: format!("{place}/names/{index}"), message });
                Globs::default()
            });
            if !(claimed || who.names.is_empty() && who.version.is_none()) {
                errors.push(SettingError {
                    pointer: place,
                    message: "names and versions are a peer's own word; `claimed: true` makes them count"
                        .into(),
                });
            }
            Matcher { who, names }
        };
        let claimed = settings.claimed;
        let allow: Vec<(Matcher, Grant)> = settings
            .allow
            .into_iter()
            .enumerate()
            .map(|(index, rule)| {
                let grant = Grant {
                    serve: rule.serve,
                    max_uploads: rule.max_uploads,
                    max_upload_rate: rule.max_upload_rate,
                    ..Grant::all(rule.level.into())
                };
                (matcher(rule.who, format!("/allow/{index}/match"), claimed), grant)
            })
            .collect();
        let deny = settings.deny.into_iter().enumerate();
        // Whoever lies about its name to get around a denial could as well lie to match a rule: that is for the rules.
        let deny = deny.map(|(index, who)| matcher(who, format!("/deny/{index}"), true)).collect();
        for (index, (_, grant)) in allow.iter().enumerate() {
            for (key, limit, least) in [
                ("max-uploads", grant.max_uploads.map(u64::from), 1),
                ("max-upload-rate", grant.max_upload_rate, MIN_RATE),
            ] {
                if limit.is_some_and(|limit| limit < least) {
                    errors.push(SettingError {
                        pointer: format!("/allow/{index}/{key}"),
                        message: format!("must be at least {least}; `serve: false` sends nothing"),
                    });
                }
            }
        }
        if settings.quarantine.is_some_and(|limits| !(limits.weight > 0.0 && limits.half_life_minutes > 0.0))
        {
            errors
                .push(SettingError { pointer: "/quarantine".into(), message: "must be more than 0".into() });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self { allow, deny, claimed, quarantine: settings.quarantine })
    }

    fn summary(&self) -> String {
        let quarantine = if self.quarantine.is_some() { ", quarantines by conduct" } else { "" };
        match (self.allow.len(), self.deny.len()) {
            (0, 0) => format!("leaves all to admission{quarantine}"),
            (0, denied) => format!("denies by {denied} rules{quarantine}"),
            (allowed, denied) => format!("allows by {allowed} rules, denies by {denied}{quarantine}"),
        }
    }

    fn evaluate(&mut self, request: &Request) -> Verdict {
        if let Some(limits) = self.quarantine
            && let Some(time) = limits.time(&request.conduct)
        {
            return Verdict::deny(time, "quarantine", "it misbehaved, and is let in again after a while");
        }
        if self.deny.iter().any(|rule| rule.denies(request)) {
            return Verdict::deny(REFUSED, "denied", "a rule denies it");
        }
        if self.allow.is_empty() {
            return Verdict::abstain();
        }
        match self.allow.iter().find(|(rule, _)| rule.matches(request, self.claimed)) {
            Some((_, grant)) => Verdict::allow(*grant),
            // Refused, it could never be seen.
            None if self.allow.iter().any(|(rule, _)| rule.waits(request, self.claimed)) => {
                Verdict::allow(unseen())
            }
            None => Verdict::deny(REFUSED, "not-allowed", "no rule allows it"),
        }
    }
}

/// What who was not seen yet gets: it may connect.
fn unseen() -> Grant {
    let ttl = u64::try_from(UNSEEN.as_millis()).unwrap_or(u64::MAX);
    Grant { serve: false, ttl, ..Grant::all(TrustLevel::Introduce) }
}

impl Matcher {
    fn matches(&self, request: &Request, claimed: bool) -> bool {
        let networks = &self.who.networks;
        self.matches_otherwise(request, claimed)
            && (networks.is_empty() || is_within(&request.observed_addresses, networks))
    }

    fn denies(&self, request: &Request) -> bool {
        let networks = &self.who.networks;
        let is_in = |text: &String| is_within(std::slice::from_ref(text), networks);
        self.matches_otherwise(request, true)
            && (networks.is_empty() || request.observed_addresses.iter().any(is_in))
    }

    /// Whether only its address is missing.
    fn waits(&self, request: &Request, claimed: bool) -> bool {
        request.observed_addresses.is_empty() && self.matches_otherwise(request, claimed)
    }

    /// By all but networks.
    fn matches_otherwise(&self, request: &Request, claimed: bool) -> bool {
        let Self { who, names } = self;
        let peer = &request.peer;
        let name = || peer.trusted_name(claimed);
        let proved = |method: &String| {
            let mut evidence = request.evidence.iter();
            evidence.any(|one| one.method == *method && one.verification == Verification::Verified)
        };
        (who.ids.is_empty() || who.ids.contains(&peer.id))
            && (who.names.is_empty() || name().is_some_and(|name| names.matches(name)))
            && who.version.as_ref().is_none_or(|wanted| is_version(&peer.version, wanted))
            && (who.evidence.is_empty() || who.evidence.iter().any(proved))
    }
}

/// Whether all addresses that were seen are in one of the networks, and there are some.
fn is_within(addresses: &[String], networks: &[IpNet]) -> bool {
    let is_in = |text: &String| {
        let address = text.parse::<IpAddr>().map(|address| address.to_canonical());
        address.is_ok_and(|address| networks.iter().any(|network| network.contains(&address)))
    };
    !addresses.is_empty() && addresses.iter().all(is_in)
}

fn is_version(text: &str, wanted: &VersionReq) -> bool {
    Version::parse(text).is_ok_and(|version| wanted.matches(&version))
}

impl Quarantine {
    /// How long a peer is to be kept out, if it is.
    fn time(&self, conduct: &Conduct) -> Option<Duration> {
        let since = Duration::from_millis(conduct.since_last_fault?).as_secs_f64() / 60.0;
        let weight = f64::from(conduct.digest_mismatches) * MISMATCH
            + f64::from(conduct.protocol_errors) * PROTOCOL
            + f64::from(conduct.timeouts);
        let halvings = (weight / self.weight).log2() - since / self.half_life_minutes;
        // A little longer, so that it is below the limit then.
        (halvings >= 0.0)
            .then(|| Duration::from_secs_f64((halvings * self.half_life_minutes * 60.0 + 1.0).min(86_400.0)))
    }
}

impl From<Level> for TrustLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Introduce => Self::Introduce,
            Level::Blobs => Self::Blobs,
            Level::Tags => Self::Tags,
        }
    }
}

peili_policy::export_trust_policy!(NodeAllow);

#[cfg(test)]
mod tests {
    use peili_policy::Provenance;
    use peili_policy::trust::{Decision, Evidence};

    use super::*;

    fn request() -> Request {
        Request {
            peer: Node {
                id: "12D3KooWPeer".into(),
                name: "worker-1".into(),
                name_provenance: Provenance::Claimed,
                version: "0.1.3".into(),
                labels: vec![],
            },
            observed_addresses: vec!["10.0.1.7".into()],
            announced_addresses: vec![],
            evidence: vec![Evidence {
                method: "cluster-key".into(),
                verification: Verification::Verified,
                claims: vec![],
            }],
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

    fn policy(settings: &str) -> NodeAllow {
        NodeAllow::new(serde_json::from_str(settings).unwrap(), None).unwrap()
    }

    fn code(verdict: &Verdict) -> &str {
        verdict.reason.as_ref().map_or("", |reason| reason.code.as_str())
    }

    #[test]
    fn the_first_rule_that_matches_gives_the_grant() {
        for (who, matches) in [
            (r#"{"ids": ["12D3KooWPeer"]}"#, true),
            (r#"{"ids": ["12D3KooWOther"]}"#, false),
            (r#"{"names": ["worker-*"]}"#, true),
            (r#"{"names": ["control-*"]}"#, false),
            (r#"{"networks": ["10.0.0.0/16", "fd00::/8"]}"#, true),
            (r#"{"networks": ["10.1.0.0/16"]}"#, false),
            (r#"{"version": ">=0.1.2, <0.2"}"#, true),
            (r#"{"version": "0.2"}"#, false),
            (r#"{"evidence": ["peer-id-list", "cluster-key"]}"#, true),
            (r#"{"evidence": ["peer-id-list"]}"#, false),
            (r#"{"names": ["worker-*"], "version": "0.2"}"#, false),
            ("{}", true),
        ] {
            let settings = format!(
                r#"{{"claimed": true, "allow": [{{"match": {who}, "level": "blobs", "max-uploads": 2}}]}}"#
            );
            let verdict = policy(&settings).evaluate(&request());
            match verdict.decision {
                Decision::Allow(grant) => {
                    assert!(matches, "{who}");
                    assert_eq!(
                        (grant.level, grant.serve, grant.max_uploads),
                        (TrustLevel::Blobs, true, Some(2))
                    );
                }
                _ => assert_eq!((matches, code(&verdict)), (false, "not-allowed"), "{who}"),
            }
        }
    }

    #[test]
    fn a_denial_wins_and_without_rules_all_is_left_to_admission() {
        let denied = r#"{"deny": [{"names": ["worker-1"]}], "allow": [{}]}"#;
        assert_eq!(code(&policy(denied).evaluate(&request())), "denied");
        assert_eq!(policy("{}").evaluate(&request()), Verdict::abstain());
    }

    #[test]
    fn an_address_that_was_not_seen_is_in_no_network() {
        let at = |mut policy: NodeAllow, addresses: &[&str]| {
            let observed_addresses = addresses.iter().map(ToString::to_string).collect();
            policy.evaluate(&Request { observed_addresses, ..request() })
        };
        let allow = || policy(r#"{"allow": [{"match": {"networks": ["10.0.0.0/8"]}}]}"#);
        let evaluate = |addresses: &[&str]| at(allow(), addresses);
        assert_eq!(evaluate(&[]).decision, Decision::Allow(unseen()), "it may come and be seen");
        let deny = || policy(r#"{"deny": [{"networks": ["10.0.0.0/8"]}]}"#);
        assert_eq!(code(&at(deny(), &["192.168.0.1", "10.0.0.1"])), "denied", "any will do");
        assert_eq!(at(deny(), &["192.168.0.1"]).decision, Decision::Abstain);
        assert_eq!(code(&evaluate(&["10.0.0.1", "192.168.0.1"])), "not-allowed");
        assert_eq!(code(&evaluate(&["10.0.0.1", "::ffff:10.0.0.2"])), "");
    }

    #[test]
    fn misconduct_weighs_less_with_time() {
        let mut policy = policy(r#"{"quarantine": {"weight": 10, "half-life-minutes": 10}}"#);
        let mut evaluate = |digest_mismatches, timeouts, minutes: u64| {
            let since_last_fault = Some(minutes * 60_000);
            let conduct = Conduct { digest_mismatches, timeouts, since_last_fault, ..request().conduct };
            policy.evaluate(&Request { conduct, ..request() })
        };
        assert_eq!(code(&evaluate(0, 9, 0)), "");
        assert_eq!(code(&evaluate(1, 0, 0)), "quarantine");
        assert_eq!(code(&evaluate(1, 0, 1)), "");
        let verdict = evaluate(4, 0, 0);
        assert_eq!(verdict.decision, Decision::Deny(20 * 60_000 + 1000), "two half-lives");
        assert_eq!(code(&evaluate(4, 0, 21)), "");
    }

    #[test]
    fn wrong_settings_are_named() {
        for (settings, place) in [
            (
                r#"{"claimed": true, "allow": [{}, {"match": {"names": ["a", "{"]}}]}"#,
                "/allow/1/match/names/1",
            ),
            (r#"{"allow": [{"match": {"names": ["a"]}}]}"#, "/allow/0/match"),
            (r#"{"allow": [{"max-uploads": 0}]}"#, "/allow/0/max-uploads"),
            (r#"{"quarantine": {"weight": 0, "half-life-minutes": 1}}"#, "/quarantine"),
        ] {
            let errors = NodeAllow::new(serde_json::from_str(settings).unwrap(), None).unwrap_err();
            assert_eq!(errors[0].pointer, place);
        }
    }
}
