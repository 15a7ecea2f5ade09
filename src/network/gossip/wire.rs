//! Frames on a link, as bytes: prost messages whose field numbers are for ever, decoded with limits.
//!
//! A frame is all that there is to say to one neighbour at a time. Unknown fields are ignored, so that a later version
//! can say more. What is named by a key is a member (the first 8 bytes of the SHA-256 of its identity) or a content
//! (the first 8 bytes of its digest): a clash costs a question that is answered "not here", and nothing else.

use bytes::Bytes;
use prost::Message;

use crate::network::versions;

/// Longest frame that is read or written.
pub const FRAME_LIMIT: usize = 256 << 10;
/// Longest signed record.
pub const RECORD_LIMIT: usize = 1024;
/// Longest signed suspicion.
pub const SUSPICION_LIMIT: usize = 160;
/// Contents in one delta, or in one page of a whole: 64 KiB.
pub const KEYS: usize = 8192;
/// Groups of members whose positions are compared as one.
pub const BUCKETS: usize = 256;

/// A frame that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`FRAME_LIMIT`].
    #[error("a frame of {0} bytes, more than {FRAME_LIMIT}")]
    TooLong(usize),
    /// Not a message of this protocol.
    #[error("not a frame: {0}")]
    Encoding(#[from] prost::DecodeError),
    /// A field that is too long or does not fit the others.
    #[error("`{0}` is not what it should be")]
    Field(&'static str),
}

/// All that is said to a neighbour at a time.
#[derive(Clone, PartialEq, Message)]
pub struct Frame {
    /// The first thing on a link, in each direction.
    #[prost(message, optional, tag = "1")]
    pub hello: Option<Hello>,
    /// Signed records.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub records: Vec<Bytes>,
    /// Changes of inventories.
    #[prost(message, repeated, tag = "3")]
    pub deltas: Vec<Delta>,
    /// Signed suspicions.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub suspicions: Vec<Bytes>,
    /// What the sender has, where the receiver may have less.
    #[prost(message, repeated, tag = "5")]
    pub have: Vec<Position>,
    /// What the sender has and wants more of.
    #[prost(message, repeated, tag = "6")]
    pub want: Vec<Position>,
    /// Pages of whole inventories.
    #[prost(message, repeated, tag = "7")]
    pub wholes: Vec<Whole>,
    /// One of [`PRUNE`], [`GRAFT`] and [`BYE`]; else 0.
    #[prost(uint32, tag = "8")]
    pub tree: u32,
    /// A sign of life.
    #[prost(message, optional, tag = "9")]
    pub beat: Option<Beat>,
    /// Four bytes of the hash of each bucket.
    #[prost(bytes = "bytes", tag = "10")]
    pub buckets: Bytes,
    /// The positions in some buckets.
    #[prost(message, optional, tag = "11")]
    pub summary: Option<Summary>,
    /// The sender wants the whole view.
    #[prost(bool, tag = "12")]
    pub bulk_wanted: bool,
    /// A part of the whole view.
    #[prost(message, optional, tag = "13")]
    pub bulk: Option<Bulk>,
}

/// Do not push changes to me; you may say what you have.
pub const PRUNE: u32 = 1;
/// Push changes to me.
pub const GRAFT: u32 = 2;
/// I close this link, and nothing is wrong with me.
pub const BYE: u32 = 3;

/// Who speaks, and what it knows.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// The speaker's signed record.
    #[prost(bytes = "bytes", tag = "1")]
    pub record: Bytes,
    /// The view is complete, as far as its owner knows.
    #[prost(bool, tag = "2")]
    pub complete: bool,
    /// The speaker has neighbours enough: this link is for questions.
    #[prost(bool, tag = "3")]
    pub full: bool,
    /// Live members that it knows, itself included.
    #[prost(uint32, tag = "4")]
    pub members: u32,
    /// The address that it sees the other end at, as text without a port; empty: unknown.
    #[prost(string, tag = "5")]
    pub observed: String,
    /// Signed records of a few others, for one that knows few.
    #[prost(bytes = "bytes", repeated, tag = "6")]
    pub sample: Vec<Bytes>,
}

/// Consecutive changes of what a member holds.
#[derive(Clone, PartialEq, Message)]
pub struct Delta {
    /// The member.
    #[prost(fixed64, tag = "1")]
    pub key: u64,
    /// The epoch of its inventory.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// The version that they follow; each one leads to the next version.
    #[prost(uint32, tag = "3")]
    pub from: u32,
    /// The contents, eight bytes each, little-endian.
    #[prost(bytes = "bytes", tag = "4")]
    pub contents: Bytes,
    /// Which of them are held no more, by index.
    #[prost(uint32, repeated, tag = "5")]
    pub removed: Vec<u32>,
}

/// How much is known of a member.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Position {
    /// The member.
    #[prost(fixed64, tag = "1")]
    pub key: u64,
    /// The number of its record; 0: none.
    #[prost(uint64, tag = "2")]
    pub seq: u64,
    /// The epoch of its inventory.
    #[prost(uint32, tag = "3")]
    pub epoch: u32,
    /// The version of its inventory.
    #[prost(uint32, tag = "4")]
    pub version: u32,
    /// The last four bytes of the hash of its inventory.
    #[prost(fixed32, tag = "5")]
    pub hash: u32,
}

/// A page of all that a member holds.
#[derive(Clone, PartialEq, Message)]
pub struct Whole {
    /// The member.
    #[prost(fixed64, tag = "1")]
    pub key: u64,
    /// The epoch of its inventory.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// The version of its inventory.
    #[prost(uint32, tag = "3")]
    pub version: u32,
    /// The contents, eight bytes each, little-endian.
    #[prost(bytes = "bytes", tag = "4")]
    pub contents: Bytes,
    /// There is more to come.
    #[prost(bool, tag = "5")]
    pub more: bool,
}

/// A sign of life.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Beat {
    /// The hash of the sender's view.
    #[prost(fixed64, tag = "1")]
    pub root: u64,
    /// A sign of life is wanted back.
    #[prost(bool, tag = "2")]
    pub answer: bool,
    /// If the receiver's root is another, its buckets are wanted.
    #[prost(bool, tag = "3")]
    pub compare: bool,
    /// Where the sender compares, a hash of the candidates that it sees; 0: it does not say.
    #[prost(fixed32, tag = "4")]
    pub candidates: u32,
    /// And of who leads.
    #[prost(fixed32, tag = "5")]
    pub leaders: u32,
}

/// Positions of all live members of some buckets.
#[derive(Clone, PartialEq, Message)]
pub struct Summary {
    /// A bit for each bucket.
    #[prost(bytes = "bytes", tag = "1")]
    pub buckets: Bytes,
    /// The members.
    #[prost(message, repeated, tag = "2")]
    pub positions: Vec<Position>,
}

/// A part of the whole view: first the members, then who of them holds what.
#[derive(Clone, PartialEq, Message)]
pub struct Bulk {
    /// Members; those of all parts together are counted from 0.
    #[prost(message, repeated, tag = "1")]
    pub members: Vec<BulkMember>,
    /// For each content: its key (8 bytes, little-endian), how many hold it, and the gaps between their places, as varints.
    #[prost(bytes = "bytes", tag = "2")]
    pub holdings: Bytes,
    /// Nothing follows.
    #[prost(bool, tag = "3")]
    pub last: bool,
    /// Another neighbour is to be asked.
    #[prost(bool, tag = "4")]
    pub refused: bool,
}

/// A member in the whole view.
#[derive(Clone, PartialEq, Message)]
pub struct BulkMember {
    /// Its signed record.
    #[prost(bytes = "bytes", tag = "1")]
    pub record: Bytes,
    /// The epoch of its inventory.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// The version of its inventory.
    #[prost(uint32, tag = "3")]
    pub version: u32,
}

/// Reads a frame and checks its lengths.
pub fn decode(bytes: Bytes) -> Result<Frame, FrameError> {
    if bytes.len() > FRAME_LIMIT {
        return Err(FrameError::TooLong(bytes.len()));
    }
    let frame = Frame::decode(bytes)?;
    let check = |good: bool, field| if good { Ok(()) } else { Err(FrameError::Field(field)) };
    let contents = |bytes: &Bytes| bytes.len().is_multiple_of(8) && bytes.len() <= 8 * KEYS;
    check(frame.records.iter().all(|record| record.len() <= RECORD_LIMIT), "records")?;
    check(frame.suspicions.iter().all(|suspicion| suspicion.len() <= SUSPICION_LIMIT), "suspicions")?;
    for delta in &frame.deltas {
        let count = delta.contents.len() / 8;
        check(contents(&delta.contents) && count > 0, "contents")?;
        check(delta.from.checked_add(count as u32).is_some(), "from")?;
        check(delta.removed.iter().all(|index| (*index as usize) < count), "removed")?;
    }
    check(frame.wholes.iter().all(|whole| contents(&whole.contents)), "contents")?;
    check(frame.buckets.is_empty() || frame.buckets.len() == 4 * BUCKETS, "buckets")?;
    if let Some(summary) = &frame.summary {
        check(summary.buckets.len() == BUCKETS / 8, "summary")?;
    }
    if let Some(hello) = &frame.hello {
        check(hello.record.len() <= RECORD_LIMIT, "record")?;
        check(hello.sample.iter().all(|record| record.len() <= RECORD_LIMIT), "sample")?;
        check(hello.observed.len() <= 64, "observed")?;
    }
    if let Some(bulk) = &frame.bulk {
        check(bulk.members.iter().all(|member| member.record.len() <= RECORD_LIMIT), "members")?;
    }
    Ok(frame)
}

/// The wire form.
pub fn encode(frame: &Frame) -> Bytes {
    versions::besides(frame.encode_to_vec()).into()
}

impl Delta {
    /// Each change: the version that it leads to, the content, and whether it is held from then on.
    pub fn changes(&self) -> impl Iterator<Item = (u32, u64, bool)> + '_ {
        let mut removed = self.removed.iter().peekable();
        (0_u32..).zip(keys(&self.contents)).map(move |(place, content)| {
            while removed.next_if(|index| **index < place).is_some() {}
            (self.from + place + 1, content, removed.peek() != Some(&&place))
        })
    }
}

/// The keys in a field of contents.
pub fn keys(contents: &Bytes) -> impl Iterator<Item = u64> + '_ {
    contents.chunks_exact(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap_or_default()))
}

/// A field of contents.
pub fn contents(keys: impl Iterator<Item = u64>) -> Bytes {
    keys.flat_map(u64::to_le_bytes).collect::<Vec<u8>>().into()
}
