use std::sync::{Arc, Mutex};

use super::*;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
    }
}

fn config(level: &str, format: Format) -> Config {
    Config { level: level.into(), format }
}

fn start(config: &Config, terminal: bool) -> (Lines, Log, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let writer = lines.clone();
    let (subscriber, log) = subscriber(config, terminal, move || writer.clone()).unwrap();
    (lines, log, tracing::subscriber::set_default(subscriber))
}

#[test]
fn auto_is_text_on_a_terminal_and_json_elsewhere() {
    for (format, terminal, json) in [
        (Format::Auto, true, false),
        (Format::Auto, false, true),
        (Format::Text, false, false),
        (Format::Json, true, true),
    ] {
        let (lines, _log, _guard) = start(&config("info", format), terminal);
        tracing::warn!(peer = "a", "cannot reach");
        let line = lines.take();
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
    let (lines, log, _guard) = start(&config("warn", Format::Json), false);
    tracing::info!("one");
    assert_eq!(lines.take(), "");
    log.apply(&config("info", Format::Json)).unwrap();
    tracing::info!("two");
    assert!(lines.take().contains("two"));
    let wrong = log.apply(&config("info,=x=", Format::Json));
    assert!(matches!(wrong, Err(Error::Level { .. })), "{wrong:?}");
    tracing::info!("three");
    assert!(lines.take().contains("three"));
}

#[test]
fn registry_names_the_build() {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry()).unwrap();
    assert!(
        text.contains(&format!("peili_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))),
        "{text}"
    );
    assert!(text.contains("peili_start_time_seconds "), "{text}");
}
