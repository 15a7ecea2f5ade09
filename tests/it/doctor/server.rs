//! A server with a certificate that says and does what a test wants of it, where a real API server cannot be made to.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use peili_lab::scratch::Scratch;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Its certificate is over.
    Expired,
    /// It takes requests and answers none.
    Silent,
    /// It answers as a web server.
    Page,
    /// It refuses as a webhook of admission.
    Webhook,
    /// It changes Leases, as a webhook of admission, to what none may be.
    Spoils,
}

/// A running one. Dropped: gone.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) authority: String,
    _serving: AbortOnDropHandle<()>,
}

impl Server {
    pub(super) async fn start(manner: Manner) -> Self {
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = authority.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(authority, key);
        let mut params = CertificateParams::new([Ipv4Addr::LOCALHOST.to_string()]).unwrap();
        if manner == Manner::Expired {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &issuer).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let _ = serve(stream, manner).await;
                    }
                });
            }
        }));
        Self { address, authority: certificate, _serving: serving }
    }

    /// A folder with credentials for it.
    pub(super) fn credentials(&self, scratch: &Scratch) -> std::path::PathBuf {
        let folder = scratch.path().join("of-server");
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(Path::new(&folder).join(name), text).unwrap();
        write("ca.crt", &self.authority);
        write("token", "of nobody");
        write("namespace", "peili");
        folder
    }
}

async fn serve(
    mut stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    manner: Manner,
) -> std::io::Result<()> {
    let mut read = Vec::new();
    loop {
        let mut part = [0; 4_096];
        let length = stream.read(&mut part).await?;
        if length == 0 {
            return Ok(());
        }
        read.extend_from_slice(&part[..length]);
        let text = String::from_utf8_lossy(&read);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let head = head.to_ascii_lowercase();
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if body.len() < length.unwrap_or(0) || manner == Manner::Silent {
            continue;
        }
        let (kind, answer) = if let Manner::Webhook | Manner::Spoils = manner {
            let asked: Value = serde_json::from_str(body).unwrap_or_default();
            let mut response = match manner {
                Manner::Spoils => {
                    let patch =
                        json!([{"op": "add", "path": "/spec", "value": {"leaseDurationSeconds": -1}}]);
                    let patch = STANDARD.encode(patch.to_string());
                    json!({"allowed": true, "patchType": "JSONPatch", "patch": patch})
                }
                _ => json!({"allowed": false, "status": {"code": 403, "message": "locks are not wanted"}}),
            };
            response["uid"] = asked["request"]["uid"].clone();
            let review =
                json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
            ("application/json", review.to_string())
        } else {
            ("text/html", "<html>It works!</html>".to_owned())
        };
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", answer.len());
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(answer.as_bytes()).await?;
        read.clear();
    }
}
