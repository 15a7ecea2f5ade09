//! Log lines on their way to standard error, on a thread of their own.
//!
//! In a pod standard error is a pipe that containerd reads. A containerd that stands still must not stop the program
//! that is there to go on without it: what the reader does not take is dropped and counted, and nobody waits to log.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that may wait for the reader: some 10,000 lines.
pub(super) const WAITING: usize = 2 << 20;

/// What a line takes beside its text.
const OVERHEAD: usize = 64;

/// How long the end of the program waits for its last lines to be taken.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Takes lines and never waits.
#[derive(Clone)]
pub(super) struct Lines {
    sender: Sender<Message>,
    waiting: Arc<AtomicUsize>,
    dropped: Counter,
}

/// The writing thread. Dropping it waits for the lines before to be written, [`LAST_LINES`] at most.
#[derive(Debug)]
pub(super) struct Writer(Sender<Message>);

enum Message {
    Line(Vec<u8>),
    /// All lines before it are written once its sender is dropped.
    Flush(#[expect(dead_code, reason = "dropping it is the message")] Sender<()>),
}

impl Lines {
    /// Starts the thread that writes to `output`. `dropped` counts the lines that found no place.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(output: impl Write + Send + 'static, dropped: Counter) -> io::Result<(Self, Writer)> {
        let (sender, receiver) = mpsc::channel();
        let lines = Self { sender: sender.clone(), waiting: Arc::default(), dropped };
        let (waiting, dropped) = (Arc::clone(&lines.waiting), lines.dropped.clone());
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write(&receiver, output, &waiting, &dropped))?;
        Ok((lines, Writer(sender)))
    }
}

fn write(receiver: &Receiver<Message>, mut output: impl Write, waiting: &AtomicUsize, dropped: &Counter) {
    let mut told = 0;
    for message in receiver {
        let Message::Line(line) = message else { continue };
        // Nobody can be told that the log cannot be written.
        let _ = output.write_all(&line);
        waiting.fetch_sub(line.len() + OVERHEAD, Ordering::Relaxed);
        let lost = dropped.get() - told;
        if lost > 0 {
            told += lost;
            tracing::warn!(lost, "log lines were dropped: nobody read standard error");
        }
    }
}

impl Writer {
    pub(super) fn flush(&self) {
        let (written, flushed) = mpsc::channel::<()>();
        if self.0.send(Message::Flush(written)).is_ok() {
            // Either end of the wait is the end of it.
            let _ = flushed.recv_timeout(LAST_LINES);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Write for Lines {
    /// Takes a whole line: `tracing_subscriber` writes each event at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let size = line.len() + OVERHEAD;
        let fits = self.waiting.fetch_add(size, Ordering::Relaxed) + size <= WAITING;
        if !fits || self.sender.send(Message::Line(line.to_owned())).is_err() {
            self.waiting.fetch_sub(size, Ordering::Relaxed);
            self.dropped.inc();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
