//! The time of day jumps, on both ends. Namespaces do not divide the system's clock, so that libfaketime tells each
//! process its own; all logic counts by the monotonic clock, which it leaves alone.

use std::time::Duration;

use peili_lab::Requirement;
use peili_lab::node::Plan;
use rustix::process::Signal;

use super::fleet::{Fleet, Setup};
use super::{NET, NEW, Slow, When, added, timed};
use crate::Case;

pub(super) fn cases() -> Vec<Case> {
    let needs = [&NET[..], &[Requirement::Faketime]].concat();
    let case = |when| {
        let name = format!("faults::clock::jumps_{when:?}").to_lowercase();
        timed(name, &needs, move || jumps(when))
    };
    When::ALL.map(case).into()
}

async fn jumps(when: When) -> Result<(), Slow> {
    let movable = |plans: &mut Vec<Plan>| {
        for plan in plans {
            plan.let_clock_jump().unwrap();
        }
    };
    let (mut fleet, _) = Setup::at(when, 1).start_apart(movable).await;
    fleet.settled(None).await;
    let control = fleet.control().await;
    let processes = ids(&fleet);
    for offset in ["+1d", "-1d"] {
        let strike = async |fleet: &mut Fleet| {
            for node in &fleet.nodes {
                node.set_clock(offset).unwrap();
            }
        };
        let pull = fleet.struck(when, strike).await;
        assert_eq!((pull.upstream, pull.resumed), (0, 0), "{pull:?}");
        added(&format!("the clocks jump by {offset}, {when:?}"), control, pull.elapsed, NEW)?;
    }
    // New handshakes too, between clocks that are two days apart.
    fleet.nodes[0].set_clock("+1d").unwrap();
    fleet.nodes[1].process().unwrap().signal(Signal::KILL).unwrap();
    fleet.nodes[1].restart().await.unwrap();
    fleet.settled(None).await;
    fleet.warm().await;
    assert_eq!(ids(&fleet)[0], processes[0], "it was started again");
    // Times in the status are of today's clock, whichever that is; nothing waits for one to come.
    let status = tokio::time::timeout(Duration::from_secs(1), fleet.asker().status()).await.unwrap().unwrap();
    assert!(status["node"]["uptime_seconds"].as_u64().unwrap() < 600, "{status}");
    Ok(())
}

fn ids(fleet: &Fleet) -> Vec<u32> {
    fleet.nodes.iter().map(|node| node.process().unwrap().id()).collect()
}
