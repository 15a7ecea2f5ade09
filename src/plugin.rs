//! Tools for authors of policies: `peili plugin`.
//!
//! Builds a component from a crate, and looks at one as a node would that loads it. It runs no node.

mod bench;
mod build;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::oci::Digest;
use crate::policy::{self, Policies};

pub use bench::{Measured, bench};
pub use build::{BuildError, build};

/// A component, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Component {
    /// Its file.
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
    /// In hexadecimal, as the configuration pins it.
    pub sha256: String,
    /// What it says of itself once it is configured; none: it was not.
    pub summary: Option<String>,
}

impl Component {
    fn of(path: &Path, bytes: &[u8]) -> Self {
        Self {
            path: path.to_owned(),
            size: bytes.len() as u64,
            sha256: Digest::sha256(bytes).hex(),
            summary: None,
        }
    }
}

/// Loads `path` with `settings` as a node would, and tells what it is.
///
/// # Errors
/// Why a node would not take it.
pub fn check(path: &Path, settings: serde_json::Value) -> Result<Component, policy::LoadError> {
    let policies = load(path, settings)?;
    let size = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let loaded = policies.loaded().into_iter().next();
    let (sha256, summary) = loaded.map(|loaded| (loaded.sha256, loaded.summary)).unzip();
    Ok(Component { path: path.to_owned(), size, sha256: sha256.unwrap_or_default(), summary })
}

/// A chain of this policy alone.
fn load(path: &Path, settings: serde_json::Value) -> Result<Policies, policy::LoadError> {
    let plugin = policy::Plugin {
        name: "policy".into(),
        path: path.to_owned(),
        sha256: None,
        settings,
        mode: policy::Mode::default(),
        failure: policy::Failing::default(),
    };
    let policies = Policies::new(policy::Node::default(), policy::metrics::Metrics::default());
    policies.apply(&policy::Config { registry: vec![plugin] })?;
    Ok(policies)
}
