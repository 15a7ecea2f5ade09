//! The `peili` program.

fn main() {}
