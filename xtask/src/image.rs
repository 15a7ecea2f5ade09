//! `cargo xtask image`: compiles the program for an image without libraries, and lets the laboratory write the image.
//!
//! No container engine is needed. What is compiled carries no path of this machine, and its times are the commit's.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{build_policies, cargo, programs, root, setup, target};

/// Linked with the C library of the machine that builds: its memory allocation is quicker under threads than musl's.
const TARGETS: [(&str, &str); 2] =
    [("x86_64", "x86_64-unknown-linux-gnu"), ("aarch64", "aarch64-unknown-linux-gnu")];

/// Builds and writes it; `arguments` go to the program that writes.
pub(crate) fn run(arguments: &[String]) -> Result<bool> {
    setup::install_for_build()?;
    setup::install_for_policies();
    let programs = programs(false)?;
    build_policies(&programs.0.join("peili"))?;
    let program = compile()?;
    let mut image = Command::new(programs.0.join("peili-lab"));
    image.arg("image").arg("--program").arg(program);
    image.arg("--policies").arg(target().join("plugins"));
    if !arguments.iter().any(|argument| argument.starts_with("--out")) {
        image.arg("--out").arg(target().join("image"));
    }
    let (revision, created) = commit();
    image.arg(format!("--created={created}")).arg(format!("--revision={revision}"));
    Ok(image.args(arguments).status().context("cannot run the laboratory")?.success())
}

/// The program for this machine's architecture, linked statically.
fn compile() -> Result<PathBuf> {
    let machine = std::env::consts::ARCH;
    let Some((_, triple)) = TARGETS.iter().find(|(name, _)| *name == machine) else {
        bail!("no image is made for {machine} yet");
    };
    let cargo_home = std::env::var("CARGO_HOME")
        .or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))
        .unwrap_or_else(|_| "/nonexistent".into());
    let places = [(root(), "/peili"), (cargo_home.into(), "/cargo"), (target(), "/target")];
    // The last that fits counts, and the build folder may lie in the sources.
    let prefixes = |flag: &str| -> String {
        let one = |(from, to): &(PathBuf, &str)| format!(" {flag}={}={to}", from.display());
        places.iter().map(one).collect()
    };
    println!("image: a release build for {triple}, linked statically; ten minutes the first time");
    let built = cargo()
        .args(["build", "--release", "--package", "peili", "--bin", "peili", "--target", triple])
        .env("RUSTFLAGS", format!("-C target-feature=+crt-static{}", prefixes("--remap-path-prefix")))
        .env("CFLAGS", prefixes("-ffile-prefix-map"))
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .status()?;
    ensure!(built.success(), "the program does not build");
    Ok(target().join(triple).join("release/peili"))
}

/// The commit and its time; of sources without a history: none, and 1970.
fn commit() -> (String, u64) {
    let output = Command::new("git").current_dir(root()).args(["log", "-1", "--format=%H %ct"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut words = text.split_whitespace();
    let revision = words.next().unwrap_or_default().to_owned();
    (revision, words.next().and_then(|time| time.parse().ok()).unwrap_or(0))
}
