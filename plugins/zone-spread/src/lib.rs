//! Leaders and seats over all zones, so that the loss of one zone is not the loss of a role.
//!
//! Of a ranked role the first node of each zone comes before the second of any, and so on; which one is first in its zone is a
//! hash of role and name, so that not one node leads all roles, and the holder stays first in its own. Of a proportional role
//! each zone gets the same share of the keys, as far as `max-factor` lets the nodes of a small one carry it. Nodes without a zone
//! are a zone together.

use std::collections::BTreeSet;
use std::time::Duration;

use peili_policy::SettingError;
use peili_policy::election::{MAX_WEIGHT, Policy, Ranking, Selection, View};
use serde::Deserialize;

/// What the operator says.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The zones whose nodes lead; none: all. Where no candidate is in one of them, all of them count.
    pub zones: BTreeSet<String>,
    /// How many times the keys of a node in the largest zone a node in a smaller one may get: 1 to 1000.
    pub max_factor: u16,
    /// How long a leader stays before a better one may follow it.
    pub min_tenure_seconds: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { zones: BTreeSet::new(), max_factor: 4, min_tenure_seconds: None }
    }
}

/// The policy.
#[derive(Debug)]
pub struct ZoneSpread {
    settings: Settings,
}

impl Policy for ZoneSpread {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, Vec<SettingError>> {
        if !(1..=MAX_WEIGHT).contains(&settings.max_factor) {
            let message = format!("must be 1 to {MAX_WEIGHT}");
            return Err(vec![SettingError { pointer: "/max-factor".into(), message }]);
        }
        Ok(Self { settings })
    }

    fn summary(&self) -> String {
        let zones: Vec<&str> = self.settings.zones.iter().map(String::as_str).collect();
        let zones = if zones.is_empty() { "all zones".into() } else { format!("zones {}", zones.join(", ")) };
        format!("spreads leaders over {zones}")
    }

    fn rank(&mut self, view: &View) -> Ranking {
        let zones = self.zones(view);
        if zones.is_empty() {
            return Ranking::abstain();
        }
        let mut weights = vec![0; view.candidates.len()];
        match view.role.selection {
            Selection::Ranked => ranked(view, zones, &mut weights),
            Selection::Proportional => proportional(&zones, self.settings.max_factor, &mut weights),
        }
        Ranking::of(weights).tenure(self.settings.min_tenure_seconds.map(Duration::from_secs))
    }
}

impl ZoneSpread {
    /// The candidates of each zone that counts, by index.
    fn zones(&self, view: &View) -> Vec<Vec<usize>> {
        // By symbol; the last is for who has no zone.
        let mut zones = vec![Vec::new(); view.strings.len() + 1];
        for (index, candidate) in view.candidates.iter().enumerate() {
            let zone = candidate.zone.map_or(view.strings.len(), |zone| zone as usize);
            if let Some(members) = zones.get_mut(zone) {
                members.push(index);
            }
        }
        let is_meant =
            |symbol: usize| view.strings.get(symbol).is_some_and(|zone| self.settings.zones.contains(zone));
        let any_is_meant = zones.iter().enumerate().any(|(zone, of)| !of.is_empty() && is_meant(zone));
        let zones = zones.into_iter().enumerate();
        zones
            .filter(|(zone, members)| !members.is_empty() && (!any_is_meant || is_meant(*zone)))
            .map(|(_, members)| members)
            .collect()
    }
}

/// The first of each zone, then the second of each, and so on.
fn ranked(view: &View, zones: Vec<Vec<usize>>, weights: &mut [u16]) {
    let holder = view.holder.as_ref().map(|holder| holder.candidate as usize);
    for members in zones {
        let mut order: Vec<(bool, u64, usize)> = members
            .into_iter()
            .map(|index| {
                let place = hash(&view.role.name, &view.candidates[index].name);
                (Some(index) != holder, place, index)
            })
            .collect();
        order.sort_unstable();
        for (place, (_, _, index)) in order.into_iter().enumerate() {
            let behind = u16::try_from(place).unwrap_or(MAX_WEIGHT).min(MAX_WEIGHT - 1);
            weights[index] = MAX_WEIGHT - behind;
        }
    }
}

/// The weights of a zone add up to the same, unless one of its nodes would get too much.
fn proportional(zones: &[Vec<usize>], max_factor: u16, weights: &mut [u16]) {
    let largest = zones.iter().map(Vec::len).max().unwrap_or(1);
    let factor = |members: &[usize]| (largest * 1000 / members.len()).min(usize::from(max_factor) * 1000);
    // A weight has three digits, so they are shared by the smallest zone's.
    let most = zones.iter().map(|members| factor(members)).max().unwrap_or(1);
    for members in zones {
        let weight = factor(members) * usize::from(MAX_WEIGHT) / most;
        let weight = u16::try_from(weight).unwrap_or(MAX_WEIGHT).max(1);
        for index in members {
            weights[*index] = weight;
        }
    }
}

/// FNV-1a, with a last step that lets each bit depend on all.
fn hash(role: &str, name: &str) -> u64 {
    let bytes = role.bytes().chain([0]).chain(name.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}

peili_policy::export_election_policy!(ZoneSpread);

#[cfg(test)]
mod tests {
    use peili_policy::election::testing::view;
    use peili_policy::election::{Selection, Tenure};

    use super::*;

    fn policy(settings: &str) -> ZoneSpread {
        ZoneSpread::new(serde_json::from_str(settings).unwrap()).unwrap()
    }

    fn four() -> View {
        view(&[("a1", Some("a"), &[]), ("a2", Some("a"), &[]), ("b1", Some("b"), &[]), ("none", None, &[])])
    }

    #[test]
    fn each_zone_has_a_first() {
        let weights = policy("{}").rank(&four()).weights;
        assert_eq!(weights.iter().filter(|weight| **weight == 1000).count(), 3, "{weights:?}");
        assert_eq!(weights[0] + weights[1], 1999, "{weights:?}");
    }

    #[test]
    fn the_holder_stays_the_first_of_its_zone() {
        for holder in [0, 1] {
            let view = View { holder: Some(Tenure { candidate: holder, duration: 0 }), ..four() };
            assert_eq!(policy("{}").rank(&view).weights[holder as usize], 1000);
        }
    }

    #[test]
    fn each_zone_gets_the_same_share_of_keys() {
        let mut view = four();
        view.role.selection = Selection::Proportional;
        assert_eq!(policy("{}").rank(&view).weights, [500, 500, 1000, 1000]);
        assert_eq!(policy(r#"{"max-factor": 1}"#).rank(&view).weights, [1000; 4]);
    }

    #[test]
    fn only_zones_that_are_named_lead_where_there_are_any() {
        let b = policy(r#"{"zones": ["b"], "min-tenure-seconds": 60}"#).rank(&four());
        assert_eq!((b.weights, b.min_tenure), (vec![0, 0, 1000, 0], Some(60_000)));
        let c = policy(r#"{"zones": ["c"]}"#).rank(&four());
        assert!(c.weights.iter().all(|weight| *weight > 0), "{c:?}");
        let error = ZoneSpread::new(Settings { max_factor: 0, ..Settings::default() }).unwrap_err();
        assert_eq!(error[0].pointer, "/max-factor");
    }

    /// Guards that not one node is first in its zone for all roles.
    #[test]
    fn roles_are_led_by_different_nodes() {
        let names: Vec<String> = (0..50).map(|number| format!("node-{number}")).collect();
        let candidates: Vec<_> = names.iter().map(|name| (name.as_str(), Some("a"), &[] as &[_])).collect();
        let mut view = view(&candidates);
        let firsts: BTreeSet<usize> = (0..20)
            .map(|role| {
                view.role.name = format!("role-{role}");
                let weights = policy("{}").rank(&view).weights;
                weights.iter().position(|weight| *weight == 1000).unwrap()
            })
            .collect();
        assert!(firsts.len() > 10, "{firsts:?}");
    }
}
