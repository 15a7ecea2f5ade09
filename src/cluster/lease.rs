//! A lease as an object of the API server: `coordination.k8s.io/v1`, read, made, replaced and watched.
//!
//! What is not Peili's in the object stays as it is. Each write names the uid and the resourceVersion that it replaces; a merge patch or
//! an apply would let the last one win.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::api::{Api, Response};
use super::classify::refusal;
use super::{Cause, Fault};
use crate::election::lease::{ANNOTATION, Answer, IDENTITY_LIMIT, Object, Record, Write};
use crate::election::strict::{BOOK, BOOK_LIMIT, Change, Lock, Notes, Reply};

/// Holds [`Notes::members`].
const MEMBERS: &str = "peili.dev/members";
/// Holds [`Notes::book`], in base64 with spaces between.
const BOOK_NOTE: &str = "peili.dev/book";
/// How long the server lets a watch run, in seconds: its own limit is half an hour or an hour.
const WATCH: u64 = 300;
/// States that are kept, so that what is replaced keeps what is not Peili's.
const KEPT: usize = 4;

/// A lease of the API server.
pub struct LeaseLock {
    api: Arc<Api>,
    name: String,
    seen: Mutex<Vec<(Arc<str>, u64, Value)>>,
}

impl LeaseLock {
    /// The lease of this name in the namespace of the API. `name`: see [`super::is_name`].
    pub fn new(api: Arc<Api>, name: &str) -> Self {
        Self { api, name: name.to_owned(), seen: Mutex::default() }
    }

    fn folder(&self) -> Result<String, Fault> {
        Ok(format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.api.namespace()?))
    }

    async fn call(&self, method: Method, body: Option<&Value>, limit: Duration) -> Reply {
        let creates = method == Method::POST;
        let folder = match self.folder() {
            Ok(folder) => folder,
            Err(fault) => return Reply::failed(Answer::Rejected(None), fault),
        };
        let path = if creates { folder } else { format!("{folder}/{}", self.name) };
        let writes = method != Method::GET;
        match self.api.call(method, &path, body, limit).await {
            Err(fault) => Reply::failed(Answer::Unknown, fault),
            Ok(response) => self.reply(&response, creates, writes),
        }
    }

    fn reply(&self, response: &Response, creates: bool, writes: bool) -> Reply {
        let Response { status, retry_after, body } = response;
        let is_status = body["kind"] == "Status";
        match *status {
            StatusCode::OK | StatusCode::CREATED => match parse(body) {
                Some((object, notes)) => {
                    self.keep(&object, body);
                    Reply { notes: Some(notes), ..Reply::of(Answer::Object(object)) }
                }
                None => Reply::failed(
                    Answer::Unknown,
                    Fault::new(Cause::Malformed, "the answer is no Lease with a uid and a resourceVersion"),
                ),
            },
            StatusCode::NOT_FOUND if is_status && !creates && body["details"]["kind"] == "leases" => {
                Reply::of(Answer::Absent)
            }
            StatusCode::CONFLICT if is_status && writes => Reply::of(Answer::Conflict),
            status => {
                let mut fault = refusal(status, body);
                if creates && fault.cause == Cause::Forbidden {
                    let folder = self.folder().unwrap_or_default();
                    let text =
                        format!("{folder}/{} does not exist and may not be made: {}", self.name, fault.text);
                    fault = Fault::new(Cause::NoObject, text);
                } else if creates && status == StatusCode::NOT_FOUND {
                    fault.cause = Cause::NoNamespace;
                }
                let answer = match status.as_u16() {
                    404 if creates => Answer::Absent,
                    400..=499 => Answer::Rejected(retry_after.map(millis)),
                    _ => Answer::Unknown,
                };
                Reply::failed(answer, fault)
            }
        }
    }

    fn keep(&self, object: &Object, body: &Value) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(uid, version, _)| (uid, *version) != (&object.uid, object.version));
        if seen.len() >= KEPT {
            seen.remove(0);
        }
        seen.push((Arc::clone(&object.uid), object.version, body.clone()));
    }

    fn kept(&self, write: &Write) -> Option<Value> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let same = seen.iter().find(|(uid, version, _)| (uid, *version) == (&write.uid, write.version));
        same.map(|(_, _, body)| body.clone())
    }
}

#[async_trait]
impl Lock for LeaseLock {
    async fn get(&self, limit: Duration) -> Reply {
        self.call(Method::GET, None, limit).await
    }

    async fn create(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        let mut body = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name},
        });
        fill(&mut body, write, notes);
        self.call(Method::POST, Some(&body), limit).await
    }

    async fn put(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        let Some(mut body) = self.kept(write) else {
            // It was seen by another handle, or too many were seen since: the core reads it again.
            return Reply::of(Answer::Conflict);
        };
        body["metadata"]["uid"] = json!(&*write.uid);
        body["metadata"]["resourceVersion"] = json!(write.version.to_string());
        if let Some(metadata) = body["metadata"].as_object_mut() {
            metadata.remove("managedFields");
        }
        fill(&mut body, write, notes);
        self.call(Method::PUT, Some(&body), limit).await
    }

    async fn watch(&self, version: u64, changes: mpsc::Sender<Change>) -> Result<(), Fault> {
        // By field, so that a Role may be limited to the one object; from a version, so that nothing has to be listed.
        let path = format!(
            "{}?watch=true&fieldSelector=metadata.name%3D{}&resourceVersion={version}&timeoutSeconds={WATCH}",
            self.folder()?,
            self.name
        );
        let mut lines = self.api.stream(&path).await?;
        while let Some(event) = lines.next().await? {
            let object = &event["object"];
            let change = match event["type"].as_str() {
                Some("ADDED" | "MODIFIED") => parse(object).map(|(seen, notes)| {
                    self.keep(&seen, object);
                    Change::Seen(seen, notes)
                }),
                Some("DELETED") => resource_version(object).map(Change::Gone),
                Some("BOOKMARK") => continue,
                // The version is too old (410): the lease is read again.
                Some("ERROR") => break,
                _ => None,
            };
            let Some(change) = change else {
                return Err(Fault::new(Cause::Malformed, "the watch tells of something that is no Lease"));
            };
            if changes.send(change).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn knock(&self, limit: Duration) -> bool {
        self.api.knock(limit).await
    }

    fn place(&self) -> String {
        self.api.place()
    }
}

/// Reads a Lease; `None`: it is none, or lacks what every stored object has.
pub(super) fn parse(body: &Value) -> Option<(Object, Notes)> {
    let (metadata, spec) = (&body["metadata"], &body["spec"]);
    let uid = metadata["uid"].as_str().filter(|uid| !uid.is_empty() && uid.len() <= 128)?;
    let note = |key: &str| metadata["annotations"][key].as_str();
    let seconds = spec["leaseDurationSeconds"].as_u64().unwrap_or(0).min(u64::from(u32::MAX));
    let transitions = spec["leaseTransitions"].as_u64().unwrap_or(0);
    let record = Record {
        holder: bounded(spec["holderIdentity"].as_str().unwrap_or_default()).into(),
        duration: seconds * 1_000,
        renewed: spec["renewTime"].as_str().map(|time| bounded(time).into()),
        transitions: u32::try_from(transitions).unwrap_or(u32::MAX),
        preferred: spec["preferredHolder"].as_str().is_some_and(|holder| !holder.is_empty()),
        mark: note(ANNOTATION).and_then(|mark| mark.parse().ok()),
    };
    let notes = Notes {
        members: note(MEMBERS).and_then(|members| members.parse().ok()).unwrap_or(0),
        book: note(BOOK_NOTE).map(book).unwrap_or_default(),
    };
    Some((Object { uid: uid.into(), version: resource_version(body)?, record }, notes.bounded()))
}

fn resource_version(body: &Value) -> Option<u64> {
    body["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// Whoever may write the lease writes it as long as they like.
fn bounded(text: &str) -> &str {
    &text[..text.floor_char_boundary(IDENTITY_LIMIT)]
}

fn book(text: &str) -> Vec<Vec<u8>> {
    if text.len() > BOOK_LIMIT * 2 {
        return Vec::new();
    }
    text.split(' ')
        .filter(|record| !record.is_empty())
        .take(BOOK)
        .filter_map(|record| STANDARD.decode(record).ok())
        .collect()
}

fn fill(body: &mut Value, write: &Write, notes: &Notes) {
    let now = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    let annotations = &mut body["metadata"]["annotations"];
    annotations[ANNOTATION] = json!(write.mark.to_string());
    if !write.holder.is_empty() {
        annotations[MEMBERS] = json!(notes.members.to_string());
        let book: Vec<String> = notes.book.iter().map(|record| STANDARD.encode(record)).collect();
        annotations[BOOK_NOTE] = json!(book.join(" "));
    }
    let spec = &mut body["spec"];
    spec["holderIdentity"] = json!(&*write.holder);
    // Whole seconds, and never fewer than the validity was computed from.
    spec["leaseDurationSeconds"] = json!(write.duration.div_ceil(1_000).max(1));
    spec["leaseTransitions"] = json!(write.transitions);
    spec["renewTime"] = json!(now);
    if write.begins {
        spec["acquireTime"] = json!(now);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::election::lease::Mark;

    /// As `kubectl get lease -o json` of Kubernetes 1.20 shows one of client-go.
    const OLD: &str = r#"{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"creationTimestamp":
        "2026-11-23T10:00:00Z","name":"kube-scheduler","namespace":"kube-system","resourceVersion":"4711","uid":
        "0d6bb2c1-7d2f-4c56-9a3c-1f1d6b4c5a11"},"spec":{"acquireTime":"2026-11-23T10:00:00.000000Z","holderIdentity":
        "cp_5b2e","leaseDurationSeconds":15,"leaseTransitions":3,"renewTime":"2026-11-23T10:05:00.123456Z"}}"#;
    /// As 1.31 and later have one under the API server's coordinator.
    const NEW: &str = r#"{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"annotations":{"peili.dev/election":
        "7 6000 node/1","peili.dev/members":"12","peili.dev/book":"YQ== Yg=="},"name":"peili","resourceVersion":"9","uid":"u",
        "managedFields":[{"manager":"x"}]},"spec":{"holderIdentity":"node/1","leaseDurationSeconds":6,"preferredHolder":"b",
        "strategy":"OldestEmulationVersion","leaseTransitions":1,"renewTime":"2026-11-23T10:05:00.123456Z"}}"#;

    fn value(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn leases_of_old_and_new_versions_are_read() {
        let (old, notes) = parse(&value(OLD)).unwrap();
        assert_eq!((old.version, &*old.record.holder, old.record.duration), (4711, "cp_5b2e", 15_000));
        assert_eq!((old.record.transitions, old.record.preferred, old.record.mark), (3, false, None));
        assert_eq!(notes, Notes::default());
        let (new, notes) = parse(&value(NEW)).unwrap();
        let mark = Mark { writer: "node/1".into(), sequence: 7, duration: 6_000, released: false };
        assert_eq!((new.record.mark, new.record.preferred), (Some(mark), true));
        assert_eq!(notes, Notes { members: 12, book: vec![b"a".to_vec(), b"b".to_vec()] });
    }

    #[test]
    fn what_is_no_lease_is_none() {
        for text in [
            "null",
            "{}",
            "[]",
            r#"{"metadata":{"uid":"u"}}"#,
            r#"{"metadata":{"uid":"","resourceVersion":"1"}}"#,
        ] {
            assert!(parse(&value(text)).is_none(), "{text}");
        }
        let odd = r#"{"metadata":{"uid":"u","resourceVersion":"1","annotations":{"peili.dev/members":"-1","peili.dev/book":"!"}},
            "spec":{"holderIdentity":7,"leaseDurationSeconds":-1,"leaseTransitions":-5}}"#;
        let (object, notes) = parse(&value(odd)).unwrap();
        assert_eq!(object.record, Record::default());
        assert_eq!(notes, Notes::default());
        let long = json!({"metadata": {"uid": "u", "resourceVersion": "1"}, "spec": {"holderIdentity": "ä".repeat(9_000)}});
        assert_eq!(parse(&long).unwrap().0.record.holder.len(), IDENTITY_LIMIT);
    }

    #[test]
    fn what_is_not_peilis_stays() {
        let mut body = value(NEW);
        body["metadata"]["labels"] = json!({"app": "x"});
        let write = Write {
            uid: "u".into(),
            version: 9,
            holder: "".into(),
            duration: 5_500,
            transitions: 1,
            mark: Mark { writer: "node/1".into(), sequence: 8, duration: 5_500, released: true },
            begins: false,
        };
        fill(&mut body, &write, &Notes { members: 3, book: Vec::new() });
        assert_eq!(body["metadata"]["labels"]["app"], "x");
        assert_eq!(body["spec"]["strategy"], "OldestEmulationVersion");
        assert_eq!(body["spec"]["leaseDurationSeconds"], 6);
        assert_eq!(
            body["metadata"]["annotations"]["peili.dev/members"], "12",
            "who gives it away says nothing"
        );
        let (object, _) = parse(&body).unwrap();
        assert!(object.record.is_released());
    }
}
