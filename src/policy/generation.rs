//! The policies in force: swapped whole, and kept where what comes after them cannot be used.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::chain::Chain;
use super::config::{Failing, Mode};
use super::election::{self, EffectiveHash, Election, ElectionPolicy, Ranked, View, Why};
use super::engine::Code;
use super::load::{self, LoadError, Stage};
use super::loader::{Loader, Sets, Stamps};
use super::metrics::Metrics;
use super::record::{Record, Recordable, Recorder, said};
use super::registry::{self, Registry, RegistryPolicy};
use super::shadow::{self, Objection, Recent};
use super::text::clean;
use super::trust::{self, Trust, TrustPolicy};
use super::world::World as _;
use super::{Config, Failure, Node, Provenance, Said, Startup};

/// Between two looks at the files. A change counts once it has stood for one of these.
const INTERVAL: Duration = Duration::from_millis(250);
/// What is said where policies are interpreted.
const INTERPRETED: &str = "no machine code can be made here, so they are interpreted and have ten times as long\n\
    hint: SELinux (execmem), PaX or PR_SET_MDWE (systemd: MemoryDenyWriteExecute) refuses it; allow it to this process";
/// For one policy and one request from before: more than a request has, since it is no fault of a policy's if the machine is busy.
const REPLAY: Duration = Duration::from_millis(100);

/// A policy in force, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// What it decides about: `registry`, `trust` or `election`.
    #[serde(default = "registry_world")]
    pub world: String,
    /// Its name in the configuration.
    pub name: String,
    /// SHA-256 of its component.
    pub sha256: String,
    /// SHA-256 of the files that it was given, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<String, String>,
    /// What it says of itself, escaped.
    pub summary: String,
    /// Whether its verdicts count.
    pub mode: Mode,
    /// Its verdict where it does not answer.
    pub failure: Failing,
}

/// The policies of this node.
pub struct Policies {
    here: Mutex<Node>,
    metrics: Metrics,
    state: ArcSwap<Generation>,
    /// What a changed set is tried on.
    recent: Recent,
    recorder: Recorder,
    /// Whoever changes what is in force; held while components are read and compiled.
    loader: Mutex<Loader>,
    /// Whether `here` is another than the policies in force were told.
    has_moved: AtomicBool,
    /// What is to be loaded next, by who does not wait for it.
    wanted: Mutex<Option<Config>>,
    wake: Notify,
    /// Held for a moment only: who asks for the status must not wait for a compiler.
    problem: Mutex<Option<LoadError>>,
    /// Whether they must be loaded before the node is ready, and never were.
    is_required: AtomicBool,
    /// Whether no machine code can be made here.
    is_interpreted: AtomicBool,
}

#[derive(Default)]
struct Generation {
    number: i64,
    registry: Chain<Registry>,
    trust: Chain<Trust>,
    election: Chain<Election>,
    /// What its hash is made of.
    effective: Vec<u8>,
    /// Roles whose last ranking failed, and why.
    failing: Mutex<BTreeMap<String, Why>>,
    loaded: Vec<Loaded>,
}

impl Policies {
    /// None yet. `here`: what policies are told about this node.
    pub fn new(here: Node, metrics: Metrics) -> Self {
        Self {
            recorder: Recorder::new(&here, metrics.recorded()),
            here: Mutex::new(here),
            has_moved: AtomicBool::new(false),
            metrics,
            state: ArcSwap::default(),
            recent: Recent::default(),
            loader: Mutex::default(),
            wanted: Mutex::default(),
            wake: Notify::new(),
            problem: Mutex::default(),
            is_required: AtomicBool::new(false),
            is_interpreted: AtomicBool::new(false),
        }
    }

    /// Puts the policies of `config` in force, all or none of them; with none that could stay, each is replaced by its
    /// failure verdict. Compiles, and so blocks up to seconds.
    ///
    /// # Errors
    /// Why they were not taken; it is logged, and [`Policies::problem`] has it until it is mended.
    pub fn apply(&self, config: &Config) -> Result<(), LoadError> {
        let mut loader = self.loader();
        self.configure(&mut loader, config);
        self.load(&mut loader)
    }

    fn configure(&self, loader: &mut Loader, config: &Config) {
        loader.configure(config);
        self.recorder.configure(config.decisions.as_ref());
    }

    /// Takes components that do not answer what their own authors expect: for tools that show what they answer.
    pub fn without_self_tests(self) -> Self {
        self.loader().self_tests = false;
        self
    }

    /// Lets [`Policies::follow`] put the policies of `config` in force, which may take seconds. Does not wait.
    pub fn want(&self, config: &Config) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(config.clone());
        self.wake.notify_one();
    }

    /// Lets [`Policies::follow`] tell the policies that this node is in another zone, or in one at last. Does not wait.
    pub fn set_zone(&self, zone: &str) {
        let mut here = self.here();
        let labels = super::zone(zone, Provenance::Configured);
        if here.labels != labels {
            here.labels = labels;
            self.recorder.set_here(&here);
            self.has_moved.store(true, Ordering::Relaxed);
            self.wake.notify_one();
        }
    }

    /// Tries again soon what could not be taken over, if anything.
    pub fn again(&self) {
        // Whoever holds it is at it.
        if let Ok(mut loader) = self.loader.try_lock()
            && self.last_problem().is_some()
        {
            loader.retry = Some(Instant::now());
        }
    }

    /// The policies in force.
    pub fn loaded(&self) -> Vec<Loaded> {
        self.state.load().loaded.clone()
    }

    /// Why those that are configured are not in force.
    pub fn problem(&self) -> Option<String> {
        self.last_problem().as_ref().map(ToString::to_string)
    }

    /// The same, but for those that are waited for.
    pub fn refused(&self) -> Option<String> {
        self.last_problem().as_ref().filter(|problem| !problem.pending).map(ToString::to_string)
    }

    /// All that is wrong with policies now.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.problem().into_iter().collect();
        let state = self.state.load();
        let failing = state.failing.lock().unwrap_or_else(PoisonError::into_inner);
        problems.extend(failing.iter().map(|(role, why)| format!("{role}: {why}; the built-in ranks")));
        if self.is_interpreted() {
            problems.push(INTERPRETED.into());
        }
        problems
    }

    /// Whether policies are interpreted, because no machine code can be made here.
    pub fn is_interpreted(&self) -> bool {
        self.is_interpreted.load(Ordering::Relaxed)
    }

    /// Why decisions are not recorded although the configuration says so.
    pub fn unrecorded(&self) -> Option<String> {
        self.recorder.problem()
    }

    /// What the policies say now of a decision that was recorded: the ruling, and what each says. It counts nowhere.
    ///
    /// # Errors
    /// The record's question is none.
    pub fn replay(&self, record: &Record) -> Result<(String, Vec<Said>), String> {
        let state = self.state.load();
        if record.world == Trust::NAME {
            Ok(replay(&state.trust, &record.request.trust()?))
        } else {
            Ok(replay(&state.registry, &record.request.registry()?))
        }
    }

    /// Lets all policies go of what they keep between requests, so that the next one is their first; the most memory that an
    /// instance had, in bytes. For measurements.
    pub fn cool(&self) -> usize {
        let state = self.state.load();
        state.registry.cool().max(state.trust.cool()).max(state.election.cool())
    }

    /// Why the node is not ready: it never loaded its policies, and is told to require that.
    pub fn unready(&self) -> Option<String> {
        self.is_required.load(Ordering::Relaxed).then(|| self.problem()).flatten()
    }

    /// Follows the files: what is in force is what they have, half a second after they changed. Runs until it is dropped.
    pub async fn follow(self: Arc<Self>) {
        let mut last = Stamps::new();
        loop {
            // An error is the end of the interval.
            let _ = tokio::time::timeout(INTERVAL, self.wake.notified()).await;
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
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(config) = wanted {
            self.configure(&mut loader, &config);
            // The error is logged there.
            let _ = self.load(&mut loader);
            return loader.look();
        }
        let now = loader.look();
        if self.has_moved.load(Ordering::Relaxed) && loader.number > 0 {
            // Where the files are refused, those in force are not told until others are taken; the error is logged there.
            let _ = self.load(&mut loader);
            return now;
        }
        let again = loader.retry.is_some_and(|at| Instant::now() >= at);
        // Files that are being written are not taken, however long a retry is due.
        if now == *last && (again || now != loader.stamps) {
            // The error is logged there.
            let _ = self.load(&mut loader);
        }
        now
    }

    fn load(&self, loader: &mut Loader) -> Result<(), LoadError> {
        let is_first = loader.number == 0;
        // Before they are read, so that no change is missed.
        loader.stamps = loader.look();
        // Before it is looked at, too; whoever loads for another reason tells it as well.
        self.has_moved.store(false, Ordering::Relaxed);
        let here = self.here().clone();
        let made = loader.make(&here, &self.metrics).and_then(|sets| self.next(loader, &here, sets));
        let is_interpreted = loader.code.is_some_and(|code| code == Code::Interpreted);
        self.is_interpreted.store(is_interpreted, Ordering::Relaxed);
        self.metrics.interpreted.set(is_interpreted.into());
        let is_required = is_first && made.is_err() && loader.config.startup == Startup::Require;
        self.is_required.store(is_required, Ordering::Relaxed);
        match made {
            Ok((next, revision)) => {
                loader.took(revision, here);
                self.metrics.pending.set(0);
                self.metrics.is_refused.set(0);
                *self.last_problem() = None;
                // What is in force already stays, with its instances.
                let Some(next) = next else { return Ok(()) };
                loader.number = next.number;
                if !next.loaded.is_empty() || !self.state.load().is_empty() {
                    let names: Vec<&str> = next.loaded.iter().map(|policy| policy.name.as_str()).collect();
                    let (generation, revision) = (next.number, &loader.revision);
                    tracing::info!(generation, revision, policies = ?names, "policies are in force");
                }
                self.metrics.generation.set(next.number);
                self.state.store(Arc::new(next));
                Ok(())
            }
            Err(error) => {
                let error = loader.refused(error, Instant::now());
                self.metrics.pending.set(error.pending.into());
                self.metrics.is_refused.set((!error.pending).into());
                let is_new =
                    !self.last_problem().replace(error.clone()).is_some_and(|last| last.is_like(&error));
                let kept = if is_first { "the failure verdicts" } else { "the last good policies" };
                if is_new && error.pending {
                    tracing::warn!(%error, "policies are waited for; {kept} stand");
                } else if is_new {
                    self.metrics.refused(error.stage);
                    tracing::error!(%error, "policies cannot be used; {kept} stand");
                }
                if is_first {
                    self.state.store(Arc::new(Generation {
                        registry: Chain::new(load::absent(&loader.config, &self.metrics)),
                        trust: Chain::new(load::absent(&loader.config, &self.metrics)),
                        election: Chain::new(load::absent(&loader.config, &self.metrics)),
                        ..Generation::default()
                    }));
                }
                Err(error)
            }
        }
    }

    /// The generation that comes next, if it may, and its revision; none if it is in force already.
    fn next(
        &self,
        loader: &Loader,
        here: &Node,
        sets: Sets,
    ) -> Result<(Option<Generation>, String), LoadError> {
        let Sets { registry, trust, election, effective, revision } = sets;
        let is_same = loader.number > 0 && loader.revision == revision;
        if is_same && loader.here == *here {
            return Ok((None, revision));
        }
        let pace = loader.pace();
        let next = Generation {
            number: loader.number + 1,
            registry: Chain::new(registry.entries).paced(pace),
            trust: Chain::new(trust.entries).paced(pace),
            election: Chain::new(election.entries).paced(pace),
            effective,
            failing: Mutex::default(),
            loaded: [registry.loaded, trust.loaded, election.loaded].concat(),
        };
        // Without a last good one there is nothing that would be better; whoever goes back, or does without policies, is not kept from
        // it; and where the node is, is no change of the set.
        let may_be = [&loader.config.accept, &loader.previous].contains(&&revision);
        if loader.number > 0 && !is_same && !may_be {
            let before = self.state.load_full();
            let limit = loader.config.max_change;
            let requests = if next.registry.is_empty() { Vec::new() } else { self.recent.all() };
            let compared = shadow::compare(&requests, &before.registry, &next.registry, limit)
                .and_then(|()| shadow::rank(&self.recent.views(), &before.election, &next.election));
            compared.map_err(|objection| objected(&objection, &loader.config, &revision))?;
        }
        Ok((Some(next), revision))
    }

    /// How long files that match their pins are waited for.
    #[cfg(test)]
    pub(super) fn be_patient_for(&self, time: Duration) {
        self.loader().patience = time;
    }

    /// Components that are kept.
    #[cfg(test)]
    pub(super) fn compiled(&self) -> usize {
        self.loader().compiled()
    }

    fn here(&self) -> MutexGuard<'_, Node> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.recent.keep(request);
        let state = self.state.load();
        self.recorder.decide(&state.registry, state.number, request)
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
        let state = self.state.load();
        self.recorder.decide(&state.trust, state.number, request)
    }

    fn explain(&self, request: &trust::Request) -> (trust::Ruling, Vec<Said>) {
        self.state.load().trust.explain(request)
    }
}

impl ElectionPolicy for Policies {
    fn is_active(&self) -> bool {
        !self.state.load().election.is_empty()
    }

    fn generation(&self) -> i64 {
        self.state.load().number
    }

    fn rank(&self, view: &View) -> Ranked {
        let state = self.state.load();
        let ranked = match view.check() {
            Ok(()) => {
                self.recent.keep_view(view);
                state.election.decide(view, |_, _, _| ())
            }
            Err(fault) => Ranked { why: Why::View(fault), ..Ranked::default() },
        };
        let mut failing = state.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let has_failed = ranked.why.is_fault();
        if has_failed && failing.insert(view.role.name.clone(), ranked.why.clone()).is_none() {
            let (role, why) = (&view.role.name, &ranked.why);
            tracing::warn!(role, %why, "the built-in ranks; see `peili status`");
        } else if !has_failed && failing.remove(&view.role.name).is_some() {
            tracing::info!(role = view.role.name, "policies rank again");
        }
        ranked
    }

    fn explain(&self, view: &View) -> (Ranked, Vec<Said>) {
        match view.check() {
            Ok(()) => self.state.load().election.explain(view),
            Err(fault) => (Ranked { why: Why::View(fault), ..Ranked::default() }, Vec::new()),
        }
    }

    fn hash(&self, key: Option<&[u8]>) -> EffectiveHash {
        let state = self.state.load();
        let has_failed = !state.failing.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if has_failed { EffectiveHash::BUILT_IN } else { election::hash(&state.effective, key) }
    }
}

impl Generation {
    fn is_empty(&self) -> bool {
        self.registry.is_empty() && self.trust.is_empty() && self.election.is_empty()
    }
}

fn replay<W: Recordable>(chain: &Chain<W>, request: &W::Request) -> (String, Vec<Said>) {
    let mut all = Vec::new();
    let ruling = chain.replay(request, REPLAY, |entry, took, answer| {
        all.push(said::<W>(&entry.name, entry.mode, took, answer.as_ref()));
    });
    (ruling.to_string(), all)
}

/// What stands against a set, and how to take it all the same.
fn objected(objection: &Objection, config: &Config, revision: &str) -> LoadError {
    let (policy, is_late) = match objection {
        Objection::Fails { policy, failure, .. } => (Some(policy), *failure == Failure::Time),
        Objection::Unranked { .. } => (None, false),
        Objection::Changes { by, .. } => (by.as_ref(), false),
    };
    let or = match objection {
        Objection::Fails { .. } | Objection::Unranked { .. } => "",
        Objection::Changes { .. } => ", or raise policies.max-change",
    };
    let path = config.plugins().find(|plugin| Some(plugin.name.as_str()) == policy.map(AsRef::as_ref));
    LoadError {
        policy: policy.map(ToString::to_string).unwrap_or_default(),
        path: path.map(|plugin| plugin.path.clone()).unwrap_or_default(),
        stage: Stage::Shadow,
        message: clean(&objection.to_string(), 1024),
        hint: Some(format!("if that is what you want, set policies.accept: \"{revision}\"{or}")),
        pending: false,
        is_passing: is_late,
        may_wait: false,
    }
}

/// Of nodes that know no other.
fn registry_world() -> String {
    "registry".into()
}
