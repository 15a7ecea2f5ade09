//! Names for what goes wrong: from an error of the transport, and from an answer that is a refusal.

use std::error::Error;
use std::io::{self, ErrorKind};

use http::{StatusCode, Uri};
use rustix::io::Errno;
use serde_json::Value;

use super::{Cause, Fault};

/// What an error of the transport is.
pub(super) fn classify(address: &Uri, error: &(dyn Error + 'static)) -> Fault {
    let mut chain = vec![error];
    let mut next = error.source();
    while let Some(error) = next {
        chain.push(error);
        next = error.source();
    }
    let mut cause = None;
    for error in &chain {
        if let Some(found) = cause_of(*error) {
            cause = Some(found);
        }
    }
    let texts: Vec<String> = chain.iter().map(ToString::to_string).collect();
    let is_resolution = texts.iter().any(|text| text.starts_with("dns error"));
    let cause = if is_resolution { Cause::Unresolved } else { cause.unwrap_or(Cause::NoAnswer) };
    // The innermost words say most.
    let text = texts.last().cloned().unwrap_or_default();
    let authority = address.authority().map(http::uri::Authority::as_str).unwrap_or_default();
    Fault::new(cause, format!("{authority}: {text}"))
}

fn cause_of(error: &(dyn Error + 'static)) -> Option<Cause> {
    if error.downcast_ref::<kube::client::AuthError>().is_some() {
        return Some(Cause::NoCredentials);
    }
    if error.is::<rustls::Error>() {
        return Some(Cause::Tls);
    }
    let mut error = error.downcast_ref::<io::Error>()?;
    // One in another has no source of its own.
    while let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<io::Error>()) {
        error = inner;
    }
    // TLS wraps its errors so.
    if error.get_ref().is_some_and(<dyn Error + Send + Sync>::is::<rustls::Error>) {
        return Some(Cause::Tls);
    }
    if error.raw_os_error().is_some_and(|code| UNROUTABLE.contains(&code)) {
        return Some(Cause::Unroutable);
    }
    Some(match error.kind() {
        ErrorKind::ConnectionRefused => Cause::Refused,
        ErrorKind::TimedOut => Cause::Timeout,
        _ => Cause::NoAnswer,
    })
}

/// What `connect` says where routes or ICMP lead nowhere; `truth` has how each comes about. A route that is a black hole is EINVAL, one
/// that prohibits EACCES, a policy in the kernel EPERM, and ICMP's "protocol unreachable" ENOPROTOOPT.
const UNROUTABLE: [i32; 9] = [
    Errno::HOSTUNREACH.raw_os_error(),
    Errno::NETUNREACH.raw_os_error(),
    Errno::HOSTDOWN.raw_os_error(),
    Errno::NETDOWN.raw_os_error(),
    Errno::ADDRNOTAVAIL.raw_os_error(),
    Errno::ACCESS.raw_os_error(),
    Errno::PERM.raw_os_error(),
    Errno::INVAL.raw_os_error(),
    Errno::NOPROTOOPT.raw_os_error(),
];

/// What an answer that is a refusal is.
pub(super) fn refusal(status: StatusCode, body: &Value) -> Fault {
    let message = body["message"].as_str().unwrap_or("no message");
    let is_terminating = body["details"]["causes"]
        .as_array()
        .is_some_and(|causes| causes.iter().any(|cause| cause["reason"] == "NamespaceTerminating"));
    let is_status = body["kind"] == "Status";
    let cause = match status.as_u16() {
        401 => Cause::Unauthorized,
        403 if is_terminating => Cause::NoNamespace,
        403 if message.contains("exceeded quota") || message.contains("admission webhook") => Cause::Rejected,
        403 => Cause::Forbidden,
        404 if body["details"]["kind"] == "namespaces" => Cause::NoNamespace,
        404 if is_status => Cause::NoObject,
        429 => Cause::Throttled,
        500..=599 => Cause::Server,
        400..=499 if is_status => Cause::Rejected,
        _ => Cause::Malformed,
    };
    Fault::new(cause, format!("{}: {message}", status.as_u16()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_in_errors_are_found() {
        let address = Uri::from_static("https://a:1");
        let cause = |error: io::Error| classify(&address, &error).cause;
        let tls = || io::Error::new(ErrorKind::InvalidData, rustls::Error::DecryptError);
        assert_eq!(cause(tls()), Cause::Tls);
        assert_eq!(cause(io::Error::other(tls())), Cause::Tls);
        assert_eq!(cause(io::Error::other(io::Error::from(ErrorKind::ConnectionRefused))), Cause::Refused);
        assert_eq!(cause(ErrorKind::ConnectionReset.into()), Cause::NoAnswer);
        for errno in [Errno::INVAL, Errno::ACCESS, Errno::NOPROTOOPT, Errno::HOSTUNREACH] {
            assert_eq!(cause(io::Error::other(io::Error::from(errno))), Cause::Unroutable, "{errno}");
        }
        assert_eq!(cause(ErrorKind::InvalidInput.into()), Cause::NoAnswer, "no word of the kernel");
    }

    #[test]
    fn refusals_have_names() {
        let status = |code: u16, body: Value| refusal(StatusCode::from_u16(code).unwrap(), &body).cause;
        let said = |message: &str| json!({"kind": "Status", "message": message});
        assert_eq!(status(401, said("Unauthorized")), Cause::Unauthorized);
        assert_eq!(status(403, said("leases is forbidden: User")), Cause::Forbidden);
        assert_eq!(status(403, said("forbidden: exceeded quota: q")), Cause::Rejected);
        let terminating =
            json!({"kind": "Status", "details": {"causes": [{"reason": "NamespaceTerminating"}]}});
        assert_eq!(status(403, terminating), Cause::NoNamespace);
        assert_eq!(
            status(404, json!({"kind": "Status", "details": {"kind": "namespaces"}})),
            Cause::NoNamespace
        );
        assert_eq!(status(404, Value::Null), Cause::Malformed, "a proxy");
        assert_eq!(status(422, said("invalid")), Cause::Rejected);
        assert_eq!(status(429, said("slow")), Cause::Throttled);
        assert_eq!(status(500, said("failed calling webhook")), Cause::Server);
        assert_eq!(status(302, Value::Null), Cause::Malformed);
    }
}
