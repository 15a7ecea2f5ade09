//! The policies in force: swapped whole, and kept where what comes after them cannot be used.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::config::{Failing, Mode};
use super::engine::{Compiled, Engine};
use super::load::{self, LoadError, Stage, stamp};
use super::metrics::Metrics;
use super::registry::{self, Registry, RegistryPolicy};
use super::trust::{self, Trust, TrustPolicy};
use super::{Config, Node, Plugin, Said, Startup};
use crate::oci::Digest;

/// Between two looks at the files. A change counts once it has stood for one of these.
const INTERVAL: Duration = Duration::from_millis(250);

/// How soon what could not be loaded is tried again although no file changed: a file may have been made readable, or the
/// machine been too busy.
const RETRY: Duration = Duration::from_secs(10);

/// A policy in force, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// What it decides about: `registry` or `trust`.
    #[serde(default = "registry_world")]
    pub world: String,
    /// Its name in the configuration.
    pub name: String,
    /// SHA-256 of its component.
    pub sha256: String,
    /// What it says of itself, escaped.
    pub summary: String,
    /// Whether its verdicts count.
    pub mode: Mode,
    /// Its verdict where it does not answer.
    pub failure: Failing,
}

/// The policies of this node.
pub struct Policies {
    here: Node,
    metrics: Metrics,
    state: ArcSwap<Generation>,
    /// Whoever changes what is in force; held while components are read and compiled.
    loader: Mutex<Loader>,
    /// Held for a moment only: who asks for the status must not wait for a compiler.
    problem: Mutex<Option<LoadError>>,
    /// Whether they must be loaded before the node is ready, and never were.
    is_required: AtomicBool,
}

#[derive(Default)]
struct Generation {
    number: i64,
    registry: Chain<Registry>,
    trust: Chain<Trust>,
    loaded: Vec<Loaded>,
}

/// What was read for a generation, of both worlds.
struct Sets {
    registry: load::Set<Registry>,
    trust: load::Set<Trust>,
}

#[derive(Default)]
struct Loader {
    config: Config,
    /// Made with the first policy: without one it costs nothing.
    engine: Option<Arc<Engine>>,
    registry: HashMap<Digest, Compiled<Registry>>,
    trust: HashMap<Digest, Compiled<Trust>>,
    stamps: Stamps,
    number: i64,
    /// When what could not be loaded is tried again.
    retry: Option<Instant>,
}

type Stamps = Vec<Option<load::Stamp>>;

impl Policies {
    /// None yet. `here`: what policies are told about this node.
    pub fn new(here: Node, metrics: Metrics) -> Self {
        Self {
            here,
            metrics,
            state: ArcSwap::default(),
            loader: Mutex::default(),
            problem: Mutex::default(),
            is_required: AtomicBool::new(false),
        }
    }

    /// Puts the policies of `config` in force, all or none of them; with none that could stay, each is replaced by its
    /// failure verdict. Compiles, and so blocks up to seconds.
    ///
    /// # Errors
    /// Why they were not taken; it is logged, and [`Policies::problem`] has it until it is mended.
    pub fn apply(&self, config: &Config) -> Result<(), LoadError> {
        let mut loader = self.loader();
        loader.config = config.clone();
        self.load(&mut loader)
    }

    /// The policies in force.
    pub fn loaded(&self) -> Vec<Loaded> {
        self.state.load().loaded.clone()
    }

    /// Why those that are configured are not in force.
    pub fn problem(&self) -> Option<String> {
        self.last_problem().as_ref().map(ToString::to_string)
    }

    /// Why the node is not ready: it never loaded its policies, and is told to require that.
    pub fn unready(&self) -> Option<String> {
        self.is_required.load(Ordering::Relaxed).then(|| self.problem()).flatten()
    }

    /// Follows the files: what is in force is what they have, half a second after they changed. Runs until it is dropped.
    pub async fn follow(self: Arc<Self>) {
        let mut last = Stamps::new();
        loop {
            tokio::time::sleep(INTERVAL).await;
            let policies = Arc::clone(&self);
            let seen = last.clone();
            // A panic is logged by the hook, and the next look is a new one.
            if let Ok(stamps) = tokio::task::spawn_blocking(move || policies.look(&seen)).await {
                last = stamps;
            }
        }
    }

    /// Takes over files that changed and have settled; returns what is there now.
    fn look(&self, last: &Stamps) -> Stamps {
        let mut loader = self.loader();
        let now = loader.config.stamps();
        let again = loader.retry.is_some_and(|at| Instant::now() >= at);
        if again || (now == *last && now != loader.stamps) {
            // The error is logged there.
            let _ = self.load(&mut loader);
        }
        now
    }

    fn load(&self, loader: &mut Loader) -> Result<(), LoadError> {
        let is_first = loader.number == 0;
        // Before they are read, so that no change is missed.
        loader.stamps = loader.config.stamps();
        let result = loader.set(&self.here, &self.metrics);
        let is_required = is_first && result.is_err() && loader.config.startup == Startup::Require;
        self.is_required.store(is_required, Ordering::Relaxed);
        match result {
            Ok(Sets { registry, trust }) => {
                (loader.registry, loader.trust) = (registry.compiled, trust.compiled);
                loader.number += 1;
                loader.retry = None;
                *self.last_problem() = None;
                let loaded = [registry.loaded, trust.loaded].concat();
                if !loaded.is_empty() || !self.state.load().is_empty() {
                    let names: Vec<&str> = loaded.iter().map(|policy| policy.name.as_str()).collect();
                    tracing::info!(generation = loader.number, policies = ?names, "policies are in force");
                }
                self.metrics.generation.set(loader.number);
                self.state.store(Arc::new(Generation {
                    number: loader.number,
                    registry: Chain::new(registry.entries),
                    trust: Chain::new(trust.entries),
                    loaded,
                }));
                Ok(())
            }
            Err(error) => {
                loader.retry = Some(Instant::now() + RETRY);
                let is_new = self.last_problem().replace(error.clone()).as_ref() != Some(&error);
                if is_new {
                    self.metrics.refused.inc();
                    let kept = if is_first { "the failure verdicts" } else { "the last good policies" };
                    tracing::error!(%error, "policies cannot be used; {kept} stand");
                }
                if is_first {
                    self.state.store(Arc::new(Generation {
                        registry: Chain::new(load::absent(&loader.config, &self.metrics)),
                        trust: Chain::new(load::absent(&loader.config, &self.metrics)),
                        ..Generation::default()
                    }));
                }
                Err(error)
            }
        }
    }

    fn last_problem(&self) -> MutexGuard<'_, Option<LoadError>> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn loader(&self) -> MutexGuard<'_, Loader> {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegistryPolicy for Policies {
    fn is_active(&self) -> bool {
        !self.state.load().registry.is_empty()
    }

    fn generation(&self) -> i64 {
        self.state.load().number
    }

    fn decide(&self, request: &registry::Request) -> registry::Ruling {
        self.state.load().registry.decide(request)
    }

    fn explain(&self, request: &registry::Request) -> (registry::Ruling, Vec<Said>) {
        self.state.load().registry.explain(request)
    }
}

impl TrustPolicy for Policies {
    fn is_active(&self) -> bool {
        !self.state.load().trust.is_empty()
    }

    fn enforces(&self) -> bool {
        self.state.load().trust.enforces()
    }

    fn generation(&self) -> i64 {
        self.state.load().number
    }

    fn evaluate(&self, request: &trust::Request) -> trust::Ruling {
        self.state.load().trust.decide(request)
    }

    fn explain(&self, request: &trust::Request) -> (trust::Ruling, Vec<Said>) {
        self.state.load().trust.explain(request)
    }
}

impl Generation {
    fn is_empty(&self) -> bool {
        self.registry.is_empty() && self.trust.is_empty()
    }
}

impl Loader {
    fn set(&mut self, here: &Node, metrics: &Metrics) -> Result<Sets, LoadError> {
        let Some(first) = self.config.plugins().next() else {
            return Ok(Sets { registry: load::Set::default(), trust: load::Set::default() });
        };
        let engine = match &self.engine {
            Some(engine) => Arc::clone(engine),
            None => {
                let engine = Engine::new().map_err(|message| LoadError {
                    policy: first.name.clone(),
                    path: first.path.clone(),
                    stage: Stage::Engine,
                    message,
                })?;
                Arc::clone(self.engine.insert(Arc::new(engine)))
            }
        };
        Ok(Sets {
            registry: load::load(&engine, &self.config, here, &self.registry, metrics)?,
            trust: load::load(&engine, &self.config, here, &self.trust, metrics)?,
        })
    }
}

impl Config {
    /// Of all worlds.
    fn plugins(&self) -> impl Iterator<Item = &Plugin> {
        self.registry.iter().chain(&self.trust)
    }

    fn stamps(&self) -> Stamps {
        self.plugins().map(|plugin| stamp(&plugin.path)).collect()
    }
}

/// Of nodes that know no other.
fn registry_world() -> String {
    "registry".into()
}
