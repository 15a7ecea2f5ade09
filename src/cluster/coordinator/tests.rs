//! Against a server in memory that does with ConfigMaps and Events what an API server does, and refuses what it is told to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::*;
use crate::cluster::{Fault, Response, summary};
use crate::election::lease::{Desk, Ms, Role, Token};

#[derive(Default)]
struct Stored {
    version: u64,
    maps: HashMap<String, Value>,
    events: HashMap<String, Value>,
    calls: Vec<String>,
    /// Verb and resource of what is forbidden.
    forbidden: Vec<&'static str>,
    /// A webhook refuses Events whose note has it.
    refused: Option<&'static str>,
    /// The next call is carried out, and its answer is lost.
    deaf: bool,
    /// How long the next call takes.
    takes: Option<(Arc<Clocked>, Ms)>,
}

#[derive(Default)]
struct Memory(Mutex<Stored>);

#[derive(Default)]
struct Clocked(AtomicU64);

struct Members(Mutex<Vec<Node>>);

struct Bench {
    server: Arc<Memory>,
    clock: Arc<Clocked>,
    fleet: Arc<Members>,
    metrics: LeaseMetrics,
    /// Counters are read as they are exported.
    registry: prometheus_client::registry::Registry,
}

struct Leader {
    coordinator: Coordinator,
    desk: Desk,
    guard: Guard,
}

impl Clock for Clocked {
    fn now(&self) -> Ms {
        self.0.load(Ordering::SeqCst)
    }
}

impl Fleet for Members {
    fn members(&self) -> Vec<Node> {
        self.0.lock().unwrap().clone()
    }
}

fn status(code: u16, reason: &str, kind: &str) -> Response {
    let body = json!({"kind": "Status", "reason": reason, "message": reason, "details": {"kind": kind}});
    Response { status: StatusCode::from_u16(code).unwrap(), retry_after: None, body }
}

fn found(code: u16, body: &Value) -> Response {
    Response { status: StatusCode::from_u16(code).unwrap(), retry_after: None, body: body.clone() }
}

impl Stored {
    fn answer(&mut self, method: &Method, path: &str, body: Option<&Value>) -> Response {
        let name = |body: &Value| body["metadata"]["name"].as_str().unwrap().to_owned();
        let (verb, kind) = (method.as_str(), if path.contains("/events") { "events" } else { "configmaps" });
        if self.forbidden.iter().any(|what| *what == format!("{verb} {kind}")) {
            return status(403, &format!("{kind} is forbidden: User x cannot {verb}"), kind);
        }
        self.version += 1;
        match (verb, kind) {
            ("POST", "events") => {
                let body = body.unwrap();
                assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/ns/events");
                if self.refused.is_some_and(|word| body["note"].as_str().unwrap().contains(word)) {
                    return status(400, "admission webhook says no", kind);
                }
                if self.events.contains_key(&name(body)) {
                    return status(409, "AlreadyExists", kind);
                }
                self.events.insert(name(body), body.clone());
                found(201, body)
            }
            ("GET", _) => match self.maps.get(path.rsplit('/').next().unwrap()) {
                Some(body) => found(200, body),
                None => status(404, "NotFound", kind),
            },
            ("POST", _) => {
                let mut body = body.unwrap().clone();
                if self.maps.contains_key(&name(&body)) {
                    return status(409, "AlreadyExists", kind);
                }
                body["metadata"]["uid"] = json!(format!("uid-{}", self.version));
                body["metadata"]["resourceVersion"] = json!(self.version.to_string());
                self.maps.insert(name(&body), body.clone());
                found(201, &body)
            }
            ("PUT", _) => {
                let mut body = body.unwrap().clone();
                let Some(stored) = self.maps.get_mut(&name(&body)) else {
                    return status(404, "NotFound", kind);
                };
                let same = |key: &str| {
                    body["metadata"][key].is_string() && body["metadata"][key] == stored["metadata"][key]
                };
                if !same("uid") || !same("resourceVersion") {
                    return status(409, "Conflict", kind);
                }
                body["metadata"]["resourceVersion"] = json!(self.version.to_string());
                *stored = body.clone();
                found(200, &body)
            }
            _ => panic!("{verb} {path}"),
        }
    }
}

#[async_trait]
impl Server for Memory {
    fn namespace(&self) -> Result<String, Fault> {
        Ok("ns".into())
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Response, Fault> {
        assert!(limit <= Duration::from_secs(3) && !limit.is_zero());
        let mut stored = self.0.lock().unwrap();
        let kind = if path.contains("/events") { "events" } else { "configmaps" };
        stored.calls.push(format!("{method} {kind}"));
        let answer = stored.answer(&method, path, body);
        if let Some((clock, millis)) = stored.takes.take() {
            clock.0.fetch_add(millis, Ordering::SeqCst);
        }
        if std::mem::take(&mut stored.deaf) {
            return Err(Fault::new(Cause::NoAnswer, "lost"));
        }
        Ok(answer)
    }
}

fn token(uid: &str, version: u64) -> Token {
    Token { uid: uid.into(), version, transitions: 1 }
}

fn node(number: usize, reached: Option<bool>) -> Node {
    let id = crate::network::identity::Identity::generate().peer_id().clone();
    Node { id, name: format!("node-{number}"), version: "0.1.0".into(), reached, policy: "builtin".into() }
}

impl Bench {
    fn new() -> Self {
        let mut registry = prometheus_client::registry::Registry::default();
        Self {
            server: Arc::default(),
            clock: Arc::default(),
            fleet: Arc::new(Members(Mutex::new(vec![node(0, Some(true)), node(1, None)]))),
            metrics: LeaseMetrics::register(&mut registry),
            registry,
        }
    }

    fn leader(&self, name: &str, token: Token) -> Leader {
        let coordinator = Coordinator::with(
            Arc::clone(&self.server) as _,
            "peili",
            (Kind::Lease, "peili"),
            name,
            Arc::clone(&self.fleet) as _,
            Arc::clone(&self.clock) as _,
            self.metrics.clone(),
        );
        let mut desk = Desk::default();
        let guard = desk.apply(&Role::Leader(token, Ms::MAX)).unwrap().into();
        Leader { coordinator, desk, guard }
    }

    fn pass(&self, seconds: u64) {
        self.clock.0.fetch_add(seconds * 1_000, Ordering::SeqCst);
    }

    /// What was asked since the last time.
    fn calls(&self, kind: &str) -> Vec<String> {
        let mut stored = self.server.0.lock().unwrap();
        std::mem::take(&mut stored.calls).into_iter().filter(|call| call.ends_with(kind)).collect()
    }

    fn stored(&self) -> Value {
        let stored = self.server.0.lock().unwrap();
        let text = stored.maps["peili-fleet"]["data"]["summary.json"].as_str().unwrap();
        serde_json::from_str(text).unwrap()
    }

    fn events(&self, reason: &str) -> Vec<Value> {
        let stored = self.server.0.lock().unwrap();
        stored.events.values().filter(|event| event["reason"] == reason).cloned().collect()
    }

    fn fenced(&self) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line =
            text.lines().find(|line| line.starts_with("peili_election_fenced_effects_total ")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Leader {
    async fn turn(&self) {
        self.turn_at(1_000_000_000).await;
    }

    async fn turn_at(&self, seconds: u64) {
        let mut work = self.coordinator.work.lock().await;
        let wall = UNIX_EPOCH + Duration::from_secs(seconds);
        self.coordinator.turn(&mut work, &self.guard, wall).await;
    }
}

#[tokio::test]
async fn the_summary_is_made_and_replaced_and_not_too_often() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["GET configmaps", "POST configmaps"]);
    let summary = bench.stored();
    assert_eq!(summary["token"], json!({"uid": "l", "version": 7, "transitions": 1}));
    assert_eq!((&summary["written"], &summary["leader"]), (&json!("2001-09-09T01:46:40Z"), &json!("node-0")));
    assert_eq!(
        (&summary["members"], &summary["api-server"]),
        (&json!(2), &json!({"reachable": 1, "unknown": 1}))
    );
    assert_eq!(summary["versions"], json!({"0.1.0": 2}));
    assert_eq!(summary["policies"], json!({"builtin": 2}));

    bench.pass(20);
    leader.turn().await;
    assert!(bench.calls("configmaps").is_empty(), "nothing has changed");
    bench.fleet.0.lock().unwrap().push(node(2, Some(false)));
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["PUT configmaps"], "what was answered needs no read");
    assert_eq!(bench.stored()["unreached"], json!(["node-2"]));
    bench.fleet.0.lock().unwrap().pop();
    bench.pass(14);
    leader.turn().await;
    assert!(bench.calls("configmaps").is_empty(), "at most once in 15 s");
    bench.pass(1);
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["PUT configmaps"]);
    bench.pass(599);
    leader.turn().await;
    assert!(bench.calls("configmaps").is_empty());
    bench.pass(1);
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["PUT configmaps"], "at least every ten minutes");
    assert!(leader.coordinator.problems().is_empty());
}

#[tokio::test]
async fn what_others_have_put_into_the_map_stays() {
    let bench = Bench::new();
    let made = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "peili-fleet", "uid": "u", "resourceVersion": "1",
        "labels": {"a": "b"}, "managedFields": [{}]}, "data": null});
    bench.server.0.lock().unwrap().maps.insert("peili-fleet".into(), made);
    let leader = bench.leader("a", token("l", 7));
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["GET configmaps", "PUT configmaps"], "made beforehand, empty");
    let map = bench.server.0.lock().unwrap().maps["peili-fleet"].clone();
    assert_eq!((&map["metadata"]["labels"]["a"], &map["metadata"]["uid"]), (&json!("b"), &json!("u")));
    // Somebody edits it: what is replaced is what was seen, so it is read again.
    bench.server.0.lock().unwrap().maps.get_mut("peili-fleet").unwrap()["metadata"]["resourceVersion"] =
        json!("99");
    bench.pass(600);
    leader.turn().await;
    bench.pass(15);
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["PUT configmaps", "GET configmaps", "PUT configmaps"]);
    // And deletes it.
    bench.server.0.lock().unwrap().maps.clear();
    bench.pass(600);
    leader.turn().await;
    bench.pass(15);
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["PUT configmaps", "GET configmaps", "POST configmaps"]);
}

#[tokio::test]
async fn an_answer_that_was_lost_is_read() {
    let bench = Bench::new();
    let leader = bench.leader("a", token("l", 7));
    bench.server.0.lock().unwrap().deaf = true;
    leader.turn().await;
    assert!(
        leader.coordinator.problems()[0].contains("api-no-answer"),
        "{:?}",
        leader.coordinator.problems()
    );
    bench.pass(15);
    leader.turn().await;
    assert_eq!(bench.calls("configmaps"), ["GET configmaps", "GET configmaps", "POST configmaps"]);
    assert!(leader.coordinator.problems().is_empty());
}

/// Guards the order of tokens: S2.
#[tokio::test]
async fn a_lower_token_writes_nothing() {
    let bench = Bench::new();
    let (old, new) = (bench.leader("old", token("l", 7)), bench.leader("new", token("l", 9)));
    old.turn().await;
    new.turn().await;
    assert_eq!(bench.stored()["leader"], "new");
    bench.pass(600);
    let before = bench.fenced();
    // It holds the version that it wrote, and then the one that it reads.
    old.turn().await;
    bench.pass(15);
    old.turn().await;
    assert_eq!((bench.stored()["leader"].clone(), bench.fenced()), (json!("new"), before + 1));
    assert!(old.coordinator.problems()[0].contains("l/9/1"), "{:?}", old.coordinator.problems());
    bench.calls("configmaps");
    bench.pass(30);
    old.turn().await;
    assert!(bench.calls("configmaps").is_empty(), "it does not go on asking");

    // Another Lease by this name with lower versions: after a restore of etcd.
    let restored = bench.leader("restored", token("m", 3));
    restored.turn().await;
    assert_eq!((bench.stored()["leader"].clone(), bench.fenced()), (json!("new"), before + 2));
    assert!(restored.coordinator.problems()[0].contains("delete the ConfigMap peili-fleet"));
    // Its operator has done so.
    bench.server.0.lock().unwrap().maps.clear();
    bench.pass(60);
    restored.turn().await;
    assert_eq!(bench.stored()["leader"], "restored");
    assert!(restored.coordinator.problems().is_empty());
}

/// Guards the checks before requests and after answers.
#[tokio::test]
async fn whoever_leads_no_more_sends_nothing() {
    let bench = Bench::new();
    let mut leader = bench.leader("a", token("l", 7));
    leader.desk.apply(&Role::Leader(token("l", 7), 10_000));
    bench.pass(10);
    leader.turn().await;
    assert!(bench.calls("").is_empty());
    assert_eq!(bench.fenced(), 2, "the summary and an Event");
    assert!(leader.coordinator.problems().is_empty());
}

/// Guards the check after answers.
#[tokio::test]
async fn an_answer_that_comes_after_the_term_leads_to_nothing() {
    let bench = Bench::new();
    let mut leader = bench.leader("a", token("l", 7));
    leader.desk.apply(&Role::Leader(token("l", 7), 10_000));
    bench.server.0.lock().unwrap().takes = Some((Arc::clone(&bench.clock), 10_000));
    bench.server.0.lock().unwrap().forbidden = vec!["GET configmaps"];
    leader.turn().await;
    assert_eq!(bench.calls(""), ["GET configmaps"]);
    assert!(leader.coordinator.problems().is_empty(), "who leads no more has no problem with its work");
}

#[tokio::test]
async fn rights_that_are_missing_are_named_and_end_nothing() {
    let bench = Bench::new();
    bench.server.0.lock().unwrap().forbidden = vec!["GET configmaps", "POST events"];
    let leader = bench.leader("a", token("l", 7));
    leader.turn().await;
    let problems = leader.coordinator.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("resourceNames: [peili-fleet], verbs: [get, update]"), "{problems:?}");
    assert!(
        problems[1].contains("{apiGroups: [events.k8s.io], resources: [events], verbs: [create]}"),
        "{problems:?}"
    );
    bench.calls("");
    bench.pass(59);
    leader.turn().await;
    assert!(bench.calls("").is_empty(), "not before a minute");
    bench.server.0.lock().unwrap().forbidden = vec!["POST configmaps"];
    bench.pass(1);
    leader.turn().await;
    let problems = leader.coordinator.problems();
    assert!(problems.len() == 1 && problems[0].contains("beforehand, empty"), "{problems:?}");
    bench.server.0.lock().unwrap().forbidden.clear();
    bench.pass(60);
    leader.turn().await;
    assert!(leader.coordinator.problems().is_empty());
}

#[tokio::test]
async fn problems_end_with_the_term() {
    let bench = Bench::new();
    bench.server.0.lock().unwrap().forbidden = vec!["GET configmaps"];
    let leader = bench.leader("a", token("l", 7));
    let coordinator = Arc::new(leader.coordinator);
    let (duty, guard) = (Arc::clone(&coordinator), leader.guard.clone());
    let term = tokio::spawn(async move { duty.lead(guard).await });
    while coordinator.problems().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    term.abort();
    assert!(term.await.unwrap_err().is_cancelled());
    assert!(coordinator.problems().is_empty());
}

#[test]
fn a_summary_is_bounded() {
    let mut members: Vec<Node> = (0..1_000)
        .map(|number| Node {
            version: format!("v{number}\"{}", "\u{1}".repeat(200)),
            ..node(number, Some(false))
        })
        .collect();
    for member in &mut members {
        member.name = format!("{}{}", "a".repeat(250 - member.name.len()), member.name);
    }
    members[0].name = "<script>\n".into();
    let content = Content::of(&members);
    assert_eq!((content.unreached.len(), content.versions.len()), (200, 17));
    assert_eq!((content.versions["other"], content.api_server["unreachable"]), (984, 1_000));
    let text = summary::text(&content, &token("l", 1), "a", UNIX_EPOCH);
    assert!(text.len() <= summary::LIMIT && text.len() > summary::LIMIT / 3, "{}", text.len());
    assert!(!text.contains("<script>"), "a name that can be none is not told");
    let body = json!({"data": {"summary.json": text}});
    assert_eq!(summary::token(&body), Some(token("l", 1)));
    for odd in [json!(null), json!({"data": {"summary.json": "{"}}), json!({"data": {"summary.json": 5}})] {
        assert_eq!(summary::token(&odd), None);
    }
}

#[tokio::test]
async fn two_leaders_make_one_event() {
    let bench = Bench::new();
    bench.fleet.0.lock().unwrap().push(node(2, Some(false)));
    let (one, other) = (bench.leader("node-0", token("l", 7)), bench.leader("node-1", token("l", 9)));
    for _ in 0..2 {
        one.turn().await;
        other.turn().await;
        bench.pass(30);
    }
    let events = bench.events("ApiServerUnreached");
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(bench.events("LeaderChanged").len(), 2, "each term is one");
    let event = &events[0];
    assert_eq!(event["regarding"]["kind"], "Lease");
    assert_eq!(
        (&event["regarding"]["uid"], &event["regarding"]["namespace"]),
        (&json!("l"), &event["metadata"]["namespace"])
    );
    assert_eq!((&event["related"]["kind"], &event["related"]["name"]), (&json!("Node"), &json!("node-2")));
    for key in ["eventTime", "action", "note", "reportingController", "reportingInstance"] {
        assert!(event[key].as_str().is_some_and(|text| !text.is_empty()), "{key}");
    }
    bench.calls("");
    bench.pass(30);
    one.turn().await;
    assert!(bench.calls("events").is_empty(), "what was told is not told again");
    one.turn_at(1_000_000_000 + 3_600).await;
    assert_eq!(bench.events("ApiServerUnreached").len(), 2, "unless it lasts");
}

#[tokio::test]
async fn a_member_that_is_cut_off_for_a_moment_is_not_told() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    let reached = |reached| bench.fleet.0.lock().unwrap()[1].reached = Some(reached);
    for _ in 0..4 {
        reached(false);
        leader.turn().await;
        bench.pass(25);
        reached(true);
        leader.turn().await;
        bench.pass(5);
    }
    assert!(bench.events("ApiServerUnreached").is_empty());
}

#[tokio::test]
async fn ten_events_a_minute_are_sent_and_no_more() {
    let bench = Bench::new();
    bench.fleet.0.lock().unwrap().extend((2..30).map(|number| node(number, Some(false))));
    let leader = bench.leader("node-0", token("l", 7));
    leader.turn().await;
    bench.pass(60);
    bench.calls("");
    for expected in [10, 0, 10, 8] {
        leader.turn().await;
        assert_eq!(bench.calls("events").len(), expected);
        bench.pass(if expected == 10 && bench.events("ApiServerUnreached").len() == 10 { 30 } else { 60 });
    }
    assert_eq!(bench.events("ApiServerUnreached").len(), 28);
    // Another term of this process does not begin to count anew.
    bench.fleet.0.lock().unwrap().extend((30..60).map(|number| node(number, Some(false))));
    leader.turn().await;
    bench.pass(59);
    leader.turn().await;
    leader.coordinator.work.lock().await.reporter.begin();
    let sent = bench.calls("events").len();
    leader.turn().await;
    assert!(sent + bench.calls("events").len() <= 10);
}

#[tokio::test]
async fn policies_that_disagree_for_a_minute_are_told() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    bench.fleet.0.lock().unwrap()[0].policy = "ab".into();
    leader.turn().await;
    bench.pass(59);
    leader.turn().await;
    assert!(bench.events("PoliciesDisagree").is_empty());
    bench.pass(1);
    leader.turn().await;
    let events = bench.events("PoliciesDisagree");
    assert!(events[0]["note"].as_str().unwrap().contains("1 by ab, 1 by builtin"), "{events:?}");
}

#[tokio::test]
async fn a_note_is_bounded_and_has_no_control_characters() {
    let bench = Bench::new();
    let here = format!("a\u{1b}[31m{}", "ä".repeat(2_000));
    let leader = bench.leader(&here, token("l", 7));
    leader.turn().await;
    let events = bench.events("LeaderChanged");
    let text = |key: &str| events[0][key].as_str().unwrap().to_owned();
    assert!(text("note").len() <= 1_000 && text("reportingInstance").len() <= 128);
    assert!(
        !text("note").contains(char::is_control) && !text("reportingInstance").contains(char::is_control)
    );
    assert!(events[0].get("related").is_none(), "that is no name of a node");
}

#[tokio::test]
async fn what_could_not_be_told_and_is_over_is_no_problem() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    leader.turn().await;
    bench.fleet.0.lock().unwrap().push(node(2, Some(false)));
    leader.turn().await;
    bench.pass(31);
    bench.server.0.lock().unwrap().forbidden = vec!["POST events"];
    leader.turn().await;
    assert_eq!(leader.coordinator.problems().len(), 1);
    bench.fleet.0.lock().unwrap()[2].reached = Some(true);
    bench.pass(61);
    leader.turn().await;
    assert!(leader.coordinator.problems().is_empty(), "{:?}", leader.coordinator.problems());
}

#[tokio::test]
async fn an_event_that_is_refused_keeps_no_other_one_back() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    bench.fleet.0.lock().unwrap().extend((2..6).map(|number| node(number, Some(false))));
    leader.turn().await;
    bench.pass(31);
    bench.server.0.lock().unwrap().refused = Some("node-3");
    leader.turn().await;
    assert_eq!(bench.events("ApiServerUnreached").len(), 3);
    assert_eq!(leader.coordinator.problems().len(), 1);
}

/// A summary whose answer was lost may stand there, or not: what was written before it does not count.
#[tokio::test]
async fn a_summary_of_which_nothing_is_known_is_written_again() {
    let bench = Bench::new();
    let leader = bench.leader("node-0", token("l", 7));
    leader.turn().await;
    bench.fleet.0.lock().unwrap().push(node(2, Some(false)));
    bench.pass(15);
    bench.server.0.lock().unwrap().deaf = true;
    leader.turn().await;
    assert_eq!(bench.stored()["members"], 3);
    bench.fleet.0.lock().unwrap().pop();
    bench.pass(15);
    leader.turn().await;
    assert_eq!(bench.stored()["members"], 2);
}
