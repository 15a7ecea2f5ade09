//! The `registry-policy` world: what is mirrored, from where and for whom.

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
    include!("../bindings/registry.rs");
}

pub use bindings::exports::peili::policy::registry::{
    Availability, Decision, Descriptor, Health, Operation, Peer, Plan, Reference, Request, Requester, Route,
    Source, SourceKinds, TagResolution, Upstream, Verdict,
};

use crate::{Node, Reason, SettingError};

/// A policy of the `registry-policy` world; [`export_registry_policy!`](crate::export_registry_policy) makes a component of it.
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

    /// The verdict about one request. Must depend on nothing but the settings and `request`.
    fn decide(&mut self, request: &Request) -> Verdict;
}

#[doc(hidden)]
pub fn make<P: Policy>(settings: P::Settings, here: Option<Node>) -> Result<P, Vec<SettingError>> {
    P::new(settings, here)
}

impl Verdict {
    /// No opinion: others decide, at last the host.
    pub fn abstain() -> Self {
        Self::of(Decision::Abstain)
    }

    /// Peili keeps out of it: the runtime goes to the registry itself, and a peer is not served.
    pub fn bypass() -> Self {
        Self::of(Decision::Bypass)
    }

    /// Mirrored as `plan` says.
    pub fn mirror(plan: Plan) -> Self {
        Self::of(Decision::Mirror(plan))
    }

    /// Refused. `code`: kebab-case, at most 64 bytes; `message`: at most 256 bytes, shown to who asks.
    pub fn deny(code: &str, message: &str) -> Self {
        Self {
            reason: Some(Reason { code: code.into(), message: message.into() }),
            ..Self::of(Decision::Deny)
        }
    }

    fn of(decision: Decision) -> Self {
        Self { decision, reason: None, hints: Vec::new() }
    }
}

impl Plan {
    /// The host's own plan, without a constraint.
    pub fn any() -> Self {
        Self {
            sources: None,
            forbidden: SourceKinds::empty(),
            tag_resolution: None,
            max_tag_age: None,
            min_trust: None,
            always_verify: false,
            max_fan_out: None,
        }
    }
}

impl Request {
    /// `registry/repository`, as in an image's name.
    pub fn name(&self) -> String {
        [self.registry.as_str(), &self.repository].join("/")
    }
}

/// Makes the component of a [`registry::Policy`](crate::registry::Policy). Once in a crate, which is a `cdylib`.
#[macro_export]
macro_rules! export_registry_policy {
    ($policy:ty) => {
        $crate::export_policy!($policy, registry, decide(Request) -> Verdict, export_registry_bindings);
    };
}
