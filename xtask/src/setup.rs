//! Installs what building and testing need, each only if it is missing, and says why.
//!
//! Programs that exist in this machine's package archive are installed. containerds go into the tool cache instead: all
//! three generations are wanted side by side, and none of them as a service. They are Go programs, so those of other
//! Debian suites run here; the archive is the one that this machine's own sources name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{cargo, target};

/// A package, the program by which it is recognised, and what it is for.
struct Package {
    name: &'static str,
    program: &'static str,
    reason: &'static str,
}

/// A containerd: how versions of this generation begin, its environment variable, and the Debian suite that has it.
struct Containerd {
    version: &'static str,
    variable: &'static str,
    suite: &'static str,
}

const BUILD: [Package; 2] = [
    Package {
        name: "protobuf-compiler",
        program: "protoc",
        reason: "the build generates containerd's client",
    },
    Package { name: "build-essential", program: "cc", reason: "the build compiles the cryptography library" },
];

const TESTS: [Package; 6] = [
    Package {
        name: "iproute2",
        program: "ip",
        reason: "integration tests make a network namespace per node",
    },
    Package { name: "iptables", program: "iptables", reason: "integration tests cut nodes off" },
    Package { name: "faketime", program: "faketime", reason: "integration tests let a node's clock jump" },
    Package { name: "zstd", program: "zstd", reason: "integration tests pull zstd layers" },
    Package {
        name: "skopeo",
        program: "skopeo",
        reason: "integration tests pull with a client that sends no `ns`",
    },
    Package { name: "nginx-light", program: "nginx", reason: "the yardstick of the benchmarks" },
];

/// What makes WebAssembly on Debian, where the compiler in use has no target for it.
const POLICIES: [Package; 2] = [
    Package {
        name: "rustc-web cargo-web rust-web-src",
        program: "/usr/bin/rustc",
        reason: "the policies are built for WebAssembly, with their standard library",
    },
    Package { name: "lld-19", program: "wasm-ld-19", reason: "the linker of WebAssembly" },
];

const CONTAINERDS: [Containerd; 3] = [
    Containerd { version: "1.6.", variable: "PEILI_CONTAINERD_16", suite: "bookworm" },
    Containerd { version: "1.7.", variable: "PEILI_CONTAINERD_17", suite: "trixie" },
    Containerd { version: "2.", variable: "PEILI_CONTAINERD_2X", suite: "forky" },
];

/// Installs all that the tests need. What cannot be installed is said, and is no error: its tests are skipped.
pub(crate) fn install() -> Result<()> {
    install_for_build()?;
    packages(&TESTS);
    wasm();
    // Also beside rustup's target: policies are built without it too.
    packages(&POLICIES);
    for containerd in &CONTAINERDS {
        if containerd.is_missing() {
            let version = containerd.version;
            println!("setup: containerd {version}x: integration tests pull through every generation");
            if let Err(error) = containerd.install() {
                println!("setup: cannot get containerd {version}x: {error:#}");
                println!("setup: name one by {}; until then its tests are skipped", containerd.variable);
            }
        }
    }
    components();
    Ok(())
}

/// Installs what the build needs.
pub(crate) fn install_for_build() -> Result<()> {
    packages(&BUILD);
    Ok(())
}

/// Installs what building policies needs, unless rustup's target is there.
pub(crate) fn install_for_policies() {
    if !has_wasm() {
        packages(&POLICIES);
    }
}

/// Whether policies can be built.
pub(crate) fn can_build_policies() -> bool {
    has_wasm() || POLICIES.iter().all(|package| program(package.program).is_some())
}

fn has_wasm() -> bool {
    let mut rustc = Command::new("rustc");
    let output = rustc.args(["--print", "target-libdir", "--target", "wasm32-unknown-unknown"]).output();
    output.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

/// Whether the workspace can be built.
pub(crate) fn can_build() -> bool {
    std::env::var_os("PROTOC").is_some() || program("protoc").is_some()
}

/// Whether cargo has this subcommand.
pub(crate) fn has_cargo(subcommand: &str) -> bool {
    let output = cargo().args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    output.is_ok_and(|status| status.success())
}

/// What this machine lacks to run containerds in namespaces.
pub(crate) fn lacks_for_containerds() -> Option<String> {
    let lacks = [
        (!is_root(), "root"),
        (program("ip").is_none(), "iproute2"),
        (CONTAINERDS.iter().all(Containerd::is_missing), "containerd"),
    ];
    let names: Vec<&str> = lacks.iter().filter(|(lacks, _)| *lacks).map(|(_, name)| *name).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

impl Containerd {
    fn is_missing(&self) -> bool {
        if std::env::var_os(self.variable).is_some() {
            return false;
        }
        let cached = format!("containerd-{}", self.version);
        let is_cached = fs::read_dir(target().join("tools"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with(&cached));
        !is_cached && !self.is_installed()
    }

    fn is_installed(&self) -> bool {
        let output = Command::new("containerd").arg("--version").output();
        output.is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let version = text.split_whitespace().nth(2).unwrap_or_default();
            version.trim_start_matches('v').starts_with(self.version)
        })
    }

    /// Downloads the package of its suite by a private apt source and unpacks it into the tool cache.
    fn install(&self) -> Result<()> {
        let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
        ensure!(os.lines().any(|line| line == "ID=debian"), "only known how on Debian");
        let folder = target().join("tools").join(format!(".apt-{}", self.suite));
        let (sources, lists, cache) = (folder.join("sources"), folder.join("lists"), folder.join("cache"));
        for path in [&sources, &lists.join("partial"), &cache.join("archives/partial")] {
            fs::create_dir_all(path)?;
        }
        fs::write(sources.join("suite.sources"), source(self.suite)?)?;
        let options = [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={}", sources.display()),
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            // The folder may be closed to apt's own user.
            "APT::Sandbox::User=root".to_owned(),
        ];
        let apt = |arguments: &[&str]| {
            let mut command = Command::new("apt-get");
            command.arg("-qq").args(options.iter().flat_map(|option| ["-o", option])).args(arguments);
            checked(command.current_dir(&folder))
        };
        apt(&["update"])?;
        apt(&["download", "containerd"])?;
        let package = fs::read_dir(&folder)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt downloaded nothing")?;
        let output = Command::new("dpkg-deb").arg("-f").arg(&package).arg("Version").output()?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        // "1.7.24~ds1-6+deb13u1" is 1.7.24, "2.1.9+ds1-5" is 2.1.9.
        let version = version.split(['~', '+', '-']).next().unwrap_or_default();
        ensure!(version.starts_with(self.version), "suite {} has containerd {version}", self.suite);
        let unpacked = folder.join("unpacked");
        checked(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
        fs::rename(&unpacked, target().join("tools").join(format!("containerd-{version}")))?;
        fs::remove_dir_all(folder)?;
        Ok(())
    }
}

/// Installs those packages whose programs are missing.
fn packages(packages: &[Package]) {
    let missing: Vec<&Package> =
        packages.iter().filter(|package| program(package.program).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    for package in &missing {
        println!("setup: {}: {}", package.name, package.reason);
    }
    let names: Vec<&str> = missing.iter().flat_map(|package| package.name.split(' ')).collect();
    if !is_root() || program("apt-get").is_none() {
        println!("setup: please install by hand: {}", names.join(" "));
        return;
    }
    let install = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        checked(command.args(["-qq", "install", "-y", "--no-install-recommends"]).args(&names))
    };
    // The lists may be old or empty; only then are they read anew.
    let installed = install().or_else(|_| {
        println!("setup: apt-get update, then again");
        checked(Command::new("apt-get").args(["-qq", "update"])).and_then(|()| install())
    });
    if let Err(error) = installed {
        println!("setup: cannot install {}: {error:#}", names.join(" "));
    }
}

/// rustup's target of policies, where there is a rustup.
fn wasm() {
    if has_wasm() || program("rustup").is_none() {
        return;
    }
    println!("setup: wasm32-unknown-unknown: policies are built with it, and without");
    if let Err(error) = checked(Command::new("rustup").args(["target", "add", "wasm32-unknown-unknown"])) {
        println!("setup: cannot add it: {error:#}");
    }
}

fn components() {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if has_cargo(subcommand) {
            continue;
        }
        println!("setup: {component}: one of the checks");
        if let Err(error) = checked(Command::new("rustup").args(["component", "add", component])) {
            println!("setup: cannot add it: {error:#}");
        }
    }
}

/// The first source of this machine that serves Debian, turned to another suite.
fn source(suite: &str) -> Result<String> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let deb822 = files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "sources"))
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| from_deb822(&text, suite));
    let one_line = || from_one_line(&fs::read_to_string("/etc/apt/sources.list").ok()?, suite);
    deb822.or_else(one_line).context("no source of Debian packages on this machine")
}

/// The first stanza with component main, with its suites replaced.
fn from_deb822(text: &str, suite: &str) -> Option<String> {
    let is_archive = |stanza: &&str| {
        let components = stanza.lines().find_map(|line| line.strip_prefix("Components:"));
        components.is_some_and(|components| components.split_whitespace().any(|name| name == "main"))
            && stanza.contains("URIs:")
            && !stanza.lines().any(|line| line.starts_with("Suites:") && line.contains("-security"))
    };
    let stanza = text.split("\n\n").find(is_archive)?;
    let replace = |line: &str| match line {
        line if line.starts_with("Suites:") => format!("Suites: {suite}\n"),
        line if line.starts_with("Types:") => "Types: deb\n".to_owned(),
        line => format!("{line}\n"),
    };
    Some(stanza.lines().map(replace).collect())
}

/// The same from `deb [OPTIONS] URI SUITE COMPONENT...`.
fn from_one_line(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let rest =
            rest.strip_prefix('[').map_or(rest, |rest| rest.split_once(']').map_or("", |(_, rest)| rest));
        let mut words = rest.split_whitespace();
        let (uri, old) = (words.next()?, words.next()?);
        if old.contains("-security") || !words.any(|word| word == "main") {
            return None;
        }
        Some(format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n"))
    })
}

/// Where a program is, administrators' folders included.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

fn checked(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run {name}"))?;
    ensure!(status.success(), "{name}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_turned_to_another_suite() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://archive.test/debian\nSuites: old old-updates\n\
                    Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://other.test\n";
        let expected = "Types: deb\n# a comment\nURIs: http://archive.test/debian\nSuites: new\nComponents: main\n\
                        Signed-By: /k.gpg\n";
        assert_eq!(from_deb822(text, "new").as_deref(), Some(expected));
        let text = "# deb no\ndeb [arch=amd64] http://archive.test/debian old main contrib\n";
        let expected = "Types: deb\nURIs: http://archive.test/debian\nSuites: new\nComponents: main\n";
        assert_eq!(from_one_line(text, "new").as_deref(), Some(expected));
    }
}
