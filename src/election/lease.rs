//! Leadership by a Kubernetes Lease: one candidate as a pure state machine, the core of the strict role.
//!
//! Inputs and the time of the boot-time clock go in; changes of the role, requests and the next moment to look at it come
//! out. It asks no server, reads no clock and starts no task, so that the simulation (`cargo xtask simulate election`)
//! and the model run what ships. Whoever drives it applies what comes out in its order and sends what it says.
//!
//! What it keeps to, so that no two lead (the times are in `settings`):
//!
//! - Only a write that names the object's uid and version takes or keeps a lease: the API server compares and swaps.
//! - A leader counts its validity from before the sending of a write, the others from when they saw it, and for longer.
//! - An answer that did not come says nothing: the validity stays, and the object is read before the next write.
//! - Making the object is no way to lead: it is made without a holder, and whoever sees it waits a full duration, since
//!   it may replace one whose holder still works. A released one says so in Peili's annotation.
//! - What was seen once is never unseen: a record of this process that another one followed counts as a stranger's.
//! - A term that ended is over: going on takes a new write and a new token, after the old term's work has ended.

mod leadership;
mod message;
mod record;
mod settings;
mod state;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::sync::Arc;

pub use leadership::{Desk, Leadership, Loss, Permit, Role, Token};
pub use message::{Answer, Input, Output, Request, Standing, Write};
pub use record::{ANNOTATION, IDENTITY_LIMIT, Mark, NoMark, Object, Record};
pub use settings::{Rules, Settings, Shipped, validity};

use settings::{FOREIGN, LONGEST, validity_by};
use state::{Flight, Seen, Term, What};

/// Milliseconds of the boot-time clock, which counts while the machine is suspended.
pub type Ms = u64;
/// Tells the requests of one candidate apart.
pub type RequestId = u64;

/// Those who read since something may have been missed do so within this time.
const SPREAD: Ms = 1_000;
/// A lease that was given away is taken so many times as soon by those of higher ranks.
const RELEASED: Ms = 6;
/// The longest pause after a refusal.
const REJECTED: Ms = 30_000;
/// The first pause after a failure.
const FIRST_PAUSE: Ms = 250;

/// A candidate for one lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Candidate<R = Shipped> {
    identity: Arc<str>,
    settings: Settings,
    standing: Standing,
    closed: bool,
    draws: u64,
    seen: Option<Seen>,
    /// The newest version seen, of any object of this name.
    newest: u64,
    /// How many news there were.
    news: u64,
    /// The longest duration that a record of Peili had.
    longest: Ms,
    /// Of the last write.
    sequence: u64,
    /// Own records up to this one were followed by something else.
    superseded: u64,
    flight: Option<Flight>,
    requests: RequestId,
    term: Option<Term>,
    /// A term's work has begun and is not known to have ended.
    working: bool,
    yielding: bool,
    read_at: Option<Ms>,
    /// News may have been missed, so that the next ones do not make up for the read.
    missed: bool,
    poll_at: Ms,
    not_before: Ms,
    hold_until: Ms,
    failed_reads: u32,
    failed_writes: u32,
    /// The last failure was a refusal.
    was_rejected: bool,
    rules: PhantomData<R>,
}

impl<R: Rules> Candidate<R> {
    /// `identity` names this process and no other one, ever: node, pod and a number drawn at the start, without spaces,
    /// of at most [`IDENTITY_LIMIT`] bytes. `seed` is for pauses.
    pub fn new(identity: &str, settings: Settings, standing: Standing, seed: u64) -> Self {
        Self {
            identity: identity.into(),
            longest: settings.duration.min(LONGEST),
            settings: settings.bounded(),
            standing,
            closed: false,
            draws: seed,
            seen: None,
            newest: 0,
            news: 0,
            sequence: 0,
            superseded: 0,
            flight: None,
            requests: 0,
            term: None,
            working: false,
            yielding: false,
            read_at: None,
            missed: false,
            poll_at: 0,
            not_before: 0,
            hold_until: 0,
            failed_reads: 0,
            failed_writes: 0,
            was_rejected: false,
            rules: PhantomData,
        }
    }

    /// Takes an input, and says what is to be done, in this order.
    pub fn input(&mut self, now: Ms, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.expire(now, &mut out);
        match input {
            Input::Tick => {}
            Input::Answer(id, answer) => {
                if let Some(flight) = self.flight.take_if(|flight| flight.id == id) {
                    self.answered(now, &flight, answer, &mut out);
                }
            }
            Input::Seen(object) => self.see(now, Some(object), None, false, &mut out),
            Input::Gone(version) => self.see(now, None, Some(version), false, &mut out),
            Input::Reread => {
                // All notice at once that the API server is back.
                let spread = self.draw(SPREAD.min(self.settings.duration / 3));
                let at = now + if self.term.is_some() { 0 } else { spread };
                self.missed = true;
                self.read_by(at);
            }
            Input::Ranked(standing) => {
                match (standing, self.standing) {
                    // After a failure it waited as an observer does.
                    (Standing::Candidate(_), Standing::Observer(_)) => {
                        self.read_at = self.read_at.map(|at| at.min(now));
                    }
                    // Whoever starts with all the others does not read with them.
                    (Standing::Observer(pause), _) if self.seen.is_none() && self.poll_at == 0 => {
                        self.poll_at = now + self.draw(pause);
                    }
                    _ => {}
                }
                self.standing = standing;
                if matches!(standing, Standing::Observer(_)) && self.term.is_some() {
                    self.lose(Loss::Yielded, &mut out);
                }
            }
            Input::Configured(settings) => {
                self.settings = settings.bounded();
                self.longest = self.longest.max(self.settings.duration);
            }
            Input::Joined => {
                // Only where a rule is broken does the term last until here.
                if self.yielding && self.term.is_some() {
                    self.lose(Loss::Yielded, &mut out);
                }
                self.working = false;
            }
            Input::Leave(for_good) => {
                self.closed |= for_good;
                self.hold_until = now + self.settings.duration;
                let acquires = self.flight.as_ref().is_some_and(|flight| flight.what == What::Acquire);
                self.yielding = acquires || self.object().is_some_and(|object| self.is_mine(object));
                if R::JOINS_FIRST && self.term.is_some() {
                    self.lose(Loss::Yielded, &mut out);
                }
            }
        }
        self.step(now, &mut out);
        out
    }

    /// When it wants to be asked again, at the latest.
    pub fn next(&self) -> Option<Ms> {
        let request = match &self.flight {
            Some(flight) => Some(flight.deadline),
            None => self.due().map(|(at, _)| at),
        };
        [request, self.term.as_ref().map(|term| term.until)].into_iter().flatten().min()
    }

    /// The object as it was seen last; `None` where it was not read yet, or is not there.
    pub fn object(&self) -> Option<&Object> {
        self.seen.as_ref()?.object.as_ref()
    }

    /// Whether the object was read and is not there.
    pub fn is_absent(&self) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.object.is_none())
    }

    /// Since when the holder's time counts, by the clock of this node.
    pub fn since(&self) -> Option<Ms> {
        self.seen.as_ref().map(|seen| seen.since)
    }

    /// Whether nobody holds it, as far as this node can tell; `None`: it was not read yet.
    pub fn is_free(&self, now: Ms) -> Option<bool> {
        let seen = self.seen.as_ref()?;
        let is_over = |object: &Object| now >= seen.since.saturating_add(self.wait(object));
        Some(self.term.is_none() && seen.object.as_ref().is_none_or(is_over))
    }

    /// The present term and its end.
    pub fn term(&self) -> Option<(&Token, Ms)> {
        self.term.as_ref().map(|term| (&term.token, term.until))
    }

    /// The name of this process.
    pub fn identity(&self) -> &Arc<str> {
        &self.identity
    }

    /// Whether it has left for good and has nothing more to write.
    pub fn is_finished(&self) -> bool {
        let holds = self.object().is_some_and(|object| self.is_mine(object));
        self.closed && self.term.is_none() && !self.working && self.flight.is_none() && !holds
    }

    fn step(&mut self, now: Ms, out: &mut Vec<Output>) {
        if let Some(flight) = self.flight.take_if(|flight| flight.deadline <= now) {
            self.answered(now, &flight, Answer::Unknown, out);
        }
        if self.flight.is_none()
            && let Some((at, what)) = self.due()
            && at <= now
        {
            self.send(now, what, out);
        }
    }

    fn expire(&mut self, now: Ms, out: &mut Vec<Output>) {
        if self.term.as_ref().is_some_and(|term| term.until <= now) {
            self.lose(Loss::Expired, out);
        }
    }

    fn lose(&mut self, loss: Loss, out: &mut Vec<Output>) {
        self.term = None;
        out.push(Output::Role(Role::Ended(loss)));
    }

    /// The next request and its time, while none is under way.
    fn due(&self) -> Option<(Ms, What)> {
        if let Some(at) = self.read_at {
            return Some((at, What::Read));
        }
        let Some(seen) = &self.seen else {
            let at = match self.standing {
                Standing::Observer(_) => self.not_before.max(self.poll_at),
                Standing::Candidate(_) => self.not_before,
            };
            return Some((at, What::Read));
        };
        let poll = match self.standing {
            Standing::Observer(_) => Some((self.poll_at, What::Read)),
            Standing::Candidate(_) => None,
        };
        let rank = match self.standing {
            Standing::Candidate(rank) if !self.closed => Some(rank),
            Standing::Candidate(_) | Standing::Observer(_) => None,
        };
        let earliest = self.not_before.max(self.hold_until);
        let delayed = |free: Ms, step: Ms, rank: u32| {
            free.saturating_add(step.saturating_mul(rank.into())).max(earliest)
        };
        let step = self.settings.step;
        let Some(object) = &seen.object else {
            return match rank {
                Some(rank) if !self.working => Some((delayed(seen.since, step, rank), What::Create)),
                Some(_) | None => poll,
            };
        };
        let is_mine = self.is_mine(object);
        if self.yielding && is_mine && (!self.working || !R::JOINS_FIRST) {
            return Some((self.not_before, What::Release));
        }
        if let Some(term) = &self.term {
            return Some((term.renew_at.max(self.not_before), What::Renew));
        }
        if self.working {
            return None;
        }
        match rank {
            Some(_) if is_mine => Some((earliest, What::Acquire)),
            // All see it at once that it was given away, and each counts by its own clock when its time is over.
            Some(rank) if object.record.is_released() => {
                Some((delayed(seen.since, step / RELEASED, rank), What::Acquire))
            }
            Some(rank) => Some((delayed(seen.since + self.wait(object), step, rank), What::Acquire)),
            None if is_mine => Some((self.not_before, What::Release)),
            None => poll,
        }
    }

    /// How long after it was seen a record that is not this process's own proves that its holder does not work.
    fn wait(&self, object: &Object) -> Ms {
        let record = &object.record;
        let wait = match &record.mark {
            _ if record.is_released() => 0,
            Some(mark) if record.is_ours() => mark.duration.max(record.duration),
            _ if record.holder.is_empty() => self.longest.max(record.duration),
            _ if record.duration == 0 => self.settings.duration + FOREIGN,
            _ => record.duration.saturating_add(FOREIGN),
        };
        wait.min(LONGEST)
    }

    /// Whether this process wrote it, and nothing else was seen since.
    fn is_mine(&self, object: &Object) -> bool {
        object.record.holder == self.identity
            && !object.record.preferred
            && object.record.mark.as_ref().is_some_and(|mark| {
                mark.writer == self.identity && mark.sequence > self.superseded && !mark.released
            })
    }

    fn send(&mut self, now: Ms, what: What, out: &mut Vec<Output>) {
        let (uid, version, transitions, holds) = match self.object() {
            Some(Object { uid, version, record }) => {
                (uid.clone(), *version, record.transitions, record.holder == self.identity)
            }
            None => (Arc::from(""), 0, 0, false),
        };
        let duration = if what == What::Create { self.longest } else { self.settings.duration };
        if what != What::Read && (R::RENEWS_VISIBLY || what != What::Renew) {
            self.sequence += 1;
        }
        if what == What::Renew
            && R::SHRINKS_FIRST
            && let Some(term) = &mut self.term
        {
            let end = now + validity_by::<R>(duration);
            if duration < term.duration && end < term.until {
                term.until = end;
                out.push(Output::Role(Role::Leader(term.token.clone(), end)));
            }
            term.duration = duration;
        }
        let write = |holder: &Arc<str>| Write {
            uid: if R::SENDS_UID { uid.clone() } else { Arc::from("") },
            version,
            holder: holder.clone(),
            duration,
            transitions: transitions.saturating_add(u32::from(what == What::Acquire && !holds)),
            mark: Mark {
                writer: self.identity.clone(),
                sequence: self.sequence,
                duration,
                released: what == What::Release,
            },
            begins: what == What::Acquire,
        };
        let request = match what {
            What::Read => Request::Get,
            What::Create => Request::Create(write(&Arc::from(""))),
            What::Acquire | What::Renew => Request::Put(write(&self.identity)),
            What::Release => Request::Put(write(&Arc::from(""))),
        };
        if what == What::Read {
            self.read_at = None;
        }
        self.requests += 1;
        self.flight = Some(Flight {
            id: self.requests,
            what,
            sent: now,
            deadline: now + self.settings.attempt(),
            news: self.news,
            version,
            uid,
            sequence: self.sequence,
            duration,
        });
        out.push(Output::Send(self.requests, request));
    }

    fn answered(&mut self, now: Ms, flight: &Flight, answer: Answer, out: &mut Vec<Output>) {
        // Nothing else was heard since it left: what it says is the newest, whatever its version.
        let is_newest = flight.news == self.news;
        match (answer, flight.what) {
            (Answer::Object(object), What::Read) => {
                self.was_read(now);
                self.see(now, Some(object), None, is_newest, out);
                self.yielding &= self.object().is_some_and(|object| self.is_mine(object));
            }
            (Answer::Object(object), What::Create) => {
                self.failed_writes = 0;
                self.see(now, Some(object), None, false, out);
            }
            (Answer::Object(object), What::Acquire | What::Renew | What::Release) => {
                self.written(now, flight, object, out);
            }
            (Answer::Absent, What::Read) => {
                self.was_read(now);
                self.see(now, None, None, true, out);
            }
            (Answer::Absent, What::Acquire | What::Renew | What::Release) => {
                self.see(now, None, None, true, out);
            }
            (Answer::Conflict, What::Acquire | What::Renew | What::Release | What::Create) => {
                let pause = if self.failed_writes == 0 { 0 } else { self.pause(self.failed_writes, false) };
                self.failed_writes = self.failed_writes.saturating_add(1);
                self.read_by(now + pause);
            }
            (Answer::Rejected(asked), _) => self.failed(now, flight, Some(asked)),
            // A namespace that is not there answers a POST so.
            (Answer::Absent, What::Create) => self.failed(now, flight, Some(None)),
            (Answer::Conflict, What::Read) | (Answer::Unknown, _) => self.failed(now, flight, None),
        }
    }

    fn was_read(&mut self, now: Ms) {
        self.failed_reads = 0;
        self.read_at = None;
        self.missed = false;
        if let Standing::Observer(pause) = self.standing {
            self.poll_at = now + pause / 2 + self.draw(pause);
        }
    }

    /// Reads before anything else is tried: a write without an answer may have been carried out.
    /// `rejected`: the server was reached and refused, and may have said when to ask again.
    fn failed(&mut self, now: Ms, flight: &Flight, rejected: Option<Option<Ms>>) {
        if self.was_rejected != rejected.is_some() {
            // A server that has just come back refuses for a moment, until it knows the rights again.
            (self.failed_reads, self.failed_writes) = (0, 0);
            self.was_rejected = rejected.is_some();
        }
        let failures =
            if flight.what == What::Read { &mut self.failed_reads } else { &mut self.failed_writes };
        *failures = failures.saturating_add(1);
        let failures = *failures;
        let pause = match self.standing {
            // They are many: after an outage all of them would come at once.
            Standing::Observer(pause) if self.term.is_none() && !self.yielding => {
                pause / 2 + self.draw(pause)
            }
            Standing::Observer(_) | Standing::Candidate(_) => self.pause(failures, rejected.is_some()),
        };
        let asked = rejected.flatten();
        let mut at = now + pause.max(asked.unwrap_or(0).min(LONGEST));
        if let Some(term) = &mut self.term {
            // Whatever the server asks for, it is tried once more before the end.
            at = at.min(term.until.saturating_sub(self.settings.attempt())).max(now);
            term.renew_at = at;
        }
        if asked.is_some() {
            self.not_before = at;
        }
        self.read_by(at);
    }

    /// Reads then, unless it was told meanwhile to do so earlier.
    fn read_by(&mut self, at: Ms) {
        self.read_at = Some(self.read_at.filter(|_| self.missed).map_or(at, |before| before.min(at)));
    }

    /// A random pause, longer with each failure. A leader has little time. What is refused is so for longer than what cannot be reached.
    fn pause(&mut self, failures: u32, is_rejected: bool) -> Ms {
        let limit = match self.term {
            Some(_) => self.settings.attempt() / 4,
            None if is_rejected => self.settings.pause.max(REJECTED),
            None => self.settings.pause,
        };
        let grown = FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(limit);
        if self.settings.jitter { 20 + self.draw(grown) } else { grown }
    }

    /// A number below `limit`.
    fn draw(&mut self, limit: Ms) -> Ms {
        if !self.settings.jitter || limit == 0 {
            return 0;
        }
        // SplitMix64: pauses need no better.
        self.draws = self.draws.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.draws;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// A write was answered with success.
    fn written(&mut self, now: Ms, flight: &Flight, object: Object, out: &mut Vec<Output>) {
        let version = object.version;
        let mark = object.record.mark.as_ref();
        let is_written = object.uid == flight.uid
            && (version > flight.version || !R::RENEWS_VISIBLY)
            && mark.is_some_and(|mark| mark.writer == self.identity && mark.sequence == flight.sequence);
        // Before the validity grows: what follows may say that there is a stranger already.
        let token = Token { uid: object.uid.clone(), version, transitions: object.record.transitions };
        self.see(now, Some(object), None, false, out);
        if !is_written {
            // A success that changed nothing, or changed to something else.
            self.failed(now, flight, None);
            return;
        }
        self.failed_writes = 0;
        self.not_before = 0;
        if !self.object().is_some_and(|object| self.is_mine(object)) {
            return;
        }
        let start = if R::STAMPS_AT_SEND { flight.sent } else { now };
        let end = start + validity_by::<R>(flight.duration);
        let renew_at = flight.sent + self.settings.renew;
        match (&mut self.term, flight.what) {
            (Some(term), What::Renew) => {
                term.renew_at = renew_at;
                if !R::SHRINKS_FIRST && flight.duration < term.duration {
                    term.until = end;
                    term.duration = flight.duration;
                }
                term.until = term.until.max(end);
                out.push(Output::Role(Role::Leader(term.token.clone(), term.until)));
            }
            (None, What::Acquire) if end > now && !self.closed && !self.yielding => {
                if matches!(self.standing, Standing::Candidate(_)) {
                    out.push(Output::Role(Role::Leader(token.clone(), end)));
                    self.working = true;
                    self.term = Some(Term { token, until: end, renew_at, duration: flight.duration });
                }
            }
            // The answer came too late, or the term was lost meanwhile.
            (Some(_), _) | (None, _) => {}
        }
    }

    /// The object is so, or (`None`) there is none. `version`: of a deletion. `is_newest`: whatever the version.
    fn see(
        &mut self,
        now: Ms,
        object: Option<Object>,
        version: Option<u64>,
        is_newest: bool,
        out: &mut Vec<Output>,
    ) {
        let version = object.as_ref().map(|object| object.version).or(version);
        let before = self.seen.as_ref().and_then(|seen| seen.object.as_ref());
        if version.is_some_and(|version| version <= self.newest) {
            if !is_newest || (before == object.as_ref() && object.is_some()) {
                return;
            }
            // The server went back in time: it was restored. Whoever wrote since then is not seen any more.
            self.superseded = self.sequence;
        }
        let is_same = match (&self.seen, &object) {
            (Some(Seen { object: Some(before), .. }), Some(after)) => {
                before.uid == after.uid
                    && Some(self.newest) <= version
                    && !after.record.renews(&before.record)
            }
            (Some(Seen { object: None, .. }), None) => true,
            _ => false,
        };
        self.news += 1;
        if !self.missed {
            self.read_at = None;
        }
        self.newest = version.unwrap_or(self.newest);
        if let Some(mark) = object.as_ref().and_then(|object| object.record.mark.as_ref()) {
            self.longest = self.longest.max(mark.duration.min(LONGEST));
        }
        let since = match &self.seen {
            Some(seen) if is_same => seen.since,
            Some(_) | None => {
                if self.term.is_none() {
                    self.failed_writes = 0;
                }
                now
            }
        };
        if !object.as_ref().is_some_and(|object| self.is_mine(object)) {
            self.superseded = self.sequence;
            self.yielding = false;
        }
        if let Some(term) = &self.term {
            let loss = match &object {
                None => Some(Loss::Deleted),
                Some(object) if object.uid != term.token.uid => Some(Loss::Replaced),
                Some(object) if object.record.preferred => Some(Loss::Preferred),
                Some(object) if object.record.holder != self.identity => Some(Loss::Foreign),
                Some(_) => None,
            };
            if let Some(loss) = loss {
                self.lose(loss, out);
            }
        }
        self.seen = Some(Seen { object, since });
    }
}
