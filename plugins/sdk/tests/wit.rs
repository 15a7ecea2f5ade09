//! The contract `wit/policy.wit`: what is in it, and that what was promised once still holds.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use wit_parser::{PackageId, Resolve};

fn text(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit").join(name)).unwrap()
}

fn push(resolve: &mut Resolve, text: &str) -> PackageId {
    resolve.push_str("policy.wit", text).unwrap()
}

#[test]
fn the_contract_has_three_worlds() {
    let mut resolve = Resolve::default();
    let package = push(&mut resolve, &text("policy.wit"));
    let package = &resolve.packages[package];
    assert_eq!(package.name.to_string(), "peili:policy@0.1.1");
    let worlds: Vec<_> = package.worlds.keys().map(String::as_str).collect();
    assert_eq!(worlds, ["registry-policy", "election-policy", "trust-policy"]);
}

/// Components that were built for the last released contract still fit: `wit/released` has each one as it was released.
#[test]
fn what_was_released_still_holds() {
    holds(&text("policy.wit")).unwrap();
    // And a change that breaks them is seen.
    let broken =
        text("policy.wit").replace("max-fan-out: option<u32>,", "max-fan-out: option<u32>, more: bool,");
    assert_ne!(text("policy.wit"), broken);
    holds(&broken).unwrap_err();
}

fn holds(now: &str) -> Result<(), String> {
    let released = text("released/0.1.0.wit").replace("peili:policy@0.1.0", "peili:policy@0.0.0");
    let mut resolve = Resolve::default();
    let (released, now) = (push(&mut resolve, &released), push(&mut resolve, now));
    for world in ["registry-policy", "election-policy", "trust-policy"] {
        let of = |package: PackageId| resolve.packages[package].worlds[world];
        wit_component::semver_check(resolve.clone(), of(released), of(now))
            .map_err(|error| format!("{world}: {error:#}"))?;
    }
    Ok(())
}
