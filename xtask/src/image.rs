//! `cargo xtask image`: compiles the program for an image without libraries, for one architecture or several, and lets the laboratory write
//! the image.
//!
//! No container engine is needed. What is compiled carries no path of this machine, and its times are the commit's.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{build_policies, cargo, programs, root, setup, target};

/// An architecture: as images name it, as Rust does, and how the names of Debian's compilers for it begin.
struct Architecture {
    platform: &'static str,
    name: &'static str,
    triple: &'static str,
    compiler: &'static str,
}

/// Linked with the C library of the machine that builds: its memory allocation is quicker under threads than musl's.
const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        platform: "linux/amd64",
        name: "x86_64",
        triple: "x86_64-unknown-linux-gnu",
        compiler: "x86_64-linux-gnu",
    },
    Architecture {
        platform: "linux/arm64",
        name: "aarch64",
        triple: "aarch64-unknown-linux-gnu",
        compiler: "aarch64-linux-gnu",
    },
];

/// Builds and writes it; arguments other than the platforms go to the program that writes.
pub(crate) fn run(arguments: &[String]) -> Result<bool> {
    let (architectures, arguments) = parse(arguments)?;
    setup::install_for_build()?;
    setup::install_for_policies();
    // All of them before the first takes its ten minutes.
    for architecture in &architectures {
        setup::install_for_architecture(architecture.name, architecture.triple)
            .with_context(|| format!("no image can be made for {}", architecture.platform))?;
    }
    let programs = programs(false)?;
    build_policies(&programs.0.join("peili"))?;
    let mut image = Command::new(programs.0.join("peili-lab"));
    image.arg("image");
    for architecture in &architectures {
        image.arg("--program").arg(architecture.compile()?);
    }
    image.arg("--policies").arg(target().join("plugins"));
    if !arguments.iter().any(|argument| argument.starts_with("--out")) {
        image.arg("--out").arg(target().join("image"));
    }
    let (revision, created) = commit()?;
    image.arg(format!("--created={created}")).arg(format!("--revision={revision}"));
    Ok(image.args(arguments).status().context("cannot run the laboratory")?.success())
}

/// Takes `--platform linux/amd64,linux/arm64` out of the arguments; this machine's unless told otherwise.
fn parse(arguments: &[String]) -> Result<(Vec<&'static Architecture>, Vec<String>)> {
    let (mut named, mut rest) = (None, Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let value = match argument.split_once('=') {
            Some(("--platform", value)) => value.to_owned(),
            _ if argument == "--platform" => arguments.next().cloned().unwrap_or_default(),
            _ => {
                rest.push(argument.clone());
                continue;
            }
        };
        ensure!(
            named.replace(value).is_none(),
            "`--platform` is given twice: name all platforms in one, with commas"
        );
    }
    let known = ARCHITECTURES.each_ref().map(|architecture| architecture.platform).join(", ");
    let Some(named) = named else {
        let machine = std::env::consts::ARCH;
        let own = ARCHITECTURES.iter().find(|architecture| architecture.name == machine);
        let own = own.with_context(|| {
            format!("no image is made for {machine}: name others by `--platform` ({known})")
        })?;
        return Ok((vec![own], rest));
    };
    let mut architectures: Vec<&Architecture> = Vec::new();
    for name in named.split(',') {
        let Some(architecture) = ARCHITECTURES.iter().find(|architecture| architecture.platform == name)
        else {
            bail!("no image is made for platform `{name}`; there are {known}");
        };
        ensure!(
            !architectures.iter().any(|other| other.platform == name),
            "platform `{name}` is named twice"
        );
        architectures.push(architecture);
    }
    Ok((architectures, rest))
}

impl Architecture {
    /// The program for it, linked statically.
    fn compile(&self) -> Result<PathBuf> {
        let triple = self.triple;
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
        let mut build = cargo();
        build
            .args([
                "build",
                "--release",
                "--locked",
                "--package",
                "peili",
                "--bin",
                "peili",
                "--target",
                triple,
            ])
            .env("RUSTFLAGS", format!("-C target-feature=+crt-static{}", prefixes("--remap-path-prefix")))
            .env("CFLAGS", prefixes("-ffile-prefix-map"))
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
        if self.name != std::env::consts::ARCH {
            let compiler = format!("{}-gcc", self.compiler);
            let name = triple.replace('-', "_");
            build.env(format!("CARGO_TARGET_{}_LINKER", name.to_uppercase()), &compiler);
            // Those who name a compiler of their own keep it.
            for (variable, program) in [("CC", compiler), ("AR", format!("{}-ar", self.compiler))] {
                let variable = format!("{variable}_{name}");
                if std::env::var_os(&variable).is_none() {
                    build.env(variable, program);
                }
            }
        }
        ensure!(build.status()?.success(), "the program does not build for {}", self.platform);
        Ok(target().join(triple).join("release/peili"))
    }
}

/// The commit and its time; of sources without a history: none, and 1970. `SOURCE_DATE_EPOCH` is another time, as reproducible-builds.org
/// defines it.
fn commit() -> Result<(String, u64)> {
    let output = Command::new("git").current_dir(root()).args(["log", "-1", "--format=%H %ct"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut words = text.split_whitespace();
    let revision = words.next().unwrap_or_default().to_owned();
    let time = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(time) => {
            time.parse().with_context(|| format!("SOURCE_DATE_EPOCH is no number of seconds: `{time}`"))?
        }
        Err(_) => words.next().and_then(|time| time.parse().ok()).unwrap_or(0),
    };
    Ok((revision, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_named_once_and_known() {
        let parsed = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            parse(&words)
                .map(|(found, rest)| {
                    (found.iter().map(|found| found.platform).collect::<Vec<_>>().join(" "), rest.join(" "))
                })
                .map_err(|error| error.to_string())
        };
        let both = "linux/arm64 linux/amd64".to_owned();
        assert_eq!(parsed("--platform linux/arm64,linux/amd64 --json"), Ok((both.clone(), "--json".into())));
        assert_eq!(parsed("--out x --platform=linux/arm64,linux/amd64"), Ok((both, "--out x".into())));
        let own = ARCHITECTURES.iter().find(|known| known.name == std::env::consts::ARCH);
        assert_eq!(parsed("").ok().map(|(found, _)| found), own.map(|own| own.platform.to_owned()));
        for (line, why) in [
            ("--platform linux/riscv64", "there are linux/amd64, linux/arm64"),
            ("--platform", "no image is made for platform ``"),
            ("--platform linux/amd64,linux/amd64", "named twice"),
            ("--platform linux/amd64 --platform linux/arm64", "given twice"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}
