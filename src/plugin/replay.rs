//! `peili plugin replay`, and `diff` over a decision log: what policies say now of what was recorded on a node.
//!
//! Policies are those of one component with its settings, or all of a configuration. They are asked in the engine of a node.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::bench::Question;
use super::cases::{Compared, Difference, LISTED};
use super::{Candidate, CasesError, Data, Given, printable};
use crate::policy::cases::{self, Asked, Who};
use crate::policy::metrics::Metrics;
use crate::policy::{Config, LINE_LIMIT, LoadError, Node, Policies, Record, Said};

/// Cases that are written: as many as a node asks.
const CASES: usize = 1000;
/// Questions that are kept to be asked again and again.
const QUESTIONS: usize = 10_000;
/// Policies that are named where the log has nothing of the one that is asked.
const NAMED: usize = 16;
/// Nodes whose policies are kept while their records alternate: a log is of one node, which may have got another zone.
const NODES: usize = 4;
/// What the policies of a configuration say together, where it is listed beside them.
const RULING: &str = "ruling";

/// Why decisions cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log, or the file of cases.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing to ask.
    #[error("no line of {} is a decision that can be asked again{reason}", path.display())]
    Nothing {
        /// Of this log.
        path: PathBuf,
        /// What is wrong with the first line that could not be read.
        reason: String,
    },
    /// Nothing is recorded of what is asked.
    #[error(
        "{} has no verdict of the policy that is asked\n\
         hint: name it as the node did (`--name`); there are verdicts of {names}", path.display()
    )]
    Unknown {
        /// The log.
        path: PathBuf,
        /// Of whom there are verdicts.
        names: String,
    },
    /// A node would not take the policies.
    #[error(transparent)]
    Load(Box<LoadError>),
    /// What is wrong with a component.
    #[error(transparent)]
    Component(#[from] CasesError),
}

/// What is asked.
pub struct Replay {
    config: Config,
    /// The recorded name of the one policy; none: all of a configuration, by their names.
    one: Option<Name>,
    /// What that one is given.
    given: Given,
}

/// Whose recorded verdicts are compared.
enum Name {
    Given(String),
    /// The file's; a policy that was alone in a decision is taken for it too.
    Guessed(String),
}

/// The lines of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lines {
    /// Decisions that were asked again.
    pub decisions: u64,
    /// Of worlds of which there is no policy.
    pub other_worlds: u64,
    /// That are no decisions.
    pub unreadable: u64,
    /// What is wrong with the first of them.
    pub first_unreadable: Option<String>,
}

/// What became of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Replayed {
    /// What was in it.
    #[serde(flatten)]
    pub lines: Lines,
    /// By policy, how often it says what now: `abstain`, `mirror`, `bypass`, `allow`, `deny`, `failed`.
    pub outcomes: BTreeMap<String, BTreeMap<String, u64>>,
    /// Verdicts, and rulings of a configuration, that could be compared with recorded ones.
    pub compared: u64,
    /// How many of them are others now.
    pub changed: u64,
    /// The first 10,000 of those.
    pub changes: Vec<Change>,
    /// Cases that were written.
    pub written_cases: Option<usize>,
}

/// A verdict that is another one now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Change {
    /// Of the log.
    pub line: u64,
    /// The image or the peer.
    pub about: String,
    /// Whose verdict; `ruling`: that of all.
    pub policy: String,
    /// As it was recorded.
    pub recorded: String,
    /// As it is now.
    pub now: String,
}

/// The policies, as the nodes of the last records would have them.
struct Asker<'a> {
    config: &'a Config,
    nodes: Recent<Who, Policies>,
}

/// The few that were used last, the latest at the end: what costs something to make.
struct Recent<K, V>(Vec<(K, V)>);

impl<K: Clone + PartialEq, V> Recent<K, V> {
    /// The one of this key, made where it is not there any more.
    fn get<E>(&mut self, key: &K, make: impl FnOnce() -> Result<V, E>) -> Result<&V, E> {
        let last = match self.0.iter().position(|(known, _)| known == key) {
            Some(place) => self.0.remove(place),
            None => (key.clone(), make()?),
        };
        if self.0.len() >= NODES {
            self.0.remove(0);
        }
        self.0.push(last);
        Ok(&self.0[self.0.len() - 1].1)
    }
}

/// Why a record is not asked.
enum Unasked {
    /// It alone.
    Line(String),
    /// Nor any other.
    All(ReplayError),
}

impl Replay {
    /// With the component at `path`. `name`: of its recorded verdicts.
    ///
    /// # Errors
    /// It is of no world that is recorded.
    pub fn component(path: &Path, given: Given, name: Option<String>) -> Result<Self, ReplayError> {
        let candidate = Candidate::read(path);
        if !matches!(candidate.world(), Some("registry" | "trust")) {
            return Err(CasesError::World(path.to_owned()).into());
        }
        let stem = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let one = name.map_or_else(|| Name::Guessed(stem()), Name::Given);
        Ok(Self { config: candidate.alone(given.clone()), one: Some(one), given })
    }

    /// With all policies of a configuration.
    pub fn configured(config: Config) -> Self {
        // What is asked here is no decision of a node.
        Self { config: Config { decisions: None, ..config }, one: None, given: Given::default() }
    }

    /// The first decisions of the component's world that are recorded in `decisions`, and the node that asked the first of them.
    pub(super) fn questions(&self, decisions: &Path) -> Result<(Node, Vec<Question>), ReplayError> {
        let (mut here, mut questions) = (None, Vec::new());
        self.each(decisions, |_, record| {
            here.get_or_insert_with(|| record.here.here());
            if questions.len() < QUESTIONS {
                let request = &record.request;
                let question = match record.world.as_str() {
                    "trust" => request.trust().map(Question::Trust),
                    _ => request.registry().map(Question::Registry),
                };
                questions.push(question.map_err(Unasked::Line)?);
            }
            Ok(())
        })?;
        Ok((here.unwrap_or_default(), questions))
    }

    /// Asks again what is recorded in `decisions`; `write`: where what one component was asked and said becomes cases.
    ///
    /// # Errors
    /// It cannot be asked. A verdict that changed is none.
    pub fn run(&self, decisions: &Path, write: Option<&Path>) -> Result<Replayed, ReplayError> {
        let (mut replayed, mut cases) = (Replayed::default(), Cases::default());
        let (mut asker, mut names) = (self.asker(), BTreeSet::new());
        replayed.lines = self.each(decisions, |line, record| {
            let (ruling, said) = asker.ask(record)?;
            if names.len() < NAMED {
                names.extend(record.said.iter().map(|said| printable(&said.policy)));
            }
            if self.one.is_none() {
                replayed.compare(line, record, RULING, &record.ruling, &ruling);
            }
            for said in &said {
                let recorded = self.recorded(record, said);
                let name = recorded.map_or_else(|| self.name(said), |recorded| &recorded.policy);
                let outcomes = replayed.outcomes.entry(name.to_owned()).or_default();
                *outcomes.entry(outcome(&said.verdict)).or_default() += 1;
                if let Some(recorded) = recorded {
                    replayed.compare(line, record, name, &recorded.verdict, &said.verdict);
                }
                if let Some(recorded) = recorded {
                    cases.add(record, &recorded.verdict);
                }
            }
            Ok(())
        })?;
        if replayed.compared == 0 {
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            return Err(ReplayError::Unknown { path: decisions.to_owned(), names });
        }
        if let Some(path) = write {
            replayed.written_cases = Some(cases.write(path, &self.given)?);
        }
        Ok(replayed)
    }

    fn asker(&self) -> Asker<'_> {
        Asker { config: &self.config, nodes: Recent(Vec::new()) }
    }

    /// Each decision of the worlds that there are policies of.
    fn each(
        &self,
        path: &Path,
        mut ask: impl FnMut(u64, &Record) -> Result<(), Unasked>,
    ) -> Result<Lines, ReplayError> {
        let wrong = |source| ReplayError::File { path: path.to_owned(), source };
        let mut reader = BufReader::new(File::open(path).map_err(wrong)?);
        let mut lines = Lines::default();
        let mut number = 0;
        while let Some(line) = next(&mut reader).map_err(wrong)? {
            number += 1;
            let record = match Record::parse(&line) {
                Ok(record) if !self.has(&record.world) => {
                    lines.other_worlds += 1;
                    continue;
                }
                Ok(record) => ask(number, &record),
                Err(error) => Err(Unasked::Line(error)),
            };
            match record {
                Ok(()) => lines.decisions += 1,
                Err(Unasked::Line(error)) => {
                    lines.unreadable += 1;
                    lines
                        .first_unreadable
                        .get_or_insert_with(|| printable(&format!("line {number}: {error}")));
                }
                Err(Unasked::All(error)) => return Err(error),
            }
        }
        if lines.decisions == 0 {
            let reason = lines.first_unreadable.map(|reason| format!("; {reason}")).unwrap_or_default();
            return Err(ReplayError::Nothing { path: path.to_owned(), reason });
        }
        Ok(lines)
    }

    fn has(&self, world: &str) -> bool {
        match world {
            "registry" => !self.config.registry.is_empty(),
            "trust" => !self.config.trust.is_empty(),
            _ => false,
        }
    }

    /// What was recorded of this policy.
    fn recorded<'r>(&self, record: &'r Record, said: &Said) -> Option<&'r Said> {
        let named = |name: &str| record.said.iter().find(|recorded| recorded.policy == name);
        match (&self.one, &record.said[..]) {
            (None, _) => named(&said.policy),
            (Some(Name::Given(name)), _) => named(name),
            (Some(Name::Guessed(_)), [alone]) => Some(alone),
            (Some(Name::Guessed(name)), _) => named(name),
        }
    }

    fn name<'s>(&'s self, said: &'s Said) -> &'s str {
        match &self.one {
            None => &said.policy,
            Some(Name::Given(name) | Name::Guessed(name)) => name,
        }
    }
}

/// Asks two components what is recorded in `decisions`, line by line.
///
/// # Errors
/// They cannot be asked: a node would not take one with what it is given.
pub fn diff_decisions(
    old: &Path,
    new: &Path,
    given: &Given,
    decisions: &Path,
) -> Result<Compared, ReplayError> {
    let [old, new] = [old, new].map(|path| Replay::component(path, given.clone(), None));
    let (old, new) = (old?, new?);
    let mut askers = [old.asker(), new.asker()];
    let mut compared = Compared::default();
    old.each(decisions, |line, record| {
        let mut say = |number: usize| -> Result<String, Unasked> {
            let (_, said) = askers[number].ask(record)?;
            Ok(said.into_iter().next().map(|said| said.verdict).unwrap_or_default())
        };
        let (old, new) = (say(0)?, say(1)?);
        let is_same = is_same(&old, &new);
        let name = || format!("line {line}: {}", record.request.subject());
        compared.add(is_same, || Difference { name: name(), old, new });
        Ok(())
    })?;
    Ok(compared)
}

impl Asker<'_> {
    /// The ruling, and what each policy says.
    fn ask(&mut self, record: &Record) -> Result<(String, Vec<Said>), Unasked> {
        let policies = self.nodes.get(&record.here, || {
            let policies = Policies::new(record.here.here(), Metrics::default()).without_self_tests();
            let loaded = policies.apply(self.config);
            loaded.map_err(|error| Unasked::All(ReplayError::Load(error.into())))?;
            Ok(policies)
        })?;
        policies.replay(record).map_err(Unasked::Line)
    }
}

impl Replayed {
    fn compare(&mut self, line: u64, record: &Record, policy: &str, recorded: &str, now: &str) {
        self.compared += 1;
        if is_same(recorded, now) {
            return;
        }
        self.changed += 1;
        if self.changes.len() < LISTED {
            self.changes.push(Change {
                line,
                about: record.request.subject(),
                policy: policy.to_owned(),
                recorded: recorded.to_owned(),
                now: now.to_owned(),
            });
        }
    }
}

/// What was recorded, as cases: of each question the verdict that came last.
#[derive(Default)]
struct Cases {
    here: Option<Who>,
    /// By the question without its time.
    places: HashMap<String, usize>,
    found: Vec<(String, Asked, String)>,
}

impl Cases {
    fn add(&mut self, record: &Record, verdict: &str) {
        let is_here = *self.here.get_or_insert_with(|| record.here.clone()) == record.here;
        // A policy that fails has no verdict that could be expected.
        if !is_here || outcome(verdict) == FAILED {
            return;
        }
        let question = record.request.timeless();
        let is_full = self.found.len() >= CASES;
        match self.places.get(&question) {
            Some(place) => self.found[*place] = case(*place, record, verdict),
            None if is_full => {}
            None => {
                self.places.insert(question, self.found.len());
                self.found.push(case(self.found.len(), record, verdict));
            }
        }
    }

    /// Never over what is there: cases are written by hand, too. The files that the policy was given become part of it.
    fn write(&self, path: &Path, given: &Given) -> Result<usize, ReplayError> {
        let text = |Data { name, path, .. }: &Data| match std::fs::read_to_string(path) {
            Ok(text) => Ok((name.clone(), text)),
            Err(source) => Err(ReplayError::File { path: path.clone(), source }),
        };
        let data = given.data.iter().map(text).collect::<Result<_, _>>()?;
        let wrong = |source| ReplayError::File { path: path.to_owned(), source };
        let cases = self.found.iter().map(|(name, asked, expect)| (name.as_str(), asked, expect.as_str()));
        let text = cases::write(self.here.as_ref(), &given.settings, &data, cases);
        let text = text.map_err(io::Error::other).map_err(wrong)?;
        let mut file = File::create_new(path).map_err(wrong)?;
        io::Write::write_all(&mut file, text.as_bytes()).map_err(wrong)?;
        Ok(self.found.len())
    }
}

fn case(place: usize, record: &Record, verdict: &str) -> (String, Asked, String) {
    let name = format!("{}: {}", place + 1, record.request.subject());
    (name, record.request.clone(), verdict.to_owned())
}

/// A line without its end; of one that is too long, one byte more than [`LINE_LIMIT`].
fn next(reader: &mut impl io::BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if reader.by_ref().take(LINE_LIMIT as u64 + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.pop_if(|last| *last == b'\n').is_none() {
        reader.skip_until(b'\n')?;
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

const FAILED: &str = "failed";

/// The first word of a verdict.
fn outcome(verdict: &str) -> String {
    verdict.split([' ', ':']).next().unwrap_or_default().to_owned()
}

/// How a policy fails depends on the machine: that its time was up, say.
fn is_same(one: &str, other: &str) -> bool {
    one == other || (outcome(one) == FAILED && outcome(other) == FAILED)
}

/// Lines for people.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, about, policy, recorded, now } = self;
        // A peer names itself, and a log may be another machine's.
        let [about, policy, recorded, now] = [about, policy, recorded, now].map(|text| printable(text));
        write!(f, "CHANGED line {line}: {about} ({policy})\n  recorded  {recorded}\n  now       {now}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_whole() {
        let long = "x".repeat(LINE_LIMIT * 3);
        let text = format!("one\n{long}\n\ntwo");
        let mut reader = BufReader::with_capacity(7, text.as_bytes());
        let lines: Vec<String> = std::iter::from_fn(|| next(&mut reader).unwrap()).collect();
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [3, LINE_LIMIT + 1, 0, 3]);
    }

    #[test]
    fn any_two_failures_are_alike() {
        assert!(is_same("failed: it trapped", "failed: its time was up") && !is_same("failed: a", "abstain"));
        assert!(!is_same("deny (a: b)", "deny (a: c)"));
        assert_eq!(outcome("allow level=blobs"), "allow");
    }

    /// Guards that asking again is not itself recorded, over what a node wrote.
    #[test]
    fn a_replay_records_nothing() {
        let text = r#"{"registry": [], "decisions": {"path": "/x"}}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert!(config.decisions.is_some() && Replay::configured(config).config.decisions.is_none());
    }

    /// Guards that cases of hand are not written over, and that the last verdict of a question counts.
    #[test]
    fn cases_are_the_last_verdicts() {
        let record = |image: &str, second: u8| {
            let line = format!(
                r#"{{"time": "2026-01-01T00:00:0{second}Z", "generation": 1, "world": "registry", "here": {{"name": "a"}},
                "request": {{"image": "{image}"}}, "ruling": "mirror", "said": []}}"#
            );
            Record::parse(&line).unwrap()
        };
        let mut cases = Cases::default();
        for (image, second, verdict) in [
            ("nginx", 1, "abstain"),
            ("redis", 2, "deny (a: b)"),
            ("nginx", 3, "deny"),
            ("c", 4, "failed: x"),
        ] {
            cases.add(&record(image, second), verdict);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cases.yaml");
        let list = dir.path().join("images.txt");
        std::fs::write(&list, "# Ours.\nquay.io/team/*\n").unwrap();
        let given =
            Given { settings: serde_json::json!({"deny": []}), data: vec![Given::file("images", &list)] };
        assert_eq!(cases.write(&path, &given).unwrap(), 2);
        let text = std::fs::read(&path).unwrap();
        let file = cases::File::parse(&text).unwrap();
        assert_eq!(file.data["images"], "# Ours.\nquay.io/team/*\n");
        assert_eq!((file.here().name.as_str(), &file.settings), ("a", &serde_json::json!({"deny": []})));
        let judged = |place: usize, said: &str| file.cases[place].judge(&[said; 3].map(Into::into)).passed;
        assert!(judged(0, "deny") && judged(1, "deny (a: b)") && file.cases[0].name == "1: nginx");
        assert!(file.cases[0].asked.registry().unwrap().now > std::time::SystemTime::UNIX_EPOCH);
        assert!(cases.write(&path, &Given::default()).is_err());
        let binary = dir.path().join("binary");
        std::fs::write(&binary, [0xff]).unwrap();
        let given = Given { data: vec![Given::file("images", &binary)], ..Given::default() };
        let other = dir.path().join("other.yaml");
        let error = cases.write(&other, &given).unwrap_err().to_string();
        assert!(error.contains("binary") && !other.exists(), "{error}");
    }

    /// Guards that records of two nodes that alternate do not compile a component for each line, and that there are few.
    #[test]
    fn those_used_last_are_kept() {
        let (mut recent, mut made) = (Recent(Vec::new()), 0);
        let mut get = |key: usize| {
            let value = recent.get(&key, || {
                made += 1;
                Ok::<_, ()>(key * 10)
            });
            assert_eq!(value, Ok(&(key * 10)));
            (made, recent.0.len())
        };
        assert_eq!([1, 2, 1, 2, 1].map(&mut get).last(), Some(&(2, 2)));
        assert_eq!((3..=NODES + 1).map(&mut get).last(), Some((NODES + 1, NODES)));
        assert_eq!([1, 2].map(&mut get), [(NODES + 1, NODES), (NODES + 2, NODES)], "the oldest went");
        assert_eq!(recent.get(&9, || Err("no")), Err("no"));
    }

    /// Guards that a log of any length is compared in bounded memory.
    #[test]
    fn differences_are_counted_and_the_first_listed() {
        let mut compared = Compared::default();
        for number in 0..LISTED + 5 {
            let difference = || Difference { name: number.to_string(), old: "a".into(), new: "b".into() };
            compared.add(false, difference);
        }
        compared.add(true, || unreachable!());
        let most = LISTED as u64;
        assert_eq!((compared.questions, compared.different), (most + 6, most + 5));
        assert_eq!((compared.differences.len(), &*compared.differences[0].name), (LISTED, "0"));
    }
}
