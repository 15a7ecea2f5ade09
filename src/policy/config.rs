//! What an operator says about policies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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
    /// Files that it gets beside its settings, by name: lists that somebody else keeps, or that are long. At most 8, of 1 MiB each. They are
    /// read and followed as the component is: another content is another set of policies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Data>,
    /// What it may use.
    #[serde(default, skip_serializing_if = "Limits::are_default")]
    pub limits: Limits,
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

/// A file for a policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Data {
    /// By which the policy asks for it: lower-case letters, digits and `-`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// SHA-256 that it must have, in hexadecimal. Without it any content is taken, also a file that was half written and left so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What it has, where no file is read for it: cases bring their own.
    #[serde(skip)]
    pub content: Option<Arc<[u8]>>,
}

/// Files of one policy.
pub const DATA_FILES: usize = 8;
/// One of them, in bytes: a ConfigMap has no more.
pub(super) const DATA_SIZE: u64 = 1 << 20;

/// What a policy may use of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// What an answer may take at most, of the time that its chain has: 1ms to 10ms, in the election world to 20ms. Left out: its share of
    /// what is left. Ten times that where policies are interpreted.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub time: Option<Duration>,
    /// Memory of an instance, of which up to 16 are kept: 1MiB to 64MiB.
    #[schemars(with = "String")]
    pub memory: ByteSize,
    /// What a verdict, or a line for the log, may take at most: 1KiB to 64KiB.
    #[schemars(with = "String")]
    pub verdict: ByteSize,
    /// Lines a second that it may write into the log, after a burst of 32: 0 (none at all) to 100.
    pub log: u32,
}

impl Limits {
    /// What the policies of a chain have together.
    pub const TIME_MAX: Duration = Duration::from_millis(10);
    /// The same of the election world.
    pub const ELECTION_TIME_MAX: Duration = Duration::from_millis(20);
    /// Shortest time that can be told from none.
    pub const TIME_MIN: Duration = Duration::from_millis(1);
    /// Least and most memory.
    pub const MEMORY: (ByteSize, ByteSize) = (ByteSize::mib(1), ByteSize::mib(64));
    /// Least and most of a verdict; the most is the contract's.
    pub const VERDICT: (ByteSize, ByteSize) = (ByteSize::kib(1), ByteSize::kib(64));
    /// Most lines a second.
    pub const LOG_MAX: u32 = 100;
    /// Where nothing is said. The ranking profile names the memory.
    pub(super) const DEFAULT: Self =
        Self { time: None, memory: ByteSize::mib(16), verdict: Self::VERDICT.1, log: 10 };

    fn are_default(&self) -> bool {
        *self == Self::DEFAULT
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
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
    /// With nothing but a name, a component and settings.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, settings: serde_json::Value) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            sha256: None,
            settings,
            data: Vec::new(),
            limits: Limits::DEFAULT,
            mode: Mode::default(),
            failure: Failing::default(),
            lines: Lines::default(),
            cases: None,
        }
    }

    /// What is read for it.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let data = self.data.iter().filter(|data| data.content.is_none()).map(|data| data.path.as_path());
        std::iter::once(self.path.as_path()).chain(self.cases.as_deref()).chain(data)
    }

    /// What the file must hash to, if that is said.
    pub(super) fn pin(&self, file: &Path) -> Option<&str> {
        let own = (self.path == file).then_some(&self.sha256);
        let data = self.data.iter().filter(|data| data.path == file).map(|data| &data.sha256);
        own.into_iter().chain(data).find_map(Option::as_deref)
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
