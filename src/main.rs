//! The `peili` program: parses, builds the runtime, maps the error to an exit code.

use std::io::{self, Write};
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use peili::cli::{Cli, Failure};
use tokio::runtime::{Builder, Runtime};

/// Threads for files and name resolution. The runtime's own 512 would let a hung disk take half a GiB of stacks.
const BLOCKING_THREADS: usize = 64;
/// How long threads may hang after the work is done.
const SHUTDOWN: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match runtime() {
        Ok(runtime) => {
            let result = runtime.block_on(cli.execute());
            runtime.shutdown_timeout(SHUTDOWN);
            result
        }
        Err(error) => Err(Failure::Failed(anyhow::Error::new(error).context("cannot start threads"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let error = if let Failure::Found(..) = failure { "" } else { "error: " };
            say(format!("{error}{failure}\n"));
            ExitCode::from(failure.code())
        }
    }
}

/// Writes to standard error from a thread of its own: it may be a pipe that nobody reads, and the end must not wait for
/// that.
fn say(text: String) {
    let (written, done) = mpsc::channel::<()>();
    let writer = thread::Builder::new().spawn(move || {
        // Nobody is left to be told if this cannot be written.
        let _ = io::stderr().write_all(text.as_bytes());
        drop(written);
    });
    if writer.is_ok() {
        // Either end of the wait is the end of it.
        let _ = done.recv_timeout(SHUTDOWN);
    }
}

/// One worker per core, but two at least: one that is held up must not stop the other work.
fn runtime() -> io::Result<Runtime> {
    let cores = thread::available_parallelism().map_or(2, NonZero::get);
    Builder::new_multi_thread()
        .worker_threads(cores.max(2))
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("peili")
        .enable_all()
        .build()
}
