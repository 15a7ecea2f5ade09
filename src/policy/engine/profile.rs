//! What code becomes of a component, and what bounds it: the settings of wasmtime.
//!
//! Machine code where the kernel lets this process make some, else wasmtime's interpreter; which of them is found out once, by
//! making some. It neither compiles components nor runs them.
//!
//! A memory lies in a reserved range of addresses that is as large as what a guest can name, so that its code needs no checks: what
//! is beyond its memory is not mapped, and a signal ends the call. docs/benchmarks.md has what that is worth.

use rustix::process::{Resource, getrlimit};
use wasmtime::{Config, Engine, Instance, Module, OptLevel, Store};

/// Stack of the guest's code, in bytes: a part of the 2 MiB that a thread has.
pub(super) const STACK: usize = 256 << 10;
/// wasmtime's interpreter.
const INTERPRETER: &str = "pulley64";
/// How much longer interpreted code may take.
const SLOWNESS: u32 = 10;
/// Addresses of a memory, in bytes: what 32 bits can name. It takes no memory.
const RESERVED: u64 = 4 << 30;
/// Addresses behind it that are never mapped, in bytes (wasmtime's own choice).
const GUARD: u64 = 32 << 20;
/// `(module (func (export "probe") (result i32) i32.const 7))`
const PROBE: [u8; 38] = [
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, // head
    1, 5, 1, 0x60, 0, 1, 0x7f, // types
    3, 2, 1, 0, // functions
    7, 9, 1, 5, b'p', b'r', b'o', b'b', b'e', 0, 0, // exports
    10, 6, 1, 4, 0, 0x41, 7, 0x0b, // code
];

/// What ends a call that takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::policy) enum Bound {
    /// The clock alone.
    Time,
    /// A number of instructions, the same on all nodes; the clock is the safety net.
    Fuel,
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::policy) enum Code {
    /// For this processor.
    Native,
    /// The same, with checks in it instead of reserved addresses: this process may not have many.
    Checked,
    /// For any processor of this kind.
    #[cfg(test)]
    Baseline,
    /// By wasmtime's interpreter.
    Interpreted,
}

impl Code {
    /// Machine code if it can be made and run here.
    pub(in crate::policy) fn here() -> Self {
        let native = if has_addresses() { Self::Native } else { Self::Checked };
        match probe(native) {
            Ok(()) => native,
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "memory with code cannot be made here (SELinux execmem, PaX, PR_SET_MDWE?); policies are interpreted, and \
                     have ten times as long"
                );
                Self::Interpreted
            }
        }
    }

    /// How many times as long as machine code it may take.
    pub(super) fn pace(self) -> u32 {
        if self == Self::Interpreted { SLOWNESS } else { 1 }
    }
}

/// wasmtime with these settings.
pub(super) fn engine(code: Code, bound: Bound) -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        // Costs half a microsecond a call, and is for guests that wait.
        .concurrency_support(false)
        .epoch_interruption(true)
        .max_wasm_stack(STACK)
        .memory_init_cow(false)
        .wasm_backtrace_max_frames(None);
    if bound == Bound::Fuel {
        // All nodes must come to the same result: what machines differ in is fixed, or not there.
        config.consume_fuel(true).cranelift_nan_canonicalization(true).wasm_relaxed_simd(false);
    }
    let is_guarded = match code {
        Code::Native => true,
        Code::Checked => false,
        #[cfg(test)]
        Code::Baseline => {
            config.target(&format!("{}-unknown-linux-gnu", std::env::consts::ARCH))?;
            true
        }
        Code::Interpreted => {
            config.target(INTERPRETER)?;
            false
        }
    };
    if is_guarded {
        // 32 bits of index, and as much behind them as loads add to it.
        config.memory_reservation(RESERVED).memory_guard_size(GUARD);
    } else {
        config
            .signals_based_traps(false)
            .memory_reservation(0)
            .memory_reservation_for_growth(1 << 20)
            .memory_guard_size(0);
    }
    if code != Code::Interpreted {
        // Policies come optimised from their compiler: a fifth less time to load, and calls take as long.
        config.cranelift_opt_level(OptLevel::None);
    }
    Engine::new(&config)
}

/// Whether as many addresses may be reserved as there are.
fn has_addresses() -> bool {
    getrlimit(Resource::As).current.is_none()
}

/// Makes code and runs it.
fn probe(code: Code) -> wasmtime::Result<()> {
    let engine = engine(code, Bound::Time)?;
    let module = Module::new(&engine, &PROBE[..])?;
    let mut store = Store::new(&engine, ());
    store.set_epoch_deadline(1);
    let instance = Instance::new(&mut store, &module, &[])?;
    match instance.get_typed_func::<(), i32>(&mut store, "probe")?.call(&mut store, ())? {
        7 => Ok(()),
        other => Err(wasmtime::Error::msg(format!("code runs wrong: {other}"))),
    }
}
