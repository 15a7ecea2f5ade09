//! What all worlds of the contract have in common, as Rust.
//!
//! The generator makes a macro for each interface that is exported, and `lifecycle` is exported in every world: so it is made
//! once, here, and a component is the sum of this part and its world's own.

wit_bindgen::generate!({
    path: "../../wit/policy.wit",
    inline: "
        package peili:sdk;
        world base {
            import peili:policy/logging@0.1.0;
            export peili:policy/lifecycle@0.1.0;
        }
    ",
    world: "peili:sdk/base",
    pub_export_macro: true,
    export_macro_name: "export_base_bindings",
    default_bindings_module: "peili_policy::contract",
    additional_derives: [PartialEq, Clone],
    generate_all,
});
