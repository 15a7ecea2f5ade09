//! Whatever parses as a name is printed in a form that parses to the same name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peili::oci::Reference;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(Reference::parse_full(&reference.to_string()), Ok(reference));
    }
});
