//! The clock of running calls: each millisecond is an epoch, and nobody counts while nothing runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use wasmtime::Store;

/// One epoch.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without a call until the thread sleeps: a wake-up costs a caller some microseconds.
const LINGER: u32 = 100;

/// Counts epochs as long as calls run. Dropping it ends its thread.
pub(super) struct Ticker {
    state: Arc<State>,
    thread: Thread,
}

struct State {
    running: AtomicUsize,
    sleeps: AtomicBool,
    ends: AtomicBool,
}

/// A call that runs.
pub(super) struct Running<'a>(&'a State);

impl Ticker {
    /// Begins to count for `engine`.
    pub(super) fn start(engine: wasmtime::Engine) -> io::Result<Self> {
        let state = Arc::new(State {
            running: AtomicUsize::new(0),
            sleeps: AtomicBool::new(false),
            ends: AtomicBool::new(false),
        });
        let counted = Arc::clone(&state);
        let handle =
            thread::Builder::new().name("policy-ticker".into()).spawn(move || counted.count(&engine))?;
        Ok(Self { state, thread: handle.thread().clone() })
    }

    /// Epochs pass as long as the result lives.
    pub(super) fn run(&self) -> Running<'_> {
        self.state.running.fetch_add(1, Ordering::SeqCst);
        if self.state.sleeps.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
        Running(&self.state)
    }

    /// Ends what runs in `store` at `deadline`, at the latest one tick after it. Whether that is still to come.
    pub(super) fn limit<T>(&self, store: &mut Store<T>, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let ticks = u64::try_from(left.as_millis()).unwrap_or(u64::MAX / 2);
        store.set_epoch_deadline(ticks + 1);
        !left.is_zero()
    }
}

impl State {
    #[expect(clippy::disallowed_methods, reason = "a thread of its own, on which no task runs")]
    fn count(&self, engine: &wasmtime::Engine) {
        let mut idle = 0;
        while !self.ends.load(Ordering::SeqCst) {
            if self.running.load(Ordering::SeqCst) > 0 {
                idle = 0;
            } else {
                idle += 1;
            }
            if idle > LINGER {
                self.sleeps.store(true, Ordering::SeqCst);
                // Who began before it could see that, woke nobody.
                if self.running.load(Ordering::SeqCst) == 0 && !self.ends.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.sleeps.store(false, Ordering::SeqCst);
                idle = 0;
            }
            thread::sleep(TICK);
            engine.increment_epoch();
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.state.ends.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}
