//! The contract `wit/policy.wit` is one that WIT's own parser reads, with the worlds that it promises.

use std::path::Path;

use wit_parser::Resolve;

#[test]
fn the_contract_has_three_worlds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit/policy.wit");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut resolve = Resolve::default();
    let package = resolve.push_str(&path, &text).unwrap();
    let package = &resolve.packages[package];
    assert_eq!(package.name.to_string(), "peili:policy@0.1.0");
    let worlds: Vec<_> = package.worlds.keys().map(String::as_str).collect();
    assert_eq!(worlds, ["registry-policy", "election-policy", "trust-policy"]);
}
