//! TLS between peers: 1.3 only, ALPN names of our own, both sides prove their libp2p identity, and the client pins the server's.
//!
//! Sessions are never resumed and there is no early data: a resumed session would skip the certificate, and with it
//! the pin. No date counts here but the one in the certificate, which libp2p-tls sets to the years 1975 to 4096.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::ring::cipher_suite;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme,
};

use super::wire;
use crate::network::identity::{self, Identity, peer_of_certificate};
use crate::oci::PeerId;

/// Name that rustls wants of a server; it is not sent, and the pin decides.
const SERVER_NAME: &str = "peer.invalid";

/// The node's side of all its connections.
#[derive(Clone)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    key: Arc<SingleCertAndKey>,
    server: Arc<ServerConfig>,
}

/// The node cannot prove its identity.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS between peers: {0}")]
pub struct TlsError(String);

/// Another peer than the pinned one answered.
#[derive(Debug, thiserror::Error)]
#[error("expected {expected}, but {proved} answered")]
struct WrongPeer {
    expected: PeerId,
    proved: PeerId,
}

/// A certificate or signature that proves nothing.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Unproved(#[from] identity::CertificateError);

/// Accepts the certificate of `expected`, or of any peer if there is none.
#[derive(Debug)]
struct Verifier {
    expected: Option<PeerId>,
}

impl Tls {
    /// Makes a certificate for `identity`, good for the life of the process.
    pub(crate) fn new(identity: &Identity) -> Result<Self, TlsError> {
        let provider = Arc::new(provider());
        let (certificate, key) = identity.certificate().map_err(|error| TlsError(error.to_string()))?;
        let failed = |error: rustls::Error| TlsError(error.to_string());
        // Not `from_der`: it refuses the critical extension that makes this a certificate of libp2p.
        let key = provider.key_provider.load_private_key(key).map_err(failed)?;
        let key = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(Arc::new(Verifier { expected: None }))
            .with_cert_resolver(Arc::clone(&key) as _);
        server.alpn_protocols = wire::alpn();
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        // Without AES instructions AES is several times dearer than ChaCha20, so one slow side decides.
        server.ignore_client_order = !has_aes();
        Ok(Self { provider, key, server: Arc::new(server) })
    }

    /// The configuration of the peer port.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// The configuration of a connection that must end at `peer`.
    pub(crate) fn client(&self, peer: &PeerId) -> Result<Arc<ClientConfig>, TlsError> {
        let verifier = Arc::new(Verifier { expected: Some(peer.clone()) });
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::clone(&self.key) as _);
        client.alpn_protocols = wire::alpn();
        client.resumption = rustls::client::Resumption::disabled();
        client.enable_early_data = false;
        client.enable_sni = false;
        Ok(Arc::new(client))
    }
}

/// The name to connect to.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a constant DNS name is valid")
}

/// The peer at the other end of a finished handshake. `None`: it proved no identity, or speaks another protocol.
pub(crate) fn proved_peer(connection: &rustls::CommonState) -> Option<PeerId> {
    if !wire::is_spoken(connection.alpn_protocol()) {
        return None;
    }
    peer_of_certificate(connection.peer_certificates()?.first()?).ok()
}

/// Records are sealed by ring: it uses the wide AES instructions (VAES) of CPUs without AVX-512 too, which aws-lc does not.
/// docs/benchmarks.md has what that is worth.
fn provider() -> CryptoProvider {
    let aes = cipher_suite::TLS13_AES_128_GCM_SHA256;
    let chacha = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
    CryptoProvider {
        cipher_suites: if has_aes() { vec![aes, chacha] } else { vec![chacha, aes] },
        kx_groups: vec![kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Whether the CPU encrypts AES in hardware.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// Cannot happen while the configurations offer 1.3 only; refused all the same.
fn tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken between peers".into())
}

impl Verifier {
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        if !intermediates.is_empty() {
            // libp2p-tls: exactly one certificate.
            return Err(rustls::Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        let proved = peer_of_certificate(end_entity).map_err(|error| refused(Unproved(error)))?;
        match &self.expected {
            Some(expected) if *expected != proved => {
                Err(refused(WrongPeer { expected: expected.clone(), proved }))
            }
            _ => Ok(()),
        }
    }

    fn verify_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        identity::verify_handshake(certificate, signature.scheme, message, signature.signature())
            .map_err(|error| refused(Unproved(error)))?;
        Ok(HandshakeSignatureValid::assertion())
    }

    /// What libp2p-tls makes (P-256), and the other curves of its specification.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, ServerConnection};

    use super::*;

    /// Runs a handshake in memory until both sides are done or one refuses.
    fn handshake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
        let mut client = ClientConnection::new(client, server_name())?;
        let mut server = ServerConnection::new(server)?;
        for _ in 0..8 {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).expect("memory takes all");
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                server.read_tls(&mut rest).expect("memory gives all");
                server.process_new_packets()?;
            }
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).expect("memory takes all");
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest).expect("memory gives all");
                client.process_new_packets()?;
            }
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok((client, server))
    }

    fn node() -> (PeerId, Tls) {
        let identity = Identity::generate();
        (identity.peer_id().clone(), Tls::new(&identity).unwrap())
    }

    /// Shows the certificate of `victim`, but holds the key of another one.
    fn thief(victim: &Tls) -> Tls {
        let (_, mut tls) = node();
        let (own, stolen) = (certified(&tls), certified(victim));
        let key =
            Arc::new(SingleCertAndKey::from(CertifiedKey::new(stolen.cert.clone(), Arc::clone(&own.key))));
        let mut server = ServerConfig::clone(&tls.server);
        server.cert_resolver = Arc::clone(&key) as _;
        tls.server = Arc::new(server);
        tls.key = key;
        tls
    }

    fn certified(tls: &Tls) -> Arc<CertifiedKey> {
        rustls::client::ResolvesClientCert::resolve(&*tls.key, &[], &[]).unwrap()
    }

    #[test]
    fn both_sides_are_proved() {
        let ((a, client), (b, server)) = (node(), node());
        let (client, server) = handshake(client.client(&b).unwrap(), server.server()).unwrap();
        assert_eq!((proved_peer(&client), proved_peer(&server)), (Some(b), Some(a)));
        assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert_eq!(client.tls13_tickets_received(), 0, "nothing to resume by");
    }

    /// Guards the handshake signature: a certificate is public, its key is not.
    #[test]
    fn a_stolen_certificate_proves_nothing() {
        let ((_, honest), (b, victim)) = (node(), node());
        let error = handshake(honest.client(&b).unwrap(), thief(&victim).server()).err();
        assert!(
            error.is_some_and(|error| format!("{error:?}").contains("Unproved(Signature")),
            "as a server"
        );
        let error = handshake(thief(&victim).client(&b).unwrap(), victim.server()).err();
        assert!(
            error.is_some_and(|error| format!("{error:?}").contains("Unproved(Signature")),
            "as a client"
        );
    }

    /// Guards the pin.
    #[test]
    fn another_peer_is_refused() {
        let ((a, client), (_, server)) = (node(), node());
        let error = handshake(client.client(&a).unwrap(), server.server()).err();
        assert!(error.is_some_and(|error| format!("{error:?}").contains("WrongPeer")));
    }

    #[test]
    fn only_tls_1_3_is_spoken() {
        let ((_, client), (b, server)) = (node(), node());
        let old = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier { expected: Some(b) }))
            .with_client_cert_resolver(Arc::clone(&client.key) as _);
        assert!(handshake(Arc::new(old), server.server()).is_err());
    }
}
