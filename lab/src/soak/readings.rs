//! What the stable nodes use over time, and whether that grows.

use std::time::Duration;

use peili_lab::process::Usage;

use super::fleet::Fleet;

/// The first part of a run does not count: caches, pools and the allocator's arenas fill.
const WARM_UP: f64 = 0.25;
const WARM_UP_LIMIT: Duration = Duration::from_secs(120);

/// What a median may grow by. A run under random load is not even: each download in flight holds a segment or two (8 MiB
/// each in sockets and buffers, shared between at most a few), and the allocator gives nothing back of what a busy moment took.
/// A real leak is seen all the same: what is lost with each of 4 requests a second adds up to thousands in ten minutes.
const MEMORY_FACTOR: f64 = 1.25;
const MEMORY_SLACK: u64 = 12 << 20;
/// Five peers with a few pooled connections each come and go with the churn, on both ends.
const DESCRIPTOR_SLACK: usize = 32;
/// The runtime starts threads for files as needed and ends them after 10 s without work; there are 64 at most.
const THREAD_SLACK: usize = 12;
/// No node may ever hold more than this, killed ones included: five times what one holds at rest in a debug build.
const MEMORY_LIMIT: u64 = 400 << 20;

/// All readings after the warm-up, by node.
#[derive(Debug)]
pub(super) struct Readings {
    warm_up: Duration,
    nodes: Vec<Vec<Usage>>,
}

/// Medians of a part of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Medians {
    memory: u64,
    descriptors: usize,
    threads: usize,
}

impl Readings {
    /// For a run of `length` with `nodes` that are read.
    pub(super) fn new(length: Duration, nodes: usize) -> Self {
        Self { warm_up: length.mul_f64(WARM_UP).min(WARM_UP_LIMIT), nodes: vec![Vec::new(); nodes] }
    }

    /// Reads the nodes, `elapsed` after the start.
    pub(super) fn read(&mut self, fleet: &Fleet, elapsed: Duration) {
        for (index, slot) in fleet.slots.iter().enumerate() {
            let Some(usage) = slot.usage() else {
                if slot.stable {
                    fleet.violation(format!("{} has ended", slot.name));
                }
                continue;
            };
            if usage.resident > MEMORY_LIMIT {
                fleet.violation(format!("{} holds {} MiB", slot.name, usage.resident >> 20));
            }
            if elapsed >= self.warm_up
                && let Some(readings) = self.nodes.get_mut(index)
            {
                readings.push(usage);
            }
        }
    }

    /// What grew.
    pub(super) fn judge(&self, fleet: &Fleet) -> Vec<String> {
        let mut faults = Vec::new();
        for (slot, readings) in fleet.slots.iter().zip(&self.nodes) {
            let (first, last) = thirds(readings);
            faults.extend(grown(first, last).into_iter().map(|fault| format!("{}: {fault}", slot.name)));
        }
        faults
    }

    /// First and last medians for people.
    pub(super) fn table(&self, fleet: &Fleet) -> String {
        let mut text = format!(
            "{:<8} {:>9} {:>18} {:>14} {:>14} {:>9} {:>8}\n",
            "node", "restarts", "memory MiB", "descriptors", "threads", "pulls", "hang-ups"
        );
        for (index, slot) in fleet.slots.iter().enumerate() {
            let [memory, descriptors, threads] = match self.nodes.get(index) {
                Some(readings) => {
                    let (first, last) = thirds(readings);
                    [
                        format!("{} -> {}", first.memory >> 20, last.memory >> 20),
                        format!("{} -> {}", first.descriptors, last.descriptors),
                        format!("{} -> {}", first.threads, last.threads),
                    ]
                }
                None => [const { String::new() }; 3],
            };
            let (restarts, pulls, hang_ups) = slot.counts();
            text.push_str(&format!(
                "{:<8} {restarts:>9} {memory:>18} {descriptors:>14} {threads:>14} {pulls:>9} {hang_ups:>8}\n",
                slot.name
            ));
        }
        text
    }
}

fn thirds(readings: &[Usage]) -> (Medians, Medians) {
    let third = readings.len() / 3;
    (medians(&readings[..third]), medians(&readings[readings.len() - third..]))
}

fn medians(readings: &[Usage]) -> Medians {
    fn median<T: Ord + Copy + Default>(values: impl Iterator<Item = T>) -> T {
        let mut values: Vec<T> = values.collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or_default()
    }
    Medians {
        memory: median(readings.iter().map(|usage| usage.resident)),
        descriptors: median(readings.iter().map(|usage| usage.descriptors)),
        threads: median(readings.iter().map(|usage| usage.threads)),
    }
}

fn grown(first: Medians, last: Medians) -> Vec<String> {
    let mut faults = Vec::new();
    #[expect(clippy::cast_precision_loss, reason = "a limit need not be exact")]
    let limit = first.memory as f64 * MEMORY_FACTOR + MEMORY_SLACK as f64;
    #[expect(clippy::cast_precision_loss, reason = "a limit need not be exact")]
    if last.memory as f64 > limit {
        faults.push(format!("memory grew from {} to {} MiB", first.memory >> 20, last.memory >> 20));
    }
    if last.descriptors > first.descriptors + DESCRIPTOR_SLACK {
        faults.push(format!("descriptors grew from {} to {}", first.descriptors, last.descriptors));
    }
    if last.threads > first.threads + THREAD_SLACK {
        faults.push(format!("threads grew from {} to {}", first.threads, last.threads));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(value: impl Fn(u64) -> Usage) -> Vec<Usage> {
        (0..90).map(value).collect()
    }

    #[test]
    fn a_leak_is_seen_and_noise_is_not() {
        let check = |readings: &[Usage], faults: usize| {
            let (first, last) = thirds(readings);
            assert_eq!(grown(first, last).len(), faults, "{first:?} {last:?}");
        };
        let noisy = |step: u64| Usage {
            resident: (40 << 20) + (step * 7919 % 13) * (1 << 20),
            descriptors: 60 + usize::try_from(step * 31 % 17).unwrap_or(0),
            threads: 10 + usize::try_from(step % 5).unwrap_or(0),
            ..Usage::default()
        };
        check(&readings(noisy), 0);
        check(&readings(|step| Usage { resident: (40 + step) << 20, ..noisy(step) }), 1);
        check(&readings(|step| Usage { descriptors: usize::try_from(step).unwrap_or(0), ..noisy(step) }), 1);
        check(&readings(|step| Usage { threads: usize::try_from(step).unwrap_or(0) / 2, ..noisy(step) }), 1);
        check(&[], 0);
    }
}
