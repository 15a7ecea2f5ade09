//! What a policy costs: how long it takes to compile and to load, how long to ask, and how much memory that takes. What is asked is
//! one question, or what a node recorded. Figures can be kept, and others compared with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::replay::{Replay, ReplayError};
use super::{Candidate, Given};
use crate::oci::{Level, Reference as Image};
use crate::policy::election::{self, ElectionPolicy, Role, RoleKind, Selection, View};
use crate::policy::registry::{Availability, RegistryPolicy, Request, Requester, Way};
use crate::policy::trust::{Conduct, Evidence, Method, Request as Peer, TrustPolicy, Way as Standing};
use crate::policy::{LoadError, Node, Noop, Policies, compile_time};

/// Calls of a warm instance that are measured, after a tenth as many that are not.
const WARM: u32 = 20_000;
/// Calls of a new instance.
const COLD: u32 = 500;
/// Compilations.
const COMPILED: usize = 3;
/// Zones of the candidates.
const ZONES: usize = 3;

/// What is asked.
#[derive(Clone, Debug)]
pub enum Questions<'a> {
    /// For the manifest of this image as a runtime does; a policy of the trust world, about a newcomer; one of the election world, who of
    /// so many candidates coordinates.
    One(&'a Image, usize),
    /// What a node recorded: the first 10,000 decisions of the policy's world in this log.
    Recorded(&'a Path),
}

/// What one policy costs. Times are in microseconds, memory is in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measured {
    /// What it decides about.
    pub world: String,
    /// How many are asked in turn.
    pub questions: usize,
    /// The compiler alone: the median of three runs.
    pub compile: f64,
    /// From the file to a policy that can be asked: read, checked, compiled, its own cases asked, configured.
    pub load: f64,
    /// Of 20,000 calls, on instances that were used before; none: each call gets a new one (election).
    pub warm: Option<Times>,
    /// Of 500 calls, each on a new instance, which is made and configured first.
    pub cold: Times,
    /// Half of as many calls of a component that does nothing took no longer, just before; none: it cannot be called here.
    pub noop: Option<f64>,
    /// What an instance has after these calls.
    pub instance_memory: u64,
    /// What loading added to the resident memory of this process; the compiler's leftovers are part of it.
    pub resident_memory: u64,
    /// How many of `asked` went through: what is mirrored, a peer that is neither denied nor failed about, a ranking without a fault.
    pub allowed: u32,
    /// The calls that were measured, warm or else cold.
    pub asked: u32,
}

/// Times of calls, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Times {
    /// Half took no longer.
    pub median: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
}

/// Why a policy cannot be measured, or compared.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A node would not take it.
    #[error(transparent)]
    Load(Box<LoadError>),
    /// The compiler, although the node's took it.
    #[error("it cannot be compiled: {0}")]
    Compile(String),
    /// What was recorded cannot be asked.
    #[error(transparent)]
    Recorded(#[from] ReplayError),
    /// The figures of before.
    #[error("{}: {reason}", path.display())]
    Baseline {
        /// Their file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// How many times as much as in other figures. A figure that one of them lacks has no ratio.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Ratios(pub BTreeMap<&'static str, f64>);

/// What [`Ratios::most`] looks at: what a busy machine does to one call of a hundred says nothing of the policy.
const JUDGED: [&str; 4] = ["cold-median", "compile", "instance-memory", "warm-median"];

/// Loads `path` and asks it.
///
/// # Errors
/// A node would not take it, or it cannot be asked.
pub fn bench(path: &Path, given: Given, questions: &Questions<'_>) -> Result<Measured, BenchError> {
    let candidate = Candidate::read(path);
    let world = candidate.world().unwrap_or_default();
    let (here, asked) = match questions {
        Questions::One(image, candidates) => (Node::default(), vec![one(world, image, *candidates)]),
        Questions::Recorded(log) => Replay::component(path, given.clone(), None)?.questions(log)?,
    };
    let before = resident();
    let began = Instant::now();
    let policies = candidate.load(here, given).map_err(|error| BenchError::Load(error.into()))?;
    let load = micros(began.elapsed());
    let resident_memory = resident().saturating_sub(before);
    let compiled = (0..COMPILED).map(|_| compile_time(&candidate.bytes)).collect::<Result<Vec<_>, _>>();
    let compile = Times::of(&mut compiled.map_err(BenchError::Compile)?).median;
    let noop = Noop::new().ok();
    let noop = noop.map(|mut noop| measure(WARM, || (), || noop.call()).0.median);
    let mut turn = asked.iter().cycle();
    let mut ask = || turn.next().is_some_and(|question| question.ask(&policies));
    let is_kept = world != "election";
    let warm = is_kept.then(|| measure(WARM, || (), &mut ask));
    let mut instance = policies.cool();
    let cold = measure(COLD, || instance = instance.max(policies.cool()), ask);
    Ok(Measured {
        world: world.into(),
        questions: asked.len(),
        compile,
        load,
        warm: warm.map(|(times, _)| times),
        cold: cold.0,
        noop,
        instance_memory: instance as u64,
        resident_memory,
        allowed: warm.map_or(cold.1, |(_, allowed)| allowed),
        asked: if is_kept { WARM } else { COLD },
    })
}

/// A question as a node's parts ask it.
pub(super) enum Question {
    Registry(Request),
    Trust(Peer),
    Election(View),
}

impl Question {
    /// Whether what it asks about goes through.
    fn ask(&self, policies: &Policies) -> bool {
        match self {
            Self::Registry(request) => matches!(policies.decide(request).way, Way::Mirror(_)),
            Self::Trust(request) => {
                matches!(policies.evaluate(request).way, Standing::Allow(_) | Standing::BuiltIn)
            }
            Self::Election(view) => !policies.rank(view).why.is_fault(),
        }
    }
}

fn one(world: &str, image: &Image, candidates: usize) -> Question {
    match world {
        "trust" => Question::Trust(newcomer()),
        "election" => Question::Election(view(candidates)),
        _ => {
            let availability = Availability { peers: 3, ..Availability::default() };
            Question::Registry(Request::manifest(image, Requester::Runtime, availability, Arc::default()))
        }
    }
}

impl Measured {
    /// What was measured before, as [`Measured::save`] wrote it.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let wrong = |reason: String| BenchError::Baseline { path: path.to_owned(), reason };
        let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
        let mut text = Vec::new();
        let read = std::io::Read::read_to_end(&mut std::io::Read::take(file, BASELINE), &mut text);
        read.map_err(|error| wrong(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| {
            wrong(format!("no figures of `peili plugin bench`: {error}\nhint: `--save FILE` writes them"))
        })
    }

    /// Writes it as JSON, over what is there.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), BenchError> {
        let wrong = |reason: String| BenchError::Baseline { path: path.to_owned(), reason };
        let text = serde_json::to_string_pretty(self).map_err(|error| wrong(error.to_string()))?;
        std::fs::write(path, text + "\n").map_err(|error| wrong(error.to_string()))
    }

    /// How many times as much it is as `baseline`.
    pub fn against(&self, baseline: &Self) -> Ratios {
        let figures = |of: &Self| {
            let bytes = |bytes: u64| Some(bytes as f64);
            [
                ("compile", Some(of.compile)),
                ("load", Some(of.load)),
                ("warm-median", of.warm.map(|times| times.median)),
                ("warm-p99", of.warm.map(|times| times.p99)),
                ("cold-median", Some(of.cold.median)),
                ("cold-p99", Some(of.cold.p99)),
                ("instance-memory", bytes(of.instance_memory)),
                ("resident-memory", bytes(of.resident_memory)),
            ]
        };
        let pairs = figures(self).into_iter().zip(figures(baseline));
        Ratios(
            pairs
                .filter_map(|((name, now), (_, before))| {
                    Some((name, now? / before.filter(|value| *value > 0.0)?))
                })
                .collect(),
        )
    }
}

/// Longest file of figures, in bytes.
const BASELINE: u64 = 64 << 10;

impl Ratios {
    /// The largest of those that say something of the policy and little of what else the machine does: medians, the compiler, an
    /// instance's memory.
    pub fn most(&self) -> Option<(&'static str, f64)> {
        let judged =
            self.0.iter().filter(|(name, _)| JUDGED.contains(name)).map(|(name, ratio)| (*name, *ratio));
        judged.max_by(|(_, one), (_, other)| one.total_cmp(other))
    }
}

impl Times {
    /// Of no calls, zero.
    fn of(times: &mut [Duration]) -> Self {
        times.sort_unstable();
        let at = |share: usize| {
            times.get(times.len().saturating_sub(1) * share / 100).copied().map_or(0.0, micros)
        };
        Self { median: at(50), p99: at(99) }
    }
}

/// The times of calls, after a tenth as many that do not count, and how many went through. `before` each is not part of it.
fn measure(calls: u32, mut before: impl FnMut(), mut ask: impl FnMut() -> bool) -> (Times, u32) {
    for _ in 0..calls / 10 {
        before();
        ask();
    }
    let mut allowed = 0;
    let mut times: Vec<Duration> = (0..calls)
        .map(|_| {
            before();
            let began = Instant::now();
            let passes = ask();
            let took = began.elapsed();
            allowed += u32::from(passes);
            took
        })
        .collect();
    (Times::of(&mut times), allowed)
}

/// Resident memory of this process, in bytes; 0: it is not told.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// A peer that was just met, and is known by its name and an address.
fn newcomer() -> Peer {
    Peer {
        peer: Node {
            id: "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".into(),
            name: "node-1".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Node::default()
        },
        observed: vec![[10, 0, 0, 1].into()],
        announced: Vec::new(),
        evidence: vec![Evidence { method: Method::ClusterKey, claims: Vec::new() }],
        conduct: Conduct::default(),
        level: Level::default(),
        now: SystemTime::now(),
    }
}

/// Nodes of a cluster, in a few zones.
fn view(candidates: usize) -> View {
    let candidate = |number: usize| election::Candidate {
        name: format!("node-{number}.eu-central.example.test"),
        version: env!("CARGO_PKG_VERSION").into(),
        zone: Some(format!("eu-central-1{}", number % ZONES)),
        api_server: election::Reachability::Reachable,
        uptime: Duration::from_hours(1),
        ..election::Candidate::default()
    };
    let role =
        Role { name: "coordinator".into(), kind: RoleKind::Strict, selection: Selection::Ranked, seats: 1 };
    View { role, candidates: (0..candidates).map(candidate).collect(), holder: None }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(warm: Option<f64>, compile: f64) -> Measured {
        let times = |median| Times { median, p99: median * 2.0 };
        Measured {
            world: "registry".into(),
            questions: 1,
            compile,
            load: 3.0,
            warm: warm.map(times),
            cold: times(10.0),
            noop: None,
            instance_memory: 1 << 20,
            resident_memory: 0,
            allowed: 1,
            asked: 1,
        }
    }

    /// Guards that a comparison is of figures that both have, and that the worst of the medians is what is judged.
    #[test]
    fn figures_are_compared_with_those_that_were_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("baseline.json");
        measured(Some(1.0), 8.0).save(&path).unwrap();
        let baseline = Measured::read(&path).unwrap();
        assert_eq!(baseline, measured(Some(1.0), 8.0));
        let ratios = measured(Some(3.0), 4.0).against(&baseline);
        assert_eq!((ratios.0["warm-median"], ratios.0["warm-p99"], ratios.0["compile"]), (3.0, 3.0, 0.5));
        assert_eq!(ratios.most(), Some(("warm-median", 3.0)));
        assert!(!ratios.0.contains_key("resident-memory"), "nothing is no measure");
        assert!(!measured(None, 1.0).against(&baseline).0.contains_key("warm-median"));
        std::fs::write(&path, "{}").unwrap();
        let error = Measured::read(&path).unwrap_err().to_string();
        assert!(error.contains("baseline.json") && error.contains("--save"), "{error}");
    }

    #[test]
    fn the_median_and_the_99th_of_100_are_told() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_micros).collect();
        assert_eq!(Times::of(&mut times), Times { median: 50.0, p99: 99.0 });
        assert_eq!(Times::of(&mut []), Times { median: 0.0, p99: 0.0 });
    }
}
