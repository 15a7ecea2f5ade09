//! `peili plugin test`: questions with the answers that an author expects, asked of the real engine.
//!
//! Each is asked twice of one instance and once of a fresh one, since a verdict must depend on nothing but the settings and
//! the question.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::oci::{Level, PeerId, Reference as Image, ReferenceError};
use crate::policy::metrics::Metrics;
use crate::policy::registry::{
    Availability, Health, RegistryPolicy, Request as RegistryRequest, Requester, Upstream,
};
use crate::policy::trust::{Conduct, Evidence, Request as TrustRequest, TrustPolicy};
use crate::policy::{self, LoadError, Node, Policies, Provenance, Said};

/// Largest file of cases, in bytes.
const SIZE_LIMIT: u64 = 4 << 20;

/// A file of cases.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    /// The node that asks.
    #[serde(default)]
    here: Who,
    /// Of all cases that have none of their own.
    #[serde(default)]
    settings: Value,
    /// Registry world: those of the configuration, for all cases that have none of their own.
    #[serde(default)]
    upstreams: Vec<Known>,
    cases: Vec<Case>,
}

/// A question, and the verdict that is expected.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Case {
    name: String,
    settings: Option<Value>,
    /// Registry world: the image whose manifest is asked for; by a peer, where there is one.
    image: Option<String>,
    upstreams: Option<Vec<Known>>,
    /// Registry world: who asks, if not the runtime. Trust world: who is judged.
    peer: Option<Who>,
    #[serde(default)]
    level: Level,
    #[serde(default)]
    observed: Vec<IpAddr>,
    #[serde(default)]
    evidence: Vec<Method>,
    #[serde(default)]
    conduct: Seen,
    /// As `peili explain` writes it; without the parenthesis, any reason will do.
    expect: String,
}

/// An upstream, and how it does.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Known {
    name: String,
    repositories: Vec<String>,
    #[serde(default)]
    health: Health,
}

/// A node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Who {
    id: Option<PeerId>,
    name: String,
    zone: String,
    version: String,
    /// Whether name and zone are checked, and not its own word.
    verified: bool,
}

/// What a peer proved.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    ClusterKey,
    PeerIdList,
}

/// What was seen of a peer.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Seen {
    bytes: u64,
    digest_mismatches: u32,
    timeouts: u32,
    protocol_errors: u32,
    seconds_since_last_fault: Option<u64>,
}

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Tested {
    /// Its name.
    pub name: String,
    /// What was expected.
    pub expected: String,
    /// What was said.
    pub said: String,
    /// Whether that is the same.
    pub passed: bool,
}

/// Why the cases cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum CasesError {
    /// The file of cases cannot be read.
    #[error("cannot read {}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The component is of no world, or of one that has no cases.
    #[error("{} is no policy of the registry or the trust world", .0.display())]
    World(PathBuf),
    /// A case that is none.
    #[error("case `{case}`: {reason}")]
    Case {
        /// Which.
        case: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A node would not take the component with the settings of a case.
    #[error("case `{case}`: {error}")]
    Load {
        /// Which.
        case: String,
        /// Why.
        error: LoadError,
    },
}

/// What is asked.
enum Question {
    Registry(RegistryRequest),
    Trust(TrustRequest),
}

/// Runs the cases of a file with the component at `path`.
///
/// # Errors
/// They cannot be run; a case that fails is none.
pub fn test(path: &Path, cases: &Path) -> Result<Vec<Tested>, CasesError> {
    let file = read(cases)?;
    let is_trust = match super::world(path) {
        Some("registry") => false,
        Some("trust") => true,
        _ => return Err(CasesError::World(path.to_owned())),
    };
    let policies = Policies::new(file.here.node("here", Provenance::Configured), Metrics::default());
    let mut tested = Vec::new();
    for case in &file.cases {
        let question = case.question(is_trust, &file.upstreams)?;
        let settings = case.settings.as_ref().unwrap_or(&file.settings);
        let config = super::alone(path, settings.clone(), is_trust);
        let load = || {
            let loaded = policies.apply(&config);
            loaded.map_err(|error| CasesError::Load { case: case.name.clone(), error })
        };
        load()?;
        let mut said = [question.ask(&policies), question.ask(&policies), String::new()];
        load()?;
        said[2] = question.ask(&policies);
        tested.push(case.judge(&said));
    }
    Ok(tested)
}

fn read(path: &Path) -> Result<File, CasesError> {
    use std::io::Read as _;
    let wrong = |reason: String| CasesError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut text = String::new();
    file.take(SIZE_LIMIT + 1).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > SIZE_LIMIT {
        return Err(wrong("it has more than 4 MiB".into()));
    }
    serde_saphyr::from_str(&text).map_err(|error| wrong(error.to_string()))
}

impl Case {
    fn question(&self, is_trust: bool, upstreams: &[Known]) -> Result<Question, CasesError> {
        let wrong = |reason: &str| CasesError::Case { case: self.name.clone(), reason: reason.to_owned() };
        let node =
            |who: &Who| who.node("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", Provenance::Claimed);
        if is_trust {
            let peer = self.peer.as_ref().ok_or_else(|| wrong("it names no `peer`"))?;
            let methods = self.evidence.iter().map(|method| match method {
                Method::ClusterKey => "cluster-key",
                Method::PeerIdList => "peer-id-list",
            });
            return Ok(Question::Trust(TrustRequest {
                peer: node(peer),
                observed: self.observed.clone(),
                announced: Vec::new(),
                evidence: methods.map(|method| Evidence { method, claims: Vec::new() }).collect(),
                conduct: self.conduct.into(),
                level: self.level,
                now: SystemTime::now(),
            }));
        }
        let image = self.image.as_ref().ok_or_else(|| wrong("it names no `image`"))?;
        let image: Image = image.parse().map_err(|error: ReferenceError| wrong(&error.to_string()))?;
        let requester = match &self.peer {
            Some(peer) => Requester::Peer(node(peer), self.level),
            None => Requester::Runtime,
        };
        let availability = Availability { local: self.peer.is_some(), peers: 0 };
        let upstreams = self.upstreams.as_deref().unwrap_or(upstreams).iter().map(|known| Upstream {
            name: known.name.as_str().into(),
            repositories: known.repositories.clone().into(),
            health: known.health,
            latency: None,
        });
        let request = RegistryRequest::manifest(&image, requester, availability, upstreams.collect());
        Ok(Question::Registry(request))
    }

    /// Compares what was said by one instance, by it again, and by a fresh one.
    fn judge(&self, said: &[String; 3]) -> Tested {
        let [first, again, fresh] = said;
        let is_same = first == again && first == fresh;
        let any_reason = !self.expect.contains('(');
        let without_reason = first.split(" (").next().unwrap_or_default();
        let is_expected = *first == self.expect || (any_reason && without_reason == self.expect);
        let said = if is_same {
            first.clone()
        } else {
            format!("{first}; asked again: {again}; a fresh instance: {fresh}")
        };
        Tested {
            name: self.name.clone(),
            expected: self.expect.clone(),
            said,
            passed: is_same && is_expected,
        }
    }
}

impl Question {
    fn ask(&self, policies: &Policies) -> String {
        let said = match self {
            Self::Registry(request) => RegistryPolicy::explain(policies, request).1,
            Self::Trust(request) => TrustPolicy::explain(policies, request).1,
        };
        said.into_iter().next().map(|Said { verdict, .. }| verdict).unwrap_or_default()
    }
}

impl Who {
    fn node(&self, id: &str, provenance: Provenance) -> Node {
        let provenance = if self.verified { Provenance::Verified } else { provenance };
        Node {
            id: self.id.as_ref().map_or_else(|| id.to_owned(), ToString::to_string),
            name: self.name.clone(),
            name_provenance: provenance,
            version: self.version.clone(),
            labels: policy::zone(&self.zone, provenance),
        }
    }
}

impl From<Seen> for Conduct {
    fn from(seen: Seen) -> Self {
        Self {
            bytes: seen.bytes,
            digest_mismatches: seen.digest_mismatches,
            timeouts: seen.timeouts,
            protocol_errors: seen.protocol_errors,
            since_last_fault: seen.seconds_since_last_fault.map(Duration::from_secs),
        }
    }
}

/// A line for people, with a difference on lines of its own.
impl fmt::Display for Tested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, expected, said, passed } = self;
        if *passed {
            write!(f, "ok      {name}")
        } else {
            write!(f, "FAILED  {name}\n  expected  {expected}\n  said      {said}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(expect: &str, said: [&str; 3]) -> bool {
        let case: Case = serde_json::from_value(serde_json::json!({"name": "a", "expect": expect})).unwrap();
        case.judge(&said.map(str::to_owned)).passed
    }

    #[test]
    fn a_reason_counts_where_it_is_expected() {
        assert!(judged("deny", ["deny (a: b)"; 3]) && judged("deny (a: b)", ["deny (a: b)"; 3]));
        assert!(!judged("deny (a: c)", ["deny (a: b)"; 3]) && !judged("abstain", ["deny (a: b)"; 3]));
    }

    /// Guards that a policy that keeps something between questions is found.
    #[test]
    fn three_answers_must_be_one() {
        assert!(!judged("abstain", ["abstain", "deny", "abstain"]));
        assert!(!judged("abstain", ["abstain", "abstain", "deny"]));
    }
}
