//! The messages of `/peili/control/1`: their protobuf form, and the bounded, pure decoder.
//!
//! One message each way per stream. Unknown fields are ignored, so fields can be added within the version; there are
//! no repeated fields, so that a message takes little more memory decoded than it takes on the wire. In the wire
//! form, addresses are one comma-separated text and digests are their raw bytes, one after the other.

use std::net::SocketAddr;

use prost::Message as _;

use crate::network::admission::certificate;
use crate::oci::{Algorithm, Descriptor, Digest, Reference};

/// Longest message: a page of 8,192 sha512 digests is half of it.
pub const MESSAGE_LIMIT: usize = 1 << 20;
/// Digests in one message.
pub(super) const PAGE: usize = 8192;
/// Longest claimed text.
const TEXT_LIMIT: usize = 256;
/// Addresses that a peer may claim for one port; more are ignored.
pub(super) const ADDRESS_LIMIT: usize = 8;
/// Longest list of addresses: eight of the longest form of IPv6 with a port, and some room.
const ADDRESSES_LIMIT: usize = 1024;
/// Registry (261), repository (255), tag (128), sha512 digest (135) and separators.
const NAME_LIMIT: usize = 800;

/// A message of the control protocol, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Request: who this is, and what it has of the receiver's inventory. Answered by [`Message::State`].
    Hello(Hello),
    /// Request: part of the sender's inventory. Answered by [`Message::State`].
    Inventory(Inventory),
    /// Request: what the name means to the receiver. Answered by [`Message::Resolved`].
    Resolve(Reference),
    /// Request: the sender goes away on purpose. Answered by [`Message::State`].
    Leaving,
    /// Answer: what this node has of the other's inventory.
    State(State),
    /// Answer: what the name means; `None`: not known here.
    Resolved(Option<Descriptor>),
    /// Answer: the peer is not trusted for that.
    Denied,
}

/// A node's record of itself. The peer ID is the connection's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// New with each start of the process; not zero.
    pub incarnation: u64,
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
    /// What the sender has of the receiver's inventory.
    pub have: Position,
    /// Its membership certificate, at most [`certificate::LIMIT`] bytes; empty: it has none.
    pub certificate: Vec<u8>,
    /// The certificate is all that it says: it does not know yet whether the receiver is a member.
    pub introduction: bool,
}

/// A state of an inventory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The owner's incarnation; zero: nothing is known.
    pub incarnation: u64,
    /// Counts the owner's changes.
    pub version: u64,
}

/// An answer about the state of an inventory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What is in force.
    pub have: Position,
    /// Pages of a whole inventory that lie ready until the last one is there.
    pub pages: u32,
}

/// A page of a whole inventory, or a change of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The sender's incarnation.
    pub incarnation: u64,
    /// Version that a change applies to; no meaning in a page.
    pub from: u64,
    /// Version that is reached by it.
    pub to: u64,
    /// `None`: a change. Otherwise the page's number, from 0.
    pub page: Option<u32>,
    /// Whether it is the last page.
    pub last: bool,
    /// Held from now on.
    pub added: Vec<Digest>,
    /// No longer held.
    pub removed: Vec<Digest>,
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
    match wire::Envelope::decode(bytes)?.body.ok_or(DecodeError::Unknown)? {
        wire::Body::Hello(hello) => Ok(Message::Hello(Hello {
            incarnation: nonzero(hello.incarnation)?,
            node: text("node", hello.node)?,
            zone: text("zone", hello.zone)?,
            version: text("version", hello.version)?,
            transfer: addresses("transfer", &hello.transfer)?,
            control: addresses("control", &hello.control)?,
            have: Position { incarnation: hello.have_incarnation, version: hello.have_version },
            certificate: match hello.certificate {
                certificate if certificate.len() > certificate::LIMIT => {
                    return Err(DecodeError::Field("certificate"));
                }
                certificate => certificate,
            },
            introduction: hello.introduction,
        })),
        wire::Body::Inventory(inventory) => {
            let added = digests("added", &inventory.added_sha256, &inventory.added_sha512)?;
            let removed = digests("removed", &inventory.removed_sha256, &inventory.removed_sha512)?;
            if added.len() + removed.len() > PAGE {
                return Err(DecodeError::Field("added"));
            }
            Ok(Message::Inventory(Inventory {
                incarnation: nonzero(inventory.incarnation)?,
                from: inventory.from,
                to: inventory.to,
                page: inventory.page,
                last: inventory.last,
                added,
                removed,
            }))
        }
        wire::Body::Resolve(resolve) => {
            if resolve.name.len() > NAME_LIMIT {
                return Err(DecodeError::Field("name"));
            }
            let name = Reference::parse_full(&resolve.name).map_err(|_| DecodeError::Field("name"))?;
            Ok(Message::Resolve(name))
        }
        wire::Body::Leaving(wire::Empty {}) => Ok(Message::Leaving),
        wire::Body::State(state) => Ok(Message::State(State {
            have: Position { incarnation: state.have_incarnation, version: state.have_version },
            pages: state.pages,
        })),
        wire::Body::Resolved(resolved) if resolved.digest.is_empty() => Ok(Message::Resolved(None)),
        wire::Body::Resolved(resolved) => {
            let digest = resolved.digest.parse().map_err(|_| DecodeError::Field("digest"))?;
            Ok(Message::Resolved(Some(Descriptor::new(digest, resolved.size, &resolved.media_type))))
        }
        wire::Body::Denied(wire::Empty {}) => Ok(Message::Denied),
    }
}

/// The wire form.
pub fn encode(message: &Message) -> Vec<u8> {
    let body = match message {
        Message::Hello(hello) => wire::Body::Hello(wire::Hello {
            incarnation: hello.incarnation,
            node: hello.node.clone(),
            zone: hello.zone.clone(),
            version: hello.version.clone(),
            transfer: join(&hello.transfer),
            control: join(&hello.control),
            have_incarnation: hello.have.incarnation,
            have_version: hello.have.version,
            certificate: hello.certificate.clone(),
            introduction: hello.introduction,
        }),
        Message::Inventory(inventory) => wire::Body::Inventory(wire::Inventory {
            incarnation: inventory.incarnation,
            from: inventory.from,
            to: inventory.to,
            page: inventory.page,
            last: inventory.last,
            added_sha256: concatenate(Algorithm::Sha256, &inventory.added),
            added_sha512: concatenate(Algorithm::Sha512, &inventory.added),
            removed_sha256: concatenate(Algorithm::Sha256, &inventory.removed),
            removed_sha512: concatenate(Algorithm::Sha512, &inventory.removed),
        }),
        Message::Resolve(name) => wire::Body::Resolve(wire::Resolve { name: name.to_string() }),
        Message::Leaving => wire::Body::Leaving(wire::Empty {}),
        Message::State(state) => wire::Body::State(wire::State {
            have_incarnation: state.have.incarnation,
            have_version: state.have.version,
            pages: state.pages,
        }),
        Message::Resolved(None) => wire::Body::Resolved(wire::Resolved::default()),
        Message::Resolved(Some(descriptor)) => wire::Body::Resolved(wire::Resolved {
            digest: descriptor.digest.to_string(),
            size: descriptor.size,
            media_type: descriptor.media_type.to_string(),
        }),
        Message::Denied => wire::Body::Denied(wire::Empty {}),
    };
    wire::Envelope { body: Some(body) }.encode_to_vec()
}

/// A claimed text as a peer may send it: what is too long is cut, control characters are dropped.
pub(super) fn clean(text: &str) -> String {
    let mut clean: String = text.chars().filter(|c| !c.is_control()).collect();
    while clean.len() > TEXT_LIMIT {
        clean.pop();
    }
    clean
}

fn text(field: &'static str, text: String) -> Result<String, DecodeError> {
    if text.len() > TEXT_LIMIT || text.chars().any(char::is_control) {
        return Err(DecodeError::Field(field));
    }
    Ok(text)
}

fn nonzero(incarnation: u64) -> Result<u64, DecodeError> {
    if incarnation == 0 { Err(DecodeError::Field("incarnation")) } else { Ok(incarnation) }
}

fn addresses(field: &'static str, text: &str) -> Result<Vec<SocketAddr>, DecodeError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    if text.len() > ADDRESSES_LIMIT {
        return Err(DecodeError::Field(field));
    }
    let parse = |address: &str| match address.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err(DecodeError::Field(field)),
    };
    text.split(',').take(ADDRESS_LIMIT).map(parse).collect()
}

fn join(addresses: &[SocketAddr]) -> String {
    let texts: Vec<String> = addresses.iter().take(ADDRESS_LIMIT).map(ToString::to_string).collect();
    texts.join(",")
}

fn digests(field: &'static str, sha256: &[u8], sha512: &[u8]) -> Result<Vec<Digest>, DecodeError> {
    let mut digests = Vec::with_capacity(sha256.len() / 32 + sha512.len() / 64);
    for (algorithm, bytes) in [(Algorithm::Sha256, sha256), (Algorithm::Sha512, sha512)] {
        for bytes in bytes.chunks(algorithm.size()) {
            digests.push(Digest::from_bytes(algorithm, bytes).ok_or(DecodeError::Field(field))?);
        }
    }
    Ok(digests)
}

fn concatenate(algorithm: Algorithm, digests: &[Digest]) -> Vec<u8> {
    let of_it = digests.iter().filter(|digest| digest.algorithm() == algorithm);
    of_it.flat_map(Digest::as_bytes).copied().collect()
}

/// Field numbers are for ever: a number that falls out of use is never used again.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Envelope {
        #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7")]
        pub body: Option<Body>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Body {
        #[prost(message, tag = "1")]
        Hello(Hello),
        #[prost(message, tag = "2")]
        Inventory(Inventory),
        #[prost(message, tag = "3")]
        Resolve(Resolve),
        #[prost(message, tag = "4")]
        Leaving(Empty),
        #[prost(message, tag = "5")]
        State(State),
        #[prost(message, tag = "6")]
        Resolved(Resolved),
        #[prost(message, tag = "7")]
        Denied(Empty),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Empty {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Hello {
        #[prost(fixed64, tag = "1")]
        pub incarnation: u64,
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
        #[prost(fixed64, tag = "7")]
        pub have_incarnation: u64,
        #[prost(uint64, tag = "8")]
        pub have_version: u64,
        #[prost(bytes = "vec", tag = "9")]
        pub certificate: Vec<u8>,
        #[prost(bool, tag = "10")]
        pub introduction: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Inventory {
        #[prost(fixed64, tag = "1")]
        pub incarnation: u64,
        #[prost(uint64, tag = "2")]
        pub from: u64,
        #[prost(uint64, tag = "3")]
        pub to: u64,
        #[prost(uint32, optional, tag = "4")]
        pub page: Option<u32>,
        #[prost(bool, tag = "5")]
        pub last: bool,
        #[prost(bytes = "vec", tag = "6")]
        pub added_sha256: Vec<u8>,
        #[prost(bytes = "vec", tag = "7")]
        pub added_sha512: Vec<u8>,
        #[prost(bytes = "vec", tag = "8")]
        pub removed_sha256: Vec<u8>,
        #[prost(bytes = "vec", tag = "9")]
        pub removed_sha512: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resolve {
        #[prost(string, tag = "1")]
        pub name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct State {
        #[prost(fixed64, tag = "1")]
        pub have_incarnation: u64,
        #[prost(uint64, tag = "2")]
        pub have_version: u64,
        #[prost(uint32, tag = "3")]
        pub pages: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resolved {
        #[prost(string, tag = "1")]
        pub digest: String,
        #[prost(uint64, tag = "2")]
        pub size: u64,
        #[prost(string, tag = "3")]
        pub media_type: String,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let digests = |n: u8| vec![Digest::sha256(&[n]), Digest::of(Algorithm::Sha512, &[n])];
        for message in [
            Message::Hello(Hello {
                incarnation: 1,
                node: "node-1".into(),
                zone: "é".into(),
                version: "0.1.0".into(),
                transfer: vec!["0.0.0.0:5002".parse().unwrap(), "[2001:db8::1]:5002".parse().unwrap()],
                control: Vec::new(),
                have: Position { incarnation: 2, version: 3 },
                certificate: vec![1; certificate::LIMIT],
                introduction: true,
            }),
            Message::Inventory(Inventory {
                incarnation: 1,
                from: 4,
                to: 5,
                page: Some(0),
                last: true,
                added: digests(1),
                removed: digests(2),
            }),
            Message::Resolve("ghcr.io/a/b:v1".parse().unwrap()),
            Message::Leaving,
            Message::State(State { have: Position { incarnation: 7, version: 8 }, pages: 9 }),
            Message::Resolved(None),
            Message::Resolved(Some(Descriptor::new(Digest::sha256(b""), 5, "application/json"))),
            Message::Denied,
        ] {
            assert_eq!(decode(&encode(&message)).unwrap(), message);
        }
    }

    #[test]
    fn refuses_what_a_peer_must_not_send() {
        let hello = |change: fn(&mut Hello)| {
            let mut hello = Hello { incarnation: 1, ..Hello::default() };
            change(&mut hello);
            decode(&encode(&Message::Hello(hello)))
        };
        assert!(hello(|_| ()).is_ok());
        assert!(hello(|hello| hello.incarnation = 0).is_err());
        assert!(hello(|hello| hello.node = "x".repeat(257)).is_err());
        assert!(hello(|hello| hello.zone = "a\x1b[2J".into()).is_err());
        assert!(hello(|hello| hello.transfer = vec!["10.0.0.1:0".parse().unwrap()]).is_err());
        assert!(hello(|hello| hello.certificate = vec![0; certificate::LIMIT + 1]).is_err());
        assert!(matches!(decode(&vec![0; MESSAGE_LIMIT + 1]), Err(DecodeError::TooLong(_))));
        assert!(matches!(decode(&[]), Err(DecodeError::Unknown)));
        // Field 99, of a later version.
        assert!(matches!(decode(&[0x9a, 0x06, 0x00]), Err(DecodeError::Unknown)));
        let inventory = |added_sha256: Vec<u8>| {
            let inventory = wire::Inventory { incarnation: 1, added_sha256, ..wire::Inventory::default() };
            decode(&wire::Envelope { body: Some(wire::Body::Inventory(inventory)) }.encode_to_vec())
        };
        assert!(inventory(vec![0; 64]).is_ok());
        assert!(inventory(vec![0; 65]).is_err());
        assert!(inventory(vec![0; 32 * (PAGE + 1)]).is_err());
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let mut bytes = encode(&Message::Leaving);
        bytes.extend([0x9a, 0x06, 0x00]);
        assert_eq!(decode(&bytes).unwrap(), Message::Leaving);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
