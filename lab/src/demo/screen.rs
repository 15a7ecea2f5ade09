//! What people see: lines that stay, and below them a table that is redrawn in place. Without a terminal the table
//! becomes lines. It knows nothing of what it shows.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

/// Lines and a table, on standard output or standard error.
#[derive(Debug)]
pub(crate) struct Screen {
    terminal: bool,
    /// Standard output is somebody else's.
    error: bool,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// What it looks like now.
    lines: Vec<String>,
    /// Lines of it that stand on the terminal.
    drawn: usize,
}

impl Screen {
    /// On standard error if `error`, else on standard output.
    pub(crate) fn new(error: bool) -> Self {
        let terminal = if error { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
        Self { terminal, error, table: Mutex::default() }
    }

    /// Whether the table is redrawn in place.
    pub(crate) fn is_live(&self) -> bool {
        self.terminal
    }

    /// Writes a line above the table.
    pub(crate) fn say(&self, text: &str) {
        let mut table = self.lock();
        let mut output = table.erase();
        output.push_str(text);
        output.push('\n');
        if self.terminal {
            output.push_str(&table.draw());
        }
        self.write(&output);
    }

    /// Changes the table, and on a terminal redraws it.
    pub(crate) fn show(&self, lines: Vec<String>) {
        let mut table = self.lock();
        let mut output = table.erase();
        table.lines = lines;
        if self.terminal {
            output.push_str(&table.draw());
            self.write(&output);
        }
    }

    /// Lets the table stand as it is; the next one is drawn below.
    pub(crate) fn settle(&self) {
        let mut table = self.lock();
        let mut output = table.erase();
        for line in std::mem::take(&mut table.lines) {
            output.push_str(&line);
            output.push('\n');
        }
        self.write(&output);
    }

    fn write(&self, text: &str) {
        // A reader that has seen enough (`| head`) does not end the demonstration.
        let _ = if self.error {
            std::io::stderr().lock().write_all(text.as_bytes())
        } else {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        };
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Goes up to the first line of the table and clears all below.
    fn erase(&mut self) -> String {
        match std::mem::take(&mut self.drawn) {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\x1b[J"),
        }
    }

    fn draw(&mut self) -> String {
        self.drawn = self.lines.len();
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// Bytes for people: `96.0 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    // Manifests and configs add some hundred bytes to a round number.
    if (value - value.round()).abs() < 0.01 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (96 << 20, "96 MiB"),
            ((96 << 20) + 900, "96 MiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn a_table_is_erased_as_far_as_it_was_drawn() {
        let mut table = Table { lines: vec!["a".into(), "b".into()], drawn: 2 };
        assert_eq!(table.erase(), "\x1b[2A\x1b[J");
        assert_eq!(table.erase(), "");
    }
}
