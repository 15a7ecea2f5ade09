//! The `election-policy` world: who leads.
//!
//! ```
//! use peili_policy::SettingError;
//! use peili_policy::election::{Policy, Ranking, View};
//! use serde::Deserialize;
//!
//! /// Who has the least to do leads.
//! struct Idle;
//!
//! #[derive(Deserialize)]
//! struct Settings {}
//!
//! impl Policy for Idle {
//!     type Settings = Settings;
//!
//!     fn new(_: Settings) -> Result<Self, Vec<SettingError>> {
//!         Ok(Self)
//!     }
//!
//!     fn summary(&self) -> String {
//!         "who has the least to do leads".into()
//!     }
//!
//!     fn rank(&mut self, view: &View) -> Ranking {
//!         Ranking::of(view.candidates.iter().map(|candidate| 11 - u16::from(candidate.load.min(10))))
//!     }
//! }
//!
//! peili_policy::export_election_policy!(Idle);
//! # fn main() {}
//! ```

use std::time::Duration;

/// The contract as Rust, made from `wit/policy.wit` by `tests/bindings.rs`.
#[allow(
    missing_docs,
    unsafe_code,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::unwrap_used,
    reason = "generated; the documentation is in the contract"
)]
pub mod bindings {
    include!("../bindings/election.rs");
}

pub use bindings::exports::peili::policy::election::{
    Candidate, Handover, Label, Ranking, Reachability, Role, RoleKind, Selection, Symbol, Tenure, View,
};

use crate::{Node, Reason, SettingError};

/// The largest weight that the host takes.
pub const MAX_WEIGHT: u16 = 1000;

/// A policy of the `election-policy` world; [`export_election_policy!`](crate::export_election_policy) makes a component of it.
///
/// All nodes must come to the same ranking, so it is not told which one asks. Each ranking is made by a new instance, whose
/// instructions are counted: 2 million, and 4,000 more for each candidate, settings included.
pub trait Policy: Sized {
    /// What the operator may say in the configuration, under `settings`.
    type Settings: serde::de::DeserializeOwned;

    /// Once for each instance.
    ///
    /// # Errors
    /// What is wrong with the settings, by JSON pointer; the host then keeps the policies that it has.
    fn new(settings: Self::Settings) -> Result<Self, Vec<SettingError>>;

    /// One line for `peili status`: what this policy does as configured.
    fn summary(&self) -> String;

    /// A weight for each candidate. Must depend on nothing but the settings and `view`.
    fn rank(&mut self, view: &View) -> Ranking;
}

#[doc(hidden)]
pub fn make<P: Policy>(settings: P::Settings, _: Option<Node>) -> Result<P, Vec<SettingError>> {
    P::new(settings)
}

impl Ranking {
    /// No opinion: others decide, at last the built-in ranking, in which all are equal.
    pub fn abstain() -> Self {
        Self::of([])
    }

    /// One weight for each candidate in order: 0 is ineligible, else 1 to [`MAX_WEIGHT`]. They may not all be 0.
    pub fn of(weights: impl IntoIterator<Item = u16>) -> Self {
        Self {
            weights: weights.into_iter().collect(),
            min_tenure: None,
            handover: None,
            reason: None,
            hints: Vec::new(),
        }
    }

    /// With the time that a leader stays before a better one may follow it.
    pub fn tenure(self, least: Option<Duration>) -> Self {
        Self { min_tenure: least.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)), ..self }
    }

    /// With a reason. `code`: kebab-case, at most 64 bytes; `message`: at most 256 bytes.
    pub fn because(self, code: &str, message: &str) -> Self {
        Self { reason: Some(Reason { code: code.into(), message: message.into() }), ..self }
    }
}

impl View {
    /// The text of a symbol; empty for one that the view has not got.
    pub fn text(&self, symbol: Symbol) -> &str {
        self.strings.get(symbol as usize).map_or("", String::as_str)
    }

    /// What is worked out for each set of labels, of which there are few, in the order of `label_sets`.
    pub fn by_labels<T>(&self, work: impl FnMut(&Vec<Label>) -> T) -> Vec<T> {
        self.label_sets.iter().map(work).collect()
    }

    /// The value of a label in a set of labels.
    pub fn label(&self, labels: &[Label], key: &str) -> Option<&str> {
        labels.iter().find(|label| self.text(label.key) == key).map(|label| self.text(label.value))
    }
}

/// Makes the component of an [`election::Policy`](crate::election::Policy). Once in a crate, which is a `cdylib`.
#[macro_export]
macro_rules! export_election_policy {
    ($policy:ty) => {
        $crate::export_policy!($policy, election, rank(View) -> Ranking, export_election_bindings);
    };
}

/// Views for tests.
pub mod testing {
    use super::*;

    /// Who stands: a name, a zone if it is known, and labels.
    pub type Stands<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, &'a str)]);

    /// A view of these candidates, each with a name, a zone and labels. The role is the coordinator's, and nobody holds it.
    pub fn view(candidates: &[Stands<'_>]) -> View {
        let mut view = View {
            role: Role {
                name: "coordinator".into(),
                kind: RoleKind::Strict,
                selection: Selection::Ranked,
                seats: 1,
            },
            strings: Vec::new(),
            label_sets: Vec::new(),
            candidates: Vec::new(),
            holder: None,
            attributes: Vec::new(),
        };
        for (name, zone, labels) in candidates {
            let labels: Vec<Label> = labels
                .iter()
                .map(|(key, value)| Label { key: symbol(&mut view, key), value: symbol(&mut view, value) })
                .collect();
            let set = view.label_sets.iter().position(|known| *known == labels).unwrap_or_else(|| {
                view.label_sets.push(labels);
                view.label_sets.len() - 1
            });
            let version = symbol(&mut view, "0.1.0");
            let zone = zone.map(|zone| symbol(&mut view, zone));
            view.candidates.push(Candidate {
                name: (*name).into(),
                version,
                zone,
                label_set: index(set),
                load: 0,
                uptime: 0,
                api_server: Reachability::Unknown,
            });
        }
        view
    }

    fn symbol(view: &mut View, text: &str) -> Symbol {
        let known = view.strings.iter().position(|known| known == text).unwrap_or_else(|| {
            view.strings.push(text.into());
            view.strings.len() - 1
        });
        index(known)
    }

    fn index(of: usize) -> u32 {
        u32::try_from(of).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_found_by_key() {
        let view = testing::view(&[("a", None, &[("size", "large")]), ("b", None, &[])]);
        let sizes = view.by_labels(|labels| view.label(labels, "size").map(str::to_owned));
        let of = |candidate: usize| sizes[view.candidates[candidate].label_set as usize].as_deref();
        assert_eq!((of(0), of(1)), (Some("large"), None));
        assert_eq!(view.text(99), "");
    }

    #[test]
    fn rankings_say_what_is_set() {
        let ranking = Ranking::of([1, 0]).tenure(Some(Duration::from_secs(2))).because("a", "b");
        assert_eq!((ranking.weights, ranking.min_tenure), (vec![1, 0], Some(2000)));
        assert!(Ranking::abstain().weights.is_empty());
    }
}
