//! A `hosts.toml` gives hosts that can be asked, or an error with a line of it.
#![no_main]

#[path = "../invariants.rs"]
#[allow(dead_code, reason = "each target needs one of them")]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::hosts_file(bytes, &"r.test:5000".parse().expect("a registry")));
