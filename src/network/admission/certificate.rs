//! The membership certificate: its bytes, its signature, and what must hold of it. Pure; time is a parameter.
//!
//! Protobuf on the wire, so that a later version can add fields, which are ignored here and which the signature does not
//! cover; what is signed is [`Certificate::signed`]. A later version that must not be ignored counts [`VERSION`] up.

use std::time::Duration;

use prost::Message as _;

use super::Refused;
use super::key::Key;
use crate::network::versions;
use crate::oci::{KeyId, PeerId};

/// The version of what a certificate says.
pub const VERSION: u32 = 1;
/// Longest encoded certificate: 63 bytes of cluster name, a peer ID of 64, the signature, and some room for fields to come.
pub const LIMIT: usize = 256;
/// How long a certificate is good from when it is made.
pub const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How far two nodes' clocks may be apart.
pub const SKEW: Duration = Duration::from_secs(3600);
/// Longest name of a cluster.
const CLUSTER_LIMIT: usize = 63;
/// Begins what is signed: no other use of the key can be taken for a certificate.
const DOMAIN: &[u8] = b"peili membership certificate\0";

/// What a key says of a peer: that it belongs to the cluster until then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Name of the cluster.
    pub cluster: String,
    /// Who belongs to it.
    pub peer: PeerId,
    /// The key that signed it.
    pub key: KeyId,
    /// Unix seconds at which it ends.
    pub not_after: u64,
    /// Ed25519 over [`Certificate::signed`].
    pub signature: [u8; 64],
}

/// Why bytes are no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`LIMIT`].
    #[error("{0} bytes are too long")]
    TooLong(usize),
    /// Not protobuf.
    #[error("not a protobuf message")]
    Protobuf,
    /// Of another version than [`VERSION`].
    #[error("version {0} is not known")]
    Version(u32),
    /// A field with a value that it cannot have.
    #[error("the field `{0}` has an impossible value")]
    Field(&'static str),
}

/// Whether `name` can name a cluster: it is shown, logged and compared.
pub fn is_cluster(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    (1..=CLUSTER_LIMIT).contains(&name.len()) && name.bytes().all(plain)
}

/// Decodes what a peer shows.
///
/// # Errors
/// It is no certificate of this version.
pub fn decode(bytes: &[u8]) -> Result<Certificate, DecodeError> {
    if bytes.len() > LIMIT {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let certificate = wire::Certificate::decode(bytes).map_err(|_| DecodeError::Protobuf)?;
    if certificate.version != VERSION {
        return Err(DecodeError::Version(certificate.version));
    }
    if !is_cluster(&certificate.cluster) {
        return Err(DecodeError::Field("cluster"));
    }
    Ok(Certificate {
        peer: certificate.peer.parse().map_err(|_| DecodeError::Field("peer"))?,
        key: KeyId(certificate.key.try_into().map_err(|_| DecodeError::Field("key"))?),
        not_after: certificate.not_after,
        signature: certificate.signature.try_into().map_err(|_| DecodeError::Field("signature"))?,
        cluster: certificate.cluster,
    })
}

impl Certificate {
    /// Signs that `peer` belongs to `cluster` until `not_after`, in Unix seconds.
    pub fn new(key: &Key, cluster: &str, peer: &PeerId, not_after: u64) -> Self {
        let mut certificate = Self {
            cluster: cluster.to_owned(),
            peer: peer.clone(),
            key: key.id(),
            not_after,
            signature: [0; 64],
        };
        certificate.signature = key.sign(&certificate.signed());
        certificate
    }

    /// The wire form.
    pub fn encode(&self) -> Vec<u8> {
        let certificate = wire::Certificate {
            version: VERSION,
            cluster: self.cluster.clone(),
            peer: self.peer.to_string(),
            key: self.key.0.to_vec(),
            not_after: self.not_after,
            signature: self.signature.to_vec(),
        };
        versions::besides(certificate.encode_to_vec())
    }

    /// For how long it is good from `now` on, in Unix seconds, if `peer`, who showed it, belongs to `cluster` by one of
    /// `keys`. That the one who showed it is `peer` is proved by the connection.
    ///
    /// # Errors
    /// Something does not hold of it.
    pub fn verify<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a Key>,
        cluster: &str,
        peer: &PeerId,
        now: u64,
    ) -> Result<Duration, Refused> {
        if self.cluster != cluster {
            return Err(Refused::Cluster { theirs: self.cluster.clone(), ours: cluster.to_owned() });
        }
        if self.peer != *peer {
            return Err(Refused::OtherPeer(self.peer.clone()));
        }
        let key = keys.into_iter().find(|key| key.id() == self.key).ok_or(Refused::Key(self.key))?;
        if !key.has_signed(&self.signed(), &self.signature) {
            return Err(Refused::Signature);
        }
        let end = self.not_after.saturating_add(SKEW.as_secs());
        if now >= end {
            return Err(Refused::Expired { ago: Duration::from_secs(now.saturating_sub(self.not_after)) });
        }
        let ahead = self.not_after.saturating_sub(now);
        if ahead > (LIFE + SKEW).as_secs() {
            return Err(Refused::TooLong { ahead: Duration::from_secs(ahead) });
        }
        Ok(Duration::from_secs(end - now))
    }

    /// What the signature is over: fixed lengths, or a length before what has none.
    fn signed(&self) -> Vec<u8> {
        let mut signed = DOMAIN.to_vec();
        signed.extend(VERSION.to_be_bytes());
        for text in [self.cluster.as_bytes(), self.peer.as_str().as_bytes()] {
            // Both are at most 64 bytes long.
            signed.extend((text.len() as u64).to_be_bytes());
            signed.extend(text);
        }
        signed.extend(self.key.0);
        signed.extend(self.not_after.to_be_bytes());
        signed
    }
}

/// Field numbers are for ever: a number that falls out of use is never used again.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Certificate {
        #[prost(uint32, tag = "1")]
        pub version: u32,
        #[prost(string, tag = "2")]
        pub cluster: String,
        #[prost(string, tag = "3")]
        pub peer: String,
        #[prost(bytes = "vec", tag = "4")]
        pub key: Vec<u8>,
        #[prost(fixed64, tag = "5")]
        pub not_after: u64,
        #[prost(bytes = "vec", tag = "6")]
        pub signature: Vec<u8>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    const OTHER: &str = "12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD";
    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 24 * 3600;

    fn key(byte: u8) -> Key {
        Key::derive(&[byte; 32]).unwrap()
    }

    fn peer(text: &str) -> PeerId {
        text.parse().unwrap()
    }

    fn certificate() -> Certificate {
        Certificate::new(&key(1), "default", &peer(PEER), NOW + DAY)
    }

    #[test]
    fn round_trips_and_stays_small() {
        let certificate = certificate();
        assert_eq!(decode(&certificate.encode()), Ok(certificate));
        let longest = peer(&"1".repeat(64));
        let largest = Certificate::new(&key(1), &"c".repeat(CLUSTER_LIMIT), &longest, u64::MAX);
        assert!(largest.encode().len() <= LIMIT, "{}", largest.encode().len());
        assert_eq!(decode(&largest.encode()), Ok(largest));
    }

    /// Recorded: what this version signs, later ones must read.
    #[test]
    fn the_bytes_of_version_1() {
        let bytes = certificate().encode();
        let recorded = concat!(
            "0801120764656661756c741a34313244334b6f6f5745796f70704e43557838597836366f5639664a",
            "6e726958774363587744445541326b6a36766e6336694445702208931492917c180dd12980234b6b",
            "000000003240b95b8ec365783cf66814f45dbc3d0fc53c87802d16a789f29c9d329abba5385f9e43",
            "3f1f78f5c170ae298d5c86d8acd19d9fea33be4f9c95e82e984305bf8002",
        );
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, recorded);
    }

    #[test]
    fn refuses_what_a_peer_must_not_send() {
        let wire = |change: fn(&mut wire::Certificate)| {
            let mut certificate = wire::Certificate::decode(&certificate().encode()[..]).unwrap();
            change(&mut certificate);
            decode(&certificate.encode_to_vec())
        };
        assert!(wire(|_| ()).is_ok());
        assert_eq!(wire(|certificate| certificate.version = 2), Err(DecodeError::Version(2)));
        assert_eq!(wire(|certificate| certificate.version = 0), Err(DecodeError::Version(0)));
        for cluster in ["", "a b", "a\x1b[2J", "é", &"c".repeat(64)] {
            let mut certificate = certificate();
            certificate.cluster = cluster.to_owned();
            assert_eq!(decode(&certificate.encode()), Err(DecodeError::Field("cluster")), "{cluster}");
        }
        assert_eq!(wire(|certificate| certificate.peer.clear()), Err(DecodeError::Field("peer")));
        assert_eq!(wire(|certificate| certificate.key.push(0)), Err(DecodeError::Field("key")));
        assert_eq!(wire(|certificate| certificate.signature.clear()), Err(DecodeError::Field("signature")));
        assert_eq!(decode(&[]), Err(DecodeError::Version(0)));
        assert_eq!(decode(&[0xff; 10]), Err(DecodeError::Protobuf));
        assert_eq!(decode(&[0; LIMIT + 1]), Err(DecodeError::TooLong(LIMIT + 1)));
        let mut later = certificate().encode();
        later.extend([0x9a, 0x06, 0x00]);
        assert_eq!(decode(&later), Ok(certificate()), "unknown fields are ignored");
    }

    /// Guards each check of [`Certificate::verify`].
    #[test]
    fn what_must_hold_of_it() {
        let good = certificate();
        let check = |certificate: &Certificate, keys: &[Key], cluster: &str, peer: &PeerId, now: u64| {
            certificate.verify(keys, cluster, peer, now)
        };
        let (keys, peer) = ([key(2), key(1)], peer(PEER));
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        assert_eq!(check(&good, &keys, "default", &peer, NOW), Ok(hours(25)));
        // As far as the clocks may be apart, either way.
        assert_eq!(check(&good, &keys, "default", &peer, NOW - 3600), Ok(hours(26)));
        assert!(check(&good, &keys, "default", &peer, NOW + DAY + 3599).is_ok());

        let refused = check(&good, &keys, "default", &peer, NOW + DAY + 3600);
        assert_eq!(refused, Err(Refused::Expired { ago: hours(1) }));
        let refused = check(&good, &keys, "default", &peer, NOW - 3601);
        assert_eq!(refused, Err(Refused::TooLong { ahead: hours(25) + Duration::from_secs(1) }));
        let refused = check(&good, &keys, "other", &peer, NOW);
        assert_eq!(refused, Err(Refused::Cluster { theirs: "default".into(), ours: "other".into() }));
        let refused = check(&good, &keys, "default", &OTHER.parse().unwrap(), NOW);
        assert_eq!(refused, Err(Refused::OtherPeer(peer.clone())));
        assert_eq!(check(&good, &[key(2)], "default", &peer, NOW), Err(Refused::Key(key(1).id())));
        assert_eq!(check(&good, &[], "default", &peer, NOW), Err(Refused::Key(key(1).id())));

        // Whatever is changed after it was signed.
        let changes: [fn(&mut Certificate); 4] = [
            |certificate| certificate.not_after += 1,
            |certificate| certificate.cluster = "other".into(),
            |certificate| certificate.peer = OTHER.parse().unwrap(),
            |certificate| certificate.signature[0] ^= 1,
        ];
        for change in changes {
            let mut forged = good.clone();
            change(&mut forged);
            let cluster = forged.cluster.clone();
            let refused = check(&forged, &keys, &cluster, &forged.peer, NOW);
            assert_eq!(refused, Err(Refused::Signature), "{forged:?}");
        }
        // Signed by one key in the name of another.
        let forged = Certificate { key: key(2).id(), ..good };
        assert_eq!(check(&forged, &keys, "default", &peer, NOW), Err(Refused::Signature));
    }
}
