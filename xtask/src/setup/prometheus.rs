//! Prometheus and promtool: what alerts are tested by, and what scrapes a fleet. Unpacked, and not installed: nobody wants a service.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::archive::Archive;
use super::program;
use crate::target;

/// Any version will do.
const SUITE: &str = "bookworm";
const PROGRAMS: [&str; 2] = ["prometheus", "promtool"];

/// Gets both unless they are there. What fails is said, and is no error: their tests are skipped.
pub(super) fn install() {
    let folder = target().join("tools/prometheus");
    if folder.is_dir() || PROGRAMS.iter().all(|name| program(name).is_some()) {
        return;
    }
    println!("setup: Prometheus: the alerts are tested by its promtool, and it scrapes a fleet");
    if let Err(error) = get(&folder) {
        println!("setup: cannot get it: {error:#}; until then its tests are skipped");
    }
}

fn get(folder: &Path) -> Result<()> {
    let archive = Archive::open(SUITE, "deb")?;
    archive.download(&["prometheus"])?;
    let unpacked = target().join("tools/.prometheus");
    archive.unpack("prometheus", &unpacked)?;
    // At once and whole.
    let done = unpacked.join("done");
    fs::create_dir_all(&done)?;
    for name in PROGRAMS {
        fs::rename(unpacked.join("usr/bin").join(name), done.join(name))?;
    }
    fs::rename(&done, folder)?;
    fs::remove_dir_all(&unpacked)?;
    archive.close()
}
