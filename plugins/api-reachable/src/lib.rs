//! Only who reaches the API server leads: a leader that is cut off from it holds a lease that it cannot renew, and publishes
//! nothing.
//!
//! Where nobody is known to reach it, it abstains: then the API server is what is gone, and not the way of some nodes to it.

use std::collections::BTreeSet;

use peili_policy::SettingError;
use peili_policy::election::{Policy, Ranking, Reachability, RoleKind, View};
use serde::Deserialize;

/// What the operator says.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The roles that this is about; none: the strict ones, which need the API server.
    pub roles: BTreeSet<String>,
    /// Whether who has not said whether it reaches the API server may lead too.
    pub allow_unknown: bool,
}

/// The policy.
#[derive(Debug)]
pub struct ApiReachable {
    settings: Settings,
}

impl Policy for ApiReachable {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, Vec<SettingError>> {
        Ok(Self { settings })
    }

    fn summary(&self) -> String {
        let roles: Vec<&str> = self.settings.roles.iter().map(String::as_str).collect();
        let roles = if roles.is_empty() { "strict roles".into() } else { roles.join(", ") };
        let unknown = if self.settings.allow_unknown { " or has not said so" } else { "" };
        format!("{roles}: only who reaches the API server{unknown} leads")
    }

    fn rank(&mut self, view: &View) -> Ranking {
        let Settings { roles, allow_unknown } = &self.settings;
        let is_meant = if roles.is_empty() {
            view.role.kind == RoleKind::Strict
        } else {
            roles.contains(&view.role.name)
        };
        if !is_meant {
            return Ranking::abstain();
        }
        let is_known =
            |reachability| view.candidates.iter().any(|candidate| candidate.api_server == reachability);
        if !is_known(Reachability::Reachable) {
            return Ranking::abstain().because("none-reaches-api", "nobody is known to reach the API server");
        }
        Ranking::of(view.candidates.iter().map(|candidate| match candidate.api_server {
            Reachability::Reachable => 1,
            Reachability::Unknown => u16::from(*allow_unknown),
            Reachability::Unreachable => 0,
        }))
    }
}

peili_policy::export_election_policy!(ApiReachable);

#[cfg(test)]
mod tests {
    use peili_policy::election::testing::view;

    use super::*;

    fn rank(settings: &str, kind: RoleKind, reach: &[Reachability]) -> Vec<u16> {
        let mut view = view(&vec![("node", None, &[] as &[_]); reach.len()]);
        for (candidate, reach) in view.candidates.iter_mut().zip(reach) {
            candidate.api_server = *reach;
        }
        view.role.kind = kind;
        ApiReachable::new(serde_json::from_str(settings).unwrap()).unwrap().rank(&view).weights
    }

    #[test]
    fn who_is_cut_off_does_not_lead() {
        use Reachability::{Reachable, Unknown, Unreachable};
        let all = [Reachable, Unknown, Unreachable];
        assert_eq!(rank("{}", RoleKind::Strict, &all), [1, 0, 0]);
        assert_eq!(rank(r#"{"allow-unknown": true}"#, RoleKind::Strict, &all), [1, 1, 0]);
        assert!(rank("{}", RoleKind::Advisory, &all).is_empty());
        assert_eq!(rank(r#"{"roles": ["coordinator"]}"#, RoleKind::Advisory, &all), [1, 0, 0]);
        assert!(rank(r#"{"roles": ["tag-home"]}"#, RoleKind::Strict, &all).is_empty());
        assert!(
            rank("{}", RoleKind::Strict, &[Unknown, Unreachable]).is_empty(),
            "it is the server that is gone"
        );
    }
}
