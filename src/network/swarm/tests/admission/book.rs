//! Nodes that nothing tells of each other but the book of a lease, which anybody may have written.

use std::net::UdpSocket;
use std::path::Path;

use super::*;
use crate::network::gossip::record::{Notary, Record};
use crate::network::swarm::notary::Keeper;

/// An address of this machine that is not loopback; `None`: it has none.
fn elsewhere() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

fn at(keys: &Keys, listen: SocketAddr, advertise: &[SocketAddr]) -> Made {
    let mut made = Made::by(&[&keys.first], &[]);
    (made.config.listen, made.config.advertise) = (vec![listen], advertise.to_vec());
    made
}

fn book_of(member: &Member) -> Vec<Vec<u8>> {
    member.network.records(std::slice::from_ref(&member.id))
}

/// What a hostile writer puts there; signed by whom it is about, or by nobody.
fn hostile(control: Vec<SocketAddr>) -> Vec<u8> {
    let identity = Identity::generate();
    let gate = Arc::new(crate::network::conformance::TestGate::default());
    let keeper = Keeper::new(identity.keypair().clone(), Admission::off(), gate);
    let bytes = identity.keypair().public().to_peer_id().to_bytes().into();
    keeper.seal(Record { identity: bytes, seq: 1, control, ..Record::default() }).signed.to_vec()
}

#[tokio::test]
async fn a_node_that_knows_nobody_joins_by_the_book() {
    let Some(ip) = elsewhere() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let keys = Keys::new();
    let one = at(&keys, (ip, 0).into(), &[]).start().await;
    // Its configuration has the port of all.
    let advertise = SocketAddr::new([10, 255, 255, 1].into(), one.address.port());
    let other = at(&keys, (Ipv4Addr::LOCALHOST, 0).into(), &[advertise]).start().await;
    assert!(!other.network.is_hinted());
    let start = StdInstant::now();
    other.network.hint(&book_of(&one));
    assert!(other.network.is_hinted());
    for node in [&one, &other] {
        node.sees(1).await;
        wait_for("a member", || node.network.members().len() == 2).await;
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// Of two nodes that know nothing of each other one writes the book: it has to know where it is itself.
#[tokio::test]
async fn a_node_without_neighbours_says_where_it_is() {
    if elsewhere().is_none() {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    }
    let keys = Keys::new();
    let one = at(&keys, (Ipv4Addr::UNSPECIFIED, 0).into(), &[]).start().await;
    let advertise = SocketAddr::new([10, 255, 255, 1].into(), one.address.port());
    let other = at(&keys, (Ipv4Addr::LOCALHOST, 0).into(), &[advertise]).start().await;
    wait_for("a hint", || {
        other.network.hint(&book_of(&one));
        other.network.is_hinted()
    })
    .await;
    other.sees(1).await;
}

/// The same without an address but loopback, which no book may name.
#[tokio::test]
async fn who_is_dialled_by_a_hint_becomes_a_neighbour() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let other = Made::by(&[&keys.first], &[]).start().await;
    other.network.hint(&book_of(&one));
    assert!(!other.network.is_hinted(), "loopback, at a port that is not configured");
    other.network.shared.book().put(one.id.as_str().parse().unwrap(), one.address);
    other.network.shared.wake.notify_one();
    other.sees(1).await;
    wait_for("a member", || one.network.members().len() == 2).await;
}

/// Somebody else answers there than the book says.
#[tokio::test]
async fn who_answers_has_to_be_whom_the_book_names() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let other = Made::by(&[&keys.first], &[]).start().await;
    let stranger = Identity::generate().keypair().public().to_peer_id();
    other.network.shared.book().put(stranger, one.address);
    other.network.shared.wake.notify_one();
    wait_for("it is dialled", || {
        let now = tokio::time::Instant::now();
        other.network.shared.book().due(0, now).is_some_and(|due| due > now)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((other.connected(), other.network.members().len()), (0, 1));
}

#[tokio::test]
async fn who_has_a_neighbour_follows_no_hint() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let other = Made::by(&[&keys.first], &[&one]).start().await;
    wait_for("a neighbour", || other.network.status().peers.iter().any(|peer| peer.neighbour)).await;
    let third = Made::by(&[&keys.first], &[]).start().await;
    other.network.shared.book().put(third.id.as_str().parse().unwrap(), third.address);
    other.network.shared.wake.notify_one();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!((other.connected(), third.connected()), (1, 0));
}

#[tokio::test]
async fn a_hostile_book_leads_nowhere() {
    let keys = Keys::new();
    let port = 5001;
    let node = at(&keys, (Ipv4Addr::LOCALHOST, 0).into(), &[([10, 255, 255, 1], port).into()]).start().await;
    let many: Vec<SocketAddr> =
        (0..10_000_u16).map(|n| ([10, 9, n.to_be_bytes()[0], n.to_be_bytes()[1]], port).into()).collect();
    let link_local = vec![([169, 254, 169, 254], port).into()];
    let foreign = Made::by(&[&keys.second], &[]).start().await;
    let damaged = {
        let mut record = book_of(&node).remove(0);
        let last = record.len() - 1;
        record[last] ^= 1;
        record
    };
    let books = [
        vec![hostile(many)],
        vec![hostile(link_local)],
        book_of(&foreign),
        book_of(&node),
        vec![damaged],
        vec![Vec::new(), vec![0xff; 800], b"garbage".to_vec()],
        vec![vec![7; 40]; 10_000],
    ];
    for (number, book) in books.iter().enumerate() {
        node.network.hint(book);
        assert!(!node.network.is_hinted(), "{number}");
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((node.connected(), node.network.members().len()), (0, 1));
}

/// What a hostile writer puts there who has a certificate by this key: of a member of old, or from a node that was taken over.
fn certified(key: &Path, control: &[SocketAddr]) -> Vec<u8> {
    let identity = Identity::generate();
    let config = Config { cluster_key: vec![key.to_owned()], ..Config::default() };
    let peers = trust::Peers { by_key: true, ..trust::Peers::default() };
    let trust = Arc::new(PinnedTrust::new(trust::Config::default(), peers).unwrap());
    let admission = Admission::at(identity.peer_id().clone(), &config, trust, |now| now);
    let bytes = identity.keypair().public().to_peer_id().to_bytes().into();
    let record =
        Record { identity: bytes, seq: 1, certificate: admission.own().unwrap(), ..Record::default() };
    // Who writes a record is not held to its bounds: the last of a field counts.
    const CONTROL: u32 = 6;
    let mut body = record.body();
    let control: Vec<String> = control.iter().map(ToString::to_string).collect();
    prost::encoding::string::encode(CONTROL, &control.join(","), &mut body);
    let signature = identity.keypair().sign(&[b"peili gossip record 1\n", &body[..]].concat()).unwrap();
    record.sealed(body, signature).signed.to_vec()
}

/// Records that are believed, with addresses that must not be: no address that is not another node's is dialled, and of the others five
/// a minute, however often the lease is written.
#[tokio::test]
async fn a_book_of_records_that_are_believed_leads_to_five_dials_a_minute() {
    let Some(ip) = elsewhere() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let keys = Keys::new();
    let victim = TcpListener::bind((ip, 0)).await.unwrap();
    let port = victim.local_addr().unwrap().port();
    // Whoever is dialled there was named by a book that may not.
    let loopback = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let node = at(&keys, (Ipv4Addr::LOCALHOST, 0).into(), &[([10, 255, 255, 1], port).into()]).start().await;
    let nowhere = [
        "169.254.169.254",
        "127.0.0.1",
        "::1",
        "fe80::1",
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",
        "::ffff:127.0.0.1",
    ];
    let nowhere: Vec<SocketAddr> =
        nowhere.into_iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect();
    let many: Vec<SocketAddr> =
        (0..10_000_u16).map(|n| ([10, 9, n.to_be_bytes()[0], n.to_be_bytes()[1]], port).into()).collect();
    for control in [nowhere.clone(), many, vec![(ip, port ^ 1).into()]] {
        node.network.hint(&[certified(&keys.first, &control)]);
        assert!(!node.network.is_hinted());
    }

    let named = [nowhere[..2].to_vec(), vec![(ip, port).into()]].concat();
    let (mut dialed, start) = (Vec::new(), StdInstant::now());
    while start.elapsed() < Duration::from_secs(15) {
        // Others each time, so that none of them was tried before.
        let book: Vec<Vec<u8>> = (0..5).map(|_| certified(&keys.first, &named)).collect();
        node.network.hint(&book);
        assert!(node.network.is_hinted());
        let listened = tokio::time::timeout(Duration::from_millis(200), async {
            tokio::select! {
                accepted = victim.accept() => drop(accepted.unwrap()),
                _ = loopback.accept() => panic!("loopback was dialled"),
            }
        });
        if listened.await.is_ok() {
            dialed.push(start.elapsed());
        }
    }
    assert_eq!(dialed.len(), 5, "{dialed:?}");
    assert_eq!((node.connected(), node.network.members().len()), (0, 1));
}

/// The attacker's own peer lives, and answers: under the name of a record that is believed, and under its own.
#[tokio::test]
async fn an_attackers_peer_that_a_book_names_is_no_member() {
    let Some(ip) = elsewhere() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let keys = Keys::new();
    let mut attacker = at(&keys, (ip, 0).into(), &[]);
    attacker.config.cluster_key = vec![keys.second.clone()];
    let attacker = attacker.start().await;
    let advertise = SocketAddr::new([10, 255, 255, 1].into(), attacker.address.port());
    let node = at(&keys, (Ipv4Addr::LOCALHOST, 0).into(), &[advertise]).start().await;
    node.network.hint(&book_of(&attacker));
    assert!(!node.network.is_hinted(), "its certificate is by another key");
    node.network.hint(&[certified(&keys.first, &[attacker.address])]);
    assert!(node.network.is_hinted());
    wait_for("it is dialled", || {
        let now = tokio::time::Instant::now();
        node.network.shared.book().due(0, now).is_some_and(|due| due > now)
    })
    .await;
    // As if the book had been right about who is there.
    node.network.shared.book().put(attacker.id.as_str().parse().unwrap(), attacker.address);
    node.network.shared.wake.notify_one();
    node.has_problem("was refused").await;
    for one in [&node, &attacker] {
        assert_eq!(one.network.members().len(), 1);
    }
}

#[tokio::test]
async fn an_open_network_takes_no_hint() {
    let Some(ip) = elsewhere() else {
        eprintln!("skipped: this machine has no address but loopback");
        return;
    };
    let open = |listen: SocketAddr, advertise: Vec<SocketAddr>| Made {
        config: Config { listen: vec![listen], advertise, ..Config::default() },
        certified: None,
        late: 0,
    };
    let one = open((ip, 0).into(), Vec::new()).start().await;
    let advertise = SocketAddr::new([10, 255, 255, 1].into(), one.address.port());
    let other = open((Ipv4Addr::LOCALHOST, 0).into(), vec![advertise]).start().await;
    other.network.hint(&book_of(&one));
    assert!(!other.network.is_hinted());
}
