//! The last causes of not serving, for `peili status`: few, and equal ones counted instead of repeated.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Causes that are kept.
const KEPT: usize = 50;

/// Why something was not served, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cause {
    /// When it happened last, in seconds of Unix time.
    pub time: u64,
    /// What was asked for: `manifest`, `blob` or `other`.
    pub kind: String,
    /// Why it was not served, as in the metrics.
    pub cause: String,
    /// The image, or another short text that says what was asked for.
    pub subject: String,
    /// How often in a row of causes that is still kept.
    pub count: u64,
}

/// The last 50 causes.
#[derive(Debug, Default)]
pub struct Causes {
    last: Mutex<VecDeque<Cause>>,
}

impl Causes {
    /// Notes that `subject` was not served now.
    pub fn note(&self, kind: &str, cause: &str, subject: &str) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.note_at(time, kind, cause, subject);
    }

    /// The causes, the latest first.
    pub fn last(&self) -> Vec<Cause> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn note_at(&self, time: u64, kind: &str, cause: &str, subject: &str) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            last.iter().position(|old| old.kind == kind && old.cause == cause && old.subject == subject);
        let entry = match same.and_then(|index| last.remove(index)) {
            Some(old) => Cause { time, count: old.count.saturating_add(1), ..old },
            None => {
                last.truncate(KEPT - 1);
                Cause { time, kind: kind.into(), cause: cause.into(), subject: subject.into(), count: 1 }
            }
        };
        last.push_front(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_causes_are_counted_and_the_oldest_is_dropped() {
        let causes = Causes::default();
        for number in 0..60 {
            causes.note_at(number, "blob", "unknown", &format!("a/{number}"));
        }
        causes.note_at(100, "blob", "unknown", "a/10");
        causes.note_at(101, "blob", "deadline", "a/10");
        let last = causes.last();
        assert_eq!(last.len(), KEPT);
        let short = |index: usize| {
            let cause = &last[index];
            (cause.time, cause.cause.as_str(), cause.subject.as_str(), cause.count)
        };
        assert_eq!(short(0), (101, "deadline", "a/10", 1));
        assert_eq!(short(1), (100, "unknown", "a/10", 2));
        assert_eq!(short(2), (59, "unknown", "a/59", 1));
        assert_eq!(short(KEPT - 1), (12, "unknown", "a/12", 1));
    }
}
