//! What the runtime gets: the one place where results become statuses, headers and OCI error codes.

use bytes::Bytes;
use futures::TryStreamExt as _;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use hyper::ext::ReasonPhrase;
use prometheus_client::metrics::counter::Counter;

use crate::listener::Body;
use crate::mirror::{Answer, NotHere};
use crate::oci::{Digest, DigestError, Name, RangeError, ReferenceError};
use crate::policy::Reason;

const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// Which registry the answer stands for (distribution specification, "Registry Proxying").
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// Label of what a policy denies.
pub(super) const DENIED: &str = "denied";

/// Kind of a request, a label of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Manifest,
    Blob,
    Other,
}

/// Why a request cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("no such endpoint")]
    Path,
    #[error(transparent)]
    Name(ReferenceError),
    #[error(transparent)]
    Digest(DigestError),
}

/// Why there is no content in the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    NotHere(NotHere),
    Malformed(Malformed),
    /// A method other than GET and HEAD.
    Method,
    /// More connections than the listener takes.
    Overloaded,
    /// A bug: the handler panicked.
    Internal,
}

impl Kind {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Blob => "blob",
            Self::Other => "other",
        }
    }

    const fn unknown(self) -> &'static str {
        match self {
            Self::Manifest => "MANIFEST_UNKNOWN",
            Self::Blob => "BLOB_UNKNOWN",
            Self::Other => "NAME_UNKNOWN",
        }
    }
}

impl Cause {
    /// Label in metrics, name in `status` and in the error's `detail`.
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Self::NotHere(cause) => match cause {
                NotHere::Unknown => "unknown",
                NotHere::Private => "private",
                NotHere::Bypassed => "bypassed",
                NotHere::TagUpstream => "tag-upstream",
                NotHere::TagDisputed => "tag-disputed",
                NotHere::TagTooOld => "tag-too-old",
                NotHere::PeersFailed => "peers-failed",
                NotHere::PeersBusy => "peers-busy",
                NotHere::UpstreamsFailed => "upstreams-failed",
                NotHere::UpstreamsRefused => "upstreams-refused",
                NotHere::StoreFailed => "store-failed",
                NotHere::Deadline => "deadline",
                NotHere::Unsupported => "unsupported",
            },
            Self::Malformed(_) => "malformed",
            Self::Method => "unsupported",
            Self::Overloaded => "overloaded",
            Self::Internal => "internal",
        }
    }

    /// The status line after the number. It must say something to who reads it in an event of kubelet.
    const fn phrase(&self) -> &'static [u8] {
        match self {
            Self::NotHere(cause) => match cause {
                NotHere::Unknown => b"Not Here (peili: no live trusted node holds it)",
                NotHere::Private => b"Not Here (peili: private, only upstream may serve its manifests)",
                NotHere::Bypassed => b"Not Here (peili: policy leaves it to the registry)",
                NotHere::TagUpstream => b"Not Here (peili: the tag's registry answers)",
                NotHere::TagDisputed => b"Not Here (peili: peers disagree about the tag)",
                NotHere::TagTooOld => b"Not Here (peili: nobody knows the tag to be young enough)",
                NotHere::PeersFailed => b"Not Here (peili: all peers that hold it failed)",
                NotHere::PeersBusy => b"Not Here (peili: all peers that hold it are busy)",
                NotHere::UpstreamsFailed => b"Not Here (peili: the upstreams that policy names fail)",
                NotHere::UpstreamsRefused => b"Not Here (peili: the upstreams that policy names refuse it)",
                NotHere::StoreFailed => b"Not Here (peili: the local store cannot read it)",
                NotHere::Deadline => b"Not Here (peili: no answer in time)",
                NotHere::Unsupported => b"Not Here (peili: not served by a mirror)",
            },
            Self::Malformed(_) => b"Not Here (peili: malformed request)",
            Self::Method => b"Not Here (peili: a mirror is read only)",
            Self::Overloaded => b"Not Here (peili: too many connections)",
            Self::Internal => b"Not Here (peili: internal error)",
        }
    }

    fn code(&self, kind: Kind) -> &'static str {
        match self {
            Self::NotHere(NotHere::Unsupported) | Self::Method => "UNSUPPORTED",
            Self::Malformed(Malformed::Digest(_)) => "DIGEST_INVALID",
            Self::Malformed(Malformed::Name(ReferenceError::Tag(_))) => "MANIFEST_UNKNOWN",
            Self::Malformed(Malformed::Name(_)) => "NAME_INVALID",
            Self::Malformed(Malformed::Path) => "UNSUPPORTED",
            Self::NotHere(_) | Self::Overloaded | Self::Internal => kind.unknown(),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Malformed(malformed) => malformed.to_string(),
            _ => String::from_utf8_lossy(self.phrase()).into_owned(),
        }
    }
}

/// 404 with the cause.
pub(super) fn not_here(kind: Kind, cause: &Cause, head: bool) -> Response<Body> {
    let body = error_body(cause.code(kind), &cause.message(), cause.label());
    let mut response = json(StatusCode::NOT_FOUND, "application/json", body, head);
    response.extensions_mut().insert(reason(cause));
    response
}

/// 403 with a policy's reason, which is in the status line too: it is all that kubelet's event shows.
pub(super) fn denied(reason: &Reason, head: bool) -> Response<Body> {
    let message = format!("Denied (peili: {})", reason.message);
    let body = serde_json::json!({
        "errors": [{ "code": "DENIED", "message": message, "detail": { "cause": DENIED, "code": reason.code } }]
    });
    let mut response = json(StatusCode::FORBIDDEN, "application/json", body.to_string().into(), head);
    let phrase = ReasonPhrase::try_from(message.as_bytes());
    response
        .extensions_mut()
        .insert(phrase.unwrap_or(const { ReasonPhrase::from_static(b"Denied (peili)") }));
    response
}

/// 416 for content that is known.
pub(super) fn range(error: RangeError, head: bool) -> Response<Body> {
    let body = error_body("SIZE_INVALID", &error.to_string(), "range");
    let mut response = json(StatusCode::RANGE_NOT_SATISFIABLE, "application/json", body, head);
    if let Ok(value) = HeaderValue::try_from(format!("bytes */{}", error.size)) {
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    response
}

/// 200, or 206 if a range was asked for. What the body gives is counted by `sent`.
pub(super) fn content(
    answer: Answer,
    name: &Name,
    partial: bool,
    head: bool,
    sent: Counter,
) -> Response<Body> {
    let Answer { descriptor, range, body, .. } = answer;
    let body = if head {
        Body::empty()
    } else {
        let counted = body.inspect_ok(move |chunk| {
            sent.inc_by(chunk.len() as u64);
        });
        Body::stream(Box::pin(counted), range.len())
    };
    let mut response = Response::new(body);
    if partial {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        if let Ok(value) = HeaderValue::try_from(range.content_range(descriptor.size)) {
            response.headers_mut().insert(CONTENT_RANGE, value);
        }
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, range.len().into());
    if let Ok(value) = HeaderValue::try_from(&*descriptor.media_type) {
        headers.insert(CONTENT_TYPE, value);
    }
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    insert_digest(&mut response, &descriptor.digest);
    insert_name(&mut response, name);
    response
}

/// A JSON document.
pub(super) fn json(status: StatusCode, media_type: &'static str, body: Bytes, head: bool) -> Response<Body> {
    let length = body.len();
    let mut response = Response::new(if head { Body::empty() } else { Body::full(body) });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    response
}

pub(super) fn insert_name(response: &mut Response<Body>, name: &Name) {
    if let Ok(value) = HeaderValue::try_from(name.registry.as_str()) {
        response.headers_mut().insert(NAMESPACE, value);
    }
}

fn insert_digest(response: &mut Response<Body>, digest: &Digest) {
    if let Ok(value) = HeaderValue::try_from(digest.to_string()) {
        response.headers_mut().insert(DIGEST, value);
    }
}

/// The complete answer to what hyper cannot read as a request.
pub(super) fn malformed() -> Bytes {
    let cause = Cause::Malformed(Malformed::Path);
    let body = error_body("UNSUPPORTED", "the request is malformed or too large", cause.label());
    let mut answer = b"HTTP/1.1 404 ".to_vec();
    answer.extend_from_slice(cause.phrase());
    answer.extend_from_slice(b"\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: ");
    answer.extend_from_slice(body.len().to_string().as_bytes());
    answer.extend_from_slice(b"\r\n\r\n");
    answer.extend_from_slice(&body);
    answer.into()
}

fn reason(cause: &Cause) -> ReasonPhrase {
    ReasonPhrase::try_from(cause.phrase()).unwrap_or(const { ReasonPhrase::from_static(b"Not Here") })
}

fn error_body(code: &str, message: &str, cause: &str) -> Bytes {
    let body = serde_json::json!({
        "errors": [{ "code": code, "message": message, "detail": { "cause": cause } }]
    });
    body.to_string().into()
}
