//! What was measured on: figures of different machines, or of a busy one, say little beside each other.

use std::fs;

use serde_json::{Value, json};

/// The machine, as it is now.
pub(crate) fn describe() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cpu = read("/proc/cpuinfo");
    let flags = field(&cpu, "flags").unwrap_or_default();
    let wanted = ["aes", "vaes", "avx2", "avx512f", "sha_ni"];
    let has: Vec<_> = wanted.into_iter().filter(|flag| flags.split(' ').any(|of| of == *flag)).collect();
    json!({
        "cpu": field(&cpu, "model name"),
        "flags": has,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": load(),
    })
}

/// Programs that ran or waited for a CPU, on average over the last minute.
pub(crate) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}
