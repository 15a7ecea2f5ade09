//! Installs what building and testing need, each only if it is missing, and says why.
//!
//! Programs that exist in this machine's package archive are installed. containerds go into the tool cache instead: all
//! three generations are wanted side by side, and none of them as a service. They are Go programs, so those of other
//! Debian suites run here. Kubernetes goes there too ([`kubernetes`]), Helm and kube-router
//! ([`modules`]) and Prometheus ([`prometheus`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use self::archive::Archive;
use crate::{cargo, target};

mod archive;
mod kubernetes;
mod modules;
mod prometheus;

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

/// The target of policies.
const WASM: &str = "wasm32-unknown-unknown";

const BUILD: [Package; 2] = [
    Package {
        name: "protobuf-compiler",
        program: "protoc",
        reason: "the build generates containerd's client",
    },
    Package { name: "build-essential", program: "cc", reason: "the build compiles the cryptography library" },
];

const TESTS: [Package; 14] = [
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
    Package { name: "clang-19", program: "clang-19", reason: "a policy in C" },
    Package { name: "wasi-libc", program: "/usr/lib/wasm32-wasi/libc.a", reason: "its C library" },
    Package {
        name: "libclang-rt-19-dev-wasm32",
        program: "/usr/lib/llvm-19/lib/clang/19/lib/wasi/libclang_rt.builtins-wasm32.a",
        reason: "what clang's code calls where WebAssembly has no instruction",
    },
    Package { name: "dnsmasq-base", program: "dnsmasq", reason: "names of Services in the cluster" },
    Package {
        name: "ipset",
        program: "ipset",
        reason: "kube-router keeps addresses of pods in sets of the kernel",
    },
    Package { name: "jq", program: "jq", reason: "the cluster's scripts read the API's answers" },
    Package { name: "curl", program: "curl", reason: "the cluster's scripts ask over HTTP" },
    Package { name: "openssl", program: "openssl", reason: "the cluster's certificates" },
    Package { name: "nginx-light", program: "nginx", reason: "the yardstick of the benchmarks" },
];

/// What compiles for another architecture than the machine's, by its name: the compiler with its linker, and the C library that is linked in.
const CROSS: [(&str, [Package; 2]); 2] = [
    (
        "aarch64",
        [
            Package {
                name: "gcc-aarch64-linux-gnu",
                program: "aarch64-linux-gnu-gcc",
                reason: "the image for arm64: compiles its cryptography library, and links",
            },
            Package {
                name: "libc6-dev-arm64-cross",
                program: "/usr/aarch64-linux-gnu/lib/libc.a",
                reason: "the C library that is linked into it",
            },
        ],
    ),
    (
        "x86_64",
        [
            Package {
                name: "gcc-x86-64-linux-gnu",
                program: "x86_64-linux-gnu-gcc",
                reason: "the image for amd64: compiles its cryptography library, and links",
            },
            Package {
                name: "libc6-dev-amd64-cross",
                program: "/usr/x86_64-linux-gnu/lib/libc.a",
                reason: "the C library that is linked into it",
            },
        ],
    ),
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
    kubernetes::install();
    modules::install(&[modules::HELM, modules::KUBE_ROUTER]);
    prometheus::install();
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

/// Installs what compiling for an architecture needs, if that is another than the machine's.
///
/// # Errors
/// Something is still missing: what, and who has it.
pub(crate) fn install_for_architecture(architecture: &str, triple: &str) -> Result<()> {
    if architecture != std::env::consts::ARCH {
        let (_, cross) =
            CROSS.iter().find(|(name, _)| *name == architecture).context("no compiler is known for it")?;
        packages(cross);
        for package in cross {
            ensure!(
                program(package.program).is_some(),
                "there is no {}, of {}: {}. Debian and Ubuntu have it; as root `cargo xtask image` installs it",
                package.program,
                package.name,
                package.reason
            );
        }
    }
    if !has_target(triple) {
        add_target(triple, "the standard library for the image");
        ensure!(
            has_target(triple),
            "the Rust compiler has no standard library for {triple}: `rustup target add {triple}`, or the package of yours \
             that has it"
        );
    }
    Ok(())
}

/// Installs what rendering the chart needs.
pub(crate) fn install_for_chart() {
    modules::install(&[modules::HELM]);
}

/// Whether policies can be built.
pub(crate) fn can_build_policies() -> bool {
    has_wasm() || POLICIES.iter().all(|package| program(package.program).is_some())
}

fn has_wasm() -> bool {
    has_target(WASM)
}

/// Whether the compiler in use has the standard library of a target.
fn has_target(triple: &str) -> bool {
    let mut rustc = Command::new("rustc");
    // Where a toolchain may be pinned.
    rustc.current_dir(crate::root());
    let output = rustc.args(["--print", "target-libdir", "--target", triple]).output();
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

    /// Unpacks the package of its suite into the tool cache.
    fn install(&self) -> Result<()> {
        let archive = Archive::open(self.suite, "deb")?;
        archive.download(&["containerd"])?;
        let tools = target().join("tools");
        let unpacked = tools.join(".containerd");
        // Of a try that was ended.
        let _ = fs::remove_dir_all(&unpacked);
        let version = archive.unpack("containerd", &unpacked)?;
        // "1.7.24~ds1-6+deb13u1" is 1.7.24, "2.1.9+ds1-5" is 2.1.9.
        let version = version.split(['~', '+', '-']).next().unwrap_or_default();
        ensure!(version.starts_with(self.version), "suite {} has containerd {version}", self.suite);
        fs::rename(&unpacked, tools.join(format!("containerd-{version}")))?;
        archive.close()
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
    if !has_wasm() {
        add_target(WASM, "policies are built with it, and without");
    }
}

/// Adds a target where there is a rustup.
fn add_target(triple: &str, reason: &str) {
    if program("rustup").is_none() {
        return;
    }
    println!("setup: {triple}: {reason}");
    let mut rustup = Command::new("rustup");
    if let Err(error) = checked(rustup.current_dir(crate::root()).args(["target", "add", triple])) {
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
    fn the_containerfile_installs_what_the_build_needs() {
        let text = fs::read_to_string(crate::root().join("deploy/Containerfile")).unwrap();
        let line = text.lines().find(|line| line.contains("apt-get install")).unwrap();
        let words = line.split_whitespace().skip_while(|word| *word != "install").skip(1);
        let names: Vec<&str> = words.filter(|word| !word.starts_with('-') && *word != "\\").collect();
        assert_eq!(names, BUILD.each_ref().map(|package| package.name));
        assert!(text.contains(&format!("rustup target add {WASM}\n")));
    }
}
