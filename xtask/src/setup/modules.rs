//! Programs of Go that Debian has not: Helm, which renders the chart, and kube-router, which enforces NetworkPolicies in the cluster of the
//! tests.
//!
//! Each is built from its module by the machine's Go, or by that of a newer Debian, which is unpacked for the build and goes with it. Nothing
//! is installed and root is not needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::archive::Archive;
use super::{checked, program};
use crate::target;

/// A program and where it comes from.
pub(super) struct Module {
    /// As people say it, with what it is for.
    reason: &'static str,
    /// Its file.
    program: &'static str,
    /// With its version.
    module: &'static str,
    /// The package of the program, in its module.
    package: &'static str,
    /// A file of it, and what is said otherwise there.
    change: Option<(&'static str, &'static str, &'static str)>,
    /// By what a program of this name that the machine has is known as good; its arguments, and how it answers.
    version: Option<(&'static [&'static str], &'static str)>,
}

pub(super) const HELM: Module = Module {
    reason: "Helm 3: the chart is rendered, linted and compared with deploy/manifests",
    program: "helm",
    module: "helm.sh/helm/v3@v3.19.0",
    package: "./cmd/helm",
    change: None,
    version: Some((&["version", "--short"], "v3.")),
};

/// The network plugin of k3s and RKE2 has its policies. It waits for EndpointSlices of `v1`, which Kubernetes 1.20 has not and which it looks
/// at for Services alone, where it is not asked to do anything.
pub(super) const KUBE_ROUTER: Module = Module {
    reason: "kube-router 2.1: NetworkPolicies are enforced in the cluster of the integration tests",
    program: "kube-router",
    module: "github.com/cloudnativelabs/kube-router/v2@v2.1.0",
    package: "./cmd/kube-router",
    change: Some((
        "pkg/cmd/kube-router.go",
        "epSliceInformer := informerFactory.Discovery",
        "epSliceInformer := informers.NewSharedInformerFactory(kr.Client, 0).Discovery",
    )),
    version: None,
};

/// The least Go that compiles all of them, by their `go.mod`.
const GO: (u32, u32) = (1, 24);
/// The suite that has such a compiler, its packages, and its folder below `usr/lib`.
const SUITE: &str = "trixie";
const GO_PACKAGES: [&str; 2] = ["golang-1.24-go", "golang-1.24-src"];
const GO_FOLDER: &str = "go-1.24";

/// Gets those that are not there. What fails is said, and is no error: its tests are skipped.
pub(super) fn install(modules: &[Module]) {
    let missing: Vec<&Module> = modules.iter().filter(|module| module.is_missing()).collect();
    if missing.is_empty() {
        return;
    }
    for module in &missing {
        println!("setup: {}", module.reason);
    }
    println!("setup: built from their modules, which takes two or three minutes each on two cores");
    let folder = target().join("tools/.modules");
    if let Err(error) = get(&missing, &folder) {
        println!(
            "setup: no compiler for them: {error:#}; put the programs on the PATH, until then their tests are skipped"
        );
    }
    let _ = fs::remove_dir_all(&folder);
}

fn get(modules: &[&Module], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let go = match program("go").filter(|go| is_enough(go)) {
        Some(go) => go,
        None => unpack(folder)?,
    };
    for module in modules {
        let began = Instant::now();
        match module.build(&go, folder) {
            Ok(()) => println!("setup: {} is there after {} s", module.program, began.elapsed().as_secs()),
            Err(error) => println!(
                "setup: cannot get {}: {error:#}; put one on the PATH, until then its tests are skipped",
                module.program
            ),
        }
    }
    Ok(())
}

impl Module {
    fn is_missing(&self) -> bool {
        let is_good = |(arguments, begins): (&[&str], &str)| {
            let output = Command::new(self.program).args(arguments).output();
            output.is_ok_and(|output| output.stdout.starts_with(begins.as_bytes()))
        };
        !target().join("tools").join(self.program).is_file() && !self.version.is_some_and(is_good)
    }

    fn build(&self, go: &Path, folder: &Path) -> Result<()> {
        // What they share is downloaded and compiled once.
        let command = |arguments: &[&str], at: &Path| {
            let mut command = Command::new(go);
            command.args(arguments).current_dir(at).env("GOPATH", folder.join("path"));
            command.env("GOCACHE", folder.join("cache")).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local");
            command.env("GOFLAGS", "-modcacherw").env_remove("GOMODCACHE");
            command
        };
        checked(&mut command(&["mod", "download", self.module], folder))?;
        let source = folder.join("path/pkg/mod").join(self.module);
        ensure!(source.is_dir(), "the module is not at {}", source.display());
        if let Some((file, from, to)) = self.change {
            let path = source.join(file);
            let text = fs::read_to_string(&path)?;
            ensure!(text.contains(from), "{file} is not what was changed before");
            fs::write(&path, text.replace(from, to))?;
        }
        let built = folder.join(self.program);
        let output = built.to_str().context("the folder is not named by text")?;
        checked(&mut command(
            &["build", "-trimpath", "-ldflags=-s -w", "-o", output, self.package],
            &source,
        ))?;
        Ok(fs::rename(&built, target().join("tools").join(self.program))?)
    }
}

/// "go version go1.24.4 linux/amd64"
fn is_enough(go: &Path) -> bool {
    let Ok(output) = Command::new(go).arg("version").output() else { return false };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().nth(2).and_then(|version| version.strip_prefix("go"));
    let mut parts = version.unwrap_or_default().split('.').map_while(|part| part.parse().ok());
    matches!((parts.next(), parts.next()), (Some(major), Some(minor)) if (major, minor) >= GO)
}

fn unpack(folder: &Path) -> Result<PathBuf> {
    let archive = Archive::open(SUITE, "deb")?;
    archive.download(&GO_PACKAGES)?;
    let packages = folder.join("packages");
    for package in GO_PACKAGES {
        archive.unpack(package, &packages)?;
    }
    archive.close().context("cannot remove what was downloaded")?;
    let go = packages.join("usr/lib").join(GO_FOLDER).join("bin/go");
    ensure!(go.is_file(), "the package has no {}", go.display());
    Ok(go)
}
