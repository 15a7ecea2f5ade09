//! What it takes to make the next generation: the engine, components that are compiled, and what is waited for.
//!
//! It knows which files the set in force came from, but neither asks it anything nor puts another one in its place.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::election::{self, Election};
use super::engine::{Bound, Code, Engine};
use super::files::{self, Unread, stamp};
use super::load::{self, Known, LoadError, Parts, Set, Stage};
use super::metrics::Metrics;
use super::registry::Registry;
use super::trust::Trust;
use super::{Config, Node};
use crate::oci::Digest;

/// How soon what could not be loaded is tried again although no file changed: a file may have been made readable, or the
/// machine been too busy.
const RETRY: Duration = Duration::from_secs(10);
/// How long files that match their pins are waited for: kubelet brings each mount up to date on its own, a minute and a half
/// apart at most.
pub(super) const PENDING: Duration = Duration::from_secs(90);
/// Letters of a revision.
const REVISION: usize = 16;

/// What was made for a generation.
pub(super) struct Sets {
    pub(super) registry: Set<Registry>,
    pub(super) trust: Set<Trust>,
    pub(super) election: Set<Election>,
    /// What [`election::EffectiveHash`] is made of; empty: no ranking counts.
    pub(super) effective: Vec<u8>,
    /// What tells this set from others: its components, their order, settings, data, limits, modes and failure verdicts.
    pub(super) revision: String,
}

pub(super) struct Loader {
    pub(super) config: Config,
    /// Made with the first policy: without one it costs nothing.
    engine: Option<Arc<Engine>>,
    /// The same, for the election world.
    counting: Option<Arc<Engine>>,
    /// What their code is; `None`: not found out yet.
    pub(super) code: Option<Code>,
    registry: HashMap<Digest, Known<Registry>>,
    trust: HashMap<Digest, Known<Trust>>,
    election: HashMap<Digest, Known<Election>>,
    /// Of the files when they were read last.
    pub(super) stamps: Stamps,
    /// Of the generation in force; 0: none.
    pub(super) number: i64,
    /// Of the generation in force, and of the one before it.
    pub(super) revision: String,
    pub(super) previous: String,
    /// What the policies in force were told about this node.
    pub(super) here: Node,
    /// When what could not be loaded is tried again.
    pub(super) retry: Option<Instant>,
    /// How long files that match their pins are waited for.
    pub(super) patience: Duration,
    /// Whether components are asked what their authors expect.
    pub(super) self_tests: bool,
    /// Since when they are.
    waiting: Option<Instant>,
    /// Digests of the components of the generation in force and of the one before, and of the last that was tried.
    kept: [HashSet<Digest>; 3],
    /// The files of the generation in force.
    standing: HashSet<PathBuf>,
}

pub(super) type Stamps = Vec<Option<files::Stamp>>;

impl Default for Loader {
    fn default() -> Self {
        Self {
            config: Config::default(),
            engine: None,
            counting: None,
            code: None,
            registry: HashMap::new(),
            trust: HashMap::new(),
            election: HashMap::new(),
            stamps: Stamps::new(),
            number: 0,
            revision: String::new(),
            previous: String::new(),
            here: Node::default(),
            retry: None,
            patience: PENDING,
            self_tests: true,
            waiting: None,
            kept: Default::default(),
            standing: HashSet::new(),
        }
    }
}

impl Loader {
    /// Another configuration counts from now on.
    pub(super) fn configure(&mut self, config: &Config) {
        if !self.config.plugins().eq(config.plugins()) {
            self.waiting = None;
        }
        self.config = config.clone();
    }

    /// How many times as long as machine code policies may take here.
    pub(super) fn pace(&self) -> u32 {
        self.engine.as_ref().map_or(1, |engine| engine.pace())
    }

    /// What the files are now.
    pub(super) fn look(&self) -> Stamps {
        self.config.files().map(stamp).collect()
    }

    /// Makes what the configuration and the files say, all or nothing. Compiles what it does not know.
    pub(super) fn make(&mut self, here: &Node, metrics: &Metrics) -> Result<Sets, LoadError> {
        let config = self.config.clone();
        let Some(first) = config.plugins().next() else {
            self.tried(HashSet::new());
            return Ok(Sets {
                registry: Set::default(),
                trust: Set::default(),
                election: Set::default(),
                effective: Vec::new(),
                revision: revision(&[]),
            });
        };
        let failed = |message: String| LoadError {
            policy: first.name.clone(),
            path: first.path.clone(),
            stage: Stage::Engine,
            message,
            hint: None,
            pending: false,
            is_passing: true,
            may_wait: false,
        };
        let code = *self.code.get_or_insert_with(Code::here);
        let engine = made(&mut self.engine, code, Bound::Time).map_err(failed)?;
        // Without a policy of its world it is not needed.
        let counting = match config.election.as_slice() {
            [] => Arc::clone(&engine),
            _ => made(&mut self.counting, code, Bound::Fuel).map_err(failed)?,
        };
        let read = files::read(&config.roots(), &load::wanted(&config));
        let files = read.map_err(|unread| self.unread(&config, unread))?;
        let parts = Parts {
            engine: &engine,
            counting: &counting,
            config: &config,
            here,
            metrics,
            files: &files,
            self_tests: self.self_tests,
        };
        let registry = load::load(&parts, &mut self.registry);
        let sets = registry.and_then(|registry| {
            Ok((registry, load::load(&parts, &mut self.trust)?, load::load(&parts, &mut self.election)?))
        });
        self.tried(
            config.plugins().filter_map(|plugin| Some(Digest::sha256(files.get(&plugin.path)?))).collect(),
        );
        let (registry, trust, election) = sets?;
        let loaded = registry.loaded.iter().chain(&trust.loaded).chain(&election.loaded);
        let described: Vec<_> = loaded
            .zip(config.plugins())
            .map(|(loaded, plugin)| {
                let settings = plugin.settings.to_string();
                let given = (settings, &loaded.data, plugin.limits);
                (&loaded.world, &loaded.name, &loaded.sha256, given, loaded.mode, loaded.failure)
            })
            .collect();
        let revision = revision(&serde_json::to_vec(&described).unwrap_or_default());
        let effective = election::effective(&election.loaded, &config.election);
        Ok(Sets { registry, trust, election, effective, revision })
    }

    fn unread(&self, config: &Config, unread: Unread) -> LoadError {
        let is_standing = self.standing.contains(&unread.path);
        LoadError::unread(config, unread, is_standing)
    }

    /// Components that were compiled are kept for the generation in force, the one before it, since going back is common, and
    /// what was tried last, so that nothing is compiled twice while it is mended.
    fn tried(&mut self, digests: HashSet<Digest>) {
        self.kept[2] = digests;
        self.forget();
    }

    fn forget(&mut self) {
        let kept = &self.kept;
        let is_kept = |digest: &Digest| kept.iter().any(|digests| digests.contains(digest));
        self.registry.retain(|digest, _| is_kept(digest));
        self.trust.retain(|digest, _| is_kept(digest));
        self.election.retain(|digest, _| is_kept(digest));
    }

    /// Components that are kept.
    #[cfg(test)]
    pub(super) fn compiled(&self) -> usize {
        self.registry.len() + self.trust.len() + self.election.len()
    }

    /// What was made last is in force.
    pub(super) fn took(&mut self, revision: String, here: Node) {
        self.here = here;
        if self.kept[0] != self.kept[2] {
            let [standing, before, tried] = &mut self.kept;
            *before = std::mem::replace(standing, tried.clone());
            self.forget();
        }
        self.standing = self.config.files().map(Into::into).collect();
        if self.revision != revision {
            self.previous = std::mem::replace(&mut self.revision, revision);
        }
        self.retry = None;
        self.waiting = None;
    }

    /// It is not; tells whether that is waited for, and sees to the next try.
    pub(super) fn refused(&mut self, error: LoadError, now: Instant) -> LoadError {
        self.retry = error.is_passing.then_some(now + RETRY);
        if !error.may_wait {
            return error;
        }
        let until = *self.waiting.get_or_insert(now) + self.patience;
        if now >= until {
            return error;
        }
        self.retry = Some(until.min(now + RETRY));
        let hint = format!(
            "the configuration may be ahead of the files; they are waited for {} s",
            self.patience.as_secs()
        );
        LoadError { pending: true, hint: Some(hint), ..error }
    }
}

/// The engine in its place, made where there is none.
fn made(place: &mut Option<Arc<Engine>>, code: Code, bound: Bound) -> Result<Arc<Engine>, String> {
    if let Some(engine) = place {
        return Ok(Arc::clone(engine));
    }
    Ok(Arc::clone(place.insert(Arc::new(Engine::new(code, bound)?))))
}

fn revision(described: &[u8]) -> String {
    let mut revision = Digest::sha256(described).hex();
    revision.truncate(REVISION);
    revision
}
