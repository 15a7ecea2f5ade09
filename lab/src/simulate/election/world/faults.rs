//! Troubles as they begin.

use peili::election::lease::{Desk, Input, Standing};
use rand::RngExt;

use super::super::clock::Micros;
use super::super::schedule::{Event, Fault, SECOND, Target};
use super::{Happening, SHORT, World};

impl World {
    pub(super) fn fault(&mut self, event: Event) {
        let leader = self.valid().next().unwrap_or(0);
        let index = match event.target {
            Target::Leader => leader,
            Target::Process(index) => index,
        };
        let until = event.until;
        match event.fault {
            Fault::Partition { requests, answers } => {
                let cut = &mut self.processes[index].cut;
                if requests {
                    cut.0 = cut.0.max(until);
                }
                if answers {
                    cut.1 = cut.1.max(until);
                }
                // What is on a connection that goes away is noticed by nobody.
                self.processes[index].watching = false;
                self.push(until, Happening::Reachable(index));
            }
            Fault::Slow => self.processes[index].slow = until,
            Fault::Outage => self.outage = self.outage.max(until),
            Fault::Errors(trouble) => self.trouble = (until, trouble),
            Fault::Pause => {
                self.outcome.pauses += 1;
                let process = &mut self.processes[index];
                process.stands_until = process.stands_until.max(until);
            }
            Fault::Stop => {
                let (now, process) = (self.now, &mut self.processes[index]);
                if process.stands_until <= now {
                    process.stands_until = until;
                    process.clock.stood_still(now, until);
                }
            }
            Fault::Crash => self.end(index, until),
            Fault::Shutdown if self.processes[index].stands_until <= self.now => {
                if self.processes[index].alive {
                    self.input(index, Input::Leave(true));
                    // Like a program that is given time to end, or not.
                    let time = self.schedule.random.random_range(0..3 * SECOND);
                    let end = Event {
                        at: 0,
                        until: until + time,
                        target: Target::Process(index),
                        fault: Fault::Crash,
                    };
                    self.schedule.events.push(end);
                    self.push(self.now + time, Happening::Fault(self.schedule.events.len() - 1));
                }
            }
            Fault::Delete { again } => {
                self.outcome.deletions += 1;
                let change = self.register.delete();
                self.tell(change);
                if again {
                    let at = self.now + self.schedule.random.random_range(1_000..2 * SECOND);
                    self.push(at, Happening::Recreate);
                }
            }
            Fault::Label => {
                let change = self.register.edit(|_| {});
                self.tell(change);
            }
            Fault::Clear => {
                let change = self.register.edit(|record| record.holder = "".into());
                self.tell(change);
            }
            Fault::Strip => {
                let change = self.register.edit(|record| record.mark = None);
                self.tell(change);
            }
            Fault::Rank => {
                let other = self.schedule.random.random_range(0..self.processes.len());
                let (one, two) = (self.processes[index].standing, self.processes[other].standing);
                self.rank(index, two);
                self.rank(other, one);
            }
            Fault::Yield => self.told(index, Input::Leave(false)),
            Fault::Shorten => self.told(index, Input::Configured(SHORT)),
            Fault::Shutdown => {}
        }
    }

    fn told(&mut self, index: usize, input: Input) {
        let process = &self.processes[index];
        if process.alive && process.stands_until <= self.now {
            self.input(index, input);
        }
    }

    /// A rank stays: who stands still hears of it later, and who died starts with it. Were it lost, all could believe
    /// that they only observe.
    fn rank(&mut self, index: usize, standing: Standing) {
        let process = &mut self.processes[index];
        process.standing = standing;
        let (life, at) = (process.life, process.stands_until);
        if at > self.now {
            self.push(at, Happening::Ranked(index, life));
        } else {
            self.told(index, Input::Ranked(standing));
        }
    }

    fn end(&mut self, index: usize, until: Micros) {
        let process = &mut self.processes[index];
        if !process.alive {
            return;
        }
        process.alive = false;
        process.works = false;
        process.term = None;
        process.desk = Desk::default();
        process.watching = false;
        process.stands_until = 0;
        self.push(until.min(self.schedule.healed.max(self.now + 1)), Happening::Start(index));
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::super::super::elector::Variant;
    use super::super::super::schedule::{Schedule, Weather};
    use super::*;

    /// Some of them lost their ranks, and then nobody was a candidate (seed 438511 of the drawn schedules).
    #[test]
    fn who_stood_still_hears_of_its_rank() {
        let event = |at: Micros, fault: Fault, index: usize| Event {
            at: at * SECOND,
            until: 12 * SECOND,
            target: Target::Process(index),
            fault,
        };
        for seed in 0..50 {
            let outcome = World::new(
                Variant::Shipped,
                Schedule {
                    candidates: 2,
                    observers: 1,
                    rates: vec![1_000_000; 3],
                    weather: Weather::FINE,
                    events: vec![
                        event(8, Fault::Pause, 2),
                        event(9, Fault::Rank, 2),
                        event(10, Fault::Pause, 1),
                        event(11, Fault::Rank, 0),
                    ],
                    healed: 18 * SECOND,
                    has_stops: false,
                    random: SmallRng::seed_from_u64(seed),
                },
            )
            .run();
            assert!(!outcome.is_violated(), "{seed}: {outcome:?}");
        }
    }
}
