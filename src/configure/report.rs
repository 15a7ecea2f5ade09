//! What is said about a node: findings, changes and their diffs, for people and for scripts.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;

use super::find::Node;

/// Lines of context in a diff, as diff(1) has them.
const CONTEXT: usize = 3;

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Which one.
    pub code: Code,
    /// What is so.
    pub text: String,
    /// What to do about it.
    pub fix: Option<String>,
}

/// The kinds of findings. Their names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// A registry is not set up as asked for.
    NotSetUp,
    /// The distribution writes the folder itself and takes Peili out again.
    Owned,
    /// containerd reads no hosts.toml, or none in these folders.
    ConfigPath,
    /// `config_path` names several folders, which the transfer service takes for one.
    ConfigPathList,
    /// `registry.mirrors` excludes `config_path`.
    Mirrors,
    /// CRI is switched off.
    CriDisabled,
    /// A certificate or a key that a hosts.toml names is not there: containerd fails the pull.
    MissingFile,
    /// A registry has a folder of its own, so that `_default` does not count for it.
    Shadowed,
    /// Layers are forgotten once they are unpacked.
    Discard,
    /// k3s' and RKE2's own mirror is on.
    EmbeddedMirror,
    /// containerd 1.x takes a plugin's settings from the last file only.
    Imports,
    /// containerd 1.6 and 1.7 read no `]` in a table's name.
    Ipv6,
    /// Pulls depend on Peili.
    Only,
    /// What a policy denies, the runtime gets from the registry.
    Advisory,
    /// containerd 1.6 and 1.7 ignored this file so far.
    Ignored,
    /// Peili itself is configured for another containerd.
    Settings,
}

/// What happens, or would happen, to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is new.
    Create,
    /// It was there.
    Change,
    /// It gets back what it had before Peili.
    Restore,
    /// Peili's entry is taken out; other changes stay.
    Strip,
    /// It was made for Peili and goes.
    Remove,
    /// It is as it was, or gone; only the record of it is removed.
    Forget,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// The file, as the host names it.
    pub path: PathBuf,
    /// What happens to it.
    pub action: Action,
    /// More about it.
    pub note: Option<String>,
    /// Unified diff; empty if the text stays.
    pub diff: String,
}

/// What was found, and what was done or would be.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The node's containerd; `None` where it does not matter.
    pub node: Option<Node>,
    /// Files, in order.
    pub changes: Vec<Change>,
    /// Registries for which nothing had to be changed.
    pub unchanged: Vec<String>,
    /// What was found.
    pub findings: Vec<Finding>,
    /// Whether pulls of all that was asked for come to Peili first, and will.
    pub ready: bool,
}

impl Code {
    /// Whether pulls do not come to Peili, or will not any more.
    pub fn stops(self) -> bool {
        match self {
            Self::NotSetUp
            | Self::Owned
            | Self::ConfigPath
            | Self::ConfigPathList
            | Self::Mirrors
            | Self::CriDisabled
            | Self::MissingFile => true,
            Self::Shadowed
            | Self::Discard
            | Self::EmbeddedMirror
            | Self::Imports
            | Self::Ipv6
            | Self::Only
            | Self::Advisory
            | Self::Ignored
            | Self::Settings => false,
        }
    }
}

impl Action {
    fn verb(self, done: bool) -> &'static str {
        match (self, done) {
            (Self::Create, true) => "wrote",
            (Self::Create, false) => "would write",
            (Self::Change, true) => "changed",
            (Self::Change, false) => "would change",
            (Self::Restore, true) => "restored",
            (Self::Restore, false) => "would restore",
            (Self::Strip, true) => "took Peili out of",
            (Self::Strip, false) => "would take Peili out of",
            (Self::Remove, true) => "removed",
            (Self::Remove, false) => "would remove",
            (Self::Forget, true) => "left",
            (Self::Forget, false) => "would leave",
        }
    }
}

impl Report {
    pub(super) fn new(node: Option<Node>) -> Self {
        let findings = node.as_ref().map(|node| node.findings.clone()).unwrap_or_default();
        Self { node, changes: Vec::new(), unchanged: Vec::new(), findings, ready: false }
    }

    pub(super) fn add(&mut self, code: Code, text: String, fix: Option<String>) {
        let finding = Finding { code, text, fix };
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// For people. `done`: the changes were made.
    pub fn render(&self, done: bool) -> String {
        let mut text = String::new();
        if let Some(node) = &self.node {
            let folders: Vec<_> =
                node.config_path.iter().map(|folder| folder.display().to_string()).collect();
            let folders = if folders.is_empty() { "unset".to_owned() } else { folders.join(":") };
            let _ = writeln!(
                text,
                "{}: socket {}, content {}, config_path {folders}",
                node.distribution.name(),
                node.socket.display(),
                node.content_root.display()
            );
        }
        for change in &self.changes {
            let _ = write!(text, "{} {}", change.action.verb(done), change.path.display());
            if let Some(note) = &change.note {
                let _ = write!(text, ": {note}");
            }
            text.push('\n');
            if !done {
                text.push_str(&change.diff);
            }
        }
        if !self.unchanged.is_empty() {
            let _ = writeln!(text, "set up already: {}", self.unchanged.join(", "));
        }
        for finding in &self.findings {
            let kind = if finding.code.stops() { "problem" } else { "warning" };
            let _ = writeln!(text, "{kind}: {}", finding.text);
            if let Some(fix) = &finding.fix {
                let _ = writeln!(text, "  hint: {}", fix.replace('\n', "\n  "));
            }
        }
        text
    }
}

/// A unified diff of one file; empty if the texts are the same.
pub(super) fn diff(path: &std::path::Path, old: Option<&str>, new: Option<&str>) -> String {
    if old == new {
        return String::new();
    }
    let name = path.display().to_string();
    let header = |side: &str, text: Option<&str>| {
        if text.is_some() { format!("{side}{name}") } else { "/dev/null".to_owned() }
    };
    let (old_name, new_name) = (header("a", old), header("b", new));
    let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
    similar::TextDiff::from_lines(old, new)
        .unified_diff()
        .context_radius(CONTEXT)
        .header(&old_name, &new_name)
        .to_string()
}
