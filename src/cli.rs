//! The command line: what can be asked for, and what is printed about it. Parts are called, none is built here.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 this node is not set up, or has a problem, 4 it has warnings; 70 is the
//! watchdog's.

mod commands;
mod doctor;
mod node;
mod plugin;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Inputs};
use crate::oci::{PeerId, Reference};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.";

/// A peer-to-peer mirror of OCI images for Kubernetes nodes.
///
/// Each node serves the images that its containerd already holds to the other nodes, over connections on which both
/// sides are proved. A pull takes its bytes from other nodes, and from the registry only if none of them has it.
#[derive(Debug, Parser)]
#[command(name = "peili", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the mirror of this node until SIGTERM
    ///
    /// Serves until SIGTERM or SIGINT, then lets transfers end (node.drain) and exits; a second signal exits at once.
    /// SIGHUP, or a change of the file, applies what can be changed live and says what needs a restart.
    #[command(
        after_help = "Examples:\n  peili run\n  peili run --config peili.yaml --set log.level=debug\n  \
        PEILI_NODE__ZONE=eu-1a peili run\n\nExit codes: 0 ended by a signal, 1 failed (an address is taken), 2 wrong usage or \
        configuration, 70 ended by the watchdog: a part of it hung or died, start it again."
    )]
    Run(Sources),

    /// Pull an image into an OCI image layout as containerd would
    ///
    /// Asks the hosts of containerd's hosts.toml in order, resumes what breaks off, and verifies all content. Sends no
    /// credentials. Asked again, it fetches only what is missing.
    #[command(after_help = "Examples:\n  peili pull nginx:1.27 --to layout:/var/lib/images\n  \
        peili pull ghcr.io/acme/app:v1 --to layout:./app --host http://127.0.0.1:5000/v2 --platform linux/arm64\n\n\
        Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.")]
    Pull(Pull),

    /// Show the state of the mirror that runs here
    ///
    /// Prints the store, the peers, what was served, and the last causes of not serving.
    #[command(after_help = "Examples:\n  peili status\n  peili status --json | jq .network.peers\n\n\
        Exit codes: 0 done, 1 failed (nothing answers at the address), 2 wrong usage.")]
    Status(Status),

    /// Say why an image is mirrored as it is, or why a peer stands as it does
    ///
    /// Asks the node that runs here over a socket in its data folder, which only the user that it runs as may open.
    #[command(subcommand, after_help = EXIT_CODES)]
    Explain(Explain),

    /// Show who does what for all nodes, and why
    ///
    /// Asks the node that runs here over a socket in its data folder, as explain does. Other nodes may see it otherwise for a moment.
    #[command(subcommand, after_help = EXIT_CODES)]
    Election(Election),

    /// Print this node's peer ID; make its identity if there is none
    ///
    /// Other nodes trust this node by listing the ID under network.peers.
    #[command(after_help = "Examples:\n  peili identity\n  peili identity --data-dir ./node1\n\n\
        Exit codes: 0 done, 1 failed (the file is corrupt or cannot be written), 2 wrong usage or configuration.")]
    Identity(Identity),

    /// Make a cluster key, or name one
    ///
    /// All nodes that have the same key in a file (network.cluster-key) admit each other.
    #[command(subcommand, after_help = EXIT_CODES)]
    ClusterKey(ClusterKey),

    /// Set up this node's containerd to ask Peili first
    ///
    /// Finds containerd's folder of registry hosts and writes Peili into it: for the registries that are named, or for
    /// all that have no folder of their own (_default). Hosts, certificates and comments that are there are kept. Nothing
    /// is restarted; containerd reads these files at each pull. A run that is killed is finished by the next one.
    #[command(after_help = node::CONFIGURE_HELP)]
    Configure(node::Configure),

    /// Take Peili out of this node's containerd again
    ///
    /// Puts every file back as it was before `peili configure`, byte for byte. Where somebody changed a file since, only
    /// Peili's entry is taken out of it, and that is said.
    #[command(after_help = node::CLEANUP_HELP)]
    Cleanup(node::Cleanup),

    /// Say what is wrong on this node, and what to do about it
    ///
    /// Looks at the mounted credentials, DNS, each address of the Kubernetes API (connection, TLS, rights verb by verb, a dry-run write), at
    /// containerd and its registry configuration, and at the mirror that runs here. Changes nothing, and ends within ten seconds.
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Doctor),

    /// Write, build, check and measure policies
    ///
    /// A policy is a WebAssembly component that a node asks what to mirror, or whom to trust (docs/policies.md).
    #[command(subcommand, after_help = EXIT_CODES)]
    Plugin(plugin::Plugin),

    /// Check, describe or show the configuration
    #[command(subcommand, after_help = EXIT_CODES)]
    Config(Config),

    /// Print a completion script
    #[command(
        after_help = "Examples:\n  peili completions bash > /etc/bash_completion.d/peili\n\nExit codes: 0 done, \
        1 failed, 2 wrong usage."
    )]
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },

    /// Print the man page, or write the pages of all commands to a folder
    #[command(
        after_help = "Examples:\n  peili man | man -l -\n  peili man --dir /usr/share/man/man1\n\nExit codes: 0 done, \
        1 failed, 2 wrong usage."
    )]
    Man {
        /// Folder for one page per command; made if it is not there
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

/// What the configuration is made of.
#[derive(Args, Debug)]
struct Sources {
    /// Configuration file; the default one may be absent [default: /etc/peili/config.yaml]
    #[arg(long, value_name = "FILE", env = "PEILI_CONFIG")]
    config: Option<PathBuf>,

    /// Override a key of the file; can be repeated. Environment variables PEILI_<SECTION>__<KEY> come before these
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
}

#[derive(Args, Debug)]
struct Pull {
    /// The image: nginx:1.27, ghcr.io/acme/app@sha256:...
    reference: Reference,

    /// Where it goes: layout:PATH, a folder that is made if it is not there
    #[arg(long, value_name = "layout:PATH", value_parser = layout)]
    to: PathBuf,

    /// Folder of containerd's registry hosts (config_path); can be repeated
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    hosts_dir: Vec<PathBuf>,

    /// Ask this host only: the base of its API, http://127.0.0.1:5000/v2
    #[arg(long, value_name = "URL", conflicts_with = "hosts_dir", value_parser = host)]
    host: Option<String>,

    /// The platform of a multi-platform image [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", conflicts_with = "all_platforms")]
    platform: Option<String>,

    /// All platforms of a multi-platform image
    #[arg(long)]
    all_platforms: bool,

    /// Print what was pulled, and from where, as JSON
    #[arg(long)]
    json: bool,

    /// No progress
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Args, Debug)]
struct Status {
    /// The admin address of the mirror [default: admin.listen of the configuration]
    #[arg(long, value_name = "ADDRESS:PORT")]
    address: Option<SocketAddr>,

    /// Print the whole status as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    sources: Sources,
}

#[derive(Debug, Subcommand)]
enum Explain {
    /// What each policy says of the manifest of an image, what they say together, and what the runtime gets
    #[command(
        after_help = "Examples:\n  peili explain pull nginx:1.27\n  peili explain pull ghcr.io/acme/app:v1 --json\n\n\
        Exit codes: 0 done, 1 failed (no peili runs here), 2 wrong usage or configuration."
    )]
    Pull {
        /// The image
        image: Reference,
        #[command(flatten)]
        place: ExplainPlace,
    },

    /// What each policy says of a peer, what is in force, and until when
    #[command(
        after_help = "Examples:\n  peili explain peer 12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp\n\n\
        Exit codes: 0 done, 1 failed (no peili runs here, or it does not know the peer), 2 wrong usage or configuration."
    )]
    Peer {
        /// Its ID, as `peili status` shows it
        id: PeerId,
        #[command(flatten)]
        place: ExplainPlace,
    },
}

#[derive(Debug, Subcommand)]
enum Election {
    /// How roles are given, who holds each, and whether neighbours see the same
    #[command(
        after_help = "Examples:\n  peili election status\n  peili election status --json | jq .mode\n\n\
        Exit codes: 0 done, 1 failed (no peili runs here), 2 wrong usage or configuration."
    )]
    Status {
        #[command(flatten)]
        place: ExplainPlace,
    },

    /// Why a role, or a key of it, is held by those who hold it: the candidates, their weights, and what each policy says
    #[command(after_help = "Examples:\n  peili election explain introducers\n  \
        peili election explain tag-home docker.io/library/nginx:1.27 --json\n\n\
        Exit codes: 0 done, 1 failed (no peili runs here, or there is no such role), 2 wrong usage or configuration.")]
    Explain {
        /// The role: coordinator, introducers, tag-home
        role: String,
        /// A key of a role that is held for each key by another node: for tag-home an image with its tag
        key: Option<String>,
        #[command(flatten)]
        place: ExplainPlace,
    },

    /// Give a role away that this node holds; another candidate takes it
    ///
    /// Only the coordinator can be given away. This node does not take it again while the lease of another holds, and for one duration of it.
    #[command(after_help = "Examples:\n  peili election yield coordinator\n\n\
        Exit codes: 0 given away, 1 failed (no peili runs here, or it does not hold the role), 2 wrong usage or configuration.")]
    Yield {
        /// The role: coordinator
        role: String,
        #[command(flatten)]
        place: ExplainPlace,
    },
}

#[derive(Args, Debug)]
struct ExplainPlace {
    /// The node's data folder [default: node.data-dir of the configuration]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Print it as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    sources: Sources,
}

#[derive(Args, Debug)]
struct Identity {
    /// Folder of the identity [default: node.data-dir of the configuration]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    #[command(flatten)]
    sources: Sources,
}

#[derive(Debug, Subcommand)]
enum ClusterKey {
    /// Make a new key: one line of text, 32 random bytes in base64
    ///
    /// Whoever has it is a full member of the cluster until it is replaced on all nodes: keep it as you keep a password.
    #[command(after_help = "Examples:\n  peili cluster-key generate /etc/peili/cluster.key\n  \
        kubectl create secret generic peili-cluster --from-file=current=cluster.key --from-file=next=cluster.key\n\n\
        Exit codes: 0 done, 1 failed (the file is there already, or cannot be written), 2 wrong usage.")]
    Generate {
        /// The new file, readable by its owner only; never overwritten [default: standard output]
        path: Option<PathBuf>,
    },

    /// Print the ID of a key, as the status shows it
    ///
    /// The ID tells keys apart and tells nothing of the key.
    #[command(after_help = "Examples:\n  peili cluster-key id /etc/peili/cluster.key\n\n\
        Exit codes: 0 done, 1 failed (the file is no key), 2 wrong usage.")]
    Id {
        /// The key's file
        path: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Config {
    /// Check the configuration, say nothing if it is right
    ///
    /// What is legal and should be known, such as an open network, is a warning on standard error.
    #[command(
        after_help = "Examples:\n  peili config check --config peili.yaml\n\nExit codes: 0 right, 2 wrong."
    )]
    Check(Sources),

    /// Print the JSON Schema of the file
    #[command(
        after_help = "Examples:\n  peili config schema > peili.schema.json\n\nExit codes: 0 done, 1 failed."
    )]
    Schema,

    /// Print the configuration in force, and where each value comes from
    #[command(
        after_help = "Examples:\n  peili config show --set mirror.verify=false\n\nExit codes: 0 done, 1 failed, \
        2 wrong configuration."
    )]
    Show(Sources),
}

/// Why a command ends without success.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration or an argument is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It was tried and failed: exit code 1.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
    /// It was looked at, and pulls do not come to Peili, or will not any more: exit code 3.
    #[error("{0}")]
    NotSetUp(String),
    /// It was looked at, and this is what was found, by its exit code. No error of the program.
    #[error("{1}")]
    Found(u8, &'static str),
}

impl Failure {
    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) => 1,
            Self::NotSetUp(_) => 3,
            Self::Found(code, _) => *code,
        }
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::Usage(error.to_string())
    }
}

impl Sources {
    fn load(self) -> Result<config::Loaded, config::Error> {
        Inputs::new(self.config, self.set).load()
    }
}

/// A host without a user and a password: both would be shown in errors and summaries.
fn host(text: &str) -> Result<String, String> {
    let uri: http::Uri = text.parse().map_err(|error| format!("{error}"))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(authority)) if !authority.as_str().contains('@') => Ok(text.to_owned()),
        (_, Some(authority)) if authority.as_str().contains('@') => {
            Err("credentials are not sent: leave out the part before the @".to_owned())
        }
        _ => Err("the form is http://HOST:PORT/v2".to_owned()),
    }
}

fn layout(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("layout:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err("the form is layout:PATH".to_owned()),
    }
}
