//! A manifest is read or refused, whatever its bytes are.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::manifest(bytes));
