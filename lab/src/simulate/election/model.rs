//! The core under every order of events, within bounds: what the schedules draw at random, this tries all of.
//!
//! Two candidates, one with the slowest clock and one with the fastest that are allowed for, and one object. In each state
//! each message on its way may arrive (one that never does is lost), each process may look at its clock or go on standing
//! still, time may pass, and once an operator may delete the object or the leader be asked to give it away.
//! Checked in each state: S1, S2 and S7; and from each state at the horizon S10: if all goes well from there, one leads in time.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};

use peili::election::lease::{
    Answer, Candidate, Input, Ms, Object, Output, Request, RequestId, Role, Rules, Settings, Standing, Token,
};

use super::register::{Change, Register};

/// True milliseconds of one step.
const STEP: Ms = 1_000;
/// Clocks begin so, that no time is 0.
const BEGINNING: Ms = 10_000;
/// D, and the time between renewals.
const TIMES: (Ms, Ms) = (4_000, 2_000);
/// Messages of one process on their way, those of its watch aside; who has more has lost the oldest.
const MESSAGES: usize = 2;

/// More states do not fit into the memory of a small machine.
const STATES: usize = 20_000_000;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) states: usize,
    pub(super) leaves: usize,
    /// States in which the second process had led, too.
    pub(super) taken_over: usize,
    pub(super) violation: Option<&'static str>,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, leaves, taken_over, violation } = self;
        write!(formatter, "{states} states, {leaves} at the horizon, {taken_over} after both had led; ")?;
        match violation {
            None => formatter.write_str("S1, S2, S7 and S10 hold in all"),
            Some(violation) => write!(formatter, "VIOLATED: {violation}"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct State<R> {
    step: u64,
    candidates: [Candidate<R>; 2],
    works: [bool; 2],
    /// The last request of each: answers to older ones are of no interest to anybody.
    sent: [RequestId; 2],
    /// Of each process, the oldest first.
    messages: [Vec<Message>; 2],
    /// The last thing that a watch has to say to each.
    watched: [Option<Change>; 2],
    register: Register,
    highest: Option<Token>,
    led: [bool; 2],
    /// Neither was there a deletion, nor was anybody asked to give it away.
    is_calm: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Message {
    Request(RequestId, Request),
    Answer(RequestId, Answer),
}

/// Tries everything for so many steps of time.
pub(super) fn explore<R: Rules + Eq + Hash>(steps: u64) -> Report {
    let settings = Settings { jitter: false, step: 0, ..Settings::new(TIMES.0, TIMES.1) };
    let candidate = |name: &str| Candidate::<R>::new(name, settings.clone(), Standing::Candidate(0), 0);
    let mut first = State {
        step: 0,
        candidates: [candidate("a"), candidate("b")],
        works: [false; 2],
        sent: [0; 2],
        messages: [Vec::new(), Vec::new()],
        watched: [None, None],
        register: Register::default(),
        highest: None,
        led: [false; 2],
        is_calm: true,
    };
    // One leads already, and the other has just seen that.
    first.register.create();
    let mut report = Report::default();
    for index in 0..2 {
        first.input(index, Input::Tick, &mut report);
        let answer = first.register.handle(&Request::Get).0;
        first.input(index, Input::Answer(1, answer), &mut report);
        first.messages[index].clear();
    }
    first.step = TIMES.0.div_ceil(STEP * 9 / 10);
    first.input(0, Input::Tick, &mut report);
    first.arrive(0, 0, &mut report);
    first.arrive(0, 0, &mut report);
    first.watch(1, &mut report);
    first.watched = [None, None];
    // And has not renewed since: its validity is about to end, and then the other one's patience.
    first.step += 3;
    let horizon = first.step + steps;
    let mut seen = HashSet::new();
    let mut open = vec![first];
    while let Some(state) = open.pop() {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        if !seen.insert(hasher.finish()) {
            continue;
        }
        report.states += 1;
        report.taken_over += usize::from(state.led == [true; 2]);
        if state.step == horizon {
            report.leaves += 1;
            state.clone().heal(&mut report);
        } else {
            state.successors(&mut open, &mut report);
        }
        if report.states == STATES {
            report.violation = Some("there are more states than can be tried: fewer steps");
        }
        if report.violation.is_some() {
            break;
        }
    }
    report
}

impl<R: Rules + Eq + Hash> State<R> {
    /// The slowest and the fastest clock.
    fn clock(&self, index: usize) -> Ms {
        BEGINNING + self.step * STEP * [9, 11][index] / 10
    }

    fn is_valid(&self, index: usize) -> bool {
        self.candidates[index].term().is_some_and(|(_, until)| self.clock(index) < until)
    }

    fn successors(&self, open: &mut Vec<Self>, report: &mut Report) {
        let mut with = |change: &dyn Fn(&mut Self, &mut Report)| {
            let mut next = self.clone();
            change(&mut next, report);
            if next.is_valid(0) && next.is_valid(1) {
                report.violation = Some("S1: two leaders");
            }
            open.push(next);
        };
        with(&|state, _| state.step += 1);
        for index in 0..2 {
            if self.candidates[index].next().is_some_and(|at| at <= self.clock(index)) {
                with(&|state, report| state.input(index, Input::Tick, report));
            }
            for message in 0..self.messages[index].len() {
                with(&|state, report| state.arrive(index, message, report));
            }
            if self.watched[index].is_some() {
                with(&|state, report| state.watch(index, report));
            }
            if self.works[index] && self.candidates[index].term().is_none() {
                with(&|state, report| state.join(index, report));
            }
            if self.is_calm && self.is_valid(index) {
                with(&|state, report| {
                    state.is_calm = false;
                    state.input(index, Input::Leave(false), report);
                });
            }
        }
        if self.is_calm {
            with(&|state, _| {
                state.is_calm = false;
                let change = state.register.delete();
                state.tell(change);
            });
        }
    }

    fn input(&mut self, index: usize, input: Input, report: &mut Report) {
        let foreign = match &input {
            Input::Seen(object) | Input::Answer(_, Answer::Object(object)) => Some(object.clone()),
            _ => None,
        };
        let now = self.clock(index);
        for output in self.candidates[index].input(now, input) {
            match output {
                Output::Role(Role::Leader(token, _)) => {
                    if !self.works[index] {
                        let begun = (token.version, self.candidates[index].identity().clone());
                        if self.highest.as_ref().is_some_and(|highest| token <= *highest)
                            || !self.register.begun.contains(&begun)
                        {
                            report.violation = Some("S2: a token that is not a new one of its holder");
                        }
                        self.highest = Some(token);
                    }
                    self.works[index] = true;
                    self.led[index] = true;
                }
                Output::Role(Role::Ended(_)) => {}
                Output::Send(id, request) => {
                    self.sent[index] = id;
                    let messages = &mut self.messages[index];
                    messages.retain(|message| {
                        matches!(message, Message::Request(_, Request::Put(_) | Request::Create(_)))
                    });
                    messages.push(Message::Request(id, request));
                    if messages.len() > MESSAGES {
                        messages.remove(0);
                    }
                }
            }
        }
        if foreign.is_some_and(|object| self.is_foreign(index, &object)) && self.is_valid(index) {
            report.violation = Some("S7: leads after it saw another holder");
        }
    }

    /// Whether it is the newest that it has seen, and names another.
    fn is_foreign(&self, index: usize, object: &Object) -> bool {
        let candidate = &self.candidates[index];
        candidate.object() == Some(object) && object.record.holder != *candidate.identity()
    }

    fn arrive(&mut self, index: usize, message: usize, report: &mut Report) {
        match self.messages[index].remove(message) {
            // Reading and its answer are one: an old answer says what a watch says late.
            Message::Request(id, request @ Request::Get) => {
                let (answer, _) = self.register.handle(&request);
                self.input(index, Input::Answer(id, answer), report);
            }
            Message::Request(id, request) => {
                let (answer, change) = self.register.handle(&request);
                if id == self.sent[index] {
                    self.messages[index].push(Message::Answer(id, answer));
                }
                self.tell(change);
            }
            Message::Answer(id, answer) => self.input(index, Input::Answer(id, answer), report),
        }
    }

    fn tell(&mut self, change: Option<Change>) {
        if let Some(change) = change {
            self.watched = [Some(change.clone()), Some(change)];
        }
    }

    fn watch(&mut self, index: usize, report: &mut Report) {
        match self.watched[index].take() {
            Some(Change::Now(object)) => self.input(index, Input::Seen(object), report),
            Some(Change::Gone(version)) => self.input(index, Input::Gone(version), report),
            None => {}
        }
    }

    fn join(&mut self, index: usize, report: &mut Report) {
        self.works[index] = false;
        self.input(index, Input::Joined, report);
    }

    /// From here on everything arrives at once, and all look at their clocks in time.
    fn heal(&mut self, report: &mut Report) {
        // By the slowest clock: D of a record that was just seen, and one that gave away keeps aside for as long.
        let patience = (TIMES.0 + 2_000).div_ceil(STEP * 9 / 10) + 1;
        for index in 0..2 {
            self.input(index, Input::Reread, report);
        }
        for _ in 0..=patience {
            // Until nothing more happens at this time.
            for _ in 0..32 {
                let mut is_quiet = true;
                for index in 0..2 {
                    if self.works[index] && self.candidates[index].term().is_none() {
                        is_quiet = false;
                        self.join(index, report);
                    }
                    while !self.messages[index].is_empty() {
                        is_quiet = false;
                        self.arrive(index, 0, report);
                    }
                    if self.watched[index].is_some() {
                        is_quiet = false;
                        self.watch(index, report);
                    }
                    if self.candidates[index].next().is_some_and(|at| at <= self.clock(index)) {
                        is_quiet = false;
                        self.input(index, Input::Tick, report);
                    }
                }
                if is_quiet {
                    break;
                }
            }
            if self.is_valid(0) && self.is_valid(1) {
                report.violation = Some("S1: two leaders");
            }
            self.step += 1;
        }
        self.step -= 1;
        if !self.is_valid(0) && !self.is_valid(1) {
            report.violation = report.violation.or(Some("S10: nobody leads although all is well"));
        }
    }
}
