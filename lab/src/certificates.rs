//! Certificates for an origin that speaks TLS: an authority, one for the origin and one for its clients, made anew each
//! time and gone with their folder.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::scratch::Scratch;

/// What both ends need. Dropped: gone.
#[derive(Debug)]
pub struct Certificates {
    pub(crate) server: Arc<ServerConfig>,
    scratch: Scratch,
}

impl Certificates {
    /// For an origin at this address; a client without its certificate is refused.
    pub fn new(address: IpAddr) -> Result<Self> {
        Self::make(address, true)
    }

    /// For an origin at this address that asks no client for a certificate.
    pub fn of_server(address: IpAddr) -> Result<Self> {
        Self::make(address, false)
    }

    fn make(address: IpAddr, asks_clients: bool) -> Result<Self> {
        let scratch = Scratch::new()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?;
        let issuer = Issuer::new(authority, key);
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone())?;
        let sign = |name: String, purpose| {
            let mut params = CertificateParams::new([name])?;
            params.extended_key_usages = vec![purpose];
            let key = KeyPair::generate()?;
            Ok::<_, rcgen::Error>((params.signed_by(&key, &issuer)?, key))
        };
        let (certified, server_key) = sign(address.to_string(), ExtendedKeyUsagePurpose::ServerAuth)?;
        let (client, client_key) = sign("client.test".into(), ExtendedKeyUsagePurpose::ClientAuth)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
        let server_key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
        let server = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let server = if asks_clients {
            server.with_client_cert_verifier(clients)
        } else {
            server.with_no_client_auth()
        };
        let server = server.with_single_cert(vec![certified.der().clone()], server_key)?;
        let write = |name: &str, text: String| {
            let path = scratch.path().join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("ca.crt", certificate.pem())?;
        write("client.cert", client.pem())?;
        write("client.key", client_key.serialize_pem())?;
        Ok(Self { server: Arc::new(server), scratch })
    }

    /// Its files: `ca.crt`, `client.cert` and `client.key`.
    pub fn files(&self) -> [PathBuf; 3] {
        ["ca.crt", "client.cert", "client.key"].map(|name| self.scratch.path().join(name))
    }

    /// Copies them into a folder, as Docker has them beside no `hosts.toml`.
    pub fn copy_to(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        for file in self.files() {
            fs::copy(&file, folder.join(file.file_name().context("a file has a name")?))?;
        }
        Ok(())
    }
}
