//! The loop that drives the core: one request at a time, a watch beside it, and the work of whoever leads.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::metrics::{loss, verb};
use super::{Cause, Change, Fault, Leave, Notes, Parts, Reply, State, Strict};
use crate::election::lease::{
    Answer, Candidate, Desk, Input, Ms, Output, Request, RequestId, Role, Settings, Standing,
};

/// The longest pause: after the machine was suspended a timer is late by as long as it slept.
const NAP: Ms = 1_000;
/// Between two starts of a watch, and of one that may not be: then the lease is read instead.
const WATCH_PAUSE: (Ms, Ms) = (1_000, 30_000);
/// Between two knocks at a server that is gone, by candidates.
const KNOCK_PAUSE: Ms = 1_000;
/// So long a server must be out of reach before this node says so: each change is a record for all members.
const UNREACHED: Ms = 5_000;
/// So long after a write that got no answer reads alone say nothing about writes.
const PASSING: Ms = 30_000;
/// Changes that wait to be taken.
const CHANGES: usize = 16;

/// Drives the core. Ends never.
pub struct Driver {
    strict: Strict,
    leaving: mpsc::Receiver<Leave>,
    parts: Parts,
    core: Candidate,
    desk: Desk,
    flight: Option<Flight>,
    following: Option<Following>,
    next_watch: Ms,
    next_poll: Ms,
    blind: Option<Fault>,
    work: Option<Work>,
    leaves: Vec<(bool, oneshot::Sender<()>)>,
    knocking: Option<BoxFuture<'static, bool>>,
    next_knock: Ms,
    /// When a hint is followed.
    hinted: Option<Ms>,
    health: Health,
    held: (Option<Arc<str>>, Ms),
    free_since: Option<Ms>,
    /// Watches in a row that told nothing.
    barren: u32,
    notes: Arc<Notes>,
    looked: Ms,
    name: Arc<str>,
    /// When it was read last, or a change was told.
    read: Option<Ms>,
}

/// The work of a term, until it has ended.
struct Work {
    task: AbortOnDropHandle<()>,
    stop: CancellationToken,
}

/// A request that is under way.
struct Flight {
    id: RequestId,
    verb: &'static str,
    call: BoxFuture<'static, Reply>,
}

/// A watch that is under way.
struct Following {
    changes: mpsc::Receiver<Change>,
    task: AbortOnDropHandle<Result<(), Fault>>,
    heard: Ms,
}

/// How the server does.
#[derive(Default)]
struct Health {
    fault: Option<Failing>,
    /// Since when nothing has failed.
    well: Option<Ms>,
    relied_on: bool,
}

struct Failing {
    fault: Fault,
    since: Ms,
    /// When it failed last.
    last: Ms,
    /// A write failed, which reads that succeed say nothing about.
    is_write: bool,
}

enum Happened {
    Tick,
    Reply(Reply),
    Change(Option<Change>),
    Standing,
    Settings,
    Hint,
    Leave(Leave),
    DutyEnded,
    Knocked(bool),
}

impl Driver {
    pub(super) fn new(strict: Strict, leaving: mpsc::Receiver<Leave>, parts: Parts) -> Self {
        let settings = strict.settings.borrow().clone();
        // Replaced before the first request.
        let standing = Standing::Observer(NAP);
        let core = Candidate::new(&strict.identity, settings, standing, parts.seed);
        let name = parts.lock.name().into();
        Self {
            core,
            strict,
            leaving,
            parts,
            desk: Desk::default(),
            flight: None,
            following: None,
            next_watch: 0,
            next_poll: 0,
            blind: None,
            work: None,
            leaves: Vec::new(),
            knocking: None,
            next_knock: 0,
            hinted: None,
            health: Health::default(),
            held: (None, 0),
            free_since: None,
            barren: 0,
            notes: Arc::default(),
            looked: 0,
            name,
            read: None,
        }
    }

    /// Leads when it can. Ends only with the last handle.
    pub async fn run(mut self) {
        let mut standing = self.strict.standing.subscribe();
        let mut settings = self.strict.settings.subscribe();
        let mut hints = self.strict.hints.subscribe();
        // Nothing is asked before it is known where this node stands.
        while standing.borrow().is_none() {
            tokio::select! {
                Ok(()) = standing.changed() => {}
                Some(leave) = self.leaving.recv() => {
                    // Whoever waited may have gone.
                    let _ = leave.done.send(());
                    if leave.for_good {
                        return;
                    }
                }
                else => return,
            }
        }
        self.looked = self.parts.clock.now();
        standing.mark_changed();
        loop {
            match self.next(&mut standing, &mut settings, &mut hints).await {
                Happened::Tick => self.feed(Input::Tick),
                Happened::Reply(reply) => self.answered(reply),
                Happened::Change(change) => self.told(change).await,
                Happened::Standing => {
                    if let Some(standing) = *standing.borrow_and_update() {
                        self.ranked(standing);
                    }
                }
                Happened::Settings => {
                    let settings = settings.borrow_and_update().clone();
                    self.feed(Input::Configured(settings));
                }
                Happened::Hint => {
                    let spread = u64::try_from(hints.borrow_and_update().as_millis()).unwrap_or(Ms::MAX);
                    if self.health.fault.is_some() && self.hinted.is_none() {
                        self.hinted = Some(self.parts.clock.now() + rand::random_range(0..=spread));
                    }
                }
                Happened::Leave(Leave { for_good, done }) => {
                    self.leaves.push((for_good, done));
                    self.feed(Input::Leave(for_good));
                }
                Happened::DutyEnded => {
                    self.work = None;
                    if self.desk.current().is_some() {
                        if !self.parts.duty.ends() {
                            tracing::error!(
                                role = "coordinator",
                                lock = &*self.name,
                                "the work of the leader has ended by itself; the lock is given away"
                            );
                        }
                        self.feed(Input::Leave(false));
                    }
                    self.feed(Input::Joined);
                }
                Happened::Knocked(answers) => {
                    self.knocking = None;
                    if answers {
                        self.feed(Input::Reread);
                    }
                }
            }
            self.look();
            self.publish();
        }
    }

    async fn next(
        &mut self,
        standing: &mut watch::Receiver<Option<Standing>>,
        settings: &mut watch::Receiver<Settings>,
        hints: &mut watch::Receiver<Duration>,
    ) -> Happened {
        let now = self.parts.clock.now();
        let wake = self.core.next().map_or(NAP, |at| at.saturating_sub(now)).clamp(1, NAP);
        let changes = self.following.as_mut().map(|following| following.changes.recv().boxed());
        let call = self.flight.as_mut().map(|flight| &mut flight.call);
        tokio::select! {
            // What was heard comes before what is to be said.
            biased;
            change = some(changes) => Happened::Change(change),
            reply = some(call) => Happened::Reply(reply),
            _ = some(self.work.as_mut().map(|work| &mut work.task)) => Happened::DutyEnded,
            Ok(()) = standing.changed() => Happened::Standing,
            Ok(()) = settings.changed() => Happened::Settings,
            Ok(()) = hints.changed() => Happened::Hint,
            Some(leave) = self.leaving.recv() => Happened::Leave(leave),
            answers = some(self.knocking.as_mut()) => Happened::Knocked(answers),
            () = sleep(Duration::from_millis(wake)) => Happened::Tick,
        }
    }

    fn feed(&mut self, input: Input) {
        for output in self.core.input(self.parts.clock.now(), input) {
            match output {
                Output::Role(role) => self.take(&role),
                Output::Send(id, request) => self.send(id, request),
            }
        }
    }

    fn take(&mut self, role: &Role) {
        let begun = self.desk.apply(role);
        self.parts.metrics.leads(self.desk.current().is_some());
        match role {
            Role::Leader(token, _) => {
                let Some(leadership) = begun else { return };
                tracing::info!(role = "coordinator", lock = &*self.name, %token, "holds the lock");
                self.parts.metrics.begun();
                let duty = Arc::clone(&self.parts.duty);
                let stop = CancellationToken::new();
                let stopped = stop.clone();
                let work = async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = duty.lead(leadership.into()) => {}
                    }
                    duty.end().await;
                };
                self.work = Some(Work { task: AbortOnDropHandle::new(tokio::spawn(work)), stop });
            }
            Role::Ended(why) => {
                tracing::info!(
                    role = "coordinator",
                    lock = &*self.name,
                    why = loss(*why),
                    "holds the lock no more"
                );
                self.parts.metrics.lost(*why);
                if let Some(work) = &self.work {
                    work.stop.cancel();
                }
            }
        }
    }

    fn send(&mut self, id: RequestId, request: Request) {
        let lock = Arc::clone(&self.parts.lock);
        let notes = self.strict.notes.borrow().clone();
        let attempt = Duration::from_millis(self.strict.settings.borrow().attempt());
        // Its own words of what went wrong are better than that the time is over.
        let limit = attempt.mul_f32(0.9);
        let verb = verb(&request);
        if verb == "get" && self.desk.current().is_some() {
            self.parts.metrics.read_as_leader();
        }
        let call = async move {
            let call = async {
                match &request {
                    Request::Get => lock.get(limit).await,
                    Request::Create(write) => lock.create(write, &notes, limit).await,
                    Request::Put(write) => lock.put(write, &notes, limit).await,
                }
            };
            timeout(attempt, call).await.unwrap_or_else(|_| {
                let text = format!("no answer from {} within {attempt:?}", lock.place());
                Reply::failed(Answer::Unknown, Fault::new(Cause::NoAnswer, text))
            })
        };
        self.flight = Some(Flight { id, verb, call: call.boxed() });
    }

    fn answered(&mut self, reply: Reply) {
        let Some(Flight { id, verb, .. }) = self.flight.take() else { return };
        self.parts.metrics.answered(verb, &reply.answer);
        if let Some(notes) = reply.notes {
            self.noted(notes);
        }
        let before = self.health.fault.as_ref().map(|failing| failing.fault.cause);
        let is_empty = reply.answer == Answer::Absent;
        self.health.take(reply.fault, verb != "get", is_empty, self.parts.clock.now());
        match &self.health.fault {
            Some(failing) if before != Some(failing.fault.cause) => {
                let Fault { cause, text } = &failing.fault;
                tracing::warn!(cause = cause.name(), remedy = cause.remedy(), "the {}: {text}", self.name);
            }
            None if before.is_some() => tracing::info!("the {}: the API server answers again", self.name),
            _ => {}
        }
        if matches!(reply.answer, Answer::Object(_) | Answer::Absent) {
            self.read = Some(self.parts.clock.now());
        }
        self.feed(Input::Answer(id, reply.answer));
    }

    async fn told(&mut self, change: Option<Change>) {
        let now = self.parts.clock.now();
        let Some(change) = change else { return self.unfollow().await };
        if let Some(following) = &mut self.following {
            following.heard = now;
        }
        self.blind = None;
        self.barren = 0;
        self.read = Some(now);
        match change {
            Change::Seen(object, notes) => {
                self.noted(notes);
                self.feed(Input::Seen(object));
            }
            Change::Gone(version) => self.feed(Input::Gone(version)),
        }
    }

    /// The watch has ended by itself.
    async fn unfollow(&mut self) {
        let Some(following) = self.following.take() else { return };
        // It has dropped its end, which is the last thing that it does.
        let fault = following.task.await.ok().and_then(Result::err);
        // Connections break; what is forbidden stays so.
        let is_lasting = fault.as_ref().is_some_and(|fault| fault.cause.reached() == Some(true));
        if is_lasting && self.blind.is_none() {
            let fault = fault.as_ref().map(ToString::to_string).unwrap_or_default();
            tracing::warn!("the {} cannot be watched, it is read instead: {fault}", self.name);
        }
        self.blind = fault.filter(|_| is_lasting);
        // One that never tells anything is broken on the way: it is tried again more and more seldom.
        let grown = WATCH_PAUSE.0.saturating_mul(1 << self.barren.min(5)).min(WATCH_PAUSE.1);
        let pause = if is_lasting { WATCH_PAUSE.1 } else { grown };
        self.barren = self.barren.saturating_add(1);
        self.next_watch = self.parts.clock.now() + pause;
        self.feed(Input::Reread);
    }

    fn ranked(&mut self, standing: Standing) {
        if matches!(standing, Standing::Observer(_)) {
            // Candidates watch; and what an observer could not write does not matter any more.
            self.following = None;
            self.blind = None;
            if self.health.fault.take_if(|failing| failing.is_write).is_some() {
                self.health.well = Some(self.parts.clock.now());
            }
        }
        self.feed(Input::Ranked(standing));
    }

    fn noted(&mut self, notes: Notes) {
        if *self.notes != notes {
            self.notes = Arc::new(notes);
        }
    }

    /// What is to be done beside requests.
    fn look(&mut self) {
        let now = self.parts.clock.now();
        let settings = self.strict.settings.borrow().clone();
        self.health.look(now, &settings);
        self.watch(now, &settings);
        if self.hinted.take_if(|at| now >= *at).is_some() && self.health.fault.is_some() {
            self.feed(Input::Reread);
        }
        let fails = self.health.fault.as_ref().is_some_and(|failing| failing.fault.cause.knocks());
        if fails && self.is_candidate() && self.knocking.is_none() && now >= self.next_knock {
            self.next_knock = now + KNOCK_PAUSE;
            let lock = Arc::clone(&self.parts.lock);
            self.knocking = Some(async move { lock.knock(Duration::from_millis(KNOCK_PAUSE)).await }.boxed());
        }
        let holder = self.core.object().map(|object| object.record.holder.clone());
        let holder = holder.filter(|holder| !holder.is_empty());
        if holder != self.held.0 {
            self.held = (holder, now);
        }
        let is_mine = self.held.0.as_deref() == Some(&*self.strict.identity);
        let is_given = self.desk.current().is_none() && self.work.is_none() && !is_mine;
        let is_finished = self.core.is_finished();
        for index in (0..self.leaves.len()).rev() {
            if if self.leaves[index].0 { is_finished } else { is_given } {
                // Whoever waited may have gone.
                let _ = self.leaves.swap_remove(index).1.send(());
            }
        }
        let is_free = self.is_free(now);
        self.free_since = if is_free == Some(true) { self.free_since.or(Some(now)) } else { None };
        if is_free != Some(false) {
            self.parts.metrics.without(now.saturating_sub(self.looked));
        }
        self.looked = now;
        self.parts.metrics.seen(self.core.since().map(|since| now.saturating_sub(since)));
    }

    fn watch(&mut self, now: Ms, settings: &Settings) {
        let Some(object) = self.core.object() else {
            self.following = None;
            return;
        };
        if let Some(following) = &self.following {
            let silent = now.saturating_sub(following.heard);
            // A holder renews several times in this time: a watch that says nothing is dead, whatever the connection looks like.
            if !object.record.holder.is_empty() && silent > settings.duration {
                self.following = None;
                self.next_watch = now + WATCH_PAUSE.0;
                self.feed(Input::Reread);
            }
            return;
        }
        if !self.is_candidate() || self.health.fault.is_some() {
            return;
        }
        if now < self.next_watch {
            // Without a watch, which is not allowed or does not work.
            if (self.blind.is_some() || self.barren > 1) && now >= self.next_poll {
                self.next_poll = now + settings.duration / 3;
                self.feed(Input::Reread);
            }
            return;
        }
        self.next_watch = now + WATCH_PAUSE.0;
        let (told, changes) = mpsc::channel(CHANGES);
        let (lock, version) = (Arc::clone(&self.parts.lock), object.version);
        let task = tokio::spawn(async move { lock.watch(version, told).await });
        self.following = Some(Following { changes, task: AbortOnDropHandle::new(task), heard: now });
    }

    /// Whether nobody holds it; `None`: it was not read yet.
    fn is_free(&self, now: Ms) -> Option<bool> {
        let is_free = self.core.is_free(now)?;
        let Some(object) = self.core.object().filter(|object| !object.record.is_released()) else {
            return Some(is_free);
        };
        // Between two reads nothing is known; they are half of the pause to one and a half of it apart.
        let unread = match *self.strict.standing.borrow() {
            Some(Standing::Observer(pause)) => pause.saturating_mul(2),
            Some(Standing::Candidate(_)) | None => 0,
        };
        let is_unread = self.core.since().is_some_and(|since| now < since.saturating_add(unread));
        Some(is_free && (!is_unread || object.record.holder.is_empty()))
    }

    fn is_candidate(&self) -> bool {
        matches!(*self.strict.standing.borrow(), Some(Standing::Candidate(_)))
    }

    fn publish(&self) {
        let now = self.parts.clock.now();
        let object = self.core.object();
        let state = State {
            lock: Arc::clone(&self.name),
            relied_on: self.health.relied_on,
            fault: self.health.fault.as_ref().map(|failing| failing.fault.clone()),
            blind: self.blind.clone(),
            reached: self.health.reached(now),
            standing: *self.strict.standing.borrow(),
            holder: self.held.0.clone(),
            tenure: now.saturating_sub(self.held.1),
            age: object.and_then(|_| self.core.since()).map(|since| now.saturating_sub(since)),
            duration: object.map_or(0, |object| {
                object.record.mark.as_ref().map_or(object.record.duration, |mark| mark.duration)
            }),
            free: self.free_since.is_some(),
            free_for: self.free_since.map_or(0, |since| now.saturating_sub(since)),
            leadership: self.desk.current().cloned().map(Into::into),
            working: self.work.is_some(),
            read: self.read.map(|at| now.saturating_sub(at)),
            notes: Arc::clone(&self.notes),
            own: None,
            beside: None,
        };
        self.strict.state.send_if_modified(|before| {
            let differs = before.differs(&state);
            *before = state;
            differs
        });
    }
}

impl Health {
    /// Takes what a request came to. `is_empty`: there is no object, which says nothing about a right to write it.
    fn take(&mut self, fault: Option<Fault>, is_write: bool, is_empty: bool, now: Ms) {
        match fault {
            Some(fault) => {
                let since = self.fault.as_ref().map_or(now, |failing| failing.since);
                self.fault = Some(Failing { fault, since, last: now, is_write });
                self.well = None;
            }
            None => {
                let stays = |failing: &Failing| {
                    // Where no connection came about the next success says all. A write that got no answer is tried again soon, or
                    // not any more.
                    let cause = failing.fault.cause;
                    let is_passing = matches!(cause, Cause::NoAnswer | Cause::Server | Cause::Throttled);
                    let is_over = cause.knocks() || (is_passing && now >= failing.last + PASSING);
                    failing.is_write && !is_over && (!is_write || is_empty)
                };
                if !self.fault.as_ref().is_some_and(stays) {
                    self.fault = None;
                    self.well.get_or_insert(now);
                }
            }
        }
    }

    /// Relied on after two durations without a fault, and no more after half of one with one.
    fn look(&mut self, now: Ms, settings: &Settings) {
        self.relied_on = match (&self.fault, self.well) {
            (Some(failing), _) => self.relied_on && now < failing.since + settings.duration / 2,
            (None, Some(since)) => self.relied_on || now >= since + 2 * settings.duration,
            (None, None) => self.relied_on,
        };
    }

    fn reached(&self, now: Ms) -> Option<bool> {
        match &self.fault {
            None => self.well.map(|_| true),
            Some(Failing { fault, since, .. }) => match fault.cause.reached() {
                Some(false) if now < since + UNREACHED => None,
                reached => reached,
            },
        }
    }
}

async fn some<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards that a right to read is not taken for one to write.
    #[test]
    fn what_could_not_be_written_stays_wrong_until_it_is() {
        let fault = |cause| Some(Fault::new(cause, "it failed"));
        let mut health = Health::default();
        health.take(fault(Cause::Forbidden), true, false, 0);
        for (is_write, is_empty) in [(false, false), (false, true), (true, true)] {
            health.take(None, is_write, is_empty, 2 * PASSING);
            assert!(health.fault.is_some() && health.well.is_none());
        }
        health.take(None, true, false, 2 * PASSING);
        assert!(health.fault.is_none() && health.well.is_some());
        // What got no answer is over after a while, and a read that failed with the next.
        health.take(fault(Cause::NoAnswer), true, false, 0);
        health.take(None, false, false, PASSING - 1);
        assert!(health.fault.is_some());
        health.take(None, false, false, PASSING);
        assert!(health.fault.is_none());
        health.take(fault(Cause::Forbidden), false, false, 0);
        health.take(None, false, false, 1);
        assert!(health.fault.is_none());
    }
}
