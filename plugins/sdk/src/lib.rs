//! What a Peili policy is written with.
//!
//! The contract is `wit/policy.wit`: three worlds, for registries, elections and trust. Peili has no host for policies
//! yet, so there is nothing here but the place where their bindings will be.
#![no_std]
