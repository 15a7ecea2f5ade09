//! A pattern is refused or asked, whatever it is.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|text: &str| invariants::pattern(text, &"r.test/a/b".parse().expect("a name")));
