//! What a Peili policy is written with: a trait for each world, the types of the contract, and matchers.
//!
//! The contract is `wit/policy.wit`, where each type and field is explained; what stands here is its Rust form. A policy is a
//! type with settings and one function that decides. It sees what is in the request and nothing else: no clock, no network, and
//! no files but those that the configuration gives it ([`data`]). Each instance is configured once and then asked many times, so what is costly belongs into `new`; but an
//! instance may be thrown away at any time, so nothing that matters may be kept in it.
//!
//! ```
//! use peili_policy::registry::{Policy, Request, Verdict};
//! use peili_policy::{Node, SettingError};
//! use serde::Deserialize;
//!
//! /// Refuses one registry.
//! struct Refuse(String);
//!
//! #[derive(Deserialize)]
//! struct Settings {
//!     registry: String,
//! }
//!
//! impl Policy for Refuse {
//!     type Settings = Settings;
//!
//!     fn new(settings: Settings, _here: Option<Node>) -> Result<Self, Vec<SettingError>> {
//!         Ok(Self(settings.registry))
//!     }
//!
//!     fn summary(&self) -> String {
//!         format!("refuses {}", self.0)
//!     }
//!
//!     fn decide(&mut self, request: &Request) -> Verdict {
//!         if request.registry == self.0 {
//!             Verdict::deny("refused", "this registry is not used here")
//!         } else {
//!             Verdict::abstain()
//!         }
//!     }
//! }
//!
//! peili_policy::export_registry_policy!(Refuse);
//! # fn main() {}
//! ```

#[allow(
    missing_docs,
    unsafe_code,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::unwrap_used,
    reason = "generated; the documentation is in the contract"
)]
#[doc(hidden)]
pub mod contract;
pub mod data;
pub mod election;
mod globs;
mod host;
pub mod registry;
pub mod trust;

pub use contract::exports::peili::policy::lifecycle::{PolicyInfo, SettingError};
pub use contract::peili::policy::logging::Level as LogLevel;
pub use contract::peili::policy::types::{Attribute, Label, Node, Provenance, Reason, TrustLevel};
pub use globs::{GlobError, Globs};
pub use host::log;
#[doc(hidden)]
pub use host::{Slot, configure};
