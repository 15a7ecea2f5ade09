//! This node's own `peili`: killed, hung and told to end, before a pull and in the middle of a body.

use std::time::Duration;

use peili_lab::{Generation, Image, Requirement};
use rustix::process::Signal;
use serde_json::json;

use super::fleet::Setup;
use super::{NET, NEW, STALL, added};
use crate::Case;
use crate::cluster;

const RATE: u64 = 200_000_000;
const END: Duration = Duration::from_secs(20);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("faults::processes::asker_killed", &NET, killed),
        Case::new("faults::processes::asker_killed_in_mid_body", &NET, killed_in_mid_body),
        Case::new("faults::processes::asker_terminated_in_mid_body", &NET, || terminated(0)),
        Case::new("faults::processes::holder_terminated_in_mid_body", &NET, || terminated(1)),
    ];
    for generation in [Generation::V1_7, Generation::V2] {
        let needs = [&NET[..], &[Requirement::Containerd(generation)]].concat();
        let name = format!("faults::processes::asker_stopped_{generation:?}").to_lowercase();
        cases.push(Case::new(name, &needs, move || stopped(generation)));
    }
    cases
}

async fn killed() {
    let image = Image::builder("library/app", "v1").layers(6, 64 << 10).build().unwrap();
    let (mut fleet, _) = Setup::new(1, image).start().await;
    let control = fleet.control().await;
    fleet.nodes[0].kill();
    let pull = fleet.pull().await;
    added("killed", control.elapsed, pull.elapsed, NEW);
    assert_eq!(pull.mirrored, 0);
}

async fn killed_in_mid_body() {
    let image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
    let (fleet, _) = Setup::new(1, image).start().await;
    fleet.network.set_rate(1, Some(RATE)).unwrap();
    let control = fleet.control().await;
    let before = fleet.peer_bytes().await;
    let kill = async {
        fleet.in_mid_body(before, 6e6).await;
        fleet.asker().process().unwrap().signal(Signal::KILL).unwrap();
    };
    let (pull, ()) = tokio::join!(fleet.pull(), kill);
    added("killed in mid-body", control.elapsed, pull.elapsed, NEW);
    assert!(pull.mirrored > 0 && pull.upstream > 0, "{pull:?}");
}

/// A transfer that runs ends as if nothing was; the holder's next segments come from elsewhere.
async fn terminated(node: usize) {
    let image = Image::builder("library/app", "v1").layer(32 << 20).build().unwrap();
    let mut setup = Setup::new(1, image);
    setup.config = json!({"node": {"drain": "10s"}});
    let (mut fleet, _) = setup.start().await;
    fleet.network.set_rate(1, Some(RATE)).unwrap();
    let control = fleet.control().await;
    let before = fleet.peer_bytes().await;
    let terminate = async {
        fleet.in_mid_body(before, 6e6).await;
        fleet.nodes[node].process().unwrap().signal(Signal::TERM).unwrap();
    };
    let (pull, ()) = tokio::join!(fleet.pull(), terminate);
    added(&format!("node {node} terminated in mid-body"), control.elapsed, pull.elapsed, STALL);
    if node == 0 {
        assert_eq!((pull.upstream, pull.resumed), (0, 0), "the body was cut: {pull:?}");
    } else {
        // The segment that was on its way came whole.
        assert!(pull.mirrored >= 8 << 20, "{pull:?}");
    }
    let status = fleet.nodes[node].process_mut().unwrap().ended(END).await.unwrap();
    assert!(status.success(), "{status}");
}

/// containerd waits as long as its mirror hangs: it has no limit of its own for a header (its pull request 13164 adds
/// one). What bounds it is Peili's liveness probe, which restarts the process: here SIGKILL after two seconds.
async fn stopped(generation: Generation) {
    let mut cluster = cluster::Setup { count: 1, ..cluster::Setup::new(generation) }.start_apart().await;
    let image =
        |seed| Image::builder("library/app", &format!("v{seed}")).layer(1 << 20).seed(seed).build().unwrap();
    let (control, image) = (image(1), image(2));
    cluster.origin.add(&control);
    cluster.origin.add(&image);
    let control = cluster.nodes[0].pull(&control).await;
    cluster.nodes[0].peili.process().unwrap().pause().unwrap();
    let probe = Duration::from_secs(2);
    let reference = image.reference(cluster::REGISTRY);
    let cri = cluster.nodes[0].containerd.cri().clone();
    let pull = cri.pull(&reference, cluster::PULL);
    let restart = async {
        tokio::time::sleep(probe).await;
        cluster.nodes[0].peili.process().unwrap().signal(Signal::KILL).unwrap();
    };
    let (pull, ()) = tokio::join!(pull, restart);
    let pull = pull.unwrap();
    added("stopped, then restarted", control.elapsed, pull.elapsed, probe + NEW);
    cluster.nodes[0].peili.restart().await.unwrap();
}
