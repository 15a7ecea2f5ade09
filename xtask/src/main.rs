//! `cargo xtask`: the commands that a newcomer needs, and the project's chores. Leans on the standard library, so that it
//! is built in a moment on a machine that has nothing but cargo.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

mod image;
// One list for both; the laboratory itself is too large to stand on here.
#[path = "../../lab/src/policies.rs"]
mod policies;
mod room;
mod setup;
mod tally;
mod test;

const HELP: &str = "\
Peili's chores.

Usage: cargo xtask COMMAND

Commands:
  test [--no-install] [FILTER]
      Installs what is missing (saying what and why; Debian and Ubuntu as root, elsewhere it says what to install), then
      builds the program twice (also as the next version, for the tests of upgrades) and runs formatting, clippy, unit,
      integration and doc tests, the demo (as root also on containerds), and a soak of one minute. The last line is
      `N passed, N failed, N skipped`; what is not done after 86 minutes is ended and has failed. Up to three tests that
      fail run once more, each by itself; those that pass then are named. With a FILTER, only the tests whose names
      contain it.
      --no-install   use only what is there; tests that lack something count as skipped

  demo [--containerd] [--json]
      Nodes that find each other, one image, deaths in mid-pull, a newcomer, a stranger and a policy. Needs neither root nor
      Docker nor internet, once it is built.
      --containerd   the same on real containerds in network namespaces; needs root
      --json         prints the summary as JSON to standard output, all else to standard error

  bench [ARGUMENTS]
      Measures a release build beside nginx; prints a table and one JSON line per case.

  soak [--minutes N] [--seed N] [--rate N]
      Six nodes with churn; ends with an error if anything leaks or grows. 10 minutes unless told otherwise.

  simulate network [--nodes N,N] [--scenarios S,S] [ARGUMENTS]
      The gossip that ships among thousands of nodes in one process, against its targets (docs/network.md). 1,000 nodes take
      some minutes, 5,000 half an hour and 8 GiB.
      --calibrate    the simulation beside 50 real processes, in a minute and a half; as root, on a machine with nothing
                     else to do
  simulate election [--schedules N] [--seed N] [--steps N]
      The core of the strict role under a million schedules of delays, losses, pauses, wrong clocks and deletions, beside
      algorithms that are known to be wrong and have to be caught (docs/elections.md). Two minutes.

  plugins
      Builds the policies of plugins/ to components in the build folder's `plugins`; `test` does so too.

  image [--platform linux/amd64,linux/arm64] [--out DIR] [--roots FILE] [--name NAME] [--tree DIR] [--json]
      Peili's own image, as an OCI layout and as one file for `ctr images import`, in the build folder's `image`: the program, linked
      statically, the policies and roots for TLS on an empty base. Needs no container engine; ten minutes for each platform the first
      time. Of this machine's platform unless told otherwise; for another one it installs a compiler (Debian and Ubuntu as root).
      --tree         also the image's files as a folder, for deploy/Containerfile

  render [--check]
      The chart of deploy/chart as Helm renders it with each file of its `ci`, to deploy/manifests. --check writes nothing, and
      fails where one is not what the chart gives; `test` does so too.

  setup
      Only the first part of `test`: installs what is missing.

  help
      This text.

Environment:
  CARGO_TARGET_DIR     the build folder; programs that tests need are kept in its folder `tools`
  PEILI_CONTAINERD_16, PEILI_CONTAINERD_17, PEILI_CONTAINERD_2X
                       containerd programs to test with, instead of those that are found
  KUBEBUILDER_ASSETS   a folder with kube-apiserver and etcd to test with, instead of the Kubernetes 1.20.2 that setup builds
  SOURCE_DATE_EPOCH    the time of the image and its files in seconds since 1970, instead of the commit's
  CI                   set: no colours";

/// Commands of the laboratory's program, which has a help of its own.
const LABORATORY: [&str; 5] = ["demo", "bench", "soak", "simulate", "render"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all went well; the command has said what did not.
fn run(arguments: &[String]) -> Result<bool> {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    if rest.iter().any(|argument| argument == "--help" || argument == "-h") && !LABORATORY.contains(&command)
    {
        println!("{HELP}");
        return Ok(true);
    }
    match command {
        "test" => Ok(test::run(&test::Options::parse(rest)?)),
        "demo" => {
            setup::install_for_build()?;
            setup::install_for_policies();
            build_policies(&programs(false)?.0.join("peili"))?;
            laboratory("demo", rest, false)
        }
        "bench" => laboratory("bench", rest, true),
        "soak" => laboratory("soak", rest, false),
        "simulate" => laboratory("simulate", rest, true),
        "plugins" => {
            ensure!(rest.is_empty(), "`plugins` takes no arguments");
            setup::install_for_build()?;
            setup::install_for_policies();
            build_policies(&programs(false)?.0.join("peili"))?;
            Ok(true)
        }
        "image" => image::run(rest),
        "render" => {
            setup::install_for_build()?;
            setup::install_for_chart();
            laboratory("render", rest, false)
        }
        "setup" => {
            ensure!(rest.is_empty(), "`setup` takes no arguments");
            setup::install()?;
            Ok(true)
        }
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(true)
        }
        other => bail!("no command `{other}`; `cargo xtask help` lists them"),
    }
}

/// The programs that were built, in this folder.
struct Programs(PathBuf);

impl Programs {
    /// The laboratory's, with `peili` to work on.
    fn laboratory(&self) -> Command {
        let mut laboratory = Command::new(self.0.join("peili-lab"));
        laboratory.env("PEILI_BIN", self.0.join("peili"));
        laboratory
    }
}

/// Builds all programs and becomes the laboratory's, so that signals reach it as they come.
fn laboratory(command: &str, arguments: &[String], release: bool) -> Result<bool> {
    setup::install_for_build()?;
    let error = programs(release)?.laboratory().arg(command).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {command}"))
}

/// Builds the programs. All packages at once, as for the tests: a part of the workspace would have other features, and
/// much would be compiled again.
fn programs(release: bool) -> Result<Programs> {
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    let built = cargo().args(["build", "--workspace", "--bins"]).args(profile).status()?;
    ensure!(built.success(), "the programs do not build");
    Ok(Programs(target().join(if release { "release" } else { "debug" })))
}

/// Builds the policies by this `peili`.
fn build_policies(peili: &Path) -> Result<()> {
    let folder = target().join("plugins");
    std::fs::create_dir_all(&folder)?;
    for name in policies::SHIPPED.iter().chain(&policies::FOR_TESTS) {
        let (source, out) = (root().join("plugins").join(name), folder.join(name).with_extension("wasm"));
        let built =
            Command::new(peili).args(["plugin", "build"]).arg(source).arg("--out").arg(out).status()?;
        ensure!(built.success(), "the policy {name} does not build");
    }
    Ok(())
}

/// cargo, in the repository's root.
fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root());
    if std::env::var_os("CI").is_some() {
        command.env("CARGO_TERM_COLOR", "never");
    }
    command
}

fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map(Path::to_path_buf).unwrap_or(manifest)
}

/// The build folder, as the laboratory finds it.
fn target() -> PathBuf {
    // Joined to an absolute path, that path stays as it is.
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |path| root().join(path))
}
