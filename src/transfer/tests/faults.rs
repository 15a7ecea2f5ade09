//! Peers that lie, hang, come without proof, or are somebody else.

use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::metrics::Handshake;
use super::super::tls::{Tls, server_name};
use super::super::wire;
use super::*;
use crate::oci::ByteRange;

type Stream = tokio_rustls::client::TlsStream<TcpStream>;

async fn connect(peer: &Peer, config: Arc<ClientConfig>) -> std::io::Result<Stream> {
    let stream = TcpStream::connect(peer.transfer[0]).await?;
    TlsConnector::from(config).connect(server_name(), stream).await
}

fn config(peer: &Peer) -> ClientConfig {
    let tls = Tls::new(&Identity::generate()).unwrap();
    Arc::unwrap_or_clone(tls.client(&peer.id).unwrap())
}

/// Sends a request and returns what comes until the end or an error.
async fn ask(
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    digest: &Digest,
) -> Vec<u8> {
    let request =
        format!("GET {} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", wire::content_path(digest));
    let mut answer = Vec::new();
    if stream.write_all(request.as_bytes()).await.is_ok() {
        let _ =
            timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the server ends the connection");
    }
    answer
}

/// A server with a valid identity that answers every request with `answer` and then ends the connection.
async fn liar(identity: &Identity, answer: &str, body: usize) -> (Peer, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let acceptor = TlsAcceptor::from(Tls::new(identity).unwrap().server());
    let transfer = vec![listener.local_addr().unwrap()];
    let peer = Peer { transfer, ..Fixture::peer(identity.peer_id().clone()) };
    let answer = answer.replace("{size}", &body.to_string()).into_bytes();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(&answer).await;
            let _ = stream.write_all(&vec![b'x'; body]).await;
            let _ = stream.shutdown().await;
        }
    });
    (peer, tasks)
}

/// Guards the pin in `Verifier::verify`.
#[tokio::test]
async fn another_identity_at_the_right_address() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let stranger = Peer {
        transfer: node.server.addresses().to_vec(),
        ..Fixture::peer(Identity::generate().peer_id().clone())
    };
    let outcome = client().fetch(&stranger, &held.digest, 0, 10, LIMIT).await.err();
    let Some(FetchError::Identity(text)) = outcome else { panic!("{outcome:?}") };
    assert!(text.contains(stranger.id.as_str()) && text.contains(node.identity.peer_id().as_str()), "{text}");
    // The next address is tried all the same.
    let mut both = node.peer();
    let other = Node::start(Config::default()).await;
    both.transfer.insert(0, other.server.addresses()[0]);
    assert_eq!(read(&client(), &both, &held.digest, 10).await.unwrap(), 10);
}

/// Guards the client certificate: without it no byte of HTTP is answered.
#[tokio::test]
async fn no_client_certificate() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let mut config = config(&node.peer());
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let answer = match connect(&node.peer(), Arc::new(config)).await {
        Ok(mut stream) => ask(&mut stream, &held.digest).await,
        Err(_) => Vec::new(),
    };
    assert_eq!(answer, b"");
    until("it is counted", || node.metrics.ended(Handshake::Failed) == 1).await;
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// Guards the ALPN check: a connection for the libp2p port, or without a protocol, is refused; our own is served.
#[tokio::test]
async fn only_the_peer_protocol_is_spoken() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    for protocols in [vec![b"libp2p".to_vec()], vec![b"h2".to_vec(), b"http/1.1".to_vec()], Vec::new()] {
        let mut config = config(&node.peer());
        config.alpn_protocols.clone_from(&protocols);
        let answer = match connect(&node.peer(), Arc::new(config)).await {
            Ok(mut stream) => ask(&mut stream, &held.digest).await,
            Err(_) => Vec::new(),
        };
        assert_eq!(answer, b"", "{protocols:?}");
    }
    let mut stream = connect(&node.peer(), Arc::new(config(&node.peer()))).await.unwrap();
    assert!(ask(&mut stream, &held.digest).await.starts_with(b"HTTP/1.1 206 "));
}

#[tokio::test]
async fn plain_tcp_gets_nothing() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let mut stream = TcpStream::connect(node.peer().transfer[0]).await.unwrap();
    let answer = ask(&mut stream, &held.digest).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

/// All that a good client sent, handshake and request, sent again: no answer.
#[tokio::test]
async fn a_recorded_connection_replayed_is_refused() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = Peer { transfer: vec![relay.local_addr().unwrap()], ..node.peer() };
    let upstream = node.peer().transfer[0];
    let recording = tokio::spawn(async move {
        let (stream, _) = relay.accept().await.unwrap();
        let (mut from_client, mut to_client) = stream.into_split();
        let (mut from_server, mut to_server) = TcpStream::connect(upstream).await.unwrap().into_split();
        let back = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        let (mut recorded, mut buffer) = (Vec::new(), vec![0; 4096]);
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            recorded.extend_from_slice(&buffer[..count]);
            to_server.write_all(&buffer[..count]).await.unwrap();
        }
        back.abort();
        recorded
    });
    let client = client();
    assert_eq!(read(&client, &through, &held.digest, 10).await.unwrap(), 10);
    drop(client);
    let recorded = timeout(LIMIT, recording).await.unwrap().unwrap();
    assert!(recorded.len() > 500);
    let served = node.metrics.upload_bytes.get();
    let mut stream = TcpStream::connect(upstream).await.unwrap();
    stream.write_all(&recorded).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the server ends the connection");
    until("the handshake failed", || node.metrics.ended(Handshake::Failed) == 1).await;
    assert_eq!((node.metrics.accepted(), node.metrics.upload_bytes.get()), (1, served));
}

/// Guards the header limit of `Guarded`.
#[tokio::test]
async fn a_slow_header_ends_the_connection() {
    let node = Node::start(Config::default()).await;
    let mut stream = connect(&node.peer(), Arc::new(config(&node.peer()))).await.unwrap();
    let dripping = async {
        loop {
            if stream.write_all(b"a").await.is_err() || stream.flush().await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, dripping).await.expect("the server ends the connection");
    until("the entry is gone", || node.metrics.connections.get() == 0).await;
}

/// The header limit does not end a connection that merely waits for its next request.
#[tokio::test]
async fn an_idle_connection_outlives_the_header_limit() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let client = client();
    for digest in [held.digest, Digest::sha256(b"unknown")] {
        let _ = read(&client, &node.peer(), &digest, 10).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert_eq!(node.metrics.connections.get(), 1);
    assert_eq!(read(&client, &node.peer(), &held.digest, 10).await.unwrap(), 10);
    assert_eq!(node.metrics.accepted(), 1);
}

/// Guards the header size limit.
#[tokio::test]
async fn a_huge_header_ends_the_connection() {
    let node = Node::start(Config::default()).await;
    let mut stream = connect(&node.peer(), Arc::new(config(&node.peer()))).await.unwrap();
    let _ = stream.write_all(b"GET / HTTP/1.1\r\na: ").await;
    let _ = stream.write_all(&vec![b'a'; 64 << 10]).await;
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("it ends");
    assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
}

/// Guards the write limit of `Guarded`: who does not read loses the upload.
#[tokio::test]
async fn a_peer_that_does_not_read_loses_its_upload() {
    let node = Node::start(small()).await;
    let held = node.contents.insert(vec![1; 48 << 20], OCTET_STREAM);
    let mut stream = connect(&node.peer(), Arc::new(config(&node.peer()))).await.unwrap();
    let request = format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", wire::content_path(&held.digest));
    stream.write_all(request.as_bytes()).await.unwrap();
    until("the upload begins", || node.metrics.uploads.get() == 1).await;
    until("the upload ends", || node.metrics.uploads.get() == 0).await;
    assert!(node.metrics.upload_bytes.get() < held.size);
}

/// Guards the bound on handshakes: half-open connections do not keep others out.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_half_open_handshakes() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let mut flood = Vec::new();
    for _ in 0..400 {
        flood.push(TcpStream::connect(node.peer().transfer[0]).await.unwrap());
    }
    let start = Instant::now();
    assert_eq!(read(&client(), &node.peer(), &held.digest, 10).await.unwrap(), 10);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(node.metrics.ended(Handshake::Displaced) >= 100);
    until("the rest runs into the limit", || {
        node.metrics.ended(Handshake::Displaced) + node.metrics.ended(Handshake::Timeout) == 400
    })
    .await;
}

/// Answers that contradict the request, whatever the identity behind them.
#[tokio::test]
async fn answers_that_break_the_protocol() {
    let identity = Identity::generate();
    let digest = Digest::sha256(b"a");
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-length: {size}\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 1-10/100\r\ncontent-length: {size}\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-8/100\r\ncontent-length: 9\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/*\r\ncontent-length: {size}\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/100\r\ncontent-length: 11\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/100\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/100\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/100\r\ncontent-length: 10\r\ntransfer-encoding: chunked\r\n\r\na\r\n",
        "HTTP/1.1 416 \r\ncontent-range: bytes */100\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 302 \r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n",
        "SSH-2.0-OpenSSH\r\n\r\n",
    ] {
        let (peer, _tasks) = liar(&identity, answer, 10).await;
        let outcome = client().fetch(&peer, &digest, 0, 10, LIMIT).await.err();
        assert!(matches!(outcome, Some(FetchError::Protocol(_))), "{answer:?}: {outcome:?}");
    }
}

/// Guards the header bounds of the client.
#[tokio::test]
async fn an_endless_answer_header_is_cut() {
    let identity = Identity::generate();
    let (peer, _tasks) = liar(&identity, "HTTP/1.1 206 \r\na: ", 4 << 20).await;
    let outcome = client().fetch(&peer, &Digest::sha256(b"a"), 0, 10, LIMIT).await.err();
    assert!(matches!(outcome, Some(FetchError::Protocol(_))), "{outcome:?}");
}

/// More bytes than announced are never passed on; fewer are an error.
#[tokio::test]
async fn bodies_are_exact() {
    let identity = Identity::generate();
    let answer = "HTTP/1.1 206 \r\ncontent-range: bytes 0-9/10\r\ncontent-length: 10\r\n\r\n";
    let check = async |sent: usize| {
        let (peer, _tasks) = liar(&identity, answer, sent).await;
        let client = client();
        let segment = client.fetch(&peer, &Digest::sha256(b"a"), 0, 99, LIMIT).await.unwrap();
        assert_eq!(segment.range, ByteRange { start: 0, end: 10 });
        let mut read = 0;
        let end = segment.body.try_for_each(|chunk| {
            read += chunk.len();
            async { Ok(()) }
        });
        let end = end.await.map_err(|error| error.kind());
        // Whatever is left of such a connection, the next fetch gets an answer of its own.
        let next = client.fetch(&peer, &Digest::sha256(b"b"), 0, 99, LIMIT).await;
        assert!(next.is_ok(), "{:?}", next.err());
        (read, end)
    };
    assert_eq!(check(10).await, (10, Ok(())));
    assert_eq!(check(50_000).await, (10, Ok(())));
    assert_eq!(check(4).await, (4, Err(std::io::ErrorKind::UnexpectedEof)));
}

/// A peer whose address swallows everything costs the limit, and others nothing.
#[tokio::test]
async fn a_hung_peer_costs_its_own_limit_only() {
    let node = Node::start(Config::default()).await;
    let held = node.contents.insert(vec![1; 10], OCTET_STREAM);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hung = Peer {
        transfer: vec![silent.local_addr().unwrap()],
        ..Fixture::peer(Identity::generate().peer_id().clone())
    };
    let client = client();
    let (start, limit, good) = (Instant::now(), Duration::from_millis(300), node.peer());
    let (lost, served) = tokio::join!(
        client.fetch(&hung, &held.digest, 0, 10, limit),
        read(&client, &good, &held.digest, 10),
    );
    assert!(matches!(lost, Err(FetchError::Unreachable(_))) && served.is_ok());
    assert!(start.elapsed() < Duration::from_secs(2));
    // The second address is tried long before the first one's limit.
    let mut both = node.peer();
    both.transfer.insert(0, silent.local_addr().unwrap());
    assert!(client.fetch(&both, &held.digest, 0, 10, Duration::from_secs(1)).await.is_ok());
}
