//! Questions with the answers that are expected: what an author writes for `peili plugin test`, and what an operator lets a node
//! ask each policy with its settings before it takes it over.
//!
//! Each is asked twice of one instance and once of a fresh one, since a verdict must depend on nothing but the settings and
//! the question.

mod view;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::view::{Holds, Led, Stands};
use super::chain::Answers as _;
use super::config::json;
use super::election::{Election, View};
use super::engine::{Abi, Policy, Refused};
use super::registry::{Availability, Registry, Request as RegistryRequest, Requester, Upstream};
use super::trust::{Conduct, Evidence, Request as TrustRequest, Trust};
use super::{Failure, Node, Provenance, zone};
use crate::oci::{Health, Level, PeerId, Reference as Image, ReferenceError};

/// Largest file that a node reads, in bytes: a ConfigMap has no more.
pub(super) const SIZE_LIMIT: u64 = 1 << 20;
/// Cases that a node asks of one policy.
const CASES: usize = 1000;
/// For all of them.
const TIME: Duration = Duration::from_secs(5);
/// For one answer: more than a request has, since it is no fault of a policy's if the machine is busy.
const LIMIT: Duration = Duration::from_millis(100);

/// A file of cases.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// The node that asks.
    #[serde(default)]
    here: Who,
    /// Of all cases that have none of their own.
    #[serde(default)]
    pub settings: Value,
    /// Registry world: those of the configuration, for all cases that have none of their own.
    #[serde(default)]
    upstreams: Vec<Known>,
    /// The questions.
    pub cases: Vec<Case>,
}

/// A question, and the verdict that is expected.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Its own settings.
    pub settings: Option<Value>,
    /// The question.
    pub asked: Asked,
    /// As `peili explain` writes it; without the parenthesis, any reason will do.
    expect: String,
}

/// What a case is about.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Asked {
    /// Registry world: the image whose manifest is asked for; by a peer, where there is one.
    image: Option<String>,
    /// Registry world: those of the configuration.
    upstreams: Option<Vec<Known>>,
    /// Those of the file, where it has none of its own.
    #[serde(skip)]
    shared: Arc<[Known]>,
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
    /// Election world: what is led.
    role: Option<Led>,
    /// Election world: who may lead.
    #[serde(default)]
    candidates: Vec<Stands>,
    /// Election world: who leads.
    holder: Option<Holds>,
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

/// A world about which cases can ask.
pub(super) trait Asks: Abi {
    fn question(case: &Case) -> Result<Self::Request, String>;
}

impl Asks for Registry {
    fn question(case: &Case) -> Result<RegistryRequest, String> {
        case.asked.registry()
    }
}

impl Asks for Trust {
    fn question(case: &Case) -> Result<TrustRequest, String> {
        case.asked.trust()
    }
}

impl Asks for Election {
    fn question(case: &Case) -> Result<View, String> {
        case.asked.election()
    }
}

/// Why a policy is not taken over.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Failed {
    pub(super) message: String,
    /// Whether it may pass by itself.
    pub(super) is_passing: bool,
}

/// Asks a policy all that its operator wrote. `configure` makes one with these settings on this node; `settings`: what it is in
/// force with.
pub(super) fn run<W: Asks>(
    file: &File,
    settings: &Value,
    configure: impl Fn(String, &Node) -> Result<Policy<W>, Refused>,
) -> Result<(), Failed> {
    let fails = |message: String| Failed { message, is_passing: false };
    if file.cases.len() > CASES {
        return Err(fails(format!("there are {} cases, more than {CASES}", file.cases.len())));
    }
    let ends = Instant::now() + TIME;
    let here = file.here();
    for case in &file.cases {
        let name = &case.name;
        if Instant::now() >= ends {
            let message = format!("the cases take more than {} s, up to `{name}`", TIME.as_secs());
            return Err(Failed { message, is_passing: true });
        }
        let request = W::question(case).map_err(|reason| fails(format!("case `{name}`: {reason}")))?;
        let whole = if file.settings.is_null() { settings } else { &file.settings };
        let settings = json(case.settings.as_ref().unwrap_or(whole));
        let configured = || {
            configure(settings.clone(), &here).map_err(|refused| Failed {
                message: format!("case `{name}`: {refused}"),
                is_passing: refused.is_passing(),
            })
        };
        let mut is_late = false;
        let mut ask =
            |policy: &Policy<W>| match policy.decide(&request, Instant::now() + LIMIT * policy.pace()) {
                Ok(verdict) => W::describe(&verdict),
                Err(failure) => {
                    is_late |= failure == Failure::Time;
                    format!("failed: {failure}")
                }
            };
        let policy = configured()?;
        let said = [ask(&policy), ask(&policy), ask(&configured()?)];
        let Tested { expected, said, passed, .. } = case.judge(&said);
        if !passed {
            let message = format!("case `{name}`: expected `{expected}`, and it says `{said}`");
            return Err(Failed { message, is_passing: is_late });
        }
    }
    Ok(())
}

impl File {
    /// Reads a file of cases, YAML or JSON.
    ///
    /// # Errors
    /// What is wrong with it, and in which line.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|error| format!("it is no UTF-8 text: {error}"))?;
        let mut file: Self = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        // Shared: a file of many upstreams and many cases would be their product.
        let shared: Arc<[Known]> = std::mem::take(&mut file.upstreams).into();
        for case in &mut file.cases {
            case.asked.shared = Arc::clone(&shared);
        }
        Ok(file)
    }

    /// The node that asks, as policies are told.
    pub fn here(&self) -> Node {
        self.here.node("here", Provenance::Configured)
    }
}

impl Asked {
    /// Reads the keys of a case without `name`, `settings` and `expect`, YAML or JSON.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        serde_saphyr::from_str(text).map_err(|error| error.to_string())
    }

    /// The question to a policy of the registry world.
    ///
    /// # Errors
    /// It is none.
    pub fn registry(&self) -> Result<RegistryRequest, String> {
        let image = self.image.as_ref().ok_or("it names no `image`")?;
        let image: Image = image.parse().map_err(|error: ReferenceError| error.to_string())?;
        let requester = match &self.peer {
            Some(peer) => Requester::Peer(peer.peer(), self.level),
            None => Requester::Runtime,
        };
        let availability = Availability { local: self.peer.is_some(), peers: 0 };
        let upstreams = self.upstreams.as_deref().unwrap_or(&self.shared).iter().map(|known| Upstream {
            name: known.name.as_str().into(),
            repositories: known.repositories.clone().into(),
            health: known.health,
            latency: None,
        });
        Ok(RegistryRequest::manifest(&image, requester, availability, upstreams.collect()))
    }

    /// The question to a policy of the election world.
    ///
    /// # Errors
    /// It is none.
    pub fn election(&self) -> Result<View, String> {
        view::view(self.role.as_ref(), &self.candidates, self.holder.as_ref())
    }

    /// The question to a policy of the trust world.
    ///
    /// # Errors
    /// It is none.
    pub fn trust(&self) -> Result<TrustRequest, String> {
        let peer = self.peer.as_ref().ok_or("it names no `peer`")?;
        let methods = self.evidence.iter().map(|method| match method {
            Method::ClusterKey => "cluster-key",
            Method::PeerIdList => "peer-id-list",
        });
        Ok(TrustRequest {
            peer: peer.peer(),
            observed: self.observed.clone(),
            announced: Vec::new(),
            evidence: methods.map(|method| Evidence { method, claims: Vec::new() }).collect(),
            conduct: self.conduct.into(),
            level: self.level,
            now: SystemTime::now(),
        })
    }
}

impl Case {
    /// Compares what was said by one instance, by it again, and by a fresh one.
    pub fn judge(&self, said: &[String; 3]) -> Tested {
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

impl Who {
    /// Who asks or is judged: one of no list, where the case names no ID.
    fn peer(&self) -> Node {
        self.node("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", Provenance::Claimed)
    }

    fn node(&self, id: &str, provenance: Provenance) -> Node {
        let provenance = if self.verified { Provenance::Verified } else { provenance };
        Node {
            id: self.id.as_ref().map_or_else(|| id.to_owned(), ToString::to_string),
            name: self.name.clone(),
            name_provenance: provenance,
            version: self.version.clone(),
            labels: zone(&self.zone, provenance),
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
