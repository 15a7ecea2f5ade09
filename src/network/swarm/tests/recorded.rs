//! Bytes that were recorded of version 1 of what goes over the wire and onto the disk: this program reads them, and says the
//! same. Of a later version a folder of its own is recorded; that of the version before stays, and has to be read.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use libp2p::identity::Keypair;

use super::super::super::admission::certificate::{self, Certificate};
use super::super::super::admission::key::Key;
use super::super::super::gossip::record::{Notary, Record, Suspicion};
use super::super::super::gossip::wire::{
    self, Beat, Bulk, BulkMember, Delta, Frame, Position, Summary, Whole,
};
use super::super::message::{self, Hello, Message};
use super::super::notary::{Keeper, member_key};
use super::super::{codec, disk, stream};
use super::*;
use crate::network::conformance::TestGate;
use crate::network::identity::peer_id;
use crate::oci::Descriptor;

/// Set, the bytes are recorded anew instead: only for a version that was never released.
const RECORD: &str = "PEILI_RECORD";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/version-1")
}

/// What was recorded, or what is recorded now.
fn recorded(name: &str, said: &[u8]) -> Vec<u8> {
    let path = folder().join(name);
    if std::env::var_os(RECORD).is_some() {
        fs::create_dir_all(folder()).unwrap();
        fs::write(&path, said).unwrap();
    }
    fs::read(path).unwrap()
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn time() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_000_000)
}

/// The identity that signs: a key that is nobody's.
fn keypair() -> Keypair {
    Keypair::ed25519_from_bytes([7; 32]).unwrap()
}

fn id() -> PeerId {
    peer_id(&keypair().public().to_peer_id()).unwrap()
}

fn keeper() -> Keeper {
    let gate = Arc::new(TestGate::default());
    Keeper::new(keypair(), Admission::off(), gate)
}

fn certificate() -> Certificate {
    let key = Key::derive(b"a key of the cluster for tests, 32 bytes at least").unwrap();
    Certificate::new(&key, "default", &id(), 1_795_086_400)
}

fn record() -> Record {
    let peer = keypair().public().to_peer_id();
    Record {
        key: member_key(&peer),
        identity: peer.to_bytes().into(),
        seq: 1_795_000_000,
        process: 0x0123_4567_89ab_cdef,
        epoch: 2,
        control: vec![address("10.0.0.1:5001"), address("[fd00::1]:5001")],
        transfer: vec![address("10.0.0.1:5002")],
        node: "node-1".into(),
        zone: "a".into(),
        version: "0.1.0".into(),
        certificate: certificate().encode().into(),
        ..Record::default()
    }
}

/// One with all that can be said.
fn frame(record: &Bytes, suspicion: &Bytes) -> Frame {
    let position = Position { key: 1, seq: 2, epoch: 3, version: 4, hash: 5 };
    let contents = wire::contents([7, 8, 9].into_iter());
    Frame {
        hello: Some(wire::Hello {
            record: record.clone(),
            complete: true,
            full: true,
            members: 3,
            observed: "10.0.0.2".into(),
            sample: vec![record.clone()],
        }),
        records: vec![record.clone()],
        deltas: vec![Delta { key: 1, epoch: 2, from: 3, contents: contents.clone(), removed: vec![1] }],
        suspicions: vec![suspicion.clone()],
        have: vec![position],
        want: vec![position],
        wholes: vec![Whole { key: 1, epoch: 2, version: 3, contents: contents.clone(), more: true }],
        tree: wire::GRAFT,
        beat: Some(Beat { root: 1, answer: true, compare: true, ..Beat::default() }),
        buckets: vec![5; 4 * wire::BUCKETS].into(),
        summary: Some(Summary { buckets: vec![9; wire::BUCKETS / 8].into(), positions: vec![position] }),
        bulk_wanted: true,
        bulk: Some(bulk(record)),
    }
}

fn bulk(record: &Bytes) -> Bulk {
    let members = vec![BulkMember { record: record.clone(), epoch: 2, version: 4 }];
    Bulk { members, holdings: vec![1, 0, 0, 0, 0, 0, 0, 0, 1, 0].into(), last: true, refused: false }
}

fn messages(record: &Bytes) -> Vec<(&'static str, Message)> {
    let digest = Digest::sha256(b"content");
    let hello = Hello {
        node: "node-1".into(),
        zone: "a".into(),
        version: "0.1.0".into(),
        transfer: vec![address("10.0.0.1:5002")],
        control: vec![address("10.0.0.1:5001")],
        certificate: certificate().encode(),
        introduction: true,
    };
    vec![
        ("control-hello", Message::Hello(hello)),
        ("control-resolve", Message::Resolve(question("v1"))),
        ("control-holders", Message::Holders(digest)),
        ("control-heard", Message::Heard),
        ("control-held", Message::Held(vec![record.clone()])),
        (
            "control-resolved",
            Message::Resolved(Some(Tagged {
                target: Descriptor::new(digest, 7, "application/x"),
                age: None,
            })),
        ),
        ("control-unknown", Message::Resolved(None)),
        ("control-denied", Message::Denied),
    ]
}

#[test]
fn what_version_1_said_is_read_and_said_again() {
    let keeper = keeper();
    let sealed = keeper.seal(record());
    let bytes: Bytes = recorded("record", &sealed.signed).into();
    assert_eq!(bytes, sealed.signed);
    let read = keeper.open(&bytes).unwrap();
    assert_eq!(*read, *sealed);

    let suspicion = keeper.accuse(1, 2);
    let bytes: Bytes = recorded("suspicion", &suspicion.signed).into();
    assert_eq!(bytes, suspicion.signed);
    let of = |_| Some(record().identity);
    assert_eq!(
        (Suspicion::parse(&bytes).unwrap().0, &*keeper.hear(&bytes, &of).unwrap()),
        ((*suspicion).clone(), &*suspicion)
    );

    let bytes = recorded("certificate", &certificate().encode());
    assert_eq!((&bytes, certificate::decode(&bytes).unwrap()), (&certificate().encode(), certificate()));

    let said = frame(&sealed.signed, &suspicion.signed);
    let bytes = recorded("gossip-frame", &wire::encode(&said));
    assert_eq!(wire::encode(&said), bytes);
    assert_eq!(wire::decode(bytes.into()).unwrap(), said);

    for (name, said) in messages(&sealed.signed) {
        let bytes = recorded(name, &message::encode(&said));
        assert_eq!((&message::encode(&said), message::decode(&bytes).unwrap()), (&bytes, said), "{name}");
    }

    let kept = disk::encode([bulk(&sealed.signed)].into_iter(), time());
    assert_eq!(recorded("view", &kept), kept);
    let read = disk::read(&folder(), time() + Duration::from_secs(60)).unwrap().unwrap();
    assert_eq!((read.parts, read.age, read.is_fresh), (vec![bulk(&sealed.signed)], 60, true));

    let file = [b"peili-identity 1\n", &keypair().to_protobuf_encoding().unwrap()[..]].concat();
    let data = tempfile::tempdir().unwrap();
    fs::write(data.path().join("identity.key"), recorded("identity.key", &file)).unwrap();
    assert_eq!(*Identity::load_or_create(data.path()).unwrap().peer_id(), id());
}

/// Names by which versions are told apart. A change of what they stand for takes another number.
#[test]
fn version_1_is_spoken() {
    let names = |protocols: Vec<libp2p::StreamProtocol>| {
        protocols.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(names(codec::protocols()).contains(&"/peili/control/1".into()));
    assert!(names(stream::protocols()).contains(&"/peili/gossip/1".into()));
}
