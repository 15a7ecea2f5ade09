//! `peili plugin test`, `run` and `diff`: questions, with the answers that an author expects, asked of the real engine.
//!
//! `test` asks each twice of one instance and once of a fresh one, since a verdict must depend on nothing but the settings and
//! the question.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Candidate;
use crate::oci::{Level, PeerId, Reference as Image, ReferenceError};
use crate::policy::metrics::Metrics;
use crate::policy::registry::{Availability, RegistryPolicy, Request as RegistryRequest, Requester};
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
    cases: Vec<Case>,
}

/// A question, and the verdict that is expected.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
struct Case {
    name: String,
    settings: Option<Value>,
    asked: Asked,
    /// As `peili explain` writes it; without the parenthesis, any reason will do.
    expect: String,
}

/// What a case is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Asked {
    /// Registry world: the image whose manifest is asked for; by a peer, where there is one.
    image: Option<String>,
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
}

impl TryFrom<Map<String, Value>> for Case {
    type Error = String;

    /// By hand, since serde cannot refuse unknown keys of what is flattened.
    fn try_from(mut keys: Map<String, Value>) -> Result<Self, String> {
        let mut text = |key: &str| match keys.remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(format!("`{key}` is no text")),
            None => Err(format!("missing field `{key}`")),
        };
        let (name, expect) = (text("name")?, text("expect")?);
        let settings = keys.remove("settings");
        let asked = serde_json::from_value(Value::Object(keys));
        let asked = asked.map_err(|error| format!("case `{name}`: {error}"))?;
        Ok(Self { name, settings, asked, expect })
    }
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
    /// A request that is none.
    #[error("the request: {0}")]
    Request(String),
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

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Answer {
    /// As `peili explain` writes it.
    pub verdict: String,
    /// What it took, in microseconds.
    pub micros: u64,
}

/// A case about which two components say different things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Difference {
    /// Its name.
    pub name: String,
    /// What the old one says.
    pub old: String,
    /// What the new one says.
    pub new: String,
}

/// Policies that are asked the cases of a file.
struct Subject {
    candidate: Candidate,
    is_trust: bool,
    policies: Policies,
}

/// Runs the cases of a file with the component at `path`.
///
/// # Errors
/// They cannot be run; a case that fails is none.
pub fn test(path: &Path, cases: &Path) -> Result<Vec<Tested>, CasesError> {
    let file = read(cases)?;
    let subject = Subject::new(path, &file.here)?;
    let run = |case: &Case| {
        let question = case.question(subject.is_trust)?;
        subject.load(case, &file)?;
        let mut said = [question.ask(&subject.policies), question.ask(&subject.policies), String::new()];
        subject.load(case, &file)?;
        said[2] = question.ask(&subject.policies);
        Ok(case.judge(&said))
    };
    file.cases.iter().map(run).collect()
}

/// Asks two components the cases of a file; `expect` does not count. How many cases there are, and those about which they differ.
///
/// # Errors
/// The cases cannot be run with both: a node would not take one with the settings, or they are of different worlds.
pub fn diff(old: &Path, new: &Path, cases: &Path) -> Result<(usize, Vec<Difference>), CasesError> {
    let file = read(cases)?;
    let (old, new) = (Subject::new(old, &file.here)?, Subject::new(new, &file.here)?);
    let mut differences = Vec::new();
    for case in &file.cases {
        let ask = |subject: &Subject| {
            subject.load(case, &file)?;
            Ok::<_, CasesError>(case.question(subject.is_trust)?.ask(&subject.policies))
        };
        let (old, new) = (ask(&old)?, ask(&new)?);
        if old != new {
            differences.push(Difference { name: case.name.clone(), old, new });
        }
    }
    Ok((file.cases.len(), differences))
}

/// Asks the component at `path` one request: the keys of a case, as YAML or JSON, without `name`, `settings` and `expect`.
///
/// # Errors
/// The request is none, or a node would not take the component with the settings.
pub fn run(path: &Path, settings: Value, request: &str) -> Result<Answer, CasesError> {
    let asked: Asked =
        serde_saphyr::from_str(request).map_err(|error| CasesError::Request(error.to_string()))?;
    let subject = Subject::new(path, &Who::default())?;
    let question = asked.question(subject.is_trust).map_err(CasesError::Request)?;
    let loaded = subject.policies.apply(&subject.candidate.alone(settings));
    loaded.map_err(|error| CasesError::Load { case: "the request".into(), error })?;
    let said = question.said(&subject.policies);
    let Said { verdict, micros, .. } =
        said.ok_or_else(|| CasesError::Request("the policy was not asked".into()))?;
    Ok(Answer { verdict, micros })
}

impl Subject {
    fn new(path: &Path, here: &Who) -> Result<Self, CasesError> {
        let candidate = Candidate::read(path);
        let is_trust = match candidate.world() {
            Some("registry") => false,
            Some("trust") => true,
            _ => return Err(CasesError::World(path.to_owned())),
        };
        let policies = Policies::new(here.node("here", Provenance::Configured), Metrics::default());
        Ok(Self { candidate, is_trust, policies })
    }

    /// A fresh instance with the settings of a case.
    fn load(&self, case: &Case, file: &File) -> Result<(), CasesError> {
        let settings = case.settings.as_ref().unwrap_or(&file.settings);
        let loaded = self.policies.apply(&self.candidate.alone(settings.clone()));
        loaded.map_err(|error| CasesError::Load { case: case.name.clone(), error })
    }
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

impl Asked {
    /// The question of a component of a world, or what is missing for it.
    fn question(&self, is_trust: bool) -> Result<Question, String> {
        let node =
            |who: &Who| who.node("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", Provenance::Claimed);
        if is_trust {
            let peer = self.peer.as_ref().ok_or("it names no `peer`")?;
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
        let image = self.image.as_ref().ok_or("it names no `image`")?;
        let image: Image = image.parse().map_err(|error: ReferenceError| error.to_string())?;
        let requester = match &self.peer {
            Some(peer) => Requester::Peer(node(peer), self.level),
            None => Requester::Runtime,
        };
        let availability = Availability { local: self.peer.is_some(), peers: 0 };
        Ok(Question::Registry(RegistryRequest::manifest(&image, requester, availability)))
    }
}

impl Case {
    fn question(&self, is_trust: bool) -> Result<Question, CasesError> {
        let asked = self.asked.question(is_trust);
        asked.map_err(|reason| CasesError::Case { case: self.name.clone(), reason })
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
        self.said(policies).map(|said| said.verdict).unwrap_or_default()
    }

    fn said(&self, policies: &Policies) -> Option<Said> {
        let said = match self {
            Self::Registry(request) => RegistryPolicy::explain(policies, request).1,
            Self::Trust(request) => TrustPolicy::explain(policies, request).1,
        };
        said.into_iter().next()
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

/// Lines for people.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DIFFERS {}\n  old  {}\n  new  {}", self.name, self.old, self.new)
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
