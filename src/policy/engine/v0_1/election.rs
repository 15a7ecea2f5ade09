//! The election world of version 0.1.

#![allow(missing_docs, unreachable_pub, reason = "generated; the documentation is in the contract")]

use std::collections::HashMap;
use std::time::Duration;

use self::bindings::exports::peili::policy::election as abi;
use self::bindings::exports::peili::policy::election::View as Request;
use super::{milliseconds, reason};
use crate::policy::election::{self as domain, Election, WEIGHT_MAX};

pub(super) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit/policy.wit",
        world: "election-policy",
        with: {
            "peili:policy/types": crate::policy::engine::v0_1::common::types,
            "peili:policy/logging": crate::policy::engine::v0_1::common::logging,
            "peili:policy/data": crate::policy::engine::v0_1::common::data,
        },
    });
}

super::abi!(Election, ElectionPolicy, ElectionPolicyPre, peili_policy_election, call_rank, Request);

/// Texts that many candidates have, each of them once.
#[derive(Default)]
struct Symbols<'a> {
    strings: Vec<String>,
    known: HashMap<&'a str, u32>,
}

impl<'a> Symbols<'a> {
    fn of(&mut self, text: &'a str) -> u32 {
        let next = index(self.strings.len());
        *self.known.entry(text).or_insert_with(|| {
            self.strings.push(text.to_owned());
            next
        })
    }
}

/// A view as guests get it. The numbers of symbols and sets follow the candidates, so they are the same on all nodes.
fn request(view: &domain::View) -> Request {
    let mut symbols = Symbols::default();
    let (mut label_sets, mut known) = (Vec::new(), HashMap::new());
    let candidates = view.candidates.iter().map(|candidate| {
        let label_set = *known.entry(&candidate.labels).or_insert_with(|| {
            let labels = candidate.labels.iter();
            let labels =
                labels.map(|(key, value)| abi::Label { key: symbols.of(key), value: symbols.of(value) });
            label_sets.push(labels.collect());
            index(label_sets.len() - 1)
        });
        abi::Candidate {
            name: candidate.name.clone(),
            version: symbols.of(&candidate.version),
            zone: candidate.zone.as_deref().map(|zone| symbols.of(zone)),
            label_set,
            load: candidate.load.min(10),
            uptime: rounded(candidate.uptime),
            api_server: match candidate.api_server {
                domain::Reachability::Unknown => abi::Reachability::Unknown,
                domain::Reachability::Reachable => abi::Reachability::Reachable,
                domain::Reachability::Unreachable => abi::Reachability::Unreachable,
            },
        }
    });
    let candidates = candidates.collect();
    let role = &view.role;
    Request {
        role: abi::Role {
            name: role.name.clone(),
            kind: match role.kind {
                domain::RoleKind::Strict => abi::RoleKind::Strict,
                domain::RoleKind::Advisory => abi::RoleKind::Advisory,
            },
            selection: match role.selection {
                domain::Selection::Ranked => abi::Selection::Ranked,
                domain::Selection::Proportional => abi::Selection::Proportional,
            },
            seats: role.seats,
        },
        strings: symbols.strings,
        label_sets,
        candidates,
        holder: view.holder.map(|holder| abi::Tenure {
            candidate: index(holder.candidate),
            duration: rounded(holder.duration),
        }),
        attributes: Vec::new(),
    }
}

/// A ranking, or what is wrong with it in itself; whether it is one of the view is checked beside the view.
fn verdict(ranking: abi::Ranking) -> Result<domain::Ranking, String> {
    if let Some(weight) = ranking.weights.iter().find(|weight| **weight > WEIGHT_MAX) {
        return Err(format!("a weight of {weight}, more than {WEIGHT_MAX}"));
    }
    Ok(domain::Ranking {
        weights: ranking.weights,
        min_tenure: ranking.min_tenure.map(|time| Duration::from_millis(time).min(domain::TENURE_LIMIT)),
        handover: ranking.handover.map(|handover| match handover {
            abi::Handover::Never => domain::Handover::Never,
            abi::Handover::Idle => domain::Handover::Idle,
            abi::Handover::Now => domain::Handover::Now,
        }),
        reason: ranking.reason.map(reason).transpose()?,
    })
}

/// Milliseconds, down to a power of two, so that it changes seldom.
fn rounded(time: Duration) -> u64 {
    milliseconds(time).checked_ilog2().map_or(0, |power| 1 << power)
}

/// A view has far fewer of anything.
fn index(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::policy::election::{Candidate, Role, RoleKind, Selection, Tenure, View};

    #[test]
    fn texts_are_there_once_and_times_are_rounded() {
        let labels = BTreeMap::from([("size".to_owned(), "large".to_owned())]);
        let candidate = |name: &str, labels: &BTreeMap<String, String>| Candidate {
            name: name.into(),
            version: "0.1.0".into(),
            zone: Some("large".into()),
            labels: labels.clone(),
            load: 99,
            uptime: Duration::from_millis(1000),
            ..Candidate::default()
        };
        let role = Role { name: "r".into(), kind: RoleKind::Strict, selection: Selection::Ranked, seats: 1 };
        let candidates =
            vec![candidate("a", &labels), candidate("b", &BTreeMap::new()), candidate("c", &labels)];
        let holder = Some(Tenure { candidate: 2, duration: Duration::ZERO });
        let made = request(&View { role, candidates, holder });
        assert_eq!(made.strings, ["size", "large", "0.1.0"]);
        assert_eq!(made.label_sets.len(), 2);
        let sets: Vec<u32> = made.candidates.iter().map(|candidate| candidate.label_set).collect();
        assert_eq!(sets, [0, 1, 0]);
        assert_eq!(
            (made.candidates[0].zone, made.candidates[0].load, made.candidates[0].uptime),
            (Some(1), 10, 512)
        );
        assert_eq!(made.holder.map(|holder| (holder.candidate, holder.duration)), Some((2, 0)));
    }
}
