//! Helm, which renders the chart.
//!
//! Debian has none. It is built from its module by the machine's Go, or by that of a newer Debian, which is unpacked for the
//! build and goes with it. Nothing is installed and root is not needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::archive::Archive;
use super::{checked, program};
use crate::target;

const MODULE: &str = "helm.sh/helm/v3/cmd/helm@v3.19.0";
/// The least that compiles it, by its `go.mod`.
const GO: (u32, u32) = (1, 24);
/// The suite that has such a compiler, its packages, and its folder below `usr/lib`.
const SUITE: &str = "trixie";
const GO_PACKAGES: [&str; 2] = ["golang-1.24-go", "golang-1.24-src"];
const GO_FOLDER: &str = "go-1.24";

/// Gets it unless it is there. What fails is said, and is no error: its tests are skipped.
pub(super) fn install() {
    let helm = target().join("tools/helm");
    if helm.is_file() || is_installed() {
        return;
    }
    println!("setup: Helm 3: the chart is rendered, linted and compared with deploy/manifests");
    println!("setup: it is built from its module, which takes two minutes on two cores");
    let began = Instant::now();
    match get(&helm) {
        Ok(()) => println!("setup: it is there after {} s", began.elapsed().as_secs()),
        Err(error) => println!(
            "setup: cannot get it: {error:#}; put a `helm` on the PATH, until then its tests are skipped"
        ),
    }
}

fn is_installed() -> bool {
    let version = Command::new("helm").args(["version", "--short"]).output();
    version.is_ok_and(|output| output.stdout.starts_with(b"v3."))
}

fn get(helm: &Path) -> Result<()> {
    let folder = target().join("tools/.helm");
    fs::create_dir_all(&folder)?;
    let go = match program("go").filter(|go| is_enough(go)) {
        Some(go) => go,
        None => unpack(&folder)?,
    };
    let mut build = Command::new(go);
    build.args(["install", "-modcacherw", "-trimpath", "-ldflags=-s -w", MODULE]).current_dir(&folder);
    build.env("GOBIN", folder.join("bin")).env("GOPATH", folder.join("path"));
    build.env("GOCACHE", folder.join("cache")).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local");
    checked(build.env_remove("GOFLAGS").env_remove("GOMODCACHE"))?;
    fs::rename(folder.join("bin/helm"), helm)?;
    Ok(fs::remove_dir_all(&folder)?)
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
