//! What other nodes may say about tags: which, how long after their registry said it, and which are nobody's but the registry's.
//!
//! It is about tags alone: what is asked for by digest it leaves to others.

use std::fmt;

use peili_policy::registry::{Plan, Policy, Reference, Request, Requester, TagResolution, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError};
use serde::{Deserialize, Deserializer, de};

/// The rules of the operator; the first one that a tag matches decides.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// What no rule is about is left to others.
    pub rules: Vec<Rule>,
}

/// What is true of some tags.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Globs over `registry/repository`.
    #[serde(rename = "match")]
    pub globs: Vec<String>,
    /// Globs over tags, such as `v*`. None: all.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Who says what they stand for.
    #[serde(default)]
    pub resolve: Option<Resolve>,
    /// How long after their registry said so: `90s`, `10m`, `12h`, `7d`.
    #[serde(default)]
    pub max_age: Option<Age>,
    /// No node tells another one.
    #[serde(default)]
    pub private: bool,
}

/// Who says what a tag stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolve {
    /// Other nodes, although the registry answers.
    Peers,
    /// The tag's home node, which asks the registry for all.
    Home,
    /// The registry and nobody else, also where it does not answer.
    Registry,
}

/// A time in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age(u64);

impl<'de> Deserialize<'de> for Age {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let unit = text.trim_start_matches(|letter: char| letter.is_ascii_digit());
        let seconds = match unit {
            "s" => Some(1),
            "m" => Some(60),
            "h" => Some(3600),
            "d" => Some(86_400),
            _ => None,
        };
        let number = text[..text.len() - unit.len()].parse::<u64>().ok();
        let age = number.zip(seconds).and_then(|(number, seconds)| number.checked_mul(seconds * 1000));
        age.filter(|age| *age > 0)
            .map(Self)
            .ok_or_else(|| de::Error::custom("not a time such as `10m`: s, m, h or d"))
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0 / 1000)
    }
}

/// The policy.
#[derive(Debug)]
pub struct TagFreshness {
    rules: Vec<(Globs, Globs, Rule)>,
}

impl Policy for TagFreshness {
    type Settings = Settings;

    fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
        let (mut rules, mut errors) = (Vec::new(), Vec::new());
        for (number, rule) in settings.rules.into_iter().enumerate() {
            let mut error = |key: &str, message: String| {
                errors.push(SettingError { pointer: format!("/rules/{number}/{key}"), message })
            };
            if rule.globs.is_empty() {
                error("match", "names no glob".into());
            }
            if rule.private && rule.resolve.is_some_and(|resolve| resolve != Resolve::Registry) {
                error("resolve", "the tags are private: only `registry` can say what they stand for".into());
            }
            let says = rule.private || rule.resolve.is_some() || rule.max_age.is_some();
            if !says {
                error("match", "the rule says nothing: `resolve`, `max-age` or `private`".into());
            }
            let mut globs = |list: &[String], key: &str| {
                Globs::new(list).unwrap_or_else(|GlobError { index, message }| {
                    error(&format!("{key}/{index}"), message);
                    Globs::default()
                })
            };
            let (names, tags) = (globs(&rule.globs, "match"), globs(&rule.tags, "tags"));
            rules.push((names, tags, rule));
        }
        if errors.is_empty() { Ok(Self { rules }) } else { Err(errors) }
    }

    fn summary(&self) -> String {
        let private = self.rules.iter().filter(|(.., rule)| rule.private).count();
        let youngest = self.rules.iter().filter_map(|(.., rule)| rule.max_age).min_by_key(|age| age.0);
        let youngest = youngest.map_or_else(String::new, |age| format!(", the least age {age}"));
        format!("{} rules, {private} of private tags{youngest}", self.rules.len())
    }

    fn decide(&mut self, request: &Request) -> Verdict {
        let Some(Reference::Tag(tag)) = &request.reference else { return Verdict::abstain() };
        let name = request.name();
        let applies = |(names, tags, _): &&(Globs, Globs, Rule)| {
            names.matches(&name) && (tags.is_empty() || tags.matches(tag))
        };
        let Some((.., rule)) = self.rules.iter().find(applies) else { return Verdict::abstain() };
        if matches!(request.requester, Requester::Peer(_)) {
            return match rule.private {
                true => Verdict::deny("private-tag", "its registry alone says what this tag stands for"),
                false => Verdict::abstain(),
            };
        }
        let tag_resolution = match rule.resolve {
            _ if rule.private => Some(TagResolution::UpstreamOnly),
            Some(Resolve::Registry) => Some(TagResolution::UpstreamOnly),
            Some(Resolve::Home) => Some(TagResolution::Home),
            Some(Resolve::Peers) => Some(TagResolution::Peers),
            None => None,
        };
        Verdict::mirror(Plan { tag_resolution, max_tag_age: rule.max_age.map(|age| age.0), ..Plan::any() })
    }
}

peili_policy::export_registry_policy!(TagFreshness);

#[cfg(test)]
mod tests {
    use peili_policy::registry::{Availability, Decision, Descriptor, Operation};
    use serde_json::{Value, json};

    use super::*;

    fn policy(settings: Value) -> Result<TagFreshness, Vec<SettingError>> {
        TagFreshness::new(serde_json::from_value(settings).unwrap(), None)
    }

    fn request(repository: &str, reference: Reference) -> Request {
        Request {
            operation: Operation::Manifests,
            requester: Requester::Runtime,
            registry: "r.test".into(),
            repository: repository.into(),
            reference: Some(reference),
            descriptor: Descriptor { media_type: None, size: None },
            availability: Availability { local: false, peers: 0, peers_in_zone: 0, tag_age: None },
            upstreams: vec![],
            now: 0,
            attributes: vec![],
        }
    }

    fn tag(name: &str) -> Reference {
        Reference::Tag(name.into())
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let mut policy = policy(json!({"rules": [
            {"match": ["r.test/team/**"], "tags": ["v*"], "resolve": "peers", "max-age": "2h"},
            {"match": ["r.test/team/**"], "resolve": "home"},
        ]}))
        .unwrap();
        let mut plan = |repository, reference| match policy.decide(&request(repository, reference)).decision {
            Decision::Mirror(plan) => Some((plan.tag_resolution, plan.max_tag_age)),
            Decision::Abstain => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(plan("team/a", tag("v1")), Some((Some(TagResolution::Peers), Some(7_200_000))));
        assert_eq!(plan("team/a", tag("latest")), Some((Some(TagResolution::Home), None)));
        assert_eq!(plan("other/a", tag("v1")), None);
        assert_eq!(plan("team/a", Reference::Digest("sha256:00".into())), None);
    }

    #[test]
    fn wrong_settings_are_named() {
        let errors = policy(json!({"rules": [
            {"match": [], "private": true, "resolve": "peers"},
            {"match": ["a//b"], "tags": ["{v}"]},
        ]}))
        .unwrap_err();
        let pointers: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
        let expected =
            ["/rules/0/match", "/rules/0/resolve", "/rules/1/match", "/rules/1/match/0", "/rules/1/tags/0"];
        assert_eq!(pointers, expected);
        for age in ["", "10", "m", "1w", "0s", "-1s", "99999999999999999999d"] {
            let settings = json!({"rules": [{"match": ["**"], "max-age": age}]});
            assert!(serde_json::from_value::<Settings>(settings).is_err(), "{age}");
        }
    }
}
