//! The protocol between two peer ports: HTTP/1.1 in mutual TLS 1.3 under an ALPN name of its own.
//!
//! `GET /v1/content/<digest>` with `Range: bytes=a-b` is answered by
//! - 206 with `Content-Range`, `Content-Length` and the content's media type as `Content-Type`: these bytes follow;
//! - 416 with `Content-Range: bytes */<size>`: the range begins at or after the end;
//! - 404: not held, or not for this peer;
//! - 503 with `Peili-Queue: <n>`: all uploads are taken, `n` requests wait.
//!
//! A request says in `Peili-Wait` how many milliseconds it may wait for an upload: a peer that is only busy answers 503 in
//! that time, so that silence always means a peer that is gone or hangs.
//!
//! Where there is a cluster key, the first request of a connection, and the first after a renewal, has the client's membership
//! certificate in `Peili-Certificate`, as base64. Who is no member, and does not become one by it, is not answered.
//!
//! `HEAD` answers 200 with the whole size. An incompatible protocol gets another ALPN name; [`VERSION`] is a number
//! for what stays compatible. Headers that are not known are ignored.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{CONTENT_RANGE, HeaderName, HeaderValue};

use crate::network::admission::certificate;
use crate::network::versions;
use crate::oci::{ByteRange, Digest};

/// The ALPN names that are spoken, the best first.
pub(crate) fn alpn() -> Vec<Vec<u8>> {
    versions::names("peili/").map(String::into_bytes).collect()
}

/// Whether the handshake agreed on one of them.
pub(crate) fn is_spoken(alpn: Option<&[u8]>) -> bool {
    alpn.is_some_and(|alpn| versions::names("peili/").any(|name| name.as_bytes() == alpn))
}

/// Sent both ways in [`VERSION_HEADER`].
pub(crate) const VERSION: HeaderValue = HeaderValue::from_static("1");

/// Carries [`VERSION`].
pub(crate) const VERSION_HEADER: HeaderName = HeaderName::from_static("peili-protocol");

/// Carries the number of requests that wait, with status 503.
pub(crate) const QUEUE_HEADER: HeaderName = HeaderName::from_static("peili-queue");

/// Milliseconds that a request may wait for an upload.
pub(crate) const WAIT_HEADER: HeaderName = HeaderName::from_static("peili-wait");

/// Carries a membership certificate, which says its own version.
pub(crate) const CERTIFICATE_HEADER: HeaderName = HeaderName::from_static("peili-certificate");

/// Longest text in it.
const CERTIFICATE_LIMIT: usize = certificate::LIMIT.div_ceil(3) * 4;

/// Most bytes of one response: the largest segment that the configuration allows.
pub(crate) const SEGMENT_LIMIT: u64 = 64 << 20;

/// Most bytes of a message's header, and most fields in it: about ten times what is needed.
pub(crate) const HEADER_LIMIT: usize = 8 << 10;
pub(crate) const HEADER_FIELDS: usize = 32;

const CONTENT_PATH: &str = "/v1/content/";

/// Path of some content.
pub(crate) fn content_path(digest: &Digest) -> String {
    format!("{CONTENT_PATH}{digest}")
}

/// The digest that a path asks for.
pub(crate) fn parse_content_path(path: &str) -> Option<Digest> {
    path.strip_prefix(CONTENT_PATH)?.parse().ok()
}

/// The text of a membership certificate.
pub(crate) fn certificate(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// What the header for it has; empty: it is not there, or cannot be read.
pub(crate) fn parse_certificate(headers: &HeaderMap) -> Vec<u8> {
    let value = headers.get(CERTIFICATE_HEADER).map(HeaderValue::as_bytes);
    let value = value.filter(|value| value.len() <= CERTIFICATE_LIMIT);
    value.and_then(|value| STANDARD.decode(value).ok()).unwrap_or_default()
}

/// `Content-Range` of an answer without bytes.
pub(crate) fn empty_range(size: u64) -> String {
    format!("bytes */{size}")
}

/// The size in a `Content-Range` as [`empty_range`] writes it.
pub(crate) fn parse_empty_range(headers: &HeaderMap) -> Option<u64> {
    let size = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes */")?;
    size.bytes().all(|c| c.is_ascii_digit()).then(|| size.parse().ok())?
}

/// The range and the whole size in `Content-Range`.
pub(crate) fn parse_range(headers: &HeaderMap) -> Option<(ByteRange, u64)> {
    ByteRange::parse_content_range(headers.get(CONTENT_RANGE)?.to_str().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_round_trip() {
        let digest = Digest::sha256(b"a");
        assert_eq!(parse_content_path(&content_path(&digest)), Some(digest));
        for path in ["/", "/v1/content/", "/v1/content/sha256:abc", "/v2/content/x", "/v1/content/../a"] {
            assert_eq!(parse_content_path(path), None, "{path}");
        }
    }

    #[test]
    fn empty_ranges_round_trip() {
        let check = |value: &str, size| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, value.parse().unwrap());
            assert_eq!(parse_empty_range(&headers), size, "{value}");
        };
        check(&empty_range(0), Some(0));
        check(&empty_range(7), Some(7));
        check("bytes */+7", None);
        check("bytes */", None);
        check("bytes 0-1/2", None);
    }
}
