//! The Kubernetes API server and its etcd, for the tests that need real ones.
//!
//! A folder with both that `KUBEBUILDER_ASSETS` names is used as it is (the convention of envtest). Else, on Debian, both come
//! from its archive: etcd as a package, kube-apiserver by a build of its source, which vendors all that it needs. Nothing is
//! installed and root is not needed: the Go compiler is unpacked for the build and goes with it. Only this one program is
//! built, and without make, which would ask git, look at all of the source and generate for all programs.

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
/// Where the types are that the server describes to its clients, below `vendor`: the description is not in the source.
const DESCRIBED: [&str; 4] = [
    "k8s.io/api",
    "k8s.io/apimachinery/pkg",
    "k8s.io/apiextensions-apiserver/pkg",
    "k8s.io/kube-aggregator/pkg",
];

/// Gets both unless they are there. What fails is said, and is no error: their tests are skipped.
pub(super) fn install() {
    let folder = target().join("tools").join(format!("kubernetes-{VERSION}"));
    if std::env::var_os(ASSETS).is_some() || folder.is_dir() {
        return;
    }
    println!(
        "setup: kube-apiserver {VERSION} and etcd: integration tests elect leaders by a real API server"
    );
    println!("setup: it is built from Debian's source, which takes two to four minutes on two cores");
    let began = Instant::now();
    match get(&folder) {
        Ok(()) => println!("setup: it is there after {} s", began.elapsed().as_secs()),
        Err(error) => {
            println!("setup: cannot get them: {error:#}");
            println!("setup: name a folder that has both by {ASSETS}; until then their tests are skipped");
        }
    }
}

fn get(folder: &Path) -> Result<()> {
    let archive = Archive::open(SUITE, "deb deb-src")?;
    archive.download(&[&GO_PACKAGES[..], &[REFLECT, "etcd-server"]].concat())?;
    let source = archive.source("kubernetes")?;
    // What an earlier try compiled in it is used.
    let build = Build { folder: target().join("tools/.kubernetes") };
    for package in GO_PACKAGES.into_iter().chain([REFLECT, "etcd-server"]) {
        archive.unpack(package, &build.packages())?;
    }
    fs::create_dir_all(build.source())?;
    let mut tar = Command::new("tar");
    checked(tar.arg("-xf").arg(source).arg("--strip-components=1").arg("-C").arg(build.source()))?;
    build.replace_reflect()?;
    build.describe()?;
    build.compile()?;
    // At once and whole: that the folder is there says that both are.
    let done = build.folder.join("done");
    fs::create_dir_all(&done)?;
    fs::rename(build.server(), done.join("kube-apiserver"))?;
    fs::rename(build.packages().join("usr/bin/etcd"), done.join("etcd"))?;
    fs::rename(&done, folder)?;
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

    fn server(&self) -> PathBuf {
        self.folder.join("kube-apiserver")
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

    /// Builds one program, with further flags of the linker.
    fn build(&self, program: &Path, package: &str, flags: &str) -> Result<()> {
        // Without the drivers of clouds, which are a third of it.
        let mut go = self.go(&["build", "-tags", "providerless", "-o"]);
        go.arg(program);
        // No debugger will look at it. The standard library is left as it was packaged: compiled.
        for packages in ["k8s.io/kubernetes/...", "k8s.io/kubernetes/vendor/..."] {
            go.arg(format!("-gcflags={packages}=-dwarf=false"));
        }
        checked(go.arg(format!("-ldflags=-s -w{flags}")).arg(package))
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
        let generator = self.folder.join("openapi-gen");
        self.build(&generator, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen", "")?;
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
        self.build(&self.server(), "./cmd/kube-apiserver", &flags)?;
        let output = Command::new(self.server()).arg("--version").output()?;
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
