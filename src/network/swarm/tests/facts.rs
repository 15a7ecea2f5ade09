//! What members say of themselves for elections.

use super::*;
use crate::network::facts::{ApiServer, Facts};
use crate::network::gossip::wire::RECORD_LIMIT;

fn facts(labels: usize) -> Facts {
    let label = |n: usize| (format!("label-{n}"), "x".repeat(30));
    Facts {
        policy: [7; 16],
        api_server: ApiServer::Reachable,
        load: 3,
        uptime: 21,
        labels: (0..labels).map(label).collect(),
    }
}

fn sees(node: &Node, of: &Node, expected: &Facts) -> bool {
    let members = node.network.members();
    members
        .iter()
        .any(|member| member.peer.id == of.id() && member.facts == *expected && member.suspected.is_none())
}

#[tokio::test]
async fn members_hear_what_one_says_of_itself() {
    let first = Start::default().start().await;
    let second = Start::knowing(&[&first]).start().await;
    first.network.set_peers(vec![second.as_peer()], Vec::new());
    let mut changes = second.network.changes();
    wait_for("they know each other", || second.network.members().len() == 2).await;
    assert!(sees(&second, &first, &Facts::default()), "who says nothing is known all the same");
    changes.mark_unchanged();
    first.network.set_facts(facts(2));
    wait_for("it is heard", || sees(&second, &first, &facts(2)) && sees(&first, &first, &facts(2))).await;
    assert!(changes.has_changed().unwrap());
    assert!(first.problems().is_empty(), "{}", first.problems());
}

/// Guards the room of a record: one that is too long would be believed by nobody.
#[tokio::test]
async fn what_does_not_fit_is_left_out_and_said() {
    let first = Start::default().start().await;
    let advertise =
        (0..8).map(|n| format!("[2001:db8:1111:2222:3333:4444:5555:666{n}]:50001").parse().unwrap());
    let name = "n".repeat(250);
    let second = Start { advertise: advertise.collect(), name, ..Start::knowing(&[&first]) }.start().await;
    first.network.set_peers(vec![second.as_peer()], Vec::new());
    second.network.set_facts(facts(7));
    let own = || second.network.shared.view().gossip.members().own().record.clone();
    let told = Facts { labels: Vec::new(), ..facts(7) };
    wait_for("the rest is heard", || sees(&first, &second, &told)).await;
    assert!(own().signed.len() <= RECORD_LIMIT, "{}", own().signed.len());
    second.has_problem("not told all of `election.labels`").await;
}
