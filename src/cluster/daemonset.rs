//! What the API server says of a DaemonSet: on how many nodes its pods are, and are ready. One small request; whoever asks decides how often.

use std::fmt;
use std::time::Duration;

use http::{Method, StatusCode};

use super::classify::refusal;
use super::{Api, Cause, Fault, is_name};

/// How far a DaemonSet has come, in nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollout {
    /// Nodes that are to have a pod.
    pub desired: u64,
    /// Nodes whose pod is ready.
    pub ready: u64,
    /// The controller has seen what is asked for now; before that the numbers are of something else, or zero.
    pub is_observed: bool,
}

impl Rollout {
    /// Whether each node that is to have a pod has one that is ready.
    pub fn is_complete(&self) -> bool {
        self.is_observed && self.ready >= self.desired
    }
}

impl fmt::Display for Rollout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_observed {
            write!(formatter, "{} of {} nodes", self.ready, self.desired)
        } else {
            formatter.write_str("no node yet")
        }
    }
}

/// The DaemonSet of this name, in Peili's namespace.
///
/// # Errors
/// There is none, it may not be read (`get` of daemonsets, by name), or the server does not answer within `limit`.
pub async fn rollout(api: &Api, name: &str, limit: Duration) -> Result<Rollout, Fault> {
    if !is_name(name) {
        return Err(Fault::new(Cause::NoObject, format!("`{name}` can be no DaemonSet's name")));
    }
    let path = format!("/apis/apps/v1/namespaces/{}/daemonsets/{name}", api.namespace()?);
    let response = api.call(Method::GET, &path, None, limit).await?;
    if response.status != StatusCode::OK {
        return Err(refusal(response.status, &response.body));
    }
    let (metadata, status) = (&response.body["metadata"], &response.body["status"]);
    let number = |name: &str| status[name].as_u64().unwrap_or_default();
    Ok(Rollout {
        desired: number("desiredNumberScheduled"),
        ready: number("numberReady"),
        is_observed: number("observedGeneration") >= metadata["generation"].as_u64().unwrap_or(1),
    })
}
