//! The decision log: what policies were asked and what they said, so that it can be asked again.
//!
//! Whoever decides copies the question and puts it into a bounded queue; what finds no place is dropped and counted. How a
//! line reaches its file is `writer`'s, what a question looks like is `cases`'.

mod writer;

use std::fmt;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::{Deserialize, Serialize};

use super::cases::{Asked, Who, timestamp};
use super::chain::Chain;
use super::config::{Decisions, Mode};
use super::metrics::Recorded;
use super::registry::{self, Registry};
use super::trust::{self, Trust};
use super::world::World;
use super::{Failure, Node, Said};

/// Decisions that wait to be written: some MiB at most, since a question has some KiB.
const QUEUE: usize = 1024;
/// Longest line, in bytes.
pub const LINE_LIMIT: usize = 64 << 10;

/// One decision: a line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// When it was asked; what the policies were told is the time.
    #[serde(with = "timestamp")]
    time: Option<SystemTime>,
    /// Of the policies that were in force.
    pub generation: i64,
    /// `registry` or `trust`.
    pub world: String,
    /// The node that asked.
    pub here: Who,
    /// The question.
    pub request: Asked,
    /// What all policies together said.
    pub ruling: String,
    /// The policy that decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// What each of them said, in their order.
    pub said: Vec<Said>,
}

impl Record {
    /// Reads a line of the log.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        if line.len() > LINE_LIMIT {
            return Err("it has more than 64 KiB".into());
        }
        let mut record: Self = serde_json::from_str(line).map_err(|error| error.to_string())?;
        record.request.now = record.time;
        Ok(record)
    }
}

/// A world whose decisions are recorded.
pub(super) trait Recordable:
    World<Request: Clone + Send, Verdict: Clone + Send, Ruling: Clone + Send + fmt::Display>
{
    fn asked(request: &Self::Request) -> Asked;
    /// The policy that decided.
    fn by(ruling: &Self::Ruling) -> Option<&str>;
}

impl Recordable for Registry {
    fn asked(request: &registry::Request) -> Asked {
        request.into()
    }

    fn by(ruling: &registry::Ruling) -> Option<&str> {
        ruling.by.as_deref()
    }
}

impl Recordable for Trust {
    fn asked(request: &trust::Request) -> Asked {
        request.into()
    }

    fn by(ruling: &trust::Ruling) -> Option<&str> {
        ruling.by.as_deref()
    }
}

/// A decision on its way to the file; the text is made there.
type Job = Box<dyn FnOnce() -> Record + Send>;

/// The log, or none.
pub(super) struct Recorder {
    here: ArcSwap<Who>,
    sink: ArcSwapOption<Sink>,
    /// The thread that writes, or wrote.
    writer: Mutex<Option<JoinHandle<()>>>,
    counted: Recorded,
    /// Why nothing is recorded.
    problem: Arc<Mutex<Option<String>>>,
}

struct Sink {
    jobs: SyncSender<Job>,
    config: Decisions,
}

/// What one policy said.
struct Answer<V> {
    policy: Arc<str>,
    mode: Mode,
    took: Duration,
    verdict: Result<V, Failure>,
}

impl Recorder {
    pub(super) fn new(here: &Node, counted: Recorded) -> Self {
        Self {
            here: ArcSwap::from_pointee(here.into()),
            sink: ArcSwapOption::empty(),
            writer: Mutex::default(),
            counted,
            problem: Arc::default(),
        }
    }

    /// What is recorded of this node from now on.
    pub(super) fn set_here(&self, here: &Node) {
        self.here.store(Arc::new(here.into()));
    }

    /// Records to this file from now on, or nowhere. Waits for nothing.
    pub(super) fn configure(&self, config: Option<&Decisions>) {
        if self.sink.load().as_ref().map(|sink| &sink.config) == config {
            return;
        }
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // What is in the queue of the one before is written; then its thread ends.
        self.sink.store(None);
        writer::set(&self.problem, None);
        let Some(config) = config else { return };
        let (jobs, received) = sync_channel::<Job>(QUEUE);
        let (before, path) = (writer.take(), config.path.clone());
        let (counted, problem) = (self.counted.clone(), Arc::clone(&self.problem));
        let limit = config.max_size.as_u64();
        let started = thread::Builder::new().name("decisions".into()).spawn(move || {
            // Two that write one file would rotate it under each other.
            before.map(JoinHandle::join);
            writer::run(&received, path, limit, &counted, &problem);
        });
        match started {
            Ok(thread) => {
                *writer = Some(thread);
                self.sink.store(Some(Arc::new(Sink { jobs, config: config.clone() })));
            }
            Err(error) => writer::set(&self.problem, Some(format!("no thread: {error}"))),
        }
    }

    /// Why decisions are not recorded although they should be.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets a chain decide, and records it if that is to be: what any policy denies or does not answer, and some of the rest.
    pub(super) fn decide<W: Recordable>(
        &self,
        chain: &Chain<W>,
        generation: i64,
        request: &W::Request,
    ) -> W::Ruling {
        let sink = self.sink.load();
        let Some(sink) = &*sink else { return chain.decide(request, |_, _, _| {}) };
        let mut answers = Vec::new();
        let mut is_denied = false;
        let ruling = chain.decide(request, |entry, took, answer| {
            is_denied |= answer.as_ref().is_ok_and(|verdict| W::OUTCOMES[W::outcome(verdict)] == "deny")
                || answer.is_err();
            let (policy, mode, verdict) = (Arc::clone(&entry.name), entry.mode, answer.clone());
            answers.push(Answer { policy, mode, took, verdict });
        });
        if is_denied || is_picked(sink.config.sample) {
            let (here, request, said) = (self.here.load_full(), request.clone(), ruling.clone());
            let job = move || record::<W>(generation, Who::clone(&here), &request, &said, answers);
            if let Err(error) = sink.jobs.try_send(Box::new(job)) {
                self.counted.dropped.inc();
                if matches!(error, TrySendError::Disconnected(_)) {
                    // It never ends while there is somebody to send; a panic ends it.
                    writer::set(&self.problem, Some("the thread that writes them has ended".into()));
                }
            }
        }
        ruling
    }
}

/// One in so many; 0: none.
fn is_picked(sample: u32) -> bool {
    match sample {
        0 => false,
        sample => rand::random_ratio(1, sample),
    }
}

fn record<W: Recordable>(
    generation: i64,
    here: Who,
    request: &W::Request,
    ruling: &W::Ruling,
    answers: Vec<Answer<W::Verdict>>,
) -> Record {
    let mut request = W::asked(request);
    let said = answers
        .into_iter()
        .map(|Answer { policy, mode, took, verdict }| said::<W>(&policy, mode, took, verdict.as_ref()));
    Record {
        // Once a line.
        time: request.now.take(),
        generation,
        world: W::NAME.into(),
        here,
        request,
        ruling: ruling.to_string(),
        by: W::by(ruling).map(Into::into),
        said: said.collect(),
    }
}

/// What one policy said, in words.
pub(super) fn said<W: World>(
    policy: &str,
    mode: Mode,
    took: Duration,
    verdict: Result<&W::Verdict, &Failure>,
) -> Said {
    Said {
        policy: policy.to_owned(),
        mode,
        micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        verdict: verdict.map_or_else(|failure| format!("failed: {failure}"), W::describe),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::policy::registry::{Availability, Decision, Request, Requester, Ruling, Verdict};

    fn request() -> Request {
        let image = "r.test/a/b:v1".parse().unwrap();
        Request::manifest(&image, Requester::Runtime, Availability::default(), Arc::default())
    }

    fn recorder(sample: u32, queue: usize) -> (Recorder, std::sync::mpsc::Receiver<Job>) {
        let (jobs, received) = sync_channel(queue);
        let recorder = Recorder::new(&Node::default(), Recorded::default());
        let config = Decisions { path: "/x".into(), max_size: bytesize::ByteSize::mib(1), sample };
        recorder.sink.store(Some(Arc::new(Sink { jobs, config })));
        (recorder, received)
    }

    fn chain(answers: &[Result<Decision, Failure>]) -> Chain<Registry> {
        struct Says(Result<Decision, Failure>);
        impl crate::policy::chain::Answers<Registry> for Says {
            fn decide(&self, _: &Request, _: Instant) -> Result<Verdict, Failure> {
                self.0.clone().map(|decision| Verdict { decision, reason: None })
            }
        }
        let entry = |(number, answer): (usize, &Result<Decision, Failure>)| crate::policy::chain::Entry {
            name: format!("p{number}").into(),
            mode: if number == 0 { Mode::Monitor } else { Mode::Enforce },
            failing: crate::policy::Failing::Bypass,
            time: None,
            policy: Box::new(Says(answer.clone())) as _,
            metrics: crate::policy::metrics::Metrics::default().of::<Registry>("p"),
            quarantine: crate::policy::chain::Quarantine::default(),
        };
        Chain::new(answers.iter().enumerate().map(entry).collect())
    }

    #[test]
    fn denials_and_failures_are_all_recorded_and_the_rest_is_sampled() {
        let failed = || Err(Failure::Trap("x".into()));
        for (answers, sample, recorded) in [
            (vec![Ok(Decision::Abstain), Ok(Decision::Abstain)], 0, false),
            (vec![Ok(Decision::Abstain), Ok(Decision::Abstain)], 1, true),
            (vec![Ok(Decision::Abstain), Ok(Decision::Deny)], 0, true),
            // What a policy would deny that is only watched is what it is watched for.
            (vec![Ok(Decision::Deny), Ok(Decision::Abstain)], 0, true),
            (vec![Ok(Decision::Abstain), failed()], 0, true),
        ] {
            let (recorder, received) = recorder(sample, 1);
            let chain = chain(&answers);
            let request = request();
            let ruling: Ruling = recorder.decide(&chain, 7, &request);
            assert_eq!(ruling, chain.decide(&request, |_, _, _| {}), "recording changes nothing");
            let Ok(job) = received.try_recv() else {
                assert!(!recorded, "{answers:?}");
                continue;
            };
            let line = serde_json::to_string(&job()).unwrap();
            let record = Record::parse(&line).unwrap();
            assert!(recorded && record.said.len() == 2 && record.generation == 7, "{line}");
            assert_eq!(record.ruling, ruling.to_string());
            let asked = record.request.registry().unwrap();
            let millis = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
            assert_eq!(millis(asked.now), millis(request.now));
            assert_eq!(Request { now: request.now, ..asked }, request);
        }
    }

    #[test]
    fn nobody_waits_for_the_disk() {
        let (recorder, _received) = recorder(1, 1);
        let chain = chain(&[Ok(Decision::Abstain)]);
        for _ in 0..3 {
            recorder.decide(&chain, 1, &request());
        }
        assert_eq!(recorder.counted.dropped.get(), 2);
    }

    #[test]
    fn that_nobody_writes_any_more_is_told() {
        let (recorder, received) = recorder(1, 1);
        assert_eq!(recorder.problem(), None);
        drop(received);
        recorder.decide(&chain(&[Ok(Decision::Abstain)]), 1, &request());
        assert_eq!(recorder.counted.dropped.get(), 1);
        assert!(recorder.problem().unwrap().contains("has ended"));
    }

    #[test]
    fn one_in_so_many() {
        let picked = (0..10_000).filter(|_| is_picked(10)).count();
        assert!((800..1200).contains(&picked), "{picked}");
        assert!(!(0..100).any(|_| is_picked(0)) && (0..100).all(|_| is_picked(1)));
    }
}
