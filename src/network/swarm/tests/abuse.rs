//! Peers and strangers that take more than is theirs.

use std::io::ErrorKind;

use futures::{AsyncWriteExt as _, StreamExt};
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::{Multiaddr, PeerId as P2pId, StreamProtocol, swarm::SwarmEvent};
use tokio::net::TcpSocket;

use super::behaviour::{PENDING_PER_ADDRESS, STREAMS};
use super::*;

/// Writes what it is given; a request without bytes is one that never ends.
#[derive(Clone, Default)]
pub(super) struct Raw;
impl request_response::Codec for Raw {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = ();
    async fn read_request<T>(&mut self, _: &StreamProtocol, _: &mut T) -> std::io::Result<Vec<u8>>
    where
        T: futures::AsyncRead + Unpin + Send,
    {
        std::future::pending().await
    }
    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> std::io::Result<()>
    where
        T: futures::AsyncRead + Unpin + Send,
    {
        let mut bytes = Vec::new();
        futures::AsyncReadExt::read_to_end(io, &mut bytes).await?;
        if bytes.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        bytes: Vec<u8>,
    ) -> std::io::Result<()>
    where
        T: futures::AsyncWrite + Unpin + Send,
    {
        io.write_all(&bytes).await?;
        io.flush().await?;
        if bytes.is_empty() {
            // A message that never ends.
            io.write_all(&(1u32 << 15).to_be_bytes()).await?;
            loop {
                io.write_all(&[0]).await?;
                io.flush().await?;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }
    async fn write_response<T>(&mut self, _: &StreamProtocol, _: &mut T, (): ()) -> std::io::Result<()>
    where
        T: futures::AsyncWrite + Unpin + Send,
    {
        Ok(())
    }
}

/// A node that says what it likes.
pub(super) fn raw() -> libp2p::Swarm<request_response::Behaviour<Raw>> {
    libp2p::SwarmBuilder::with_existing_identity(Identity::generate().keypair().clone())
        .with_tokio()
        .with_tcp(Default::default(), libp2p::tls::Config::new, libp2p::yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| {
            let protocols = codec::protocols().into_iter().map(|protocol| (protocol, ProtocolSupport::Full));
            request_response::Behaviour::<Raw>::new(protocols, request_response::Config::default())
        })
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(60)))
        .build()
}

impl Node {
    fn in_libp2p(&self) -> (P2pId, Multiaddr) {
        let address = format!("/ip4/127.0.0.1/tcp/{}", self.address.port());
        (self.id().as_str().parse().unwrap(), address.parse().unwrap())
    }
}

#[tokio::test]
async fn oversized_and_impossible_messages_are_refused() {
    let one = Start::default().start().await;
    let mut raw = raw();
    let (id, address) = one.in_libp2p();
    let mut outcome = async |bytes: &[u8]| {
        let options = vec![address.clone()];
        raw.behaviour_mut().send_request_with_addresses(&id, bytes.to_vec(), options);
        loop {
            match raw.select_next_some().await {
                SwarmEvent::Behaviour(request_response::Event::OutboundFailure { .. }) => return false,
                SwarmEvent::Behaviour(request_response::Event::Message {
                    message: request_response::Message::Response { .. },
                    ..
                }) => return true,
                _ => {}
            }
        }
    };
    let framed = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    assert!(
        outcome(&framed(&message::encode(&message::Message::Hello(message::Hello::default())))).await,
        "the program speaks right"
    );
    assert!(!outcome(&u32::MAX.to_be_bytes()).await, "too long");
    one.has_problem("its message cannot be read: a message of 4294967295 bytes, more than 32768").await;
    assert!(!outcome(&framed(&[0xff; 100])).await, "not protobuf");
    one.has_problem("its message cannot be read: not a protobuf message").await;
}

/// Guards `STREAMS`: messages that never end take the memory of a few.
#[tokio::test]
async fn requests_that_never_end_are_few() {
    let one = Start::default().start().await;
    let mut raw = raw();
    let (id, address) = one.in_libp2p();
    raw.dial(address).unwrap();
    while !matches!(raw.select_next_some().await, SwarmEvent::ConnectionEstablished { .. }) {}
    let sent = 3 * STREAMS;
    for _ in 0..sent {
        raw.behaviour_mut().send_request(&id, Vec::new());
    }
    let mut ended = 0;
    let refused = async {
        while ended < sent - STREAMS {
            if let SwarmEvent::Behaviour(request_response::Event::OutboundFailure { .. }) =
                raw.select_next_some().await
            {
                ended += 1;
            }
        }
    };
    // Before the time limit of those that are read.
    tokio::time::timeout(Duration::from_secs(5), refused).await.expect("the rest is refused at once");
}

/// Guards `PENDING_PER_ADDRESS`: silent connections of one host keep nobody out.
#[tokio::test]
async fn a_flood_from_one_address_keeps_no_other_out() {
    let one = Start::default().start().await;
    // In less time than those are borne.
    within(Duration::from_millis(1500), async |_| {
        let mut flood = Vec::new();
        for _ in 0..300 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).unwrap();
            flood.push(socket.connect(one.address).await.unwrap());
        }
        let two = Start::knowing(&[&one]).start().await;
        two.sees(1).await;
        assert!(flood.len() > PENDING_PER_ADDRESS);
    })
    .await;
}

/// Guards `HANDSHAKE_TIMEOUT`.
#[tokio::test]
async fn who_connects_and_is_silent_is_closed_soon() {
    let one = Start::default().start().await;
    let mut silent = TcpStream::connect(one.address).await.unwrap();
    let mut buffer = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(4), silent.read_to_end(&mut buffer));
    // In order or by a reset.
    let _ = closed.await.expect("it is closed");
}

/// Guards the queue of questions: more at once than may be on their way are all answered.
#[tokio::test]
async fn many_questions_at_once_are_all_answered() {
    let one = Start::default().start().await;
    let two = Start::knowing(&[&one]).start().await;
    two.sees(1).await;
    let questions = (0..40).map(|n| {
        let (question, network) = (question(&format!("v{n}")), two.network.clone());
        let id = one.id();
        async move { network.resolve(&id, &question, Duration::from_secs(10)).await }
    });
    for answer in futures::future::join_all(questions).await {
        assert!(matches!(answer, Ok(None)), "{answer:?}");
    }
}

/// Guards `Action::Twin` of the gossip.
#[tokio::test]
async fn two_processes_with_one_identity_are_named() {
    let one = Start::default().start().await;
    let first = Start::knowing(&[&one]).start().await;
    first.sees(1).await;
    wait_for("one process is no problem", || one.connected() == 1 && one.problems().is_empty()).await;
    let copy = Start { identity: first.identity.clone(), ..Start::knowing(&[&one]) }.start().await;
    one.has_problem(&format!("peer {}: two processes use its identity at once", first.id())).await;
    drop(copy);
    wait_for("it is over", || one.problems().is_empty() && one.connected() == 1).await;
}
