//! A process that ends, or a disk that refuses, at each step: the next run finishes or undoes what is half done, and
//! containerd never sees anything but the old hosts or the new ones.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use super::*;

/// A disk that fails at the step of this number. `dead`: and at all after it, as in a process that was killed.
fn failing(at: usize, dead: bool, kind: io::ErrorKind) -> (Disk, Rc<Cell<usize>>) {
    let steps = Rc::new(Cell::new(0));
    let count = Rc::clone(&steps);
    let fault = move |_: &'static str| {
        let step = count.get();
        count.set(step + 1);
        if step == at || dead && step > at { Err(kind.into()) } else { Ok(()) }
    };
    (Disk { fault: Some(Box::new(fault)) }, steps)
}

const TARGETS: [&str; 4] = ["_default", "a.io", "b.io", "new.io"];

fn host() -> Host {
    // A folder of its own without a hosts.toml would hide the default's mirror from `new.io`.
    Host::new(&[
        (
            "etc/containerd/config.toml",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n",
        ),
        (
            "etc/containerd/certs.d/a.io/hosts.toml",
            "# a\nserver = \"https://a.test\"\n[host.\"https://m.test\"]\n",
        ),
        ("etc/containerd/certs.d/_default/hosts.toml", "[host.\"https://d.test\"]\n"),
        ("etc/containerd/certs.d/b.io/ca.crt", ""),
        ("etc/containerd/certs.d/b.io/client.cert", ""),
    ])
}

/// Each registry is asked as before or as after, and nothing between.
fn is_old_or_new(host: &Host, old: &[Vec<hosts::Host>], new: &[Vec<hosts::Host>]) {
    for (index, target) in TARGETS.iter().enumerate() {
        let now = host.asked(target);
        assert!(now == old[index] || now == new[index], "{target}: {now:#?}");
    }
}

fn asked(host: &Host) -> Vec<Vec<hosts::Host>> {
    TARGETS.iter().map(|target| host.asked(target)).collect()
}

#[test]
fn configure_ends_at_each_step() {
    let dies = (true, io::ErrorKind::Other);
    let refuses = (false, io::ErrorKind::StorageFull);
    for (mode, (dead, kind)) in [(Mode::First, dies), (Mode::First, refuses), (Mode::Only, dies)] {
        let mut at = 0;
        loop {
            let host = host();
            let options = Options { mode: Some(mode), ..host.options(&TARGETS) };
            let (before, old) = (host.snapshot(), asked(&host));
            let (disk, steps) = failing(at, dead, kind);
            let result = apply::configure(&options, &disk);
            let half = host.snapshot();
            let new = {
                configure(&options).unwrap();
                asked(&host)
            };
            let (after, reached) = (host.snapshot(), steps.get() > at);
            assert_eq!(result.is_err(), reached, "step {at}: {result:?}");
            host.cleanup();
            assert_eq!(host.snapshot(), before, "step {at}: repaired and cleaned up");
            assert!(!after.keys().any(|path| path.to_string_lossy().contains(".peili-")), "{after:#?}");

            // The same again, cleaned up at once.
            let (disk, _) = failing(at, dead, kind);
            let again = apply::configure(&options, &disk);
            assert_eq!(again.is_err(), reached);
            assert_eq!(host.snapshot(), half);
            is_old_or_new(&host, &old, &new);
            host.cleanup();
            assert_eq!(host.snapshot(), before, "step {at}: cleaned up");
            if !reached {
                assert!(at > 20, "there are steps: {at}");
                break;
            }
            at += 1;
        }
    }
}

#[test]
fn cleanup_ends_at_each_step() {
    for dead in [true, false] {
        let mut at = 0;
        loop {
            let host = host();
            let (before, old) = (host.snapshot(), asked(&host));
            host.configure(&TARGETS);
            let (after, new) = (host.snapshot(), asked(&host));
            let (disk, steps) = failing(at, dead, io::ErrorKind::StorageFull);
            let result = apply::cleanup(&host.options(&[]), false, &disk);
            let reached = steps.get() > at;
            assert_eq!(result.is_err(), reached, "step {at}: {result:?}");
            is_old_or_new(&host, &old, &new);
            // Either way from here.
            host.configure(&TARGETS);
            assert_eq!(host.snapshot(), after, "step {at}: configured");
            let (disk, _) = failing(at, dead, io::ErrorKind::StorageFull);
            let _ = apply::cleanup(&host.options(&[]), false, &disk);
            host.cleanup();
            assert_eq!(host.snapshot(), before, "step {at}: cleaned up");
            if !reached {
                assert!(at > 10, "there are steps: {at}");
                break;
            }
            at += 1;
        }
    }
}

/// A change from one address to another: what is on record is always what may be there.
#[test]
fn a_second_configure_ends_at_each_step() {
    let mut at = 0;
    loop {
        let host = host();
        let before = host.snapshot();
        host.configure(&TARGETS);
        let moved = Options { mirror: "http://127.0.0.1:5555".parse().unwrap(), ..host.options(&TARGETS) };
        let (disk, steps) = failing(at, true, io::ErrorKind::Other);
        let result = apply::configure(&moved, &disk);
        assert_eq!(result.is_err(), steps.get() > at);
        host.cleanup();
        assert_eq!(host.snapshot(), before, "step {at}");
        if steps.get() <= at {
            break;
        }
        at += 1;
    }
}

/// A record is on the disk before its file is touched, and forgotten only after that is as it was.
#[test]
fn records_come_first_and_go_last() {
    for at in 0.. {
        let host = host();
        let before = host.snapshot();
        let (disk, steps) = failing(at, true, io::ErrorKind::Other);
        let _ = apply::configure(&host.options(&TARGETS), &disk);
        let journal_disk = Disk::default();
        let records = journal::Journal::new(host.options(&[]).state, &journal_disk).all().unwrap();
        let changed = host.snapshot();
        for path in changed
            .keys()
            .filter(|path| path.ends_with("hosts.toml") && changed.get(*path) != before.get(*path))
        {
            let on_host = Path::new("/").join(path.strip_prefix(host.root.path()).unwrap());
            let is_temporary =
                on_host.components().any(|part| part.as_os_str().to_string_lossy().starts_with(".peili-"));
            assert!(
                is_temporary || records.iter().any(|record| record.path == on_host),
                "step {at}: {path:?}"
            );
        }
        if steps.get() <= at {
            break;
        }
    }
}
