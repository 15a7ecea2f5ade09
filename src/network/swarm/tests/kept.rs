//! A node that starts again, with what it kept on the disk.

use std::fs;

use super::*;
use crate::network::MemberState;

/// Starts with what is in a folder, and knows nobody.
async fn start(folder: &tempfile::TempDir) -> Node {
    let identity = Identity::load_or_create(folder.path()).unwrap();
    Start { identity, keep: Some(folder.path().to_owned()), ..Start::default() }.start().await
}

#[tokio::test]
async fn a_node_that_starts_again_knows_what_it_knew_and_finds_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let one = Start::default().start().await;
    let held = Digest::sha256(b"held");
    one.network.advertise(Advertisement::All(vec![held]));
    let mut two = start(&folder).await;
    two.network.set_peers(vec![one.as_peer()], Vec::new());
    let own = Digest::sha256(b"its own");
    two.network.advertise(Advertisement::All(vec![own]));
    wait_for("each knows", || {
        holders(&two.view(), &held) == [one.id()] && holders(&one.view(), &own) == [two.id()]
    })
    .await;
    two.swarm.take().unwrap().shutdown().await;

    let two = start(&folder).await;
    assert_eq!(holders(&two.view(), &held), [one.id()], "it is known before anybody was asked");
    wait_for("it is a member again", || {
        two.network.status().complete && one.sees_alive(&two) && two.sees_alive(&one)
    })
    .await;
    // It has not said anything of its store since.
    assert_eq!(holders(&one.view(), &own), [two.id()]);
    two.network.advertise(Advertisement::All(Vec::new()));
    wait_for("what it has no more is forgotten", || holders(&one.view(), &own).is_empty()).await;
}

#[tokio::test]
async fn a_damaged_view_costs_nothing_but_its_use() {
    let folder = tempfile::tempdir().unwrap();
    let one = Start::default().start().await;
    for content in [&b""[..], b"peili-view 1\n", b"peili-view 9\nfrom the future", &[0xff; 4096]] {
        fs::write(folder.path().join("view"), content).unwrap();
        let mut two = start(&folder).await;
        assert_eq!(two.network.status().members, 1);
        two.network.set_peers(vec![one.as_peer()], Vec::new());
        wait_for("it joins", || two.network.status().complete && two.sees_alive(&one)).await;
        two.swarm.take().unwrap().shutdown().await;
        assert!(fs::read(folder.path().join("view")).unwrap().len() > 300, "a good one is in its place");
    }
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_is_a_problem_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    // In the way of the file, and of its temporary name.
    fs::create_dir(folder.path().join(".view.new")).unwrap();
    fs::create_dir(folder.path().join("view")).unwrap();
    let one = Start::default().start().await;
    let mut two = start(&folder).await;
    two.network.set_peers(vec![one.as_peer()], Vec::new());
    wait_for("it joins", || two.sees_alive(&one)).await;
    two.swarm.take().unwrap().shutdown().await;
    assert!(folder.path().join("view").is_dir());
}

impl Node {
    fn sees_alive(&self, other: &Self) -> bool {
        let id = other.id().to_string();
        let peers = self.network.status().peers;
        peers.iter().any(|peer| peer.id == id && peer.state == Some(MemberState::Alive) && peer.neighbour)
    }
}
