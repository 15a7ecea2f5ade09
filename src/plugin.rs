//! Tools for authors of policies: `peili plugin`.
//!
//! Writes the crate of a new one, builds a component from a crate, looks at one as a node would that loads it, asks it what its
//! author expects answers to, measures it, and says how it gets into a cluster. It runs no node, and asks no cluster.

mod bench;
mod build;
mod cases;
mod manifest;
mod new;
mod replay;
mod vendored;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::oci::Digest;
use crate::policy::{self, Policies};

pub use crate::policy::Data;
pub use crate::policy::cases::Tested;
pub use bench::{BenchError, Measured, Questions, Ratios, Times, bench};
pub use build::{BuildError, build};
pub use cases::{Answer, CasesError, Compared, Difference, diff, run, test};
pub use manifest::{Fit, Manifest, manifest};
pub use new::{Made, NewError, World, new};
pub use replay::{Change, Lines, Replay, ReplayError, Replayed, diff_decisions};

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
    /// What it decides about: `registry`, `trust` or `election`.
    pub world: Option<String>,
    /// The version of the contract that it is built for.
    pub contract: Option<String>,
    /// What it asks of its host.
    pub imports: Vec<String>,
    /// What it says of itself once it is configured; none: it was not.
    pub summary: Option<String>,
    /// The ways into a cluster, and how much each takes.
    pub fits: Vec<Fit>,
}

/// A component from outside, before any of it is compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inspected {
    /// As `check` tells it.
    #[serde(flatten)]
    pub component: Component,
    /// What a host may call.
    pub exports: Vec<String>,
    /// Functions of all its modules.
    pub functions: u32,
    /// Sections that nobody runs, with their sizes in bytes.
    pub sections: std::collections::BTreeMap<String, u64>,
    /// What it says of its package: name, version, description, licence.
    pub package: Option<serde_json::Value>,
    /// The schema of its settings.
    pub settings_schema: Option<serde_json::Value>,
    /// How many questions it carries with the answers that it must give.
    pub cases: Option<usize>,
}

/// Why a component cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The file.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is too large, damaged, or something else.
    #[error("{}: {reason}", path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It is of no world that a node asks.
    #[error("{} is no policy of a world that this Peili has", .0.display())]
    World(PathBuf),
    /// No name of a policy.
    #[error(
        "`{0}` is no name for a ConfigMap\nhint: lower-case letters, digits and dashes; `--name` gives one"
    )]
    Name(String),
}

impl Component {
    fn of(path: &Path, bytes: &[u8]) -> Self {
        let facts = policy::facts(bytes).unwrap_or_default();
        Self {
            path: path.to_owned(),
            size: bytes.len() as u64,
            sha256: Digest::sha256(bytes).hex(),
            world: facts.world.map(Into::into),
            contract: facts.contract,
            imports: facts.imports,
            summary: None,
            fits: manifest::fits(bytes),
        }
    }
}

/// What a component is asked with.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// Its settings.
    pub settings: serde_json::Value,
    /// The files that it gets.
    pub data: Vec<Data>,
}

impl From<serde_json::Value> for Given {
    fn from(settings: serde_json::Value) -> Self {
        Self { settings, data: Vec::new() }
    }
}

impl Given {
    /// The file `path` under this name; it is read when the component is loaded.
    pub fn file(name: &str, path: &Path) -> Data {
        Data { name: name.into(), path: whole(path), sha256: None, content: None }
    }
}

/// A node reads from folders that its configuration names whole; here any way to the file will do.
fn whole(path: &Path) -> PathBuf {
    let whole = std::fs::canonicalize(path).or_else(|_| std::path::absolute(path));
    whole.unwrap_or_else(|_| path.to_owned())
}

/// Text of a component, fit to be printed in one line.
pub fn printable(text: &str) -> String {
    policy::clean(text, 256)
}

/// Loads `path` with what it is given as a node would, and tells what it is.
///
/// # Errors
/// Why a node would not take it.
pub fn check(path: &Path, given: Given) -> Result<Component, policy::LoadError> {
    let candidate = Candidate::read(path);
    let policies = candidate.load(policy::Node::default(), given)?;
    let summary = policies.loaded().into_iter().next().map(|loaded| loaded.summary);
    Ok(Component { summary, ..Component::of(path, &candidate.bytes) })
}

/// Tells what is in the component at `path`. Nothing of it is compiled or run.
///
/// # Errors
/// It cannot be read, or is no component.
pub fn inspect(path: &Path) -> Result<Inspected, InspectError> {
    let bytes = policy::read(path).map_err(|source| InspectError::Read { path: path.to_owned(), source })?;
    let facts =
        policy::facts(&bytes).map_err(|reason| InspectError::Form { path: path.to_owned(), reason })?;
    let form = |reason| InspectError::Form { path: path.to_owned(), reason };
    let embedded = policy::Embedded::of(&bytes).map_err(form)?;
    let json = |text: Option<Vec<u8>>| text.and_then(|text| serde_json::from_slice(&text).ok());
    let cases = embedded.cases.map(|text| policy::cases::File::parse(&text)).transpose();
    let cases = cases.map_err(|reason| form(format!("its own cases: {reason}")))?;
    Ok(Inspected {
        package: json(embedded.package),
        settings_schema: json(embedded.schema),
        cases: cases.map(|file| file.cases.len()),
        component: Component::of(path, &bytes),
        exports: facts.exports,
        functions: facts.functions,
        sections: facts.sections,
    })
}

/// A component that is to be loaded, read once and within bounds. What cannot be read has no bytes: loading says why.
struct Candidate {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Candidate {
    fn read(path: &Path) -> Self {
        let path = whole(path);
        Self { bytes: policy::read(&path).unwrap_or_default(), path }
    }

    /// What it decides about.
    fn world(&self) -> Option<&'static str> {
        policy::world(&self.bytes)
    }

    /// A chain of this policy alone, in the world that it is of.
    fn load(&self, here: policy::Node, given: Given) -> Result<Policies, policy::LoadError> {
        let policies = Policies::new(here, policy::metrics::Metrics::default());
        policies.apply(&self.alone(given))?;
        Ok(policies)
    }

    /// The configuration of such a chain. The file is read again when it is loaded, so these bytes are pinned.
    fn alone(&self, given: Given) -> policy::Config {
        let plugin = policy::Plugin {
            sha256: (!self.bytes.is_empty()).then(|| Digest::sha256(&self.bytes).hex()),
            data: given.data,
            ..policy::Plugin::new("policy", &self.path, given.settings)
        };
        let mut config = policy::Config::default();
        // Of none that can be told: loading says so.
        let world = match self.world() {
            Some("trust") => &mut config.trust,
            Some("election") => &mut config.election,
            _ => &mut config.registry,
        };
        world.push(plugin);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_looked_at_is_what_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.wasm");
        std::fs::write(&path, "one").unwrap();
        let candidate = Candidate::read(&path);
        std::fs::write(&path, "another").unwrap();
        let error = candidate.load(policy::Node::default(), serde_json::json!({}).into()).err().unwrap();
        assert_eq!(error.stage, policy::Stage::Pin, "{error}");
    }

    #[test]
    fn what_is_no_component_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.wasm");
        assert!(matches!(inspect(&path), Err(InspectError::Read { .. })));
        let large = usize::try_from(policy::SIZE_LIMIT).unwrap() + 10;
        for (bytes, part) in [
            (b"text".to_vec(), "no WebAssembly"),
            (b"\0asm\x01\0\0\0".to_vec(), "core module"),
            (vec![0; large], "more than 4 MiB"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = inspect(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            assert!(manifest(&path, None, None, &Given::default()).is_err());
        }
    }
}
