//! Each rule by itself, on one candidate and an object that the test makes up. All orders of events are the simulation's.

use super::*;

const D: Ms = 6_000;
const VALID: Ms = validity(D);

/// A candidate `me`, and what the API server would say.
struct Bench {
    candidate: Candidate,
    now: Ms,
    version: u64,
    /// What came out last.
    roles: Vec<Role>,
    sent: Option<(RequestId, Request)>,
}

impl Bench {
    fn new() -> Self {
        Self::of(Standing::Candidate(0))
    }

    fn of(standing: Standing) -> Self {
        let settings = Settings { jitter: false, ..Settings::FAST };
        let candidate = Candidate::new("me", settings, standing, 1);
        let mut bench = Self { candidate, now: 1_000, version: 10, roles: Vec::new(), sent: None };
        bench.input(Input::Tick);
        bench
    }

    fn input(&mut self, input: Input) {
        self.roles.clear();
        for output in self.candidate.input(self.now, input) {
            match output {
                Output::Role(role) => self.roles.push(role),
                Output::Send(id, request) => self.sent = Some((id, request)),
            }
        }
    }

    fn answer(&mut self, answer: Answer) {
        let (id, _) = self.sent.take().unwrap();
        self.input(Input::Answer(id, answer));
    }

    /// Lets time pass, by the timers.
    fn pass(&mut self, time: Ms) {
        let end = self.now + time;
        while let Some(next) = self.candidate.next().filter(|next| *next <= end) {
            self.now = next.max(self.now);
            self.input(Input::Tick);
            assert!(self.candidate.next().is_none_or(|next| next > self.now), "a timer that does not go on");
        }
        self.now = end;
    }

    fn object(&mut self, record: Record) -> Object {
        self.version += 1;
        Object { uid: "uid".into(), version: self.version, record }
    }

    /// The next write, which must be a PUT.
    fn put(&self) -> Write {
        match &self.sent {
            Some((_, Request::Put(write))) => write.clone(),
            other => panic!("no PUT: {other:?}"),
        }
    }

    fn reads(&self) -> bool {
        matches!(self.sent, Some((_, Request::Get)))
    }

    /// What the server stores for a write.
    fn stored(&mut self, write: &Write) -> Object {
        self.object(Record {
            holder: write.holder.clone(),
            duration: write.duration,
            transitions: write.transitions,
            mark: Some(write.mark.clone()),
            ..Record::default()
        })
    }

    /// The write under way is carried out and confirmed.
    fn confirm(&mut self) {
        let object = self.stored(&self.put());
        self.answer(Answer::Object(object));
    }

    /// Reads a released object and takes it; returns when the write left.
    fn lead(&mut self) -> Ms {
        let released = self.object(held("", "other", 1, true));
        self.answer(Answer::Object(released));
        let sent = self.now;
        self.confirm();
        assert!(self.candidate.term().is_some());
        sent
    }

    fn ended(&self, loss: Loss) -> bool {
        self.roles.contains(&Role::Ended(loss)) && self.candidate.term().is_none()
    }
}

fn held(holder: &str, writer: &str, sequence: u64, released: bool) -> Record {
    Record {
        holder: holder.into(),
        duration: D,
        mark: Some(Mark { writer: writer.into(), sequence, duration: D, released }),
        ..Record::default()
    }
}

#[test]
fn a_newcomer_waits_a_full_duration_and_writes_what_it_saw() {
    let mut bench = Bench::new();
    let object = bench.object(held("other", "other", 1, false));
    bench.now += 500;
    bench.answer(Answer::Object(object.clone()));
    bench.pass(D - 1);
    assert!(bench.sent.is_none());
    bench.pass(1);
    let write = bench.put();
    assert_eq!((write.uid, write.version, &*write.holder), (object.uid, object.version, "me"));
    assert_eq!((write.transitions, write.begins), (1, true));
}

#[test]
fn rank_delays_and_does_nothing_else() {
    let mut bench = Bench::of(Standing::Candidate(2));
    let object = bench.object(held("other", "other", 1, false));
    bench.answer(Answer::Object(object));
    bench.pass(D + 599);
    assert!(bench.sent.is_none());
    bench.pass(1);
    assert_eq!(&*bench.put().holder, "me");
}

#[test]
fn what_others_write_starts_the_time_anew_and_labels_do_not() {
    let mut bench = Bench::new();
    let object = bench.object(held("other", "other", 1, false));
    bench.answer(Answer::Object(object));
    bench.pass(4_000);
    let renewed = bench.object(held("other", "other", 2, false));
    bench.input(Input::Seen(renewed));
    bench.pass(4_000);
    let labelled = bench.object(held("other", "other", 2, false));
    bench.input(Input::Seen(labelled.clone()));
    // An older event that comes late is nothing new.
    let late = Object { version: labelled.version - 1, ..labelled.clone() };
    bench.input(Input::Seen(late));
    bench.pass(1_999);
    assert!(bench.sent.is_none());
    bench.pass(1);
    assert_eq!(bench.put().version, labelled.version);
}

#[test]
fn durations_are_those_of_the_record_and_foreign_electors_get_more() {
    let wait = |record: Record| {
        let mut bench = Bench::new();
        let object = bench.object(record);
        bench.answer(Answer::Object(object));
        let start = bench.now;
        while bench.sent.is_none() {
            bench.pass(100);
        }
        bench.now - start
    };
    let foreign = Record { holder: "other".into(), duration: 15_000, ..Record::default() };
    assert_eq!(wait(foreign.clone()), 25_000);
    // It took over from Peili, whose annotation is still there.
    assert_eq!(wait(Record { mark: held("me", "me", 1, false).mark, ..foreign }), 25_000);
    // Somebody shortened what the API shows: the holder counts by the annotation.
    assert_eq!(wait(Record { duration: 1_000, ..held("other", "other", 1, false) }), D);
    assert_eq!(wait(Record { duration: 9_000, ..held("other", "other", 1, false) }), 9_000);
    // Made anew, while its holder may still work.
    assert_eq!(wait(Record::default()), D);
    assert_eq!(wait(held("", "other", 1, false)), D);
    // Nobody waits for ever, whatever stands there.
    assert_eq!(wait(Record { duration: Ms::MAX, ..Record::default() }), LONGEST);
}

#[test]
fn a_missing_object_is_made_without_a_holder() {
    let mut bench = Bench::new();
    bench.answer(Answer::Absent);
    let Some((_, Request::Create(write))) = bench.sent.clone() else { panic!("{:?}", bench.sent) };
    assert!(write.holder.is_empty() && !write.mark.released);
    let object = bench.stored(&write);
    bench.answer(Answer::Object(object));
    assert!(bench.candidate.term().is_none());
    bench.pass(D - 1);
    assert!(bench.sent.is_none());
    bench.pass(1);
    bench.confirm();
    assert!(bench.candidate.term().is_some());
}

#[test]
fn without_the_right_to_create_it_waits_for_the_object() {
    let mut bench = Bench::new();
    let mut tries = 0;
    while bench.now < 120_000 {
        match bench.sent.clone() {
            Some((_, Request::Get)) => bench.answer(Answer::Absent),
            Some((_, Request::Create(_))) => {
                tries += 1;
                bench.answer(Answer::Rejected(None));
            }
            _ => bench.pass(100),
        }
    }
    assert!((6..20).contains(&tries), "{tries}");
    bench.sent = None;
    let object = bench.object(held("", "other", 1, true));
    bench.input(Input::Seen(object));
    bench.pass(30_000);
    assert!(bench.sent.is_some());
}

#[test]
fn validity_counts_from_the_sending() {
    let mut bench = Bench::new();
    let released = bench.object(held("", "other", 1, true));
    bench.answer(Answer::Object(released));
    let sent = bench.now;
    bench.pass(900);
    bench.confirm();
    assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + VALID));
    // Renewed after the time between renewals, not after the answer.
    bench.pass(600);
    assert!(!bench.put().begins);
    bench.pass(300);
    bench.confirm();
    assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + 1_500 + VALID));
}

#[test]
fn an_answer_that_comes_too_late_makes_no_leader() {
    let mut bench = Bench::new();
    let released = bench.object(held("", "other", 1, true));
    bench.answer(Answer::Object(released));
    // The process stood still: no timer came.
    bench.now += VALID;
    let object = bench.stored(&bench.put());
    let (id, _) = bench.sent.take().unwrap();
    bench.input(Input::Answer(id, Answer::Object(object)));
    assert!(bench.roles.is_empty() && bench.candidate.term().is_none());
}

#[test]
fn a_silent_renewal_moves_nothing_and_is_followed_by_a_read() {
    let mut bench = Bench::new();
    let sent = bench.lead();
    let token = bench.candidate.term().map(|(token, _)| token.clone());
    bench.pass(1_500);
    let lost = bench.put();
    bench.pass(1_000);
    bench.pass(300);
    assert!(bench.reads());
    // It was carried out.
    let object = bench.stored(&lost);
    bench.answer(Answer::Object(object));
    assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + VALID));
    bench.confirm();
    assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + 2_800 + VALID));
    assert_eq!(bench.candidate.term().map(|(token, _)| token.clone()), token);
}

#[test]
fn what_changed_nothing_is_no_renewal() {
    let mut bench = Bench::new();
    let sent = bench.lead();
    let before = bench.candidate.object().cloned().unwrap();
    bench.pass(1_500);
    bench.answer(Answer::Object(before));
    assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + VALID));
    // Nor is one whose version did not move, or whose words are those of an earlier one.
    for (moves, is_said) in [(false, true), (true, false)] {
        let mut bench = Bench::new();
        let sent = bench.lead();
        let mut object = bench.candidate.object().cloned().unwrap();
        bench.pass(1_500);
        object.version += u64::from(moves);
        if is_said {
            object.record.mark = Some(bench.put().mark);
        }
        bench.answer(Answer::Object(object));
        assert_eq!(bench.candidate.term().map(|(_, until)| until), Some(sent + VALID), "{moves}");
    }
    // Each write is another one.
    let mut sequences = Vec::new();
    let mut bench = Bench::new();
    bench.lead();
    for _ in 0..3 {
        bench.pass(1_500);
        sequences.push(bench.put().mark.sequence);
        bench.confirm();
    }
    assert_eq!(sequences, [2, 3, 4]);
}

#[test]
fn a_term_ends_at_once_when_the_object_says_so() {
    type Change = fn(&mut Bench, Object) -> Input;
    let cases: [(Loss, Change); 5] = [
        (Loss::Foreign, |bench, _| Input::Seen(bench.object(held("other", "other", 9, false)))),
        (Loss::Foreign, |bench, _| Input::Seen(bench.object(held("", "other", 9, true)))),
        (Loss::Deleted, |bench, object| {
            bench.version += 1;
            Input::Gone(object.version + 1)
        }),
        (Loss::Replaced, |bench, object| {
            bench.version += 1;
            Input::Seen(Object { uid: "another".into(), version: object.version + 1, ..object })
        }),
        (Loss::Preferred, |bench, object| {
            Input::Seen(bench.object(Record { preferred: true, ..object.record }))
        }),
    ];
    for (loss, change) in cases {
        let mut bench = Bench::new();
        bench.lead();
        let object = bench.candidate.object().cloned().unwrap();
        let input = change(&mut bench, object);
        bench.input(input);
        assert!(bench.ended(loss), "{loss:?}: {:?}", bench.roles);
        // Nothing is written while the work goes on.
        bench.sent = None;
        bench.pass(60_000);
        assert!(!matches!(bench.sent, Some((_, Request::Put(_) | Request::Create(_)))), "{loss:?}");
    }
    // The same from a read, after a conflict: 404.
    let mut bench = Bench::new();
    bench.lead();
    bench.pass(1_500);
    bench.answer(Answer::Conflict);
    assert!(bench.reads() && bench.candidate.term().is_some());
    bench.answer(Answer::Absent);
    assert!(bench.ended(Loss::Deleted));
}

#[test]
fn a_term_ends_by_the_clock_and_the_next_has_another_token() {
    let mut bench = Bench::new();
    bench.lead();
    let (token, _) = bench.candidate.term().map(|(token, until)| (token.clone(), until)).unwrap();
    let written = bench.candidate.object().cloned().unwrap();
    bench.sent = None;
    bench.pass(VALID);
    assert!(bench.candidate.term().is_none());
    while !bench.reads() {
        bench.pass(100);
    }
    bench.answer(Answer::Object(written));
    assert!(bench.sent.is_none(), "its work has not ended");
    bench.input(Input::Joined);
    // Its own record: nobody else can lead.
    let write = bench.put();
    assert!(write.begins);
    bench.confirm();
    assert!(bench.candidate.term().is_some_and(|(next, _)| *next > token));
}

#[test]
fn an_own_record_that_another_followed_is_a_strangers() {
    let mut bench = Bench::new();
    let released = bench.object(held("", "other", 1, true));
    bench.answer(Answer::Object(released));
    let late = bench.put();
    bench.sent = None;
    let other = bench.object(held("other", "other", 5, false));
    bench.input(Input::Seen(other));
    // etcd was restored, or somebody wrote the old one again.
    let again = bench.stored(&late);
    bench.input(Input::Seen(again.clone()));
    let end = bench.now + D;
    // The write timed out, and the object is read.
    while !bench.reads() {
        assert!(!matches!(bench.sent, Some((_, Request::Put(_)))), "{:?}", bench.sent);
        bench.pass(50);
    }
    bench.answer(Answer::Object(again));
    bench.pass(end - 1 - bench.now);
    assert!(bench.sent.is_none(), "{:?}", bench.sent);
    bench.pass(1);
    assert!(bench.put().begins);
}

#[test]
fn a_shorter_duration_shortens_before_it_is_sent() {
    let mut bench = Bench::new();
    let sent = bench.lead();
    bench.input(Input::Configured(Settings { jitter: false, ..Settings::new(3_000, 800) }));
    let end = |bench: &Bench| bench.candidate.term().map(|(_, until)| until);
    assert_eq!(end(&bench), Some(sent + VALID));
    bench.pass(1_500);
    assert_eq!(bench.put().duration, 3_000);
    assert_eq!(end(&bench), Some(sent + 1_500 + validity(3_000)));
    let token = bench.candidate.term().map(|(token, _)| token.clone()).unwrap();
    assert_eq!(bench.roles, [Role::Leader(token, sent + 1_500 + validity(3_000))]);
}

#[test]
fn a_lease_is_given_away_after_the_work_has_ended() {
    for for_good in [false, true] {
        let mut bench = Bench::new();
        bench.lead();
        bench.sent = None;
        bench.input(Input::Leave(for_good));
        assert!(bench.ended(Loss::Yielded));
        assert!(bench.sent.is_none() && !bench.candidate.is_finished());
        bench.input(Input::Joined);
        let write = bench.put();
        assert!(write.holder.is_empty() && write.mark.released);
        bench.confirm();
        assert_eq!(bench.candidate.is_finished(), for_good);
        // Others come first.
        bench.pass(D - 1);
        assert!(bench.sent.is_none());
        bench.pass(1_000);
        assert_eq!(bench.sent.is_some(), !for_good);
    }
}

#[test]
fn who_may_not_lead_gives_back_what_it_was_given_late() {
    let mut bench = Bench::new();
    let released = bench.object(held("", "other", 1, true));
    bench.answer(Answer::Object(released));
    bench.input(Input::Ranked(Standing::Observer(30_000)));
    bench.confirm();
    assert!(bench.candidate.term().is_none());
    assert!(bench.put().mark.released);
}

#[test]
fn an_observer_only_reads_now_and_then() {
    let mut bench = Bench::of(Standing::Observer(30_000));
    let mut reads = 0;
    for _ in 0..6_000 {
        match bench.sent.clone() {
            Some((_, Request::Get)) => {
                reads += 1;
                let object = bench.object(held("", "other", 1, true));
                bench.answer(Answer::Object(object));
            }
            None => bench.pass(100),
            other => panic!("{other:?}"),
        }
    }
    assert!((10..60).contains(&reads), "{reads}");
}

#[test]
fn the_server_may_ask_for_a_pause_but_not_for_the_term() {
    let mut bench = Bench::new();
    let sent = bench.lead();
    bench.pass(1_500);
    bench.answer(Answer::Rejected(Some(60_000)));
    bench.pass(VALID - 1_500 - 1_000);
    assert!(bench.reads(), "tried once more before the end");
    assert!(bench.candidate.term().is_some() && bench.now < sent + VALID);
    // Who does not lead waits as long as it is asked to.
    let mut bench = Bench::new();
    bench.answer(Answer::Rejected(Some(20_000)));
    bench.pass(19_999);
    assert!(bench.sent.is_none());
    bench.pass(1_000);
    assert!(bench.reads());
}

#[test]
fn pauses_grow_and_end_when_the_server_is_back() {
    let mut bench = Bench::new();
    let mut times = Vec::new();
    while bench.now < 200_000 {
        if bench.reads() {
            times.push(bench.now);
            bench.answer(Answer::Unknown);
        } else {
            bench.pass(50);
        }
    }
    let gaps: Vec<Ms> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[0] <= 1_000 && gaps.iter().all(|gap| *gap <= 2_100), "{gaps:?}");
    assert!(gaps.last().is_some_and(|gap| *gap >= 1_500), "{gaps:?}");
    bench.input(Input::Reread);
    assert!(bench.reads());
    // Told so while a request is under way: its failure does not put that off.
    bench.input(Input::Reread);
    bench.answer(Answer::Unknown);
    assert!(bench.reads());
    bench.answer(Answer::Unknown);
    assert!(!bench.reads());
}
