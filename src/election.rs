//! Who does for all nodes what one of them should do: roles, and who holds them.
//!
//! Advisory roles are held by rendezvous over the membership: each node computes the same owners from the same facts, asks nobody, and
//! needs no API server. Where views differ, two nodes do the work of one, and nothing else. Knows no network: `app` brings the
//! members by [`World`], policies come as a trait of `policy`, and `mirror` asks by [`Homes`].
//!
//! The strict role is held under a lease of the Kubernetes API: its core is in [`lease`], pure and proved by simulation; [`strict`] drives it.
//! Which nodes stand for it, and in which order, follows from the same members. Nothing else waits for it.

mod campaign;
pub mod identity;
pub mod lease;
mod members;
mod metrics;
mod rendezvous;
mod roles;
mod seats;
mod status;
pub mod strict;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use crate::oci::{Home, Homes, PeerId};
use crate::policy::election::{self as policies, EffectiveHash, ElectionPolicy, Reachability};

pub use members::{Facts, Mark, Member};
pub use metrics::Metrics;
pub use roles::{Role, remembered};
pub use status::{Compared, Explained, Holder, LeaseStatus, RoleStatus, Standing, Status};
pub use table::{Alone, By, Mode, Table};

use campaign::Lease;
use members::{Load, uptime};
use roles::{Input, Output, Roles};
use strict::{Cause, Notes, Strict};

/// Between two evaluations: what changes meanwhile is taken together.
const PAUSE: Duration = Duration::from_millis(100);
/// Evaluations take at most one part in so many of the time, where thousands of members change.
const SHARE: u32 = 50;
/// And no pause is longer: a process that was stopped in one has not worked all that time.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between two looks at this node's own facts: they are told at most so often.
const LOOK: Duration = Duration::from_secs(1);
/// So long nodes take to look for an API server that one of them has found again, at least, and for each of them: beside what candidates ask
/// it is ten requests a second at most.
const HINT: Duration = Duration::from_secs(2);
const HINT_SHARE: Duration = Duration::from_millis(150);
/// Where another backend was configured while the process runs, the lease is given away and read no more than once an hour.
const NOT_WANTED: lease::Ms = 3_600_000;
/// An evaluation is made at least so often, for what tells nobody that it has changed.
const AT_LEAST: Duration = Duration::from_secs(30);

/// Bytes of all labels of a node: its record has little room.
pub const LABELS_LIMIT: usize = 192;
/// Nodes that `election.nodes` may name.
pub const NODES: usize = 64;
/// Most introducers.
pub const INTRODUCERS: u32 = 16;

/// Who does for all nodes what one of them should do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// How roles are given.
    pub backend: Backend,
    /// The lease of the strict role.
    pub lease: LeaseConfig,
    /// With `backend: configmap`: the lock of electors of old.
    pub configmap: ConfigMapConfig,
    /// With `backend: static`: the names of the nodes (`node.name`) that hold the roles, the first ones first. At most 64.
    pub nodes: Vec<String>,
    /// How many nodes newcomers are sent to first: 1 to 16.
    pub introducers: u32,
    /// Labels of this node that policies of elections see, besides its zone: at most 8, together at most 192 bytes.
    pub labels: BTreeMap<String, String>,
}

/// How roles are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// By the best that there is: with a Kubernetes API as `lease`, without one as `gossip`.
    #[default]
    Auto,
    /// The strict role by a lease, all others as `gossip`.
    Lease,
    /// The strict role by the ConfigMap in which electors of old have their lock, or by both, as `election.configmap` says; all others as
    /// `gossip`.
    #[serde(rename = "configmap")]
    ConfigMap,
    /// By each node's view of the members.
    Gossip,
    /// To the nodes that are named.
    Static,
    /// To nobody: each node for itself.
    Off,
}

impl Backend {
    /// Whether the strict role is held under a lock of the Kubernetes API, where there is one.
    pub const fn is_strict(self) -> bool {
        match self {
            Self::Auto | Self::Lease | Self::ConfigMap => true,
            Self::Gossip | Self::Static | Self::Off => false,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let (lease, configmap) = (LeaseConfig::default(), ConfigMapConfig::default());
        let (nodes, labels) = (Vec::new(), BTreeMap::new());
        Self { backend: Backend::Auto, lease, configmap, nodes, introducers: 3, labels }
    }
}

/// The lease of the strict role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LeaseConfig {
    /// Name of the Lease, in the namespace of `kubernetes`. Nodes that elect together name the same one.
    pub name: String,
    /// How long it holds and how often it is renewed; the same on all nodes.
    pub times: Times,
}

/// The ConfigMap of electors of old (client-go until 1.27): a record in the annotation `control-plane.alpha.kubernetes.io/leader`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfigMapConfig {
    /// Its name, in the namespace of `kubernetes`. Empty: as `election.lease.name`.
    pub name: String,
    /// What Peili does with it.
    pub hold: Hold,
}

/// What becomes of the lock of electors of old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// Whoever holds the ConfigMap leads; there is no Lease.
    #[default]
    Sole,
    /// Whoever holds the ConfigMap and the Lease leads.
    Both,
    /// Whoever holds the Lease leads. The ConfigMap is never written, and nobody stands for the Lease while another elector holds it.
    Observe,
}

/// Times of a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Times {
    /// 6 s, renewed every 1.5 s: a leader again within 8 s.
    #[default]
    Fast,
    /// 15 s, renewed every 2 s, as Kubernetes' own components.
    Compat,
    /// 137 s, renewed every 26 s: rides out a minute without the API server.
    Tolerant,
}

impl Times {
    /// As numbers.
    pub fn settings(self) -> lease::Settings {
        match self {
            Self::Fast => lease::Settings::FAST,
            Self::Compat => lease::Settings::COMPAT,
            Self::Tolerant => lease::Settings::TOLERANT,
        }
    }
}

impl Config {
    /// The name of the ConfigMap, where there is one.
    pub fn configmap_name(&self) -> &str {
        if self.configmap.name.is_empty() { &self.lease.name } else { &self.configmap.name }
    }
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self { name: "peili".into(), times: Times::default() }
    }
}

/// What elections see of the world, and what they tell it; implemented by `app`. Nothing of it may block.
pub trait World: Send + Sync {
    /// Live members that take part, this node among them.
    fn members(&self) -> Vec<Member>;
    /// Changes whenever these may be others.
    fn changes(&self) -> watch::Receiver<u64>;
    /// Whether a neighbour's whole view was taken.
    fn is_complete(&self) -> bool;
    /// Why this node is alone, if it is.
    fn alone(&self) -> Alone;
    /// Load of this node, in hundredths of its capacity.
    fn load(&self) -> u32;
    /// Nodes that are said to be there, this node among them: members, remembered ones, and addresses that were resolved.
    fn known(&self) -> usize;
    /// Tells all members what this node says of itself.
    fn tell(&self, facts: Facts);
    /// Takes who holds what.
    fn lead(&self, table: &Table);
    /// Signed records of these members, in their order, without those that are not there.
    fn records(&self, peers: &[PeerId]) -> Vec<Vec<u8>>;
    /// Takes what the lease says of who is there, from whoever may write it: a hint, to be judged.
    fn hint(&self, book: &[Vec<u8>]);
    /// What neighbours make of their views, as [`Table::opinion`] has it.
    fn opinions(&self) -> Vec<(u32, u32)>;
}

/// Elections of this node. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Election {
    shared: Arc<Shared>,
}

struct Shared {
    here: PeerId,
    config: ArcSwap<Config>,
    policy: Arc<dyn ElectionPolicy>,
    hash: Arc<dyn Fn() -> EffectiveHash + Send + Sync>,
    world: Arc<dyn World>,
    strict: Option<Strict>,
    metrics: Metrics,
    table: ArcSwapOption<Table>,
    /// Members that said last that they reach the API server.
    reaching: AtomicUsize,
    /// The configuration is another one.
    again: Notify,
}

impl Election {
    /// Elections that have not begun: until [`Election::follow`] runs nobody holds anything. `hash`: what this node's policies are. `strict`:
    /// the strict role, where there is a Kubernetes API.
    pub fn new(
        here: PeerId,
        config: &Config,
        policy: Arc<dyn ElectionPolicy>,
        hash: impl Fn() -> EffectiveHash + Send + Sync + 'static,
        world: Arc<dyn World>,
        strict: Option<Strict>,
        metrics: Metrics,
    ) -> Self {
        let shared = Shared {
            here,
            config: ArcSwap::from_pointee(config.clone()),
            policy,
            hash: Arc::new(hash),
            world,
            strict,
            metrics,
            table: ArcSwapOption::empty(),
            reaching: AtomicUsize::new(0),
            again: Notify::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Puts another configuration in force.
    pub fn reconfigure(&self, config: &Config) {
        if **self.shared.config.load() != *config {
            if let Some(strict) = &self.shared.strict {
                strict.configure(&config.lease.times.settings());
            }
            self.shared.config.store(Arc::new(config.clone()));
            self.shared.again.notify_one();
        }
    }

    /// Who holds what; `None`: not known yet.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.shared.table.load_full()
    }

    /// For people.
    pub fn status(&self) -> Status {
        let backend = self.shared.config.load().backend;
        let opinions = self.shared.world.opinions();
        let table = self.table();
        let status = table.as_ref().map(|table| table.status(backend, &opinions));
        let mut status = status.unwrap_or_else(|| Status { backend, ..Status::default() });
        if let Some((strict, table)) = self.strict().zip(table) {
            status.put_lease(&strict.state(), &table);
        }
        self.shared.metrics.compared(&status);
        status
    }

    /// What is wrong, one line each, with what to do about it.
    pub fn problems(&self) -> Vec<String> {
        let Some(table) = self.table() else { return Vec::new() };
        let mut lines: Vec<String> = Role::ALL
            .iter()
            .filter_map(|role| table.fallback(*role))
            .map(|fallback| self.fault(&table, fallback))
            .collect();
        lines.dedup();
        if let Some(state) = self.strict().map(Strict::state) {
            if let Some(fault) = state.fault.filter(|_| !state.relied_on) {
                lines.push(format!("elections: nobody coordinates: {fault}; {}", fault.cause.remedy()));
            }
            if table.mode() == Mode::Degraded(Cause::NoLeader) {
                lines.push(format!("elections: nobody coordinates: {}", Cause::NoLeader.remedy()));
            }
            lines.extend(state.blind.map(|fault| {
                format!("elections: changes of the lock are not told: {fault}; give the service account the verb watch on it")
            }));
        }
        lines
    }

    /// Gives a role away, if this node holds it and it can be given.
    ///
    /// # Errors
    /// Why not.
    pub async fn give_away(&self, role: Role) -> Result<(), String> {
        let name = role.name();
        let strict = self.strict().filter(|_| role == Role::Coordinator);
        let strict = strict.ok_or_else(|| {
            format!("{name} cannot be given away: it follows from the members; only the coordinator under a lease can")
        })?;
        let state = strict.state();
        // Whoever holds one of two locks keeps others from it.
        let holds_old = state.beside.as_ref().is_some_and(|old| old.leads());
        if !state.leads() && !holds_old {
            return Err(format!("this node does not hold {name}"));
        }
        if strict.leave(false).await {
            Ok(())
        } else {
            Err(format!(
                "{name} was not given away within a second; this node leads no more, and the lease is free when its time is over"
            ))
        }
    }

    /// Gives away what it holds, before the process ends.
    pub async fn leave(&self) {
        if let Some(strict) = &self.shared.strict {
            // Also where it does not lead: it would take what another node gives away that ends beside it.
            strict.leave(true).await;
        }
    }

    /// How the strict role stands; `None`: there is none.
    pub fn strictly(&self) -> Option<strict::State> {
        Some(self.strict()?.state())
    }

    /// The strict role, where the configuration wants it.
    fn strict(&self) -> Option<&Strict> {
        let backend = self.shared.config.load().backend;
        self.shared.strict.as_ref().filter(|_| backend.is_strict())
    }

    fn lease(&self) -> Option<Lease> {
        let state = self.strict()?.state();
        let duration = Duration::from_millis(self.shared.config.load().lease.times.settings().duration);
        let free = Duration::from_millis(state.free_for);
        // Nobody takes it: those who may say why.
        let is_idle = state.relied_on && free > 2 * duration;
        Some(Lease {
            relied_on: state.relied_on && !is_idle,
            cause: if is_idle { Cause::NoLeader } else { state.cause() },
            holder: state.holder.as_deref().filter(|_| !state.free).and_then(identity::peer),
            tenure: Duration::from_millis(state.tenure),
            members: state.notes.members,
            free,
            duration,
        })
    }

    fn fault(&self, table: &Table, fallback: roles::Fallback) -> String {
        match fallback {
            roles::Fallback::Disagreement => format!(
                "elections: the built-in ranks, since {} of {} members carry this node's election policies, and more than two \
                 thirds must have done so for 10 s; mount the same policies with the same settings on all nodes",
                table.carry(),
                table.members()
            ),
            roles::Fallback::Failed | roles::Fallback::Excluded | roles::Fallback::View => {
                let status = table.status(self.shared.config.load().backend, &[]);
                let why = status
                    .roles
                    .into_iter()
                    .find(|role| role.fallback == fallback.name())
                    .map(|role| role.why);
                format!("elections: the built-in ranks: {}", why.unwrap_or_default())
            }
        }
    }

    /// Why a role, or the holder of a key of it, is as it is; asks the policies. `None`: nothing is known yet.
    pub fn explain(&self, role: Role, key: Option<&str>) -> Option<Explained> {
        let table = self.table()?;
        let mut said = Vec::new();
        if self.shared.policy.is_active() {
            let introducers = self.shared.config.load().introducers;
            let (role, candidates) = (role.for_policies(introducers), table.candidates());
            said = self.shared.policy.explain(&policies::View { role, candidates, holder: None }).1;
        }
        let mut explained = table.explain(role, key, said);
        if let Some(strict) = self.strict().filter(|_| role == Role::Coordinator) {
            explained.put_lease(&strict.state(), &table);
        }
        Some(explained)
    }

    /// Keeps the table right. Ends never.
    pub async fn follow(self) {
        let shared = &self.shared;
        let began = Instant::now();
        let hash = Arc::clone(&shared.hash);
        let mut roles = Roles::new(shared.here.clone(), Arc::clone(&shared.policy), move || hash());
        let mut changes = shared.world.changes();
        let mut lease = shared.strict.as_ref().map(Strict::changes);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut load, mut told, mut mark) = (Load::default(), None, None);
        let mut generation = shared.policy.generation();
        let mut due = Instant::now();
        loop {
            tokio::select! {
                Ok(()) = changes.changed() => {}
                () = changed(lease.as_mut()) => {}
                () = shared.again.notified() => {}
                () = sleep_until(due) => {}
                _ = looks.tick() => {
                    let load = load.sample(shared.world.load(), began.elapsed());
                    // Not before the policies were asked: it would be told twice.
                    let Some(policy) = mark else { continue };
                    let facts = Facts {
                        policy,
                        api_server: self.reachability(),
                        // Nobody asks for it where there are no policies.
                        load: if policy.is_built_in() { 0 } else { load },
                        uptime: uptime(began.elapsed()),
                        labels: shared.config.load().labels.clone(),
                    };
                    if told.as_ref() != Some(&facts) {
                        shared.world.tell(facts.clone());
                        told = Some(facts);
                    }
                    if generation == shared.policy.generation() {
                        continue;
                    }
                }
            }
            generation = shared.policy.generation();
            let now = began.elapsed();
            let election = self.clone();
            let evaluation = tokio::task::spawn_blocking(move || {
                let (world, config) = (&election.shared.world, election.shared.config.load_full());
                let start = Instant::now();
                // Before it is said why this node is alone.
                let notes = election.strict().map(|strict| strict.state().notes);
                world.hint(notes.as_ref().map_or(&[], |notes| &notes.book));
                let (members, complete) = (world.members(), world.is_complete());
                let alone = if members.len() > 1 { Alone::Unreached } else { world.alone() };
                let (known, lease) = (world.known(), election.lease());
                let output = roles.evaluate(&config, Input { now, members, complete, alone, known, lease });
                (roles, output, start.elapsed())
            });
            // A panic of it ends this task, which the watchdog looks after.
            let Ok((back, output, took)) = evaluation.await else { return };
            roles = back;
            mark = Some(output.mark);
            due = Instant::now() + AT_LEAST;
            if let Some(at) = output.due {
                due = due.min(began + at);
            }
            self.take(&output, took);
            sleep(PAUSE.max(took.saturating_mul(SHARE)).min(LONGEST_PAUSE)).await;
        }
    }

    fn reachability(&self) -> Reachability {
        match self.strict().and_then(|strict| strict.state().reached) {
            None => Reachability::Unknown,
            Some(true) => Reachability::Reachable,
            Some(false) => Reachability::Unreachable,
        }
    }

    fn stand(&self, output: &Output) {
        let Some(strict) = &self.shared.strict else { return };
        if self.strict().is_none() {
            return strict.stand(lease::Standing::Observer(NOT_WANTED));
        }
        let Some(standing) = output.standing else { return };
        let members = u32::try_from(output.table.members()).unwrap_or(u32::MAX);
        let book = self.shared.world.records(&output.table.book());
        strict.note(Notes { members, book }.bounded());
        strict.stand(standing);
        let reaching = output.table.reaching();
        if reaching > self.shared.reaching.swap(reaching, Ordering::Relaxed) {
            strict.hint(HINT.max(HINT_SHARE * members));
        }
        if output.yields && strict.state().leads() {
            tracing::info!(role = Role::Coordinator.name(), "makes room for a better candidate");
            let strict = strict.clone();
            tokio::spawn(async move { strict.leave(false).await });
        }
    }

    fn take(&self, output: &Output, took: Duration) {
        let shared = &self.shared;
        let table = &output.table;
        self.stand(output);
        let before = shared.table.swap(Some(Arc::clone(table)));
        shared.metrics.table(table, before.as_deref(), &output.changed, took);
        shared.metrics.compared(&self.status());
        shared.world.lead(table);
        let mode = table.mode();
        if before.as_ref().is_none_or(|before| before.mode() != mode) {
            tracing::info!(
                mode = mode.name(),
                cause = mode.cause(),
                remedy = mode.remedy(),
                "how roles are given"
            );
        }
        for role in Role::ALL {
            let last = before.as_ref().and_then(|before| before.fallback(role));
            match table.fallback(role) {
                fallback if fallback == last => {}
                Some(fallback) => {
                    tracing::warn!(role = role.name(), "{}", self.fault(table, fallback));
                }
                None => tracing::info!(
                    role = role.name(),
                    "no longer: the built-in ranks where there are policies"
                ),
            }
        }
        if output.changed.contains(&Role::Introducers) {
            tracing::info!(introducers = ?table.introducers(), here = table.holds(Role::Introducers), "introducers");
        }
    }
}

async fn changed(lease: Option<&mut watch::Receiver<strict::State>>) {
    let ended = match lease {
        Some(lease) => lease.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending::<()>().await;
    }
}

impl Homes for Election {
    fn home(&self, key: &[u8]) -> Home {
        self.shared.table.load().as_ref().map_or(Home::Nobody, |table| table.home(key))
    }

    fn runner_up(&self, key: &[u8]) -> Home {
        self.shared.table.load().as_ref().map_or(Home::Nobody, |table| table.runner_up(key))
    }
}
