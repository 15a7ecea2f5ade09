//! `peili configure` and `peili cleanup`: what they take, and what they print.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

use super::commands::{print, print_error};
use super::{Failure, Sources};
use crate::cluster::{Api, Rollout, rollout};
use crate::config;
use crate::configure::{self, Error, Format, Mirror, Mode, Options, Report, Settings, Target};

/// How often an API server is asked about a DaemonSet, and how long it has for an answer.
const ASK: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(5));

/// How often a node that is to stay clean is looked at.
const KEEP: Duration = Duration::from_secs(5);

/// After the help of `peili configure`.
pub(super) const CONFIGURE_HELP: &str = "Examples:\n  peili configure --dry-run\n  peili configure\n  \
    peili configure docker.io ghcr.io registry.local:5000\n  peili configure --check --json | jq .ready\n  \
    peili configure --root /host\n  peili configure --format talos > peili-patch.yaml\n\n\
    Exit codes: 0 done, or nothing to do; 1 failed; 2 wrong usage or configuration; 3 pulls do not come to Peili, or \
    would not stay so: a problem stands in the output. With --dry-run, 0 unless it fails. With --exit-zero, 0.";
/// After the help of `peili cleanup`.
pub(super) const CLEANUP_HELP: &str = "Examples:\n  peili cleanup --dry-run\n  peili cleanup\n  peili cleanup docker.io\n\n\
    Exit codes: 0 done, or nothing to do; 1 failed, or with --wait-for not done in time; 2 wrong usage or configuration. With \
    --exit-zero, 0.";

/// Where things are.
#[derive(Args, Debug)]
pub(super) struct Place {
    /// Where Peili answers [default: by registry.listen of the configuration]
    #[arg(long, value_name = "URL")]
    mirror: Option<Mirror>,

    /// containerd's folder of registry hosts, instead of what is found: DIR, or DIR:DIR for one that has several. Can be
    /// repeated for several containerds
    #[arg(long, value_name = "DIR[:DIR]")]
    config_path: Vec<String>,

    /// Where the host's files are: in a pod, where its root is mounted
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,

    /// Folder for what is needed to undo it [default: node.data-dir of the configuration]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    #[command(flatten)]
    sources: Sources,
}

/// Arguments of `peili configure`.
#[derive(Args, Debug)]
pub(super) struct Configure {
    /// Registries as they stand in image names (docker.io, registry.local:5000), or _default for all that have no folder
    /// of their own [default: those that were set up before, else _default]
    #[arg(value_name = "REGISTRY")]
    registries: Vec<Target>,

    /// Whom containerd asks [default: as before, else first]
    #[arg(long, value_enum)]
    mode: Option<ModeArgument>,

    /// Write nothing; print what would change, as a unified diff
    #[arg(long, conflicts_with_all = ["check", "format"])]
    dry_run: bool,

    /// Write nothing; say whether this node is set up and would stay so
    #[arg(long, conflicts_with = "format")]
    check: bool,

    /// Write nothing; print the configuration of a distribution that writes the folder itself
    #[arg(long, value_enum, conflicts_with = "json")]
    format: Option<FormatArgument>,

    /// Print the findings and changes as JSON
    #[arg(long)]
    json: bool,

    /// Exit with 0 whatever is found or fails, and say it: for an init container, which must not keep the mirror from starting
    #[arg(long)]
    exit_zero: bool,

    #[command(flatten)]
    place: Place,
}

/// Arguments of `peili cleanup`.
#[derive(Args, Debug)]
pub(super) struct Cleanup {
    /// Only these registries, or _default [default: all]
    #[arg(value_name = "REGISTRY")]
    registries: Vec<Target>,

    /// Write nothing; print what would change, as a unified diff
    #[arg(long)]
    dry_run: bool,

    /// Print the changes as JSON
    #[arg(long)]
    json: bool,

    /// When it is done, stay until SIGTERM and keep the node so: for the pods of a DaemonSet, which are to be ready once their node is clean
    #[arg(long, conflicts_with = "dry_run")]
    hold: bool,

    /// Change nothing on this node; wait until the DaemonSet of this name is ready on all its nodes, which `peili cleanup --hold` makes
    /// it where it is done
    #[arg(long, value_name = "DAEMONSET", conflicts_with_all = ["registries", "dry_run", "json", "hold"])]
    wait_for: Option<String>,

    /// How long to wait for it
    #[arg(long, value_name = "TIME", default_value = "2m", requires = "wait_for", value_parser = humantime::parse_duration)]
    within: Duration,

    /// Exit with 0 whatever is found or fails, and say it
    #[arg(long)]
    exit_zero: bool,

    #[command(flatten)]
    place: Place,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeArgument {
    /// Peili first, then all hosts that were there
    First,
    /// Peili only: pulls then depend on it
    Only,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormatArgument {
    /// A patch of the machine configuration
    Talos,
    /// /etc/rancher/k3s/registries.yaml
    K3s,
    /// /etc/rancher/rke2/registries.yaml
    Rke2,
    /// Settings
    Bottlerocket,
}

/// Sets up the node, or looks at it.
pub(super) fn configure(arguments: Configure) -> Result<(), Failure> {
    let exit_zero = arguments.exit_zero;
    forgive(set_up(arguments), exit_zero)
}

fn set_up(arguments: Configure) -> Result<(), Failure> {
    let mode = arguments.mode.map(|mode| match mode {
        ModeArgument::First => Mode::First,
        ModeArgument::Only => Mode::Only,
    });
    let options = arguments.place.options(arguments.registries, mode)?;
    if let Some(format) = arguments.format {
        let format = match format {
            FormatArgument::Talos => Format::Talos,
            FormatArgument::K3s => Format::K3s,
            FormatArgument::Rke2 => Format::Rke2,
            FormatArgument::Bottlerocket => Format::Bottlerocket,
        };
        let targets = if options.targets.is_empty() { vec![Target::Default] } else { options.targets };
        let mode = options.mode.unwrap_or(Mode::First);
        return print(&format.render(&targets, &options.mirror, mode).map_err(Failure::Usage)?);
    }
    let (report, done) = if arguments.check {
        (configure::check(&options)?, false)
    } else if arguments.dry_run {
        (configure::preview(&options)?, false)
    } else {
        (configure::configure(&options)?, true)
    };
    if arguments.check && !arguments.json {
        // What would have to change is said by the findings.
        print(&Report { changes: Vec::new(), ..report.clone() }.render(done))?;
    } else {
        show(&report, arguments.json, done)?;
    }
    match () {
        () if report.ready && arguments.check && !arguments.json => print("this node is set up\n"),
        () if report.ready || arguments.dry_run => Ok(()),
        () if done => {
            Err(Failure::NotSetUp("written, but pulls do not come to Peili: see the problems above".into()))
        }
        () => Err(Failure::NotSetUp("this node is not set up: see the problems above".into())),
    }
}

/// Takes Peili out of the node, or waits for those that do so on all nodes.
pub(super) async fn cleanup(arguments: Cleanup) -> Result<(), Failure> {
    let exit_zero = arguments.exit_zero;
    let mut kept = None;
    let done = match &arguments.wait_for {
        Some(name) => wait_for(name, arguments.within, arguments.place.sources).await,
        None => {
            let options = arguments.place.options(arguments.registries, None)?;
            kept = arguments.hold.then(|| options.clone());
            take_out(&options, arguments.dry_run, arguments.json)
        }
    };
    forgive(done, exit_zero)?;
    if let Some(options) = kept {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
        print("staying until SIGTERM, by --hold\n")?;
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} () = keep(options) => {} }
    }
    Ok(())
}

fn take_out(options: &Options, dry_run: bool, json: bool) -> Result<(), Failure> {
    let report = configure::cleanup(options, dry_run)?;
    if report.changes.is_empty() && !json {
        return print("Peili is in no file of this node: nothing to do\n");
    }
    show(&report, json, !dry_run)
}

/// Takes it out again and again, since a mirror that begins meanwhile sets the node up once more. It ends when nobody reads what it says.
async fn keep(options: Options) {
    loop {
        sleep(KEEP).await;
        let own = options.clone();
        let done = tokio::task::spawn_blocking(move || configure::cleanup(&own, false)).await;
        let told = match done {
            Ok(Ok(report)) if report.changes.is_empty() => Ok(()),
            Ok(Ok(report)) => show(&report, false, true),
            Ok(Err(error)) => print_error(&format!("{error}\n")),
            Err(error) => print_error(&format!("{error}\n")),
        };
        if told.is_err() {
            return;
        }
    }
}

/// Waits for a DaemonSet, and says how far it is when that changes. An API server that does not answer is asked again.
async fn wait_for(name: &str, within: Duration, sources: Sources) -> Result<(), Failure> {
    let config = sources.load()?.config.kubernetes;
    if !config.is_in_cluster() {
        return Err(Failure::Usage(
            "no API server is known\nhint: this is for pods; elsewhere name one by `kubernetes.endpoints`"
                .into(),
        ));
    }
    let api = Api::new(&config);
    let end = Instant::now() + within;
    let mut said = String::new();
    loop {
        let answer = rollout(&api, name, ASK.1).await;
        if answer.as_ref().is_ok_and(Rollout::is_complete) {
            return print(&format!("{name}: done on all nodes\n"));
        }
        let now = match answer {
            Ok(rollout) => format!("{name}: done on {rollout}"),
            Err(fault) => format!("{name}: {fault}"),
        };
        if now != said {
            print(&format!("{now}\n"))?;
            said = now;
        }
        if Instant::now() + ASK.0 > end {
            return Err(Failure::Failed(anyhow::anyhow!(
                "waited {} for all nodes\nhint: `peili cleanup` does the same by hand on those that were not reached: {said}",
                humantime::format_duration(within)
            )));
        }
        sleep(ASK.0).await;
    }
}

/// What `--exit-zero` makes of a failure.
fn forgive(done: Result<(), Failure>, exit_zero: bool) -> Result<(), Failure> {
    match done {
        Err(failure) if exit_zero => print_error(&format!("not an error, by --exit-zero: {failure:#}\n")),
        done => done,
    }
}

fn show(report: &Report, json: bool, done: bool) -> Result<(), Failure> {
    if !json {
        return print(&report.render(done));
    }
    let text = serde_json::to_string_pretty(report).context("cannot write the report")?;
    print(&format!("{text}\n"))
}

impl Place {
    fn options(self, targets: Vec<Target>, mode: Option<Mode>) -> Result<Options, Failure> {
        self.load(targets, mode).map(|(options, _)| options)
    }

    /// What `configure` is asked, and the configuration that says so.
    pub(super) fn load(
        self,
        targets: Vec<Target>,
        mode: Option<Mode>,
    ) -> Result<(Options, config::Config), Failure> {
        let config = self.sources.load()?.config;
        let mirror = match self.mirror {
            Some(mirror) => mirror,
            None => Mirror::of(&config.registry.listen).ok_or_else(|| {
                Failure::Usage("registry.listen is empty\nhint: name the address by --mirror".to_owned())
            })?,
        };
        let settings = Settings {
            containerd: config.store.source == "containerd",
            socket: config.store.socket.clone(),
            hosts_dirs: config.upstream.hosts_dirs.clone(),
            policies: config.policies.enforced(),
        };
        let options = Options {
            root: self.root,
            state: self.data_dir.unwrap_or_else(|| config.node.data_dir.clone()).join("configure"),
            config_paths: self.config_path,
            targets,
            mirror,
            mode,
            settings,
        };
        Ok((options, config))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Owned(..) => Self::NotSetUp(error.to_string()),
            error => Self::Failed(anyhow::Error::msg(error.to_string())),
        }
    }
}
