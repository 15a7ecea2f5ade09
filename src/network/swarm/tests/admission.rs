//! Nodes that know each other by a cluster key, and those that have none, or another one.

use std::path::PathBuf;

use futures::StreamExt;
use libp2p::Multiaddr;
use libp2p::swarm::SwarmEvent;

use super::abuse::raw;
use super::behaviour::{PROOF_TIME, UNPROVED_PER_ADDRESS};
use super::*;
use crate::network::admission::Admission;
use crate::oci::{Members, Proof};
use crate::trust::{self, PinnedTrust};

mod book;

/// A node with the real gate.
struct Member {
    id: PeerId,
    address: SocketAddr,
    network: SwarmNetwork,
    trust: Arc<PinnedTrust>,
    admission: Admission,
    config: Config,
    _swarm: Swarm,
}

/// What a node is made of.
struct Made {
    config: Config,
    /// Makes its certificate for another one, as if it had it from there.
    certified: Option<PeerId>,
    /// By how many seconds its clock is wrong.
    late: i64,
}

/// Two key files.
struct Keys {
    first: PathBuf,
    second: PathBuf,
    _folder: tempfile::TempDir,
}

impl Keys {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str, byte: u8| {
            let path = folder.path().join(name);
            std::fs::write(&path, [byte; 32]).unwrap();
            path
        };
        Self { first: path("first", 1), second: path("second", 2), _folder: folder }
    }
}

impl Made {
    /// By these keys, looking for peers there.
    fn by(keys: &[&PathBuf], others: &[&Member]) -> Self {
        let config = Config {
            listen: vec![(Ipv4Addr::LOCALHOST, 0).into()],
            dns: others.iter().map(|other| other.address.to_string()).collect(),
            cluster_key: keys.iter().copied().cloned().collect(),
            ..Config::default()
        };
        Self { config, certified: None, late: 0 }
    }

    async fn start(self) -> Member {
        let Self { config, certified, late } = self;
        let identity = Identity::generate();
        let peers = trust::Peers {
            listed: config.peers.iter().map(|peer| peer.id.clone()).collect(),
            denied: config.deny.iter().cloned().collect(),
            by_key: !config.cluster_key.is_empty(),
        };
        let trust = Arc::new(PinnedTrust::new(trust::Config::default(), peers).unwrap());
        let id = identity.peer_id().clone();
        let admission = Admission::at(
            certified.unwrap_or_else(|| id.clone()),
            &config,
            Arc::clone(&trust) as Arc<dyn Members>,
            move |now| now.saturating_add_signed(-late),
        );
        let announcement = Announcement { node: "node".into(), ..Announcement::default() };
        let parts = Parts {
            gate: Arc::clone(&trust) as _,
            admission: admission.clone(),
            tags: Arc::new(crate::network::conformance::TestTags::default()),
            metrics: Metrics::default(),
            keep: None,
            first: None,
        };
        let (swarm, network) = Swarm::spawn(&identity, &config, &announcement, parts).unwrap();
        wait_for("it listens", || !network.status().listening.is_empty()).await;
        let address = network.status().listening[0].parse().unwrap();
        Member { id, address, network, trust, admission, config, _swarm: swarm }
    }
}

impl Member {
    fn connected(&self) -> usize {
        self.network.status().peers.iter().filter(|peer| peer.connected).count()
    }

    async fn sees(&self, count: usize) {
        wait_for("connected", || self.connected() == count).await;
    }

    fn problems(&self) -> String {
        self.network.status().problems.join("\n")
    }

    async fn has_problem(&self, text: &str) {
        let found = wait_until(Duration::from_secs(15), || self.problems().contains(text)).await;
        assert!(found, "no problem with {text:?} in {:?}", self.problems());
    }

    fn holders(&self, digest: &Digest) -> Vec<PeerId> {
        let network: Arc<dyn Network> = Arc::new(self.network.clone());
        holders(&network, digest)
    }

    /// With other keys from now on, as after a change of the configuration or of the files.
    fn rekey(&mut self, keys: &[&PathBuf]) {
        self.config.cluster_key = keys.iter().copied().cloned().collect();
        assert!(self.admission.reconfigure(&self.config));
        self.network.recheck();
    }

    fn proof(&self, other: &Self) -> String {
        self.trust.proof(&other.id).to_string()
    }

    fn multiaddr(&self) -> Multiaddr {
        format!("/ip4/127.0.0.1/tcp/{}", self.address.port()).parse().unwrap()
    }
}

/// Whether `condition` holds within `limit`.
async fn wait_until(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let end = StdInstant::now() + limit;
    while !condition() && StdInstant::now() < end {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    condition()
}

#[tokio::test]
async fn members_by_key_find_each_other_and_share_all() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let two = Made::by(&[&keys.first], &[&one]).start().await;
    let digest = Digest::sha256(b"layer");
    two.network.advertise(Advertisement::Added(digest));
    for (node, other) in [(&one, &two), (&two, &one)] {
        node.sees(1).await;
        wait_for("trusted for tags", || node.network.tag_peers().len() == 1).await;
        let status = node.network.status();
        assert_eq!((status.peers[0].id.as_str(), status.peers[0].node.as_str()), (other.id.as_str(), "node"));
        assert_eq!((status.peers[0].level, &status.peers[0].proof), (Level::Tags, &node.proof(other)));
        assert!(status.peers[0].proof.starts_with("key ") && status.problems.is_empty(), "{status:?}");
    }
    wait_for("what it holds", || one.holders(&digest) == [two.id.clone()]).await;
}

/// Guards that nothing is believed before the certificate is right, and that nothing but a certificate is told.
#[tokio::test]
async fn who_proves_nothing_is_told_nothing_and_believed_nothing() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let day = 24 * 3600;
    let by = |keys: &[&PathBuf]| Made::by(keys, &[&one]);
    let keyless = {
        let mut made = by(&[]);
        made.config.peers.push(PeerConfig { id: one.id.clone(), addresses: Vec::new() });
        made
    };
    let elsewhere = {
        let mut made = by(&[&keys.first]);
        made.config.cluster = "elsewhere".into();
        made
    };
    // They stay: libp2p dials from the port that it listens at, which must not be one of a connection that is closing.
    let mut strangers = Vec::new();
    for (stranger, cause) in [
        (keyless, "membership certificate: has it the cluster key?"),
        (by(&[&keys.second]), "which this node does not have"),
        (elsewhere, "was made for the cluster `elsewhere`, this node is of `default`"),
        (Made { late: 3 * day, ..by(&[&keys.first]) }, "its certificate expired 2days"),
        (Made { late: -3 * day, ..by(&[&keys.first]) }, "its certificate ends in 3days"),
        (Made { certified: Some(one.id.clone()), ..by(&[&keys.first]) }, "was made for another peer"),
    ] {
        let stranger = stranger.start().await;
        let digest = Digest::sha256(stranger.id.as_str().as_bytes());
        stranger.network.advertise(Advertisement::Added(digest));
        let text = format!("peer {} at 127.0.0.1 was refused: it", stranger.id);
        let named = wait_until(Duration::from_secs(15), || one.problems().contains(&text)).await;
        assert!(named, "{cause}: {:?}, there {:?}", one.problems(), stranger.network.status());
        one.has_problem(cause).await;
        assert!(one.holders(&digest).is_empty() && one.network.shared.peers().is_empty(), "{cause}");
        let status = stranger.network.status();
        assert!(status.peers.iter().all(|peer| !peer.connected && peer.node.is_empty()), "{status:?}");
        assert_eq!((one.proof(&stranger), one.connected()), (String::new(), 0));
        strangers.push(stranger);
    }
}

/// Guards `PROOF_TIME`, and that what is said without a proof is not kept.
#[tokio::test]
async fn who_shows_nothing_is_closed_in_time() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let mut raw = raw();
    let claim = message::encode(&message::Message::Resolve(question("v1")));
    raw.dial(one.multiaddr()).unwrap();
    let mut since = None;
    let closed = async {
        loop {
            match raw.select_next_some().await {
                SwarmEvent::ConnectionEstablished { peer_id, .. } => {
                    since = Some(StdInstant::now());
                    let length = u32::try_from(claim.len()).unwrap().to_be_bytes();
                    raw.behaviour_mut().send_request(&peer_id, [&length[..], &claim].concat());
                }
                SwarmEvent::ConnectionClosed { .. } => return since.unwrap().elapsed(),
                _ => {}
            }
        }
    };
    let elapsed = tokio::time::timeout(3 * PROOF_TIME, closed).await.expect("it is closed");
    assert!(elapsed > PROOF_TIME / 2, "{elapsed:?}");
    assert!(one.network.shared.peers().is_empty());
    one.has_problem("showed no membership certificate").await;
}

/// Guards `UNPROVED_PER_ADDRESS`: who proves nothing gives way, and keeps no member out.
#[tokio::test]
async fn unproved_connections_are_few() {
    let keys = Keys::new();
    let one = Made::by(&[&keys.first], &[]).start().await;
    let mut floods: Vec<Vec<_>> =
        (0..5).map(|_| (0..=UNPROVED_PER_ADDRESS).map(|_| raw()).collect()).collect();
    // One of them goes before its time is over.
    within(PROOF_TIME * 3 / 4, async |number| {
        let closed = floods[usize::from(number)].iter_mut().map(|raw| {
            raw.dial(one.multiaddr()).unwrap();
            Box::pin(async move {
                while !matches!(raw.select_next_some().await, SwarmEvent::ConnectionClosed { .. }) {}
            })
        });
        futures::future::select_all(closed).await;
    })
    .await;
    let two = Made::by(&[&keys.first], &[&one]).start().await;
    two.sees(1).await;
}

/// Guards that live connections end with what admitted their peer.
#[tokio::test]
async fn who_is_no_member_any_more_is_closed_at_once() {
    let keys = Keys::new();
    let mut one = Made::by(&[&keys.first], &[]).start().await;
    let mut two = Made::by(&[&keys.first], &[&one]).start().await;
    one.sees(1).await;
    two.sees(1).await;
    one.rekey(&[&keys.second]);
    let since = StdInstant::now();
    one.sees(0).await;
    two.sees(0).await;
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    one.has_problem("which this node does not have: is the key being replaced").await;
    two.rekey(&[&keys.second]);
    one.sees(1).await;
    wait_for("no problem is left", || one.network.status().problems.is_empty()).await;
}

#[tokio::test]
async fn a_new_certificate_is_shown_over_the_same_connection() {
    let keys = Keys::new();
    let mut one = Made::by(&[&keys.first, &keys.second], &[]).start().await;
    let mut two = Made::by(&[&keys.first, &keys.second], &[&one]).start().await;
    one.sees(1).await;
    let before = one.proof(&two);
    for node in [&mut one, &mut two] {
        node.rekey(&[&keys.second, &keys.first]);
    }
    wait_for("proved by the other key", || one.proof(&two) != before && two.proof(&one) != before).await;
    for node in [&mut one, &mut two] {
        node.rekey(&[&keys.second]);
    }
    assert_eq!((one.connected(), two.connected()), (1, 1));
    assert!(matches!(one.trust.proof(&two.id), Proof::Key(_)));
}

#[tokio::test]
async fn a_denied_member_is_refused_by_name() {
    let keys = Keys::new();
    let two = Made::by(&[&keys.first], &[]).start().await;
    let mut made = Made::by(&[&keys.first], &[&two]);
    made.config.deny.push(two.id.clone());
    let one = made.start().await;
    one.has_problem("denied by this node's `network.deny`").await;
    assert_eq!((one.proof(&two), one.connected(), two.connected()), ("denied".to_owned(), 0, 0));
}

/// A key that comes after the start.
#[tokio::test]
async fn a_node_without_its_key_admits_nobody_until_it_has_one() {
    let keys = Keys::new();
    let late = keys.first.with_file_name("late");
    let one = Made::by(&[&keys.first], &[]).start().await;
    let two = Made::by(&[&late], &[&one]).start().await;
    let network = two.network.clone();
    let following = tokio::spawn(two.admission.clone().follow(move || network.recheck()));
    two.has_problem("it cannot be read").await;
    one.has_problem("showed no membership certificate").await;
    assert_eq!((one.connected(), two.connected()), (0, 0));
    std::fs::copy(&keys.first, &late).unwrap();
    one.sees(1).await;
    two.sees(1).await;
    following.abort();
}
