//! A record as the `spec` of a Lease (`coordination.k8s.io/v1`).

use std::time::SystemTime;

use serde_json::{Value, json};

use super::object;
use crate::election::lease::{Record, Write};

/// Reads it, but for the mark, which is an annotation in every kind.
pub(super) fn record(body: &Value) -> Record {
    object::fields(&body["spec"], "leaseTransitions")
}

/// Writes it.
pub(super) fn write(body: &mut Value, write: &Write, now: SystemTime) {
    let now = humantime::format_rfc3339_micros(now).to_string();
    let spec = object::part(body, "spec");
    spec["holderIdentity"] = json!(&*write.holder);
    spec["leaseDurationSeconds"] = json!(object::seconds(write));
    spec["leaseTransitions"] = json!(write.transitions);
    spec["renewTime"] = json!(now);
    if write.begins {
        spec["acquireTime"] = json!(now);
    }
}
