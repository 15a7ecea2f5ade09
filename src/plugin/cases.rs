//! `peili plugin test`, `run` and `diff`: questions, with the answers that an author expects, asked of the real engine.
//!
//! What a case is, and when it has passed, is `policy`'s, since a node asks them too.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Candidate, Given};
use crate::policy::cases::{Asked, Case, File, Tested};
use crate::policy::election::ElectionPolicy;
use crate::policy::metrics::Metrics;
use crate::policy::registry::RegistryPolicy;
use crate::policy::trust::TrustPolicy;
use crate::policy::{Config, Data, LoadError, Node, Policies, Said};

/// Differences, and changed verdicts, that are listed: a log may have any number of lines.
pub(super) const LISTED: usize = 10_000;
/// Largest file of cases, in bytes.
const SIZE_LIMIT: u64 = 4 << 20;

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
    /// The component is of no world.
    #[error("{} is no policy of a world that this Peili has", .0.display())]
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
        error: Box<LoadError>,
    },
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

/// What became of the questions that two components were asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// How many there are.
    pub questions: u64,
    /// To how many they give different answers.
    pub different: u64,
    /// The first 10,000 of those.
    pub differences: Vec<Difference>,
}

impl Compared {
    /// One more question.
    pub(super) fn add(&mut self, is_same: bool, difference: impl FnOnce() -> Difference) {
        self.questions += 1;
        if is_same {
            return;
        }
        self.different += 1;
        if self.differences.len() < LISTED {
            self.differences.push(difference());
        }
    }
}

/// Policies that are asked the cases of a file.
struct Subject {
    candidate: Candidate,
    world: &'static str,
    policies: Policies,
}

/// Runs the cases of a file with the component at `path`. `data`: the files that it gets where that of the cases brings none.
///
/// # Errors
/// They cannot be run; a case that fails is none.
pub fn test(path: &Path, cases: &Path, data: &[Data]) -> Result<Vec<Tested>, CasesError> {
    let file = read(cases)?;
    let subject = Subject::new(path, file.here())?;
    let run = |case: &Case| {
        subject.load(case, &file, data)?;
        let mut said = [subject.ask(case)?, subject.ask(case)?, String::new()];
        subject.load(case, &file, data)?;
        said[2] = subject.ask(case)?;
        Ok(case.judge(&said))
    };
    file.cases.iter().map(run).collect()
}

/// Asks two components the cases of a file; `expect` does not count. `data`: the files that they get where that of the cases brings
/// none.
///
/// # Errors
/// The cases cannot be run with both: a node would not take one with the settings, or they are of different worlds.
pub fn diff(old: &Path, new: &Path, cases: &Path, data: &[Data]) -> Result<Compared, CasesError> {
    let file = read(cases)?;
    let (old, new) = (Subject::new(old, file.here())?, Subject::new(new, file.here())?);
    let mut compared = Compared::default();
    for case in &file.cases {
        let ask = |subject: &Subject| {
            subject.load(case, &file, data)?;
            subject.ask(case)
        };
        let (old, new) = (ask(&old)?, ask(&new)?);
        let is_same = old == new;
        compared.add(is_same, || Difference { name: case.name.clone(), old, new });
    }
    Ok(compared)
}

/// Asks the component at `path` one request: the keys of a case, as YAML or JSON, without `name`, `settings` and `expect`.
///
/// # Errors
/// The request is none, or a node would not take the component with the settings.
pub fn run(path: &Path, given: Given, request: &str) -> Result<Answer, CasesError> {
    let asked = Asked::parse(request).map_err(CasesError::Request)?;
    let here = Node { id: "here".into(), ..Node::default() };
    let subject = Subject::new(path, here)?;
    let loaded = subject.policies.apply(&subject.candidate.alone(given));
    loaded.map_err(|error| CasesError::Load { case: "the request".into(), error: error.into() })?;
    let said = subject.said(&asked).map_err(CasesError::Request)?;
    let Said { verdict, micros, .. } =
        said.ok_or_else(|| CasesError::Request("the policy was not asked".into()))?;
    Ok(Answer { verdict, micros })
}

impl Subject {
    fn new(path: &Path, here: Node) -> Result<Self, CasesError> {
        let candidate = Candidate::read(path);
        let world = candidate.world().ok_or_else(|| CasesError::World(path.to_owned()))?;
        let policies = Policies::new(here, Metrics::default()).without_self_tests();
        Ok(Self { candidate, world, policies })
    }

    /// A fresh instance with the settings of a case, and the data of its file; `data`: where that has none, as on a node.
    fn load(&self, case: &Case, file: &File, data: &[Data]) -> Result<(), CasesError> {
        let settings = case.settings.as_ref().unwrap_or(&file.settings).clone();
        let own = |(name, text): (&String, &String)| Data {
            name: name.clone(),
            path: PathBuf::new(),
            sha256: None,
            content: Some(text.as_bytes().into()),
        };
        let own: Vec<Data> = file.data.iter().map(own).collect();
        let given = Given { settings, data: if own.is_empty() { data.to_vec() } else { own } };
        // What is in force already is kept, with its instances: here they are to be new ones.
        let none = self.policies.apply(&Config::default());
        let loaded = none.and_then(|()| self.policies.apply(&self.candidate.alone(given)));
        loaded.map_err(|error| CasesError::Load { case: case.name.clone(), error: error.into() })
    }

    /// What the policy says.
    fn ask(&self, case: &Case) -> Result<String, CasesError> {
        let said = self.said(&case.asked);
        let said = said.map_err(|reason| CasesError::Case { case: case.name.clone(), reason })?;
        Ok(said.map(|said| said.verdict).unwrap_or_default())
    }

    fn said(&self, asked: &Asked) -> Result<Option<Said>, String> {
        let said = match self.world {
            "trust" => TrustPolicy::explain(&self.policies, &asked.trust()?).1,
            "election" => ElectionPolicy::explain(&self.policies, &asked.election()?).1,
            _ => RegistryPolicy::explain(&self.policies, &asked.registry()?).1,
        };
        Ok(said.into_iter().next())
    }
}

fn read(path: &Path) -> Result<File, CasesError> {
    use std::io::Read as _;
    let wrong = |reason: String| CasesError::File { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut text = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut text).map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > SIZE_LIMIT {
        return Err(wrong("it has more than 4 MiB".into()));
    }
    File::parse(&text).map_err(wrong)
}

/// Lines for people.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DIFFERS {}\n  old  {}\n  new  {}", self.name, self.old, self.new)
    }
}
