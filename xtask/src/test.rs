//! Runs every check and adds up what they say.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{cargo, programs, root, setup, target};

/// Tests that return early append `NAME<tab>REASON` to the file that this names (`peili_lab::report_skip`).
const SKIPS_FILE: &str = "PEILI_SKIPS_FILE";

/// What `cargo xtask test` was told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    install: bool,
    filter: Option<String>,
}

/// What ran, in numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Names with reasons.
    reasons: BTreeSet<String>,
    /// Names of what failed.
    failures: BTreeSet<String>,
}

impl Options {
    /// Reads the arguments after `test`.
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self { install: true, filter: None };
        for argument in arguments {
            match argument.as_str() {
                "--no-install" => options.install = false,
                flag if flag.starts_with('-') => bail!("`test` has no option `{flag}`"),
                filter if options.filter.is_none() => options.filter = Some(filter.to_owned()),
                more => bail!("one filter at most, `{more}` is too many"),
            }
        }
        Ok(options)
    }
}

/// Runs the checks; true if none failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.install {
        setup::install()?;
    }
    let mut tally = Tally::default();
    if options.filter.is_none() {
        lints(&mut tally)?;
    }
    tests(options, &mut tally)?;
    if options.filter.is_none() {
        soak(&mut tally)?;
    }
    for reason in &tally.reasons {
        println!("skipped: {reason}");
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    Ok(tally.failed == 0)
}

fn lints(tally: &mut Tally) -> Result<()> {
    let plugins = ["--manifest-path", "plugins/Cargo.toml"];
    if setup::has_cargo("fmt") {
        tally.check("formatting", cargo().args(["fmt", "--all", "--check"]))?;
        tally.check("formatting of plugins", cargo().arg("fmt").args(plugins).args(["--all", "--check"]))?;
    } else {
        tally.skip("formatting: needs rustfmt");
    }
    let deny = ["--", "-D", "warnings"];
    if !setup::has_cargo("clippy") {
        tally.skip("clippy: needs clippy");
    } else {
        if setup::can_build() {
            let all = ["clippy", "--quiet", "--workspace", "--all-targets"];
            tally.check("clippy", cargo().args(all).args(deny))?;
        } else {
            tally.skip("clippy: needs protobuf-compiler");
        }
        let all = ["--quiet", "--workspace", "--all-targets"];
        tally.check("clippy of plugins", cargo().arg("clippy").args(plugins).args(all).args(deny))?;
    }
    if setup::has_cargo("fuzz") {
        let manifest = ["check", "--quiet", "--manifest-path", "fuzz/Cargo.toml"];
        tally.check("types of the fuzz targets", cargo().args(manifest))?;
    } else {
        tally.skip("types of the fuzz targets: needs cargo-fuzz");
    }
    Ok(())
}

fn tests(options: &Options, tally: &mut Tally) -> Result<()> {
    let filter = options.filter.as_slice();
    if setup::can_build() {
        let skips = target().join(format!("skips-{}", std::process::id()));
        fs::create_dir_all(target())?;
        fs::write(&skips, "")?;
        let mut command = cargo();
        command.args(["test", "--workspace", "--no-fail-fast"]).args(filter).env(SKIPS_FILE, &skips);
        // Some tests hold real sockets to real time limits, and two cores bear one such test at a time.
        command.env("RUST_TEST_THREADS", "1");
        let result = tally.harness("tests", &mut command);
        let reported = fs::read_to_string(&skips).unwrap_or_default();
        fs::remove_file(&skips)?;
        result?;
        tally.add_reported_skips(&reported);
    } else {
        tally.skip("tests: need protobuf-compiler");
    }
    let plugins = ["test", "--workspace", "--no-fail-fast", "--manifest-path", "plugins/Cargo.toml"];
    tally.harness("tests of plugins", cargo().args(plugins).args(filter))
}

/// Counts as one test.
fn soak(tally: &mut Tally) -> Result<()> {
    if !setup::can_build() {
        tally.skip("soak: needs protobuf-compiler");
        return Ok(());
    }
    match programs(false) {
        Ok(mut laboratory) => tally.check("soak", laboratory.args(["soak", "--minutes", "1"])),
        Err(error) => {
            println!("{error:#}");
            tally.fail("soak");
            Ok(())
        }
    }
}

impl Tally {
    /// A check that counts as one test.
    fn check(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("--- {name}");
        if command.status().with_context(|| format!("cannot run {name}"))?.success() {
            self.passed += 1;
        } else {
            self.fail(name);
        }
        Ok(())
    }

    /// Test programs, whose lines are passed on as they come and counted.
    fn harness(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("--- {name}");
        let mut child = command
            .current_dir(root())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let mut output = child.stdout.take().context("no output")?;
        let failed = self.failed;
        let (mut buffer, mut line) = ([0; 4096], Vec::new());
        loop {
            let count = output.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&buffer[..count])?;
            stdout.flush()?;
            for &byte in &buffer[..count] {
                if byte == b'\n' {
                    self.read_line(&String::from_utf8_lossy(&line));
                    line.clear();
                } else {
                    line.push(byte);
                }
            }
        }
        self.read_line(&String::from_utf8_lossy(&line));
        // A program that does not build, or that dies, has no result line.
        if !child.wait()?.success() && self.failed == failed {
            self.fail(&format!("{name}: did not build, or a test program died"));
        }
        Ok(())
    }

    /// Counts a line of libtest, or of a harness that writes the same lines.
    fn read_line(&mut self, line: &str) {
        let line = without_colours(line);
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
            match outcome.split_once(',').map_or((outcome.trim(), ""), |(outcome, why)| (outcome, why.trim()))
            {
                ("ignored", "") => {}
                ("ignored", why) => drop(self.reasons.insert(format!("{name}: {why}"))),
                ("FAILED", _) => drop(self.failures.insert(name.to_owned())),
                _ => {}
            }
        }
    }

    /// Tests that passed for their harness and say that they did not run.
    fn add_reported_skips(&mut self, reported: &str) {
        for line in reported.lines() {
            self.passed = self.passed.saturating_sub(1);
            self.skip(&line.replacen('\t', ": ", 1));
        }
    }

    fn skip(&mut self, reason: &str) {
        self.skipped += 1;
        self.reasons.insert(reason.to_owned());
    }

    fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.insert(name.to_owned());
    }
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

    #[test]
    fn adds_up_the_lines_of_all_harnesses() {
        let mut tally = Tally::default();
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
    fn arguments() {
        let parse = |arguments: &[&str]| {
            Options::parse(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(parse(&["--no-install"]).unwrap(), Options { install: false, filter: None });
        assert_eq!(parse(&["x"]).unwrap(), Options { install: true, filter: Some("x".into()) });
        assert!(parse(&["--fast"]).is_err() && parse(&["a", "b"]).is_err());
    }
}
