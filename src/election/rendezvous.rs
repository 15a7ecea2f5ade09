//! Weighted rendezvous hashing in integers: each key has an owner among weighted members, and all nodes find the same one.
//!
//! A member's draw for a key is 64 mixed bits, u as a fraction of 2^64. The member with the least `-log2(u) / weight` owns the key: then
//! each owns its weight's share of all keys, and when a member goes, only its own keys move. The logarithm is exact to 2^-32,
//! rounded up, by repeated squaring; quotients are compared as products. Nothing is a float, so that all machines agree.
//!
//! Bias: the rounding shifts shares by less than one part in a million for 10,000 members. Equal draws go to the larger bits,
//! then to the first member. Knows no members, roles and policies.

use crate::oci::Digest;

/// Bits of a logarithm's fraction.
const FRACTION: u32 = 32;
/// What is hashed begins with it, so that another way to hash can follow.
const PURPOSE: &[u8] = b"peili rendezvous 1\n";

/// Members that own keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// Members of one weight stand together, so that within a class the larger draw wins and one logarithm is enough.
    classes: Vec<Class>,
    /// Marks of the members, and their places as they were given.
    marks: Vec<u64>,
    places: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Class {
    weight: u32,
    /// Where it ends in `marks`.
    end: usize,
}

/// The bits that stand for a member.
pub(super) fn mark(member: &str) -> u64 {
    bits(&[member.as_bytes()])
}

/// The bits that stand for a key of a role.
pub(super) fn key(role: &str, key: &[u8]) -> u64 {
    bits(&[role.as_bytes(), b"\0", key])
}

fn bits(parts: &[&[u8]]) -> u64 {
    let mut all = PURPOSE.to_vec();
    parts.iter().for_each(|part| all.extend_from_slice(part));
    let digest = Digest::sha256(&all);
    digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// A member's draw for a key: the finaliser of SplitMix64.
fn draw(key: u64, mark: u64) -> u64 {
    let mut bits = key ^ mark;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// `-log2(draw / 2^64)`, times 2^32 and rounded up. At most 64 * 2^32.
fn cost(draw: u64) -> u64 {
    let draw = draw.max(1);
    let whole = u64::from(draw.ilog2());
    // In [1, 2), with 63 bits after the point.
    let mut x = draw << draw.leading_zeros();
    let mut fraction = 0;
    for _ in 0..FRACTION {
        let square = u128::from(x) * u128::from(x);
        let is_two = square >> 127 == 1;
        fraction = fraction << 1 | u64::from(is_two);
        // Fits: it is below 2 again.
        x = (square >> (63 + u32::from(is_two))) as u64;
    }
    (64 << FRACTION) - (whole << FRACTION | fraction)
}

/// What one member bids: the least quotient owns.
#[derive(Clone, Copy)]
struct Bid {
    cost: u64,
    weight: u32,
    draw: u64,
    place: u32,
}

impl Bid {
    /// Whether it is before `other`: the smaller quotient, then the larger draw, then the earlier place.
    fn beats(&self, other: &Self) -> bool {
        let (mine, others) = (
            u128::from(self.cost) * u128::from(other.weight),
            u128::from(other.cost) * u128::from(self.weight),
        );
        (mine, other.draw, self.place) < (others, self.draw, other.place)
    }
}

impl Table {
    /// A table of members by mark and weight; those of weight 0 own nothing. Takes the time of a sort.
    pub(super) fn new(members: impl IntoIterator<Item = (u64, u32)>) -> Self {
        let mut all: Vec<(u32, u32, u64)> = (0..)
            .zip(members)
            .filter(|(_, (_, weight))| *weight > 0)
            .map(|(place, (mark, weight))| (weight, place, mark))
            .collect();
        all.sort_unstable();
        let mut table = Self::default();
        for (weight, place, mark) in all {
            table.marks.push(mark);
            table.places.push(place);
            let end = table.marks.len();
            match table.classes.last_mut() {
                Some(class) if class.weight == weight => class.end = end,
                _ => table.classes.push(Class { weight, end }),
            }
        }
        table
    }

    /// The place of the owner of a key; `None`: there is nobody. Some microseconds for 5,000 members.
    pub(super) fn owner(&self, key: u64) -> Option<u32> {
        let mut best: Option<Bid> = None;
        let mut start = 0;
        for class in &self.classes {
            let mut most = (0, start);
            for (at, mark) in self.marks[start..class.end].iter().enumerate() {
                let draw = draw(key, *mark);
                if draw > most.0 {
                    most = (draw, start + at);
                }
            }
            start = class.end;
            let (draw, at) = most;
            // No logarithm is below it.
            let least = u64::MAX.saturating_sub(draw) >> (64 - FRACTION);
            let floor = Bid { cost: least, weight: class.weight, draw, place: self.places[at] };
            if best.as_ref().is_none_or(|best| floor.beats(best)) {
                let bid = Bid { cost: cost(draw), ..floor };
                if best.as_ref().is_none_or(|best| bid.beats(best)) {
                    best = Some(bid);
                }
            }
        }
        best.map(|bid| bid.place)
    }

    /// All places, the owner of a key first, and who would own it without those before. For people: it computes every logarithm.
    pub(super) fn order(&self, key: u64) -> Vec<u32> {
        let mut bids = Vec::with_capacity(self.marks.len());
        let mut start = 0;
        for class in &self.classes {
            for at in start..class.end {
                let draw = draw(key, self.marks[at]);
                bids.push(Bid { cost: cost(draw), weight: class.weight, draw, place: self.places[at] });
            }
            start = class.end;
        }
        bids.sort_by(|a, b| b.beats(a).cmp(&a.beats(b)));
        bids.into_iter().map(|bid| bid.place).collect()
    }
}

/// Places of the members of weight above 0, the best first: by weight, then by their draw for a key.
pub(super) fn ranked(members: &[(u64, u32)], key: u64) -> Vec<u32> {
    let mut places: Vec<(u32, u64, std::cmp::Reverse<u32>)> = (0..)
        .zip(members)
        .filter(|(_, (_, weight))| *weight > 0)
        .map(|(place, (mark, weight))| (*weight, draw(key, *mark), std::cmp::Reverse(place)))
        .collect();
    places.sort_unstable_by(|a, b| b.cmp(a));
    places.into_iter().map(|(_, _, place)| place.0).collect()
}

#[cfg(test)]
mod tests;
