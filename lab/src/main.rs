//! `peili-lab`: the laboratory as a program, behind `cargo xtask demo`, `soak`, `bench`, `simulate`, `image` and `render`.
//!
//! Whatever runs is owned by the future of its command, and a signal drops that future: processes, namespaces and
//! files are gone before the program ends.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod api;
mod bench;
mod demo;
mod render;
mod ship;
mod simulate;
mod soak;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// What a shell gives a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Peili's laboratory.
#[derive(Debug, Parser)]
#[command(name = "peili-lab", max_term_width = 110)]
enum Command {
    /// Nodes that find each other, one image, deaths in mid-pull, a newcomer, a stranger, policies and an election
    Demo(demo::Options),
    /// Six nodes with churn; fails if anything breaks, leaks or grows
    Soak(soak::Options),
    /// What bytes, lookups and memory cost, beside nginx in the same run; how soon elections are decided
    Bench(bench::Options),
    /// The gossip among thousands of nodes in one process, against its targets; the election's core under a million schedules
    Simulate(simulate::Options),
    /// Peili's own image, of files that are there
    Image(ship::Options),
    /// The renderings of the chart in deploy/manifests
    Render(render::Options),
    /// One process of a calibration
    #[command(hide = true)]
    CalibrateNode(simulate::calibrate::member::Options),
}

impl Command {
    /// Whether all was as it should be; the command has said what was not.
    async fn run(self) -> Result<bool> {
        match self {
            Self::Demo(options) => demo::run(&options).await,
            Self::Soak(options) => soak::run(&options).await,
            Self::Bench(options) => bench::run(&options).await,
            Self::Render(options) => render::run(&options),
            Self::Image(options) => ship::run(&options).map(|()| true),
            Self::Simulate(options) if options.calibrate => simulate::calibrate::run(&options).await,
            Self::CalibrateNode(options) => simulate::calibrate::member::run(&options).await,
            Self::Simulate(options) => tokio::task::spawn_blocking(move || simulate::run(&options))
                .await
                .context("the simulation panicked")?,
        }
    }
}

fn main() -> ExitCode {
    let command = Command::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        let signals = signals()?;
        tokio::select! {
            result = command.run() => result.map(Some),
            () = signals => Ok(None),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(Some(true)) => ExitCode::SUCCESS,
        Ok(Some(false)) => ExitCode::FAILURE,
        Ok(None) => {
            eprintln!("\ninterrupted; everything that ran is gone");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends with the first signal that asks this program to end.
fn signals() -> Result<impl Future<Output = ()>> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let (mut terminate, mut hangup) = (listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}
