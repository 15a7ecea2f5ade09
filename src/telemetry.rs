//! Logs and the metrics registry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the process logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Filter in the form of `tracing`: `info`, or `info,peili::network=debug`.
    pub level: String,
    /// Form of a line.
    pub format: Format,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `text` on a terminal, else `json`.
    Auto,
    /// For people.
    Text,
    /// One object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Auto }
    }
}
