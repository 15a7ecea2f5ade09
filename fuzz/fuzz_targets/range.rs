//! A resolved range lies within the content, and `Content-Range` is read as it was written.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|input: (u64, &str)| invariants::range(input.0, input.1));
