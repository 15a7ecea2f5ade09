//! The `trust-policy` world: how far a peer is trusted.
//!
//! ```
//! use std::time::Duration;
//!
//! use peili_policy::trust::{Grant, Policy, Request, Verdict};
//! use peili_policy::{Node, SettingError, TrustLevel};
//! use serde::Deserialize;
//!
//! /// Keeps peers that sent wrong content out.
//! struct Honest;
//!
//! #[derive(Deserialize)]
//! struct Settings {}
//!
//! impl Policy for Honest {
//!     type Settings = Settings;
//!
//!     fn new(_: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
//!         Ok(Self)
//!     }
//!
//!     fn summary(&self) -> String {
//!         "keeps peers out that sent wrong content".into()
//!     }
//!
//!     fn evaluate(&mut self, request: &Request) -> Verdict {
//!         if request.conduct.digest_mismatches > 0 {
//!             Verdict::deny(Duration::from_secs(600), "wrong-content", "it sent wrong content")
//!         } else {
//!             Verdict::allow(Grant::all(TrustLevel::Tags))
//!         }
//!     }
//! }
//!
//! peili_policy::export_trust_policy!(Honest);
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
    include!("../bindings/trust.rs");
}

pub use bindings::exports::peili::policy::trust::{
    Conduct, Decision, Evidence, Grant, Request, Verdict, Verification,
};

use crate::{Node, Provenance, Reason, SettingError, TrustLevel};

/// A policy of the `trust-policy` world; [`export_trust_policy!`](crate::export_trust_policy) makes a component of it.
pub trait Policy: Sized {
    /// What the operator may say in the configuration, under `settings`.
    type Settings: serde::de::DeserializeOwned;

    /// Once for each instance. `here`: the node that asks.
    ///
    /// # Errors
    /// What is wrong with the settings, by JSON pointer; the host then keeps the policies that it has.
    fn new(settings: Self::Settings, here: Option<Node>) -> Result<Self, Vec<SettingError>>;

    /// One line for `peili status`: what this policy does as configured.
    fn summary(&self) -> String;

    /// The verdict about one peer. Must depend on nothing but the settings and `request`.
    fn evaluate(&mut self, request: &Request) -> Verdict;
}

#[doc(hidden)]
pub fn make<P: Policy>(settings: P::Settings, here: Option<Node>) -> Result<P, Vec<SettingError>> {
    P::new(settings, here)
}

impl Verdict {
    /// No opinion: others decide, at last admission.
    pub fn abstain() -> Self {
        Self::of(Decision::Abstain)
    }

    /// Trusted as `grant` says, and never more than admission gives.
    pub fn allow(grant: Grant) -> Self {
        Self::of(Decision::Allow(grant))
    }

    /// Refused for `time`, from a second to a day. `code`: kebab-case, at most 64 bytes; `message`: at most 256 bytes.
    pub fn deny(time: Duration, code: &str, message: &str) -> Self {
        Self {
            reason: Some(Reason { code: code.into(), message: message.into() }),
            ..Self::of(Decision::Deny(milliseconds(time)))
        }
    }

    fn of(decision: Decision) -> Self {
        Self { decision, reason: None, hints: Vec::new() }
    }
}

impl Grant {
    /// Up to `level`, served without limits, for the longest time there is.
    pub fn all(level: TrustLevel) -> Self {
        Self { level, serve: true, max_uploads: None, max_upload_rate: None, ttl: milliseconds(MAX_TTL) }
    }
}

/// The longest time that the host lets a grant stand.
pub const MAX_TTL: Duration = Duration::from_secs(300);

/// The least upload rate that the host takes, in bytes a second: less would be a stall.
pub const MIN_RATE: u64 = 256 << 10;

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Node {
    /// The node's name, unless it is only its own word and `claimed` does not take that; empty names are none.
    pub fn trusted_name(&self, claimed: bool) -> Option<&str> {
        let is_trusted = claimed || self.name_provenance != Provenance::Claimed;
        (is_trusted && !self.name.is_empty()).then_some(self.name.as_str())
    }

    /// The value of a label, unless it is only the node's own word and `claimed` does not take that.
    pub fn trusted_label(&self, key: &str, claimed: bool) -> Option<&str> {
        let mut labels = self.labels.iter().filter(|label| label.key == key);
        let label = labels.find(|label| claimed || label.provenance != Provenance::Claimed)?;
        Some(&label.value)
    }
}

/// Makes the component of a [`trust::Policy`](crate::trust::Policy). Once in a crate, which is a `cdylib`.
#[macro_export]
macro_rules! export_trust_policy {
    ($policy:ty) => {
        $crate::export_policy!($policy, trust, evaluate(Request) -> Verdict, export_trust_bindings);
    };
}

#[cfg(test)]
mod tests {
    use crate::Label;

    use super::*;

    #[test]
    fn what_a_node_says_of_itself_is_taken_only_where_told_to() {
        let label = |provenance, value: &str| Label { key: "zone".into(), value: value.into(), provenance };
        let mut node = Node {
            id: String::new(),
            name: "a".into(),
            name_provenance: Provenance::Claimed,
            version: String::new(),
            labels: vec![label(Provenance::Claimed, "mine"), label(Provenance::Verified, "yours")],
        };
        assert_eq!((node.trusted_name(false), node.trusted_name(true)), (None, Some("a")));
        assert_eq!(
            (node.trusted_label("zone", false), node.trusted_label("rack", true)),
            (Some("yours"), None)
        );
        node.labels.pop();
        assert_eq!(
            (node.trusted_label("zone", false), node.trusted_label("zone", true)),
            (None, Some("mine"))
        );
        (node.name, node.name_provenance) = (String::new(), Provenance::Configured);
        assert_eq!(node.trusted_name(true), None);
    }
}
