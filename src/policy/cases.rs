//! Questions with the answers that are expected: what an author writes for `peili plugin test`, and what an operator lets a node
//! ask each policy with its settings before it takes it over.
//!
//! Each is asked twice of one instance and once of a fresh one, since a verdict must depend on nothing but the settings and
//! the question.

mod asked;
mod view;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::chain::Answers as _;
use super::config;
use super::election::{Election, View};
use super::engine::{Abi, Given, Policy, Refused};
use super::registry::{Registry, Request as RegistryRequest};
use super::trust::{Request as TrustRequest, Trust};
use super::{Failure, Node};

use asked::Known;
pub(super) use asked::timestamp;
pub use asked::{Asked, Who};

/// Largest file that a node reads, in bytes: a ConfigMap has no more.
pub(super) const SIZE_LIMIT: u64 = 1 << 20;
/// Bounds of what a node asks of one policy.
pub(super) struct Bounds {
    cases: usize,
    /// For all of them.
    time: Duration,
}

/// By its operator.
pub(super) const OPERATOR: Bounds = Bounds { cases: 1000, time: Duration::from_secs(5) };
/// By its author, in the component.
pub(super) const AUTHOR: Bounds = Bounds { cases: 200, time: Duration::from_secs(2) };
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
    /// The files that the policy is given, by name: their text. None: in a node, those of its configuration.
    #[serde(default)]
    pub data: BTreeMap<String, String>,
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

/// Asks a policy all that is in a file. `configure` makes one that is given this on this node; `settings`, `given`: what it is in
/// force with.
pub(super) fn run<W: Asks>(
    file: &File,
    settings: &Value,
    given: &Given,
    bounds: &Bounds,
    configure: &impl Fn(Given, &Node) -> Result<Policy<W>, Refused>,
) -> Result<(), Failed> {
    let fails = |message: String| Failed { message, is_passing: false };
    let Bounds { cases: most, time } = *bounds;
    if file.cases.len() > most {
        return Err(fails(format!("there are {} cases, more than {most}", file.cases.len())));
    }
    let (began, mut pace) = (Instant::now(), 1);
    let here = file.here();
    let own = (!file.data.is_empty())
        .then(|| file.data.iter().map(|(name, text)| (name.clone(), text.as_bytes().into())).collect());
    let data = own.map_or_else(|| Arc::clone(&given.data), Arc::new);
    for case in &file.cases {
        let name = &case.name;
        if began.elapsed() >= time * pace {
            let message = format!("the cases take more than {} s, up to `{name}`", (time * pace).as_secs());
            return Err(Failed { message, is_passing: true });
        }
        let request = W::question(case).map_err(|reason| fails(format!("case `{name}`: {reason}")))?;
        let whole = if file.settings.is_null() { settings } else { &file.settings };
        let settings = config::json(case.settings.as_ref().unwrap_or(whole));
        let given = Given { settings, data: Arc::clone(&data), ..given.clone() };
        let configured = || {
            configure(given.clone(), &here).map_err(|refused| Failed {
                message: format!("case `{name}`: {refused}"),
                is_passing: refused.is_passing(),
            })
        };
        let mut is_late = false;
        let policy = configured()?;
        // Where policies are interpreted all of it takes longer.
        pace = policy.pace();
        let mut ask = |policy: &Policy<W>| match policy.decide(&request, Instant::now() + LIMIT * pace) {
            Ok(verdict) => W::describe(&verdict),
            Err(failure) => {
                is_late |= failure == Failure::Time;
                format!("failed: {failure}")
            }
        };
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

    /// Whether a node asks all of them of a component that carries them.
    ///
    /// # Errors
    /// There are too many.
    pub fn check_embedded(&self) -> Result<(), String> {
        match self.cases.len() {
            cases if cases > AUTHOR.cases => {
                Err(format!("it has {cases} cases, and a component carries {} at most", AUTHOR.cases))
            }
            _ => Ok(()),
        }
    }

    /// The node that asks, as policies are told.
    pub fn here(&self) -> Node {
        self.here.here()
    }
}

/// The text of a file of cases: their names, questions and verdicts; `data`: the files that the policy had.
///
/// # Errors
/// It cannot be written as YAML.
pub fn write<'a>(
    here: Option<&Who>,
    settings: &Value,
    data: &BTreeMap<String, String>,
    cases: impl Iterator<Item = (&'a str, &'a Asked, &'a str)>,
) -> Result<String, String> {
    let case = |(name, asked, expect): (&str, &Asked, &str)| {
        let mut case = serde_json::to_value(asked)?;
        case["name"] = name.into();
        case["expect"] = expect.into();
        Ok(case)
    };
    let wrong = |error: serde_json::Error| error.to_string();
    let cases: Result<Vec<Value>, _> = cases.map(case).collect();
    let mut file = json!({"here": here, "settings": settings, "cases": cases.map_err(wrong)?});
    // Said of none it would be another thing: a node gives its own to a file without.
    if !data.is_empty() {
        file["data"] = json!(data);
    }
    serde_saphyr::to_string(&file).map_err(|error| error.to_string())
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
