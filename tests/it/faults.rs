//! Behaviour under fault (issue 3, section 3): real `peili` programs in namespaces, each fault beside a control without
//! Peili: the same pull from the origin alone.
//!
//! The pull must end right, from a peer or upstream, and what the fault adds is bounded. `peili pull`, which behaves as
//! containerd does, is the client where CRI itself is not in question; `containerds` and the liars' cases pull through CRI.

mod client;
mod clock;
mod containerds;
mod corrupt;
mod fleet;
mod liars;
mod load;
mod peers;
mod processes;
mod runtime;
mod strangers;
mod stuck;

use std::time::Duration;

use peili_lab::Requirement::{self, Iproute2, Iptables, Root};

use crate::Case;

/// Cases take seconds, and three attempts; those that end in a long suspicion wait for its end.
const LIMIT: Duration = Duration::from_secs(180);

/// What a case needs that has namespaces and a filter.
const NET: [Requirement; 3] = [Root, Iproute2, Iptables];

/// What issue 3 allows a fault to add: by a peer that is not yet suspected, by one that is, by a stall in mid-body.
const NEW: Duration = Duration::from_millis(300);
const SUSPECTED: Duration = Duration::from_millis(50);
const STALL: Duration = Duration::from_secs(2);
/// How long the requester waits for a busy peer.
const BUSY: Duration = Duration::from_secs(2);

/// Attempts of a case that is right and was too slow: two cores do other things too.
const ATTEMPTS: u32 = 3;

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before the pull's first request.
    Before,
    /// In the middle of a layer.
    MidBody,
    /// Some layers are there, others were not asked for yet.
    BetweenLayers,
}

/// A pull took longer than the issue allows.
#[derive(Debug)]
struct Slow(String);

pub(crate) fn cases() -> Vec<Case> {
    let all = [
        peers::cases(),
        liars::cases(),
        strangers::cases(),
        processes::cases(),
        load::cases(),
        containerds::cases(),
        corrupt::cases(),
        stuck::cases(),
        clock::cases(),
    ];
    all.into_iter().flatten().map(|case| case.within(LIMIT)).collect()
}

impl When {
    const ALL: [Self; 3] = [Self::Before, Self::MidBody, Self::BetweenLayers];
}

/// A case that measures: it runs alone, and anew where it was only too slow. What is wrong panics, and is not tried again.
fn timed<F: Future<Output = Result<(), Slow>> + 'static>(
    name: impl Into<String>,
    requirements: &[Requirement],
    attempt: impl Fn() -> F + Send + 'static,
) -> Case {
    let run = move || async move {
        let mut slow = Vec::new();
        for _ in 0..ATTEMPTS {
            match attempt().await {
                Ok(()) => return,
                Err(Slow(why)) => slow.push(why),
            }
        }
        panic!("too slow in all attempts: {slow:#?}");
    };
    Case::new(name, requirements, run).timed()
}

/// Compares a pull with the control, and prints what the fault added.
fn added(what: &str, control: Duration, faulty: Duration, limit: Duration) -> Result<(), Slow> {
    let added = faulty.saturating_sub(control);
    let line =
        format!("{what}: control {control:?}, with the fault {faulty:?}, added {added:?} of {limit:?}");
    println!("{line}");
    if added > limit { Err(Slow(line)) } else { Ok(()) }
}
