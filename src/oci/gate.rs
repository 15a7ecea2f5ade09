//! How far a peer is trusted, and the question that every enforcement point asks.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{Name, Proof};

/// The identity of a node: a libp2p peer ID in its base58 text form. That it is this peer is proved by the connection.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(Arc<str>);

/// A text that cannot be a peer ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a peer ID is 40 to 64 base58 characters, such as 12D3KooW...; `peili identity` prints this node's")]
pub struct PeerIdError;

/// How far a peer is trusted; each level contains the ones below it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Not at all: connections are closed.
    #[default]
    None,
    /// Its membership records are read.
    Introduce,
    /// Content that is bound to a digest, manifests included, goes to it and comes from it.
    Blobs,
    /// It is also believed about which digest a tag stands for.
    Tags,
}

/// What is about to happen with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A connection with it is accepted or kept. Needs [`Level::Introduce`].
    Connect,
    /// What it says it holds is believed. Needs [`Level::Blobs`].
    Believe,
    /// Content held here is sent to it. Needs [`Level::Blobs`].
    Serve,
    /// Content is taken from it. Needs [`Level::Blobs`].
    Fetch,
    /// Its answer about a tag is taken, or it is told what a tag means here. Needs [`Level::Tags`].
    Tags,
}

/// What may be sent to a peer at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadLimits {
    /// Contents at the same time, as two segments each; `None`: as the configuration says.
    pub at_once: Option<u32>,
    /// Bytes a second, of all of them together; `None`: as the configuration says.
    pub per_second: Option<u64>,
}

/// Answers enforcement points; implemented by `trust`, wired by `app`. Must be a read of a table: it is called on hot
/// paths and must not block.
pub trait Gate: Send + Sync {
    /// The level at which `peer` may take part in `action`.
    fn level(&self, peer: &PeerId, action: Action) -> Level;

    /// Whether content that this node knows under `repository` may be sent to `peer`.
    fn serves(&self, peer: &PeerId, repository: &Name) -> bool;

    /// The same where the registry of `repository` has lost its port: content that is denied under any port is not sent.
    /// A gate that does not look at registries need not say more than [`Gate::serves`].
    fn serves_portless(&self, peer: &PeerId, repository: &Name) -> bool {
        self.serves(peer, repository)
    }

    /// What may be sent to `peer` at once, beside the limits of the configuration.
    fn upload_limits(&self, _peer: &PeerId) -> UploadLimits {
        UploadLimits::default()
    }

    /// Whether it is not decided yet what `peer`, a member, gets: it may get more in a moment.
    fn is_unjudged(&self, _peer: &PeerId) -> bool {
        false
    }

    /// By what `peer` has its level, for people.
    fn proof(&self, _peer: &PeerId) -> Proof {
        Proof::None
    }

    /// Whether `peer` may connect for one reason only, to prove that it is a member: until then it is told nothing and
    /// believed nothing, and it has little time.
    fn is_unproved(&self, peer: &PeerId) -> bool {
        self.allows(peer, Action::Connect) && self.level(peer, Action::Believe) == Level::None
    }

    /// Whether `peer` may take part in `action`: the level in force reaches the one that the action needs.
    fn allows(&self, peer: &PeerId, action: Action) -> bool {
        self.level(peer, action) >= action.needs()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Introduce => "introduce",
            Self::Blobs => "blobs",
            Self::Tags => "tags",
        })
    }
}

impl Action {
    /// The level that it needs.
    pub const fn needs(self) -> Level {
        match self {
            Self::Connect => Level::Introduce,
            Self::Believe | Self::Serve | Self::Fetch => Level::Blobs,
            Self::Tags => Level::Tags,
        }
    }
}

impl PeerId {
    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last eight characters, enough to tell peers apart in a table.
    pub fn short(&self) -> &str {
        &self.0[self.0.len() - 8..]
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        let base58 = |c: u8| c.is_ascii_alphanumeric() && !matches!(c, b'0' | b'O' | b'I' | b'l');
        if (40..=64).contains(&text.len()) && text.bytes().all(base58) {
            Ok(Self(text.into()))
        } else {
            Err(PeerIdError)
        }
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for PeerId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for PeerId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_actions_need_one() {
        assert!(
            Level::None < Level::Introduce && Level::Introduce < Level::Blobs && Level::Blobs < Level::Tags
        );
        assert_eq!(Action::Serve.needs(), Level::Blobs);
    }

    #[test]
    fn peer_ids_are_base58() {
        let id = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
        let peer: PeerId = id.parse().unwrap();
        assert_eq!((peer.as_str(), peer.short()), (id, "vnc6iDEp"));
        for bad in ["", "12D3", &id.replace('E', "0"), &format!("{id}{id}"), &id.replace('K', "é")] {
            assert_eq!(bad.parse::<PeerId>(), Err(PeerIdError), "{bad}");
        }
    }
}
