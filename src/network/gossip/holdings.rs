//! Who holds what: every content of every member, by content.
//!
//! Members and contents are named by small numbers; a content's members are a compressed bitmap, about two bytes for each
//! pair. No I/O, and no opinion about who is alive.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use roaring::RoaringBitmap;

/// What the gossip needs of an inventory of all members, each named by a number that is given again after
/// [`Holdings::forget`]. The network has one, the simulation another that is shared by thousands of nodes.
pub trait Holdings {
    /// Notes that `member` holds `content`, or holds it no more. Returns whether that is new.
    fn set(&mut self, member: u32, content: u64, held: bool) -> bool;
    /// What `member` holds, in no order.
    fn of(&self, member: u32) -> Vec<u64>;
    /// Forgets all that `member` holds.
    fn forget(&mut self, member: u32);
    /// Calls `each` with every content and its members, in rising order.
    fn each(&self, each: &mut dyn FnMut(u64, &mut dyn Iterator<Item = u32>));
    /// How much there is, as pairs of a member and a content.
    fn pairs(&self) -> u64;
}

/// Contents by key.
#[derive(Debug, Default)]
pub struct Index {
    contents: HashMap<u64, RoaringBitmap, BuildHasherDefault<KeyHasher>>,
    pairs: u64,
}

/// Keys are parts of cryptographic hashes; who grinds them to clash costs a member at most what a flood does.
#[derive(Debug, Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = mix(key);
    }
}

impl Index {
    /// The members that hold `content`.
    pub fn holders(&self, content: u64) -> Option<&RoaringBitmap> {
        self.contents.get(&content)
    }

    /// Contents that anybody holds.
    pub fn contents(&self) -> usize {
        self.contents.len()
    }
}

impl Holdings for Index {
    fn set(&mut self, member: u32, content: u64, held: bool) -> bool {
        if held {
            let new = self.contents.entry(content).or_default().insert(member);
            self.pairs += u64::from(new);
            return new;
        }
        let Some(members) = self.contents.get_mut(&content) else { return false };
        let was = members.remove(member);
        self.pairs -= u64::from(was);
        if members.is_empty() {
            self.contents.remove(&content);
        }
        was
    }

    fn of(&self, member: u32) -> Vec<u64> {
        let held = self.contents.iter().filter(|(_, members)| members.contains(member));
        held.map(|(content, _)| *content).collect()
    }

    fn forget(&mut self, member: u32) {
        let pairs = &mut self.pairs;
        self.contents.retain(|_, members| {
            *pairs -= u64::from(members.remove(member));
            !members.is_empty()
        });
    }

    fn each(&self, each: &mut dyn FnMut(u64, &mut dyn Iterator<Item = u32>)) {
        for (content, members) in &self.contents {
            each(*content, &mut members.iter());
        }
    }

    fn pairs(&self) -> u64 {
        self.pairs
    }
}

/// Spreads the bits of a number (the finalizer of splitmix64).
pub fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
