//! What goes wrong, and when: drawn from a seed.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::clock::Micros;

pub(super) const SECOND: Micros = 1_000_000;
/// Rates of clocks are wrong by so much at most.
const RATE_ERROR: u64 = 100_000;
/// A request may take so long to be carried out, or its answer to come.
const HANG: Micros = 22 * SECOND;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// A node and the API server do not reach each other: requests, answers, or both.
    Partition { requests: bool, answers: bool },
    /// Answers to a node take almost as long as it waits for them.
    Slow,
    /// Nobody reaches the API server.
    Outage,
    /// The API server answers with errors.
    Errors(Trouble),
    /// A process stands still, and its clock does not.
    Pause,
    /// A machine stands still, with its clock.
    Stop,
    /// A process dies; another one starts later.
    Crash,
    /// The object is deleted, and made anew by an operator after a while or not.
    Delete { again: bool },
    /// Somebody adds a label.
    Label,
    /// `kubectl apply` of the object as it was at first: without a holder, other annotations left alone.
    Clear,
    /// `kubectl replace` without Peili's annotation.
    Strip,
    /// The leader is asked to give the lease away.
    Yield,
    /// A process ends in order; another one starts later.
    Shutdown,
    /// The policy ranks anew.
    Rank,
    /// A process gets a shorter duration.
    Shorten,
}

/// How the API server fails.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    /// 429.
    TooMany,
    /// 403.
    Forbidden,
    /// 5xx, and nothing was done.
    Refused,
    /// 5xx, and it was done all the same.
    Done,
}

/// Who.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// Who leads then; the first, if nobody does.
    Leader,
    Process(usize),
}

/// When what happens to whom, and until when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) at: Micros,
    pub(super) until: Micros,
    pub(super) target: Target,
    pub(super) fault: Fault,
}

/// How messages travel: thousandths of them that are slow, that hang, that get lost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    slow: u32,
    hung: u32,
    lost: u32,
    fast: Micros,
}

/// What comes of a message.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    After(Micros),
    Lost,
}

impl Weather {
    pub(super) const FINE: Self = Self { slow: 0, hung: 0, lost: 0, fast: 5_000 };

    pub(super) fn fate(&self, random: &mut SmallRng) -> Fate {
        let draw = random.random_range(0..1_000);
        let fast = random.random_range(200..=self.fast);
        if draw < self.lost {
            Fate::Lost
        } else if draw < self.lost + self.hung {
            Fate::After(random.random_range(SECOND..HANG))
        } else if draw < self.lost + self.hung + self.slow {
            Fate::After(random.random_range(fast..SECOND * 6 / 5))
        } else {
            Fate::After(fast)
        }
    }
}

/// One course of events.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    pub(super) candidates: usize,
    pub(super) observers: usize,
    /// Millionths, one for each process.
    pub(super) rates: Vec<u64>,
    pub(super) weather: Weather,
    pub(super) events: Vec<Event>,
    /// From here on all is well.
    pub(super) healed: Micros,
    /// A clock stood still.
    pub(super) has_stops: bool,
    /// Of all else that is random.
    pub(super) random: SmallRng,
}

impl Schedule {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let candidates = random.random_range(2..=4);
        let observers = random.random_range(0..=1);
        let rates = (0..candidates + observers).map(|_| rate(&mut random)).collect();
        let weather = match random.random_range(0..4) {
            0 => Weather::FINE,
            1 => Weather { slow: 200, hung: 10, lost: 10, fast: 30_000 },
            2 => Weather { slow: 400, hung: 60, lost: 60, fast: 100_000 },
            _ => Weather { slow: 50, hung: 150, lost: 20, fast: 5_000 },
        };
        let healed = random.random_range(18 * SECOND..32 * SECOND);
        let mut events = Vec::new();
        let mut before = None;
        for _ in 0..random.random_range(1..=6) {
            let event = event(&mut random, candidates + observers, healed, before);
            before = Some(event.at);
            events.push(event);
            if matches!(event.fault, Fault::Partition { requests: true, .. }) && random.random() {
                // The last answers before it come late.
                let at = event.at - 2 * SECOND;
                events.push(Event { at, until: event.at, target: event.target, fault: Fault::Slow });
            }
            if matches!(event.fault, Fault::Shorten) && random.random() {
                // The moment that matters: the others have seen it, and the leader is not told so.
                let at = event.at + random.random_range(0..SECOND);
                let until = (at + random.random_range(3 * SECOND..10 * SECOND)).min(healed);
                let fault = Fault::Partition { requests: false, answers: true };
                events.push(Event { at, until, target: event.target, fault });
            }
        }
        events.sort_by_key(|event| event.at);
        let has_stops = events.iter().any(|event| matches!(event.fault, Fault::Stop));
        Self { candidates, observers, rates, weather, events, healed, has_stops, random }
    }
}

/// The extremes are where it matters.
fn rate(random: &mut SmallRng) -> u64 {
    match random.random_range(0..4) {
        0 => 1_000_000 - RATE_ERROR,
        1 => 1_000_000 + RATE_ERROR,
        _ => random.random_range(1_000_000 - RATE_ERROR..=1_000_000 + RATE_ERROR),
    }
}

/// Troubles come together: half of them soon after the one before.
fn event(random: &mut SmallRng, processes: usize, healed: Micros, before: Option<Micros>) -> Event {
    let last = healed - 4 * SECOND;
    let at = match before {
        Some(before) if random.random() => (before + random.random_range(0..2 * SECOND)).min(last),
        Some(_) | None => random.random_range(7 * SECOND..last),
    };
    let until = (at + random.random_range(SECOND / 5..12 * SECOND)).min(healed);
    let target = if random.random_range(0..10) < 6 {
        Target::Leader
    } else {
        Target::Process(random.random_range(0..processes))
    };
    let fault = match random.random_range(0..100) {
        0..22 => {
            let (requests, answers) = match random.random_range(0..4) {
                0 => (true, false),
                1 => (false, true),
                _ => (true, true),
            };
            Fault::Partition { requests, answers }
        }
        22..27 => Fault::Outage,
        27..37 => Fault::Errors(match random.random_range(0..4) {
            0 => Trouble::TooMany,
            1 => Trouble::Forbidden,
            2 => Trouble::Refused,
            _ => Trouble::Done,
        }),
        37..52 => Fault::Pause,
        52..54 => Fault::Stop,
        54..62 => Fault::Crash,
        62..70 => Fault::Delete { again: random.random() },
        70..74 => Fault::Label,
        74..77 => Fault::Clear,
        77..79 => Fault::Strip,
        79..85 => Fault::Yield,
        85..90 => Fault::Shutdown,
        90..94 => Fault::Rank,
        _ => Fault::Shorten,
    };
    Event { at, until, target, fault }
}
