//! Logs, the metrics registry, and the last causes of not serving.
//!
//! Starts what the other modules write to. It decides nothing about what they write.

mod causes;
mod lines;

use std::io::{IsTerminal as _, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, reload};

use lines::{Lines, Writer};

pub use causes::{Cause, Causes};

/// How the process logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Filter in the form of `tracing`: `info`, or `info,peili::network=debug`.
    pub level: String,
    /// Form of a line.
    pub format: Format,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `text` on a terminal, else `json`.
    Auto,
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// The running log; changes its level. Dropping the last clone waits up to 1 s for the last lines to be written.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, tracing_subscriber::Registry>,
    dropped: Counter,
    _writer: Arc<Writer>,
}

/// How many tasks there are, asked for at each scrape.
#[derive(Debug)]
struct Tasks(tokio::runtime::Handle);

/// Why logging cannot be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter cannot be read.
    #[error("`{level}` is not a log filter, such as `info` or `info,peili::network=debug`: {reason}")]
    Level {
        /// As configured.
        level: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The process has a log already.
    #[error("logging was started before")]
    Started,
    /// No thread for the lines.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(#[from] std::io::Error),
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Auto }
    }
}

impl Config {
    /// Checks the values.
    ///
    /// # Errors
    /// The level is not a filter.
    pub fn check(&self) -> Result<(), Error> {
        filter(&self.level).map(drop)
    }
}

impl Log {
    /// Starts logging to standard error, for the whole process; panics go to the log too. Lines that nobody reads are
    /// dropped: logging never waits.
    ///
    /// # Errors
    /// The level cannot be read, logging was started before, or no thread can be started.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let terminal = std::io::stderr().is_terminal();
        let (subscriber, log) = subscriber(config, terminal, std::io::stderr())?;
        subscriber.try_init().map_err(|_| Error::Started)?;
        std::panic::set_hook(Box::new(|panic| {
            let message = panic.payload_as_str().unwrap_or("no message");
            let location = panic.location().map(ToString::to_string).unwrap_or_default();
            let thread = std::thread::current();
            tracing::error!(message, location, thread = thread.name().unwrap_or(""), "panic");
        }));
        Ok(log)
    }

    /// Changes the level. The format needs a restart.
    ///
    /// # Errors
    /// The level cannot be read; the old one stays.
    pub fn apply(&self, config: &Config) -> Result<(), Error> {
        let filter = filter(&config.level)?;
        self.filter
            .reload(filter)
            .map_err(|error| Error::Level { level: config.level.clone(), reason: error.to_string() })
    }

    /// Registers the count of lines that were dropped.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("log_dropped_lines", "Log lines that nobody read", self.dropped.clone());
    }
}

/// Registers the number of the runtime's tasks that have not ended.
pub fn register_runtime(registry: &mut Registry, runtime: tokio::runtime::Handle) {
    registry.register_collector(Box::new(Tasks(runtime)));
}

impl Collector for Tasks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let tasks = ConstGauge::new(self.0.metrics().num_alive_tasks() as u64);
        let help = "Tasks of the runtime that have not ended";
        tasks.encode(encoder.encode_descriptor("runtime_tasks", help, None, tasks.metric_type())?)
    }
}

/// Adds a registry whose names all begin with `peili_`, with `peili_build_info{version}` and
/// `peili_start_time_seconds` in it.
pub fn registry(all: &mut Registry) -> &mut Registry {
    let registry = all.sub_registry_with_prefix("peili");
    registry.register("build", "Version of Peili", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
    let start = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
    start.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    registry.register("start_time_seconds", "Unix time at which the process started", start);
    registry
}

fn filter(level: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder()
        .parse(level)
        .map_err(|error| Error::Level { level: level.into(), reason: error.to_string() })
}

fn subscriber(
    config: &Config,
    terminal: bool,
    output: impl Write + Send + 'static,
) -> Result<(impl Subscriber + Send + Sync + 'static, Log), Error> {
    let (filter, handle) = reload::Layer::new(filter(&config.level)?);
    let text = match config.format {
        Format::Auto => terminal,
        Format::Text => true,
        Format::Json => false,
    };
    let dropped = Counter::default();
    let (lines, writer) = Lines::start(output, dropped.clone())?;
    let lines = tracing_subscriber::fmt::layer().with_writer(lines);
    let lines = if text {
        lines.with_ansi(terminal).boxed()
    } else {
        lines.json().flatten_event(true).with_current_span(false).boxed()
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    Ok((subscriber, Log { filter: handle, dropped, _writer: Arc::new(writer) }))
}

#[cfg(test)]
mod tests;
