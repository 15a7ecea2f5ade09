//! Say here what the policy decides. As it begins: nodes whose name a glob of `exclude` matches do not lead.
//!
//! It is asked once for each role, whenever what is known of the candidates changes. All that it may know is in the view; its
//! ranking must depend on that and on the settings alone, since all nodes must come to the same one.

use peili_policy::election::{Policy, Ranking, View};
use peili_policy::{GlobError, Globs, SettingError};
use serde::Deserialize;

/// What the operator may say in the configuration, under `settings`. An unknown key is an error that names it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Globs over names of nodes: `spot-*`.
    pub exclude: Vec<String>,
}

/// The policy, made of its settings.
#[derive(Debug)]
pub struct MyPolicy {
    exclude: Globs,
}

impl Policy for MyPolicy {
    type Settings = Settings;

    /// Once for each ranking: what takes long here, takes long each time. What is wrong is told with its place in the settings.
    fn new(settings: Settings) -> Result<Self, Vec<SettingError>> {
        let wrong = |GlobError { index, message }| {
            vec![SettingError { pointer: format!("/exclude/{index}"), message }]
        };
        Ok(Self { exclude: Globs::new(&settings.exclude).map_err(wrong)? })
    }

    /// One line for `peili status`.
    fn summary(&self) -> String {
        format!("excludes {} globs of names", self.exclude.len())
    }

    /// A weight for each candidate: 0 excludes, larger ones lead first, and the weights of all policies add up. Without an opinion,
    /// abstain: who excludes everybody has an invalid ranking.
    fn rank(&mut self, view: &View) -> Ranking {
        let is_excluded = |name: &str| self.exclude.matches(name);
        if view.candidates.iter().all(|candidate| is_excluded(&candidate.name)) {
            return Ranking::abstain().because("all-excluded", "each candidate is on the list");
        }
        Ranking::of(view.candidates.iter().map(|candidate| u16::from(!is_excluded(&candidate.name))))
    }
}

peili_policy::export_election_policy!(MyPolicy);

#[cfg(test)]
mod tests {
    use peili_policy::election::testing::view;

    use super::*;

    #[test]
    fn whose_name_is_on_the_list_does_not_lead() {
        let settings = serde_json::from_str(r#"{"exclude": ["spot-*"]}"#).unwrap();
        let mut policy = MyPolicy::new(settings).unwrap();
        let mixed = view(&[("spot-1", None, &[]), ("node-1", None, &[])]);
        assert_eq!(policy.rank(&mixed).weights, [0, 1]);
        assert!(policy.rank(&view(&[("spot-1", None, &[])])).weights.is_empty(), "somebody must lead");
    }
}
