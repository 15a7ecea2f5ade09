//! Candidates: live members in a form that all nodes make alike, since rankings are compared.
//!
//! Facts are the members' own signed words, rounded by the member itself, so that no node's clock is in a view but that member's.
//! Decides nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::rendezvous;
use crate::oci::{Digest, PeerId};
use crate::policy::election::{Candidate, EffectiveHash, Reachability};

/// A member that is silent for so long leads nothing any more: it has been asked, and a living one has refuted it by then.
pub(super) const SILENT: Duration = Duration::from_millis(500);
/// The shortest uptime that is told, 17 minutes, and the longest, 12 days, as powers of two of milliseconds: each change is a record
/// for all members.
const UPTIME: std::ops::RangeInclusive<u8> = 20..=30;
/// A load that differs by less than that from the one that was told is not told, in hundredths; nor is one sooner than this: 5,000
/// busy nodes make 3 KiB/s of records so.
const LOAD_STEP: u32 = 25;
const LOAD_PAUSE: Duration = Duration::from_secs(600);
/// A load is averaged over so many samples.
const LOAD_SAMPLES: u32 = 64;

/// Stands for the policies that a node ranks by: the first bytes of [`EffectiveHash`]. Zeros: by the built-in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mark(pub [u8; 16]);

/// A live member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who it is.
    pub id: PeerId,
    /// Its name, claimed; empty: unknown.
    pub name: String,
    /// Its zone, claimed; empty: unknown.
    pub zone: String,
    /// Its version of Peili.
    pub version: String,
    /// What it says of itself.
    pub facts: Facts,
    /// For how long it is silent, if it is suspected.
    pub suspected: Option<Duration>,
}

/// What a member says of itself, as its record has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The policies that it ranks by.
    pub policy: Mark,
    /// Whether it reaches the API server.
    pub api_server: Reachability,
    /// Tenths of its capacity.
    pub load: u8,
    /// It runs for at least 2^this milliseconds; 0: not for long.
    pub uptime: u8,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Live members, sorted by ID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub members: Vec<Member>,
    /// What rendezvous takes each for.
    pub marks: Vec<u64>,
    /// Of all of it but the policies: who has the same one ranks the same candidates.
    pub digest: [u8; 32],
    /// In which a silent member will be too silent.
    pub due: Option<Duration>,
}

/// The load of this node as it is told.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    /// Hundredths of the average, times [`LOAD_SAMPLES`].
    sum: u32,
    told: u8,
    since: Option<Duration>,
}

impl Mark {
    /// Of a node that ranks by these policies.
    pub fn of(hash: &EffectiveHash) -> Self {
        Self(*hash.0.first_chunk().unwrap_or(&[0; 16]))
    }

    /// Whether it stands for the built-in.
    pub fn is_built_in(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Mark {
    /// The first half in hexadecimal; `builtin` for the built-in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_built_in() {
            return f.write_str("builtin");
        }
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An uptime as it is told: it changes at 17 minutes and whenever it has doubled, up to 12 days.
pub(super) fn uptime(uptime: Duration) -> u8 {
    let millis = u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX);
    let power = u8::try_from(millis.checked_ilog2().unwrap_or(0)).unwrap_or(0);
    if power < *UPTIME.start() { 0 } else { power.min(*UPTIME.end()) }
}

impl Load {
    /// Takes a sample, in hundredths, and returns what is told: tenths, which change by a good deal and not often.
    pub(super) fn sample(&mut self, hundredths: u32, now: Duration) -> u8 {
        self.sum = self.sum - self.sum / LOAD_SAMPLES + hundredths.min(100);
        let average = self.sum / LOAD_SAMPLES;
        let differs = average.abs_diff(u32::from(self.told) * 10) >= LOAD_STEP;
        if differs && self.since.is_none_or(|since| now >= since + LOAD_PAUSE) {
            self.told = u8::try_from((average + 5) / 10).unwrap_or(10);
            self.since = Some(now);
        }
        self.told
    }
}

impl View {
    /// The view of these members: without those that are silent for too long, but never without `here`.
    pub(super) fn new(mut members: Vec<Member>, here: &PeerId) -> Self {
        let mut due: Option<Duration> = None;
        members.retain(|member| match member.suspected {
            Some(silent) if member.id != *here => {
                let left = SILENT.saturating_sub(silent);
                if !left.is_zero() {
                    due = Some(due.map_or(left, |due| due.min(left)));
                }
                !left.is_zero()
            }
            _ => true,
        });
        members.sort_by(|a, b| a.id.cmp(&b.id));
        members.dedup_by(|a, b| a.id == b.id);
        let mut bytes = Vec::with_capacity(members.len() * 128);
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_be_bytes());
            bytes.extend(text.as_bytes());
        };
        for Member { id, name, zone, version, facts, suspected: _ } in &members {
            for part in [id.as_str(), name, zone, version] {
                text(&mut bytes, part);
            }
            bytes.extend([facts.api_server as u8, facts.load, facts.uptime, facts.labels.len() as u8]);
            for (key, value) in &facts.labels {
                text(&mut bytes, key);
                text(&mut bytes, value);
            }
        }
        let digest = *Digest::sha256(&bytes).as_bytes().first_chunk().unwrap_or(&[0; 32]);
        let marks = members.iter().map(|member| rendezvous::mark(member.id.as_str())).collect();
        Self { members, marks, digest, due }
    }

    /// What policies rank.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let candidate = |member: &Member| Candidate {
            name: member.name.clone(),
            version: member.version.clone(),
            zone: Some(member.zone.clone()).filter(|zone| !zone.is_empty()),
            labels: member.facts.labels.clone(),
            load: member.facts.load,
            uptime: match member.facts.uptime {
                0 => Duration::ZERO,
                power => Duration::from_millis(1_u64.checked_shl(power.into()).unwrap_or(u64::MAX)),
            },
            api_server: member.facts.api_server,
        };
        self.members.iter().map(candidate).collect()
    }

    /// The place of a member.
    pub(super) fn place(&self, id: &PeerId) -> Option<usize> {
        self.members.binary_search_by(|member| member.id.cmp(id)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uptime_changes_seldom() {
        let told = |seconds: u64| uptime(Duration::from_secs(seconds));
        assert_eq!([told(0), told(1048), told(1049), told(2097), told(2098)], [0, 0, 20, 20, 21]);
        assert_eq!([told(1 << 40), told(u64::MAX / 1000)], [30, 30]);
        let changes = (1..86_400).filter(|second| told(*second) != told(second - 1)).count();
        assert_eq!(changes, 7, "of the first day");
    }

    /// Guards both rules of `Load::sample`.
    #[test]
    fn a_load_is_told_when_it_has_really_changed_and_not_often() {
        let mut load = Load::default();
        let mut changes: Vec<(u64, u8)> = Vec::new();
        let mut run = |seconds: std::ops::Range<u64>, value: fn(u64) -> u32| {
            for second in seconds {
                let told = load.sample(value(second), Duration::from_secs(second));
                if told != changes.last().map_or(0, |(_, told)| *told) {
                    changes.push((second, told));
                }
            }
            changes.clone()
        };
        let none = run(0..1200, |second| if second % 2 == 0 { 0 } else { 40 });
        assert!(none.is_empty(), "{none:?}");
        let all = run(1200..6000, |second| if second / 300 % 2 == 0 { 100 } else { 0 });
        assert!(!all.is_empty() && all.windows(2).all(|two| two[1].0 - two[0].0 >= 600), "{all:?}");
        assert!(run(6000..9000, |_| 100).last().unwrap().1 >= 8, "in the end it is told");
    }
}
