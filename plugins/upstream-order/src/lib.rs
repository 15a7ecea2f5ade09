//! From where content comes: peers, upstreams of the configuration in an order that their health changes, the registry itself;
//! and under which name it is there.
//!
//! It denies nothing. A rule without upstreams and without `origin` is an air gap: what no node has is not to be had.

use peili_policy::registry::{Health, Plan, Policy, Request, Requester, Route, Source, Verdict};
use peili_policy::{GlobError, Globs, Node, SettingError};
use serde::Deserialize;

/// Routes of one rule.
const ROUTES: usize = 8;

/// The rules of the operator.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The first that a name matches counts; none: no opinion.
    pub rules: Vec<Rule>,
}

/// Where what a glob matches comes from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Globs over `registry/repository`.
    #[serde(rename = "match")]
    pub globs: Vec<String>,
    /// When peers are asked.
    #[serde(default)]
    pub peers: Peers,
    /// Upstreams, in the order in which they are asked while all are well.
    #[serde(default)]
    pub upstreams: Vec<Upstream>,
    /// Whether the registry itself may be asked, at last and by the runtime.
    #[serde(default)]
    pub origin: bool,
}

/// When peers are asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peers {
    /// Before the upstreams.
    #[default]
    First,
    /// After them.
    Last,
    /// Not at all.
    Never,
}

/// An upstream and the name of a repository there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Upstream {
    /// As in the operator's `upstreams`.
    pub name: String,
    /// How the repository is called there, in which `{registry}` and `{repository}` stand for those of the request: `dockerhub/{repository}`.
    /// Left out: as in the request.
    #[serde(default)]
    pub repository: Option<String>,
}

/// The policy.
#[derive(Debug)]
pub struct UpstreamOrder {
    rules: Vec<(Globs, Rule)>,
}

impl Policy for UpstreamOrder {
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
            if rule.upstreams.len() > ROUTES {
                error("upstreams", format!("more than {ROUTES}"));
            }
            if rule.peers == Peers::Never && rule.upstreams.is_empty() && !rule.origin {
                error("peers", "nothing is left to be asked: that is for a policy that denies".into());
            }
            match Globs::new(&rule.globs) {
                Ok(globs) => rules.push((globs, rule)),
                Err(GlobError { index, message }) => error(&format!("match/{index}"), message),
            }
        }
        if errors.is_empty() { Ok(Self { rules }) } else { Err(errors) }
    }

    fn summary(&self) -> String {
        let closed = self.rules.iter().filter(|(_, rule)| !rule.origin).count();
        match self.rules.len() {
            1 => format!("one rule{}", if closed == 1 { ", without the registry" } else { "" }),
            rules => format!("{rules} rules, {closed} without the registry"),
        }
    }

    fn decide(&mut self, request: &Request) -> Verdict {
        // What a peer gets is no question of where it came from.
        if matches!(request.requester, Requester::Peer(_)) {
            return Verdict::abstain();
        }
        let name = request.name();
        let Some((_, rule)) = self.rules.iter().find(|(globs, _)| globs.matches(&name)) else {
            return Verdict::abstain();
        };
        let mut upstreams: Vec<&Upstream> = rule.upstreams.iter().collect();
        // Stable: those that do equally well stay in the operator's order.
        upstreams.sort_by_key(|upstream| rank(request, &upstream.name));
        let mut sources: Vec<Source> =
            upstreams.into_iter().map(|upstream| Source::Upstream(upstream.route(request))).collect();
        match rule.peers {
            Peers::First => sources.insert(0, Source::Peers),
            Peers::Last => sources.push(Source::Peers),
            Peers::Never => {}
        }
        if rule.origin {
            sources.push(Source::Origin);
        }
        Verdict::mirror(Plan { sources: Some(sources), ..Plan::any() })
    }
}

impl Upstream {
    fn route(&self, request: &Request) -> Route {
        let repository = self.repository.as_ref().map(|name| {
            name.replace("{registry}", &request.registry).replace("{repository}", &request.repository)
        });
        Route { upstream: self.name.clone(), repository }
    }
}

/// How an upstream does, the best first.
fn rank(request: &Request, name: &str) -> u8 {
    let known = request.upstreams.iter().find(|upstream| upstream.name == name);
    match known.map(|upstream| upstream.health) {
        Some(Health::Healthy | Health::Unknown) | None => 0,
        Some(Health::Degraded) => 1,
        Some(Health::RateLimited) => 2,
        Some(Health::Unreachable) => 3,
    }
}

peili_policy::export_registry_policy!(UpstreamOrder);

#[cfg(test)]
mod tests {
    use peili_policy::registry::{
        Availability, Decision, Descriptor, Operation, Reference, Upstream as Known,
    };
    use serde_json::{Value, json};

    use super::*;

    fn policy(settings: Value) -> Result<UpstreamOrder, Vec<SettingError>> {
        UpstreamOrder::new(serde_json::from_value(settings).unwrap(), None)
    }

    fn request(registry: &str, repository: &str, upstreams: &[(&str, Health)]) -> Request {
        Request {
            operation: Operation::Manifests,
            requester: Requester::Runtime,
            registry: registry.into(),
            repository: repository.into(),
            reference: Some(Reference::Tag("v1".into())),
            descriptor: Descriptor { media_type: None, size: None },
            availability: Availability { local: false, peers: 0, peers_in_zone: 0, tag_age: None },
            upstreams: upstreams
                .iter()
                .map(|(name, health)| Known { name: (*name).into(), health: *health, latency: None })
                .collect(),
            now: 0,
            attributes: vec![],
        }
    }

    fn sources(policy: &mut UpstreamOrder, request: &Request) -> Vec<String> {
        let Decision::Mirror(plan) = policy.decide(request).decision else { return vec![] };
        let text = |source: &Source| match source {
            Source::Peers => "peers".to_owned(),
            Source::Origin => "origin".to_owned(),
            Source::Upstream(route) => {
                format!("{}:{}", route.upstream, route.repository.as_deref().unwrap_or("-"))
            }
        };
        plan.sources.unwrap().iter().map(text).collect()
    }

    #[test]
    fn the_first_rule_counts_and_names_are_rewritten() {
        let mut policy = policy(json!({"rules": [
            {"match": ["docker.io/**"], "upstreams": [
                {"name": "corp", "repository": "hub/{repository}"}, {"name": "far", "repository": "{registry}/{repository}"}]},
            {"match": ["**"], "peers": "last", "upstreams": [{"name": "corp"}], "origin": true},
        ]}))
        .unwrap();
        let hub = request("docker.io", "library/nginx", &[]);
        assert_eq!(
            sources(&mut policy, &hub),
            ["peers", "corp:hub/library/nginx", "far:docker.io/library/nginx"]
        );
        let other = request("quay.io", "a/b", &[]);
        assert_eq!(sources(&mut policy, &other), ["corp:-", "peers", "origin"]);
    }

    #[test]
    fn who_does_badly_is_asked_last() {
        let upstreams = json!([{"name": "a"}, {"name": "b"}, {"name": "c"}]);
        let mut policy =
            policy(json!({"rules": [{"match": ["**"], "peers": "never", "upstreams": upstreams}]})).unwrap();
        let health = [("a", Health::Unreachable), ("b", Health::Degraded), ("c", Health::Healthy)];
        assert_eq!(sources(&mut policy, &request("r.test", "a", &health)), ["c:-", "b:-", "a:-"]);
        assert_eq!(sources(&mut policy, &request("r.test", "a", &[])), ["a:-", "b:-", "c:-"]);
    }

    #[test]
    fn a_slip_is_named_by_its_place() {
        let pointer = |settings: Value| policy(settings).unwrap_err()[0].pointer.clone();
        assert_eq!(pointer(json!({"rules": [{"match": ["a", "["]}]})), "/rules/0/match/1");
        assert_eq!(pointer(json!({"rules": [{"match": []}]})), "/rules/0/match");
        assert_eq!(pointer(json!({"rules": [{"match": ["**"], "peers": "never"}]})), "/rules/0/peers");
    }
}
