//! What the mounted credentials say of themselves, read here and sent nowhere. The token's signature is the API server's to check, and its
//! text is never shown.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use super::Config;
use super::api::CREDENTIAL;

/// A service account's token and what is mounted beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The token's file.
    pub token: PathBuf,
    /// Why it cannot be read.
    pub unread: Option<String>,
    /// The authority's file.
    pub authority: PathBuf,
    /// Why it cannot be read.
    pub untrusted: Option<String>,
    /// When the token was issued, by the server's clock; `None`: it does not say.
    pub issued: Option<SystemTime>,
    /// When the token was written, by this node's clock.
    pub written: Option<SystemTime>,
    /// Its end; `None`: it does not say.
    pub expires: Option<SystemTime>,
    /// For whom it is.
    pub audiences: Vec<String>,
    /// Who issued it; empty: it does not say.
    pub issuer: String,
    /// Whose it is: `system:serviceaccount:NAMESPACE:NAME`; empty: it does not say.
    pub subject: String,
}

/// The claims of a JWT (RFC 7519) that matter here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Claims {
    iat: Option<f64>,
    exp: Option<f64>,
    aud: Audience,
    iss: String,
    sub: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    Many(Vec<String>),
    One(String),
}

impl Default for Audience {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Account {
    /// Namespace and name of the service account; `None`: it is none, or the token does not say.
    pub fn names(&self) -> Option<(&str, &str)> {
        self.subject.strip_prefix("system:serviceaccount:")?.split_once(':')
    }
}

/// Reads the files of the credentials. Blocks on them.
pub fn account(config: &Config) -> Account {
    let (token, authority) = (config.credentials.join("token"), config.credentials.join("ca.crt"));
    let untrusted = match read(&authority) {
        Ok(bytes) if roots(&bytes).is_none() => Some("there is no certificate in it".to_owned()),
        read => read.err().map(|error| error.to_string()),
    };
    let (text, unread) = match read(&token) {
        Ok(bytes) if bytes.trim_ascii().is_empty() => (Vec::new(), Some("it is empty".to_owned())),
        Ok(bytes) => (bytes, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let claims = claims(&text).unwrap_or_default();
    let audiences = match claims.aud {
        Audience::Many(all) => all,
        Audience::One(one) => vec![one],
    };
    // kubelet writes the files anew when one of them is another.
    let written = std::fs::metadata(&token).and_then(|metadata| metadata.modified()).ok();
    Account {
        written,
        token,
        unread,
        authority,
        untrusted,
        issued: claims.iat.and_then(time),
        expires: claims.exp.and_then(time),
        audiences,
        issuer: claims.iss,
        subject: claims.sub,
    }
}

/// The certificates in a file of them; `None`: there are none.
pub(super) fn roots(pem: &[u8]) -> Option<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    (!roots.is_empty()).then(|| Arc::new(roots))
}

/// A file of the credentials.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe would not end.
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > CREDENTIAL {
        return Err(io::Error::other("no regular file of at most 1 MiB"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(CREDENTIAL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `None`: it is no JWT, which a token need not be.
fn claims(token: &[u8]) -> Option<Claims> {
    let payload = token.trim_ascii().split(|byte| *byte == b'.').nth(1)?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}

/// Seconds since 1970, as far as a clock can show them.
fn time(seconds: f64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_whose_it_is_and_until_when() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { credentials: folder.path().to_owned(), ..Config::default() };
        let none = account(&config);
        assert!(none.unread.is_some() && none.untrusted.is_some() && none.issued.is_none());
        let write = |text: &str| std::fs::write(folder.path().join("token"), text).unwrap();
        let token = |claims: &str| format!("e30.{}.c2ln\n", URL_SAFE_NO_PAD.encode(claims));
        write(&token(r#"{"iat":100,"exp":700.5,"aud":"api","iss":"i","sub":"system:serviceaccount:a:b"}"#));
        let one = account(&config);
        assert_eq!((one.unread.as_ref(), one.names()), (None, Some(("a", "b"))));
        assert_eq!((one.issued, one.audiences), (time(100.0), vec!["api".to_owned()]));
        assert_eq!(one.expires, time(700.5));
        write(&token(r#"{"aud":["a","b"],"exp":1e300}"#));
        let many = account(&config);
        assert_eq!((many.audiences.len(), many.expires, many.names()), (2, None, None));
        // What is no JWT may be a token all the same.
        for opaque in ["abcdef.0123456789abcdef", "x", "a.e30"] {
            write(opaque);
            assert_eq!(account(&config).unread, None, "{opaque}");
        }
        write(" \n");
        assert!(account(&config).unread.is_some());
    }
}
