//! The log as it is written, and the metrics of the process itself.

use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use super::*;

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn take(&self, log: &Log) -> String {
        log._writer.flush();
        String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
    }
}

fn config(level: &str, format: Format) -> Config {
    Config { level: level.into(), format }
}

fn start(config: &Config, terminal: bool) -> (Output, Log, tracing::subscriber::DefaultGuard) {
    let output = Output::default();
    let (subscriber, log) = subscriber(config, terminal, output.clone()).unwrap();
    (output, log, tracing::subscriber::set_default(subscriber))
}

#[test]
fn auto_is_text_on_a_terminal_and_json_elsewhere() {
    for (format, terminal, json) in [
        (Format::Auto, true, false),
        (Format::Auto, false, true),
        (Format::Text, false, false),
        (Format::Json, true, true),
    ] {
        let (output, log, _guard) = start(&config("info", format), terminal);
        tracing::warn!(peer = "a", "cannot reach");
        let line = output.take(&log);
        match serde_json::from_str::<serde_json::Value>(&line) {
            Ok(value) => {
                assert!(json, "{line}");
                assert_eq!(value["peer"], "a");
                assert_eq!(value["message"], "cannot reach");
                assert_eq!(value["level"], "WARN");
            }
            Err(_) => assert!(!json && line.contains("cannot reach"), "{line}"),
        }
    }
}

#[test]
fn the_level_changes_while_running_and_a_wrong_one_changes_nothing() {
    let (output, log, _guard) = start(&config("warn", Format::Json), false);
    tracing::info!("one");
    assert_eq!(output.take(&log), "");
    log.apply(&config("info", Format::Json)).unwrap();
    tracing::info!("two");
    assert!(output.take(&log).contains("two"));
    let wrong = log.apply(&config("info,=x=", Format::Json));
    assert!(matches!(wrong, Err(Error::Level { .. })), "{wrong:?}");
    tracing::info!("three");
    assert!(output.take(&log).contains("three"));
}

/// Standard error that is read as far as `reads` go.
struct Pipe {
    reads: mpsc::Receiver<()>,
    output: Output,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.reads.recv().map_err(std::io::Error::other)?;
        self.output.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Guards the thread and the bound of [`Lines`]: whoever logs goes on, and memory does not grow.
#[test]
fn lines_that_nobody_reads_are_dropped_and_counted() {
    let (read, reads) = mpsc::channel();
    let output = Output::default();
    let pipe = Pipe { reads, output: output.clone() };
    let (subscriber, log) = subscriber(&config("info", Format::Json), false, pipe).unwrap();
    let guard = tracing::subscriber::set_default(subscriber);
    let text = "x".repeat(1 << 10);
    let began = Instant::now();
    for number in 0..4 * lines::WAITING / text.len() {
        tracing::info!(number, text);
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    let dropped = log.dropped.get() as usize;
    assert!((2 * lines::WAITING..4 * lines::WAITING).contains(&(dropped * text.len())), "{dropped}");
    drop(guard);
    for _ in 0..2 {
        read.send(()).unwrap();
    }
    let began = Instant::now();
    let dropped = log.dropped.clone();
    drop(log);
    assert!(began.elapsed() < Duration::from_secs(5), "the end does not wait for ever");
    let first = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
    assert!(first.contains("\"number\":0"), "{first}");
    assert!(dropped.get() > 0);
}

#[tokio::test]
async fn registry_names_the_build_and_counts_tasks() {
    let mut all = Registry::default();
    register_runtime(registry(&mut all), tokio::runtime::Handle::current());
    let mut text = String::new();
    let waiting = tokio::spawn(std::future::pending::<()>());
    prometheus_client::encoding::text::encode(&mut text, &all).unwrap();
    waiting.abort();
    assert!(text.contains("# TYPE peili_runtime_tasks gauge\npeili_runtime_tasks 1\n"), "{text}");
    assert!(
        text.contains(&format!("peili_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))),
        "{text}"
    );
    assert!(text.contains("peili_start_time_seconds "), "{text}");
}
