//! A member that says more than anyone can use, on a real connection.

use futures::{AsyncWriteExt as _, StreamExt};
use libp2p::Stream;
use libp2p::swarm::SwarmEvent;

use super::super::super::gossip::record::{Notary, Record};
use super::super::super::gossip::wire::{self, Delta, Frame, KEYS};
use super::super::super::gossip::{Key, Limits};
use super::super::notary::{Keeper, member_key};
use super::super::{codec, stream, streams};
use super::*;

/// Frames of ten million contents.
const FRAMES: u32 = 10_000_000 / KEYS as u32;

/// A stream of a member that has said who it is, on which anything more can be said to `node`, and its key; its connection lives
/// as long as the task.
async fn member(node: &Node) -> (Stream, Key, AbortOnDropHandle<()>) {
    let identity = Identity::generate();
    let mut swarm = libp2p::SwarmBuilder::with_existing_identity(identity.keypair().clone())
        .with_tokio()
        .with_tcp(Default::default(), libp2p::tls::Config::new, libp2p::yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| streams::Behaviour::new(stream::protocols()))
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(600)))
        .build();
    let address: libp2p::Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", node.address.port()).parse().unwrap();
    swarm.dial(address).unwrap();
    let mut stream = loop {
        match swarm.select_next_some().await {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                swarm.behaviour_mut().open(peer_id, connection_id);
            }
            SwarmEvent::Behaviour((_, streams::Event::Opened(stream))) => break stream,
            _ => {}
        }
    };
    let task = AbortOnDropHandle::new(tokio::spawn(async move { while swarm.next().await.is_some() {} }));
    let peer = identity.keypair().public().to_peer_id();
    let gate = Arc::new(crate::network::conformance::TestGate::default());
    let record =
        Record { key: member_key(&peer), identity: peer.to_bytes().into(), seq: 1, ..Record::default() };
    let keeper = Keeper::new(identity.keypair().clone(), Admission::off(), gate);
    let key = record.key;
    let hello = wire::Hello { record: keeper.seal(record).signed.clone(), ..wire::Hello::default() };
    let hello = wire::encode(&Frame { hello: Some(hello), ..Frame::default() });
    codec::write_framed(&mut stream, &hello).await.unwrap();
    (stream, key, task)
}

/// Guards the rate at which a neighbour's frames are read: 32 MB at once, and then 1 MB in a second.
#[tokio::test]
async fn bytes_without_end_are_read_slowly() {
    let one = Start::default().start().await;
    let (mut stream, _, _connection) = member(&one).await;
    // A field that nobody knows, of 200,000 bytes: it is skipped in no time.
    let frame = [&[0xc2, 0x3e, 0xc0, 0x9a, 0x0c][..], &[0; 200_000]].concat();
    let start = StdInstant::now();
    for _ in 0..200 {
        codec::write_framed(&mut stream, &frame).await.unwrap();
        stream.flush().await.unwrap();
    }
    println!("40 MB in {:?}", start.elapsed());
    // But for what the two kernels and yamux hold.
    assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
}

/// Guards the limit of contents.
#[tokio::test]
async fn a_member_that_announces_ten_million_digests_is_slowed_and_cut() {
    let one = Start::default().start().await;
    let two = Start::knowing(&[&one]).start().await;
    two.sees(1).await;
    let (mut stream, key, _connection) = member(&one).await;
    let (start, mut sent) = (StdInstant::now(), 0);
    let flood = async {
        for number in 0..FRAMES {
            let from = number * KEYS as u32;
            let contents = wire::contents((0..KEYS as u64).map(|n| (u64::from(from) + n) << 20));
            let delta = Delta { key, epoch: 0, from, contents, removed: Vec::new() };
            let frame = wire::encode(&Frame { deltas: vec![delta], ..Frame::default() });
            codec::write_framed(&mut stream, &frame).await.unwrap();
            stream.flush().await.unwrap();
            sent += frame.len();
        }
    };
    let flooded = tokio::time::timeout(Duration::from_secs(6), flood).await;
    println!("{sent} bytes taken in {:?}", start.elapsed());
    assert!(flooded.is_err(), "all was taken");
    let holds = one.network.status().peers.iter().map(|peer| peer.holds).max().unwrap();
    assert!(holds > 10_000 && holds <= Limits::default().contents as usize, "{holds}");
    // Nobody else is kept waiting by it.
    let news = Digest::sha256(b"news");
    within(Duration::from_secs(1), async |number| {
        let news = Digest::sha256(&[news.as_bytes(), &[number][..]].concat());
        one.network.advertise(Advertisement::Added(news));
        wait_for("the other hears", || holders(&two.view(), &news) == [one.id()]).await;
    })
    .await;
}
