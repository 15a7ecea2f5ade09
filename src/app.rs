//! The composition root: the only module that names adapters. Builds the parts, joins them, follows the configuration,
//! and drains on a signal.
//!
//! Nothing that may be absent at the start ends it: not containerd, not peers, not DNS, not even a readable identity.
//! Only what an operator got wrong does: a configuration that cannot be, or an address that is taken.

mod diagnosing;
mod electing;
mod facts;
mod reload;
mod report;
mod vitals;
mod zone;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use crate::admin::{self, Sources};
use crate::config::{Config, Loaded, watch};
use crate::election::strict::LeaseMetrics;
use crate::election::{self, Election};
use crate::listener::Sockets;
use crate::mirror::{self, Mirror, Parts, Serve, Settings, Tags};
use crate::network::admission::{self, Admission, Mode};
use crate::network::identity::{Identity, IdentityError};
use crate::network::swarm::{self, Announcement, Swarm, SwarmNetwork};
use crate::network::{self, versions};
use crate::oci::{Gate, Members};
use crate::policy::registry::RegistryPolicy;
use crate::policy::trust::TrustPolicy;
use crate::policy::{self, Policies, Provenance};
use crate::registry;
use crate::store::containerd::ContainerdStore;
use crate::store::layout::LayoutStore;
use crate::store::{Provider, Watcher};
use crate::telemetry::{self, Causes, Log};
use crate::transfer::{self, client::Client, server::Access, server::ServerHandle};
use crate::trust::{self, Changed, Judge, PinnedTrust};
use crate::upstream;
use crate::upstream::named::Named;
use crate::upstream::probe::Prober;
use crate::watchdog::Watchdog;

use diagnosing::Diagnosing;
use report::{Problems, Report};
use vitals::Vitals;
use zone::Zone;

/// What runs. Dropping it ends it.
struct App {
    config: Config,
    log: Log,
    gate: Arc<PinnedTrust>,
    admission: Admission,
    settings: Settings,
    policies: Arc<Policies>,
    election: Election,
    looks: Arc<AtomicBool>,
    prober: Arc<Prober>,
    upstreams: Named,
    network: SwarmNetwork,
    swarm: Swarm,
    uploads: ServerHandle,
    registry: registry::Server,
    admin: admin::Server,
    problems: Arc<Problems>,
    listening: Arc<AtomicBool>,
    vitals: Vitals,
    _explaining: Option<admin::ExplainServer>,
    _driving: Option<AbortOnDropHandle<()>>,
    _tasks: [AbortOnDropHandle<()>; 10],
}

/// Runs this node's mirror until a signal ends it.
///
/// # Errors
/// A configuration that cannot be, or an address that cannot be bound.
pub async fn run(loaded: Loaded) -> anyhow::Result<()> {
    let log = Log::start(&loaded.config.log)?;
    // Signals and changes that come while the parts start must not be lost.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut changes = watch::watch(&loaded).context("cannot watch the configuration")?;
    let mut app = App::start(loaded.config, log.clone())?;
    app.vitals.add("configuration watch", {
        let watch = changes.task();
        move || !watch.is_finished()
    });
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(change) = changes.next() => app.reload(change.map(|loaded| loaded.config)),
        }
    }
    let limit = app.config.node.drain;
    tracing::info!(?limit, "draining; another signal ends it at once");
    tokio::select! {
        () = app.drain(limit) => {}
        _ = terminate.recv() => tracing::warn!("ended before the drain was over"),
        _ = interrupt.recv() => tracing::warn!("ended before the drain was over"),
    }
    Ok(())
}

impl App {
    fn start(config: Config, log: Log) -> anyhow::Result<Self> {
        config.registry.check()?;
        config.admin.check()?;
        raise_descriptor_limit();
        let watchdog = Watchdog::start().context("cannot start the watchdog")?;
        let executor = watchdog.watch_executor(&tokio::runtime::Handle::current());
        let mut all_metrics = prometheus_client::registry::Registry::default();
        let lease_metrics = LeaseMetrics::register(&mut all_metrics);
        let metrics = telemetry::registry(&mut all_metrics);
        telemetry::register_runtime(metrics, tokio::runtime::Handle::current());
        log.register(metrics);

        let (identity, identity_problem) = identity(&config);
        let data_problem = data_problem(&config.node.data_dir);
        let problems = Arc::new(Problems::default());
        tracing::info!(
            version = versions::PROGRAM, node = config.node.name, peer = %identity.peer_id(),
            store = config.store.source, "starting"
        );
        warn_if_open(&config.network);
        if config.network.peers.is_empty() && config.network.dns.is_empty() {
            tracing::warn!(
                "no peers are configured: this node is alone until others connect; name them under `network.peers` by \
                 the IDs that `peili identity` prints on them, or by a service under `network.dns`"
            );
        }
        let (store, watcher) = store(&config)?;
        let gate = Arc::new(PinnedTrust::new(config.trust.clone(), peers(&config.network))?);
        let network_metrics = network::metrics::register(metrics.sub_registry_with_prefix("network"));
        let admission = Admission::new(
            identity.peer_id().clone(),
            &config.network,
            Arc::clone(&gate) as Arc<dyn Members>,
            network_metrics.clone(),
        );
        let settings = Settings::new(&config.mirror, config.trust.unowned)?;
        let mirror_metrics = mirror::Metrics::register(metrics.sub_registry_with_prefix("mirror"));
        let upstreams =
            Named::new(upstream::metrics::Metrics::register(metrics.sub_registry_with_prefix("upstream")));
        upstreams.reconfigure(&config.upstreams);
        let zone = Arc::new(Zone::new(&config));
        let policies = policies(&config, &zone.now(), &identity, metrics.sub_registry_with_prefix("policy"));
        // Nobody gets anything before it was judged.
        gate.judge_first(policies.enforces());
        // Not before the policies are compiled: who connects to a socket that nobody reads waits, where it would have gone elsewhere.
        let registry_sockets = config.registry.bind()?;
        let admin_sockets = config.admin.bind()?;
        let transfer_sockets = Sockets::bind("transfer.listen", &config.transfer.listen)?;
        let following = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&policies).follow()));
        let book = facts::PeerBook::default();
        let prober = Arc::new(Prober::new(config.upstream.clone(), registry_sockets.addresses()));
        let tags = Tags::new(Arc::clone(&prober) as _, Arc::new(upstreams.clone()), mirror_metrics.clone());
        let serve = || {
            let gate = Arc::clone(&gate) as Arc<dyn Gate>;
            let policies = Arc::clone(&policies) as Arc<dyn RegistryPolicy>;
            Serve::new(&settings, Arc::clone(&store), gate, tags.clone(), mirror_metrics.clone()).under(
                policies,
                Arc::new(book.clone()),
                Arc::new(upstreams.clone()),
            )
        };

        let transfer_metrics =
            transfer::metrics::Metrics::register(metrics.sub_registry_with_prefix("transfer"));
        let uploads = transfer::server::Server::spawn(
            transfer_sockets.into_listeners().collect(),
            &identity,
            &config.transfer,
            Access { gate: Arc::clone(&gate) as _, admission: admission.clone() },
            Arc::new(serve()),
            transfer_metrics.clone(),
        )
        .context("cannot start the peer port")?;
        let announcement = Announcement {
            transfer: uploads.addresses().to_vec(),
            node: config.node.name.clone(),
            zone: zone.now(),
            version: versions::PROGRAM.into(),
        };
        let parts = swarm::Parts {
            gate: Arc::clone(&gate) as Arc<dyn Gate>,
            admission: admission.clone(),
            tags: Arc::new(serve()),
            metrics: network_metrics,
            keep: Some(config.node.data_dir.clone()),
            first: Some(electing::first(identity.peer_id(), &config.election)),
        };
        let (swarm, network) = Swarm::spawn(&identity, &config.network, &announcement, parts)?;
        book.open(network.clone());
        let looks = Arc::new(AtomicBool::new(electing::looks(&config.network)));
        let nodes = electing::Nodes {
            network: network.clone(),
            load: Box::new(uploads.load()),
            looks: Arc::clone(&looks),
        };
        let election_metrics = election::Metrics::register(metrics.sub_registry_with_prefix("election"));
        let (strict, work) = electing::strict(&config, &network, lease_metrics).unzip();
        let (driver, coordinator) = work.unzip();
        let driving = driver.map(|driver| AbortOnDropHandle::new(tokio::spawn(driver)));
        let election =
            electing::elections(&config.election, &policies, &admission, nodes, strict, election_metrics);
        let electing = AbortOnDropHandle::new(tokio::spawn(election.clone().follow()));
        let diagnosing = Arc::new(Diagnosing::new(&config, metrics.sub_registry_with_prefix("doctor")));
        let looking = Arc::clone(&diagnosing).follow(election.clone(), network.clone());
        let looking = AbortOnDropHandle::new(tokio::spawn(looking));

        let client = Client::presenting(admission.clone(), &identity, transfer_metrics)
            .context("cannot start the peer client")?;
        let held = Arc::clone(&store);
        let stored = Arc::clone(&watcher);
        let parts = Parts {
            store,
            network: Arc::new(network.clone()),
            transfer: Arc::new(client),
            upstream: Arc::clone(&prober) as _,
            upstreams: Arc::new(upstreams.clone()),
            tags: tags.clone(),
            homes: Arc::new(election.clone()),
            gate: Arc::clone(&gate) as Arc<dyn Gate>,
            policy: Arc::clone(&policies) as Arc<dyn RegistryPolicy>,
            zone: zone.now(),
            metrics: mirror_metrics.clone(),
        };
        let mirror = Mirror::new(&settings, parts);
        let resolving = AbortOnDropHandle::new(tokio::spawn(mirror.clone().follow_tags()));
        let [locating, telling] = zone::follow(&zone, &network, &mirror, &policies);
        let advertising = mirror::advertise(Arc::clone(&watcher), Arc::new(network.clone()));
        let advertising = AbortOnDropHandle::new(tokio::spawn(advertising));

        // Certificates are shown again, and live connections are asked about again.
        let admitting = AbortOnDropHandle::new(tokio::spawn({
            let (network, recheck_uploads) = (network.clone(), uploads.rechecker());
            admission.clone().follow(move || {
                network.recheck();
                recheck_uploads();
            })
        }));
        let peer_facts = facts::PeerFacts { network: network.clone(), mirror: mirror.clone() };
        let judge = Judge::new(
            Arc::clone(&gate),
            Arc::clone(&policies) as Arc<dyn TrustPolicy>,
            Arc::new(peer_facts),
        );
        let judging = AbortOnDropHandle::new(tokio::spawn({
            let (network, recheck_uploads) = (network.clone(), uploads.rechecker());
            judge.clone().follow(move |changed| {
                match changed {
                    Changed::All => network.recheck(),
                    Changed::Of(peers) => network.recheck_peers(peers),
                }
                recheck_uploads();
            })
        }));
        let explainers = admin::Explainers {
            election: Arc::new({
                let election = election.clone();
                move |()| election.status()
            }),
            give_away: Arc::new({
                let (election, runtime) = (election.clone(), tokio::runtime::Handle::current());
                move |role| runtime.block_on(election.give_away(*role))
            }),
            role: Arc::new({
                let election = election.clone();
                move |(role, key)| election.explain(*role, key.as_deref())
            }),
            pull: Arc::new({
                let mirror = mirror.clone();
                move |image| mirror.explain(image)
            }),
            peer: Arc::new(move |peer| judge.explain(peer)),
        };
        let explaining = admin::ExplainServer::start(&config.node.data_dir, explainers)
            .inspect_err(|error| tracing::warn!(%error, "`peili explain` will not work: no socket"))
            .ok();

        let causes = Arc::new(Causes::default());
        let registry_metrics = registry::Metrics::register(metrics.sub_registry_with_prefix("registry"));
        let registry = registry::Server::start(
            registry_sockets,
            &config.registry,
            Arc::new(mirror.clone()),
            registry_metrics.clone(),
            Arc::clone(&causes),
            Some(&watchdog),
        )?;
        let report = Report {
            node: admin::Node {
                peer_id: identity.peer_id().to_string(),
                name: config.node.name.clone(),
                identity_problem: identity_problem.unwrap_or_default(),
                data_problem: data_problem.unwrap_or_default(),
                zone: String::new(),
                version: versions::PROGRAM.into(),
                uptime_seconds: 0,
            },
            zone: Arc::clone(&zone),
            started: tokio::time::Instant::now(),
            source: config.store.source.clone(),
            watcher: Arc::clone(&watcher),
            mirror,
            network: network.clone(),
            served: registry_metrics,
            clients: registry.admission().clone(),
            to_peers: mirror_metrics,
            causes,
            policies: Arc::clone(&policies),
            election: election.clone(),
            coordinator,
            diagnosing,
            upstreams: upstreams.clone(),
            prober: Arc::clone(&prober),
            gate: Arc::clone(&gate),
            problems: Arc::clone(&problems),
        };
        let listening = Arc::new(AtomicBool::new(true));
        let accepts = Arc::clone(&listening);
        let required = Arc::clone(&policies);
        let sources = Sources {
            ready: Arc::new(move || {
                let accepts = accepts.load(Ordering::Relaxed);
                admin::readiness(accepts, held.view().was_read(), &watcher.health().borrow())?;
                required.unready().map_or(Ok(()), |problem| Err(format!("policies: {problem}")))
            }),
            status: Arc::new(move || report.status()),
            metrics: Arc::new(all_metrics),
        };
        let admin = admin::Server::start(admin_sockets, &config.admin, sources, Some(&watchdog));
        let mut vitals = Vitals::start(watchdog);
        vitals.add("store", move || stored.is_running());
        vitals.add("network", {
            let network = network.clone();
            move || network.is_running()
        });
        vitals.add("advertising", {
            let advertising = advertising.abort_handle();
            move || !advertising.is_finished()
        });
        vitals.add("policies", {
            let following = following.abort_handle();
            move || !following.is_finished()
        });
        vitals.add("elections", {
            let electing = electing.abort_handle();
            move || !electing.is_finished()
        });
        if let Some(driving) = &driving {
            let driving = driving.abort_handle();
            vitals.add("lease", move || !driving.is_finished());
        }
        vitals.add("trust", {
            let judging = judging.abort_handle();
            move || !judging.is_finished()
        });
        vitals.add("admission", {
            let admitting = admitting.abort_handle();
            move || !admitting.is_finished()
        });
        tracing::info!(
            registry = ?registry.addresses(), peers = ?uploads.addresses(), admin = ?admin.addresses(), "listening"
        );
        Ok(Self {
            config,
            log,
            gate,
            admission,
            settings,
            policies,
            election,
            looks,
            prober,
            upstreams,
            network,
            swarm,
            uploads,
            registry,
            admin,
            problems,
            listening,
            vitals,
            _explaining: explaining,
            _driving: driving,
            _tasks: [
                executor,
                advertising,
                admitting,
                judging,
                following,
                electing,
                resolving,
                locating,
                telling,
                looking,
            ],
        })
    }

    /// Peers are told, so that they ask others, and are refused what they begin until they know; transfers that run may end.
    async fn drain(self, limit: Duration) {
        self.listening.store(false, Ordering::Relaxed);
        // What ends from here on ends on purpose.
        let _watchdog = self.vitals.end();
        // While others can still hear of it.
        let leaving = self.election.leave();
        let ((), (), registry, ()) = tokio::join!(
            leaving,
            self.swarm.shutdown(),
            self.registry.drain(limit),
            self.uploads.shutdown(limit)
        );
        if !registry {
            tracing::warn!("some answers to the runtime were cut by the end of the drain");
        }
        self.admin.drain(Duration::from_millis(100)).await;
    }
}

/// Whom the configuration trusts.
fn peers(config: &network::Config) -> trust::Peers {
    trust::Peers {
        listed: config.peers.iter().map(|peer| peer.id.clone()).collect(),
        denied: config.deny.iter().cloned().collect(),
        by_key: config.admission() == Mode::Key,
    }
}

/// The policies of the configuration; those that cannot be loaded have been logged, and stand with their failure verdicts.
fn policies(
    config: &Config,
    zone: &str,
    identity: &Identity,
    metrics: &mut prometheus_client::registry::Registry,
) -> Arc<Policies> {
    let here = policy::Node {
        id: identity.peer_id().to_string(),
        name: config.node.name.clone(),
        name_provenance: Provenance::Configured,
        version: versions::PROGRAM.into(),
        labels: policy::zone(zone, Provenance::Configured),
    };
    let policies = Policies::new(here, policy::metrics::Metrics::register(metrics));
    let _ = tokio::task::block_in_place(|| policies.apply(&config.policies));
    Arc::new(policies)
}

fn warn_if_open(config: &network::Config) {
    if config.admission() == Mode::Open {
        tracing::warn!("{}", admission::OPEN);
    }
}

/// The identity on disk. Without one that can be read the node works with a passing identity that no peer knows: alone
/// is a legal state, and a node that does not start serves nothing at all.
fn identity(config: &Config) -> (Identity, Option<String>) {
    let folder = &config.node.data_dir;
    let result = match Identity::load_or_create(folder) {
        Err(IdentityError::Corrupt { .. }) if config.node.identity_recovery => {
            Identity::recover(folder).map(|(identity, aside)| {
                let peer = identity.peer_id();
                tracing::error!(?aside, %peer, "the identity was corrupt: a new one was made, of which peers must be told");
                identity
            })
        }
        result => result,
    };
    match result {
        Ok(identity) => (identity, None),
        Err(error) => {
            let problem = format!(
                "identity: {error}; until then this node has a passing one that no list of peers has"
            );
            tracing::error!("{problem}");
            (Identity::generate(), Some(problem))
        }
    }
}

/// Why nothing can be kept in the data folder; `None`: it can. To be asked after the identity, with which the folder is made.
fn data_problem(folder: &Path) -> Option<String> {
    let error = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).err()?;
    let problem = format!(
        "data folder {}: {}; what this node learns ends with this run, and `peili explain` has no socket: let it have the folder, writable",
        folder.display(),
        std::io::Error::from(error)
    );
    tracing::error!("{problem}");
    Some(problem)
}

fn store(config: &Config) -> anyhow::Result<(Arc<dyn Provider>, Arc<dyn Watcher>)> {
    if config.store.source == "containerd" {
        let store = Arc::new(ContainerdStore::new(&config.store));
        return Ok((store.clone(), store));
    }
    let spec = config.store.source.parse().context("`store.source` is neither `containerd` nor a layout")?;
    let store = Arc::new(LayoutStore::start(spec));
    Ok((store.clone(), store))
}

/// Each connection and each open blob takes a descriptor; service managers start with 1,024 of them.
fn raise_descriptor_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, ?current, "cannot raise the limit of descriptors");
    }
}
