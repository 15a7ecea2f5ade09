//! An election policy that misbehaves as its settings tell, for the tests of the host. Nobody installs it.

#[path = "../../testguests/src/misdeeds.rs"]
mod misdeeds;

use std::collections::{HashMap, HashSet};
use std::hint::black_box;
use std::sync::atomic::{AtomicU16, Ordering};

use peili_policy::SettingError;
use peili_policy::election::{Policy, Ranking, View};
use serde::Deserialize;

use misdeeds::{allocate, flood, garbage, recurse, spin};

/// Rankings that this instance made.
static CALLS: AtomicU16 = AtomicU16::new(0);

/// What it does with a view.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Nothing wrong: abstains.
    Abstain,
    /// Nothing wrong: the weights of the settings.
    Weights,
    /// Excludes everybody.
    Zero,
    /// One weight too few.
    Short,
    /// A weight that is none.
    Over,
    /// A million weights.
    Huge,
    /// Counts its calls into the weights, and so tells whether an instance is asked twice.
    Different,
    /// Ranks whoever holds the role last.
    Flap,
    /// Never returns.
    Loop,
    /// Panics.
    Panic,
    /// Allocates until there is no more.
    Allocate,
    /// Calls itself without end.
    Recurse,
    /// Writes 100,000 lines to the log.
    Log,
    /// Answers with texts that are none.
    Garbage,
    /// Panics in `configure`.
    Configure,
    /// Never returns from `configure`.
    Stuck,
    /// Weights from the bits of what is no number.
    NotANumber,
    /// Weights from sums of fractions.
    Fractions,
    /// Weights from the order of a map that is hashed.
    HashOrder,
    /// Weights from how much memory there is after it grew.
    Growth,
    /// Weights from how deep it can call itself: `steps` times.
    Depth,
    /// Works `steps` steps, then abstains: for the edge of what it may.
    Work,
}

/// What it does.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// What.
    pub act: Act,
    /// Only where a candidate has this name.
    #[serde(default)]
    pub on: String,
    /// For [`Act::Weights`].
    #[serde(default)]
    pub weights: Vec<u16>,
    /// For [`Act::Depth`] and [`Act::Work`].
    #[serde(default)]
    pub steps: u64,
    /// Milliseconds.
    pub min_tenure: Option<u64>,
    /// `never`, `idle` or `now`.
    pub handover: Option<String>,
}

/// The policy.
#[derive(Debug)]
pub struct TestGuest {
    settings: Settings,
}

impl Policy for TestGuest {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, Vec<SettingError>> {
        match settings.act {
            Act::Configure => panic!("told to"),
            Act::Stuck => spin(),
            _ => Ok(Self { settings }),
        }
    }

    fn summary(&self) -> String {
        format!("does {:?} with `{}`", self.settings.act, self.settings.on)
    }

    fn rank(&mut self, view: &View) -> Ranking {
        use peili_policy::election::Handover;
        let Settings { act, on, .. } = &self.settings;
        if !on.is_empty() && !view.candidates.iter().any(|candidate| candidate.name == *on) {
            return Ranking::abstain();
        }
        Ranking {
            min_tenure: self.settings.min_tenure,
            handover: self.settings.handover.as_deref().map(|handover| match handover {
                "never" => Handover::Never,
                "idle" => Handover::Idle,
                _ => Handover::Now,
            }),
            ..self.act(*act, view)
        }
    }
}

impl TestGuest {
    fn act(&self, act: Act, view: &View) -> Ranking {
        let count = view.candidates.len();
        let Settings { weights, steps, .. } = &self.settings;
        match act {
            Act::Abstain | Act::Configure | Act::Stuck => Ranking::abstain(),
            Act::Weights => Ranking::of(weights.iter().copied()),
            Act::Zero => Ranking::of(vec![0; count]),
            Act::Short => Ranking::of(vec![1; count.saturating_sub(1)]),
            Act::Over => Ranking::of(vec![1001; count]),
            Act::Huge => Ranking::of(vec![1; 1_000_000]),
            Act::Different => {
                let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
                Ranking::of(vec![call; count])
            }
            Act::Flap => {
                let holder = view.holder.as_ref().map(|holder| holder.candidate as usize);
                Ranking::of((0..count).map(|index| if Some(index) == holder { 1 } else { 1000 }))
            }
            Act::Loop => spin(),
            Act::Panic => panic!("told to"),
            Act::Allocate => allocate(),
            Act::Recurse => {
                black_box(recurse(black_box(1)));
                Ranking::abstain()
            }
            Act::Log => {
                flood();
                Ranking::abstain()
            }
            Act::Garbage => Ranking { reason: Some(garbage()), ..Ranking::abstain() },
            Act::NotANumber => Ranking::of((0..count).map(not_a_number)),
            Act::Fractions => Ranking::of((0..count).map(fraction)),
            Act::HashOrder => Ranking::of(hash_order(view)),
            Act::Growth => {
                let blocks: Vec<Vec<u8>> = (0..40).map(|block| black_box(vec![block; 100_000])).collect();
                let sum: usize = blocks.iter().map(|block| block.as_ptr() as usize / 64).sum();
                Ranking::of((0..count).map(|index| weight((sum + index) as u64)))
            }
            Act::Depth => Ranking::of((0..count).map(|index| weight(deep(*steps) + index as u64))),
            Act::Work => {
                let sum =
                    (0..*steps).fold(0_u64, |sum, step| black_box(sum.wrapping_mul(31).wrapping_add(step)));
                black_box(sum);
                Ranking::abstain()
            }
        }
    }
}

/// 1 to 1000.
fn weight(from: u64) -> u16 {
    u16::try_from(from % 1000).unwrap_or(0) + 1
}

/// The bits of what is no number come from the machine, unless its host sees to it.
#[allow(clippy::eq_op, reason = "zero by zero is no number")]
fn not_a_number(index: usize) -> u16 {
    let zero = black_box(0.0_f64);
    let negative = black_box(-(index as f64) - 1.0);
    let payload = f64::from_bits(black_box(0xfff8_0000_0000_0000 | index as u64));
    let wild = [
        zero / zero,
        negative.sqrt(),
        payload + 1.0,
        payload * negative,
        zero - payload,
        (payload as f32) as f64,
    ];
    let bits = wild.iter().fold(0_u64, |bits, value| bits.rotate_left(7) ^ value.to_bits());
    weight(bits ^ (bits >> 32))
}

fn fraction(index: usize) -> u16 {
    let mut sum = 0.1_f64;
    for step in 1..=50 {
        let x = black_box((index * 7 + step) as f64);
        sum = (sum * 1.000_1 + 1.0 / x).sqrt() + x.mul_add(1e-9, -sum / 3.0);
    }
    weight(sum.to_bits() ^ (sum.to_bits() >> 29))
}

fn hash_order(view: &View) -> Vec<u16> {
    let names: HashSet<&str> = view.candidates.iter().map(|candidate| candidate.name.as_str()).collect();
    let places: HashMap<&str, u64> = names.iter().zip(1_u64..).map(|(name, place)| (*name, place)).collect();
    view.candidates.iter().map(|candidate| weight(places[candidate.name.as_str()])).collect()
}

#[inline(never)]
fn deep(steps: u64) -> u64 {
    if steps == 0 { black_box(1) } else { black_box(deep(steps - 1)).wrapping_mul(3).wrapping_add(steps) }
}

peili_policy::export_election_policy!(TestGuest);
