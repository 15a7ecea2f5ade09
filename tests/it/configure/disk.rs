//! A program that is killed, a disk that is full, a folder that is read-only.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use peili_lab::{Requirement, wait};

use super::{Host, snapshot};
use crate::Case;

/// Longest until the kernel knows of room that was made.
const ROOM: Duration = Duration::from_secs(5);

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("configure::killed", &[], killed),
        Case::new("configure::full_disk", &[Requirement::Root], full_disk),
        Case::new("configure::read_only", &[Requirement::Root], read_only),
    ]
}

/// SIGKILL at any moment of either command, again and again on the same files: in the end all is as it was.
async fn killed() {
    let host = Host::new();
    let before = snapshot(&host.root());
    let started = Instant::now();
    host.ends(&["configure", "_default", "a.io", "b.io", "c.io"], 0);
    let whole = started.elapsed();
    let after = snapshot(&host.root());
    host.ends(&["cleanup"], 0);
    let (mut interrupted, rounds) = (0, 60);
    for round in 0..rounds {
        // The first third of its time is the loader's.
        let delay = whole.mul_f64(0.2 + 0.9 * f64::from(round / 2) / f64::from(rounds / 2));
        let arguments: &[&str] =
            if round % 2 == 0 { &["configure", "_default", "a.io", "b.io", "c.io"] } else { &["cleanup"] };
        let mut command = host.command(arguments);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(delay).await;
        child.kill().unwrap();
        interrupted += usize::from(!child.wait().unwrap().success());
        if round % 10 == 4 {
            host.ends(&["configure", "_default", "a.io", "b.io", "c.io"], 0);
            assert_eq!(snapshot(&host.root()), after, "round {round}");
        }
        if round % 10 == 9 {
            host.ends(&["cleanup"], 0);
            assert_eq!(snapshot(&host.root()), before, "round {round}");
        }
    }
    println!("killed {interrupted} of {rounds}");
    assert!(interrupted > 10, "{interrupted} of {rounds} were killed while they ran");
}

/// A file system of 64 KiB, as a host's or as a data folder's, full: nothing changes, it says why, and goes on later.
async fn full_disk() {
    for is_host in [true, false] {
        let host = Host::new();
        std::fs::create_dir_all(host.data()).unwrap();
        let folder = if is_host { host.root() } else { host.data() };
        let mounted = Mounted::new(&folder, "size=64k");
        if is_host {
            host.fill();
        }
        let before = snapshot(&host.root());
        let filler = folder.join("filler");
        let fill = |size: usize| std::fs::write(&filler, vec![0; size]);
        let full = (1..=64).rev().find(|kib| fill(kib << 10).is_ok()).unwrap();
        // From full to empty by pages: at each size something else fails.
        let mut failed = 0;
        for kib in (0..=full).rev().step_by(4) {
            std::fs::remove_file(&filler).unwrap();
            // The kernel counts the room by processor, and what was removed is there a moment later.
            wait::until("room for the filler", ROOM, async || fill(kib << 10).ok()).await.unwrap();
            let output = host.run(&["configure", "_default", "a.io", "b.io", "c.io"]);
            let text = String::from_utf8(output.stderr).unwrap();
            if output.status.code() == Some(0) {
                break;
            }
            failed += 1;
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains("hint: free some space"), "{text}");
        }
        assert!(failed > 0, "it was full");
        std::fs::remove_file(&filler).unwrap();
        host.ends(&["configure", "_default", "a.io", "b.io", "c.io"], 0);
        host.ends(&["configure", "--check"], 0);
        let _ = fill(full << 10);
        let _ = host.run(&["cleanup"]);
        std::fs::remove_file(&filler).unwrap();
        host.ends(&["cleanup"], 0);
        let mut expected = before;
        expected.retain(|(path, _)| *path != filler);
        assert_eq!(snapshot(&host.root()), expected);
        drop(mounted);
    }
}

async fn read_only() {
    let host = Host::new();
    let mounted = Mounted::new(&host.root(), "size=256k");
    host.fill();
    let before = snapshot(&host.root());
    mounted.remount("ro");
    let text = host.ends(&["configure", "a.io", "c.io"], 1);
    assert!(text.contains("cannot write") && text.contains("hint: the distribution may write"), "{text}");
    assert_eq!(snapshot(&host.root()), before);
    host.ends(&["configure", "--check", "a.io"], 3);
    mounted.remount("rw");
    host.ends(&["configure", "a.io", "c.io"], 0);
    mounted.remount("ro");
    host.ends(&["configure", "--check"], 0);
    host.ends(&["configure"], 0);
    host.ends(&["cleanup"], 1);
    mounted.remount("rw");
    host.ends(&["cleanup"], 0);
    assert_eq!(snapshot(&host.root()), before);
}

/// A file system in memory; dropped: gone. The scratch folder would unmount it too.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(folder: &std::path::Path, options: &str) -> Self {
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder).status().unwrap();
        assert!(done.success());
        Self(folder.to_owned())
    }

    fn remount(&self, options: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let options = format!("remount,{options}");
        while !Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success() {
            assert!(Instant::now() < deadline, "busy");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
