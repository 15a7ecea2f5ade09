//! Tools for authors of policies: `peili plugin`.
//!
//! Builds a component from a crate, looks at one as a node would that loads it, asks it what its author expects answers to,
//! and measures it. It runs no node.

mod bench;
mod build;
mod cases;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::oci::Digest;
use crate::policy::{self, Policies};

pub use crate::policy::cases::Tested;
pub use bench::{Measured, bench};
pub use build::{BuildError, build};
pub use cases::{CasesError, test};

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
    /// What it decides about: `registry` or `trust`.
    pub world: Option<String>,
    /// What it says of itself once it is configured; none: it was not.
    pub summary: Option<String>,
}

impl Component {
    fn of(path: &Path, bytes: &[u8]) -> Self {
        Self {
            path: path.to_owned(),
            size: bytes.len() as u64,
            sha256: Digest::sha256(bytes).hex(),
            world: policy::world(bytes).map(Into::into),
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
    Ok(Component {
        path: path.to_owned(),
        size,
        sha256: loaded.as_ref().map(|loaded| loaded.sha256.clone()).unwrap_or_default(),
        world: loaded.as_ref().map(|loaded| loaded.world.clone()),
        summary: loaded.map(|loaded| loaded.summary),
    })
}

/// A chain of this policy alone, in the world that it is of.
fn load(path: &Path, settings: serde_json::Value) -> Result<Policies, policy::LoadError> {
    let policies = Policies::new(policy::Node::default(), policy::metrics::Metrics::default());
    policies.apply(&alone(path, settings, world(path) == Some("trust")))?;
    Ok(policies)
}

/// What the component at `path` decides about. That it cannot be read, or is of no world, is an error of loading it.
fn world(path: &Path) -> Option<&'static str> {
    std::fs::read(path).ok().and_then(|bytes| policy::world(&bytes))
}

fn alone(path: &Path, settings: serde_json::Value, is_trust: bool) -> policy::Config {
    let plugin = policy::Plugin {
        name: "policy".into(),
        path: path.to_owned(),
        sha256: None,
        settings,
        mode: policy::Mode::default(),
        failure: policy::Failing::default(),
        cases: None,
    };
    let (registry, trust) = if is_trust { (vec![], vec![plugin]) } else { (vec![plugin], vec![]) };
    policy::Config { registry, trust, ..policy::Config::default() }
}
