//! The fleet summary: a ConfigMap in which whoever leads says how the members are. For people and for scripts; Peili reads only its token.
//!
//! It is replaced on its uid and its version, and never under a token that is lower than the one that stands there: so a leader that does
//! not know yet that it leads no more cannot undo what a later one wrote.

use std::collections::BTreeMap;
use std::time::SystemTime;

use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::classify::refusal;
use super::coordinator::Node;
use super::effects::{Effects, PAUSE, Stop};
use super::object;
use super::{Cause, Fault, Response};
use crate::election::lease::{Ms, Token};
use crate::election::strict::Guard;

/// It is written so often even if nothing has changed, so that its age says something.
const AT_LEAST: Ms = 600_000;
/// Bytes of what is written.
pub(super) const LIMIT: usize = 64 << 10;
/// Members without the API server that are named.
const NAMED: usize = 200;
/// Versions and policies that are counted by name, the most frequent ones: members say themselves what theirs is.
const KINDS: usize = 16;
/// All others.
const OTHER: &str = "other";
/// The key in the ConfigMap.
const KEY: &str = "summary.json";

/// What the members say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Content {
    /// Live ones.
    pub(super) members: usize,
    /// Whether they reach the API server.
    pub(super) api_server: BTreeMap<&'static str, usize>,
    /// Of Peili.
    pub(super) versions: BTreeMap<String, usize>,
    /// Marks of the policies that they rank by.
    pub(super) policies: BTreeMap<String, usize>,
    /// Some of those that cannot reach the API server, by their nodes' names.
    pub(super) unreached: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Summary<'a> {
    token: Stamp,
    written: String,
    leader: &'a str,
    #[serde(flatten)]
    content: Content,
}

/// A [`Token`] as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    uid: String,
    version: u64,
    transitions: u32,
}

#[derive(Deserialize)]
struct Stamped {
    token: Stamp,
}

/// Keeps the summary.
pub(super) struct Summaries {
    name: String,
    /// As it was seen last; `None`: it is to be read.
    stored: Option<Stored>,
    /// What was written in this term.
    content: Option<Content>,
    written: Ms,
    next: Ms,
}

enum Stored {
    Absent,
    There(Value),
}

impl Content {
    pub(super) fn of(members: &[Node]) -> Self {
        let mut content = Self { members: members.len(), ..Self::default() };
        for member in members {
            let reached = match member.reached {
                None => "unknown",
                Some(true) => "reachable",
                Some(false) => "unreachable",
            };
            *content.api_server.entry(reached).or_default() += 1;
            *content.versions.entry(member.version.clone()).or_default() += 1;
            *content.policies.entry(member.policy.clone()).or_default() += 1;
            if member.reached == Some(false) {
                content.unreached.push(member.label());
            }
        }
        content.unreached.sort_unstable();
        content.unreached.truncate(NAMED);
        content.versions = most(content.versions);
        content.policies = most(content.policies);
        content
    }
}

fn most(counts: BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let mut all: Vec<(String, usize)> = counts.into_iter().collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let others: usize = all.iter().skip(KINDS).map(|(_, count)| count).sum();
    all.truncate(KINDS);
    let mut most: BTreeMap<String, usize> = all.into_iter().collect();
    if others > 0 {
        *most.entry(OTHER.to_owned()).or_default() += others;
    }
    most
}

/// The name of its ConfigMap, by that of the lease.
pub fn name(lease: &str) -> String {
    format!("{lease}-fleet")
}

/// The text of a summary; names are left out until it is short enough.
pub(super) fn text(content: &Content, token: &Token, leader: &str, wall: SystemTime) -> String {
    let stamp = Stamp { uid: token.uid.to_string(), version: token.version, transitions: token.transitions };
    let written = humantime::format_rfc3339_seconds(wall).to_string();
    let mut summary = Summary { token: stamp, written, leader, content: content.clone() };
    loop {
        // Maps with texts as keys, numbers and texts always are JSON.
        let text = serde_json::to_string_pretty(&summary).unwrap_or_default();
        if text.len() <= LIMIT || summary.content.unreached.is_empty() {
            return text;
        }
        let half = summary.content.unreached.len() / 2;
        summary.content.unreached.truncate(half);
    }
}

/// Under which token it was written; `None`: by nobody, or by somebody else.
pub(super) fn token(body: &Value) -> Option<Token> {
    let Stamped { token } = serde_json::from_str(body["data"][KEY].as_str()?).ok()?;
    Some(Token { uid: token.uid.into(), version: token.version, transitions: token.transitions })
}

impl Summaries {
    /// Of the lease of this name.
    pub(super) fn new(lease: &str) -> Self {
        Self { name: name(lease), stored: None, content: None, written: 0, next: 0 }
    }

    /// A term begins: others may have written since the last one.
    pub(super) fn begin(&mut self) {
        (self.stored, self.content) = (None, None);
    }

    /// Writes, if it is time. Returns whether it was written.
    pub(super) async fn turn(
        &mut self,
        effects: &Effects,
        guard: &Guard,
        content: Content,
        leader: &str,
        wall: SystemTime,
    ) -> Result<bool, Stop> {
        let now = effects.now();
        let is_same = self.content.as_ref() == Some(&content);
        if now < self.next || (is_same && now < self.written + AT_LEAST) {
            return Ok(false);
        }
        // Whatever comes of it.
        self.next = now + PAUSE;
        let written = self.write(effects, guard, &content, leader, wall).await;
        if !matches!(written, Ok(true)) {
            // Nobody knows what stands there now.
            self.content = None;
        }
        match &written {
            Ok(true) => (self.content, self.written) = (Some(content), now),
            Ok(false) => {}
            Err(stop) => self.next = now + stop.pause(),
        }
        written
    }

    /// Whether it was written; else somebody was faster.
    async fn write(
        &mut self,
        effects: &Effects,
        guard: &Guard,
        content: &Content,
        leader: &str,
        wall: SystemTime,
    ) -> Result<bool, Stop> {
        let folder = format!("/api/v1/namespaces/{}/configmaps", effects.namespace()?);
        let path = format!("{folder}/{}", self.name);
        // Where the answer is lost it is read again.
        let stored = match self.stored.take() {
            Some(stored) => stored,
            None => {
                let response = effects.send(guard, Method::GET, &path, None).await?;
                self.read(&response).map_err(|fault| self.stop(fault))?
            }
        };
        let text = text(content, guard.token(), leader, wall);
        let response = match stored {
            Stored::Absent => {
                let body = json!({
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": self.name},
                    "data": {KEY: text},
                });
                effects.send(guard, Method::POST, &folder, Some(&body)).await?
            }
            Stored::There(mut body) => {
                if let Some(later) = token(&body).filter(|stored| stored > guard.token()) {
                    effects.metrics.fenced();
                    return Err(Stop::Fenced(later));
                }
                // It has the uid and the version that are replaced, and what others have put there.
                if let Some(metadata) = body["metadata"].as_object_mut() {
                    metadata.remove("managedFields");
                }
                object::part(&mut body, "data")[KEY] = json!(text);
                effects.send(guard, Method::PUT, &path, Some(&body)).await?
            }
        };
        match response.status {
            StatusCode::OK | StatusCode::CREATED => {
                self.stored = Some(self.read(&response).map_err(|fault| self.stop(fault))?);
                Ok(true)
            }
            StatusCode::CONFLICT => Ok(false),
            _ if is_absent(&response) => Ok(false),
            status => Err(self.stop(refusal(status, &response.body))),
        }
    }

    fn read(&self, response: &Response) -> Result<Stored, Fault> {
        let Response { status, body, .. } = response;
        match *status {
            StatusCode::OK | StatusCode::CREATED => {
                let is_whole = ["uid", "resourceVersion"].iter().all(|key| body["metadata"][key].is_string());
                if body["kind"] == "ConfigMap" && is_whole {
                    Ok(Stored::There(body.clone()))
                } else {
                    Err(Fault::new(Cause::Malformed, format!("the answer is no ConfigMap {}", self.name)))
                }
            }
            _ if is_absent(response) => Ok(Stored::Absent),
            status => Err(refusal(status, body)),
        }
    }

    fn stop(&self, fault: Fault) -> Stop {
        let name = &self.name;
        let remedy = match fault.cause {
            Cause::Forbidden => format!(
                "give the service account a Role with the rules {{apiGroups: [\"\"], resources: [configmaps], resourceNames: \
                 [{name}], verbs: [get, update]}} and {{apiGroups: [\"\"], resources: [configmaps], verbs: [create]}}; without \
                 the second make the ConfigMap {name} beforehand, empty"
            ),
            Cause::Rejected => {
                format!("exempt the ConfigMap {name} from the webhook, the quota or the rule that refuses it")
            }
            cause => cause.remedy().to_owned(),
        };
        Stop::Fault(fault, remedy)
    }
}

fn is_absent(response: &Response) -> bool {
    let Response { status, body, .. } = response;
    *status == StatusCode::NOT_FOUND && body["kind"] == "Status" && body["details"]["kind"] == "configmaps"
}
