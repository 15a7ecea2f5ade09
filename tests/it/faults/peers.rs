//! Holders that die, hang, vanish, refuse, are busy, end or lose their content: before the pull, in the middle of a
//! body and between layers, alone and beside another one.

use std::time::Duration;

use peili::network::identity::Identity;
use peili_lab::netns::Block;
use peili_lab::node::Plan;
use peili_lab::peer::Hold;
use peili_lab::{Image, peer};
use rustix::process::Signal;
use serde_json::json;

use super::fleet::{Fleet, Setup};
use super::{BUSY, NET, NEW, STALL, SUSPECTED, Slow, When, added, timed};
use crate::Case;

/// What happens to the first holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Killed,
    Stopped,
    Dropped,
    Refusing,
    Busy,
    Deleted,
    Terminated,
}

const ALL: [Fault; 7] = [
    Fault::Killed,
    Fault::Stopped,
    Fault::Dropped,
    Fault::Refusing,
    Fault::Busy,
    Fault::Deleted,
    Fault::Terminated,
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for fault in ALL {
        for when in When::ALL {
            for holders in [1, 2] {
                let of = if holders == 1 { "alone" } else { "one_of_two" };
                let name = format!("faults::peers::{fault:?}_{when:?}_{of}").to_lowercase();
                // Beside others two connections of 50 ms are too slow.
                cases.push(timed(name, &NET, move || case(fault, when, holders)).alone());
            }
        }
    }
    cases
}

impl Fault {
    fn strike(self, fleet: &Fleet) {
        match self {
            Self::Killed => fleet.nodes[1].process().unwrap().signal(Signal::KILL).unwrap(),
            Self::Stopped => fleet.nodes[1].process().unwrap().pause().unwrap(),
            Self::Dropped => fleet.network.block(0, 1, Block::Drop).unwrap(),
            Self::Refusing => fleet.network.block(0, 1, Block::Reject).unwrap(),
            Self::Busy => tokio::task::block_in_place(|| fleet.hold.as_ref().unwrap().take()).unwrap(),
            Self::Deleted => {
                for layer in 0..fleet.image.layers.len() {
                    std::fs::remove_file(fleet.layer_file(1, layer)).unwrap();
                }
            }
            Self::Terminated => fleet.nodes[1].process().unwrap().signal(Signal::TERM).unwrap(),
        }
    }

    /// What it may add to a pull.
    fn limit(self, when: When) -> Duration {
        match (self, when) {
            (Self::Busy, _) => BUSY + NEW,
            (_, When::Before) | (Self::Deleted, _) => NEW,
            _ => STALL,
        }
    }

    fn setup(self, when: When, holders: usize) -> Setup {
        let mut setup = Setup::at(when, holders);
        if self == Self::Busy {
            setup.config = json!({"transfer": {"uploads": 1, "uploads-per-peer": 1, "queue": 1}});
            setup.other = Some(hogged());
            if when == When::MidBody {
                // Several segments, since the one that is on its way is not taken away.
                setup.image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
            }
        }
        setup
    }
}

/// Only the first holder has it.
fn hogged() -> Image {
    Image::builder("library/hog", "v1").layer(32 << 20).seed(7).build().unwrap()
}

/// Who proves `hog`, ready to take the one upload of the first holder.
fn hold(fleet: &Fleet, hog: &Identity) -> Hold {
    let (target, image) = (peer::of(&fleet.nodes[1].plan).unwrap(), hogged());
    let namespace = &fleet.network.nodes[fleet.nodes.len()].namespace;
    let connect = || Hold::connect(namespace, hog, &target, image.layers[0], image.layer_bytes());
    tokio::task::block_in_place(connect).unwrap()
}

async fn case(fault: Fault, when: When, holders: usize) -> Result<(), Slow> {
    let hog = Identity::generate();
    let introduce = |plans: &mut Vec<Plan>| {
        let peers = plans[1].config["network"]["peers"].as_array_mut().unwrap();
        peers.push(json!({"id": hog.peer_id().to_string()}));
    };
    let (mut fleet, _) = fault.setup(when, holders).start_apart(introduce).await;
    fleet.settled(None).await;
    let control = fleet.control().await;
    if fault == Fault::Busy {
        fleet.hold = Some(hold(&fleet, &hog));
    }
    let first = fleet.struck(when, async |fleet: &mut Fleet| fault.strike(fleet)).await;
    let what = format!("{fault:?} {when:?}, {holders} holders");
    println!("{what}: {first:?}");
    if holders > 1 {
        // The other one goes on, without a seam that the runtime sees.
        assert_eq!((first.upstream, first.resumed), (0, 0), "{first:?}");
    } else {
        assert!(first.upstream > 0, "{first:?}");
        // Only what no request noticed is without a cause.
        let holder = fleet.nodes[1].plan.peer_id.clone();
        let causes = match fault {
            Fault::Busy => ["peers-busy", "peers-busy"],
            Fault::Deleted => ["peers-failed", "unknown"],
            _ => [holder.as_str(), "peers-failed"],
        };
        fleet.says(&causes).await;
    }
    added(&what, control, first.elapsed, fault.limit(when))?;
    if fault == Fault::Terminated {
        let status = fleet.nodes[1].process_mut().unwrap().ended(Duration::from_secs(12)).await.unwrap();
        assert!(status.success(), "{status}");
    }
    if fault != Fault::Busy {
        // Once: the next pull is as fast as one without Peili.
        let next = fleet.pull().await;
        added(&format!("{what}, the next pull"), control, next.elapsed, SUSPECTED)?;
        assert!(holders == 1 || next.upstream == 0, "one dead holder cost the live one: {next:?}");
    }
    Ok(())
}
