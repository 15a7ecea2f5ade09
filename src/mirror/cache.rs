//! Manifests that were just fetched and verified, since a HEAD is followed by a GET and both should ask a peer only
//! once; and the sizes that they give to their children, by which a peer that lies about a size is found out.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Source;
use crate::oci::{Descriptor, Digest};

/// All together; one manifest is at most 4 MiB.
const BYTES: usize = 8 << 20;
/// Long enough for one pull, short enough that a changed right to an image takes effect.
const TTL: Duration = Duration::from_secs(10);

/// Children whose sizes are remembered: about 100 bytes each.
const SIZED: usize = 16_384;
/// Sizes of one digest: one, unless somebody made a manifest that lies. Of more the right one may be missing, so that
/// none counts.
const SIZES_EACH: usize = 8;

/// The newest manifests, oldest first.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: Mutex<VecDeque<Entry>>,
    sizes: Mutex<Sizes>,
}

#[derive(Debug, Default)]
struct Sizes {
    by_digest: HashMap<Digest, Vec<u64>>,
    /// Oldest first.
    order: VecDeque<Digest>,
}

#[derive(Debug)]
struct Entry {
    descriptor: Descriptor,
    content: Bytes,
    source: Source,
    at: Instant,
}

impl Cache {
    pub(super) fn get(&self, digest: &Digest, now: Instant) -> Option<(Descriptor, Bytes, Source)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.iter().find(|entry| entry.descriptor.digest == *digest && entry.is_fresh(now))?;
        Some((entry.descriptor.clone(), entry.content.clone(), entry.source))
    }

    pub(super) fn put(&self, descriptor: Descriptor, content: Bytes, source: Source, now: Instant) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| entry.descriptor.digest != descriptor.digest && entry.is_fresh(now));
        entries.push_back(Entry { descriptor, content, source, at: now });
        while entries.iter().map(|entry| entry.content.len()).sum::<usize>() > BYTES {
            entries.pop_front();
        }
    }
}

impl Cache {
    /// Remembers the sizes that a manifest gives to its children.
    pub(super) fn learn(&self, children: &[Descriptor]) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let Sizes { by_digest, order } = &mut *sizes;
        for child in children.iter().take(SIZED) {
            let known = by_digest.entry(child.digest).or_insert_with(|| {
                order.push_back(child.digest);
                Vec::new()
            });
            if !known.contains(&child.size) && known.len() <= SIZES_EACH {
                known.push(child.size);
            }
        }
        while order.len() > SIZED {
            order.pop_front().map(|oldest| by_digest.remove(&oldest));
        }
    }

    /// Sizes that manifests gave to `digest`; empty: not known, `None`: too many to believe any.
    pub(super) fn sizes(&self, digest: &Digest) -> Option<Vec<u64>> {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sizes.by_digest.get(digest).cloned().unwrap_or_default();
        (known.len() <= SIZES_EACH).then_some(known)
    }
}

impl Entry {
    fn is_fresh(&self, now: Instant) -> bool {
        now.duration_since(self.at) < TTL
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::OCTET_STREAM;

    fn put(cache: &Cache, content: Vec<u8>) -> Digest {
        let digest = Digest::sha256(&content);
        cache.put(
            Descriptor::new(digest, content.len() as u64, OCTET_STREAM),
            content.into(),
            Source::Peers,
            Instant::now(),
        );
        digest
    }

    /// Crafted manifests must not keep content from coming from peers.
    #[test]
    fn too_many_sizes_are_none() {
        let (cache, digest) = (Cache::default(), Digest::sha256(b""));
        for size in 0..=SIZES_EACH as u64 {
            assert_eq!(cache.sizes(&digest), Some((0..size).collect()));
            cache.learn(&[Descriptor::new(digest, size, OCTET_STREAM)]);
        }
        assert_eq!(cache.sizes(&digest), None);
    }

    #[test]
    fn forgets_by_size_and_by_time() {
        let (cache, now) = (Cache::default(), Instant::now());
        let old = put(&cache, vec![1; 4 << 20]);
        let new = put(&cache, vec![2; 3 << 20]);
        assert!(cache.get(&old, now).is_some() && cache.get(&new, now).is_some());
        let newest = put(&cache, vec![3; 4 << 20]);
        assert!(
            cache.get(&old, now).is_none()
                && cache.get(&new, now).is_some()
                && cache.get(&newest, now).is_some()
        );
        assert!(cache.get(&newest, Instant::now() + TTL).is_none());
    }
}
