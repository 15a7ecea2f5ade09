//! A whole Kubernetes, for the tests that need a real API server or a real cluster (`lab/cluster`).
//!
//! For the API server alone, a folder with it and its etcd that `KUBEBUILDER_ASSETS` names is used first (the convention of
//! envtest). On Debian all comes from its archive: etcd, the registry, runc and the network plugins as packages, the programs
//! of Kubernetes by a build of their source, which vendors all that it needs. Nothing is installed and root is not needed: the
//! Go compiler is unpacked for the build and goes with it. Only these programs are built, at once, so that what they share is
//! compiled once, and without make, which would ask git, look at all of the source and generate for all programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::archive::Archive;
use super::checked;
use crate::target;

/// A folder with both programs, given by whoever runs the tests.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// What Debian's source package is, and the suite that has it: the last one with all of it vendored.
const VERSION: &str = "1.20.2";
const SUITE: &str = "bookworm";
/// The compiler of that suite: its folder below `usr/lib`, and its packages.
const GO: &str = "go-1.19";
const GO_PACKAGES: [&str; 2] = ["golang-1.19-go", "golang-1.19-src"];
/// Replaces the version that is vendored, which Go 1.18 and later break: iterating over a map, which encoding JSON does, would
/// write through a wild pointer.
const REFLECT: &str = "golang-github-modern-go-reflect2-dev";
/// What is built, and what a cluster needs beside it: the package, where it has the program, and where that goes.
const PROGRAMS: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];
const PACKAGED: [(&str, &str, &str); 7] = [
    ("etcd-server", "usr/bin/etcd", "etcd"),
    ("docker-registry", "usr/bin/docker-registry", "docker-registry"),
    ("runc", "usr/sbin/runc", "runc"),
    ("containernetworking-plugins", "usr/lib/cni/bridge", "cni/bridge"),
    ("containernetworking-plugins", "usr/lib/cni/host-local", "cni/host-local"),
    ("containernetworking-plugins", "usr/lib/cni/loopback", "cni/loopback"),
    ("containernetworking-plugins", "usr/lib/cni/portmap", "cni/portmap"),
];
/// Where the types are that the server describes to its clients, below `vendor`: the description is not in the source.
const DESCRIBED: [&str; 4] = [
    "k8s.io/api",
    "k8s.io/apimachinery/pkg",
    "k8s.io/apiextensions-apiserver/pkg",
    "k8s.io/kube-aggregator/pkg",
];

/// Gets all unless it is there. What fails is said, and is no error: the tests that need it are skipped.
pub(super) fn install() {
    let folder = target().join("tools").join(format!("kubernetes-{VERSION}"));
    if is_whole(&folder) {
        return;
    }
    println!(
        "setup: Kubernetes {VERSION}: integration tests elect leaders by a real API server, and run on a cluster"
    );
    println!(
        "setup: it is built from Debian's source, which takes four to eleven minutes on two cores, and 2 GiB meanwhile"
    );
    let began = Instant::now();
    match get(&folder) {
        Ok(()) => println!("setup: it is there after {} s", began.elapsed().as_secs()),
        Err(error) => {
            println!("setup: cannot get it: {error:#}");
            println!("setup: until then tests that need a cluster are skipped");
            if std::env::var_os(ASSETS).is_none() {
                println!(
                    "setup: name a folder that has kube-apiserver and etcd by {ASSETS} for those that need these two"
                );
            }
        }
    }
}

/// Whether all programs are there: what an older version of this left has two of them.
fn is_whole(folder: &Path) -> bool {
    PROGRAMS.into_iter().chain(PACKAGED.map(|(_, _, name)| name)).all(|name| folder.join(name).is_file())
}

fn get(folder: &Path) -> Result<()> {
    let mut packages: Vec<&str> = PACKAGED.iter().map(|(package, ..)| *package).collect();
    packages.dedup();
    packages.extend(GO_PACKAGES);
    packages.push(REFLECT);
    let archive = Archive::open(SUITE, "deb deb-src")?;
    archive.download(&packages)?;
    let source = archive.source("kubernetes")?;
    // What an earlier try compiled in it is used.
    let build = Build { folder: target().join("tools/.kubernetes") };
    for package in packages {
        archive.unpack(package, &build.packages())?;
    }
    fs::create_dir_all(build.source())?;
    let mut tar = Command::new("tar");
    checked(tar.arg("-xf").arg(source).arg("--strip-components=1").arg("-C").arg(build.source()))?;
    build.replace_reflect()?;
    build.describe()?;
    build.compile()?;
    for (package, from, to) in PACKAGED {
        let to = build.done().join(to);
        fs::create_dir_all(to.parent().context("it is in a folder")?)?;
        fs::rename(build.packages().join(from), to).with_context(|| format!("{package} has no {from}"))?;
    }
    // As a whole, in the place of what an older version left, which may run: its files live on as long as that does.
    let old = build.folder.join("old");
    if folder.exists() {
        // Of a try that was ended.
        let _ = fs::remove_dir_all(&old);
        fs::rename(folder, old)?;
    }
    fs::rename(build.done(), folder)?;
    fs::remove_dir_all(&build.folder)?;
    archive.close()
}

/// A build in a folder of its own.
struct Build {
    folder: PathBuf,
}

impl Build {
    fn packages(&self) -> PathBuf {
        self.folder.join("packages")
    }

    /// Where Go looks for it, before there were modules.
    fn source(&self) -> PathBuf {
        self.folder.join("path/src/k8s.io/kubernetes")
    }

    fn done(&self) -> PathBuf {
        self.folder.join("done")
    }

    /// The compiler, which knows nothing of the machine's own.
    fn go(&self, arguments: &[&str]) -> Command {
        let root = self.packages().join("usr/lib").join(GO);
        let mut go = Command::new(root.join("bin/go"));
        go.args(arguments).current_dir(self.source());
        for variable in ["GOOS", "GOARCH", "GOAMD64", "GOFLAGS", "GOEXPERIMENT", "GOTMPDIR"] {
            go.env_remove(variable);
        }
        go.env("GOROOT", root)
            .env("GOPATH", self.folder.join("path"))
            .env("GOCACHE", self.folder.join("cache"));
        go.env("GO111MODULE", "off").env("GOENV", "off").env("CGO_ENABLED", "0");
        // The compiler collects its garbage less often: it lives for seconds.
        go.env("GOGC", "400");
        go
    }

    /// Builds programs into a folder, with further flags of the linker.
    fn build(&self, folder: &Path, packages: &[&str], flags: &str) -> Result<()> {
        // Without the drivers of clouds, which are a third of it.
        let mut go = self.go(&["build", "-tags", "providerless", "-o"]);
        // With its end it is a folder for sure.
        fs::create_dir_all(folder)?;
        go.arg(folder.join(""));
        // No debugger will look at it. The standard library is left as it was packaged: compiled.
        for pattern in ["k8s.io/kubernetes/...", "k8s.io/kubernetes/vendor/..."] {
            go.arg(format!("-gcflags={pattern}=-dwarf=false"));
        }
        checked(go.arg(format!("-ldflags=-s -w{flags}")).args(packages))
    }

    fn replace_reflect(&self) -> Result<()> {
        let name = "github.com/modern-go/reflect2";
        let (vendored, packaged) = (
            self.source().join("vendor").join(name),
            self.packages().join("usr/share/gocode/src").join(name),
        );
        // The files in assembler stay: they are empty, and without any the compiler takes no function without a body.
        for file in go_files(&vendored)? {
            fs::remove_file(file)?;
        }
        for file in go_files(&packaged)? {
            fs::copy(&file, vendored.join(file.file_name().context("a file has a name")?))?;
        }
        Ok(())
    }

    /// Generates the description of the types, which the server needs to merge what several clients apply.
    fn describe(&self) -> Result<()> {
        let generator = self.folder.join("generators/openapi-gen");
        self.build(&self.folder.join("generators"), &["./vendor/k8s.io/kube-openapi/cmd/openapi-gen"], "")?;
        let vendor = self.source().join("vendor");
        let mut marked = Vec::new();
        for name in DESCRIBED {
            find_marked(&vendor.join(name), &mut marked)?;
        }
        let packages: Vec<String> = marked
            .iter()
            .filter_map(|folder| folder.strip_prefix(&vendor).ok())
            .map(|name| format!("k8s.io/kubernetes/vendor/{}", name.display()))
            .collect();
        ensure!(!packages.is_empty(), "no types are marked to be described");
        // It asks `go` where packages are.
        let go = self.go(&[]);
        let mut command = Command::new(&generator);
        for (name, value) in go.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut path = vec![self.packages().join("usr/lib").join(GO).join("bin")];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        command.env("PATH", std::env::join_paths(path)?).current_dir(self.source());
        command.args(["--input-dirs", &packages.join(",")]);
        command.args(["--output-package", "k8s.io/kubernetes/pkg/generated/openapi"]);
        command.args(["--output-file-base", "zz_generated.openapi"]);
        command.args(["--go-header-file", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt"]);
        command.arg("--report-filename").arg(self.folder.join("report"));
        command.arg("--output-base").arg(self.folder.join("path/src"));
        checked(&mut command)
    }

    fn compile(&self) -> Result<()> {
        let (major, minor) = ("1", VERSION.split('.').nth(1).unwrap_or_default());
        let version = format!("v{VERSION}");
        let stamped = [("gitVersion", version.as_str()), ("gitMajor", major), ("gitMinor", minor)];
        let mut flags = String::new();
        for package in ["k8s.io/client-go/pkg/version", "k8s.io/component-base/version"] {
            for (name, value) in stamped {
                flags.push_str(&format!(" -X k8s.io/kubernetes/vendor/{package}.{name}={value}"));
            }
        }
        let packages = PROGRAMS.map(|name| format!("./cmd/{name}"));
        self.build(&self.done(), &packages.each_ref().map(String::as_str), &flags)?;
        let output = Command::new(self.done().join("kube-apiserver")).arg("--version").output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said.trim() == format!("Kubernetes {version}"), "what was built says `{}`", said.trim());
        Ok(())
    }
}

fn go_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
    let paths = files.flatten().map(|file| file.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|extension| extension == "go")).collect())
}

/// Adds the folders, at or below `folder`, whose types are marked to be described.
fn find_marked(folder: &Path, marked: &mut Vec<PathBuf>) -> Result<()> {
    let mut is_marked = false;
    for file in go_files(folder)? {
        is_marked |=
            fs::read_to_string(file)?.lines().any(|line| line.starts_with("// +k8s:openapi-gen=true"));
    }
    if is_marked {
        marked.push(folder.to_owned());
    }
    let mut folders: Vec<PathBuf> =
        fs::read_dir(folder)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders.iter().try_for_each(|folder| find_marked(folder, marked))
}
