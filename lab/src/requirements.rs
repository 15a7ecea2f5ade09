//! What this machine has, and the reason to print for a test that it cannot run.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::policies;

/// Names a file to which skipped tests are appended, one `NAME<tab>REASON` a line. Set by `cargo xtask test`: a test that
/// returns early counts as passed for the standard harness, and this is how it is told from one that ran.
pub const SKIPS_FILE: &str = "PEILI_SKIPS_FILE";

/// A generation of containerd: each talks to a mirror in its own way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Generation {
    /// 1.6
    V1_6,
    /// 1.7
    V1_7,
    /// 2.x
    V2,
}

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Effective user 0.
    Root,
    /// `ip` and `tc`.
    Iproute2,
    /// `iptables` and `ip6tables`.
    Iptables,
    /// A containerd of this generation.
    Containerd(Generation),
    /// `kube-apiserver` and `etcd`.
    Kubernetes,
    /// What `lab/cluster/lab.sh` needs to bring a cluster up: all of Kubernetes, a containerd 1.6, cgroups v1, root.
    Cluster,
    /// `nginx`.
    Nginx,
    /// `zstd`.
    Zstd,
    /// `gzip`.
    Gzip,
    /// `skopeo`.
    Skopeo,
    /// `faketime`, with its library.
    Faketime,
    /// `systemd-analyze`.
    SystemdAnalyze,
    /// `helm` of generation 3.
    Helm,
    /// `kube-router`, and `ipset`.
    KubeRouter,
    /// `promtool`.
    Promtool,
    /// `prometheus`.
    Prometheus,
    /// The program that speaks as the next version (`cargo xtask test` builds it).
    NextVersion,
    /// The components of `plugins/` (`cargo xtask test` builds them).
    Policies,
    /// clang 19, and a C library of WebAssembly.
    C,
    /// A compiler that has the target of policies.
    WasmTarget,
    /// A compiler that has not, and what it needs to build the standard library for it.
    WasmSources,
}

impl Generation {
    /// All, oldest first.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2];

    /// The environment variable that names its program.
    pub const fn variable(self) -> &'static str {
        match self {
            Self::V1_6 => "PEILI_CONTAINERD_16",
            Self::V1_7 => "PEILI_CONTAINERD_17",
            Self::V2 => "PEILI_CONTAINERD_2X",
        }
    }

    const fn version_prefix(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6.",
            Self::V1_7 => "1.7.",
            Self::V2 => "2.",
        }
    }

    /// Its program: from the environment, else from the tool cache, else the machine's own if that is of this generation.
    pub fn binary(self) -> Option<PathBuf> {
        if let Some(path) = std::env::var_os(self.variable()).map(PathBuf::from) {
            return path.is_file().then_some(path);
        }
        let cached = format!("containerd-{}", self.version_prefix());
        let mut folders: Vec<PathBuf> = std::fs::read_dir(tools())
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(&cached)))
            .map(|entry| entry.path().join("usr/bin/containerd"))
            .filter(|path| path.is_file())
            .collect();
        folders.sort();
        folders.pop().or_else(|| program("containerd").filter(|path| self.is_version_of(path)))
    }

    fn is_version_of(self, binary: &Path) -> bool {
        let Ok(output) = std::process::Command::new(binary).arg("--version").output() else { return false };
        // "containerd github.com/containerd/containerd 1.6.20~ds1 REVISION", with a v before it upstream.
        String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .nth(2)
            .is_some_and(|version| version.trim_start_matches('v').starts_with(self.version_prefix()))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_6 => "containerd 1.6",
            Self::V1_7 => "containerd 1.7",
            Self::V2 => "containerd 2.x",
        })
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("root"),
            Self::Iproute2 => f.write_str("iproute2"),
            Self::Iptables => f.write_str("iptables"),
            Self::Containerd(generation) => generation.fmt(f),
            Self::Kubernetes => f.write_str("kube-apiserver and etcd, which KUBEBUILDER_ASSETS may name"),
            Self::Cluster => write!(f, "a cluster ({})", cluster_lacks().unwrap_or_default()),
            Self::Nginx => f.write_str("nginx"),
            Self::Zstd => f.write_str("zstd"),
            Self::Gzip => f.write_str("gzip"),
            Self::Skopeo => f.write_str("skopeo"),
            Self::Faketime => f.write_str("faketime"),
            Self::SystemdAnalyze => f.write_str("systemd-analyze"),
            Self::NextVersion => {
                f.write_str("the program of the next version, which `cargo xtask test` builds")
            }
            Self::Policies => f.write_str("the policies' components, which `cargo xtask plugins` builds"),
            Self::C => f.write_str("clang-19, lld-19, wasi-libc and libclang-rt-19-dev-wasm32"),
            Self::WasmTarget => f.write_str("rustup's target wasm32-unknown-unknown"),
            Self::Helm => f.write_str("Helm 3"),
            Self::KubeRouter => f.write_str("kube-router and ipset"),
            Self::Promtool => f.write_str("promtool"),
            Self::Prometheus => f.write_str("Prometheus"),
            Self::WasmSources => f.write_str("rustc-web, cargo-web, rust-web-src and lld-19"),
        }
    }
}

impl Requirement {
    /// Whether this machine has it.
    pub fn is_met(self) -> bool {
        match self {
            Self::Root => rustix::process::geteuid().is_root(),
            Self::Iproute2 => program("ip").is_some() && program("tc").is_some(),
            Self::Iptables => program("iptables").is_some() && program("ip6tables").is_some(),
            Self::Containerd(generation) => generation.binary().is_some(),
            Self::Kubernetes => kubernetes().is_some(),
            Self::Cluster => cluster_lacks().is_none(),
            Self::Nginx => program("nginx").is_some(),
            Self::Zstd => program("zstd").is_some(),
            Self::Gzip => program("gzip").is_some(),
            Self::Skopeo => program("skopeo").is_some(),
            Self::Faketime => faketime().is_some(),
            Self::SystemdAnalyze => program("systemd-analyze").is_some(),
            Self::NextVersion => next_version().is_file(),
            Self::Policies => {
                policies::SHIPPED.iter().chain(&policies::FOR_TESTS).all(|name| policy(name).is_file())
            }
            Self::C => clang().is_some(),
            Self::WasmTarget => wasm_target().is_some(),
            Self::Helm => helm().is_some(),
            Self::KubeRouter => kube_router().is_some() && program("ipset").is_some(),
            Self::Promtool => prometheus("promtool").is_some(),
            Self::Prometheus => prometheus("prometheus").is_some(),
            Self::WasmSources => wasm_sources().is_some(),
        }
    }
}

/// Ok if all are met, else the reason: `needs root and iproute2`. It names only what is missing.
pub fn require(requirements: &[Requirement]) -> Result<(), String> {
    let missing: Vec<_> =
        requirements.iter().filter(|requirement| !requirement.is_met()).map(ToString::to_string).collect();
    reason(&missing)
}

/// Reports that the test `name` is skipped: prints `skipped: NAME: REASON`, and tells `cargo xtask test`. For tests that
/// then return early; a harness that marks its tests as ignored counts them itself and must not call this.
#[expect(clippy::print_stdout, reason = "the reason is the test's output")]
pub fn report_skip(name: &str, reason: &str) {
    println!("skipped: {name}: {reason}");
    if let Some(path) = std::env::var_os(SKIPS_FILE)
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = file.write_all(format!("{name}\t{reason}\n").as_bytes());
    }
}

/// Returns from a test with a report where the machine lacks something: `skip_unless!("name", Root, Iproute2)`.
#[macro_export]
macro_rules! skip_unless {
    ($name:expr, $($requirement:expr),+ $(,)?) => {
        if let Err(reason) = $crate::require(&[$($requirement),+]) {
            $crate::report_skip($name, &reason);
            return;
        }
    };
}

/// Where a program is, as a shell finds it, and in the folders for administrators too.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// The library by which a program sees another time of day, in Debian's folder of any architecture.
pub fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    let libraries = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    libraries.filter(|path| path.is_file()).min()
}

/// clang 19, where it can make WebAssembly of C that uses a C library.
pub fn clang() -> Option<PathBuf> {
    let library = Path::new("/usr/lib/wasm32-wasi/libc.a");
    let builtins = Path::new("/usr/lib/llvm-19/lib/clang/19/lib/wasi/libclang_rt.builtins-wasm32.a");
    let has_all = library.is_file() && builtins.is_file() && program("wasm-ld-19").is_some();
    program("clang-19").filter(|_| has_all)
}

/// The folder of the programs of the toolchain in use, if that has the target of policies.
pub fn wasm_target() -> Option<PathBuf> {
    let rustc = Path::new("rustc");
    has_target(rustc).then(|| sysroot(rustc)).flatten().map(|path| path.join("bin"))
}

/// The folder of the programs of Debian's toolchain, if that has not the target of policies, but what its standard library is
/// built from.
pub fn wasm_sources() -> Option<PathBuf> {
    let bin = Path::new("/usr/bin");
    let rustc = bin.join("rustc");
    let library = sysroot(&rustc)?.join("lib/rustlib/src/rust/library/std/Cargo.toml");
    let has_all = library.is_file() && bin.join("cargo").is_file() && program("wasm-ld-19").is_some();
    (has_all && !has_target(&rustc)).then(|| bin.to_owned())
}

fn has_target(rustc: &Path) -> bool {
    said(rustc, &["--print", "target-libdir", "--target", "wasm32-unknown-unknown"])
        .is_some_and(|path| path.is_dir())
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    said(rustc, &["--print", "sysroot"])
}

/// The path that a program prints.
fn said(program: &Path, arguments: &[&str]) -> Option<PathBuf> {
    let output = std::process::Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().into())
}

/// The folder of `kube-apiserver` and `etcd`: from the environment by the convention of envtest, else from the tool cache.
pub fn kubernetes() -> Option<PathBuf> {
    let has_both =
        |folder: &PathBuf| ["kube-apiserver", "etcd"].iter().all(|name| folder.join(name).is_file());
    if let Some(folder) = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from) {
        return has_both(&folder).then_some(folder);
    }
    let folders = std::fs::read_dir(tools()).ok()?.flatten();
    let named = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with("kubernetes-"));
    named.map(|entry| entry.path()).filter(has_both).max()
}

/// The folder of all programs of Kubernetes, in the tool cache.
pub fn cluster() -> Option<PathBuf> {
    let folders = std::fs::read_dir(tools()).ok()?.flatten();
    let named = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with("kubernetes-"));
    named.map(|entry| entry.path()).filter(|folder| folder.join("kubelet").is_file()).max()
}

/// What this machine lacks to bring a cluster up, as `lab.sh check` says it.
fn cluster_lacks() -> Option<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/lab.sh");
    let containerd = Generation::V1_6.binary().and_then(|path| Some(path.parent()?.to_owned()));
    let (programs, containerd) = (cluster().unwrap_or_default(), containerd.unwrap_or_default());
    let mut check = std::process::Command::new(script);
    match check.arg("check").env("K8S_BIN", programs).env("CONTAINERD_BIN", containerd).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// Helm 3: from the tool cache, else the machine's own.
pub fn helm() -> Option<PathBuf> {
    let cached = tools().join("helm");
    if cached.is_file() {
        return Some(cached);
    }
    let found = program("helm")?;
    let output = std::process::Command::new(&found).args(["version", "--short"]).output().ok()?;
    output.stdout.starts_with(b"v3.").then_some(found)
}

/// kube-router: from the tool cache, else the machine's own.
pub fn kube_router() -> Option<PathBuf> {
    let cached = tools().join("kube-router");
    cached.is_file().then_some(cached).or_else(|| program("kube-router"))
}

/// A program of Prometheus: from the tool cache, else the machine's own.
pub fn prometheus(name: &str) -> Option<PathBuf> {
    let cached = tools().join("prometheus").join(name);
    cached.is_file().then_some(cached).or_else(|| program(name))
}

/// The program that speaks as the next version.
pub fn next_version() -> PathBuf {
    tools().join("peili-next")
}

/// The component of a policy.
pub fn policy(name: &str) -> PathBuf {
    target().join("plugins").join(name).with_extension("wasm")
}

/// The tool cache that `cargo xtask` fills: `target/tools`.
pub fn tools() -> PathBuf {
    target().join("tools")
}

/// The build folder: `CARGO_TARGET_DIR`, else `target` of the repository.
pub fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default();
    // Relative to where cargo was called, which for tests is a package's folder and so not known here.
    match std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from) {
        Some(path) if path.is_absolute() => path,
        Some(path) => root.join(path),
        None => root.join("target"),
    }
}

fn reason(missing: &[String]) -> Result<(), String> {
    match missing.split_last() {
        None => Ok(()),
        Some((last, [])) => Err(format!("needs {last}")),
        Some((last, others)) => Err(format!("needs {} and {last}", others.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_as_sentences() {
        let check = |missing: &[&str], text: &str| {
            assert_eq!(
                reason(&missing.iter().map(ToString::to_string).collect::<Vec<_>>()),
                Err(text.to_owned())
            );
        };
        check(&["root"], "needs root");
        check(&["root", "iproute2"], "needs root and iproute2");
        check(&["root", "iproute2", "nginx"], "needs root, iproute2 and nginx");
        assert_eq!(reason(&[]), Ok(()));
    }
}
