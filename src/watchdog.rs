//! Ends the process when a part of it that must always move has stopped moving, so that whoever runs it starts it
//! again: a runtime that hangs holds up every pull of the node, which is worse than none.
//!
//! It runs on a thread of its own, beside the executor. What it watches are counters ([`Heart`]) that tasks raise every
//! [`BEAT`]; it looks at them every [`TICK`] and counts *its own looks* that saw no change. It never compares times of
//! day or of the system: a process that was stopped (SIGSTOP), suspended or whose clock jumps finds its counters and
//! its count where they were. It knows nothing about what the hearts belong to.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

/// Exit code of a process that the watchdog ends: `EX_SOFTWARE` of sysexits.h.
pub const EXIT_CODE: i32 = 70;

/// How often a task raises its heart.
pub const BEAT: Duration = Duration::from_millis(500);

/// How often the watchdog looks.
pub const TICK: Duration = Duration::from_millis(500);

/// Looks without a change after which the process is ended: with [`TICK`], the 5 s of the promise that Peili's own
/// hang is bounded.
pub const MISSES: u32 = 10;

/// How long the last line may take to be written. A full pipe at standard error may be why everything hangs.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Watches hearts until it is dropped.
pub struct Watchdog {
    hearts: Arc<Hearts>,
    /// Dropping it ends the thread.
    _stop: mpsc::Sender<()>,
}

/// One thing that must keep moving. Dropping it takes it out of the watch, but for a drop by a panic: what died that
/// way has stopped without meaning to.
#[derive(Debug)]
pub struct Heart {
    pulse: Arc<Pulse>,
}

/// A heart that stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// Name of the heart.
    pub name: &'static str,
    /// How long it stood still, in the watchdog's own ticks.
    pub lasted: Duration,
}

#[derive(Debug)]
struct Pulse {
    name: &'static str,
    beats: AtomicU64,
    retired: AtomicBool,
}

#[derive(Default)]
struct Hearts {
    watched: Mutex<Vec<Watched>>,
}

struct Watched {
    pulse: Arc<Pulse>,
    seen: u64,
    misses: u32,
}

impl Watchdog {
    /// Watches and, when a heart misses [`MISSES`] ticks, writes one line to standard error and exits with
    /// [`EXIT_CODE`].
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start() -> std::io::Result<Self> {
        Self::with(TICK, end_process)
    }

    /// Watches with another tick, and calls `end` once instead of ending the process.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn with(tick: Duration, end: impl FnOnce(Missed) + Send + 'static) -> std::io::Result<Self> {
        let hearts = Arc::new(Hearts::default());
        let (stop, stopped) = mpsc::channel::<()>();
        let watched = Arc::clone(&hearts);
        thread::Builder::new().name("watchdog".into()).spawn(move || {
            while stopped.recv_timeout(tick) == Err(mpsc::RecvTimeoutError::Timeout) {
                if let Some(missed) = watched.tick(tick) {
                    return end(missed);
                }
            }
        })?;
        Ok(Self { hearts, _stop: stop })
    }

    /// A heart to be watched from now on. `name` says in the last line what hangs.
    pub fn heart(&self, name: &'static str) -> Heart {
        self.hearts.add(name)
    }

    /// Watches the executor that `runtime` belongs to: a task that beats as long as any worker runs tasks. It is watched until
    /// the returned handle is dropped.
    pub fn watch_executor(&self, runtime: &tokio::runtime::Handle) -> AbortOnDropHandle<()> {
        let heart = self.heart("executor");
        AbortOnDropHandle::new(runtime.spawn(async move {
            let mut interval = tokio::time::interval(BEAT);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                heart.beat();
            }
        }))
    }
}

impl Heart {
    /// A heart that nobody watches, for tests and programs without a watchdog.
    pub fn unwatched() -> Self {
        Self { pulse: Arc::new(Pulse::new("unwatched")) }
    }

    /// Says that it still moves.
    pub fn beat(&self) {
        self.pulse.beats.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.pulse.retired.store(true, Ordering::Relaxed);
        }
    }
}

impl Pulse {
    fn new(name: &'static str) -> Self {
        Self { name, beats: AtomicU64::new(0), retired: AtomicBool::new(false) }
    }
}

impl Hearts {
    fn add(&self, name: &'static str) -> Heart {
        let pulse = Arc::new(Pulse::new(name));
        let watched = Watched { pulse: Arc::clone(&pulse), seen: 0, misses: 0 };
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
        Heart { pulse }
    }

    /// One look: the first heart that has now missed [`MISSES`] of them.
    fn tick(&self, tick: Duration) -> Option<Missed> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.retain(|heart| !heart.pulse.retired.load(Ordering::Relaxed));
        for heart in watched.iter_mut() {
            let beats = heart.pulse.beats.load(Ordering::Relaxed);
            heart.misses = if beats == heart.seen { heart.misses + 1 } else { 0 };
            heart.seen = beats;
            if heart.misses >= MISSES {
                return Some(Missed { name: heart.pulse.name, lasted: tick * heart.misses });
            }
        }
        None
    }
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "peili: watchdog: `{}` has not moved for {:.1} s; exiting with code {EXIT_CODE} to be started again",
            self.name,
            self.lasted.as_secs_f64()
        )
    }
}

/// Writes the line without the lock of standard error, which a hanging task may hold, and from another thread, since
/// the write itself may hang.
#[expect(clippy::exit, reason = "ending the process is the watchdog's job")]
fn end_process(missed: Missed) {
    let (written, done) = mpsc::channel();
    let writer = thread::Builder::new().name("last-words".into()).spawn(move || {
        let mut line = Vec::new();
        if writeln!(line, "{missed}").is_ok() {
            // Nothing can be done about a standard error that cannot be written.
            let _ = rustix::io::write(std::io::stderr().as_fd(), &line);
        }
        let _ = written.send(());
    });
    if writer.is_ok() {
        let _ = done.recv_timeout(LAST_WORDS);
    }
    // `exit` runs what libraries registered for the end; should that hang too, abort.
    let _ = thread::Builder::new().name("last-resort".into()).spawn(|| {
        thread::park_timeout(LAST_WORDS);
        std::process::abort();
    });
    std::process::exit(EXIT_CODE)
}

#[cfg(test)]
mod tests;
