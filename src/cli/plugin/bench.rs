//! `peili plugin bench`: what it takes and prints.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;

use super::super::Failure;
use super::super::commands::{print, print_json};
use super::{Data, Subject};
use crate::oci::Reference;
use crate::plugin::{self, Measured, Questions, Ratios, Times};

#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(flatten)]
    subject: Subject,
    #[command(flatten)]
    data: Data,
    /// The image that is asked about
    #[arg(default_value = "docker.io/library/nginx:1.27")]
    image: Reference,
    /// How many candidates an election policy ranks
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    candidates: u32,
    /// Ask what is recorded in this decision log, in turn: its first 10,000 decisions of the policy's world
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "candidates"])]
    requests: Option<PathBuf>,
    /// Write the figures to this file, over what is there
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Compare with the figures of this file
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Fail if compiling, a median or an instance's memory is more than so many times the baseline's
    #[arg(long, value_name = "RATIO", requires = "baseline", value_parser = ratio)]
    max_ratio: Option<f64>,
}

/// What a script reads.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    measured: &'a Measured,
    /// How many times as much as the baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratios: Option<&'a Ratios>,
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if ratio.is_finite() && ratio > 0.0 => Ok(ratio),
        _ => Err("it is no ratio, such as 1.5".into()),
    }
}

impl Bench {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Self { subject, data, image, candidates, requests, save, baseline, max_ratio } = self;
        // What is wrong with it is said before minutes are spent.
        let baseline = baseline.as_deref().map(Measured::read).transpose().context("no baseline")?;
        let questions = match &requests {
            Some(log) => Questions::Recorded(log),
            None => Questions::One(&image, candidates as usize),
        };
        let measured = plugin::bench(&subject.file, subject.given(data)?, &questions);
        let measured = measured.context("it cannot be asked")?;
        let ratios = match &baseline {
            Some(baseline) if baseline.world != measured.world => {
                let (world, other) = (&measured.world, &baseline.world);
                return Err(anyhow!("it is a {world} policy, and the baseline is of a {other} policy").into());
            }
            baseline => baseline.as_ref().map(|baseline| measured.against(baseline)),
        };
        if let Some(path) = &save {
            measured.save(path).context("the figures are not kept")?;
        }
        if subject.json {
            print_json(&Printed { measured: &measured, ratios: ratios.as_ref() })?;
        } else {
            print(&lines(&measured, ratios.as_ref()))?;
        }
        let most = ratios.as_ref().and_then(Ratios::most);
        match (max_ratio, most) {
            (Some(limit), Some((name, ratio))) if ratio > limit => {
                Err(anyhow!("{name} is {ratio:.2} times that of the baseline, and {limit} is allowed").into())
            }
            _ => Ok(()),
        }
    }
}

fn lines(measured: &Measured, ratios: Option<&Ratios>) -> String {
    let of = |name: &str| {
        let ratio = ratios.and_then(|ratios| ratios.0.get(name));
        ratio.map_or_else(String::new, |ratio| format!(" ({ratio:.2} of the baseline)"))
    };
    let bytes = |bytes: u64| ByteSize(bytes).display().iec();
    let calls = |name: &str, times: Times| {
        let Times { median, p99 } = times;
        let (half, most) = (of(&format!("{name}-median")), of(&format!("{name}-p99")));
        format!("{median:.2} us in the median{half}, {p99:.2} us p99{most}")
    };
    let Measured { questions, compile, load, warm, cold, noop, asked, allowed, .. } = measured;
    let mut text = format!(
        "compile:  {:.1} ms{}\nload:     {:.1} ms{}\n",
        compile / 1000.0,
        of("compile"),
        load / 1000.0,
        of("load")
    );
    let times = warm.map_or_else(String::new, |times| format!("warm:     {}\n", calls("warm", times)));
    let _ = writeln!(text, "{times}cold:     {}", calls("cold", *cold));
    if let (Some(noop), Some(Times { median, .. })) = (noop, warm) {
        let costs = median / noop;
        let _ =
            writeln!(text, "no-op:    {noop:.2} us in the median, so a warm call costs {costs:.1} of them");
    }
    let _ = writeln!(
        text,
        "memory:   {} of an instance{}; loading added {} to this process{}",
        bytes(measured.instance_memory),
        of("instance-memory"),
        bytes(measured.resident_memory),
        of("resident-memory"),
    );
    let _ = writeln!(text, "asked:    {asked} times (questions: {questions}), {allowed} allowed");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_a_number_above_zero() {
        assert_eq!(ratio("1.5"), Ok(1.5));
        for text in ["", "0", "-1", "inf", "NaN", "1,5"] {
            assert!(ratio(text).is_err(), "{text}");
        }
    }
}
