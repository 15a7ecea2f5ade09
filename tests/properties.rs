//! Properties of the parsers that read what clients, peers, registries and operators write: random texts, texts of the
//! right shape, and right ones with a change. The fuzz targets have the same invariants.

#[path = "../fuzz/invariants.rs"]
mod invariants;

use peili::network::Tagged;
use peili::network::admission::certificate::{self, Certificate};
use peili::network::admission::key::Key;
use peili::network::gossip::record::{Record, Suspicion};
use peili::network::gossip::wire::{self, Delta, Frame, Position, Whole};
use peili::network::swarm::message::{Hello, Message, encode};
use peili::oci::{Algorithm, Descriptor, Digest};
use proptest::collection::vec;
use proptest::prelude::*;

const PEER: &str = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";

/// `text` with some characters replaced.
fn changed(text: &str, changes: Vec<(prop::sample::Index, char)>) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    for (index, character) in changes {
        if !characters.is_empty() {
            let at = index.index(characters.len());
            characters[at] = character;
        }
    }
    characters.into_iter().collect()
}

/// Texts of a shape, some of them with up to three changes.
fn near(shape: &'static str) -> impl Strategy<Value = String> {
    (shape, vec((any::<prop::sample::Index>(), any::<char>()), 0..3))
        .prop_map(|(text, changes)| changed(&text, changes))
}

/// One of `texts`, some of them with up to three changes.
fn near_any(texts: &'static [&'static str]) -> impl Strategy<Value = String> {
    (prop::sample::select(texts), vec((any::<prop::sample::Index>(), any::<char>()), 0..3))
        .prop_map(|(text, changes)| changed(text, changes))
}

fn messages() -> impl Strategy<Value = Message> {
    let hello = ("[a-z.-]{0,20}", "\\PC{0,10}", vec(any::<std::net::SocketAddr>(), 0..10)).prop_map(
        |(node, zone, transfer)| {
            let version = "0.1.0".into();
            Message::Hello(Hello { node, zone, version, transfer, ..Hello::default() })
        },
    );
    let holders = any::<(bool, u64)>().prop_map(|(long, seed)| {
        let algorithm = if long { Algorithm::Sha512 } else { Algorithm::Sha256 };
        Message::Holders(Digest::of(algorithm, &seed.to_be_bytes()))
    });
    let held = vec(vec(any::<u8>(), 0..40), 0..20)
        .prop_map(|records| Message::Held(records.into_iter().map(Into::into).collect()));
    let resolved = (any::<u64>(), "\\PC{0,30}").prop_map(|(size, media_type)| {
        let target = Descriptor::new(Digest::sha256(&[1]), size, &media_type);
        Message::Resolved(Some(Tagged { target, age: Some(std::time::Duration::from_millis(size)) }))
    });
    prop_oneof![hello, holders, held, resolved]
}

fn frames() -> impl Strategy<Value = Frame> {
    let contents = || {
        vec(any::<u64>(), 0..20)
            .prop_map(|keys| keys.into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>())
    };
    let deltas = vec((any::<u64>(), any::<u32>(), any::<u32>(), contents(), vec(0_u32..25, 0..3)), 0..3);
    let have = vec(any::<(u64, u64, u32)>(), 0..5);
    let record = ("\\PC{0,20}", vec(any::<std::net::SocketAddr>(), 0..9), any::<u64>());
    (deltas, have, record, contents()).prop_map(|(deltas, have, (node, control, seq), whole)| Frame {
        records: vec![
            {
                let record = Record { node, control, seq, ..Record::default() };
                let body = record.body();
                record.sealed(body, vec![7; 64]).signed
            },
            Suspicion::sealed(1, seq, 2, vec![7; 64]).signed,
        ],
        deltas: deltas
            .into_iter()
            .map(|(key, epoch, from, contents, removed)| Delta {
                key,
                epoch,
                from,
                contents: contents.into(),
                removed,
            })
            .collect(),
        have: have
            .into_iter()
            .map(|(key, seq, version)| Position { key, seq, version, ..Position::default() })
            .collect(),
        wholes: vec![Whole { contents: whole.into(), ..Whole::default() }],
        ..Frame::default()
    })
}

/// Pieces of manifests, right and wrong.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let keys =
        ["layers", "manifests", "config", "mediaType", "digest", "size", "subject", "annotations", "blobs"];
    let digest = format!("sha256:{}", "a".repeat(64));
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        "\\PC{0,20}".prop_map(Into::into),
        Just(digest.into()),
        Just("application/vnd.oci.image.index.v1+json".into()),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..8).prop_map(Into::into),
            vec((prop::sample::select(keys.to_vec()), inner), 0..8).prop_map(|entries| {
                entries
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            }),
        ]
    })
}

const RANGES: [&str; 5] =
    ["bytes=0-", "bytes=5-9", "bytes=-10", "bytes 0-9/10", "bytes=18446744073709551615-"];

const HOSTS: [&str; 4] = [
    "server = \"https://r.test\"\n[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
    "[host.\"https://u:p@m.test:8443/x\"]\nskip_verify = true\nca = [\"a.crt\", \"b.crt\"]\ndial_timeout = \"1m3.5s\"\n",
    "[host.\"m.test\"]\noverride_path = true\nclient = [[\"a.cert\", \"a.key\"], [\"b.cert\", \"b.key\"]]\n\
     [host.\"m.test\".header]\nx = [\"1\", \"2\"]\n",
    "[host]\n[host.\"http://[fd77::1]:5000\"]\ncapabilities = [\"push\"]\n",
];

const CONTAINERD: [&str; 4] = [
    "version = 2\nimports = [\"conf.d/*.toml\"]\nroot = \"/r\"\n[grpc]\naddress = \"/s\"\n\
     [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a:/b\"\n",
    "version = 3\n[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\nuse_local_image_pull = false\n\
     [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a'\n",
    "disabled_plugins = [\"cri\"]\n[plugins.cri.registry.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]\n",
    "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = '/s'\n",
];

const CONFIGURATIONS: [&str; 5] = [
    "node: {name: n1, zone: \"a: b\", drain: 1m 30s}\nlog: {level: \"info,peili=debug\", format: json}\n",
    "mirror:\n  segment: 4MiB\n  private: [\"r.io/a/*\", 'r.io/\"b\"/**']\n  stall: 1500ms\n  verify: false\n",
    "network:\n  dns: [a.test:5001]\n  listen: [\"[::1]:0\"]\n  peers:\n    - id: \
     12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp\n      addresses: [\"10.0.0.7:5001\"]\n",
    "store: {source: \"layout:/a b,name=r.io/x/y\", namespaces: [a, b-c]}\nupstream: {cache: 20s}\n",
    "registry: &r {lists: held, manifest-deadline: 2s}\ntransfer: {uploads: 7}\n",
];

proptest! {
    #[test]
    fn references(random in "\\PC{0,40}", shaped in near("([a-z0-9.-]{1,12}(:[0-9]{1,5})?/)?[a-z0-9._/-]{1,20}(:[A-Za-z0-9._-]{1,10})?(@sha256:[0-9a-f]{64})?")) {
        invariants::reference(&random);
        invariants::reference(&shaped);
    }

    #[test]
    fn digests_have_one_text(random in "\\PC{0,40}", shaped in near("sha(256:[0-9a-f]{64}|512:[0-9a-f]{128})")) {
        invariants::digest(&random);
        invariants::digest(&shaped);
    }

    #[test]
    fn ranges(size: u64, random in "\\PC{0,30}", shaped in near("bytes[= ][0-9]{0,20}-[0-9]{0,20}(/[0-9]{1,20})?"), right in near_any(&RANGES)) {
        for size in [size, size % 100, 0] {
            invariants::range(size, &random);
            invariants::range(size, &shaped);
            invariants::range(size, &right);
        }
    }

    #[test]
    fn manifests(bytes: Vec<u8>, shaped in json()) {
        invariants::manifest(&bytes);
        invariants::manifest(shaped.to_string().as_bytes());
    }

    #[test]
    fn patterns(random in "\\PC{0,30}", shaped in near("[a-z*?{}\\[\\],!/.-]{1,20}")) {
        let name = "ghcr.io/acme/app".parse().unwrap();
        invariants::pattern(&random, &name);
        invariants::pattern(&shaped, &name);
    }

    #[test]
    fn hosts_files(bytes: Vec<u8>, near in near_any(&HOSTS)) {
        for registry in ["r.test:5000", "docker.io", "[::1]:5000"] {
            invariants::hosts_file(&bytes, &registry.parse().unwrap());
            invariants::hosts_file(near.as_bytes(), &registry.parse().unwrap());
        }
    }

    #[test]
    fn containerd_configurations(random in "[ -~\n]{0,60}", near in near_any(&CONTAINERD)) {
        invariants::containerd_configuration(&random);
        invariants::containerd_configuration(&near);
    }

    #[test]
    fn configurations(random in "[ -~\n]{0,60}", near in near_any(&CONFIGURATIONS)) {
        invariants::configuration(&random);
        invariants::configuration(&near);
    }

    #[test]
    fn frames_of_the_gossip(bytes: Vec<u8>, frame in frames(), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        invariants::gossip(&bytes);
        let mut bytes = wire::encode(&frame).to_vec();
        for (index, byte) in changes {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
        }
        invariants::gossip(&bytes);
    }

    #[test]
    fn certificates(bytes: Vec<u8>, cluster in "[a-z._-]{1,63}", not_after: u64, changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        invariants::certificate(&bytes);
        let key = Key::derive(&[1; 32]).unwrap();
        let mut bytes = Certificate::new(&key, &cluster, &PEER.parse().unwrap(), not_after).encode();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        invariants::certificate(&bytes);
    }

    #[test]
    fn control_messages(bytes: Vec<u8>, message in messages(), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        invariants::message(&bytes);
        let mut bytes = encode(&message);
        invariants::message(&bytes);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        invariants::message(&bytes);
    }
}

/// A changed certificate is refused, or says what its key has signed: no change of a bit goes by.
#[test]
fn the_signature_covers_all_that_a_certificate_says() {
    let (key, peer) = (Key::derive(&[1; 32]).unwrap(), PEER.parse().unwrap());
    let right = Certificate::new(&key, "default", &peer, 1_800_000_000);
    let bytes = right.encode();
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        if let Ok(read) = certificate::decode(&changed)
            && read.verify([&key], "default", &peer, 1_799_990_000).is_ok()
        {
            assert_eq!(read, right, "bit {bit}");
        }
    }
}

/// The texts that the others are made of are right themselves, so that their neighbours are near.
#[test]
fn the_seeds_are_right() {
    for text in CONFIGURATIONS {
        let inputs = peili::config::Inputs { path: Some("c.yaml".into()), ..Default::default() };
        inputs.parse(Some(text)).unwrap_or_else(|error| panic!("{error}"));
    }
    for text in CONTAINERD {
        peili::configure::runtime::parse(text).unwrap();
    }
    for text in HOSTS {
        let folder = std::path::Path::new("/certs.d/a");
        peili::upstream::hosts::parse(folder, text.as_bytes(), &"r.test".parse().unwrap()).unwrap();
    }
}
