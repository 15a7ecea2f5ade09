//! A frame of the gossip that is read keeps to its limits and is written in a form that reads the same.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::gossip(bytes));
