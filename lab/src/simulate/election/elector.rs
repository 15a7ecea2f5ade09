//! What is simulated: the core that ships, the same with one rule broken, and two algorithms that are in use elsewhere.

use std::sync::Arc;

use peili::election::lease::{
    Answer, Candidate, Input, Loss, Mark, Ms, Object, Output, Request, RequestId, Role, Rules, Settings,
    Shipped, Standing, Token, Write,
};

/// An elector of one process.
pub(super) trait Elector {
    fn input(&mut self, now: Ms, input: Input) -> Vec<Output>;
    fn next(&self) -> Option<Ms>;
}

impl<R: Rules> Elector for Candidate<R> {
    fn input(&mut self, now: Ms, input: Input) -> Vec<Output> {
        Self::input(self, now, input)
    }

    fn next(&self) -> Option<Ms> {
        Self::next(self)
    }
}

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    Shipped,
    ClientGo,
    MergePatch,
    StampedAtResponse,
    OneClock,
    NoUid,
    NoOpCounts,
    ShrunkLate,
    ReleaseFirst,
    /// The core that ships, and work that asks it once for a whole task.
    GuardOnce,
}

impl Variant {
    /// All that have to be caught.
    pub(super) const BROKEN: [Self; 9] = [
        Self::ClientGo,
        Self::MergePatch,
        Self::StampedAtResponse,
        Self::OneClock,
        Self::NoUid,
        Self::NoOpCounts,
        Self::ShrunkLate,
        Self::ReleaseFirst,
        Self::GuardOnce,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Shipped => "as shipped",
            Self::ClientGo => "client-go's algorithm",
            Self::MergePatch => "merge patch",
            Self::StampedAtResponse => "validity stamped at the response",
            Self::OneClock => "(1 - rho) only",
            Self::NoUid => "no uid",
            Self::NoOpCounts => "no-op renewal counted",
            Self::ShrunkLate => "duration shortened after the write",
            Self::ReleaseFirst => "release before join",
            Self::GuardOnce => "guard checked once per task",
        }
    }

    /// An elector for one process.
    pub(super) fn elector(
        self,
        identity: &str,
        settings: Settings,
        standing: Standing,
        seed: u64,
    ) -> Box<dyn Elector> {
        fn by<R: Rules + 'static>(
            identity: &str,
            settings: Settings,
            standing: Standing,
            seed: u64,
        ) -> Box<dyn Elector> {
            Box::new(Candidate::<R>::new(identity, settings, standing, seed))
        }
        match self {
            Self::Shipped | Self::GuardOnce => by::<Shipped>(identity, settings, standing, seed),
            Self::StampedAtResponse => by::<StampedAtResponse>(identity, settings, standing, seed),
            Self::OneClock => by::<OneClock>(identity, settings, standing, seed),
            Self::NoUid => by::<NoUid>(identity, settings, standing, seed),
            Self::NoOpCounts => by::<NoOpCounts>(identity, settings, standing, seed),
            Self::ShrunkLate => by::<ShrunkLate>(identity, settings, standing, seed),
            Self::ReleaseFirst => by::<ReleaseFirst>(identity, settings, standing, seed),
            Self::ClientGo => Box::new(Simple::new(identity, &settings, standing, true)),
            Self::MergePatch => Box::new(Simple::new(identity, &settings, standing, false)),
        }
    }
}

macro_rules! broken {
    ($($name:ident: $rule:ident),* $(,)?) => {
        $(
            #[derive(Clone, PartialEq, Eq, Hash)]
            pub(super) struct $name;
            impl Rules for $name {
                const $rule: bool = false;
            }
        )*
    };
}

broken! {
    StampedAtResponse: STAMPS_AT_SEND,
    OneClock: BOTH_CLOCKS,
    NoUid: SENDS_UID,
    NoOpCounts: RENEWS_VISIBLY,
    ShrunkLate: SHRINKS_FIRST,
    ReleaseFirst: JOINS_FIRST,
}

/// client-go's elector as of 1.3x (`compares`), with the times in the proportion of its defaults: it stops a renewal
/// deadline after the last answer, goes on while it sees another holder, and has no guard but its own flag. The other one
/// (`!compares`) is what crates do that acquire by a merge patch: no version in the write, so that the last one wins.
struct Simple {
    identity: Arc<str>,
    duration: Ms,
    deadline: Ms,
    retry: Ms,
    compares: bool,
    campaigns: bool,
    seen: Option<(Object, Ms)>,
    absent: bool,
    leads: bool,
    /// Of the last answer that confirmed the lease.
    confirmed: Ms,
    flight: Option<(RequestId, Ms, bool)>,
    requests: RequestId,
    next_try: Ms,
    reads: bool,
    sequence: u64,
}

impl Simple {
    fn new(identity: &str, settings: &Settings, standing: Standing, compares: bool) -> Self {
        Self {
            identity: identity.into(),
            duration: settings.duration,
            deadline: settings.duration * 2 / 3,
            retry: settings.duration * 2 / 15,
            compares,
            campaigns: matches!(standing, Standing::Candidate(_)),
            seen: None,
            absent: false,
            leads: false,
            confirmed: 0,
            flight: None,
            requests: 0,
            next_try: 0,
            reads: true,
            sequence: 0,
        }
    }

    fn see(&mut self, now: Ms, object: Object) {
        if self.seen.as_ref().is_none_or(|(before, _)| before.record != object.record) {
            self.seen = Some((object, now));
        } else if let Some((before, _)) = &mut self.seen {
            before.version = object.version;
        }
        self.absent = false;
    }

    /// Holding it, or free to be taken.
    fn may_write(&self, now: Ms) -> bool {
        match &self.seen {
            _ if self.absent => true,
            None => false,
            Some((object, at)) => {
                let record = &object.record;
                record.holder == self.identity || record.holder.is_empty() || at + record.duration <= now
            }
        }
    }

    fn write(&mut self) -> Request {
        self.sequence += 1;
        let object = self.seen.as_ref().filter(|_| !self.absent).map(|(object, _)| object);
        let write = Write {
            uid: "".into(),
            version: object.filter(|_| self.compares).map_or(0, |object| object.version),
            holder: self.identity.clone(),
            duration: self.duration,
            transitions: object.map_or(0, |object| object.record.transitions + 1),
            mark: Mark {
                writer: self.identity.clone(),
                sequence: self.sequence,
                duration: self.duration,
                released: false,
            },
            begins: !self.leads,
        };
        if object.is_some() { Request::Put(write) } else { Request::Create(write) }
    }

    fn answered(&mut self, now: Ms, writes: bool, answer: Answer, out: &mut Vec<Output>) {
        self.next_try = now + self.retry;
        match answer {
            Answer::Object(object) if writes => {
                let token = Token { uid: object.uid.clone(), version: object.version, transitions: 0 };
                let is_ours = object.record.holder == self.identity;
                self.see(now, object);
                if is_ours {
                    self.confirmed = now;
                    self.reads = false;
                    if !self.leads {
                        self.leads = true;
                        out.push(Output::Role(Role::Leader(token, Ms::MAX)));
                    }
                }
            }
            Answer::Object(object) => {
                self.see(now, object);
                self.reads = false;
                if self.may_write(now) {
                    self.next_try = now;
                }
            }
            Answer::Absent => {
                self.absent = true;
                self.reads = false;
                self.next_try = now;
            }
            Answer::Conflict | Answer::Rejected(_) | Answer::Unknown => self.reads = true,
        }
    }
}

impl Elector for Simple {
    fn input(&mut self, now: Ms, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Answer(id, answer) => {
                if let Some((_, _, writes)) = self.flight.take_if(|(flight, ..)| *flight == id) {
                    self.answered(now, writes, answer, &mut out);
                }
            }
            Input::Ranked(standing) => self.campaigns = matches!(standing, Standing::Candidate(_)),
            Input::Leave(_) if self.leads => {
                self.leads = false;
                out.push(Output::Role(Role::Ended(Loss::Yielded)));
            }
            _ => {}
        }
        if self.leads && self.confirmed + self.deadline <= now {
            self.leads = false;
            out.push(Output::Role(Role::Ended(Loss::Expired)));
        }
        // A request may take as long as the deadline.
        if let Some((_, _, writes)) = self.flight.take_if(|(_, sent, _)| *sent + self.deadline <= now) {
            self.answered(now, writes, Answer::Unknown, &mut out);
        }
        if self.flight.is_none() && self.next_try <= now && (self.campaigns || self.leads) {
            self.requests += 1;
            let writes = !self.reads && self.may_write(now);
            let request = if writes { self.write() } else { Request::Get };
            self.flight = Some((self.requests, now, writes));
            out.push(Output::Send(self.requests, request));
        }
        out
    }

    fn next(&self) -> Option<Ms> {
        let request = match &self.flight {
            Some((_, sent, _)) => sent + self.deadline,
            None if self.campaigns || self.leads => self.next_try,
            None => Ms::MAX,
        };
        Some(if self.leads { request.min(self.confirmed + self.deadline) } else { request })
    }
}
