//! `cargo xtask test`: every check there is, one after the other.

use std::fs;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::room::Room;
use crate::tally::Tally;
use crate::{build_policies, cargo, programs, setup, target};

/// Tests that return early append `NAME<tab>REASON` to the file that this names (`peili_lab::report_skip`).
const SKIPS_FILE: &str = "PEILI_SKIPS_FILE";

/// For all of it: on two cores a first build takes 25 minutes, that of Kubernetes and Helm 6, and all that runs after them 50. CI ends at 90.
const LIMIT: Duration = Duration::from_secs(86 * 60);
/// The demonstration promises a minute and a half, on a machine that does nothing else; an act that is tried again takes its time twice.
const DEMO_LIMIT: Duration = Duration::from_secs(180);
/// A minute of work, and for each node the time in which it must come to rest.
const SOAK_LIMIT: Duration = Duration::from_secs(300);

/// Unit tests that wait for short leases to end, and do little: many at once take a tenth of the time.
const WAITING: &str = "election::strict";

/// What `cargo xtask test` was told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    install: bool,
    filter: Option<String>,
}

impl Options {
    /// Reads the arguments after `test`.
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self { install: true, filter: None };
        for argument in arguments {
            match argument.as_str() {
                "--no-install" => options.install = false,
                flag if flag.starts_with('-') => bail!("`test` has no option `{flag}`"),
                filter if options.filter.is_none() => options.filter = Some(filter.to_owned()),
                more => bail!("one filter at most, `{more}` is too many"),
            }
        }
        Ok(options)
    }
}

/// Runs the checks; true if none failed. Whatever happens, the last line has the numbers.
pub(crate) fn run(options: &Options) -> bool {
    let mut tally = Tally::new(LIMIT);
    let room = Room::watch();
    if options.install
        && let Err(error) = setup::install()
    {
        tally.fail(&format!("setup: {error:#}"));
    }
    if options.filter.is_none() {
        lints(&mut tally);
    }
    if let Err(error) = tests(options, &mut tally) {
        tally.fail(&format!("tests: {error:#}"));
    }
    if options.filter.is_none() {
        laboratory(&mut tally);
    }
    // At the end: one that lasts long must not take the time of what did not run yet.
    tally.again(|name| {
        let mut command = cargo();
        command.args(["test", "--workspace", "--no-fail-fast", "--", "--exact", name]);
        command
    });
    room.report();
    tally.report()
}

fn lints(tally: &mut Tally) {
    let plugins = ["--manifest-path", "plugins/Cargo.toml"];
    if setup::has_cargo("fmt") {
        tally.check("formatting", cargo().args(["fmt", "--all", "--check"]));
        tally.check("formatting of plugins", cargo().arg("fmt").args(plugins).args(["--all", "--check"]));
    } else {
        tally.skip("formatting: needs rustfmt");
    }
    let deny = ["--", "-D", "warnings"];
    if !setup::has_cargo("clippy") {
        tally.skip("clippy: needs clippy");
    } else {
        if setup::can_build() {
            let all = ["clippy", "--quiet", "--workspace", "--all-targets"];
            tally.check("clippy", cargo().args(all).args(deny));
        } else {
            tally.skip("clippy: needs protobuf-compiler");
        }
        let all = ["--quiet", "--workspace", "--all-targets"];
        tally.check("clippy of plugins", cargo().arg("clippy").args(plugins).args(all).args(deny));
    }
    if setup::can_build() {
        // In the same build folder, so that what peili stands on is not compiled again.
        let manifest = ["check", "--quiet", "--manifest-path", "fuzz/Cargo.toml"];
        tally.check("types of the fuzz targets", cargo().args(manifest).env("CARGO_TARGET_DIR", target()));
    } else {
        tally.skip("types of the fuzz targets: need protobuf-compiler");
    }
}

fn tests(options: &Options, tally: &mut Tally) -> Result<()> {
    let filter = options.filter.as_slice();
    let plugins = ["test", "--workspace", "--no-fail-fast", "--manifest-path", "plugins/Cargo.toml"];
    tally.harness("tests of plugins", cargo().args(plugins).args(filter));
    if !setup::can_build() {
        tally.skip("tests: need protobuf-compiler");
        return Ok(());
    }
    if let Err(error) = next_version() {
        tally.fail(&format!("the program of the next version: {error:#}"));
    }
    if !setup::can_build_policies() {
        tally.skip("policies: need rustup's target wasm32-unknown-unknown");
    } else if let Err(error) = build_policies(&target().join("tools/peili-next")) {
        tally.fail(&format!("the components of the policies: {error:#}"));
    }
    let skips = target().join(format!("skips-{}", std::process::id()));
    fs::create_dir_all(target())?;
    fs::write(&skips, "")?;
    let workspace = ["test", "--workspace", "--no-fail-fast"];
    let mut command = cargo();
    command.args(workspace).args(filter).env(SKIPS_FILE, &skips);
    // Some tests hold real sockets to real time limits, and two cores bear one such test at a time.
    command.env("RUST_TEST_THREADS", "1");
    if filter.is_empty() {
        let waiting = ["--lib", "--", WAITING, "--test-threads=16"];
        tally.harness("tests that wait", cargo().args(workspace).args(waiting));
        command.args(["--", "--skip", WAITING]);
    }
    tally.harness("tests", &mut command);
    let reported = fs::read_to_string(&skips).unwrap_or_default();
    fs::remove_file(&skips)?;
    tally.add_reported_skips(&reported);
    Ok(())
}

/// Builds the program that speaks as the next version, and puts it where the tests of upgrades look for it. With the features of
/// all packages, as the tests; and before them, since both are built to the same place.
fn next_version() -> Result<()> {
    let arguments = ["build", "--workspace", "--bin", "peili", "--features", "peili/next-version"];
    ensure!(cargo().args(arguments).status()?.success(), "it does not build");
    let tools = target().join("tools");
    fs::create_dir_all(&tools)?;
    // Another file each time: a copy that runs cannot be written to.
    fs::copy(target().join("debug/peili"), tools.join(".peili-next"))?;
    Ok(fs::rename(tools.join(".peili-next"), tools.join("peili-next"))?)
}

/// What the laboratory's program runs, each counted as one test.
fn laboratory(tally: &mut Tally) {
    let runs: [(&str, &[&str], Duration, Option<String>); 3] = [
        ("demo", &["demo", "--json"], DEMO_LIMIT, None),
        (
            "demo on containerds",
            &["demo", "--containerd", "--json"],
            DEMO_LIMIT + DEMO_LIMIT / 3,
            setup::lacks_for_containerds(),
        ),
        ("soak", &["soak", "--minutes", "1"], SOAK_LIMIT, None),
    ];
    let programs = setup::can_build().then(|| programs(false));
    for (name, arguments, limit, lacks) in runs {
        match (&programs, lacks) {
            (None, _) => tally.skip(&format!("{name}: needs protobuf-compiler")),
            (_, Some(reason)) => tally.skip(&format!("{name}: needs {reason}")),
            (Some(Err(error)), _) => tally.fail(&format!("{name}: {error:#}")),
            (Some(Ok(programs)), None) => {
                tally.check_within(name, Some(limit), programs.laboratory().args(arguments));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |arguments: &[&str]| {
            Options::parse(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(parse(&["--no-install"]).unwrap(), Options { install: false, filter: None });
        assert_eq!(parse(&["x"]).unwrap(), Options { install: true, filter: Some("x".into()) });
        assert!(parse(&["--fast"]).is_err() && parse(&["a", "b"]).is_err());
    }
}
