//! A Kubernetes API server that has too much to do: it refuses with 429, which is named, and is asked no more for it.

use std::time::Duration;

use peili::cluster::{Cause, Kind};
use peili::election::lease::Standing;
use peili_lab::candidate::{Candidate, leader};
use peili_lab::kubernetes::{Options, Part};
use peili_lab::{Requirement, wait};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::Case;
use crate::coordination::{Cluster, LEASE, lock};

/// Longest until something that is certain is seen.
const SOON: Duration = Duration::from_secs(30);
/// For how long it is counted what a server is asked that refuses.
const COUNTED: Duration = Duration::from_secs(6);

pub(crate) fn cases() -> Vec<Case> {
    let long = Duration::from_secs(180);
    vec![
        Case::new(
            "strain::a_server_that_refuses_is_named_and_not_hurried",
            &[Requirement::Kubernetes],
            refused,
        )
        .within(long),
    ]
}

/// One request at a time is served; that one waits for a storage that stands still, and all others are refused.
async fn refused() {
    let mut options = Options::on_loopback();
    options.flags =
        ["--max-requests-inflight=1", "--max-mutating-requests-inflight=1"].map(str::to_owned).to_vec();
    let cluster = Cluster::start(options).await;
    cluster.allow(&["get", "update", "watch"], true).await;
    let folder = cluster.credentials("account").await;
    let token = std::fs::read_to_string(folder.join("token")).unwrap();
    let candidates = [0, 1].map(|rank| {
        let lock = lock(Kind::Lease, cluster.server.url(), &folder);
        Candidate::start(lock, &format!("n{rank}"), Standing::Candidate(rank))
    });
    let all: Vec<&Candidate> = candidates.iter().collect();
    leader(&all, SOON).await.unwrap();

    // Administrators are never refused; these hold the only places.
    let lease = cluster.lease().await;
    assert!(lease.is_some());
    cluster.server.freeze(Part::Storage).unwrap();
    let mut held = JoinSet::new();
    for (method, body) in [("GET", None), ("PUT", lease)] {
        let client = cluster.server.client(&token);
        held.spawn(async move {
            loop {
                let _ = client.send(method, LEASE, body.as_ref()).await;
                sleep(Duration::from_millis(50)).await;
            }
        });
    }
    wait::until("it is refused, and that is named", SOON, async || {
        let states = all.iter().map(|one| one.strict.state());
        // That it refuses says that it is there.
        states
            .into_iter()
            .any(|state| state.cause() == Cause::Throttled && state.reached == Some(true))
            .then_some(())
    })
    .await
    .unwrap();
    wait::until("nobody leads", SOON, async || all.iter().all(|one| !one.leads()).then_some(()))
        .await
        .unwrap();
    let refusals = |server: &peili_lab::ApiServer| {
        server.requests(|request| request.user.ends_with(":peili") && request.code == 429).unwrap().len()
    };
    let before = refusals(&cluster.server);
    sleep(COUNTED).await;
    let count = refusals(&cluster.server) - before;
    println!("strain: {count} refusals in {COUNTED:?}");
    assert!(count < 4 * 6, "two candidates ask {count} times");

    held.shutdown().await;
    cluster.server.thaw(Part::Storage).unwrap();
    let (_, took) = leader(&all, SOON).await.unwrap();
    println!("strain: a leader {took:?} after the server had time again");
}
