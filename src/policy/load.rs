//! From configuration and files to policies that can be asked: read, pin, size, world, compile, configure. The bytes that are
//! hashed are the bytes that are compiled.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::OFlags;

use super::chain::{Answers, Entry, Quarantine};
use super::engine::{Abi, Compiled, Engine, Policy, READY, Refused, SIZE_LIMIT, Unfit};
use super::generation::Loaded;
use super::metrics::Metrics;
use super::text::clean;
use super::world::World;
use super::{Config, Failure, Node, Plugin};
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
}

/// Why policies cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy `{policy}` ({}), {stage}: {message}", path.display())]
pub struct LoadError {
    /// Its name in the configuration.
    pub policy: String,
    /// Its file.
    pub path: PathBuf,
    /// Where it ended.
    pub stage: Stage,
    /// What is wrong, and what helps.
    pub message: String,
}

/// Policies that can be asked, what is said of them, and their components by digest.
pub(super) struct Set<W: Abi> {
    pub(super) entries: Vec<Entry<W>>,
    pub(super) loaded: Vec<Loaded>,
    pub(super) compiled: HashMap<Digest, Compiled<W>>,
}

impl<W: Abi> Default for Set<W> {
    fn default() -> Self {
        Self { entries: Vec::new(), loaded: Vec::new(), compiled: HashMap::new() }
    }
}

/// Stands for a policy that could not be loaded while there is nothing older.
struct Absent;

impl<W: World> Answers<W> for Absent {
    fn decide(&self, _: &W::Request, _: Instant) -> Result<W::Verdict, Failure> {
        Err(Failure::Absent)
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
        })
    }
}

/// All or none. `known`: components that were compiled before.
pub(super) fn load<W: Abi>(
    engine: &Arc<Engine>,
    config: &Config,
    here: &Node,
    known: &HashMap<Digest, Compiled<W>>,
    metrics: &Metrics,
) -> Result<Set<W>, LoadError> {
    let mut set = Set::default();
    for plugin in W::plugins(config) {
        let error = |(stage, message): (Stage, String)| LoadError {
            policy: plugin.name.clone(),
            path: plugin.path.clone(),
            stage,
            // It may hold names from the component.
            message: clean(&message, MESSAGE),
        };
        let (policy, loaded) = load_one(engine, plugin, here, known, &mut set.compiled).map_err(error)?;
        set.entries.push(entry(plugin, Box::new(policy), metrics));
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
        policy,
        metrics: metrics.of::<W>(&plugin.name),
        quarantine: Quarantine::default(),
    }
}

fn load_one<W: Abi>(
    engine: &Arc<Engine>,
    plugin: &Plugin,
    here: &Node,
    known: &HashMap<Digest, Compiled<W>>,
    compiled: &mut HashMap<Digest, Compiled<W>>,
) -> Result<(Policy<W>, Loaded), (Stage, String)> {
    let bytes = read(&plugin.path).map_err(|error| (Stage::Read, error.to_string()))?;
    let digest = Digest::sha256(&bytes);
    if let Some(pin) = &plugin.sha256
        && !pin.eq_ignore_ascii_case(&digest.hex())
    {
        return Err((Stage::Pin, format!("its SHA-256 is {}, and {pin} is pinned", digest.hex())));
    }
    let component = match compiled.get(&digest).or_else(|| known.get(&digest)) {
        Some(component) => component.clone(),
        None => engine.compile(&bytes).map_err(|unfit| {
            let stage = match unfit {
                Unfit::Size(_) | Unfit::Form(_) => Stage::Size,
                Unfit::World(_) => Stage::World,
                Unfit::Compile(_) => Stage::Compile,
            };
            (stage, unfit.to_string())
        })?,
    };
    compiled.insert(digest, component.clone());
    let settings = plugin.settings();
    if settings.len() > SETTINGS {
        return Err((Stage::Configure, "its settings have more than 256 KiB".into()));
    }
    let name = Arc::from(plugin.name.as_str());
    let configured = Policy::configure(Arc::clone(engine), component, name, settings, here);
    let (policy, info) = configured.map_err(|refused| (Stage::Configure, refused.to_string()))?;
    let loaded = Loaded {
        world: W::NAME.into(),
        name: plugin.name.clone(),
        sha256: digest.hex(),
        summary: info.summary,
        mode: plugin.mode,
        failure: plugin.failure,
    };
    Ok((policy, loaded))
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(errors) => {
                f.write_str("it refuses its settings: ")?;
                for (index, (pointer, message)) in errors.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    let place = if pointer.is_empty() { "/" } else { pointer };
                    write!(f, "{separator}settings{place}: {message}")?;
                }
                Ok(())
            }
            Self::Slow(took) => write!(
                f,
                "it takes {} ms to be configured, and a new instance must be ready in {}",
                took.as_millis(),
                READY.as_millis()
            ),
            Self::Large => f.write_str("its settings take more than half of its memory"),
            Self::Requires(feature) => write!(f, "it needs `{feature}`, which this Peili has not got"),
            Self::Failed(failure) => write!(f, "{failure}"),
        }
    }
}

/// The whole of a regular file of bounded size ([`SIZE_LIMIT`], and one byte of what is larger). A pipe in its place is not
/// waited for.
///
/// # Errors
/// It cannot be read, or is no regular file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    // One byte more, so that a larger file is seen to be larger.
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file's device, number, size and times.
pub(super) type Stamp = [u64; 7];

/// What tells one state of a file from another; `None`: it is not there.
pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(path).ok()?;
    Some([
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime().cast_unsigned(),
        metadata.mtime_nsec().cast_unsigned(),
        metadata.ctime().cast_unsigned(),
        metadata.ctime_nsec().cast_unsigned(),
    ])
}
