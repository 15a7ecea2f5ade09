//! What is wrong on this node, by name, with what to do about it: `peili doctor`.
//!
//! Probes look (`probe`), all bounded and none changing anything; a pure judge says what that means (`judge`); manifests mend what can be
//! mended by them (`fix`). "Unknown" is allowed, a wrong cause is not: where two causes look alike both are said.
//!
//! ```text
//! configuration --> probe --facts--> judge --verdicts--> render
//!                                      +--> fix
//! ```

pub mod code;
pub mod facts;
pub mod fix;
pub mod judge;
pub mod place;
mod probe;
mod render;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::{cluster, configure, election, store};
use code::{Code, Confidence, Severity};
use fix::Manifest;
use place::Place;

/// Causes that are named beside the first one.
pub const CAUSES: usize = 2;

/// What is looked at, and how it is configured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// `kubernetes`
    pub cluster: cluster::Config,
    /// `election`
    pub election: election::Config,
    /// `network.dns`
    pub dns: Vec<String>,
    /// `store`
    pub store: store::Config,
    /// `node.name`
    pub node: String,
    /// `node.pod-labels`
    pub pod_labels: PathBuf,
    /// Where the mirror that runs here is asked; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Ports that policies of the network have to let through.
    pub ports: Ports,
    /// How `peili configure --check` looks at the runtime.
    pub configure: configure::Options,
}

/// Ports that policies of the network have to let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Of `network.listen` and `transfer.listen`, and those at which peers are looked for.
    pub peers: Vec<u16>,
    /// Of `admin.listen`, where that is no loopback.
    pub metrics: Option<u16>,
    /// Of the API server and of registries.
    pub out: Vec<u16>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Of this form. Fields are only ever added; a change of meaning is a new version.
    pub version: u32,
    /// Where this ran.
    pub place: Place,
    /// What is wrong, the worst first.
    pub verdicts: Vec<Verdict>,
    /// What was looked at and is well, or was not looked at and why; one line each.
    pub seen: Vec<String>,
    /// How long it took.
    pub millis: u64,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Which.
    pub code: Code,
    /// Whether something has to be done.
    pub severity: Severity,
    /// How sure it is.
    pub confidence: Confidence,
    /// In one sentence.
    pub text: String,
    /// What was seen.
    pub evidence: Vec<String>,
    /// What else it could be, the likelier first; at most [`CAUSES`].
    pub other_causes: Vec<String>,
    /// What to do.
    pub fix: String,
    /// What to apply.
    pub manifests: Vec<Manifest>,
}

impl Verdict {
    /// As [`Code::meaning`] has it, and as sure as it can be of this code.
    fn new(code: Code, confidence: Confidence, fix: impl Into<String>) -> Self {
        let most = if code.is_proved() { Confidence::High } else { Confidence::Low };
        Self {
            code,
            severity: code.severity(),
            confidence: confidence.min(most),
            text: code.meaning().to_owned(),
            evidence: Vec::new(),
            other_causes: Vec::new(),
            fix: fix.into(),
            manifests: Vec::new(),
        }
    }

    fn seen(mut self, evidence: impl Into<String>) -> Self {
        self.evidence.push(evidence.into());
        self
    }

    fn or(mut self, cause: &str) -> Self {
        if self.other_causes.len() < CAUSES {
            self.other_causes.push(cause.to_owned());
        }
        self
    }

    fn apply(mut self, manifests: impl IntoIterator<Item = Manifest>) -> Self {
        self.manifests.extend(manifests);
        self
    }
}

impl Report {
    /// Of what is written here.
    pub const VERSION: u32 = 1;

    /// The worst; `None`: there is nothing.
    pub fn severity(&self) -> Option<Severity> {
        self.verdicts.iter().map(|verdict| verdict.severity).max()
    }

    /// For people.
    pub fn render(&self) -> String {
        render::render(self)
    }
}

/// Looks, and judges. Ends within ten seconds whatever is wrong.
pub async fn examine(subject: &Subject) -> Report {
    let start = tokio::time::Instant::now();
    let facts = probe::look(subject).await;
    let (verdicts, seen) = judge::judge(&facts, &subject.ports);
    Report { version: Report::VERSION, place: facts.place, verdicts, seen, millis: millis(start.elapsed()) }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
