//! Rows of a data folder that is not there or cannot be written to, of an identity that cannot be read, and of what else goes by the folder.

use super::{
    Code, Confidence, Facts, Inside, Ports, Row, Unseen, asked, configure, finds, judge, mirror, runtime,
    well,
};
use crate::admin::Status;

const FOLDER: &str = "data folder /data: Read-only file system";
const IDENTITY: &str = "identity: cannot create /data";

fn no_folder(status: &mut Status) {
    status.node.data_problem = FOLDER.into();
    status.node.identity_problem = IDENTITY.into();
}

/// The records of what was set up are gone, or not seen; so it seems not to be.
fn unrecorded(facts: &mut Facts) {
    runtime(facts).unrecorded = true;
    finds(facts, configure::Code::NotSetUp);
}

pub(super) const ROWS: &[Row] = &[
    (
        "a damaged identity",
        |f| mirror(f, |s| s.node.identity_problem = IDENTITY.into()),
        &[Code::IdentityPassing],
    ),
    (
        "a read-only data folder with an identity",
        |f| mirror(f, |s| s.node.data_problem = FOLDER.into()),
        &[Code::MirrorData],
    ),
    ("a read-only data folder without one", |f| mirror(f, no_folder), &[Code::MirrorData]),
    (
        "a read-only data folder, and not set up by what is on record there",
        |f| {
            mirror(f, no_folder);
            finds(f, configure::Code::NotSetUp);
        },
        &[Code::RegistryNotSetUp, Code::MirrorData],
    ),
    (
        "no data folder, so that nobody knows what is to be set up",
        |f| {
            mirror(f, no_folder);
            unrecorded(f);
        },
        &[Code::MirrorData],
    ),
    (
        "the mirror's data folder is not seen from here",
        |f| {
            mirror(f, |_| {});
            unrecorded(f);
        },
        &[],
    ),
    (
        "a pod without the data folder, whose mirror does not answer",
        |f| {
            f.place.inside = Inside::Pod;
            unrecorded(f);
        },
        &[],
    ),
    ("no data folder yet, and not set up", unrecorded, &[Code::RegistryNotSetUp]),
];

/// What became of the identity is seen, too, where the folder is the cause.
#[test]
fn the_folder_explains_the_identity() {
    let mut facts = well();
    mirror(&mut facts, no_folder);
    let (verdicts, _) = judge(&facts, &Ports::default());
    assert_eq!(
        (verdicts[0].confidence, &verdicts[0].evidence[..]),
        (Confidence::High, &[FOLDER.into(), IDENTITY.into()][..])
    );
}

/// What stands for a registry may be written where it is not seen.
#[test]
fn files_that_are_not_seen_are_a_cause_of_silence() {
    let causes = |report| {
        let mut facts = well();
        mirror(&mut facts, |status| status.registries = vec![asked("a.test", false)]);
        if let Some(unseen) = report {
            runtime(&mut facts).report = Err(unseen);
        }
        let (verdicts, _) = judge(&facts, &Ports::default());
        let verdict = verdicts.into_iter().find(|verdict| verdict.code == Code::RegistriesSilent).unwrap();
        verdict.other_causes.join("\n")
    };
    assert!(causes(Some(Unseen::NoRuntime)).contains("hosts.toml"));
    assert!(!causes(None).contains("hosts.toml"));
}
