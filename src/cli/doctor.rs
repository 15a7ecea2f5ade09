//! `peili doctor`: what it takes, and what it prints.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::Failure;
use super::commands::{print, print_json};
use super::node::Place;
use crate::config::Config;
use crate::configure::Options;
use crate::doctor::code::Severity;
use crate::doctor::{Ports, Report, Subject, examine};

/// After the help.
pub(super) const HELP: &str = "Examples:\n  peili doctor\n  peili doctor --config peili.yaml --json | jq '.verdicts[].code'\n  \
    peili doctor --root /host --fix-manifests ./fix && kubectl apply -f ./fix\n\n\
    Exit codes: 0 nothing is wrong, or there are notes only; 1 failed (a manifest cannot be written); 2 wrong usage or configuration; 3 a \
    problem was found; 4 warnings were found, and no problem. docs/doctor.md has all codes of verdicts.";

/// HTTPS, HTTP, and kubeadm's port of the API server.
const OUT: [u16; 3] = [443, 80, 6443];

/// Arguments of `peili doctor`.
#[derive(Args, Debug)]
pub(super) struct Doctor {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Write the manifests of all fixes into this folder, which is made if it is not there; apply those whose verdict you agree with
    #[arg(long, value_name = "DIR")]
    fix_manifests: Option<PathBuf>,

    #[command(flatten)]
    place: Place,
}

/// Looks, and says what it found.
pub(super) async fn doctor(arguments: Doctor) -> Result<(), Failure> {
    let (options, config) = arguments.place.load(Vec::new(), None)?;
    let report = examine(&subject(options, config)).await;
    if let Some(folder) = &arguments.fix_manifests {
        write(&report, folder)?;
    }
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&report.render())?;
    }
    match report.severity() {
        None | Some(Severity::Note) => Ok(()),
        Some(Severity::Warning) => {
            Err(Failure::Warned("no problem, but warnings: see the verdicts above".into()))
        }
        Some(Severity::Problem) => {
            Err(Failure::NotSetUp("there are problems: see the verdicts above".into()))
        }
    }
}

fn subject(options: Options, config: Config) -> Subject {
    let port = |text: &str| text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    let listen = config.network.listen.iter().chain(&config.transfer.listen);
    let mut peers: Vec<u16> = listen.map(std::net::SocketAddr::port).filter(|port| *port != 0).collect();
    peers.extend(config.network.dns.iter().filter_map(|name| port(name)));
    let addresses = config.kubernetes.endpoints.iter().chain([&config.kubernetes.service]);
    let addresses = addresses.chain(config.upstreams.iter().map(|upstream| &upstream.address));
    let named = |address: &String| {
        let uri: Option<http::Uri> = address.parse().ok();
        uri.and_then(|uri| uri.port_u16())
    };
    let mut out: Vec<u16> = OUT.into_iter().chain(addresses.filter_map(named)).collect();
    for ports in [&mut peers, &mut out] {
        ports.sort_unstable();
        ports.dedup();
    }
    let wide = config.admin.listen.iter().find(|address| !address.ip().is_loopback());
    let ports = Ports { peers, metrics: wide.map(std::net::SocketAddr::port), out };
    Subject {
        cluster: config.kubernetes,
        election: config.election,
        dns: config.network.dns,
        store: config.store,
        node: config.node.name,
        pod_labels: config.node.pod_labels,
        admin: config.admin.listen.first().copied(),
        ports,
        configure: options,
    }
}

fn write(report: &Report, folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for manifest in report.verdicts.iter().flat_map(|verdict| &verdict.manifests) {
        let path = folder.join(&manifest.file);
        std::fs::write(&path, manifest.text()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
