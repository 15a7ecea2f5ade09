//! The policies in force: swapped whole, and kept where what comes after them cannot be used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::config::{Failing, Mode};
use super::engine::{Compiled, Engine};
use super::load::{self, LoadError, Stage, stamp};
use super::metrics::Metrics;
use super::registry::{RegistryPolicy, Request, Ruling};
use super::{Config, Node};
use crate::oci::Digest;

/// Between two looks at the files. A change counts once it has stood for one of these.
const INTERVAL: Duration = Duration::from_millis(250);

/// How soon what could not be loaded is tried again although no file changed: a file may have been made readable, or the
/// machine been too busy.
const RETRY: Duration = Duration::from_secs(10);

/// A policy in force, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
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
}

struct Generation {
    number: i64,
    chain: Chain,
    loaded: Vec<Loaded>,
}

#[derive(Default)]
struct Loader {
    config: Config,
    /// Made with the first policy: without one it costs nothing.
    engine: Option<Arc<Engine>>,
    compiled: HashMap<Digest, Compiled>,
    stamps: Stamps,
    number: i64,
    /// When what could not be loaded is tried again.
    retry: Option<Instant>,
}

type Stamps = Vec<Option<load::Stamp>>;

impl Policies {
    /// None yet. `here`: what policies are told about this node.
    pub fn new(here: Node, metrics: Metrics) -> Self {
        let state = Generation { number: 0, chain: Chain::new(Vec::new()), loaded: Vec::new() };
        Self {
            here,
            metrics,
            state: ArcSwap::from_pointee(state),
            loader: Mutex::default(),
            problem: Mutex::default(),
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
        match result {
            Ok(set) => {
                loader.compiled = set.compiled;
                loader.number += 1;
                loader.retry = None;
                *self.last_problem() = None;
                if !set.loaded.is_empty() || !self.state.load().chain.is_empty() {
                    let names: Vec<&str> = set.loaded.iter().map(|policy| policy.name.as_str()).collect();
                    tracing::info!(generation = loader.number, policies = ?names, "policies are in force");
                }
                self.metrics.generation.set(loader.number);
                self.state.store(Arc::new(Generation {
                    number: loader.number,
                    chain: Chain::new(set.entries),
                    loaded: set.loaded,
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
                    let chain = Chain::new(load::absent(&loader.config, &self.metrics));
                    self.state.store(Arc::new(Generation { number: 0, chain, loaded: Vec::new() }));
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
        !self.state.load().chain.is_empty()
    }

    fn generation(&self) -> i64 {
        self.state.load().number
    }

    fn decide(&self, request: &Request) -> Ruling {
        self.state.load().chain.decide(request)
    }
}

impl Loader {
    fn set(&mut self, here: &Node, metrics: &Metrics) -> Result<load::Set, LoadError> {
        let Some(first) = self.config.registry.first() else {
            return Ok(load::Set { entries: Vec::new(), loaded: Vec::new(), compiled: HashMap::new() });
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
        load::load(&engine, &self.config, here, &self.compiled, metrics)
    }
}

impl Config {
    fn stamps(&self) -> Stamps {
        self.registry.iter().map(|plugin| stamp(&plugin.path)).collect()
    }
}
