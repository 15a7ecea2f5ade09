//! Processes, the API server between them, and all that is on its way; what must hold is checked at each step.

mod faults;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use peili::election::lease::{
    Answer, Desk, Input, Leadership, Ms, Output, Request, RequestId, Role, Settings, Standing, Token, Write,
};
use rand::RngExt;

use super::clock::{Clock, Micros};
use super::elector::{Elector, Variant};
use super::register::{Change, Register};
use super::schedule::{Fate, SECOND, Schedule, Trouble, Weather};

/// Between two effects of a leader's work.
const WORK: Micros = 400_000;
/// Work that asks once is done so long.
const TASK: Micros = 3 * SECOND;
/// The longest that healing may take before the run is given up.
const PATIENCE: Micros = 25 * SECOND;
/// What is published at first, and what a process may be told to shorten it to.
const LONG: Settings = Settings::FAST;
const SHORT: Settings = Settings::new(3_000, 800);

/// What one run came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// S1: the guards of two processes said yes at once, or work went on under another's.
    pub(super) overlaps: u64,
    /// The same where a clock had stopped: allowed.
    pub(super) excused: u64,
    /// S2: a token that is not its holder's, or one that went back at the sink.
    pub(super) tokens: u64,
    /// S8: a release while work went on.
    pub(super) early_releases: u64,
    /// S10: no leader, or more than one, long after all was well.
    pub(super) stuck: u64,
    /// Writes that would take the lease from another.
    pub(super) takeovers: u64,
    /// Writes that were carried out after their sender had given up on them.
    pub(super) late: u64,
    pub(super) conflicts: u64,
    pub(super) pauses: u64,
    pub(super) deletions: u64,
    pub(super) terms: u64,
    /// Effects that the sink refused.
    pub(super) fenced: u64,
    /// From when all was well to a leader.
    pub(super) healing: Option<Micros>,
}

impl Outcome {
    pub(super) fn is_violated(&self) -> bool {
        self.overlaps + self.tokens + self.early_releases + self.stuck > 0
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.overlaps += other.overlaps;
        self.excused += other.excused;
        self.tokens += other.tokens;
        self.early_releases += other.early_releases;
        self.stuck += other.stuck;
        self.takeovers += other.takeovers;
        self.late += other.late;
        self.conflicts += other.conflicts;
        self.pauses += other.pauses;
        self.deletions += other.deletions;
        self.terms += other.terms;
        self.fenced += other.fenced;
    }
}

struct Process {
    elector: Box<dyn Elector>,
    identity: Arc<str>,
    desk: Desk,
    clock: Clock,
    standing: Standing,
    alive: bool,
    /// Which of the processes that had this place.
    life: u32,
    /// Stands still until then, and since when its clock does.
    stands_until: Micros,
    term: Option<Leadership>,
    works: bool,
    /// Of work that asks once.
    task_until: Micros,
    deadlines: HashMap<RequestId, Micros>,
    timer: u64,
    cut: (Micros, Micros),
    /// Answers take almost as long as they are waited for, until then.
    slow: Micros,
    watching: bool,
    /// A watch keeps the order.
    watched: Micros,
}

enum Happening {
    Fault(usize),
    Start(usize),
    Timer(usize, u64),
    Request(usize, u32, RequestId, Request),
    Answer(usize, u32, RequestId, Answer),
    WatchOpened(usize, u32, u64),
    Watched(usize, u32, Change),
    WatchBroken(usize, u32),
    Work(usize, u32),
    Joined(usize, u32),
    Ranked(usize, u32),
    Effect(Token),
    Recreate,
    Reachable(usize),
}

struct Item(Micros, u64, Happening);

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Item {}
impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Item {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// All of it.
struct World {
    variant: Variant,
    schedule: Schedule,
    now: Micros,
    queue: BinaryHeap<Reverse<Item>>,
    count: u64,
    processes: Vec<Process>,
    register: Register,
    outage: Micros,
    trouble: (Micros, Trouble),
    sink: Option<Token>,
    outcome: Outcome,
}

/// Runs the schedule of this seed.
pub(super) fn run(variant: Variant, seed: u64) -> Outcome {
    World::new(variant, Schedule::new(seed)).run()
}

impl World {
    fn new(variant: Variant, schedule: Schedule) -> Self {
        Self {
            variant,
            now: 0,
            queue: BinaryHeap::new(),
            count: 0,
            processes: Vec::new(),
            register: Register::default(),
            outage: 0,
            trouble: (0, Trouble::Refused),
            sink: None,
            outcome: Outcome::default(),
            schedule,
        }
    }

    fn run(mut self) -> Outcome {
        self.go();
        self.outcome
    }

    fn go(&mut self) {
        let count = self.schedule.candidates + self.schedule.observers;
        for index in 0..count {
            let standing = if index < self.schedule.candidates {
                Standing::Candidate(u32::try_from(index).unwrap_or(0))
            } else {
                Standing::Observer(5_000)
            };
            let clock = Clock::new(self.schedule.rates[index], self.schedule.random.random_range(1..1 << 40));
            let process = self.process(index, 0, standing, clock);
            self.processes.push(process);
            let at = self.schedule.random.random_range(0..SECOND);
            self.push(at, Happening::Start(index));
            let reachable = self.schedule.healed + self.schedule.random.random_range(0..SECOND);
            self.push(reachable, Happening::Reachable(index));
        }
        for index in 0..self.schedule.events.len() {
            self.push(self.schedule.events[index].at, Happening::Fault(index));
        }
        let healed = self.schedule.healed;
        while let Some(Reverse(Item(at, _, happening))) = self.queue.pop() {
            self.now = at;
            if at >= healed {
                let valid = self.valid().count();
                if valid == 1 && self.outcome.healing.is_none() {
                    self.outcome.healing = Some(at - healed);
                }
                // Long enough for what was on its way to do harm.
                if valid == 1 && at > healed + 3 * SECOND {
                    return;
                }
                if at > healed + PATIENCE {
                    self.outcome.stuck += 1;
                    return;
                }
            }
            self.happen(happening);
        }
    }

    fn process(&mut self, index: usize, life: u32, standing: Standing, clock: Clock) -> Process {
        let identity: Arc<str> = format!("node-{index}/{life}").into();
        let seed = self.schedule.random.random();
        Process {
            elector: self.variant.elector(&identity, LONG, standing, seed),
            identity,
            desk: Desk::default(),
            clock,
            standing,
            alive: true,
            life,
            stands_until: 0,
            term: None,
            works: false,
            task_until: 0,
            deadlines: HashMap::new(),
            timer: 0,
            cut: (0, 0),
            slow: 0,
            watching: false,
            watched: 0,
        }
    }

    fn push(&mut self, at: Micros, happening: Happening) {
        self.count += 1;
        self.queue.push(Reverse(Item(at, self.count, happening)));
    }

    /// Whose guards say yes.
    fn valid(&self) -> impl Iterator<Item = usize> {
        self.processes
            .iter()
            .enumerate()
            .filter(|(_, process)| process.is_valid(self.now))
            .map(|(index, _)| index)
    }

    fn happen(&mut self, happening: Happening) {
        // Whoever stands still gets it later.
        let (index, life) = match &happening {
            Happening::Start(index) | Happening::Reachable(index) => (*index, None),
            Happening::Timer(index, number) if self.processes[*index].timer == *number => (*index, None),
            Happening::Timer(..) => return,
            Happening::Answer(index, life, ..)
            | Happening::Watched(index, life, _)
            | Happening::WatchBroken(index, life)
            | Happening::Work(index, life)
            | Happening::Joined(index, life)
            | Happening::Ranked(index, life) => (*index, Some(*life)),
            Happening::Fault(index) => return self.fault(self.schedule.events[*index]),
            Happening::Request(index, life, id, request) => return self.serve(*index, *life, *id, request),
            Happening::WatchOpened(index, life, version) => return self.opened(*index, *life, *version),
            Happening::Effect(token) => return self.effect(token.clone()),
            Happening::Recreate => {
                let change = self.register.create();
                return self.tell(change);
            }
        };
        let process = &self.processes[index];
        if life.is_some_and(|life| life != process.life)
            || (!process.alive && !matches!(happening, Happening::Start(_)))
        {
            return;
        }
        if process.stands_until > self.now {
            return self.push(process.stands_until, happening);
        }
        match happening {
            Happening::Start(_) => self.start(index),
            Happening::Reachable(_) => self.input(index, Input::Reread),
            Happening::Timer(..) => self.input(index, Input::Tick),
            Happening::Answer(_, _, id, answer) => self.answered(index, id, answer),
            Happening::Watched(_, _, Change::Now(object)) => self.input(index, Input::Seen(object)),
            Happening::Watched(_, _, Change::Gone(version)) => self.input(index, Input::Gone(version)),
            Happening::WatchBroken(..) => {
                self.processes[index].watching = false;
                self.input(index, Input::Reread);
            }
            Happening::Work(..) => self.work(index),
            Happening::Joined(..) => {
                self.processes[index].works = false;
                self.input(index, Input::Joined);
            }
            // By now it may be another one than when this was sent.
            Happening::Ranked(..) => self.input(index, Input::Ranked(self.processes[index].standing)),
            Happening::Fault(_)
            | Happening::Request(..)
            | Happening::WatchOpened(..)
            | Happening::Effect(_)
            | Happening::Recreate => {}
        }
    }

    fn start(&mut self, index: usize) {
        if !self.processes[index].alive {
            let (life, standing) = (self.processes[index].life + 1, self.processes[index].standing);
            let clock = self.processes[index].clock.clone();
            self.processes[index] = self.process(index, life, standing, clock);
        }
        self.input(index, Input::Tick);
    }

    fn answered(&mut self, index: usize, id: RequestId, answer: Answer) {
        let is_read = matches!(answer, Answer::Object(_) | Answer::Absent);
        let version = match &answer {
            Answer::Object(object) => object.version,
            _ => 0,
        };
        self.input(index, Input::Answer(id, answer));
        let process = &mut self.processes[index];
        if is_read && !process.watching && matches!(process.standing, Standing::Candidate(_)) {
            process.watching = true;
            let life = process.life;
            if let Some(at) = self.travel(index, true) {
                self.push(at, Happening::WatchOpened(index, life, version));
            } else {
                self.break_watch(index);
            }
        }
    }

    fn input(&mut self, index: usize, input: Input) {
        let leaves = matches!(input, Input::Leave(_));
        let process = &mut self.processes[index];
        let outputs = process.elector.input(process.clock.at(self.now), input);
        let life = process.life;
        let mut ends = leaves && process.works;
        for output in outputs {
            match output {
                Output::Role(role) => {
                    ends |= matches!(role, Role::Ended(_));
                    self.role(index, &role);
                }
                Output::Send(id, request) => self.send(index, id, request),
            }
        }
        if ends {
            // Work takes a while to end.
            let mut at = self.now + self.schedule.random.random_range(1_000..800_000);
            if self.variant == Variant::GuardOnce {
                at = at.max(self.processes[index].task_until);
            }
            self.push(at, Happening::Joined(index, life));
        }
        let process = &mut self.processes[index];
        process.timer += 1;
        let (timer, next) = (process.timer, process.elector.next());
        if let Some(next) = next.filter(|next| *next < Ms::MAX) {
            let at = process.clock.when(next).max(self.now + 1);
            self.push(at, Happening::Timer(index, timer));
        }
    }

    fn role(&mut self, index: usize, role: &Role) {
        let process = &mut self.processes[index];
        if let Some(begun) = process.desk.apply(role) {
            self.outcome.terms += 1;
            let token = begun.token().clone();
            let is_right = self.register.begun.contains(&(token.version, process.identity.clone()));
            process.term = Some(begun);
            process.works = true;
            process.task_until = 0;
            let life = process.life;
            if !is_right {
                self.outcome.tokens += 1;
            }
            self.push(self.now, Happening::Work(index, life));
        }
        if matches!(role, Role::Leader(..)) && self.valid().count() > 1 {
            self.overlap();
        }
    }

    fn overlap(&mut self) {
        if self.schedule.has_stops {
            self.outcome.excused += 1;
        } else {
            self.outcome.overlaps += 1;
        }
    }

    /// One effect of the leader's work.
    fn work(&mut self, index: usize) {
        let now = self.now;
        let is_valid = self.processes[index].is_valid(now);
        let process = &mut self.processes[index];
        if !process.works {
            return;
        }
        let acts = match self.variant {
            Variant::GuardOnce => {
                if is_valid && process.task_until <= now {
                    process.task_until = now + TASK;
                }
                now < process.task_until
            }
            _ => is_valid,
        };
        let (life, term) = (process.life, process.term.clone());
        if acts && let Some(term) = term {
            if self.valid().any(|other| other != index) {
                self.overlap();
            }
            // An effect travels too, and may come long after its guard was asked.
            if let Fate::After(time) = self.schedule.weather.fate(&mut self.schedule.random) {
                self.push(now + time, Happening::Effect(term.token().clone()));
            }
        }
        self.push(now + WORK, Happening::Work(index, life));
    }

    /// At the sink, which takes no lower token than the highest that it has seen.
    fn effect(&mut self, token: Token) {
        match &self.sink {
            Some(highest) if token < *highest => self.outcome.fenced += 1,
            Some(highest) if token.version == highest.version && token != *highest => {
                self.outcome.tokens += 1;
            }
            _ => self.sink = Some(token),
        }
    }

    fn weather(&self) -> Weather {
        if self.now >= self.schedule.healed { Weather::FINE } else { self.schedule.weather }
    }

    /// When a message arrives, to the API server or from it.
    fn travel(&mut self, index: usize, to_server: bool) -> Option<Micros> {
        let weather = self.weather();
        let Fate::After(mut time) = weather.fate(&mut self.schedule.random) else { return None };
        if !to_server && self.now < self.processes[index].slow {
            time = self.schedule.random.random_range(SECOND * 7 / 10..SECOND * 9 / 10);
        }
        let (requests, answers) = self.processes[index].cut;
        let closed = self.outage.max(if to_server { requests } else { answers });
        let mut at = self.now + time;
        if self.now < closed {
            // What is not lost is sent again, and arrives once the way is free.
            if self.schedule.random.random() {
                return None;
            }
            at += closed - self.now;
        }
        Some(at.min(self.schedule.healed.max(self.now) + SECOND))
    }

    fn send(&mut self, index: usize, id: RequestId, request: Request) {
        if let Request::Put(write) = &request
            && write.begins
            && self.register.object.as_ref().is_some_and(|object| {
                let holder = &object.record.holder;
                !holder.is_empty() && *holder != write.holder
            })
        {
            self.outcome.takeovers += 1;
        }
        let process = &mut self.processes[index];
        let life = process.life;
        process.deadlines.insert(id, self.now + SECOND);
        if let Some(at) = self.travel(index, true) {
            self.push(at, Happening::Request(index, life, id, request));
        }
    }

    /// At the API server.
    fn serve(&mut self, index: usize, life: u32, id: RequestId, request: &Request) {
        let (until, trouble) = self.trouble;
        let is_troubled = self.now < until;
        let (answer, change) = match trouble {
            Trouble::TooMany if is_troubled => {
                (Answer::Rejected(Some(self.schedule.random.random_range(500..8_000))), None)
            }
            Trouble::Forbidden if is_troubled => (Answer::Rejected(None), None),
            Trouble::Refused if is_troubled => (Answer::Unknown, None),
            Trouble::Done if is_troubled => (Answer::Unknown, self.register.handle(request).1),
            _ => self.register.handle(request),
        };
        self.outcome.conflicts += u64::from(matches!(answer, Answer::Conflict));
        let process = &self.processes[index];
        if change.is_some() {
            let is_late = process.life != life
                || process.deadlines.get(&id).is_some_and(|deadline| *deadline < self.now);
            self.outcome.late += u64::from(is_late);
            if let Request::Put(Write { mark, .. }) = request
                && mark.released
                && process.life == life
                && process.works
            {
                self.outcome.early_releases += 1;
            }
        }
        self.tell(change);
        if let Some(at) = self.travel(index, false) {
            self.push(at, Happening::Answer(index, life, id, answer));
        }
    }

    /// To all who watch.
    fn tell(&mut self, change: Option<Change>) {
        let Some(change) = change else { return };
        for index in 0..self.processes.len() {
            if self.processes[index].watching && self.processes[index].alive {
                self.tell_one(index, change.clone());
            }
        }
    }

    fn tell_one(&mut self, index: usize, change: Change) {
        let Some(at) = self.travel(index, false) else { return self.break_watch(index) };
        let process = &mut self.processes[index];
        process.watched = process.watched.max(at);
        let (at, life) = (process.watched, process.life);
        self.push(at, Happening::Watched(index, life, change));
    }

    /// Its end is noticed some time later.
    fn break_watch(&mut self, index: usize) {
        let life = self.processes[index].life;
        let at = self.now + self.schedule.random.random_range(100_000..10 * SECOND);
        self.push(at.min(self.schedule.healed.max(self.now) + SECOND), Happening::WatchBroken(index, life));
    }

    fn opened(&mut self, index: usize, life: u32, version: u64) {
        if self.processes[index].life != life || self.register.version <= version {
            return;
        }
        let change = match &self.register.object {
            Some(object) => Change::Now(object.clone()),
            None => Change::Gone(self.register.version),
        };
        self.tell_one(index, change);
    }
}

impl Process {
    fn is_valid(&self, now: Micros) -> bool {
        self.alive && self.term.as_ref().is_some_and(|term| term.check(self.clock.at(now)).is_some())
    }
}
