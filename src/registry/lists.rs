//! Tag lists and referrers of what is held here, for registries that cannot be reached.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::header::LINK;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::respond;
use super::route::Page;
use crate::listener::Body;
use crate::oci::{Descriptor, Digest, MANIFEST_LIMIT, MANIFEST_MEDIA_TYPES, Name, Tag};

const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");

/// A manifest that is about another one, as a referrers list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referrer {
    /// The manifest.
    pub descriptor: Descriptor,
    /// What kind of artifact it is.
    pub artifact_type: Option<Arc<str>>,
    /// Its own annotations.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireManifest {
    artifact_type: Option<String>,
    config: Option<WireConfig>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireConfig {
    media_type: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WireReferrer<'a> {
    media_type: &'a str,
    size: u64,
    digest: Digest,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

impl Referrer {
    /// Reads a manifest. Its artifact type is its own or else its config's media type (distribution specification,
    /// "Listing Referrers"). `None`: not a manifest.
    pub fn parse(descriptor: Descriptor, manifest: &[u8]) -> Option<Self> {
        if manifest.len() as u64 > MANIFEST_LIMIT {
            return None;
        }
        let wire: WireManifest = serde_json::from_slice(manifest).ok()?;
        let own = wire.artifact_type.filter(|text| !text.is_empty());
        let artifact_type = own.or_else(|| wire.config.and_then(|config| config.media_type));
        Some(Self { descriptor, artifact_type: artifact_type.map(Into::into), annotations: wire.annotations })
    }
}

/// `None`: the repository is not known here.
pub(super) fn tags(name: &Name, mut tags: Vec<Tag>, page: &Page, head: bool) -> Option<Response<Body>> {
    if tags.is_empty() {
        return None;
    }
    tags.sort_unstable();
    tags.dedup();
    let start = page.last.as_deref().map_or(0, |last| tags.partition_point(|tag| tag.as_str() <= last));
    let end = tags.len().min(start.saturating_add(page.limit));
    let shown: Vec<&str> = tags[start..end].iter().map(Tag::as_str).collect();
    let repository = name.repository.as_str();
    let body = serde_json::json!({ "name": repository, "tags": shown });
    let mut response = respond::json(StatusCode::OK, "application/json", body.to_string().into(), head);
    if let Some(last) = shown.last().filter(|_| end < tags.len()) {
        let registry = name.registry.as_str();
        let link =
            format!("</v2/{repository}/tags/list?n={}&last={last}&ns={registry}>; rel=\"next\"", page.limit);
        if let Ok(link) = HeaderValue::try_from(link) {
            response.headers_mut().insert(LINK, link);
        }
    }
    respond::insert_name(&mut response, name);
    Some(response)
}

pub(super) fn referrers(
    name: &Name,
    mut referrers: Vec<Referrer>,
    artifact_type: Option<&str>,
    head: bool,
) -> Response<Body> {
    if let Some(wanted) = artifact_type {
        referrers.retain(|referrer| referrer.artifact_type.as_deref() == Some(wanted));
    }
    referrers.sort_unstable_by_key(|referrer| referrer.descriptor.digest);
    let manifests: Vec<_> = referrers
        .iter()
        .map(|referrer| WireReferrer {
            media_type: &referrer.descriptor.media_type,
            size: referrer.descriptor.size,
            digest: referrer.descriptor.digest,
            artifact_type: referrer.artifact_type.as_deref(),
            annotations: &referrer.annotations,
        })
        .collect();
    let index = MANIFEST_MEDIA_TYPES[0];
    let body = serde_json::json!({ "schemaVersion": 2, "mediaType": index, "manifests": manifests });
    let mut response = respond::json(StatusCode::OK, index, Bytes::from(body.to_string()), head);
    if artifact_type.is_some() {
        response.headers_mut().insert(FILTERS, HeaderValue::from_static("artifactType"));
    }
    respond::insert_name(&mut response, name);
    response
}
