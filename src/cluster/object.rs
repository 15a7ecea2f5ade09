//! A lock as an object of the API server, read, made, replaced and watched: a Lease, or the ConfigMap in which electors of old have theirs.
//!
//! What is not Peili's in the object stays as it is. Each write names the uid and the resourceVersion that it replaces; a merge patch or
//! an apply would let the last one win. Where a record stands in each kind is the matter of `lease` and `configmap`.

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
use super::{Cause, Fault, configmap, lease};
use crate::election::lease::{ANNOTATION, Answer, IDENTITY_LIMIT, Mark, Object, Record, Write};
use crate::election::strict::{BOOK, BOOK_LIMIT, Change, Lock, Notes, Reply};

/// Holds [`Notes::members`].
const MEMBERS: &str = "peili.dev/members";
/// Holds [`Notes::book`], in base64 with spaces between.
const BOOK_NOTE: &str = "peili.dev/book";
/// Holds the time and the transitions of the record that was written with a mark that gives the lock away. Other electors replace the
/// record and leave annotations: what one of them gave away later, by an empty holder too, was not given away by Peili.
const RELEASED: &str = "peili.dev/released";
/// How long the server lets a watch run, in seconds: its own limit is half an hour or an hour.
const WATCH: u64 = 300;
/// States that are kept, so that what is replaced keeps what is not Peili's.
const KEPT: usize = 4;

/// What a lock is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `coordination.k8s.io/v1`.
    Lease,
    /// An annotation of a ConfigMap, as client-go had it until 1.27.
    ConfigMap,
}

/// A lock of the API server.
pub struct ObjectLock {
    kind: Kind,
    api: Arc<Api>,
    name: String,
    seen: Mutex<Vec<(Arc<str>, u64, Value)>>,
}

impl Kind {
    /// As Kubernetes has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lease => "Lease",
            Self::ConfigMap => "ConfigMap",
        }
    }

    /// As objects say it.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Lease => "coordination.k8s.io/v1",
            Self::ConfigMap => "v1",
        }
    }

    /// As paths and Roles have it.
    pub const fn resource(self) -> &'static str {
        match self {
            Self::Lease => "leases",
            Self::ConfigMap => "configmaps",
        }
    }

    /// The group of Roles that it is in.
    pub const fn group(self) -> &'static str {
        match self {
            Self::Lease => "coordination.k8s.io",
            Self::ConfigMap => "",
        }
    }

    /// Who holds the lock by what stands in the object, and whether Peili wrote that; `None`: nobody.
    pub fn holder(self, body: &Value) -> Option<(String, bool)> {
        let holder = self.record(body).holder;
        let is_ours = body["metadata"]["annotations"][ANNOTATION].is_string();
        (!holder.is_empty()).then(|| (holder.to_string(), is_ours))
    }

    pub(super) fn folder(self, namespace: &str) -> String {
        let root = match self {
            Self::Lease => "/apis",
            Self::ConfigMap => "/api",
        };
        format!("{root}/{}/namespaces/{namespace}/{}", self.api_version(), self.resource())
    }

    /// The same fault where what is to be done about it differs.
    const fn cause(self, cause: Cause) -> Cause {
        match (self, cause) {
            (Self::ConfigMap, Cause::Forbidden) => Cause::ConfigMapForbidden,
            (Self::ConfigMap, Cause::NoObject) => Cause::NoConfigMap,
            _ => cause,
        }
    }

    fn record(self, body: &Value) -> Record {
        match self {
            Self::Lease => lease::record(body),
            Self::ConfigMap => configmap::record(body),
        }
    }

    fn write(self, body: &mut Value, write: &Write, now: SystemTime) {
        match self {
            Self::Lease => lease::write(body, write, now),
            Self::ConfigMap => configmap::write(body, write, now),
        }
    }
}

impl ObjectLock {
    /// The object of this name in the namespace of the API. `name`: see [`super::is_name`].
    pub fn new(kind: Kind, api: Arc<Api>, name: &str) -> Self {
        Self { kind, api, name: name.to_owned(), seen: Mutex::default() }
    }

    fn folder(&self) -> Result<String, Fault> {
        Ok(self.kind.folder(&self.api.namespace()?))
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
            StatusCode::OK | StatusCode::CREATED => match parse(self.kind, body) {
                Some((object, notes)) => {
                    self.keep(&object, body);
                    Reply { notes: Some(notes), ..Reply::of(Answer::Object(object)) }
                }
                None => {
                    let text =
                        format!("the answer is no {} with a uid and a resourceVersion", self.kind.name());
                    Reply::failed(Answer::Unknown, Fault::new(Cause::Malformed, text))
                }
            },
            StatusCode::NOT_FOUND
                if is_status && !creates && body["details"]["kind"] == self.kind.resource() =>
            {
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
                fault.cause = self.kind.cause(fault.cause);
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
impl Lock for ObjectLock {
    async fn get(&self, limit: Duration) -> Reply {
        self.call(Method::GET, None, limit).await
    }

    async fn create(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        let mut body = json!({
            "apiVersion": self.kind.api_version(),
            "kind": self.kind.name(),
            "metadata": {"name": self.name},
        });
        fill(self.kind, &mut body, write, notes, SystemTime::now());
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
        fill(self.kind, &mut body, write, notes, SystemTime::now());
        self.call(Method::PUT, Some(&body), limit).await
    }

    async fn watch(&self, version: u64, changes: mpsc::Sender<Change>) -> Result<(), Fault> {
        // By field, so that a Role may be limited to the one object; from a version, so that nothing has to be listed.
        let path = format!(
            "{}?watch=true&fieldSelector=metadata.name%3D{}&resourceVersion={version}&timeoutSeconds={WATCH}",
            self.folder()?,
            self.name
        );
        let opened = self.api.stream(&path).await;
        let mut lines =
            opened.map_err(|fault| Fault { cause: self.kind.cause(fault.cause), text: fault.text })?;
        while let Some(event) = lines.next().await? {
            let object = &event["object"];
            let change = match event["type"].as_str() {
                Some("ADDED" | "MODIFIED") => parse(self.kind, object).map(|(seen, notes)| {
                    self.keep(&seen, object);
                    Change::Seen(seen, notes)
                }),
                Some("DELETED") => resource_version(object).map(Change::Gone),
                Some("BOOKMARK") => continue,
                // The version is too old (410): the object is read again.
                Some("ERROR") => break,
                _ => None,
            };
            let Some(change) = change else {
                let text = format!("the watch tells of something that is no {}", self.kind.name());
                return Err(Fault::new(Cause::Malformed, text));
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

    fn name(&self) -> String {
        format!("{} {}", self.kind.name(), self.name)
    }

    fn place(&self) -> String {
        self.api.place()
    }
}

/// Reads an object; `None`: it lacks what every stored one has.
fn parse(kind: Kind, body: &Value) -> Option<(Object, Notes)> {
    let metadata = &body["metadata"];
    let uid = metadata["uid"].as_str().filter(|uid| !uid.is_empty() && uid.len() <= 128)?;
    let note = |key: &str| metadata["annotations"][key].as_str();
    let mut record = kind.record(body);
    let mark = note(ANNOTATION).and_then(|mark| mark.parse::<Mark>().ok());
    record.mark = mark.map(|mark| {
        let released = mark.released && note(RELEASED) == Some(stamp(&record).as_str());
        Mark { released, ..mark }
    });
    let notes = Notes {
        members: note(MEMBERS).and_then(|members| members.parse().ok()).unwrap_or(0),
        book: note(BOOK_NOTE).map(book).unwrap_or_default(),
    };
    Some((Object { uid: uid.into(), version: resource_version(body)?, record }, notes.bounded()))
}

fn resource_version(body: &Value) -> Option<u64> {
    body["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// Reads the fields that both kinds have, and the number of transitions, which each calls otherwise.
pub(super) fn fields(fields: &Value, transitions: &str) -> Record {
    let seconds = fields["leaseDurationSeconds"].as_u64().unwrap_or(0).min(u64::from(u32::MAX));
    let transitions = fields[transitions].as_u64().unwrap_or(0);
    Record {
        holder: bounded(fields["holderIdentity"].as_str().unwrap_or_default()).into(),
        duration: seconds * 1_000,
        renewed: fields["renewTime"].as_str().map(|time| bounded(time).into()),
        transitions: u32::try_from(transitions).unwrap_or(u32::MAX),
        preferred: fields["preferredHolder"].as_str().is_some_and(|holder| !holder.is_empty()),
        mark: None,
    }
}

/// For `leaseDurationSeconds`: whole seconds, and never fewer than the validity was computed from.
pub(super) fn seconds(write: &Write) -> u64 {
    write.duration.div_ceil(1_000).max(1)
}

/// Tells a record from those that follow it. One that was taken since has other transitions, even in the same second.
fn stamp(record: &Record) -> String {
    format!("{} {}", record.renewed.as_deref().unwrap_or_default(), record.transitions)
}

/// Whoever may write the object writes it as long as they like.
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

/// The object `name` within another one. What an answer has in its place is written over: a broken proxy may answer anything.
pub(super) fn part<'a>(body: &'a mut Value, name: &str) -> &'a mut Value {
    let part = &mut body[name];
    if !part.is_object() {
        *part = json!({});
    }
    part
}

fn fill(kind: Kind, body: &mut Value, write: &Write, notes: &Notes, now: SystemTime) {
    part(&mut body["metadata"], "annotations");
    kind.write(body, write, now);
    let stamp = stamp(&kind.record(body));
    let annotations = &mut body["metadata"]["annotations"];
    annotations[ANNOTATION] = json!(write.mark.to_string());
    if write.mark.released {
        annotations[RELEASED] = json!(stamp);
    } else if let Some(annotations) = annotations.as_object_mut() {
        annotations.remove(RELEASED);
    }
    if !write.holder.is_empty() {
        annotations[MEMBERS] = json!(notes.members.to_string());
        let book: Vec<String> = notes.book.iter().map(|record| STANDARD.encode(record)).collect();
        annotations[BOOK_NOTE] = json!(book.join(" "));
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
