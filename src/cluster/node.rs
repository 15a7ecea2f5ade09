//! What the API server says of a node: one label, and nothing else of it. One small request; whoever asks decides how often.

use std::time::Duration;

use http::{Method, StatusCode};

use super::classify::refusal;
use super::{Api, Cause, Fault, is_name};

/// A label of the Node of this name; `None`: it has none.
///
/// # Errors
/// There is no such Node, it may not be read (`get` of nodes, by name), or the server does not answer within `limit`.
pub async fn node_label(
    api: &Api,
    node: &str,
    label: &str,
    limit: Duration,
) -> Result<Option<String>, Fault> {
    if !is_name(node) {
        return Err(Fault::new(Cause::NoObject, format!("`{node}` can be no Node's name: see `node.name`")));
    }
    let response = api.call(Method::GET, &format!("/api/v1/nodes/{node}"), None, limit).await?;
    if response.status != StatusCode::OK {
        return Err(refusal(response.status, &response.body));
    }
    Ok(response.body["metadata"]["labels"][label].as_str().map(str::to_owned))
}
