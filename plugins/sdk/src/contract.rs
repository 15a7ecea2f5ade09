//! What all worlds of the contract have in common, as Rust.
//!
//! The generator makes a macro for each interface that is exported, and `lifecycle` is exported in every world: so it is made
//! once, here, and a component is the sum of this part and its world's own. What it makes is checked in, so that a policy
//! needs no generator, and an editor shows the types; `tests/bindings.rs` makes it, and compares.

include!("../bindings/base.rs");
