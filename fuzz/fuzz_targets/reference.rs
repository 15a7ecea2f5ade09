//! Whatever parses as a name is printed in a form that parses to the same name.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|text: &str| invariants::reference(text));
