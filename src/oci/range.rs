//! HTTP byte ranges (RFC 9110 section 14), the one form that registries use: a single `bytes` range.

use std::fmt;

/// A resolved range: from `start` up to but not including `end`, `start < end` unless the content is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset after the last byte.
    pub end: u64,
}

/// A `Range` header as the client sent it, before the size of the content is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeHeader {
    /// `bytes=START-`
    From(u64),
    /// `bytes=START-LAST`, both inclusive, `START <= LAST`
    Between(u64, u64),
    /// `bytes=-COUNT`: the last COUNT bytes
    Suffix(u64),
}

/// No byte of the content is in the range: answered by 416.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range is outside of the content's {size} bytes")]
pub struct RangeError {
    /// Size of the content.
    pub size: u64,
}

impl ByteRange {
    /// The whole of a content of `size` bytes.
    pub const fn whole(size: u64) -> Self {
        Self { start: 0, end: size }
    }

    /// Number of bytes.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no byte in it.
    pub const fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// `Content-Range` for a content of `size` bytes.
    pub fn content_range(&self, size: u64) -> String {
        format!("bytes {}-{}/{size}", self.start, self.end.saturating_sub(1))
    }

    /// Reads a `Content-Range` value: the range and the total size. `None` if it is not exactly of the form that
    /// [`Self::content_range`] writes, with a known total.
    pub fn parse_content_range(value: &str) -> Option<(Self, u64)> {
        let (range, size) = value.strip_prefix("bytes ")?.split_once('/')?;
        let (start, last) = range.split_once('-')?;
        let (start, last, size) = (number(start)?, number(last)?, number(size)?);
        (start <= last && last < size).then_some((Self { start, end: last + 1 }, size))
    }
}

impl RangeHeader {
    /// Parses a header. `None`: not a single well-formed `bytes` range, which RFC 9110 (14.2) lets a server ignore, so
    /// that the whole content is the answer.
    pub fn parse(value: &str) -> Option<Self> {
        let value = value.trim();
        let (unit, range) = value.split_once('=')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        match range.trim().split_once('-')? {
            ("", count) => Some(Self::Suffix(number(count)?)),
            (start, "") => Some(Self::From(number(start)?)),
            (start, last) => {
                let (start, last) = (number(start)?, number(last)?);
                (start <= last).then_some(Self::Between(start, last))
            }
        }
    }

    /// The bytes that it names in a content of `size` bytes, clamped to its end.
    pub fn resolve(self, size: u64) -> Result<ByteRange, RangeError> {
        let range = match self {
            Self::From(start) if start < size => ByteRange { start, end: size },
            Self::Between(start, last) if start < size => {
                ByteRange { start, end: size.min(last.saturating_add(1)) }
            }
            Self::Suffix(count) if count > 0 && size > 0 => {
                ByteRange { start: size.saturating_sub(count), end: size }
            }
            _ => return Err(RangeError { size }),
        };
        Ok(range)
    }
}

impl fmt::Display for RangeHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From(start) => write!(f, "bytes={start}-"),
            Self::Between(start, last) => write!(f, "bytes={start}-{last}"),
            Self::Suffix(count) => write!(f, "bytes=-{count}"),
        }
    }
}

/// Digits only: `u64::from_str` would take a sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_resolves() {
        let check = |text: &str, size, expected: Result<(u64, u64), RangeError>| {
            let range = RangeHeader::parse(text).expect(text).resolve(size);
            assert_eq!(range.map(|r| (r.start, r.end)), expected, "{text} of {size}");
        };
        check("bytes=0-", 10, Ok((0, 10)));
        check("bytes=3-5", 10, Ok((3, 6)));
        check("bytes=3-99", 10, Ok((3, 10)));
        check("bytes=-4", 10, Ok((6, 10)));
        check("bytes=-40", 10, Ok((0, 10)));
        check("BYTES= 9- ", 10, Ok((9, 10)));
        check("bytes=10-", 10, Err(RangeError { size: 10 }));
        check("bytes=-0", 10, Err(RangeError { size: 10 }));
        check("bytes=0-", 0, Err(RangeError { size: 0 }));
        check("bytes=0-18446744073709551615", 10, Ok((0, 10)));
    }

    #[test]
    fn what_is_not_one_range_is_ignored() {
        for text in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-3",
            "bytes=a-",
            "bytes=0-1,3-4",
            "items=0-1",
            "bytes=+1-2",
        ] {
            assert_eq!(RangeHeader::parse(text), None, "{text}");
        }
    }

    #[test]
    fn content_range_round_trips() {
        let range = ByteRange { start: 5, end: 8 };
        assert_eq!(range.content_range(10), "bytes 5-7/10");
        assert_eq!(ByteRange::parse_content_range("bytes 5-7/10"), Some((range, 10)));
        for text in ["bytes 5-7/*", "bytes */10", "bytes 7-5/10", "bytes 5-10/10", "5-7/10", "bytes 5-7/"] {
            assert_eq!(ByteRange::parse_content_range(text), None, "{text}");
        }
    }
}
