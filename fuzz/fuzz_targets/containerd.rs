//! containerd's `config.toml` says something, or has an error with a line of it.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|text: &str| invariants::containerd_configuration(text));
