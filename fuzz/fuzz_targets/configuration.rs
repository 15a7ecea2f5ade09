//! A configuration is refused with a message, or shown as one that means the same.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|text: &str| invariants::configuration(text));
