//! Behaviour under fault (issue 3, section 3): real `peili` programs in namespaces, each fault beside a control without it.
//!
//! The pull must end right, from a peer or upstream, and what the fault adds is bounded. `peili pull`, which behaves as
//! containerd does, is the client where CRI itself is not in question; `containerds` and the liars' cases pull through CRI.
//!
//! Not here: jumps of the clock. Namespaces do not divide the system's clock, so that a jump would hit the whole machine;
//! all logic counts in `tokio::time::Instant`, which is the monotonic clock.

mod containerds;
mod fleet;
mod liars;
mod load;
mod peers;
mod processes;
mod strangers;

use std::time::Duration;

use peili_lab::Requirement::{self, Iproute2, Iptables, Root};

use crate::Case;

/// Cases take seconds; those that end in a long suspicion wait for its end.
const LIMIT: Duration = Duration::from_secs(120);

/// What a case needs that has namespaces and a filter.
const NET: [Requirement; 3] = [Root, Iproute2, Iptables];

/// What issue 3 allows a fault to add; measured values may be twice that on a machine of two cores that does other
/// things too.
const NEW: Duration = Duration::from_millis(300);
const SUSPECTED: Duration = Duration::from_millis(50);
const STALL: Duration = Duration::from_secs(2);
const NOISE: u32 = 2;

pub(crate) fn cases() -> Vec<Case> {
    let all = [
        peers::cases(),
        liars::cases(),
        strangers::cases(),
        processes::cases(),
        load::cases(),
        containerds::cases(),
    ];
    all.into_iter().flatten().map(|case| case.within(LIMIT)).collect()
}

/// Checks what a fault added to the time of the control, and prints it.
fn added(what: &str, control: Duration, faulty: Duration, limit: Duration) {
    let added = faulty.saturating_sub(control);
    println!("{what}: control {control:?}, with the fault {faulty:?}, added {added:?} of {limit:?}");
    assert!(added <= limit * NOISE, "{what} added {added:?}, allowed are {limit:?}");
}
