//! A cluster key: read from a file, and what is derived from it. Its bytes are never logged and never sent.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, ParsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::network::identity;
use crate::oci::{Digest, KeyId};

/// Fewer bytes could be guessed.
pub const SHORTEST: usize = 32;
/// Far above what any key needs.
pub const LONGEST: usize = 4096;
/// Separates this use of the file's bytes from all others; the number is the version of the protocol.
const SALT: &[u8] = b"peili cluster key";
const INFO: &[u8] = b"peili membership 1 ed25519";
const SECRET_INFO: &[u8] = b"peili election policies 1";

/// A key that signs and verifies membership certificates.
pub struct Key {
    id: KeyId,
    pair: Ed25519KeyPair,
    public: ParsedPublicKey,
    secret: Zeroizing<[u8; 32]>,
}

/// Why a file gives no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It is not there, or cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is a folder, a pipe or the like.
    #[error("it is not a regular file")]
    NotFile,
    /// Fewer than [`SHORTEST`] bytes; the line break at its end does not count.
    #[error(
        "it has {0} bytes, a cluster key has at least {SHORTEST}: `peili cluster-key generate` makes one"
    )]
    Short(usize),
    /// More than [`LONGEST`] bytes.
    #[error("it is larger than 4 KiB, which no cluster key is")]
    Long,
    /// The cryptography library refused, for which no reason is known.
    #[error("no key can be derived from it")]
    Derive,
}

impl Key {
    /// Reads a key file. Blocks on the disk.
    ///
    /// # Errors
    /// It is no key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let file = identity::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(KeyError::NotFile);
        }
        // As large as it may get from the start: growing would leave copies behind.
        let mut content = Zeroizing::new(Vec::with_capacity(LONGEST + 2));
        file.take(LONGEST as u64 + 1).read_to_end(&mut content)?;
        Self::derive(&content)
    }

    /// The key of a file with this content.
    ///
    /// # Errors
    /// It is too short or too long.
    pub fn derive(content: &[u8]) -> Result<Self, KeyError> {
        if content.len() > LONGEST {
            return Err(KeyError::Long);
        }
        let secret = content.strip_suffix(b"\n").unwrap_or(content);
        let secret = secret.strip_suffix(b"\r").unwrap_or(secret);
        if secret.len() < SHORTEST {
            return Err(KeyError::Short(secret.len()));
        }
        let (mut seed, mut shared) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 32]));
        let extracted = Salt::new(HKDF_SHA256, SALT).extract(secret);
        for (info, bytes) in [([INFO], &mut *seed), ([SECRET_INFO], &mut *shared)] {
            let derived = extracted.expand(&info, HKDF_SHA256).and_then(|derived| derived.fill(bytes));
            derived.map_err(|_| KeyError::Derive)?;
        }
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).map_err(|_| KeyError::Derive)?;
        let bytes = pair.public_key().as_ref();
        let public = ParsedPublicKey::new(&ED25519, bytes).map_err(|_| KeyError::Derive)?;
        let mut id = [0; 8];
        id.copy_from_slice(&Digest::sha256(bytes).as_bytes()[..8]);
        Ok(Self { id: KeyId(id), pair, public, secret: shared })
    }

    /// Its name.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// What members know and nobody else, for hashes of what they have in common.
    pub(super) fn secret(&self) -> Zeroizing<[u8; 32]> {
        self.secret.clone()
    }

    pub(super) fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }

    pub(super) fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.public.verify_sig(message, signature).is_ok()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The content of a new key file: 32 random bytes as one line of base64, since a Secret is easily made from a text.
///
/// # Errors
/// The system gives no random bytes.
pub fn generate() -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new([0; SHORTEST]);
    rand::fill(&mut *bytes).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    let mut line = Zeroizing::new(String::with_capacity(64));
    STANDARD.encode_string(*bytes, &mut line);
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded: a version that derives another key from the same file would split every cluster.
    #[test]
    fn the_same_file_gives_the_same_key_in_every_version() {
        let content: Vec<u8> = (0..32).collect();
        assert_eq!(Key::derive(&content).unwrap().id().to_string(), "43a844d5f28eedd6");
    }

    #[test]
    fn only_what_is_long_enough_is_a_key() {
        let check = |content: &[u8], expected: &str| {
            let found = match Key::derive(content) {
                Ok(_) => String::new(),
                Err(error) => error.to_string(),
            };
            assert!(found.contains(expected) && found.is_empty() == expected.is_empty(), "{found}");
        };
        check(&[b'x'; 32], "");
        check(&[b'x'; LONGEST], "");
        check(&[b'x'; LONGEST + 1], "larger than 4 KiB");
        check(&[b'x'; 31], "it has 31 bytes, a cluster key has at least 32");
        check(&[[b'x'; 31].as_slice(), b"\n"].concat(), "31 bytes");
        check(b"", "it has 0 bytes");
        let ids = |content: &[u8]| Key::derive(content).unwrap().id();
        let key = [b'x'; 40];
        for end in ["\n", "\r\n"] {
            assert_eq!(ids(&[&key, end.as_bytes()].concat()), ids(&key), "an editor's line break");
        }
        assert_ne!(ids(&[&key[..], b"y"].concat()), ids(&key));
    }

    #[test]
    fn files_are_read_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(matches!(Key::read(&path), Err(KeyError::Read(_))));
        assert!(matches!(Key::read(dir.path()), Err(KeyError::NotFile)));
        let line = generate().unwrap();
        assert_eq!(line.len(), 45);
        std::fs::write(&path, line.as_bytes()).unwrap();
        assert_eq!(Key::read(&path).unwrap().id(), Key::derive(line.as_bytes()).unwrap().id());
        assert_ne!(line, generate().unwrap());
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert!(matches!(Key::read(&path), Err(KeyError::Long)));
        let key = Key::derive(&[7; 32]).unwrap();
        assert_eq!(format!("{key:?}"), format!("Key {{ id: {}, .. }}", key.id()));
    }
}
