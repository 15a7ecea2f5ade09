//! `peili doctor`: what it takes, and what it prints.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::Failure;
use super::commands::{print, print_json};
use super::node::Place;
use crate::doctor::code::Severity;
use crate::doctor::{Report, Subject, Verdict, examine};

/// After the help.
pub(super) const HELP: &str = "Examples:\n  peili doctor\n  peili doctor --config peili.yaml --json | jq '.verdicts[].code'\n  \
    peili doctor --root /host --fix-manifests ./fix; kubectl apply -f ./fix\n\n\
    Exit codes: 0 nothing is wrong, or there are notes only; 1 failed (a manifest cannot be written); 2 wrong usage or configuration; 3 a \
    problem was found; 4 warnings were found, and no problem. docs/doctor.md has all codes of verdicts.";

/// Arguments of `peili doctor`.
#[derive(Args, Debug)]
pub(super) struct Doctor {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Write the manifests of all fixes into this folder, which has to be new or empty; where one of several is enough, the one that gives least. Apply those whose verdict you agree with
    #[arg(long, value_name = "DIR")]
    fix_manifests: Option<PathBuf>,

    #[command(flatten)]
    place: Place,
}

/// Looks, and says what it found.
pub(super) async fn doctor(arguments: Doctor) -> Result<(), Failure> {
    let (options, config) = arguments.place.load(Vec::new(), None)?;
    let folder = arguments.fix_manifests.as_deref().map(|folder| empty(folder).map(|()| folder)).transpose();
    // What is seen is worth more than where it is to be written: a pod's root is read-only.
    if let Err(failure @ Failure::Usage(_)) = folder {
        return Err(failure);
    }
    let report = examine(&Subject::new(config, Some(options))).await;
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&report.render())?;
    }
    if let Some(folder) = folder? {
        write(&report, folder)?;
    }
    match report.severity() {
        None | Some(Severity::Note) => Ok(()),
        Some(Severity::Warning) => Err(Failure::Found(4, "no problem, but warnings: see the verdicts above")),
        Some(Severity::Problem) => Err(Failure::Found(3, "there are problems: see the verdicts above")),
    }
}

/// A folder with nothing in it, so that what is applied later is all of this report.
fn empty(folder: &Path) -> Result<(), Failure> {
    if let Err(error) = std::fs::create_dir_all(folder) {
        let hint = match error.kind() {
            std::io::ErrorKind::ReadOnlyFilesystem => {
                "\nhint: from a pod: `kubectl exec POD -- peili doctor --json | jq '.verdicts[].manifests[].objects[]' | kubectl apply -f -`"
            }
            _ => "",
        };
        return Err(anyhow::anyhow!("cannot make {}: {error}{hint}", folder.display()).into());
    }
    let mut found = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    if found.next().is_some() {
        return Err(Failure::Usage(format!(
            "{} is not empty\nhint: name a new folder, so that nothing of an earlier report is applied with this one",
            folder.display()
        )));
    }
    Ok(())
}

fn write(report: &Report, folder: &Path) -> Result<(), Failure> {
    for manifest in report.verdicts.iter().flat_map(Verdict::needed) {
        let path = folder.join(&manifest.file);
        // Not through a link that somebody put there.
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path);
        file.and_then(|mut file| file.write_all(manifest.text().as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
