//! Who proves at the peer port that it is a member, and who does not.

use std::path::PathBuf;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::super::tls::{Tls, server_name};
use super::*;
use crate::network;
use crate::network::admission::Admission;
use crate::oci::{Gate as _, Members, PeerId};
use crate::trust::{self, PinnedTrust};

/// A node with the real gate.
struct Member {
    identity: Identity,
    trust: Arc<PinnedTrust>,
    admission: Admission,
}

/// Its peer port.
struct Port {
    contents: Arc<Contents>,
    metrics: Metrics,
    server: ServerHandle,
    peer: Peer,
}

/// A key file for each byte.
fn key(folder: &tempfile::TempDir, byte: u8) -> PathBuf {
    let path = folder.path().join(byte.to_string());
    std::fs::write(&path, [byte; 32]).unwrap();
    path
}

fn config(keys: &[&PathBuf]) -> network::Config {
    let cluster_key = keys.iter().copied().cloned().collect();
    network::Config { cluster_key, ..network::Config::default() }
}

impl Member {
    fn new(keys: &[&PathBuf]) -> Self {
        Self::certified(keys, None)
    }

    /// With a certificate that was made for another one, if that is given.
    fn certified(keys: &[&PathBuf], other: Option<&PeerId>) -> Self {
        let identity = Identity::generate();
        let peers = trust::Peers { by_key: true, ..trust::Peers::default() };
        let trust = Arc::new(PinnedTrust::new(trust::Config::default(), peers).unwrap());
        let members = Arc::clone(&trust) as Arc<dyn Members>;
        let peer = other.unwrap_or(identity.peer_id()).clone();
        let admission = Admission::new(peer, &config(keys), members, network::metrics::Metrics::default());
        Self { identity, trust, admission }
    }

    fn client(&self) -> Client {
        Client::presenting(self.admission.clone(), &self.identity, Metrics::default()).unwrap()
    }

    async fn serve(&self) -> Port {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (contents, metrics) = (Arc::new(Contents::default()), Metrics::default());
        let access = Access { gate: Arc::clone(&self.trust) as _, admission: self.admission.clone() };
        let source = Arc::clone(&contents) as _;
        let config = Config::default();
        let server = Server::spawn(vec![listener], &self.identity, &config, access, source, metrics.clone());
        let server = server.unwrap();
        let transfer = server.addresses().to_vec();
        let peer = Peer { transfer, ..Fixture::peer(self.identity.peer_id().clone()) };
        Port { contents, metrics, server, peer }
    }

    fn proof(&self, other: &Self) -> String {
        self.trust.proof(other.identity.peer_id()).to_string()
    }
}

/// The first request of a node of which the holder has not heard.
#[tokio::test]
async fn a_newcomer_proves_itself_by_its_first_request() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (key(&folder, 1), key(&folder, 2));
    let (holder, newcomer) = (Member::new(&[&first, &second]), Member::new(&[&first]));
    let port = holder.serve().await;
    let held = port.contents.insert(vec![1; 1000], OCTET_STREAM);
    let client = newcomer.client();
    for _ in 0..2 {
        assert_eq!(read(&client, &port.peer, &held.digest, 1000).await.unwrap(), 1000);
    }
    let before = holder.proof(&newcomer);
    assert!(before.starts_with("key ") && port.metrics.accepted() == 1);
    // A new certificate goes over the connection that there is.
    assert!(newcomer.admission.reconfigure(&config(&[&second])));
    assert_eq!(read(&client, &port.peer, &held.digest, 1000).await.unwrap(), 1000);
    assert_ne!(holder.proof(&newcomer), before);
    assert_eq!(port.metrics.accepted(), 1);
}

/// Guards the proof at the peer port: who is no member is not answered.
#[tokio::test]
async fn who_is_no_member_gets_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (key(&folder, 1), key(&folder, 2));
    let (holder, member) = (Member::new(&[&first]), Member::new(&[&first]));
    let port = holder.serve().await;
    let held = port.contents.insert(vec![1; 1000], OCTET_STREAM);
    let other_key = Member::new(&[&second]);
    let replays = Member::certified(&[&first], Some(member.identity.peer_id()));
    for (what, client) in
        [("no certificate", client()), ("another key", other_key.client()), ("a replay", replays.client())]
    {
        let refused = read(&client, &port.peer, &held.digest, 1000).await;
        assert!(matches!(refused, Err(FetchError::Unreachable(_))), "{what}: {refused:?}");
    }
    assert_eq!(holder.proof(&replays) + &holder.proof(&other_key), "");
    until("they are counted", || port.metrics.ended(Handshake::Denied) >= 3).await;
    assert_eq!((port.metrics.accepted(), port.metrics.upload_bytes.get()), (0, 0));
    assert_eq!(read(&member.client(), &port.peer, &held.digest, 1000).await.unwrap(), 1000);
}

/// Guards `PROOF_LIMIT`, and that who proves nothing takes no member's place.
#[tokio::test]
async fn who_asks_nothing_is_closed_soon_and_takes_no_place() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Member::new(&[&key(&folder, 1)]);
    let port = holder.serve().await;
    let config = Tls::new(&Identity::generate()).unwrap().client(&port.peer.id).unwrap();
    let since = Instant::now();
    let stream = TcpStream::connect(port.peer.transfer[0]).await.unwrap();
    let mut stream = TlsConnector::from(config).connect(server_name(), stream).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((port.metrics.connections.get(), port.metrics.accepted()), (0, 0));
    let mut answer = Vec::new();
    // In order or by a reset.
    let _ = timeout(Duration::from_secs(6), stream.read_to_end(&mut answer)).await.expect("it is closed");
    assert!(answer.is_empty() && since.elapsed() > Duration::from_secs(1), "{:?}", since.elapsed());
    until("it is counted", || port.metrics.ended(Handshake::Denied) == 1).await;
}

/// Guards that an upload ends with what admitted its peer.
#[tokio::test]
async fn an_upload_ends_with_the_membership() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (key(&folder, 1), key(&folder, 2));
    let (holder, member) = (Member::new(&[&first]), Member::new(&[&first]));
    let port = holder.serve().await;
    let held = port.contents.insert(vec![1; 48 << 20], OCTET_STREAM);
    let client = member.client();
    let mut segment = client.fetch(&port.peer, &held.digest, 0, held.size, LIMIT).await.unwrap();
    assert!(segment.body.next().await.unwrap().is_ok());
    assert!(holder.admission.reconfigure(&config(&[&second])));
    port.server.rechecker()();
    let rest = timeout(LIMIT, segment.body.try_for_each(|_| async { Ok(()) })).await.unwrap();
    assert!(rest.is_err());
    assert!(matches!(read(&client, &port.peer, &held.digest, 1).await, Err(FetchError::Unreachable(_))));
}
