//! A component that does nothing: what a call of it costs is the yardstick of what policies cost.

use wasmtime::Store;
use wasmtime::component::{Component, Linker, TypedFunc};

use super::profile::{self, Bound, Code};

/// `(component (core module $m (func (export "f"))) (core instance $i (instantiate $m))
/// (func (export "f") (canon lift (core func $i "f"))))`
const NOOP: [u8; 80] = [
    0, 0x61, 0x73, 0x6d, 0x0d, 0, 1, 0, // head
    1, 31, 0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, // module
    1, 4, 1, 0x60, 0, 0, 3, 2, 1, 0, 7, 5, 1, 1, b'f', 0, 0, 10, 4, 1, 2, 0, 0x0b, // with the function
    2, 4, 1, 0, 0, 0, // instance
    7, 5, 1, 0x40, 0, 1, 0, // type
    6, 7, 1, 0, 0, 1, 0, 1, b'f', // alias
    8, 6, 1, 0, 0, 0, 0, 0, // lifted
    11, 7, 1, 0, 1, b'f', 1, 0, 0, // export
];

/// An instance of it, under the settings of policies.
pub struct Noop {
    store: Store<()>,
    function: TypedFunc<(), ()>,
}

impl Noop {
    /// Compiles it.
    ///
    /// # Errors
    /// The engine cannot work here.
    pub fn new() -> Result<Self, String> {
        let made = || {
            let engine = profile::engine(Code::here(), Bound::Time)?;
            let mut store = Store::new(&engine, ());
            // Nobody counts epochs here.
            store.set_epoch_deadline(1);
            let component = Component::new(&engine, NOOP)?;
            let instance = Linker::new(&engine).instantiate(&mut store, &component)?;
            let function = instance.get_typed_func(&mut store, "f")?;
            Ok(Self { store, function })
        };
        made().map_err(|error: wasmtime::Error| format!("{error:#}"))
    }

    /// Calls it; whether it returned.
    pub fn call(&mut self) -> bool {
        self.function.call(&mut self.store, ()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_called_again_and_again() {
        let mut noop = Noop::new().unwrap();
        assert!((0..100).all(|_| noop.call()));
    }
}
