//! The messages of `/peili/control/1`: their protobuf form, and the bounded, pure decoder.
//!
//! One message each way per stream. Unknown fields are ignored, so fields can be added within the version. In the wire
//! form, addresses are one comma-separated text. What the gossip says has frames of its own (`network::gossip::wire`).

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

use crate::network::admission::certificate;
use crate::network::gossip::wire::RECORD_LIMIT;
use crate::network::{TagQuestion, Tagged, claim, versions};
use crate::oci::{Descriptor, Digest, Reference};

/// Longest message: the records of some that hold a content.
pub const MESSAGE_LIMIT: usize = 32 << 10;
/// Holders in one answer: one of them answers for sure.
pub(super) const HOLDERS: usize = 16;
/// Registry (261), repository (255), tag (128), sha512 digest (135) and separators.
const NAME_LIMIT: usize = 800;

/// A message of the control protocol, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Request: who this is. Answered by [`Message::Heard`].
    Hello(Hello),
    /// Request: what the name means to the receiver. Answered by [`Message::Resolved`].
    Resolve(TagQuestion),
    /// Request: who holds the content, by the view of the receiver. Answered by [`Message::Held`].
    Holders(Digest),
    /// Answer: that was heard.
    Heard,
    /// Answer: signed records of some that hold it, as the gossip carries them.
    Held(Vec<Bytes>),
    /// Answer: what the name means; `None`: not known here.
    Resolved(Option<Tagged>),
    /// Answer: the peer is not trusted for that.
    Denied,
}

/// A node's record of itself. The peer ID is the connection's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Kubernetes node name.
    pub node: String,
    /// Zone.
    pub zone: String,
    /// Peili's version.
    pub version: String,
    /// Where its peer port listens; an unspecified address stands for the one it is seen at.
    pub transfer: Vec<SocketAddr>,
    /// The same for its control plane.
    pub control: Vec<SocketAddr>,
    /// Its membership certificate, at most [`certificate::LIMIT`] bytes; empty: it has none.
    pub certificate: Vec<u8>,
    /// The certificate is all that it says: it does not know yet whether the receiver is a member.
    pub introduction: bool,
}

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`MESSAGE_LIMIT`].
    #[error("a message of {0} bytes is too long")]
    TooLong(usize),
    /// Not protobuf.
    #[error("not a protobuf message: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A kind of message that this version does not know.
    #[error("a message of an unknown kind")]
    Unknown,
    /// A field with a value that it cannot have.
    #[error("the field `{0}` has an impossible value")]
    Field(&'static str),
}

/// Decodes a message from a peer.
pub fn decode(bytes: &[u8]) -> Result<Message, DecodeError> {
    if bytes.len() > MESSAGE_LIMIT {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let text = |field, claimed| claim::text(claimed).ok_or(DecodeError::Field(field));
    let addresses = |field, claimed: &str| claim::addresses(claimed).ok_or(DecodeError::Field(field));
    match wire::Envelope::decode(bytes)?.body.ok_or(DecodeError::Unknown)? {
        wire::Body::Hello(hello) => Ok(Message::Hello(Hello {
            node: text("node", hello.node)?,
            zone: text("zone", hello.zone)?,
            version: text("version", hello.version)?,
            transfer: addresses("transfer", &hello.transfer)?,
            control: addresses("control", &hello.control)?,
            certificate: match hello.certificate {
                certificate if certificate.len() > certificate::LIMIT => {
                    return Err(DecodeError::Field("certificate"));
                }
                certificate => certificate,
            },
            introduction: hello.introduction,
        })),
        wire::Body::Resolve(resolve) => {
            if resolve.name.len() > NAME_LIMIT {
                return Err(DecodeError::Field("name"));
            }
            let name = Reference::parse_full(&resolve.name).map_err(|_| DecodeError::Field("name"))?;
            Ok(Message::Resolve(TagQuestion { name, home: resolve.home_ms.map(Duration::from_millis) }))
        }
        wire::Body::Heard(wire::Empty {}) => Ok(Message::Heard),
        wire::Body::Holders(asked) => {
            let digest = asked.digest.parse().map_err(|_| DecodeError::Field("digest"))?;
            Ok(Message::Holders(digest))
        }
        wire::Body::Held(held) => {
            let fit = held.records.len() <= HOLDERS;
            let fit = fit && held.records.iter().all(|record| record.len() <= RECORD_LIMIT);
            if fit { Ok(Message::Held(held.records)) } else { Err(DecodeError::Field("records")) }
        }
        wire::Body::Resolved(resolved) if resolved.digest.is_empty() => Ok(Message::Resolved(None)),
        wire::Body::Resolved(resolved) => {
            let digest = resolved.digest.parse().map_err(|_| DecodeError::Field("digest"))?;
            let target = Descriptor::new(digest, resolved.size, &resolved.media_type);
            Ok(Message::Resolved(Some(Tagged { target, age: resolved.age_ms.map(Duration::from_millis) })))
        }
        wire::Body::Denied(wire::Empty {}) => Ok(Message::Denied),
    }
}

/// The wire form.
pub fn encode(message: &Message) -> Vec<u8> {
    let body = match message {
        Message::Hello(hello) => wire::Body::Hello(wire::Hello {
            node: hello.node.clone(),
            zone: hello.zone.clone(),
            version: hello.version.clone(),
            transfer: claim::join(&hello.transfer),
            control: claim::join(&hello.control),
            certificate: hello.certificate.clone(),
            introduction: hello.introduction,
        }),
        Message::Resolve(TagQuestion { name, home }) => {
            wire::Body::Resolve(wire::Resolve { name: name.to_string(), home_ms: home.map(millis) })
        }
        Message::Heard => wire::Body::Heard(wire::Empty {}),
        Message::Holders(digest) => wire::Body::Holders(wire::Holders { digest: digest.to_string() }),
        Message::Held(records) => wire::Body::Held(wire::Held { records: records.clone() }),
        Message::Resolved(None) => wire::Body::Resolved(wire::Resolved::default()),
        Message::Resolved(Some(Tagged { target, age })) => wire::Body::Resolved(wire::Resolved {
            digest: target.digest.to_string(),
            size: target.size,
            media_type: target.media_type.to_string(),
            age_ms: age.map(millis),
        }),
        Message::Denied => wire::Body::Denied(wire::Empty {}),
    };
    versions::besides(wire::Envelope { body: Some(body) }.encode_to_vec())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Field numbers are for ever: a number that falls out of use is never used again.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Envelope {
        #[prost(oneof = "Body", tags = "1, 3, 5, 6, 7, 8, 9")]
        pub body: Option<Body>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Body {
        #[prost(message, tag = "1")]
        Hello(Hello),
        #[prost(message, tag = "3")]
        Resolve(Resolve),
        #[prost(message, tag = "5")]
        Heard(Empty),
        #[prost(message, tag = "6")]
        Resolved(Resolved),
        #[prost(message, tag = "7")]
        Denied(Empty),
        #[prost(message, tag = "8")]
        Holders(Holders),
        #[prost(message, tag = "9")]
        Held(Held),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Empty {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Hello {
        #[prost(string, tag = "2")]
        pub node: String,
        #[prost(string, tag = "3")]
        pub zone: String,
        #[prost(string, tag = "4")]
        pub version: String,
        #[prost(string, tag = "5")]
        pub transfer: String,
        #[prost(string, tag = "6")]
        pub control: String,
        #[prost(bytes = "vec", tag = "9")]
        pub certificate: Vec<u8>,
        #[prost(bool, tag = "10")]
        pub introduction: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resolve {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(uint64, optional, tag = "2")]
        pub home_ms: Option<u64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Holders {
        #[prost(string, tag = "1")]
        pub digest: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Held {
        #[prost(bytes = "bytes", repeated, tag = "1")]
        pub records: Vec<bytes::Bytes>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resolved {
        #[prost(string, tag = "1")]
        pub digest: String,
        #[prost(uint64, tag = "2")]
        pub size: u64,
        #[prost(string, tag = "3")]
        pub media_type: String,
        #[prost(uint64, optional, tag = "4")]
        pub age_ms: Option<u64>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        for message in [
            Message::Hello(Hello {
                node: "node-1".into(),
                zone: "é".into(),
                version: "0.1.0".into(),
                transfer: vec!["0.0.0.0:5002".parse().unwrap(), "[2001:db8::1]:5002".parse().unwrap()],
                control: Vec::new(),
                certificate: vec![1; certificate::LIMIT],
                introduction: true,
            }),
            Message::Resolve(TagQuestion { name: "ghcr.io/a/b:v1".parse().unwrap(), home: None }),
            Message::Resolve(TagQuestion {
                name: "ghcr.io/a/b:v1".parse().unwrap(),
                home: Some(Duration::from_millis(60_001)),
            }),
            Message::Holders(Digest::of(crate::oci::Algorithm::Sha512, b"x")),
            Message::Heard,
            Message::Held(vec![Bytes::from_static(b"a record"), Bytes::new()]),
            Message::Resolved(None),
            Message::Resolved(Some(Tagged {
                target: Descriptor::new(Digest::sha256(b""), 5, "application/json"),
                age: None,
            })),
            Message::Resolved(Some(Tagged {
                target: Descriptor::new(Digest::sha256(b""), 5, "application/json"),
                age: Some(Duration::ZERO),
            })),
            Message::Denied,
        ] {
            assert_eq!(decode(&encode(&message)).unwrap(), message);
        }
    }

    #[test]
    fn refuses_what_a_peer_must_not_send() {
        let hello = |change: fn(&mut Hello)| {
            let mut hello = Hello::default();
            change(&mut hello);
            decode(&encode(&Message::Hello(hello)))
        };
        assert!(hello(|_| ()).is_ok());
        assert!(hello(|hello| hello.node = "x".repeat(257)).is_err());
        assert!(hello(|hello| hello.zone = "a\x1b[2J".into()).is_err());
        assert!(hello(|hello| hello.transfer = vec!["10.0.0.1:0".parse().unwrap()]).is_err());
        assert!(hello(|hello| hello.certificate = vec![0; certificate::LIMIT + 1]).is_err());
        assert!(matches!(decode(&vec![0; MESSAGE_LIMIT + 1]), Err(DecodeError::TooLong(_))));
        assert!(matches!(decode(&[]), Err(DecodeError::Unknown)));
        // Field 99, of a later version.
        assert!(matches!(decode(&[0x9a, 0x06, 0x00]), Err(DecodeError::Unknown)));
        let held = |records| decode(&encode(&Message::Held(records)));
        assert!(held(vec![Bytes::new(); HOLDERS]).is_ok());
        assert!(held(vec![Bytes::new(); HOLDERS + 1]).is_err());
        assert!(held(vec![vec![0; RECORD_LIMIT + 1].into()]).is_err());
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let mut bytes = encode(&Message::Heard);
        bytes.extend([0x9a, 0x06, 0x00]);
        assert_eq!(decode(&bytes).unwrap(), Message::Heard);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
