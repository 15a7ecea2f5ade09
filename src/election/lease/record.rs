//! What a Lease says, as far as an election reads it, and the annotation by which Peili's own records are known.
//!
//! It reads no JSON and asks no server: `cluster` turns an object of the API into these types and back.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::Ms;

/// The annotation that holds a [`Mark`].
pub const ANNOTATION: &str = "peili.dev/election";
/// Bytes of an identity, at most: the API allows no longer holder in practice, and a record is read from whoever wrote it.
pub const IDENTITY_LIMIT: usize = 256;

/// A Lease as the API server stores it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    /// Of this object; another one by the same name has another.
    pub uid: Arc<str>,
    /// Its resourceVersion. The API promises that these are integers which grow over all objects of a kind.
    pub version: u64,
    /// What it says.
    pub record: Record,
}

/// What a Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Record {
    /// Who holds it; empty: nobody.
    pub holder: Arc<str>,
    /// `leaseDurationSeconds`, 0 where it is absent.
    pub duration: Ms,
    /// `renewTime` as it stands there. It is only compared for equality: no clock of another machine is believed.
    pub renewed: Option<Arc<str>>,
    /// `leaseTransitions`.
    pub transitions: u32,
    /// `preferredHolder` is set: the API server's coordinator wants another holder.
    pub preferred: bool,
    /// What Peili wrote beside.
    pub mark: Option<Mark>,
}

/// Written with each record: makes every write a change (the API server drops writes that change nothing, and answers
/// them with success), and tells Peili's records from those of other electors.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Who wrote it.
    pub writer: Arc<str>,
    /// Of the writer; each of its writes has another.
    pub sequence: u64,
    /// What the writer's validity is computed from, to the millisecond. It stands here too since anybody may edit the
    /// other field.
    pub duration: Ms,
    /// The writer has stopped its work and gives the lease away. An empty holder without it proves nothing: the object
    /// may have been made anew while its holder still works.
    pub released: bool,
}

impl Record {
    /// Whether Peili wrote the holder.
    pub fn is_ours(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.writer == self.holder)
    }

    /// Whether nobody holds it, and who held it last has stopped.
    pub fn is_released(&self) -> bool {
        self.holder.is_empty() && self.mark.as_ref().is_some_and(|mark| mark.released)
    }

    /// Whether followers count the holder's time anew: all but other people's metadata.
    pub(super) fn renews(&self, before: &Self) -> bool {
        self.holder != before.holder || self.renewed != before.renewed || self.mark != before.mark
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let released = if self.released { " released" } else { "" };
        write!(formatter, "{} {} {}{released}", self.sequence, self.duration, self.writer)
    }
}

/// An annotation that Peili did not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMark;

impl FromStr for Mark {
    type Err = NoMark;

    fn from_str(text: &str) -> Result<Self, NoMark> {
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or(NoMark);
        let sequence = word()?.parse().map_err(|_| NoMark)?;
        let duration = word()?.parse().map_err(|_| NoMark)?;
        let writer = word()?;
        if writer.is_empty() || writer.len() > IDENTITY_LIMIT {
            return Err(NoMark);
        }
        let released = match words.next() {
            None => false,
            Some("released") => true,
            Some(_) => return Err(NoMark),
        };
        if words.next().is_some() {
            return Err(NoMark);
        }
        Ok(Self { writer: writer.into(), sequence, duration, released })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        for released in [false, true] {
            let mark = Mark { writer: "node/1".into(), sequence: 7, duration: 6_000, released };
            assert_eq!(mark.to_string().parse(), Ok(mark));
        }
        for text in
            ["", "7", "7 6000", "7 6000 ", "x 6000 n", "7 6000 n gone", "7 6000 n released x", "-1 1 n"]
        {
            assert_eq!(text.parse::<Mark>(), Err(NoMark), "{text}");
        }
        let long = format!("7 6000 {}", "n".repeat(IDENTITY_LIMIT + 1));
        assert_eq!(long.parse::<Mark>(), Err(NoMark));
    }
}
