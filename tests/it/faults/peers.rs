//! Holders that die, hang, vanish or refuse: before the pull and in the middle of a body, alone and beside another one.

use peili_lab::Image;
use peili_lab::netns::Block;
use rustix::process::Signal;
use serde_json::json;

use super::fleet::{Fleet, Setup};
use super::{NET, NEW, STALL, SUSPECTED, added};
use crate::Case;

/// What happens to the first holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Killed,
    Stopped,
    Dropped,
    Refusing,
}

const ALL: [Fault; 4] = [Fault::Killed, Fault::Stopped, Fault::Dropped, Fault::Refusing];

/// What holders send in the cases that need a middle of a body: 32 MiB take about 1.3 s.
const RATE: u64 = 200_000_000;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for fault in ALL {
        for holders in [1, 2] {
            let of = if holders == 1 { "alone" } else { "one_of_two" };
            let name = |when: &str| format!("faults::peers::{fault:?}_{of}_{when}").to_lowercase();
            cases.push(Case::new(name("before_the_pull"), &NET, move || before(fault, holders)));
            cases.push(Case::new(name("in_mid_body"), &NET, move || in_mid_body(fault, holders)));
        }
    }
    cases.push(Case::new("faults::peers::busy_holder_is_waited_for_and_not_for_ever", &NET, busy));
    cases.push(Case::new("faults::peers::content_deleted_under_an_open_request", &NET, deleted));
    cases
}

impl Fault {
    fn strike(self, fleet: &Fleet) {
        match self {
            Self::Killed => fleet.nodes[1].process().unwrap().signal(Signal::KILL).unwrap(),
            Self::Stopped => fleet.nodes[1].process().unwrap().pause().unwrap(),
            Self::Dropped => fleet.network.block(0, 1, Block::Drop).unwrap(),
            Self::Refusing => fleet.network.block(0, 1, Block::Reject).unwrap(),
        }
    }
}

/// Many layers, so that what is paid per layer shows.
async fn before(fault: Fault, holders: usize) {
    let image = Image::builder("library/app", "v1").layers(12, 256 << 10).build().unwrap();
    let (fleet, _) = Setup::new(holders, image).start().await;
    let control = fleet.control().await;
    fault.strike(&fleet);
    let first = fleet.pull().await;
    added(&format!("{fault:?}, not yet suspected, {holders} holders"), control.elapsed, first.elapsed, NEW);
    let second = fleet.pull().await;
    added(&format!("{fault:?}, suspected, {holders} holders"), control.elapsed, second.elapsed, SUSPECTED);
    if holders > 1 {
        // One dead holder must not cost the live one.
        assert_eq!((first.upstream, second.upstream), (0, 0), "{first:?} {second:?}");
    }
}

async fn in_mid_body(fault: Fault, holders: usize) {
    let image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
    let (fleet, _) = Setup::new(holders, image).start().await;
    for holder in 1..=holders {
        fleet.network.set_rate(holder, Some(RATE)).unwrap();
    }
    let control = fleet.control().await;
    let before = fleet.peer_bytes().await;
    let strike = async {
        fleet.in_mid_body(before, 6e6).await;
        fault.strike(&fleet);
    };
    let (pull, ()) = tokio::join!(fleet.pull(), strike);
    added(&format!("{fault:?} in mid-body, {holders} holders"), control.elapsed, pull.elapsed, STALL);
    assert!(pull.mirrored > 4 << 20, "nothing came before the fault: {pull:?}");
    if holders > 1 {
        assert_eq!((pull.upstream, pull.resumed), (0, 0), "{pull:?}");
    } else {
        assert!(pull.upstream > 0 && pull.resumed > 0, "{pull:?}");
    }
    // Once: the next pull is not slower than the network.
    let next = fleet.pull().await;
    added(&format!("{fault:?}, the next pull, {holders} holders"), control.elapsed, next.elapsed, SUSPECTED);
}

/// One upload at a time, and a reader that keeps it: requests wait, are told that the holder is busy, and go upstream.
async fn busy() {
    let image = Image::builder("library/app", "v1").layers(2, 6 << 20).build().unwrap();
    let mut setup = Setup::new(1, image);
    setup.config = json!({"transfer": {"uploads": 1, "uploads-per-peer": 1, "queue": 1}});
    let (fleet, _) = setup.start().await;
    let control = fleet.control().await;
    // 4 Mbit/s: one segment takes longer than anybody waits.
    fleet.network.set_rate(1, Some(4_000_000)).unwrap();
    let path = format!("/v2/library/app/blobs/{}?ns=lab.test", fleet.image.layers[0]);
    let hog = fleet.asker().fetch(&path);
    let pull = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        fleet.pull().await
    };
    tokio::select! {
        answer = hog => panic!("the hog was served at once: {answer:?}"),
        pull = pull => {
            added("busy for ever", control.elapsed, pull.elapsed, 2 * STALL);
            assert!(pull.upstream > 0, "{pull:?}");
        }
    }
}

async fn deleted() {
    let image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
    let (fleet, _) = Setup::new(1, image).start().await;
    fleet.network.set_rate(1, Some(RATE)).unwrap();
    let control = fleet.control().await;
    let before = fleet.peer_bytes().await;
    let delete = async {
        fleet.in_mid_body(before, 6e6).await;
        let layer = &fleet.image.layers[0];
        std::fs::remove_file(fleet.layout().join("blobs/sha256").join(layer.hex())).unwrap();
    };
    let (pull, ()) = tokio::join!(fleet.pull(), delete);
    added("content deleted in mid-body", control.elapsed, pull.elapsed, NEW);
    assert!(pull.mirrored > 6 << 20, "{pull:?}");
}
