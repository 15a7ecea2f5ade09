//! What a pull tells while it runs, and how it is shown to people.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Failure, Fetched, Summary};
use crate::oci::{Descriptor, Digest};

/// Contents smaller than this have no line of their own: they are there before it could be read.
const LINE_LIMIT: u64 = 64 << 10;

/// Is told what a pull does. Called on the pull's own task, so it must be quick.
pub trait Progress: Send + Sync {
    /// Something has happened.
    fn event(&self, event: &Event<'_>);
}

/// What happens in a pull.
#[derive(Debug)]
pub enum Event<'a> {
    /// The name stands for this.
    Resolved {
        /// Manifest or index.
        target: &'a Descriptor,
        /// URL of the host that said so.
        host: &'a str,
    },
    /// All manifests are there, so the blobs are known.
    Planned {
        /// How many.
        blobs: usize,
        /// Their bytes together.
        bytes: u64,
    },
    /// A fetch begins.
    Started {
        /// Of what.
        descriptor: &'a Descriptor,
        /// Bytes that an earlier pull had left.
        kept: u64,
    },
    /// Bytes have come.
    Advanced {
        /// Of what.
        digest: &'a Digest,
        /// How many.
        bytes: u64,
    },
    /// A body ended early and is asked for again from where it ended.
    Resumed {
        /// Of what.
        digest: &'a Digest,
        /// How it ended.
        reason: &'a str,
    },
    /// The bytes so far were wrong and are thrown away.
    Restarted {
        /// Of what.
        digest: &'a Digest,
    },
    /// A host has failed, the next one is asked.
    HostFailed {
        /// Of what; `None` while the name is resolved.
        digest: Option<&'a Digest>,
        /// Which and why.
        failure: &'a Failure,
    },
    /// A content is in place.
    Finished(&'a Fetched),
    /// The image is.
    Done(&'a Summary),
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

/// Shows bars on standard error, or plain lines where that is no terminal.
#[derive(Debug)]
pub struct Bars {
    multi: MultiProgress,
    total: ProgressBar,
    lines: Mutex<HashMap<Digest, Line>>,
    plain: bool,
}

#[derive(Debug)]
struct Line {
    bar: Option<ProgressBar>,
    /// Bytes that the total counts for it.
    counted: u64,
}

impl Progress for Silent {
    fn event(&self, _event: &Event<'_>) {}
}

impl Bars {
    /// Bars on standard error.
    pub fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target =
            if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
        let multi = MultiProgress::with_draw_target(target);
        let total = multi.add(ProgressBar::new(0));
        total.set_style(style(
            "total   {bar:30} {bytes:>11} / {total_bytes:<11} {binary_bytes_per_sec:>13} {eta:>5}",
        ));
        Self { multi, total, lines: Mutex::default(), plain }
    }

    fn say(&self, text: impl Display) {
        if self.plain {
            // Without a reader there is nobody to tell.
            drop(writeln!(std::io::stderr().lock(), "{text}"));
        } else {
            drop(self.multi.println(text.to_string()));
        }
    }

    fn start(&self, descriptor: &Descriptor, kept: u64) {
        let bar = (!self.plain && descriptor.size >= LINE_LIMIT).then(|| {
            let bar = self.multi.insert_before(&self.total, ProgressBar::new(descriptor.size));
            bar.set_style(style(
                "{prefix} {bar:30} {bytes:>11} / {total_bytes:<11} {binary_bytes_per_sec:>13} {msg}",
            ));
            bar.set_prefix(short(&descriptor.digest));
            bar.set_position(kept);
            bar.reset_eta();
            bar
        });
        self.total.inc(kept);
        self.lines().insert(descriptor.digest, Line { bar, counted: kept });
    }

    fn finish(&self, fetched: &Fetched) {
        let line = self.lines().remove(&fetched.digest);
        let counted = line.as_ref().map_or(0, |line| line.counted);
        self.total.inc(fetched.size.saturating_sub(counted));
        if let Some(bar) = line.and_then(|line| line.bar) {
            bar.finish_and_clear();
        }
        if self.plain {
            let from = fetched.parts.iter().map(|part| part.host.as_str()).collect::<Vec<_>>().join(", ");
            let from = if fetched.held { "already there" } else { from.as_str() };
            self.say(format_args!("{} {} {from}", fetched.digest, ByteSize(fetched.size).display().iec()));
        }
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // A pull that fails leaves its bars; its error comes below a clean line.
        drop(self.multi.clear());
    }
}

impl Progress for Bars {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Resolved { target, host } => self.say(format_args!("{} from {host}", target.digest)),
            Event::Planned { bytes, .. } => {
                self.total.set_length(*bytes);
                self.total.set_position(0);
                self.total.reset_eta();
            }
            Event::Started { descriptor, kept } => self.start(descriptor, *kept),
            Event::Advanced { digest, bytes } => {
                self.total.inc(*bytes);
                if let Some(line) = self.lines().get_mut(*digest) {
                    line.counted += bytes;
                    if let Some(bar) = &line.bar {
                        bar.inc(*bytes);
                    }
                }
            }
            Event::Resumed { digest, reason } => {
                self.say(format_args!("{}: {reason}; resuming", short(digest)));
            }
            Event::Restarted { digest } => {
                if let Some(line) = self.lines().get_mut(*digest) {
                    self.total.dec(line.counted);
                    line.counted = 0;
                    if let Some(bar) = &line.bar {
                        bar.set_position(0);
                    }
                }
            }
            Event::HostFailed { digest, failure } => match digest {
                Some(digest) => self.say(format_args!("{}: {failure}", short(digest))),
                None => self.say(failure),
            },
            Event::Finished(fetched) => self.finish(fetched),
            Event::Done(summary) => {
                self.total.finish_and_clear();
                let time = Duration::from_secs_f64(summary.millis / 1000.0);
                self.say(format_args!(
                    "{}: {} fetched in {:.1} s",
                    summary.reference,
                    ByteSize(summary.bytes).display().iec(),
                    time.as_secs_f64()
                ));
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // A template that cannot be read would be ours; the default style still shows the bar.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Enough of a digest to tell layers apart.
fn short(digest: &Digest) -> String {
    digest.hex().chars().take(7).collect()
}
