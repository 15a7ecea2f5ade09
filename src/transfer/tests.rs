//! Peer ports and clients on real sockets of the loopback interface.

mod admission;
mod faults;

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use super::client::Client;
use super::conformance::{Dial, Fixture, UPLOADS};
use super::memory::{Contents, Memory};
use super::metrics::{Handshake, Metrics};
use super::server::{Access, Server, ServerHandle};
use super::stream::StallLimits;
use super::{Config, FetchError, Transfer};
use crate::network::Peer;
use crate::network::identity::Identity;
use crate::oci::{Digest, Level, OCTET_STREAM};

const LIMIT: Duration = Duration::from_secs(10);

/// A node with a peer port.
struct Node {
    identity: Identity,
    contents: Arc<Contents>,
    gate: Arc<Dial>,
    metrics: Metrics,
    server: ServerHandle,
}

impl Node {
    async fn start(config: Config) -> Self {
        let stall_limits =
            StallLimits { header: Duration::from_millis(300), write: Duration::from_millis(500) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (identity, metrics) = (Identity::generate(), Metrics::default());
        let (contents, gate) = (Arc::new(Contents::default()), Dial::new(Level::Tags));
        let server = Server::spawn_with(
            vec![listener],
            &identity,
            &config,
            Access::by(Arc::clone(&gate) as _),
            Arc::clone(&contents) as _,
            metrics.clone(),
            stall_limits,
        );
        Self { identity, contents, gate, metrics, server: server.unwrap() }
    }

    fn peer(&self) -> Peer {
        let transfer = self.server.addresses().to_vec();
        Peer { transfer, ..Fixture::peer(self.identity.peer_id().clone()) }
    }
}

fn client() -> Client {
    Client::new(&Identity::generate(), Metrics::default()).unwrap()
}

async fn read(client: &Client, peer: &Peer, digest: &Digest, length: u64) -> Result<usize, FetchError> {
    let segment = client.fetch(peer, digest, 0, length, LIMIT).await?;
    let chunks: Vec<_> = segment.body.try_collect().await.unwrap();
    Ok(chunks.iter().map(bytes::Bytes::len).sum())
}

/// Polls until `condition` holds.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn small() -> Config {
    Config { uploads: UPLOADS, uploads_per_peer: UPLOADS, queue: 0, ..Config::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_conform() {
    let node = Node::start(small()).await;
    let peer = node.peer();
    let Node { contents, gate, server, .. } = node;
    let recheck = Box::new(move || server.recheck());
    Fixture { transfer: Arc::new(client()), peer, contents, gate, recheck }.run().await;
}

#[tokio::test]
async fn memory_conforms() {
    let peer = Identity::generate().peer_id().clone();
    let (contents, gate) = (Arc::new(Contents::default()), Dial::new(Level::Tags));
    let memory = Memory::new(Identity::generate().peer_id().clone());
    memory.add(peer.clone(), Arc::clone(&contents) as _, Arc::clone(&gate) as _, UPLOADS as usize);
    let recheck = Box::new(|| {});
    Fixture { transfer: Arc::new(memory), peer: Fixture::peer(peer), contents, gate, recheck }.run().await;
}

/// A level that falls closes the connection under a running upload.
#[tokio::test]
async fn a_changed_level_ends_a_running_upload() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 48 << 20], OCTET_STREAM);
    let client = client();
    let mut segment = client.fetch(&node.peer(), &held.digest, 0, held.size, LIMIT).await.unwrap();
    assert!(segment.body.next().await.unwrap().is_ok());
    node.gate.turn(Level::None);
    node.server.recheck();
    let rest = timeout(LIMIT, segment.body.try_for_each(|_| async { Ok(()) })).await.unwrap();
    assert!(rest.is_err());
    assert!(matches!(read(&client, &node.peer(), &held.digest, 1).await, Err(FetchError::Unreachable(_))));
    until("the entry is gone", || node.metrics.connections.get() == 0).await;
}

/// Guards the gate at the peer port: who has no level does not even get to ask.
#[tokio::test]
async fn a_peer_without_a_level_is_not_connected() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    node.gate.turn(Level::None);
    let refused = read(&client(), &node.peer(), &held.digest, 10).await;
    assert!(matches!(refused, Err(FetchError::Unreachable(_))), "{refused:?}");
    until("it is counted", || node.metrics.ended(Handshake::Denied) > 0).await;
    assert_eq!(node.metrics.accepted(), 0);
}

/// One peer with a hundred requests, another with one.
#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_not_behind_a_hundred() {
    let node = Node::start(Config { uploads: 1, uploads_per_peer: 1, ..Config::default() }).await;
    let held = node.contents.insert(vec![1; 8 << 20], OCTET_STREAM);
    let (greedy, peer) = (Arc::new(client()), node.peer());
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (greedy, peer) = (Arc::clone(&greedy), peer.clone());
        crowd.spawn(async move {
            loop {
                match read(&greedy, &peer, &held.digest, held.size).await {
                    Err(FetchError::Busy { .. }) => tokio::task::yield_now().await,
                    end => return end.unwrap(),
                }
            }
        });
    }
    until("there is a queue", || node.server.queued() > 10).await;
    let modest = client();
    let before = node.metrics.upload_bytes.get();
    assert_eq!(read(&modest, &peer, &held.digest, 100).await.unwrap(), 100);
    let others = (node.metrics.upload_bytes.get() - before) / held.size;
    assert!(others <= 8, "{others} segments of the other peer were served before");
}

/// What is left of a segment is drained, and its connection serves the next fetch.
#[tokio::test]
async fn a_dropped_segment_keeps_its_connection() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 8 << 20], OCTET_STREAM);
    let client = client();
    for _ in 0..5 {
        drop(client.fetch(&node.peer(), &held.digest, 0, held.size, LIMIT).await.unwrap());
        until("the connection is idle again", || client.idle(node.identity.peer_id()) == 1).await;
    }
    assert_eq!(node.metrics.connections.get(), 1);
    assert_eq!(node.metrics.accepted(), 1);
    until("uploads ended", || node.metrics.uploads.get() == 0).await;
}

/// A caller that is gone before the answer does not cost the connection either.
#[tokio::test]
async fn a_cancelled_fetch_keeps_its_connection() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 8 << 20], OCTET_STREAM);
    let (client, peer) = (client(), node.peer());
    assert!(read(&client, &peer, &held.digest, 1).await.is_ok());
    for _ in 0..5 {
        let fetch = client.fetch(&peer, &held.digest, 0, held.size, LIMIT);
        assert!(timeout(Duration::ZERO, fetch).await.is_err());
        until("the connection is idle again", || client.idle(node.identity.peer_id()) == 1).await;
    }
    assert_eq!(node.metrics.accepted(), 1);
}

/// Many requests at once neither shake hands all at once, nor count as failures of the peer while they wait for a
/// connection.
#[tokio::test]
async fn a_burst_dials_a_few_times_at_once() {
    const BURST: usize = 24;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let transfer = vec![silent.local_addr().unwrap()];
    let peer = Peer { transfer, ..Fixture::peer(Identity::generate().peer_id().clone()) };
    let (hung, digest) = (client(), Digest::sha256(b""));
    let fetches = (0..BURST).map(|_| hung.fetch(&peer, &digest, 0, 1, Duration::from_millis(300)));
    let fetches = futures::future::join_all(fetches);
    let mut held = Vec::new();
    // Until shortly before the fetches end: those that wait then may still begin to dial.
    let end = Instant::now() + Duration::from_millis(200);
    let count = async {
        while let Ok(accepted) = tokio::time::timeout_at(end, silent.accept()).await {
            held.push(accepted.unwrap());
        }
        held.len()
    };
    let (outcomes, dialed) = tokio::join!(fetches, count);
    assert!((1..=4).contains(&dialed), "{dialed} handshakes at once");
    let waited = outcomes.iter().filter(|outcome| matches!(outcome, Err(FetchError::Queued))).count();
    assert!(waited >= BURST / 2, "{waited} of {BURST} waited for a connection");

    // A peer that is well serves all of them by the connections that become free.
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 1000], OCTET_STREAM);
    let (client, peer) = (client(), node.peer());
    let reads = (0..BURST).map(|_| read(&client, &peer, &held.digest, 1000));
    for outcome in futures::future::join_all(reads).await {
        assert_eq!(outcome.unwrap(), 1000);
    }
    assert!(node.metrics.accepted() < BURST as u64, "no connection was used twice");
}

/// The server went away and came back: the pooled connection is dead, the fetch is not.
#[tokio::test]
async fn a_closed_pooled_connection_is_replaced() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 1000], OCTET_STREAM);
    let (client, peer) = (client(), node.peer());
    assert!(read(&client, &peer, &held.digest, 1000).await.is_ok());
    let address = node.server.addresses()[0];
    let Node { identity, contents, gate, server, metrics } = node;
    server.shutdown(LIMIT).await;
    let refused = read(&client, &peer, &held.digest, 1000).await;
    assert!(matches!(refused, Err(FetchError::Unreachable(_))), "{refused:?}");
    let listener = TcpListener::bind(address).await.unwrap();
    let config = Config::default();
    let _server =
        Server::spawn(vec![listener], &identity, &config, Access::by(gate), contents, metrics).unwrap();
    assert_eq!(read(&client, &peer, &held.digest, 1000).await.unwrap(), 1000);
}

/// Uploads that run may end; nothing new begins.
#[tokio::test]
async fn shutdown_drains() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 48 << 20], OCTET_STREAM);
    let (client, peer) = (client(), node.peer());
    let segment = client.fetch(&peer, &held.digest, 0, held.size, LIMIT).await.unwrap();
    let shutdown = tokio::spawn(node.server.shutdown(LIMIT));
    let chunks: Vec<_> = segment.body.try_collect().await.unwrap();
    assert_eq!(chunks.iter().map(bytes::Bytes::len).sum::<usize>(), 48 << 20);
    timeout(LIMIT, shutdown).await.unwrap().unwrap();
    assert!(matches!(read(&client, &peer, &held.digest, 1).await, Err(FetchError::Unreachable(_))));
}

/// An upload that does not end is cut at the limit.
#[tokio::test]
async fn shutdown_is_bounded() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 48 << 20], OCTET_STREAM);
    let client = client();
    let segment = client.fetch(&node.peer(), &held.digest, 0, held.size, LIMIT).await.unwrap();
    timeout(LIMIT, node.server.shutdown(Duration::from_millis(50))).await.unwrap();
    assert!(segment.body.try_for_each(|_| async { Ok(()) }).await.is_err());
}

#[tokio::test]
async fn uploads_keep_to_the_rate() {
    let config = Config { upload_rate: bytesize::ByteSize::mib(8), ..Config::default() };
    let node = Node::start(config).await;
    let held = node.contents.insert(vec![1; 4 << 20], OCTET_STREAM);
    let start = Instant::now();
    assert_eq!(read(&client(), &node.peer(), &held.digest, held.size).await.unwrap(), 4 << 20);
    // The last tenth of a second's bytes go out at once.
    assert!(start.elapsed() >= Duration::from_millis(390), "{:?}", start.elapsed());
}
