//! The bindings that are checked in are those of the contract.
//!
//! After a change of `wit/policy.wit`: `PEILI_WRITE_BINDINGS=1 cargo test --manifest-path plugins/Cargo.toml --test bindings`
//! writes them anew.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator as _};
use wit_bindgen_rust::{Opts, WithOption};

/// File, what its world has, and whether the types are those of the first.
const WORLDS: [(&str, &str, bool); 4] = [
    (
        "base",
        "import peili:policy/logging@0.1.1; import peili:policy/data@0.1.1; export peili:policy/lifecycle@0.1.1;",
        false,
    ),
    ("registry", "export peili:policy/registry@0.1.1;", true),
    ("election", "export peili:policy/election@0.1.1;", true),
    ("trust", "export peili:policy/trust@0.1.1;", true),
];

fn generate(name: &str, has: &str, shares: bool) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut resolve = Resolve::default();
    resolve.push_path(root.join("../../wit/policy.wit")).unwrap();
    let world = format!("package peili:sdk; world {name} {{ {has} }}");
    let package = resolve.push_str("sdk.wit", &world).unwrap();
    let world = resolve.select_world(&[package], Some(name)).unwrap();
    let module =
        if shares { format!("peili_policy::{name}::bindings") } else { "peili_policy::contract".into() };
    let types = ("peili:policy/types@0.1.1", "crate::contract::peili::policy::types");
    let with = shares.then(|| (types.0.to_owned(), WithOption::Path(types.1.to_owned())));
    let options = Opts {
        format: true,
        pub_export_macro: true,
        export_macro_name: Some(format!("export_{name}_bindings")),
        default_bindings_module: Some(module),
        additional_derive_attributes: vec!["PartialEq".into(), "Clone".into()],
        generate_all: true,
        with: with.into_iter().collect(),
        ..Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files).unwrap();
    let (_, contents) = files.iter().next().unwrap();
    String::from_utf8(contents.to_vec()).unwrap()
}

#[test]
fn the_bindings_are_of_the_contract() {
    for (name, has, shares) in WORLDS {
        let made = generate(name, has, shares);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("bindings").join(name).with_extension("rs");
        if std::env::var_os("PEILI_WRITE_BINDINGS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(checked_in == made, "{}: another one now; write it anew as this file says", path.display());
    }
}
