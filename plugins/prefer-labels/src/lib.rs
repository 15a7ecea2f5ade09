//! Nodes with certain labels lead first: dedicated ones, large ones, or those that are paid for anyway.
//!
//! The first rule that a node's labels match gives its weight. Rules see what nodes say of themselves in signed records.

use std::collections::BTreeSet;
use std::time::Duration;

use peili_policy::SettingError;
use peili_policy::election::{Label, MAX_WEIGHT, Policy, Ranking, View};
use serde::Deserialize;

/// What the operator says.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The roles that this is about; none: all.
    pub roles: BTreeSet<String>,
    /// Asked in this order.
    pub rules: Vec<Rule>,
    /// The weight of nodes that no rule matches: 0, which excludes them, to 1000.
    pub otherwise: u16,
    /// How long a leader stays before a better one may follow it.
    pub min_tenure_seconds: Option<u64>,
    /// When a leader makes room for a better one.
    pub handover: Option<Handover>,
}

/// A label, and what a node with it weighs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Such as `node-role.kubernetes.io/infra`.
    pub label: String,
    /// Its value; none: any.
    pub value: Option<String>,
    /// 0, which excludes, to 1000.
    pub weight: u16,
}

/// When a leader makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handover {
    /// It does not.
    Never,
    /// Once it has nothing to do.
    Idle,
    /// At once.
    Now,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            roles: BTreeSet::new(),
            rules: Vec::new(),
            otherwise: 1,
            min_tenure_seconds: None,
            handover: None,
        }
    }
}

/// The policy.
#[derive(Debug)]
pub struct PreferLabels {
    settings: Settings,
}

impl Policy for PreferLabels {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, Vec<SettingError>> {
        let rules = settings.rules.iter().enumerate();
        let weights = rules.map(|(index, rule)| (format!("/rules/{index}/weight"), rule.weight));
        let weights = weights.chain([("/otherwise".to_owned(), settings.otherwise)]);
        let wrong: Vec<SettingError> = weights
            .filter(|(_, weight)| *weight > MAX_WEIGHT)
            .map(|(pointer, _)| SettingError { pointer, message: format!("must be 0 to {MAX_WEIGHT}") })
            .collect();
        if wrong.is_empty() { Ok(Self { settings }) } else { Err(wrong) }
    }

    fn summary(&self) -> String {
        let Settings { rules, otherwise, .. } = &self.settings;
        let others = if *otherwise == 0 { "others do not lead" } else { "others after them" };
        format!("{} rules about labels, {others}", rules.len())
    }

    fn rank(&mut self, view: &View) -> Ranking {
        let Settings { roles, rules, otherwise, min_tenure_seconds, handover } = &self.settings;
        if !roles.is_empty() && !roles.contains(&view.role.name) {
            return Ranking::abstain();
        }
        let matches = |labels: &[Label], rule: &Rule| {
            let value = view.label(labels, &rule.label);
            value.is_some_and(|value| rule.value.as_deref().is_none_or(|wanted| wanted == value))
        };
        let by_labels = view.by_labels(|labels| {
            rules.iter().find(|rule| matches(labels, rule)).map_or(*otherwise, |rule| rule.weight)
        });
        let weight = |set: u32| by_labels.get(set as usize).copied().unwrap_or(*otherwise);
        let weights: Vec<u16> = view.candidates.iter().map(|candidate| weight(candidate.label_set)).collect();
        let ranking = if weights.iter().all(|weight| *weight == 0) {
            Ranking::abstain().because("no-label-matches", "no candidate has the labels")
        } else {
            Ranking::of(weights)
        };
        Ranking {
            handover: handover.map(|handover| match handover {
                Handover::Never => peili_policy::election::Handover::Never,
                Handover::Idle => peili_policy::election::Handover::Idle,
                Handover::Now => peili_policy::election::Handover::Now,
            }),
            ..ranking.tenure(min_tenure_seconds.map(Duration::from_secs))
        }
    }
}

peili_policy::export_election_policy!(PreferLabels);

#[cfg(test)]
mod tests {
    use peili_policy::election::testing::view;

    use super::*;

    fn policy(settings: &str) -> PreferLabels {
        PreferLabels::new(serde_json::from_str(settings).unwrap()).unwrap()
    }

    fn nodes() -> View {
        view(&[
            ("a", None, &[("infra", "true"), ("size", "small")]),
            ("b", None, &[("size", "large")]),
            ("c", None, &[]),
        ])
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let rules = r#""rules": [{"label": "infra", "weight": 900}, {"label": "size", "value": "large", "weight": 500}]"#;
        assert_eq!(policy(&format!("{{{rules}}}")).rank(&nodes()).weights, [900, 500, 1]);
        assert_eq!(policy(&format!(r#"{{{rules}, "otherwise": 0}}"#)).rank(&nodes()).weights, [900, 500, 0]);
        let other = policy(&format!(r#"{{{rules}, "roles": ["tag-home"]}}"#));
        assert!({ other }.rank(&nodes()).weights.is_empty());
    }

    #[test]
    fn somebody_leads_where_nobody_has_the_labels() {
        let ranking = policy(
            r#"{"rules": [{"label": "gpu", "weight": 9}], "otherwise": 0, "handover": "idle", "min-tenure-seconds": 60}"#,
        )
        .rank(&nodes());
        assert!(ranking.weights.is_empty() && ranking.reason.is_some(), "{ranking:?}");
        assert_eq!(ranking.handover, Some(peili_policy::election::Handover::Idle));
        assert_eq!(ranking.min_tenure, Some(60_000));
    }

    #[test]
    fn weights_that_are_none_are_named() {
        let settings: Settings =
            serde_json::from_str(r#"{"rules": [{"label": "a", "weight": 1001}], "otherwise": 2000}"#)
                .unwrap();
        let errors = PreferLabels::new(settings).unwrap_err();
        let places: Vec<&str> = errors.iter().map(|error| error.pointer.as_str()).collect();
        assert_eq!(places, ["/rules/0/weight", "/otherwise"]);
    }
}
