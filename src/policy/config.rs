//! What an operator says about policies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files;

/// The policies of each world, in the order in which they are asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Asked about each manifest and blob, for the runtime and for peers. Any denial wins; otherwise the first that mirrors or
    /// bypasses; if all abstain, Peili decides as without policies.
    pub registry: Vec<Plugin>,
    /// Asked about each peer that proved itself, and again when its facts change or its grant ends. Any denial wins; of grants
    /// the strictest of each limit; if all abstain, admission alone decides. Never more than admission gives.
    pub trust: Vec<Plugin>,
    /// Asked who is to lead, about each role whenever what is known of the candidates changes. Whom one excludes does not lead, the
    /// weights of all add up; if all abstain, or one fails, all candidates are equal. All nodes need the same policies with the
    /// same settings: until most of them have, all candidates are equal too.
    pub election: Vec<Plugin>,
    /// What a node does that starts and cannot load its policies.
    pub startup: Startup,
    /// Folders that files of policies are read from: all beneath one of them are of one state of it. Empty: the folders of the
    /// files, without those that are beneath another.
    pub roots: Vec<PathBuf>,
    /// How many of a hundred recent requests a changed set may answer otherwise. One that changes more, or fails on any of
    /// them, is not taken over unless `accept` names it. 0 to 100.
    pub max_change: u8,
    /// The revision of the set that is taken over all the same, as its refusal names it. Empty: none.
    pub accept: String,
    /// A log of decisions that can be replayed. None: they are not recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decisions: Option<Decisions>,
}

/// Where decisions are recorded: one JSON object a line, with the whole question and what each policy said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Decisions {
    /// The file, which only its owner may read. The one before it has `.1` after its name.
    pub path: PathBuf,
    /// Of both files together: 64KiB to 16GiB.
    #[serde(default = "max_size")]
    #[schemars(with = "String")]
    pub max_size: ByteSize,
    /// What a policy denies, or does not answer, is always recorded; of the rest one in so many. 1: all. 0: none.
    #[serde(default = "sample")]
    pub sample: u32,
}

fn max_size() -> ByteSize {
    ByteSize::mib(16)
}

fn sample() -> u32 {
    100
}

impl Default for Config {
    fn default() -> Self {
        Self {
            registry: Vec::new(),
            trust: Vec::new(),
            election: Vec::new(),
            startup: Startup::default(),
            roots: Vec::new(),
            max_change: 20,
            accept: String::new(),
            decisions: None,
        }
    }
}

/// What a node does that has never loaded its policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Startup {
    /// It works with their failure verdicts, and says so.
    #[default]
    Degrade,
    /// The same, but it is not ready, with the reason; a rollout stops at it.
    Require,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Plugin {
    /// Its name in log, status and metrics: lower-case letters, digits and `-`.
    pub name: String,
    /// The component: a `.wasm` file of at most 4 MiB.
    pub path: PathBuf,
    /// SHA-256 that the file must have, in hexadecimal. Without it any content of the file is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What it is configured with, as its own documentation says.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub settings: serde_json::Value,
    /// Whether its verdicts count.
    #[serde(default)]
    pub mode: Mode,
    /// Its verdict where it does not answer. Of the registry world only: of the trust world a peer keeps the grant that it
    /// has until that ends, and newcomers get nothing; of the election world all candidates are equal.
    #[serde(default)]
    pub failure: Failing,
    /// Where the settings were said.
    #[serde(skip)]
    pub lines: Lines,
    /// A file of cases, as `peili plugin test` reads them: what fails one of them with these settings is not taken over. At most
    /// 1 MiB and 1,000 cases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cases: Option<PathBuf>,
}

/// The lines in which settings were said, by pointer (RFC 6901).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lines(BTreeMap<String, u64>);

impl Lines {
    /// From all that are known.
    pub fn new(lines: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self(lines.into_iter().collect())
    }

    /// Of what `pointer` leads to, or of the nearest part above it that was said.
    pub(super) fn of(&self, pointer: &str) -> Option<u64> {
        let mut above = Some(pointer);
        while let Some(pointer) = above {
            if let Some(line) = self.0.get(pointer) {
                return Some(*line);
            }
            above = pointer.rfind('/').map(|slash| &pointer[..slash]);
        }
        None
    }
}

/// Whether verdicts count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// They do.
    #[default]
    Enforce,
    /// They are counted and change nothing.
    Monitor,
}

/// The verdict of a policy that does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Failing {
    /// The request is not Peili's: the runtime goes to the registry itself.
    #[default]
    Bypass,
    /// It is refused.
    Deny,
}

impl Config {
    /// Names of the policies of the registry world whose verdicts count.
    pub fn enforced(&self) -> Vec<String> {
        let enforced = self.registry.iter().filter(|policy| policy.mode == Mode::Enforce);
        enforced.map(|policy| policy.name.clone()).collect()
    }

    /// The policies of all worlds.
    pub(super) fn plugins(&self) -> impl Iterator<Item = &Plugin> {
        self.registry.iter().chain(&self.trust).chain(&self.election)
    }

    /// The folders that files are read from.
    pub(super) fn roots(&self) -> Vec<PathBuf> {
        if self.roots.is_empty() { files::roots(self.files()) } else { self.roots.clone() }
    }

    /// What is read for these policies.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.plugins().flat_map(Plugin::files)
    }
}

impl Plugin {
    /// What is read for it.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.path.as_path()).chain(self.cases.as_deref())
    }
}

/// Settings as JSON; `{}` where there are none.
pub(super) fn json(settings: &serde_json::Value) -> String {
    if settings.is_null() { "{}".into() } else { settings.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_line_is_named() {
        let lines = Lines::new([(String::new(), 5), ("/allow".into(), 6), ("/allow/1".into(), 8)]);
        for (pointer, line) in [("/allow/1", 8), ("/allow/0", 6), ("/allow/1/a", 8), ("/deny", 5), ("", 5)] {
            assert_eq!(lines.of(pointer), Some(line), "{pointer}");
        }
        assert_eq!(Lines::default().of("/allow"), None);
    }
}
