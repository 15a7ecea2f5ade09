//! How far it is to each address of the API server: the name, the TCP connection, the TLS handshake. For diagnosis. Nothing is asked, and
//! no token is shown.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use http::Uri;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::classify::classify;
use super::{Cause, Config, Origin, account};

/// For a name, for a connection and for a handshake, each: a SYN is sent again after a second, and all three together leave time to ask.
const STEP: Duration = Duration::from_millis(1_500);
/// Ports of a control plane's host that tell whether the host itself answers: the kubelet's, and one where nobody listens.
const BESIDE: [u16; 2] = [10_250, 1];
/// Addresses of a name that are tried.
const ADDRESSES: usize = 8;
/// Characters of what a certificate says.
const TEXT: usize = 200;
/// Names of a certificate that are shown.
const NAMES: usize = 12;

/// One address, and how far it is to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// What names it.
    pub origin: Origin,
    /// `HOST:PORT`.
    pub address: String,
    /// It as it is asked.
    pub uri: Uri,
    /// Why there is no connection; `None`: there is one.
    pub obstacle: Option<Obstacle>,
    /// Where there is no connection in time: another port of the same host did answer.
    pub host_answers: bool,
    /// What became of the handshake; `None`: there is no connection, or no authority to check it by.
    pub handshake: Option<Handshake>,
}

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The name has no address: why.
    Unresolved(String),
    /// Silence.
    Timeout,
    /// It was refused.
    Refused,
    /// There is no way: the kernel's words.
    Unroutable(String),
    /// The address is of IPv6 and this machine has no such address, or the other way round.
    Family,
    /// Something else: the kernel's words.
    Other(String),
}

/// What became of a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// The certificate is the cluster's, and for this address.
    Trusted,
    /// Silence.
    Silent,
    /// By another authority: its name.
    Issuer(String),
    /// For other names.
    Name(Vec<String>),
    /// Not valid any more at this time of day: the library's words.
    Time(String),
    /// Not valid yet, likewise.
    Early(String),
    /// Something else: the library's words.
    Broken(String),
}

impl Reach {
    /// Whether requests can be sent.
    pub fn is_open(&self) -> bool {
        self.handshake == Some(Handshake::Trusted)
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unresolved(text) => write!(f, "the name has no address: {text}"),
            Self::Timeout => write!(f, "no answer within {:.1} s", STEP.as_secs_f32()),
            Self::Refused => f.write_str("connection refused"),
            Self::Family => f.write_str("this machine has no address of its family"),
            Self::Unroutable(text) | Self::Other(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Trusted => f.write_str("trusted"),
            Self::Silent => {
                write!(f, "a connection, and no answer to TLS within {:.1} s", STEP.as_secs_f32())
            }
            Self::Issuer(issuer) => {
                write!(f, "its certificate is by `{issuer}`, which is not the authority of ca.crt")
            }
            Self::Name(names) => write!(f, "its certificate is for {}", names.join(", ")),
            Self::Time(text) | Self::Early(text) => {
                write!(f, "its certificate does not count at this time of day: {text}")
            }
            Self::Broken(text) => write!(f, "no TLS: {text}"),
        }
    }
}

/// Tries all addresses at once. Takes three times [`STEP`] at most.
pub async fn reach(config: &Config) -> Vec<Reach> {
    let path = config.credentials.join("ca.crt");
    let read = tokio::task::spawn_blocking(move || account::roots(&account::read(&path).ok()?));
    let authority = read.await.ok().flatten();
    let authority = authority.as_ref();
    join_all(config.places().into_iter().map(|(origin, uri)| try_one(origin, uri, authority))).await
}

async fn try_one(origin: Origin, uri: Uri, authority: Option<&Arc<RootCertStore>>) -> Reach {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(443);
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let mut reach = Reach { origin, address, uri, obstacle: None, host_answers: false, handshake: None };
    let resolved = match timeout(STEP, lookup_host((host.as_str(), port))).await {
        Ok(Ok(all)) => Some(all.take(ADDRESSES).collect::<Vec<_>>())
            .filter(|all| !all.is_empty())
            .ok_or_else(|| "none".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("not resolved within {STEP:?}")),
    };
    let targets = match resolved {
        Ok(targets) => targets,
        Err(text) => {
            reach.obstacle = Some(Obstacle::Unresolved(text));
            return reach;
        }
    };
    let (target, connected) = connect(&targets).await;
    match connected {
        Ok(Ok(stream)) => {
            if let (Some(roots), Ok(name)) = (authority, ServerName::try_from(host)) {
                reach.handshake = Some(shake(stream, name, Arc::clone(roots)).await);
            }
        }
        Ok(Err(error)) => reach.obstacle = Some(obstacle(&reach.uri, target, &error)),
        Err(_) => {
            reach.obstacle = Some(Obstacle::Timeout);
            // Behind the Service's address is no host.
            reach.host_answers = origin == Origin::Endpoint && answers(target).await;
        }
    }
    reach
}

/// To the first of these addresses that takes a connection, as whoever asks the API server does; if none does, what became of the first.
async fn connect(targets: &[SocketAddr]) -> (SocketAddr, Result<io::Result<TcpStream>, Elapsed>) {
    let mut tries: FuturesUnordered<_> = targets
        .iter()
        .enumerate()
        .map(|(rank, target)| async move { (rank, timeout(STEP, TcpStream::connect(*target)).await) })
        .collect();
    let mut first = None;
    while let Some((rank, tried)) = tries.next().await {
        if matches!(tried, Ok(Ok(_))) {
            return (targets[rank], tried);
        }
        if rank == 0 {
            first = Some((targets[rank], tried));
        }
    }
    first.unwrap_or_else(|| {
        ((IpAddr::from([0; 4]), 0).into(), Ok(Err(io::ErrorKind::AddrNotAvailable.into())))
    })
}

fn obstacle(uri: &Uri, target: SocketAddr, error: &io::Error) -> Obstacle {
    let is_foreign = error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
        || error.kind() == io::ErrorKind::NetworkUnreachable && !has_family(target.ip());
    match classify(uri, error).cause {
        _ if is_foreign => Obstacle::Family,
        Cause::Refused => Obstacle::Refused,
        Cause::Timeout => Obstacle::Timeout,
        Cause::Unroutable => Obstacle::Unroutable(error.to_string()),
        _ => Obstacle::Other(error.to_string()),
    }
}

/// Whether this machine has an address of this family that others could reach.
fn has_family(wanted: IpAddr) -> bool {
    let (table, column) = match wanted {
        IpAddr::V4(_) => ("/proc/self/net/route", None),
        IpAddr::V6(_) => ("/proc/self/net/if_inet6", Some(3)),
    };
    // If nobody knows, nothing is claimed.
    let Ok(text) = std::fs::read_to_string(table) else { return true };
    match column {
        // A head, and a line for each route.
        None => text.lines().count() > 1,
        // Scope 00 is global; loopback's and links' own ones lead nowhere.
        Some(column) => text.lines().any(|line| line.split_whitespace().nth(column) == Some("00")),
    }
}

/// Whether the host behind an address answers at any other port, if only with a refusal.
async fn answers(target: SocketAddr) -> bool {
    let tries = BESIDE.iter().map(|port| async move {
        let tried = timeout(STEP, TcpStream::connect(SocketAddr::new(target.ip(), *port))).await;
        match tried {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
            Err(_) => false,
        }
    });
    join_all(tries).await.contains(&true)
}

async fn shake(stream: TcpStream, name: ServerName<'static>, roots: Arc<RootCertStore>) -> Handshake {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
    let verifier = match verifier {
        Ok(inner) => Arc::new(Watching { inner, seen: Mutex::default() }),
        Err(error) => return Handshake::Broken(error.to_string()),
    };
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let client = match client {
        Ok(client) => client
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
            .with_no_client_auth(),
        Err(error) => return Handshake::Broken(error.to_string()),
    };
    let connector = TlsConnector::from(Arc::new(client));
    match timeout(STEP, connector.connect(name, stream)).await {
        Ok(Ok(_)) => Handshake::Trusted,
        Ok(Err(error)) => {
            let seen = verifier.seen.lock().unwrap_or_else(PoisonError::into_inner).take();
            broken(&error, seen.as_deref())
        }
        Err(_) => Handshake::Silent,
    }
}

/// `seen`: the server's certificate.
fn broken(error: &io::Error, seen: Option<&[u8]>) -> Handshake {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let issuer = || {
        let parsed = seen.and_then(|der| x509_parser::parse_x509_certificate(der).ok());
        shown(&parsed.map(|(_, certificate)| certificate.issuer().to_string()).unwrap_or_default())
    };
    let Some(rustls::Error::InvalidCertificate(fault)) = inner else {
        return Handshake::Broken(shown(&error.to_string()));
    };
    match fault {
        // A signature that is wrong is what another authority of the same name looks like.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Handshake::Issuer(issuer()),
        CertificateError::NotValidForName => Handshake::Name(Vec::new()),
        CertificateError::NotValidForNameContext { presented, .. } => {
            Handshake::Name(presented.iter().take(NAMES).map(|name| shown(name)).collect())
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Handshake::Time(shown(&fault.to_string()))
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Handshake::Early(shown(&fault.to_string()))
        }
        _ => Handshake::Broken(shown(&fault.to_string())),
    }
}

/// What others have written, for people.
fn shown(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).take(TEXT).collect()
}

/// Checks as ever, and keeps the certificate, so that its issuer can be named where it does not count.
#[derive(Debug)]
struct Watching {
    inner: Arc<WebPkiServerVerifier>,
    seen: Mutex<Option<Vec<u8>>>,
}

impl ServerCertVerifier for Watching {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(end_entity.to_vec());
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
