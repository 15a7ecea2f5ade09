//! An HTTP client that reaches a host as it is configured.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Client, Identity, Url};

use super::{Error, Host, is_loopback, read};

/// Go's default for dialling registries, which containerd uses.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

impl Host {
    /// A client for this host, with its certificates, headers and connect limit, and the system's authorities. It obeys
    /// `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, but never on loopback. No limit for a whole request is set.
    ///
    /// Reads files and blocks.
    pub fn client(&self) -> Result<Client, Error> {
        install_provider();
        let fail = |message: String| Error::Client { url: self.url.clone(), message };
        let url = Url::parse(&self.url).map_err(|error| fail(error.to_string()))?;
        let mut authorities = Vec::new();
        for path in &self.ca {
            let found = Certificate::from_pem_bundle(&required(path)?)
                .map_err(|error| fail(format!("{}: {}", path.display(), chain(&error))))?;
            if found.is_empty() {
                return Err(fail(format!("{} has no certificate", path.display())));
            }
            authorities.extend(found);
        }
        let identity = match self.client.first() {
            Some((certificate, key)) => {
                let mut pem = required(certificate)?;
                if let Some(key) = key {
                    pem.push(b'\n');
                    pem.extend(required(key)?);
                }
                let identity = Identity::from_pem(&pem)
                    .map_err(|error| fail(format!("{}: {}", certificate.display(), chain(&error))))?;
                Some(identity)
            }
            None => None,
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let parsed = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
            // The value may be a secret.
            let (name, value) = parsed.ok_or_else(|| fail(format!("header `{name}` is not valid")))?;
            headers.append(name, value);
        }

        let builder = |system: bool| {
            let mut builder = Client::builder()
                .user_agent(concat!("peili/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(self.dial_timeout.unwrap_or(DIAL_TIMEOUT))
                .default_headers(headers.clone())
                .tls_danger_accept_invalid_certs(self.skip_verify);
            builder = if system {
                builder.tls_certs_merge(authorities.clone())
            } else {
                builder.tls_certs_only(authorities.clone())
            };
            if let Some(identity) = &identity {
                builder = builder.identity(identity.clone());
            }
            // Go's rule: loopback is never asked through a proxy.
            if url.host_str().is_some_and(is_loopback) {
                builder = builder.no_proxy();
            }
            builder.build()
        };
        match builder(true) {
            Ok(client) => Ok(client),
            // A container without authorities can still speak plain HTTP.
            Err(_) if url.scheme() == "http" => builder(false).map_err(|error| fail(chain(&error))),
            Err(error) => Err(fail(chain(&error))),
        }
    }
}

/// rustls wants one implementation of cryptography for the process; whoever is first installs it.
fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error means that there is one already.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    });
}

fn required(path: &Path) -> Result<Vec<u8>, Error> {
    read(path)?
        .ok_or_else(|| Error::Read { path: path.to_owned(), source: std::io::ErrorKind::NotFound.into() })
}

/// An error with its causes: reqwest's own text says "builder error" only.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
