//! The audit log: what is written to it, and what it says.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A request that the server was asked, by its own word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verb: String,
    /// `leases`; empty for paths that are no objects.
    pub resource: String,
    /// `token`, `status`; mostly empty.
    pub subresource: String,
    /// The object's namespace.
    pub namespace: String,
    /// The object's name; empty for lists.
    pub name: String,
    /// `system:serviceaccount:NAMESPACE:NAME`
    pub user: String,
    /// What the client says that it is.
    pub user_agent: String,
    /// The path, with its query.
    pub uri: String,
    /// The status of the answer.
    pub code: u16,
}

impl Request {
    /// Whether it would change something.
    pub fn is_write(&self) -> bool {
        ["create", "update", "patch", "delete", "deletecollection"].contains(&self.verb.as_str())
    }

    fn parse(entry: &Value) -> Self {
        let text = |pointer: &str| {
            entry.pointer(pointer).and_then(Value::as_str).map(str::to_owned).unwrap_or_default()
        };
        let code = entry.pointer("/responseStatus/code").and_then(Value::as_u64);
        Self {
            verb: text("/verb"),
            resource: text("/objectRef/resource"),
            subresource: text("/objectRef/subresource"),
            namespace: text("/objectRef/namespace"),
            name: text("/objectRef/name"),
            user: text("/user/username"),
            user_agent: text("/userAgent"),
            uri: text("/requestURI"),
            code: code.and_then(|code| code.try_into().ok()).unwrap_or_default(),
        }
    }
}

/// Who asked for what, of all but the server itself and questions after its health.
pub(super) fn policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "users": ["system:apiserver"]},
            {"level": "None", "nonResourceURLs": ["/readyz*", "/livez*", "/healthz*"]},
            {"level": "Metadata"},
        ],
    })
}

/// Each request once: a watch has an entry where its answer begins, and one where it ends.
pub(super) fn read(log: &str) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    let mut seen = BTreeSet::new();
    // What has no end is still being written.
    for line in log.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let entry: Value = serde_json::from_str(line).context("no audit entry")?;
        if seen.insert(entry["auditID"].to_string()) {
            requests.push(Request::parse(&entry));
        }
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_requests_each_once() {
        let entry = |id: &str, stage: &str| {
            let reference = json!({"resource": "leases", "namespace": "n", "name": "a"});
            let user = json!({"username": "u"});
            let status = json!({"code": 409});
            json!({
                "auditID": id, "stage": stage, "verb": "update", "objectRef": reference, "user": user,
                "responseStatus": status,
            })
        };
        let log = format!(
            "{}\n{}\n{}\n{{\"half",
            entry("1", "ResponseStarted"),
            entry("1", "ResponseComplete"),
            entry("2", "ResponseComplete")
        );
        let requests = read(&log).unwrap();
        assert_eq!(requests.len(), 2);
        let expected = Request {
            verb: "update".into(),
            resource: "leases".into(),
            namespace: "n".into(),
            name: "a".into(),
            user: "u".into(),
            code: 409,
            ..Request::default()
        };
        assert_eq!(requests[0], expected);
        assert!(requests[0].is_write());
    }
}
