//! A record as JSON in an annotation of a ConfigMap, as client-go wrote it until 1.27, with times in whole seconds.
//!
//! Electors of that kind read what stands here, and each of them stops for good at a record that it cannot read: so what is written is
//! always whole, whatever stood there.

use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Value, json};

use super::object;
use crate::election::lease::{Record, Write};

/// client-go's `LeaderElectionRecordAnnotationKey`.
pub(super) const RECORD: &str = "control-plane.alpha.kubernetes.io/leader";
/// Bytes of it that are read: the API server takes no more of all annotations together.
const LIMIT: usize = 256 << 10;

/// client-go's `LeaderElectionRecord`, in its order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    holder_identity: &'a str,
    lease_duration_seconds: u64,
    acquire_time: String,
    renew_time: String,
    leader_transitions: u32,
}

/// Reads it, but for the mark. What is absent or no JSON is a record without a holder, which proves nothing: it is taken after a full
/// duration.
pub(super) fn record(body: &Value) -> Record {
    object::fields(&stored(body), "leaderTransitions")
}

/// Writes it.
pub(super) fn write(body: &mut Value, write: &Write, now: SystemTime) {
    let now = humantime::format_rfc3339_seconds(now).to_string();
    let stored = stored(body);
    let acquired = stored["acquireTime"].as_str().filter(|time| humantime::parse_rfc3339(time).is_ok());
    let acquired = acquired.filter(|_| !write.begins).unwrap_or(&now).to_owned();
    let written = Written {
        holder_identity: &write.holder,
        lease_duration_seconds: object::seconds(write),
        acquire_time: acquired,
        renew_time: now,
        leader_transitions: write.transitions,
    };
    // Numbers and texts always are JSON.
    body["metadata"]["annotations"][RECORD] = json!(serde_json::to_string(&written).unwrap_or_default());
}

fn stored(body: &Value) -> Value {
    let text = body["metadata"]["annotations"][RECORD].as_str().filter(|text| text.len() <= LIMIT);
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}
