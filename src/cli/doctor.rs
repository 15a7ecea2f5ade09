//! `peili doctor`: what it takes, and what it prints.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::Failure;
use super::commands::{print, print_json};
use super::node::Place;
use crate::doctor::code::Severity;
use crate::doctor::{Report, Subject, examine};

/// After the help.
pub(super) const HELP: &str = "Examples:\n  peili doctor\n  peili doctor --config peili.yaml --json | jq '.verdicts[].code'\n  \
    peili doctor --root /host --fix-manifests ./fix && kubectl apply -f ./fix\n\n\
    Exit codes: 0 nothing is wrong, or there are notes only; 1 failed (a manifest cannot be written); 2 wrong usage or configuration; 3 a \
    problem was found; 4 warnings were found, and no problem. docs/doctor.md has all codes of verdicts.";

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
    let report = examine(&Subject::new(config, Some(options))).await;
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

fn write(report: &Report, folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for manifest in report.verdicts.iter().flat_map(|verdict| &verdict.manifests) {
        let path = folder.join(&manifest.file);
        std::fs::write(&path, manifest.text()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
