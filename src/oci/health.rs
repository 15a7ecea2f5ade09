//! How a registry does that this node asks itself: what who asks it finds out, and policies are told.

use serde::{Deserialize, Serialize};

/// How an upstream does (`health` of `wit/policy.wit`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// It was not asked yet, or not since it failed.
    #[default]
    Unknown,
    /// Its last request was answered.
    Healthy,
    /// It answers, but not as it should.
    Degraded,
    /// It asked for a pause.
    RateLimited,
    /// It cannot be reached.
    Unreachable,
}
