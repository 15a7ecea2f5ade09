//! How a peer proved that it belongs to the cluster, and who takes note of it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::PeerId;

/// Names a cluster key without telling it: the first eight bytes of the SHA-256 of the public key that is derived from
/// it. Its text form is hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub [u8; 8]);

/// By what a peer has its level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proof {
    /// By nothing: it has none.
    #[default]
    None,
    /// The configuration lists it.
    Listed,
    /// It showed a certificate that this cluster key signed, and its time is not over.
    Key(KeyId),
    /// The network is open: nobody needs a proof.
    Open,
    /// The configuration denies it, whatever it shows.
    Denied,
}

/// Takes note of peers that proved their membership by a cluster key; implemented by `trust`, told by `network`.
pub trait Members: Send + Sync {
    /// `peer` showed a certificate that `key` signed and that is good for `time` from now. `false`: it is denied all the
    /// same.
    fn admit(&self, peer: &PeerId, key: KeyId, time: Duration) -> bool;

    /// Forgets whose time is over and whom a key other than `keys` admitted; `true`: there were some.
    fn sweep(&self, keys: &[KeyId]) -> bool;
}

/// A text that cannot be a key ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key ID is 16 hexadecimal digits")]
pub struct KeyIdError;

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, KeyIdError> {
        let digits = text.len() == 16 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        let number = u64::from_str_radix(text, 16).ok().filter(|_| digits).ok_or(KeyIdError)?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// As the status shows it; empty: none.
impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Listed => f.write_str("listed"),
            Self::Key(key) => write!(f, "key {key}"),
            Self::Open => f.write_str("open"),
            Self::Denied => f.write_str("denied"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_have_one_text() {
        let key = KeyId([0, 1, 2, 3, 4, 5, 0xab, 0xff]);
        assert_eq!(key.to_string(), "000102030405abff");
        assert_eq!("000102030405abff".parse(), Ok(key));
        for bad in ["", "000102030405ABFF", "+00102030405abff", "000102030405abff0"] {
            assert_eq!(bad.parse::<KeyId>(), Err(KeyIdError), "{bad}");
        }
        assert_eq!(Proof::Key(key).to_string(), "key 000102030405abff");
    }
}
