//! What has happened, as Kubernetes Events (`events.k8s.io/v1`: served by 1.19 and later, checked whole by the server, and seen by
//! `kubectl get events` as those of `v1` are, while `v1` may be dropped for new ones).
//!
//! An Event carries no token that anybody would check. So its name follows from what it tells, of what and when, and not from who tells
//! it: two leaders make one object. Events are about the lock, since those about a Node would have to be in another namespace; a node is
//! named as what is related.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::classify::refusal;
use super::coordinator::Node;
use super::effects::{Effects, Stop};
use super::{Cause, Fault, Kind, is_name};
use crate::election::lease::{Ms, Token};
use crate::election::strict::Guard;
use crate::oci::Digest;

/// Events in a minute.
const RATE: usize = 10;
const MINUTE: Ms = 60_000;
/// What lasts is told again so often, in seconds: the server keeps Events for an hour.
const BUCKET: u64 = 3_600;
/// How long a member must have said that it cannot reach the API server: when that was gone for all, others hear later that it is back.
const UNREACHED: Ms = 30_000;
/// How long policies must have disagreed: a change of them is rolled out one node after the other.
const DISAGREE: Ms = 60_000;
/// Bytes of a note: the server takes 1,024.
const NOTE: usize = 1_000;
/// Bytes of who reports: the server takes 128.
const INSTANCE: usize = 128;
/// Marks of policies that a note names.
const MARKS: usize = 5;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Happening {
    reason: &'static str,
    kind: &'static str,
    /// Of what kind the work is that it is about, as the server wants it.
    action: &'static str,
    note: String,
    /// Tells it from others of the same reason.
    subject: String,
    bucket: u64,
    /// The node that it is about, by name.
    node: Option<String>,
}

/// Tells what has happened.
pub(super) struct Reporter {
    kind: Kind,
    name: String,
    /// Names of Events that are there, of those that are still to be told.
    told: BTreeSet<String>,
    /// Those that the server does not take.
    refused: BTreeMap<String, (Fault, String)>,
    /// When the last ones were sent.
    sent: VecDeque<Ms>,
    next: Ms,
    /// Since when members say that they cannot reach the API server, by their IDs.
    unreached: BTreeMap<String, Ms>,
    /// Since when policies disagree.
    disagree: Option<Ms>,
}

impl Reporter {
    /// About the lock of this kind and name.
    pub(super) fn new(kind: Kind, name: &str) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            told: BTreeSet::new(),
            refused: BTreeMap::new(),
            sent: VecDeque::new(),
            next: 0,
            unreached: BTreeMap::new(),
            disagree: None,
        }
    }

    /// A term begins. What was sent before counts all the same.
    pub(super) fn begin(&mut self) {
        self.told.clear();
        self.refused.clear();
        self.unreached.clear();
        self.disagree = None;
    }

    /// Looks at the members, and tells what there is. Returns whether something was told.
    pub(super) async fn turn(
        &mut self,
        effects: &Effects,
        guard: &Guard,
        members: &[Node],
        here: &str,
        wall: SystemTime,
    ) -> Result<bool, Stop> {
        let now = effects.now();
        let seconds = wall.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let token = guard.token();
        let happenings = self.observe(members, token, here, now, seconds / BUCKET);
        let named: Vec<(String, Happening)> =
            happenings.into_iter().map(|happening| (name(token, &happening), happening)).collect();
        let current: BTreeSet<&String> = named.iter().map(|(name, _)| name).collect();
        self.told.retain(|name| current.contains(name));
        self.refused.retain(|name, _| current.contains(name));
        let mut told = false;
        for (name, happening) in
            named.iter().filter(|(name, _)| !self.told.contains(name)).collect::<Vec<_>>()
        {
            let now = effects.now();
            while self.sent.front().is_some_and(|at| now >= at + MINUTE) {
                self.sent.pop_front();
            }
            if now < self.next || self.sent.len() >= RATE {
                break;
            }
            self.sent.push_back(now);
            let post = self.post(effects, guard, name, happening, here, wall).await;
            if let Err(Stop::Fault(fault, remedy)) = &post
                && fault.cause == Cause::Rejected
            {
                // By what it says: it is not told this time, and keeps none of the others from being told.
                self.refused.insert(name.clone(), (fault.clone(), remedy.clone()));
            } else if let Err(stop) = post {
                self.next = now + stop.pause();
                return Err(stop);
            }
            self.told.insert(name.clone());
            told = true;
        }
        if let Some((fault, remedy)) = self.refused.values().next() {
            return Err(Stop::Fault(fault.clone(), remedy.clone()));
        }
        // Where nothing is left to be told, whatever was wrong is over.
        Ok(told || named.iter().all(|(name, _)| self.told.contains(name)))
    }

    fn observe(
        &mut self,
        members: &[Node],
        token: &Token,
        here: &str,
        now: Ms,
        bucket: u64,
    ) -> Vec<Happening> {
        let mut all = vec![Happening {
            reason: "LeaderChanged",
            kind: "Normal",
            action: "Elect",
            note: format!("{here} coordinates now (term {token})"),
            // A term begins once, whatever the time is.
            subject: token.to_string(),
            bucket: 0,
            node: is_name(here).then(|| here.to_owned()),
        }];
        let mut marks: BTreeMap<&str, usize> = BTreeMap::new();
        for member in members {
            *marks.entry(&member.policy).or_default() += 1;
        }
        let since = (marks.len() > 1).then(|| self.disagree.unwrap_or(now));
        self.disagree = since;
        if since.is_some_and(|since| now >= since + DISAGREE) {
            let mut counts: Vec<(&str, usize)> = marks.into_iter().collect();
            counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
            let (all_marks, members) = (counts.len(), members.len());
            counts.truncate(MARKS);
            let counts: Vec<String> =
                counts.iter().map(|(mark, count)| format!("{count} by {mark}")).collect();
            all.push(Happening {
                reason: "PoliciesDisagree",
                kind: "Warning",
                action: "Rank",
                note: format!(
                    "{members} members rank by {all_marks} different sets of election policies ({}); mount the same ones with the same \
                     settings on all nodes",
                    counts.join(", ")
                ),
                subject: String::new(),
                bucket,
                node: None,
            });
        }
        let unreached: BTreeMap<String, &Node> = members
            .iter()
            .filter(|member| member.reached == Some(false))
            .map(|member| (member.id.to_string(), member))
            .collect();
        self.unreached.retain(|id, _| unreached.contains_key(id));
        for (id, member) in unreached {
            let since = *self.unreached.entry(id.clone()).or_insert(now);
            if now < since + UNREACHED {
                continue;
            }
            let label = member.label();
            all.push(Happening {
                reason: "ApiServerUnreached",
                kind: "Warning",
                action: "Connect",
                note: format!(
                    "{label} (peer {id}) says that it cannot reach the API server; it mirrors all the same. `peili status` there \
                     says why"
                ),
                node: (label == member.name).then_some(label),
                subject: id,
                bucket,
            });
        }
        all
    }

    async fn post(
        &self,
        effects: &Effects,
        guard: &Guard,
        name: &str,
        happening: &Happening,
        here: &str,
        wall: SystemTime,
    ) -> Result<(), Stop> {
        let namespace = effects.namespace()?;
        let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
        let body = self.body(name, happening, &namespace, guard.token(), here, wall);
        let response = effects.send(guard, Method::POST, &path, Some(&body)).await?;
        match response.status {
            StatusCode::OK | StatusCode::CREATED => Ok(()),
            // Somebody has told it.
            StatusCode::CONFLICT if response.body["reason"] == "AlreadyExists" => Ok(()),
            status => {
                let fault = refusal(status, &response.body);
                let remedy = match fault.cause {
                    Cause::Forbidden => {
                        "give the service account a Role with the rule {apiGroups: [events.k8s.io], resources: [events], verbs: \
                         [create]}"
                    }
                    Cause::Rejected => {
                        "exempt Events of this namespace from the webhook, the quota or the rule that refuses them"
                    }
                    cause => cause.remedy(),
                };
                Err(Stop::Fault(fault, remedy.to_owned()))
            }
        }
    }

    fn body(
        &self,
        name: &str,
        happening: &Happening,
        namespace: &str,
        token: &Token,
        here: &str,
        wall: SystemTime,
    ) -> Value {
        let instance = Some(bounded(here, INSTANCE)).filter(|here| !here.is_empty());
        let mut body = json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": humantime::format_rfc3339_micros(wall).to_string(),
            "type": happening.kind,
            "reason": happening.reason,
            "action": happening.action,
            "note": bounded(&happening.note, NOTE),
            "reportingController": "peili.dev/coordinator",
            "reportingInstance": instance.as_deref().unwrap_or("peili"),
            "regarding": {
                "apiVersion": self.kind.api_version(),
                "kind": self.kind.name(),
                "namespace": namespace,
                "name": self.name,
                "uid": &*token.uid,
            },
        });
        if let Some(node) = &happening.node {
            body["related"] = json!({"apiVersion": "v1", "kind": "Node", "name": node});
        }
        body
    }
}

/// The name of an Event: the same whoever tells it.
fn name(token: &Token, happening: &Happening) -> String {
    let Happening { reason, subject, bucket, .. } = happening;
    let digest = Digest::sha256(format!("{} {reason} {bucket} {subject}", token.uid).as_bytes());
    let hex: String = digest.as_bytes().iter().take(10).map(|byte| format!("{byte:02x}")).collect();
    format!("peili-{}-{hex}", reason.to_ascii_lowercase())
}

/// Without control characters, and not longer.
fn bounded(text: &str, bytes: usize) -> String {
    let mut bounded = String::new();
    for char in text.chars().map(|char| if char.is_control() { ' ' } else { char }) {
        if bounded.len() + char.len_utf8() > bytes {
            break;
        }
        bounded.push(char);
    }
    bounded
}
