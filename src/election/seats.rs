//! The seats of a ranked role: who sits stays for a while, so that a role does not flap where rankings do.

use std::time::Duration;

use crate::oci::PeerId;

/// So long others must stay the best before they follow those who sit.
pub(super) const BEST_FOR: Duration = Duration::from_secs(5);

/// Who sits, and who would.
#[derive(Debug, Default)]
pub(super) struct Seats {
    /// Since when.
    held: Vec<(PeerId, Duration)>,
    /// The best, sorted, and since when they are the same.
    challengers: Option<(Vec<PeerId>, Duration)>,
}

impl Seats {
    /// Who sits now, given the best, and when to look again. Who is no longer `eligible` is replaced at once; who is not the best any
    /// more sits until the same others have been the best for [`BEST_FOR`] and its tenure is over. `settled`: that the best are taken
    /// from all there are; before that they are taken as they come.
    pub(super) fn take(
        &mut self,
        best: &[PeerId],
        now: Duration,
        tenure: Duration,
        settled: bool,
        eligible: impl Fn(&PeerId) -> bool,
    ) -> (Vec<PeerId>, Option<Duration>) {
        self.held.retain(|(id, _)| eligible(id));
        if !settled {
            self.seat(best, now);
        }
        self.held.truncate(best.len());
        for id in best {
            if self.held.len() < best.len() && self.held.iter().all(|(held, _)| held != id) {
                self.held.push((id.clone(), now));
            }
        }
        let mut sorted = best.to_vec();
        sorted.sort();
        let leaving = self.held.iter().filter(|(id, _)| !best.contains(id));
        let due = match leaving.map(|(_, since)| *since + tenure).max() {
            None => {
                self.challengers = None;
                None
            }
            Some(end) => {
                let same = self.challengers.take().filter(|(challengers, _)| *challengers == sorted);
                let since = same.map_or(now, |(_, since)| since);
                let at = end.max(since + BEST_FOR);
                if now >= at {
                    self.seat(best, now);
                    None
                } else {
                    self.challengers = Some((sorted, since));
                    Some(at)
                }
            }
        };
        (self.held.iter().map(|(id, _)| id.clone()).collect(), due)
    }

    fn seat(&mut self, best: &[PeerId], now: Duration) {
        let since =
            |id: &PeerId| self.held.iter().find(|(held, _)| held == id).map_or(now, |(_, since)| *since);
        self.held = best.iter().map(|id| (id.clone(), since(id))).collect();
        self.challengers = None;
    }
}

#[cfg(test)]
mod tests {
    use super::super::roles::tests::id;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_sits_stays_until_others_have_been_better_for_a_while() {
        let mut seats = Seats::default();
        let mut take = |second: u32, best: &[u32], gone: Option<u32>| {
            let best: Vec<PeerId> = best.iter().map(|n| id(*n)).collect();
            let (held, due) = seats.take(&best, second * SECOND, Duration::ZERO, true, |who| {
                gone.is_none_or(|gone| id(gone) != *who)
            });
            let held: Vec<u32> = held.iter().map(|who| (0..9).find(|n| id(*n) == *who).unwrap()).collect();
            (held, due.map(|due| due.as_secs()))
        };
        assert_eq!(take(0, &[1, 2], None), (vec![1, 2], None));
        assert_eq!(take(1, &[3, 1], None), (vec![1, 2], Some(6)), "a better one waits");
        assert_eq!(take(4, &[1, 3], None), (vec![1, 2], Some(6)), "in whatever order");
        assert_eq!(take(5, &[1, 4], None), (vec![1, 2], Some(10)), "another one begins to wait");
        assert_eq!(take(6, &[1, 2], None), (vec![1, 2], None));
        assert_eq!(take(7, &[1, 4], None).1, Some(12), "and does so anew");
        assert_eq!(take(12, &[1, 4], None), (vec![1, 4], None));
        assert_eq!(take(13, &[4, 5], Some(1)), (vec![4, 5], None), "who is gone is replaced at once");
        assert_eq!(take(14, &[4], None), (vec![4], None), "fewer seats");
    }

    #[test]
    fn a_tenure_is_served_and_a_start_is_no_tenure() {
        let mut seats = Seats::default();
        let tenure = 30 * SECOND;
        assert_eq!(seats.take(&[id(1)], Duration::ZERO, tenure, false, |_| true).0, [id(1)]);
        assert_eq!(seats.take(&[id(2)], SECOND, tenure, false, |_| true).0, [id(2)], "not yet settled");
        let (held, due) = seats.take(&[id(3)], 2 * SECOND, tenure, true, |_| true);
        assert_eq!((held, due), (vec![id(2)], Some(31 * SECOND)));
        assert_eq!(seats.take(&[id(3)], 31 * SECOND, tenure, true, |_| true).0, [id(3)]);
    }
}
