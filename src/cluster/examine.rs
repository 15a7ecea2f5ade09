//! Questions to one address of the API server, for diagnosis. Nothing is changed by them: writes are dry runs, which go through the same
//! authorization and admission. An answer that is a refusal is a finding here and no fault.

use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::classify::refusal;
use super::{Api, Cause, Config, Fault, Kind, Reach, Response};

/// For each question. With the way there and two questions one after the other all is over in nine seconds.
const CALL: Duration = Duration::from_millis(1_500);
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
/// Characters of what the server says of itself.
const ERROR: usize = 300;
/// Since Kubernetes 1.28.
const WHO: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";

/// Asks.
pub struct Examiner {
    api: Api,
}

/// A right: something that is done to a resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `get`, `update`, `watch`, `create`.
    pub verb: &'static str,
    /// As Roles have it; empty: the core group.
    pub group: &'static str,
    /// As Roles have it: `leases`.
    pub resource: &'static str,
    /// Of one object; `None`: of any, as `create` needs it.
    pub name: Option<String>,
    /// In the namespace of Peili's objects, or in none.
    pub namespaced: bool,
}

/// What the server says of a right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Review {
    /// Whether this account may do it.
    pub allowed: bool,
    /// What went wrong while the server looked, in its words: an authorizer that failed might have allowed it.
    pub error: Option<String>,
}

/// What came of a dry write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// It would be taken.
    Taken,
    /// It was answered with a refusal, in these words.
    Refused(Refusal, String),
    /// There was no such answer.
    Failed(Fault),
}

/// Why a write is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// By the account's rights.
    Forbidden,
    /// The namespace does not exist.
    NoNamespace,
    /// The namespace is being deleted.
    Terminating,
    /// A quota.
    Quota,
    /// A webhook or a policy of admission says no.
    Denied,
    /// A webhook that has to be asked does not answer.
    WebhookDead,
    /// A webhook does not take part in dry runs, so that nothing is known.
    NotDry,
    /// Somebody else wrote the object meanwhile.
    Conflict,
    /// Something else.
    Other,
}

impl Examiner {
    /// Of this address and no other.
    pub fn new(config: &Config, reach: &Reach) -> Self {
        Self { api: Api::at(config, vec![(reach.origin, reach.uri.clone())]) }
    }

    /// Its version, `v1.34.4`, for which no right is needed.
    ///
    /// # Errors
    /// What is wrong where there is no such answer.
    pub async fn version(&self) -> Result<String, Fault> {
        let response = self.api.call(Method::GET, "/version", None, CALL).await?;
        match (response.status, response.body["gitVersion"].as_str()) {
            (StatusCode::OK, Some(version)) => Ok(version.chars().take(64).collect()),
            (StatusCode::OK, None) => {
                Err(Fault::new(Cause::Malformed, "the answer to GET /version has no `gitVersion`"))
            }
            // It may be kept from accounts, and it is an API server all the same.
            (StatusCode::FORBIDDEN, _) if response.body["kind"] == "Status" => {
                Ok("a version not told".into())
            }
            (status, _) => Err(refusal(status, &response.body)),
        }
    }

    /// Whom the server takes this account for; `None`: it does not serve that question.
    pub async fn who(&self) -> Option<String> {
        let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
        let response = self.api.call(Method::POST, WHO, Some(&body), CALL).await.ok()?;
        response.body["status"]["userInfo"]["username"].as_str().map(|name| name.chars().take(256).collect())
    }

    /// Whether this account may do this.
    ///
    /// # Errors
    /// The question itself was refused, or there is no answer.
    pub async fn may(&self, namespace: &str, right: &Right) -> Result<Review, Fault> {
        let mut attributes = json!({"verb": right.verb, "group": right.group, "resource": right.resource});
        if right.namespaced {
            attributes["namespace"] = json!(namespace);
        }
        if let Some(name) = &right.name {
            attributes["name"] = json!(name);
        }
        let body = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        });
        let response = self.api.call(Method::POST, REVIEWS, Some(&body), CALL).await?;
        let status = &response.body["status"];
        match status["allowed"].as_bool() {
            Some(allowed) if response.status == StatusCode::CREATED => {
                let error = status["evaluationError"].as_str().filter(|error| !error.is_empty());
                Ok(Review { allowed, error: error.map(|error| error.chars().take(ERROR).collect()) })
            }
            _ => Err(refusal(response.status, &response.body)),
        }
    }

    /// The object; `None`: there is none.
    ///
    /// # Errors
    /// It may not be read, or there is no answer.
    pub async fn object(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Value>, Fault> {
        let path = format!("{}/{name}", kind.folder(namespace));
        let Response { status, body, .. } = self.api.call(Method::GET, &path, None, CALL).await?;
        match status {
            StatusCode::OK if body["metadata"]["uid"].is_string() => Ok(Some(body)),
            StatusCode::NOT_FOUND if body["details"]["kind"] == kind.resource() => Ok(None),
            status => Err(refusal(status, &body)),
        }
    }

    /// Replaces the object by itself, or makes it where there is none: for show.
    pub async fn write(&self, kind: Kind, namespace: &str, name: &str, stored: Option<&Value>) -> Write {
        let folder = kind.folder(namespace);
        let (method, path, body) = match stored {
            Some(stored) => {
                let mut body = stored.clone();
                if let Some(metadata) = body["metadata"].as_object_mut() {
                    metadata.remove("managedFields");
                }
                (Method::PUT, format!("{folder}/{name}?dryRun=All"), body)
            }
            None => {
                let (version, kind) = (kind.api_version(), kind.name());
                let body = json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}});
                (Method::POST, format!("{folder}?dryRun=All"), body)
            }
        };
        match self.api.call(method, &path, Some(&body), CALL).await {
            Ok(response) if response.status.is_success() => Write::Taken,
            Ok(response) => refused(&response),
            Err(fault) => Write::Failed(fault),
        }
    }
}

fn refused(response: &Response) -> Write {
    let Response { status, body, .. } = response;
    let fault = refusal(*status, body);
    let message = body["message"].as_str().unwrap_or_default();
    let says = |words: &str| message.contains(words);
    let refusal = match status.as_u16() {
        _ if body["kind"] != "Status" => return Write::Failed(fault),
        401 | 429 => return Write::Failed(fault),
        404 if body["details"]["kind"] == "namespaces" => Refusal::NoNamespace,
        403 if fault.cause == Cause::NoNamespace => Refusal::Terminating,
        // One that is used up, and one that no controller has counted yet.
        403 if says("exceeded quota") || says("status unknown for quota") => Refusal::Quota,
        400 if says("does not support dry run") => Refusal::NotDry,
        // A webhook chooses the status itself, 500 too.
        400..=599 if says("denied the request") || says("ValidatingAdmissionPolicy") => Refusal::Denied,
        // As the authorizer of Roles puts it: `User "u" cannot create resource "leases"`.
        403 if says(" cannot ") => Refusal::Forbidden,
        409 => Refusal::Conflict,
        500..=599 if says("failed calling webhook") => Refusal::WebhookDead,
        500..=599 => return Write::Failed(fault),
        _ => Refusal::Other,
    };
    Write::Refused(refusal, fault.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_status_and_words() {
        let check = |status: u16, details: Value, message: &str, expected: Option<Refusal>| {
            let body = json!({"kind": "Status", "message": message, "details": details});
            let status = StatusCode::from_u16(status).unwrap();
            let found = match refused(&Response { status, retry_after: None, body }) {
                Write::Refused(refusal, _) => Some(refusal),
                Write::Taken | Write::Failed(_) => None,
            };
            assert_eq!(found, expected, "{status} {message}");
        };
        let none = || Value::Null;
        let cannot = "leases is forbidden: User \"u\" cannot create resource \"leases\"";
        check(403, none(), cannot, Some(Refusal::Forbidden));
        check(403, none(), "leases \"a\" is forbidden: exceeded quota: q", Some(Refusal::Quota));
        check(403, none(), "leases \"a\" is forbidden: status unknown for quota: q", Some(Refusal::Quota));
        check(403, none(), "admission webhook \"w\" denied the request: you cannot", Some(Refusal::Denied));
        check(400, none(), "admission webhook \"w\" does not support dry run", Some(Refusal::NotDry));
        check(422, none(), "ValidatingAdmissionPolicy 'p' denied request", Some(Refusal::Denied));
        check(404, json!({"kind": "namespaces"}), "not found", Some(Refusal::NoNamespace));
        let causes = json!({"causes": [{"reason": "NamespaceTerminating"}]});
        check(403, causes, "unable to create new content", Some(Refusal::Terminating));
        check(409, none(), "the object has been modified", Some(Refusal::Conflict));
        check(
            500,
            none(),
            "Internal error occurred: failed calling webhook \"w\": refused",
            Some(Refusal::WebhookDead),
        );
        check(500, none(), "admission webhook \"w\" denied the request: no route", Some(Refusal::Denied));
        check(500, none(), "etcdserver: leader changed", None);
        check(401, none(), "Unauthorized", None);
        check(422, none(), "Invalid value", Some(Refusal::Other));
    }
}
