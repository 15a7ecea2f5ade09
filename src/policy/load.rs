//! From configuration and bytes to policies that can be asked: pin, size, world, compile, configure, cases. The bytes that are
//! hashed are the bytes that are compiled; where they are from is `files`'.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use super::cases::{self, Asks};
use super::chain::{Answers, Entry, Quarantine};
use super::config::{DATA_SIZE, json};
use super::engine::{Abi, Compiled, Embedded, Engine, Files, Given, Policy, Refused, SIZE_LIMIT, Unfit};
use super::files::{Unread, Wanted};
use super::generation::Loaded;
use super::metrics::Metrics;
use super::text::clean;
use super::world::World;
use super::{Config, Data, Failure, Limits, Lines, Node, Plugin};
use crate::oci::Digest;

/// Longest message, in bytes.
const MESSAGE: usize = 1024;
/// Longest settings, in bytes (`wit/policy.wit`).
const SETTINGS: usize = 256 << 10;

/// Where loading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The engine cannot work here.
    Engine,
    /// The file.
    Read,
    /// Its pinned digest.
    Pin,
    /// Its size or form.
    Size,
    /// What it is a policy of.
    World,
    /// The compiler.
    Compile,
    /// The policy's own `configure`.
    Configure,
    /// What its author says that it answers.
    SelfTest,
    /// What its operator expects of it.
    Cases,
    /// What the last requests would have got.
    Shadow,
}

/// Why policies cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct LoadError {
    /// Its name in the configuration; empty: all of them together.
    pub policy: String,
    /// Its file, or that of its cases or data.
    pub path: PathBuf,
    /// Where it ended.
    pub stage: Stage,
    /// What is wrong.
    pub message: String,
    /// What helps.
    pub hint: Option<String>,
    /// What it lacks is waited for.
    pub pending: bool,
    /// Whether the same files may do in a while.
    pub(super) is_passing: bool,
    /// Whether it may be that the configuration is ahead of the files.
    pub(super) may_wait: bool,
}

/// Policies of one world that can be asked, and what is said of them.
pub(super) struct Set<W: World> {
    pub(super) entries: Vec<Entry<W>>,
    pub(super) loaded: Vec<Loaded>,
}

impl<W: World> Default for Set<W> {
    fn default() -> Self {
        Self { entries: Vec::new(), loaded: Vec::new() }
    }
}

/// What policies are made of.
pub(super) struct Parts<'a> {
    pub(super) engine: &'a Arc<Engine>,
    /// Of the worlds whose instructions are counted.
    pub(super) counting: &'a Arc<Engine>,
    pub(super) config: &'a Config,
    pub(super) here: &'a Node,
    pub(super) metrics: &'a Metrics,
    /// All files of the configuration.
    pub(super) files: &'a HashMap<PathBuf, Vec<u8>>,
    /// Whether components are asked what their authors expect.
    pub(super) self_tests: bool,
}

/// A component that was compiled.
pub(super) struct Known<W: Abi> {
    compiled: Compiled<W>,
    /// Whether it answers what its author expects, which its bytes alone decide.
    is_tested: bool,
}

/// Why one policy cannot be loaded.
struct Fault {
    stage: Stage,
    message: String,
    hint: Option<String>,
    is_passing: bool,
    /// A file beside the component's that it is about.
    file: Option<PathBuf>,
}

/// Stands for a policy that could not be loaded while there is nothing older.
struct Absent;

impl<W: World> Answers<W> for Absent {
    fn decide(&self, _: &W::Request, _: Instant) -> Result<W::Verdict, Failure> {
        Err(Failure::Absent)
    }
}

impl LoadError {
    /// Whether it is the same but for figures, such as a time that something took.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let text = |error: &Self| error.message.replace(|letter: char| letter.is_ascii_digit(), "");
        (&self.policy, &self.path, self.stage, self.pending)
            == (&other.policy, &other.path, other.stage, other.pending)
            && text(self) == text(other)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Engine => "engine",
            Self::Read => "read",
            Self::Pin => "pin",
            Self::Size => "size",
            Self::World => "world",
            Self::Compile => "compile",
            Self::Configure => "configure",
            Self::SelfTest => "self-test",
            Self::Cases => "cases",
            Self::Shadow => "shadow",
        })
    }
}

/// What is read for the policies of `config`.
pub(super) fn wanted(config: &Config) -> Vec<Wanted<'_>> {
    let mut wanted = Vec::new();
    for plugin in config.plugins() {
        wanted.push(Wanted { path: &plugin.path, limit: SIZE_LIMIT });
        wanted.extend(plugin.cases.as_deref().map(|path| Wanted { path, limit: cases::SIZE_LIMIT }));
        let data = plugin.data.iter().filter(|data| data.content.is_none());
        wanted.extend(data.map(|data| Wanted { path: &data.path, limit: DATA_SIZE }));
    }
    wanted
}

/// All of a world, or none. `known`: components that were compiled before, to which these are added.
pub(super) fn load<W: Asks>(
    parts: &Parts<'_>,
    known: &mut HashMap<Digest, Known<W>>,
) -> Result<Set<W>, LoadError> {
    let mut set = Set::default();
    for plugin in W::plugins(parts.config) {
        let (policy, loaded) = load_one(parts, plugin, known).map_err(|fault| fault.of(plugin))?;
        set.entries.push(entry(plugin, Box::new(policy), parts.metrics));
        set.loaded.push(loaded);
    }
    Ok(set)
}

/// Entries that answer with their failure verdict.
pub(super) fn absent<W: World>(config: &Config, metrics: &Metrics) -> Vec<Entry<W>> {
    W::plugins(config).iter().map(|plugin| entry(plugin, Box::new(Absent), metrics)).collect()
}

fn entry<W: World>(plugin: &Plugin, policy: Box<dyn Answers<W>>, metrics: &Metrics) -> Entry<W> {
    Entry {
        name: plugin.name.as_str().into(),
        mode: plugin.mode,
        failing: plugin.failure,
        time: plugin.limits.time,
        policy,
        metrics: metrics.of::<W>(&plugin.name),
        quarantine: Quarantine::default(),
    }
}

fn load_one<W: Asks>(
    parts: &Parts<'_>,
    plugin: &Plugin,
    known: &mut HashMap<Digest, Known<W>>,
) -> Result<(Policy<W>, Loaded), Fault> {
    let file = |path: &Path| parts.files.get(path).map(Vec::as_slice).unwrap_or_default();
    let bytes = file(&plugin.path);
    let digest = Digest::sha256(bytes);
    pinned(plugin.sha256.as_deref(), &digest)?;
    let (data, digests) = read_data(&plugin.data, file)?;
    let engine = if W::IS_COMMON { parts.counting } else { parts.engine };
    let (component, is_tested) = match known.get(&digest) {
        Some(known) => (known.compiled.clone(), known.is_tested),
        None => (
            engine.compile(bytes).map_err(|unfit| {
                let stage = match unfit {
                    Unfit::Size(_) | Unfit::Form(_) => Stage::Size,
                    Unfit::World(_) => Stage::World,
                    Unfit::Compile(_) => Stage::Compile,
                };
                Fault::new(stage, unfit.to_string())
                    .hint("`peili plugin check FILE` says the same of the file")
            })?,
            false,
        ),
    };
    known.insert(digest, Known { compiled: component.clone(), is_tested });
    let settings = json(&plugin.settings);
    if settings.len() > SETTINGS {
        return Err(Fault::new(Stage::Configure, "its settings have more than 256 KiB".into()));
    }
    let name: Arc<str> = Arc::from(plugin.name.as_str());
    let given = Given { name, settings, data, limits: plugin.limits };
    let made = Policy::configure(Arc::clone(engine), component.clone(), given.clone(), parts.here);
    let (policy, info) = made.map_err(|refused| Fault {
        is_passing: refused.is_passing(),
        ..Fault::new(Stage::Configure, refused.within(&plugin.lines))
            .hint("`peili plugin check FILE --settings JSON --data NAME=FILE` tries them")
    })?;
    let again = |given: Given, here: &Node| Policy::once(Arc::clone(engine), component.clone(), given, here);
    if parts.self_tests && !is_tested {
        let given = Given { data: Files::default(), limits: Limits::DEFAULT, ..given.clone() };
        self_test(bytes, &given, &again)?;
        known.insert(digest, Known { compiled: component.clone(), is_tested: true });
    }
    if let Some(path) = &plugin.cases {
        let of_cases = |message: String| Fault::new(Stage::Cases, message).of_file(path);
        let text = file(path);
        if text.len() as u64 > cases::SIZE_LIMIT {
            return Err(of_cases("the file of cases has more than 1 MiB".into()));
        }
        let cases = cases::File::parse(text).map_err(of_cases)?;
        cases::run(&cases, &plugin.settings, &given, &cases::OPERATOR, &again).map_err(|failed| Fault {
            is_passing: failed.is_passing,
            ..of_cases(failed.message).hint("`peili plugin test FILE CASES` shows all that fail")
        })?;
    }
    let loaded = Loaded {
        world: W::NAME.into(),
        name: plugin.name.clone(),
        sha256: digest.hex(),
        data: digests,
        summary: info.summary,
        mode: plugin.mode,
        failure: plugin.failure,
    };
    Ok((policy, loaded))
}

/// Whether these bytes are the ones that are pinned.
fn pinned(pin: Option<&str>, digest: &Digest) -> Result<(), Fault> {
    let Some(pin) = pin.filter(|pin| !pin.eq_ignore_ascii_case(&digest.hex())) else { return Ok(()) };
    let message = format!("its SHA-256 is {}, and {pin} is pinned", digest.hex());
    Err(Fault::new(Stage::Pin, message).hint("mount the file that is pinned, or pin what sha256sum prints"))
}

/// What a policy gets of files, and their digests.
fn read_data<'f>(
    all: &[Data],
    file: impl Fn(&Path) -> &'f [u8],
) -> Result<(Files, BTreeMap<String, String>), Fault> {
    let (mut files, mut digests) = (BTreeMap::new(), BTreeMap::new());
    for Data { name, path, sha256, content } in all {
        let bytes = content.as_deref().unwrap_or_else(|| file(path));
        if bytes.len() as u64 > DATA_SIZE {
            let message = format!("the data `{name}` has more than 1 MiB");
            return Err(Fault::new(Stage::Size, message)
                .hint("a policy gets 8 files of 1 MiB at most; what is longer belongs into the component")
                .of_file(path));
        }
        let digest = Digest::sha256(bytes);
        pinned(sha256.as_deref(), &digest).map_err(|fault| fault.of_file(path))?;
        files.insert(name.clone(), bytes.into());
        digests.insert(name.clone(), digest.hex());
    }
    Ok((Arc::new(files), digests))
}

/// Asks what the component carries, with the settings and data that are in it.
fn self_test<W: Asks>(
    bytes: &[u8],
    given: &Given,
    configure: &impl Fn(Given, &Node) -> Result<Policy<W>, Refused>,
) -> Result<(), Fault> {
    let fault = |message: String| Fault::new(Stage::SelfTest, message);
    let Some(text) = Embedded::of(bytes).map_err(fault)?.cases else { return Ok(()) };
    let cases = cases::File::parse(&text).map_err(|error| fault(format!("its own cases: {error}")))?;
    cases::run(&cases, &Value::Null, given, &cases::AUTHOR, configure).map_err(|failed| Fault {
        is_passing: failed.is_passing,
        ..fault(format!("of its own cases, {}", failed.message)).hint(
            "the component does not do what its author says; `peili plugin test FILE CASES` shows all that fail, and \
             `peili plugin build` takes the cases in that stand beside the crate",
        )
    })
}

impl LoadError {
    /// Of a file that was not read. `is_standing`: whether the policies in force were read from there.
    pub(super) fn unread(config: &Config, unread: Unread, is_standing: bool) -> Self {
        let Unread { path, error, is_absent, hint } = unread;
        let policy = config.plugins().find(|plugin| plugin.files().any(|file| file == path));
        let is_pinned = policy.is_some_and(|policy| policy.pin(&path).is_some());
        let hint = match (is_absent, is_standing) {
            (true, true) => {
                Some("is its mount gone? To do without the policy, take it out of the configuration")
            }
            (true, false) => Some("mount it there, or correct its path"),
            (false, _) => hint,
        };
        Self {
            policy: policy.map(|policy| policy.name.clone()).unwrap_or_default(),
            path,
            stage: Stage::Read,
            message: clean(&error.to_string(), MESSAGE),
            hint: hint.map(Into::into),
            pending: false,
            is_passing: true,
            may_wait: is_absent && !is_standing && is_pinned,
        }
    }
}

/// In one line, and the hint in another.
impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, path, stage, message, hint, pending, .. } = self;
        if *pending {
            f.write_str("pending: ")?;
        }
        match (policy.as_str(), path.as_os_str().is_empty()) {
            ("", _) => write!(f, "policies, {stage}: {message}")?,
            (policy, true) => write!(f, "policy `{policy}`, {stage}: {message}")?,
            (policy, false) => write!(f, "policy `{policy}` ({}), {stage}: {message}", path.display())?,
        }
        hint.as_ref().map_or(Ok(()), |hint| write!(f, "\nhint: {hint}"))
    }
}

impl Fault {
    fn new(stage: Stage, message: String) -> Self {
        // The bytes are what they are; that they are written anew is seen.
        Self { stage, message, hint: None, is_passing: false, file: None }
    }

    fn of_file(self, path: &Path) -> Self {
        Self { file: Some(path.to_owned()), ..self }
    }

    fn hint(self, hint: &str) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    fn of(self, plugin: &Plugin) -> LoadError {
        let Self { stage, message, hint, is_passing, file } = self;
        LoadError {
            policy: plugin.name.clone(),
            path: file.unwrap_or_else(|| plugin.path.clone()),
            stage,
            // It may hold names from the component.
            message: clean(&message, MESSAGE),
            hint,
            pending: false,
            is_passing,
            may_wait: stage == Stage::Pin,
        }
    }
}

impl Refused {
    /// With the lines in which the settings were said.
    fn within(&self, lines: &Lines) -> String {
        let Self::Settings(errors) = self else { return self.to_string() };
        let errors: Vec<String> = errors
            .iter()
            .map(|(pointer, message)| {
                let place = if pointer.is_empty() { "/" } else { pointer };
                let line = lines.of(pointer).map(|line| format!(" (line {line})")).unwrap_or_default();
                format!("settings{place}{line}: {message}")
            })
            .collect();
        format!("it refuses its settings: {}", errors.join("; "))
    }

    /// Whether it may be the machine's fault, and pass.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Slow(..) | Self::Failed(Failure::Time))
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(_) => f.write_str(&self.within(&Lines::default())),
            Self::Slow(took, ready) => {
                let [took, ready] = [took, ready].map(|time| time.as_secs_f64() * 1000.0);
                write!(
                    f,
                    "it takes {took:.1} ms to be configured, and a new instance must be ready in {ready:.1}"
                )
            }
            Self::Large => f.write_str("it takes more than half of its memory before it is asked anything"),
            Self::Requires(feature) => write!(f, "it needs `{feature}`, which this Peili has not got"),
            Self::Failed(failure) => write!(f, "{failure}"),
        }
    }
}
