//! Verification on the stream: content is hashed as it goes by and its tail is held back until the digest is known to
//! be right, so that nobody ever has the whole of a wrong content.
//!
//! containerd appends to what it got before and commits when the size is right (its issue 3974); without the tail it
//! cannot commit, and the connection that ends short tells it that something is wrong.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::oci::{Digest, Hasher};

/// Bytes that are held back: more than a reader's buffers could make up for, little enough to cost no memory.
pub(crate) const HOLD_BACK: usize = 64 << 10;

/// Hashes what is pushed and gives it back late.
#[derive(Debug)]
pub(crate) struct Verifier {
    digest: Digest,
    hasher: Option<Hasher>,
    held: VecDeque<Bytes>,
    held_bytes: usize,
}

/// The content has another digest than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("content with digest {found} came for {wanted}")]
pub(crate) struct Mismatch {
    pub(crate) wanted: Digest,
    pub(crate) found: Digest,
}

impl Verifier {
    pub(crate) fn new(digest: &Digest) -> Self {
        Self { digest: *digest, hasher: Some(digest.hasher()), held: VecDeque::new(), held_bytes: 0 }
    }

    /// Adds the next bytes.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        self.held_bytes += chunk.len();
        self.held.push_back(chunk);
    }

    /// Bytes that may be passed on while the digest is not known: all but the last [`HOLD_BACK`].
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let spare = self.held_bytes.checked_sub(HOLD_BACK).filter(|spare| *spare > 0)?;
        let first = self.held.front_mut()?;
        let chunk = if first.len() <= spare { self.held.pop_front()? } else { first.split_to(spare) };
        self.held_bytes -= chunk.len();
        Some(chunk)
    }

    /// All bytes were pushed: checks the digest. The rest may be passed on if it is right.
    pub(crate) fn finish(&mut self) -> Result<(), Box<Mismatch>> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        let found = hasher.finish();
        if found == self.digest { Ok(()) } else { Err(Box::new(Mismatch { wanted: self.digest, found })) }
    }

    /// After [`Self::finish`]: the rest, chunk by chunk.
    pub(crate) fn pop_rest(&mut self) -> Option<Bytes> {
        let chunk = self.held.pop_front()?;
        self.held_bytes -= chunk.len();
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes `content` in chunks of `size`, returns what came out before the end and the verdict.
    fn run(content: &[u8], digest: &Digest, size: usize) -> (Vec<u8>, Result<Vec<u8>, Box<Mismatch>>) {
        let mut verifier = Verifier::new(digest);
        let mut early = Vec::new();
        for chunk in content.chunks(size) {
            verifier.push(Bytes::copy_from_slice(chunk));
            while let Some(chunk) = verifier.pop() {
                early.extend_from_slice(&chunk);
            }
        }
        let rest = verifier.finish().map(|()| std::iter::from_fn(|| verifier.pop_rest()).flatten().collect());
        (early, rest)
    }

    #[test]
    fn right_content_comes_whole_and_in_order() {
        let content: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        for size in [1, 1000, HOLD_BACK, 300_000] {
            let (mut all, rest) = run(&content, &Digest::sha256(&content), size);
            assert_eq!(all.len(), 300_000 - HOLD_BACK);
            all.extend(rest.unwrap());
            assert_eq!(all, content);
        }
    }

    #[test]
    fn wrong_content_never_comes_whole() {
        let content = vec![7; 300_000];
        let (early, rest) = run(&content, &Digest::sha256(b"another"), 1000);
        assert_eq!(early.len(), 300_000 - HOLD_BACK);
        assert!(rest.is_err());
    }

    #[test]
    fn short_content_is_held_entirely() {
        let (early, rest) = run(&[1; 100], &Digest::sha256(&[1; 100]), 10);
        assert_eq!((early.len(), rest.unwrap().len()), (0, 100));
    }
}
