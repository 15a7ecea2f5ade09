//! What the test guests of all worlds do wrong.

use std::hint::black_box;

use peili_policy::{LogLevel, Reason, log};

/// Allocates until there is no more.
pub(crate) fn allocate() -> ! {
    let mut all = Vec::new();
    loop {
        all.push(black_box(vec![1_u8; 1 << 20]));
    }
}

/// Writes 100,000 lines to the log.
pub(crate) fn flood() {
    for line in 0..100_000 {
        log(LogLevel::Info, &format!("line {line} {}", "x".repeat(4096)));
    }
}

/// Texts that are none.
pub(crate) fn garbage() -> Reason {
    Reason { code: "No Code\u{7}".into(), message: "\u{1b}[31m\r\nred\u{202e}".into() }
}

/// Never returns.
pub(crate) fn spin() -> ! {
    let mut turn = 0_u64;
    loop {
        turn = black_box(turn.wrapping_add(1));
    }
}

/// Calls itself without end.
#[allow(unconditional_recursion, reason = "that is what it is for")]
pub(crate) fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse(frame[0] + 1).wrapping_add(frame[63])
}
