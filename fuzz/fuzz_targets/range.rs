//! A resolved range lies within the content, and `Content-Range` is read as it was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peili::oci::{ByteRange, RangeHeader};

fuzz_target!(|input: (u64, &str)| {
    let (size, text) = input;
    if let Some(Ok(range)) = RangeHeader::parse(text).map(|header| header.resolve(size)) {
        assert!(range.start <= range.end && range.end <= size);
        if !range.is_empty() {
            assert_eq!(ByteRange::parse_content_range(&range.content_range(size)), Some((range, size)));
        }
    }
    if let Some((range, size)) = ByteRange::parse_content_range(text) {
        assert!(range.start < range.end && range.end <= size);
    }
});
