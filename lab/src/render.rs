//! `peili-lab render`: writes what is checked in and made of the chart: its renderings, and the table of its values.

use std::fs;

use anyhow::{Context, Result};
use clap::Args;
use peili_lab::chart;

/// What to do with them.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Write nothing; fail where one is not what the chart gives
    #[arg(long)]
    check: bool,
}

/// Whether all are as they should be.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut stale = 0;
    for (path, text) in chart::renderings()? {
        if fs::read_to_string(&path).is_ok_and(|found| found == text) {
            continue;
        }
        if options.check {
            stale += 1;
            eprintln!("{} is not what the chart gives: `cargo xtask render` writes it", path.display());
        } else {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{}", path.display());
        }
    }
    Ok(stale == 0)
}
