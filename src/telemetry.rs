//! Logs, the metrics registry, and the last causes of not serving.
//!
//! Starts what the other modules write to. It decides nothing about what they write.

mod causes;

use std::io::IsTerminal as _;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, reload};

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

/// The running log; changes its level.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, tracing_subscriber::Registry>,
}

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
    /// Starts logging to standard error, for the whole process; panics go to the log too.
    ///
    /// # Errors
    /// The level cannot be read, or logging was started before.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let terminal = std::io::stderr().is_terminal();
        let (subscriber, log) = subscriber(config, terminal, std::io::stderr)?;
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
}

/// A metrics registry whose names all begin with `peili_`, with `peili_build_info{version}` and
/// `peili_start_time_seconds` in it.
pub fn registry() -> Registry {
    let mut registry = Registry::with_prefix("peili");
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

fn subscriber<W>(
    config: &Config,
    terminal: bool,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync + 'static, Log), Error>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter(&config.level)?);
    let text = match config.format {
        Format::Auto => terminal,
        Format::Text => true,
        Format::Json => false,
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = if text {
        lines.with_ansi(terminal).boxed()
    } else {
        lines.json().flatten_event(true).with_current_span(false).boxed()
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    Ok((subscriber, Log { filter: handle }))
}

#[cfg(test)]
mod tests;
