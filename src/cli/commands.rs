//! What each command does.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory;

use super::{
    Cli, ClusterKey, Command, Config, Election, Explain, ExplainPlace, Failure, Identity, Pull, Sources,
    Status, doctor, node, plugin,
};
use crate::admin;
use crate::app;
use crate::config;
use crate::network::admission::key::{self, Key};
use crate::network::identity;
use crate::pull::{self, Bars, Destination, Host, Options, Platforms, Progress, Silent};
use crate::upstream::hosts;

impl Cli {
    /// Does what was asked for. Must run within a runtime with timers and I/O.
    pub async fn execute(self) -> Result<(), Failure> {
        match self.command {
            Command::Run(sources) => Ok(app::run(sources.load()?).await?),
            Command::Pull(arguments) => pull(arguments).await,
            Command::Status(arguments) => status(arguments).await,
            Command::Explain(command) => explain(command).await,
            Command::Election(command) => election(command).await,
            Command::Identity(arguments) => identity(arguments),
            Command::Configure(arguments) => node::configure(arguments),
            Command::Cleanup(arguments) => Box::pin(node::cleanup(arguments)).await,
            Command::Config(Config::Check(sources)) => {
                let warnings = sources.load()?.warnings();
                warnings.iter().try_for_each(|warning| print_error(&format!("warning: {warning}\n")))
            }
            Command::ClusterKey(ClusterKey::Generate { path }) => generate_key(path.as_deref()),
            Command::ClusterKey(ClusterKey::Id { path }) => {
                let key =
                    Key::read(&path).with_context(|| format!("no cluster key in {}", path.display()))?;
                print(&format!("{}\n", key.id()))
            }
            Command::Doctor(arguments) => Box::pin(doctor::doctor(arguments)).await,
            Command::Plugin(command) => plugin::plugin(command),
            Command::Config(Config::Show(sources)) => print(&sources.load()?.show()),
            Command::Config(Config::Schema) => {
                let schema =
                    serde_json::to_string_pretty(&config::schema()).context("cannot write the schema")?;
                print(&format!("{schema}\n"))
            }
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "peili", &mut script);
                print(&String::from_utf8_lossy(&script))
            }
            Command::Man { dir } => man(dir.as_deref()),
        }
    }
}

async fn pull(arguments: Pull) -> Result<(), Failure> {
    let platforms = match (&arguments.platform, arguments.all_platforms) {
        (_, true) => Platforms::All,
        (Some(platform), false) => {
            let platform =
                platform.parse().map_err(|error: pull::PlatformError| Failure::Usage(error.to_string()))?;
            Platforms::One(platform)
        }
        (None, false) => Platforms::One(pull::Platform::host()),
    };
    let (host, dirs) = (arguments.host, arguments.hosts_dir);
    let registry = arguments.reference.name.registry.clone();
    let hosts = tokio::task::spawn_blocking(move || match host {
        Some(url) => Ok(vec![Host::new(&hosts::Host::new(&url))?]),
        None => Host::load(&dirs, &registry),
    });
    let hosts = hosts.await.context("cannot read the hosts")?.context("cannot use the registry's hosts")?;
    let mut options = Options::new(arguments.reference, hosts, Destination::Layout(arguments.to));
    options.platforms = platforms;
    let quiet = arguments.quiet || arguments.json;
    let progress: Box<dyn Progress> = if quiet { Box::new(Silent) } else { Box::new(Bars::new()) };
    let summary = pull::pull(options, progress.as_ref()).await.context("cannot pull")?;
    drop(progress);
    let text = if arguments.json {
        serde_json::to_string_pretty(&summary).context("cannot write the summary")?
    } else {
        format!(
            "pulled {}@{}: {} bytes in {:.0} ms",
            summary.reference, summary.digest, summary.bytes, summary.millis
        )
    };
    print(&format!("{}\n", text.trim_end()))
}

async fn status(arguments: Status) -> Result<(), Failure> {
    let address = match arguments.address {
        Some(address) => address,
        None => admin_address(arguments.sources)?,
    };
    let status = admin::fetch(address).await.context("no status")?;
    if arguments.json {
        return print_json(&status);
    }
    // A wider terminal gains nothing; a pipe or a file gets whole lines.
    let width = if io::stdout().is_terminal() { 120 } else { 0 };
    print(&admin::render(&status, width))
}

/// Where the configuration says. One that became wrong may be of a mirror that runs on without it, so that is no reason not to ask.
fn admin_address(sources: Sources) -> Result<SocketAddr, Failure> {
    let admin = match sources.load() {
        Ok(loaded) => loaded.config.admin,
        Err(error) => {
            print_error(&format!("warning: the default of admin.listen is asked: {error}\n"))?;
            admin::Config::default()
        }
    };
    admin.local().ok_or_else(|| Failure::Usage("admin.listen is empty: nobody can be asked".to_owned()))
}

async fn explain(command: Explain) -> Result<(), Failure> {
    match command {
        Explain::Pull { image, place } => {
            let (folder, json) = place.read()?;
            let explained = admin::explain_pull(&folder, &image).await.context("no explanation")?;
            print_explained(json, &explained, admin::render_pull)
        }
        Explain::Peer { id, place } => {
            let (folder, json) = place.read()?;
            let explained = admin::explain_peer(&folder, &id).await.context("no explanation")?;
            print_explained(json, &explained, admin::render_peer)
        }
    }
}

async fn election(command: Election) -> Result<(), Failure> {
    match command {
        Election::Status { place } => {
            let (folder, json) = place.read()?;
            let status = admin::election_status(&folder).await.context("no status")?;
            print_explained(json, &status, admin::render_election)
        }
        Election::Explain { role, key, place } => {
            let (folder, json) = place.read()?;
            let explained =
                admin::explain_role(&folder, &role, key.as_deref()).await.context("no explanation")?;
            print_explained(json, &explained, admin::render_explained)
        }
        Election::Yield { role, place } => {
            let (folder, json) = place.read()?;
            admin::yield_role(&folder, &role).await.context("not given away")?;
            let role = serde_json::json!({"yielded": role});
            print_explained(json, &role, |role| {
                format!("{} given away\n", role["yielded"].as_str().unwrap_or_default())
            })
        }
    }
}

impl ExplainPlace {
    /// The folder, and whether JSON is wanted.
    fn read(self) -> Result<(PathBuf, bool), Failure> {
        let folder = match self.data_dir {
            Some(folder) => folder,
            None => self.sources.load()?.config.node.data_dir,
        };
        Ok((folder, self.json))
    }
}

pub(super) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).context("cannot write the JSON")?;
    print(&format!("{text}\n"))
}

fn print_explained<T: serde::Serialize>(
    json: bool,
    explained: &T,
    render: impl Fn(&T) -> String,
) -> Result<(), Failure> {
    if json {
        return print_json(explained);
    }
    print(&render(explained))
}

fn identity(arguments: Identity) -> Result<(), Failure> {
    let folder = match arguments.data_dir {
        Some(folder) => folder,
        None => arguments.sources.load()?.config.node.data_dir,
    };
    let identity = identity::Identity::load_or_create(&folder).context("no identity")?;
    print(&format!("{}\n", identity.peer_id()))
}

/// Never overwrites: a key that is lost splits the cluster.
fn generate_key(path: Option<&Path>) -> Result<(), Failure> {
    let line = key::generate().context("no key was made")?;
    let Some(path) = path else { return print(&line) };
    let failed = || format!("cannot write {}", path.display());
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).with_context(failed)?;
    if let Err(error) = file.write_all(line.as_bytes()).and_then(|()| file.sync_all()) {
        // Half a key is worse than none; the error that matters is the first one.
        let _ = std::fs::remove_file(path);
        return Err(anyhow::Error::new(error).context(failed()).into());
    }
    let id = Key::derive(line.as_bytes()).context("no key was made")?.id();
    print(&format!("key {id} in {}\n", path.display()))
}

fn man(dir: Option<&Path>) -> Result<(), Failure> {
    let command = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).context("cannot write the man page")?;
        return print(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .with_context(|| format!("cannot write man pages to {}", dir.display()))?;
    Ok(())
}

/// Writes to standard error, where what is no result belongs.
pub(super) fn print_error(text: &str) -> Result<(), Failure> {
    let written = io::stderr().lock().write_all(text.as_bytes());
    Ok(written.context("cannot write to standard error")?)
}

/// Writes to standard output; a reader that has seen enough (`| head`) is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output").into())
        }
        _ => Ok(()),
    }
}
