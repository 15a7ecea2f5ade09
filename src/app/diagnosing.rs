//! A node whose elections are degraded looks for why, as `peili doctor` does: a log line for each change, a metric, the status.
//!
//! Nothing waits for it, and it mends nothing. A look that asks the API server keeps to what elections may ask (docs/elections.md); where
//! there is no way to it nothing is asked.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::time::{Instant, sleep};

use crate::admin;
use crate::config::Config;
use crate::doctor::code::{Code, Severity};
use crate::doctor::{REQUESTS, Report, Subject, Told, Verdict, examine};
use crate::election::Election;
use crate::election::lease::Standing;
use crate::election::strict::{Cause, State};
use crate::network::facts::ApiServer;
use crate::network::swarm::SwarmNetwork;

/// How often it is looked whether elections are degraded.
const POLL: Duration = Duration::from_secs(1);
/// How long they must be: an API server that is started again is no finding.
const PATIENCE: Duration = Duration::from_secs(10);
/// Nodes that lose the API server together look within this time.
const SPREAD: Duration = Duration::from_secs(5);
/// Between two looks that ask nothing.
const AGAIN: Duration = Duration::from_secs(60);
/// For each question: of one of the five that stand for the lease, and of any other node, of which all together ask once a second.
const CANDIDATE: Duration = Duration::from_secs(6);
const OBSERVER: Duration = Duration::from_secs(30);

/// What is wrong, as this node found it.
pub(super) struct Diagnosing {
    subject: Subject,
    found: Mutex<Found>,
    verdicts: Family<Labels, Gauge>,
}

#[derive(Default)]
struct Found {
    looked: Option<Instant>,
    lost: Option<(Instant, SystemTime)>,
    /// Other members that reach the API server, and that do not, by their own word.
    reach: usize,
    lack: usize,
    verdicts: Vec<Verdict>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    code: &'static str,
    severity: &'static str,
}

/// When it looks, in a time in which elections are degraded.
#[derive(Default)]
struct Schedule {
    due: Option<Instant>,
    /// Not before this is anything asked.
    asks_from: Option<Instant>,
    /// That is spread over the nodes: they all come to be able to ask at once.
    is_spread: bool,
}

/// One look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// The way to the API server, and names.
    Way,
    /// What it says, too.
    Whole,
}

impl Diagnosing {
    /// Nothing is wrong yet.
    pub(super) fn new(config: &Config, registry: &mut Registry) -> Self {
        let verdicts: Family<Labels, Gauge> = Family::default();
        registry.register("verdicts", "1 for what this node found to be wrong", verdicts.clone());
        let mut subject = Subject::new(config.clone(), None);
        // It would ask itself.
        subject.admin = None;
        Self { subject, found: Mutex::default(), verdicts }
    }

    /// Follows the elections among these nodes. Ends never.
    pub(super) async fn follow(self: Arc<Self>, election: Election, network: SwarmNetwork) {
        let mut schedule = Schedule::default();
        loop {
            sleep(POLL).await;
            let state = election.strictly();
            let state = state.filter(|state| !state.relied_on);
            let Some(state) = state else {
                schedule.rest();
                self.reaches(Some(true));
                self.publish(None);
                continue;
            };
            self.reaches(state.reached);
            self.others(&network);
            let pace = pace(&state, network.known_peers().len() + 1);
            let Some(look) = schedule.look(&state, pace, Instant::now(), rand::random()) else { continue };
            let (asks, told) = (look == Look::Whole, self.told());
            let report = examine(&Subject { asks, told, ..self.subject.clone() }).await;
            schedule.looked(report.asked, pace, Instant::now(), rand::random());
            // Elections may have recovered meanwhile.
            if election.strictly().is_some_and(|state| !state.relied_on) {
                self.publish(Some(report));
            }
        }
    }

    /// As it is shown.
    pub(super) fn status(&self) -> admin::Diagnosis {
        let found = self.lock();
        let verdict = |verdict: &Verdict| admin::Verdict {
            code: verdict.code.name().into(),
            severity: verdict.severity.name().into(),
            confidence: verdict.confidence.name().into(),
            text: verdict.text.clone(),
            evidence: verdict.evidence.clone(),
            other_causes: verdict.other_causes.clone(),
            fix: verdict.fix.clone(),
        };
        admin::Diagnosis {
            age_seconds: found.looked.map(|looked| looked.elapsed().as_secs()),
            unreached_seconds: found.lost.map(|(lost, _)| lost.elapsed().as_secs()),
            members_reach: found.reach,
            members_lack: found.lack,
            verdicts: found.verdicts.iter().map(verdict).collect(),
        }
    }

    /// One line for each verdict.
    pub(super) fn problems(&self) -> Vec<String> {
        let line = |verdict: &Verdict| {
            let Verdict { code, text, fix, .. } = verdict;
            format!("doctor: {}: {text} (`peili doctor` has the evidence): {fix}", code.name())
        };
        self.lock().verdicts.iter().map(line).collect()
    }

    fn told(&self) -> Option<Told> {
        let found = self.lock();
        found.lost.map(|(_, lost)| Told { lost, reach: found.reach, lack: found.lack })
    }

    /// Counts what the others say; who is suspected says nothing new.
    fn others(&self, network: &SwarmNetwork) {
        let members = network.members();
        let others = members
            .iter()
            .filter(|member| member.suspected.is_none() && member.peer.id != *network.peer_id());
        let count =
            |wanted: ApiServer| others.clone().filter(|member| member.facts.api_server == wanted).count();
        let (reach, lack) = (count(ApiServer::Reachable), count(ApiServer::Unreachable));
        let mut found = self.lock();
        (found.reach, found.lack) = (reach, lack);
    }

    fn reaches(&self, reached: Option<bool>) {
        let mut found = self.lock();
        match reached {
            Some(false) => drop(found.lost.get_or_insert_with(|| (Instant::now(), SystemTime::now()))),
            Some(true) => (found.lost, found.reach, found.lack) = (None, 0, 0),
            // Not known: as it was.
            None => {}
        }
    }

    /// Tells what is new and what is over. `None`: elections are as they should be.
    fn publish(&self, report: Option<Report>) {
        let mut found = self.lock();
        found.looked = report.is_some().then(Instant::now);
        let verdicts = report.map(|report| report.verdicts).unwrap_or_default();
        let verdicts: Vec<Verdict> =
            verdicts.into_iter().filter(|verdict| verdict.severity > Severity::Note).collect();
        let codes = |verdicts: &[Verdict]| verdicts.iter().map(|one| one.code).collect::<BTreeSet<Code>>();
        let (before, now) = (codes(&found.verdicts), codes(&verdicts));
        for code in before.difference(&now) {
            self.gauge(*code).set(0);
            tracing::info!(code = code.name(), "diagnosis: it is over");
        }
        for verdict in verdicts.iter().filter(|verdict| !before.contains(&verdict.code)) {
            self.gauge(verdict.code).set(1);
            tracing::warn!(
                code = verdict.code.name(), severity = verdict.severity.name(), confidence = verdict.confidence.name(),
                evidence = ?verdict.evidence, fix = verdict.fix, "diagnosis: {}", verdict.text
            );
        }
        found.verdicts = verdicts;
    }

    fn gauge(&self, code: Code) -> Gauge {
        let labels = Labels { code: code.name(), severity: code.severity().name() };
        self.verdicts.get_or_create(&labels).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Between two looks that ask the API server.
fn pace(state: &State, members: usize) -> Duration {
    let each = match state.standing {
        Some(Standing::Candidate(_)) => CANDIDATE,
        Some(Standing::Observer(_)) | None => OBSERVER.max(Duration::from_secs(members as u64)),
    };
    each * REQUESTS
}

impl Schedule {
    /// Elections are as they should be.
    fn rest(&mut self) {
        (self.due, self.is_spread) = (None, false);
    }

    /// Whether to look now. `random`: 0 to 1.
    fn look(&mut self, state: &State, pace: Duration, now: Instant, random: f64) -> Option<Look> {
        let within = |time: Duration| now + PATIENCE + time.mul_f64(random);
        let look = if state.reached == Some(false) { Look::Way } else { Look::Whole };
        if look == Look::Way {
            self.is_spread = false;
        } else if !self.is_spread {
            let is_candidate = matches!(state.standing, Some(Standing::Candidate(_)));
            self.asks_from = self.asks_from.max(Some(within(if is_candidate { SPREAD } else { pace })));
            self.is_spread = true;
        }
        let due = *self.due.get_or_insert_with(|| within(SPREAD));
        let is_due = due <= now && (look == Look::Way || self.asks_from <= Some(now));
        (is_due && state.cause() != Cause::Starting).then_some(look)
    }

    /// It has looked.
    fn looked(&mut self, asked: bool, pace: Duration, now: Instant, random: f64) {
        let about = |time: Duration| now + time.mul_f64(0.5 + random);
        if asked {
            self.asks_from = Some(about(pace));
        }
        self.due = Some(about(AGAIN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::code::Confidence;
    use crate::election::strict::Fault;

    fn state(cause: Cause, reached: bool, standing: Standing) -> State {
        State {
            fault: Some(Fault { cause, text: "it".into() }),
            reached: Some(reached),
            standing: Some(standing),
            ..State::default()
        }
    }

    #[test]
    fn who_has_no_way_to_the_server_asks_it_nothing_and_looks_each_minute() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        let state = state(Cause::Timeout, false, Standing::Observer(500_000));
        let pace = pace(&state, 500);
        let mut looks = Vec::new();
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            if let Some(look) = schedule.look(&state, pace, now, 0.5) {
                assert_eq!(look, Look::Way);
                looks.push(second);
                schedule.looked(false, pace, now, 0.5);
            }
        }
        assert_eq!(looks, (13..600).step_by(60).collect::<Vec<u64>>());
    }

    /// Questions of nodes in an hour; every `period` seconds the API server goes for half of that, or says something else.
    fn asked(nodes: usize, standing: Standing, period: u64, goes: bool) -> u64 {
        let start = Instant::now();
        let mut asked = 0;
        for node in 0..nodes {
            let mut schedule = Schedule::default();
            for second in 0..3_600 {
                // Spread over the nodes, and another one each time.
                let random = ((node as u64 * 7_919 + second * 104_729) % 10_007) as f64 / 10_007.0;
                let is_first = second % period < period / 2;
                let cause = if is_first { Cause::Forbidden } else { Cause::Rejected };
                let state = state(cause, is_first || !goes, standing);
                let (pace, now) = (pace(&state, nodes), start + Duration::from_secs(second));
                if let Some(look) = schedule.look(&state, pace, now, random) {
                    let asks = look == Look::Whole;
                    asked += u64::from(asks) * u64::from(REQUESTS);
                    schedule.looked(asks, pace, now, random);
                }
            }
        }
        asked
    }

    #[test]
    fn all_nodes_together_ask_once_a_second() {
        for (period, goes) in [(40, false), (40, true), (900, true), (7_200, false)] {
            let asked = asked(500, Standing::Observer(1), period, goes);
            assert!(asked <= 3_600, "{asked} questions in an hour, {period} {goes}");
        }
        assert!(asked(500, Standing::Observer(1), 7_200, false) > 1_000, "they do look");
    }

    #[test]
    fn candidates_ask_in_bounds() {
        for (period, goes) in [(40, false), (900, true), (7_200, false)] {
            let asked = asked(1, Standing::Candidate(1), period, goes);
            assert!((20..=900).contains(&asked), "{asked} questions in an hour, {period} {goes}");
        }
    }

    #[test]
    fn a_candidate_is_soon_told() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        let state = state(Cause::Forbidden, true, Standing::Candidate(1));
        let seconds = (0..).find(|second| {
            let now = start + Duration::from_secs(*second);
            schedule.look(&state, pace(&state, 500), now, 1.0).is_some()
        });
        assert_eq!(seconds, Some(15));
    }

    #[test]
    fn what_is_new_and_what_is_over_is_told_once() {
        let mut registry = Registry::default();
        let diagnosing = Diagnosing::new(&Config::default(), &mut registry);
        let report = |codes: &[Code]| Report {
            version: 1,
            place: crate::doctor::place::Place::default(),
            verdicts: codes.iter().map(|code| Verdict::new(*code, Confidence::High, "do")).collect(),
            seen: Vec::new(),
            millis: 1,
            asked: true,
        };
        let shown = || {
            let verdicts = diagnosing.status().verdicts;
            verdicts.into_iter().map(|verdict| verdict.code).collect::<Vec<_>>()
        };
        diagnosing.publish(Some(report(&[Code::RightsLock, Code::ReviewRefused, Code::RightsWatch])));
        assert_eq!(shown(), ["rights-lock", "rights-watch"], "notes are no findings");
        assert_eq!(diagnosing.problems().len(), 2);
        let mut text = String::new();
        let mut gauges = || {
            text.clear();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text.lines().filter(|line| line.ends_with(" 1")).count()
        };
        assert_eq!(gauges(), 2);
        diagnosing.publish(Some(report(&[Code::RightsWatch])));
        assert_eq!((shown(), gauges()), (vec!["rights-watch".to_owned()], 1));
        diagnosing.publish(None);
        assert_eq!((diagnosing.status(), gauges()), (admin::Diagnosis::default(), 0));
        diagnosing.reaches(Some(false));
        assert_eq!(diagnosing.status().unreached_seconds, Some(0));
        diagnosing.reaches(None);
        assert!(diagnosing.status().unreached_seconds.is_some());
        diagnosing.reaches(Some(true));
        assert_eq!(diagnosing.status().unreached_seconds, None);
    }
}
