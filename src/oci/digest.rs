//! Content digests: sha256 and sha512, the two algorithms that the OCI image specification registers.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest as hash;

/// A registered digest algorithm (OCI image specification, "Registered algorithms").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// `sha256`: 32 bytes.
    Sha256,
    /// `sha512`: 64 bytes.
    Sha512,
}

/// The digest of some content. Cheap to copy; two digests are equal only under the same algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    /// The first `algorithm.size()` bytes count, the rest are zero.
    bytes: [u8; 64],
}

/// Why a text is not a digest that Peili handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` before the hex part.
    #[error("a digest has the form algorithm:hex")]
    Form,
    /// An algorithm that the specification does not register.
    #[error("only sha256 and sha512 digests are supported")]
    Algorithm,
    /// Not the number of lower-case hex digits that the algorithm needs.
    #[error("the hex part of a digest must be 64 (sha256) or 128 (sha512) lower-case hex digits")]
    Hex,
}

/// Hashes content as it streams by.
pub struct Hasher {
    algorithm: Algorithm,
    context: hash::Context,
}

impl Algorithm {
    /// Length of a digest in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// Name as it stands before the colon.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn implementation(self) -> &'static hash::Algorithm {
        match self {
            Self::Sha256 => &hash::SHA256,
            Self::Sha512 => &hash::SHA512,
        }
    }
}

impl Digest {
    /// The digest of `content`.
    pub fn of(algorithm: Algorithm, content: &[u8]) -> Self {
        Self::from_hash(algorithm, hash::digest(algorithm.implementation(), content).as_ref())
    }

    /// The sha256 digest of `content`.
    pub fn sha256(content: &[u8]) -> Self {
        Self::of(Algorithm::Sha256, content)
    }

    /// A digest from its raw bytes; `None` if their number is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Option<Self> {
        (bytes.len() == algorithm.size()).then(|| Self::from_hash(algorithm, bytes))
    }

    /// The algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw bytes: 32 or 64.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.size()]
    }

    /// The part after the colon, as containerd names blob files.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(self.algorithm.size() * 2);
        push_hex(&mut text, self.as_bytes());
        text
    }

    /// A hasher for this digest's algorithm.
    pub fn hasher(&self) -> Hasher {
        Hasher::new(self.algorithm)
    }

    fn from_hash(algorithm: Algorithm, value: &[u8]) -> Self {
        let mut bytes = [0; 64];
        bytes[..algorithm.size()].copy_from_slice(&value[..algorithm.size()]);
        Self { algorithm, bytes }
    }
}

impl Hasher {
    /// An empty hasher.
    pub fn new(algorithm: Algorithm) -> Self {
        Self { algorithm, context: hash::Context::new(algorithm.implementation()) }
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest::from_hash(self.algorithm, self.context.finish().as_ref())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (name, hex) = text.split_once(':').ok_or(DigestError::Form)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::Algorithm),
        };
        if hex.len() != algorithm.size() * 2 {
            return Err(DigestError::Hex);
        }
        let mut bytes = [0; 64];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self { algorithm, bytes })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(7 + self.algorithm.size() * 2);
        text.push_str(self.algorithm.as_str());
        text.push(':');
        push_hex(&mut text, self.as_bytes());
        f.pad(&text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Lower case only: the image specification's grammar for both registered algorithms is `[a-f0-9]`.
fn nibble(character: u8) -> Result<u8, DigestError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(DigestError::Hex),
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_both_algorithms() {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let digest = Digest::of(algorithm, b"peili");
            assert_eq!(digest.to_string().parse(), Ok(digest));
            let mut hasher = digest.hasher();
            hasher.update(b"pei");
            hasher.update(b"li");
            assert_eq!(hasher.finish(), digest);
            assert_eq!(Digest::from_bytes(algorithm, digest.as_bytes()), Some(digest));
        }
    }

    #[test]
    fn known_value() {
        assert_eq!(
            Digest::sha256(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn refuses_other_texts() {
        let hex = Digest::sha256(b"").hex();
        let check = |text: &str, error| assert_eq!(text.parse::<Digest>(), Err(error), "{text}");
        check("", DigestError::Form);
        check(&hex, DigestError::Form);
        check(&format!("md5:{hex}"), DigestError::Algorithm);
        check(&format!("sha512:{hex}"), DigestError::Hex);
        check(&format!("sha256:{}", hex.to_uppercase()), DigestError::Hex);
        check(&format!("sha256:{}é", &hex[..62]), DigestError::Hex);
        check(&format!("sha256:{hex}0"), DigestError::Hex);
    }
}
