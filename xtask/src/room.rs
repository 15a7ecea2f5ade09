//! The room on the disks that a run writes to, looked at while it lasts: on a full disk things fail in many ways, and few of them say so.
//!
//! It ends nothing and frees nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::target;

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(5);
/// GiB that a run from nothing takes at its height: 5.7 for the build folder, and what containerds hold (measured: 8.9; the last lines of
/// a run say how much was left). Builds that are kept for later ones take more.
const NEEDED: f64 = 10.0;
/// KiB; with less, what failed may have failed for it.
const FULL: u64 = 512 << 10;

/// The least room that there was since the start.
pub(crate) struct Room(Arc<AtomicU64>);

impl Room {
    /// Says how much there is, and begins to look.
    pub(crate) fn watch() -> Self {
        let lowest = Arc::new(AtomicU64::new(u64::MAX));
        let places = [target(), std::env::temp_dir()];
        let look = move |lowest: &AtomicU64| {
            for free in places.iter().filter_map(|place| free(place)) {
                lowest.fetch_min(free, Ordering::Relaxed);
            }
        };
        look(&lowest);
        let room = Self(Arc::clone(&lowest));
        if let Some(free) = room.lowest() {
            println!("disk: {:.1} GiB are free; a run from nothing takes {NEEDED:.0}", gib(free));
        }
        thread::spawn(move || {
            loop {
                #[expect(clippy::disallowed_methods, reason = "there is no executor here")]
                thread::sleep(EVERY);
                look(&lowest);
            }
        });
        room
    }

    /// Says how much there was when there was least.
    pub(crate) fn report(&self) {
        let Some(lowest) = self.lowest() else { return };
        println!("disk: {:.1} GiB were free when there was least room", gib(lowest));
        if lowest < FULL {
            println!("disk: it was full; what failed may have failed for that: make room, and run it again");
        }
    }

    fn lowest(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|free| *free < u64::MAX)
    }
}

fn gib(kib: u64) -> f64 {
    kib as f64 / f64::from(1 << 20)
}

/// KiB that may be written at a place, or where it will be.
fn free(place: &Path) -> Option<u64> {
    let there: PathBuf = place.ancestors().find(|path| path.exists())?.to_owned();
    let output = Command::new("df").arg("-Pk").arg(there).output().ok()?;
    available(&String::from_utf8_lossy(&output.stdout))
}

/// The fourth column of the last line (POSIX, df -P).
fn available(table: &str) -> Option<u64> {
    table.lines().last()?.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read() {
        let table = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda 263174212 71093364 24117248 75% /\n";
        assert_eq!(available(table), Some(24_117_248));
        assert_eq!((available(""), available("Filesystem 1024-blocks\n")), (None, None));
    }

    #[test]
    fn this_machine_has_some_where_nothing_is_yet() {
        assert!(free(&std::env::temp_dir().join("peili-not-there/a")).is_some());
        assert!(Room::watch().lowest().is_some());
    }
}
