//! Runs programs within limits, and adds up what they say.
//!
//! Nothing here ends the whole: what cannot be started, or does not end in time, has failed and is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often it is looked whether a program has ended.
const POLL: Duration = Duration::from_millis(20);
/// What a program whose time is over gets to remove what it made.
const GRACE: Duration = Duration::from_secs(5);

/// Tests that may fail and run again: of some 300 that run beside each other, with limits of milliseconds, as many were late at load 8.
const AGAIN: usize = 6;
/// Lines of what a test said when it failed that are said again at the end, where they are found.
const SAID: usize = 6;

/// What ran, in numbers.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// Names with reasons.
    reasons: BTreeSet<String>,
    /// Names of what failed.
    failures: BTreeSet<String>,
    /// Names of tests among them, by the word of their harness.
    tests: BTreeSet<String>,
    /// Names of tests that failed, and passed when they ran again.
    flaky: BTreeSet<String>,
    /// What tests that failed said of it, by their names; of one that ran again both times.
    said: BTreeMap<String, Vec<String>>,
    /// Whose words are being read.
    speaks: Option<String>,
    /// When all must have ended.
    deadline: Instant,
}

impl Tally {
    /// Nothing ran yet, and all that will must end within `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            passed: 0,
            failed: 0,
            skipped: 0,
            reasons: BTreeSet::new(),
            failures: BTreeSet::new(),
            tests: BTreeSet::new(),
            flaky: BTreeSet::new(),
            said: BTreeMap::new(),
            speaks: None,
            deadline: Instant::now() + limit,
        }
    }

    /// A check that counts as one test.
    pub(crate) fn check(&mut self, name: &str, command: &mut Command) {
        self.check_within(name, None, command);
    }

    /// A check with a limit of its own.
    pub(crate) fn check_within(&mut self, name: &str, limit: Option<Duration>, command: &mut Command) {
        let until = self.begin(name, limit);
        match spawn(command).and_then(|mut child| finish(&mut child, until)) {
            Ok(true) => self.passed += 1,
            Ok(false) => self.fail(name),
            Err(error) => self.fail(&format!("{name}: {error:#}")),
        }
    }

    /// Test programs, whose lines are passed on as they come and counted.
    pub(crate) fn harness(&mut self, name: &str, command: &mut Command) {
        self.harness_to(std::io::stdout(), name, command);
    }

    fn harness_to(&mut self, copy: impl Write + Send + 'static, name: &str, command: &mut Command) {
        let until = self.begin(name, None);
        let failed = self.failed;
        match self.read_harness(copy, command, until) {
            Ok(true) => {}
            // A program that does not build, or that dies, has no result line.
            Ok(false) if self.failed > failed => {}
            Ok(false) => self.fail(&format!("{name}: did not build, or a test program died")),
            Err(error) => self.fail(&format!("{name}: {error:#}")),
        }
    }

    fn read_harness(
        &mut self,
        copy: impl Write + Send + 'static,
        command: &mut Command,
        until: Instant,
    ) -> Result<bool> {
        let mut child = spawn(command.stdout(Stdio::piped()))?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = mpsc::channel();
        // Ends with the output. Whoever holds that open after the time is over is not waited for.
        std::thread::spawn(move || pass_on(output, copy, &sender));
        while let Ok(line) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.read_line(&line);
        }
        finish(&mut child, until)
    }

    /// Says that it begins. Returns when it must have ended.
    fn begin(&self, name: &str, limit: Option<Duration>) -> Instant {
        println!("--- {name}");
        limit.map_or(self.deadline, |limit| self.deadline.min(Instant::now() + limit))
    }

    /// Counts a line of libtest, or of a harness that writes the same lines.
    fn read_line(&mut self, line: &str) {
        let line = without_colours(line);
        self.listen(&line);
        if let Some(result) = line.strip_prefix("test result: ") {
            for part in result.split([';', '.']) {
                match part.trim().split_once(' ') {
                    Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                    Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                    Some((count, "ignored")) => self.skipped += count.parse().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some(reason) = line.strip_prefix("skipped: ") {
            self.reasons.insert(reason.to_owned());
        } else if let Some((name, outcome)) =
            line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "))
        {
            // libtest-mimic fills up short names.
            let name = name.trim_end();
            match outcome.split_once(',').map_or((outcome.trim(), ""), |(outcome, why)| (outcome, why.trim()))
            {
                ("ignored", "") => {}
                ("ignored", why) => drop(self.reasons.insert(format!("{name}: {why}"))),
                ("FAILED", _) => {
                    self.failures.insert(name.to_owned());
                    self.tests.insert(name.to_owned());
                }
                _ => {}
            }
        }
    }

    /// Keeps what a harness writes of each test that failed, below a line `---- NAME ----` or `---- NAME stdout ----`: the first lines from
    /// where it panicked.
    fn listen(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")) {
            let name = name.trim_end_matches(" stdout");
            self.said.insert(name.to_owned(), Vec::new());
            self.speaks = Some(name.to_owned());
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.speaks = None;
        } else if let Some(said) = self.speaks.as_ref().and_then(|name| self.said.get_mut(name)) {
            if line.contains(" panicked at ") {
                said.clear();
            }
            if said.len() < SAID && !line.trim().is_empty() {
                said.push(line.to_owned());
            }
        }
    }

    /// Runs tests that failed once more, each by itself. Some hold real processes to real limits of time, and a machine that did
    /// something else meanwhile is no fault of theirs. Who passes then has passed, and is named at the end; where more than
    /// [`AGAIN`] failed that is no accident, and none runs again.
    pub(crate) fn again(&mut self, command: impl Fn(&str) -> Command) {
        self.again_to(std::io::stdout, command);
    }

    fn again_to<W: Write + Send + 'static>(
        &mut self,
        copy: impl Fn() -> W,
        command: impl Fn(&str) -> Command,
    ) {
        if self.tests.len() > AGAIN {
            return;
        }
        for name in std::mem::take(&mut self.tests) {
            let mut once = Self::new(self.deadline.saturating_duration_since(Instant::now()));
            once.harness_to(copy(), &format!("again: {name}"), &mut command(&name));
            self.said.entry(name.clone()).or_default().extend(once.said.into_values().flatten());
            if once.failed == 0 && once.passed > 0 {
                self.failures.remove(&name);
                self.failed = self.failed.saturating_sub(1);
                self.passed += 1;
                self.flaky.insert(name);
            }
        }
    }

    /// Tests that passed for their harness and say that they did not run.
    pub(crate) fn add_reported_skips(&mut self, reported: &str) {
        for line in reported.lines() {
            self.passed = self.passed.saturating_sub(1);
            self.skip(&line.replacen('\t', ": ", 1));
        }
    }

    pub(crate) fn skip(&mut self, reason: &str) {
        self.skipped += 1;
        self.reasons.insert(reason.to_owned());
    }

    pub(crate) fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.insert(name.to_owned());
    }

    /// Prints reasons and names, and as the last line the numbers; true if nothing failed.
    pub(crate) fn report(&self) -> bool {
        for reason in &self.reasons {
            println!("skipped: {reason}");
        }
        let said = |name: &String| {
            for line in self.said.get(name).into_iter().flatten() {
                println!("    {line}");
            }
        };
        for name in &self.flaky {
            println!("passed when it ran again: {name}");
            said(name);
        }
        for failure in &self.failures {
            println!("failed: {failure}");
            said(failure);
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped);
        self.failed == 0
    }
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// Waits for the end; true if all went well. What still runs at `until` is ended, with all that it started.
fn finish(child: &mut Child, until: Instant) -> Result<bool> {
    if let Some(success) = ended(child, until)? {
        return Ok(success);
    }
    signal("TERM", &descendants(child.id()));
    let asked = ended(child, Instant::now() + GRACE)?;
    // Those that did not listen; a list of its own, since some are gone and their numbers may be others'.
    signal("KILL", &descendants(child.id()));
    if asked.is_none() {
        child.kill()?;
        child.wait()?;
    }
    bail!("not done in time");
}

fn ended(child: &mut Child, until: Instant) -> Result<Option<bool>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        #[expect(clippy::disallowed_methods, reason = "there is no executor here")]
        std::thread::sleep(POLL);
    }
}

/// A process that runs, and all that it and they started.
fn descendants(id: u32) -> Vec<String> {
    let mut found = vec![id.to_string()];
    let mut next = 0;
    while let Some(id) = found.get(next) {
        let threads = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
        let children: Vec<String> = threads
            .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
            .flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        found.extend(children);
        next += 1;
    }
    found
}

/// By the shell, whose `kill` is built in.
fn signal(name: &str, processes: &[String]) {
    let mut shell = Command::new("sh");
    shell.args(["-c", "kill -\"$0\" \"$@\"", name]).args(processes).stderr(Stdio::null());
    // One that cannot be signalled has ended.
    let _ = shell.status();
}

/// Copies output as it comes, and each line to `lines`.
fn pass_on(mut output: ChildStdout, mut copy: impl Write, lines: &mpsc::Sender<String>) {
    let (mut buffer, mut line) = ([0; 4096], Vec::new());
    let send = |line: &[u8]| lines.send(String::from_utf8_lossy(line).into_owned());
    loop {
        let count = match output.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        // Whoever reads no more may still want the numbers.
        let _ = copy.write_all(&buffer[..count]).and_then(|()| copy.flush());
        for &byte in &buffer[..count] {
            if byte == b'\n' {
                let _ = send(&line);
                line.clear();
            } else {
                line.push(byte);
            }
        }
    }
    let _ = send(&line);
}

/// Without escape sequences of the form `ESC [ ... letter`.
fn without_colours(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character != '\u{1b}' {
            text.push(character);
            continue;
        }
        let _ = characters.find(char::is_ascii_alphabetic);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn adds_up_the_lines_of_all_harnesses() {
        let mut tally = Tally::new(LIMIT);
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test a::d ... ignored, needs root",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: \u{1b}[32mok\u{1b}[m. 5 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out",
            "skipped: pulls: needs root and iproute2",
            "test result of something else: 9 passed",
        ] {
            tally.read_line(line);
        }
        tally.add_reported_skips("x\tneeds root\n");
        assert_eq!((tally.passed, tally.failed, tally.skipped), (5, 1, 4));
        let reasons: Vec<_> = tally.reasons.iter().map(String::as_str).collect();
        assert_eq!(reasons, ["a::d: needs root", "pulls: needs root and iproute2", "x: needs root"]);
        assert_eq!(tally.failures.iter().map(String::as_str).collect::<Vec<_>>(), ["a::c"]);
    }

    #[test]
    fn what_a_test_said_is_kept() {
        let mut tally = Tally::new(LIMIT);
        for line in [
            "failures:",
            "",
            "---- a::mimic ----",
            "test panicked: FAILED network (31 s): why",
            "",
            "---- b::lib stdout ----",
            "measured",
            "thread 'b::lib' (7) panicked at src/b.rs:1:1:",
            "assertion failed",
            "",
            "failures:",
            "    a::mimic",
        ] {
            tally.read_line(line);
        }
        assert_eq!(tally.said["a::mimic"], ["test panicked: FAILED network (31 s): why"]);
        assert_eq!(
            tally.said["b::lib"],
            ["thread 'b::lib' (7) panicked at src/b.rs:1:1:", "assertion failed"]
        );
    }

    #[test]
    fn whatever_happens_is_counted() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let mut tally = Tally::new(LIMIT);
        tally.check("good", &mut shell("true"));
        tally.check("bad", &mut shell("false"));
        tally.check("absent", &mut Command::new("/nonexistent"));
        tally.harness("absent harness", &mut Command::new("/nonexistent"));
        let result = "echo 'test result: ok. 2 passed; 0 failed'";
        // Not to standard output, where it would be counted by `cargo xtask test`.
        tally.harness_to(std::io::sink(), "harness", &mut shell(result));
        tally.harness_to(std::io::sink(), "dying", &mut shell(&format!("{result}; exit 1")));
        assert_eq!((tally.passed, tally.failed), (5, 4));
    }

    /// Guards that only what passes by itself is forgiven, and only a few.
    #[test]
    fn a_few_tests_run_again() {
        let command = |name: &str| {
            let mut command = Command::new("sh");
            let failed = if name == "bad" { "0 passed; 1 failed" } else { "1 passed; 0 failed" };
            command.args(["-c", &format!("echo 'test result: x. {failed}'")]);
            command
        };
        let with = |names: &[&str]| {
            let mut tally = Tally::new(LIMIT);
            for name in names {
                // As libtest-mimic writes short names.
                tally.read_line(&format!("test {name}      ... FAILED"));
                tally.read_line("test result: FAILED. 0 passed; 1 failed");
            }
            tally.again_to(std::io::sink, command);
            (tally.passed, tally.failed, tally.flaky.len(), tally.failures.len())
        };
        assert_eq!(with(&["good", "bad"]), (1, 1, 1, 1));
        assert_eq!(with(&["a", "b", "c", "d", "e", "f", "g"]), (0, 7, 0, 7));
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let folder = std::env::temp_dir().join(format!("peili-xtask-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("child");
        // The grandchild holds the output open, as a test's processes do.
        let script = format!("sh -c 'echo $$ > {}; sleep 60; true'; true", file.display());
        let began = Instant::now();
        let mut tally = Tally::new(Duration::from_millis(300));
        let mut shell = Command::new("sh");
        tally.harness("endless", shell.args(["-c", &script]));
        let mut sleep = Command::new("sleep");
        tally.check("too late", sleep.arg("60"));
        assert_eq!((tally.passed, tally.failed), (0, 2));
        assert!(tally.failures.contains("endless: not done in time"), "{:?}", tally.failures);
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        let child = fs::read_to_string(&file).unwrap();
        fs::remove_dir_all(folder).unwrap();
        let mut sleep = Command::new("sleep");
        assert!(sleep.arg("0.2").status().unwrap().success());
        let state = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }
}
