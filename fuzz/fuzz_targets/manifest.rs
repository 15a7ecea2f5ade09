//! A manifest is read or refused, whatever its bytes are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peili::oci::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes) {
        assert!(manifest.children.len() <= 20_000);
    }
});
