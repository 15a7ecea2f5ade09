//! Elections in a world of a test, over a lease in memory.

use std::sync::Mutex;

use tokio_util::task::AbortOnDropHandle;

use super::roles::tests::id;
use super::strict::{BootClock, Idle, LeaseMetrics, Memory, Parts};
use super::*;
use crate::policy::election::NoRanking;

/// A node that sees nobody but itself.
struct Hermit {
    here: PeerId,
    changes: watch::Sender<u64>,
    /// What was asked of it, in order.
    asked: Mutex<Vec<String>>,
}

impl World for Hermit {
    fn members(&self) -> Vec<Member> {
        let (name, zone, version) = (String::new(), String::new(), String::new());
        vec![Member { id: self.here.clone(), name, zone, version, facts: Facts::default(), suspected: None }]
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn is_complete(&self) -> bool {
        true
    }

    fn alone(&self) -> Alone {
        self.asked.lock().unwrap().push("alone".into());
        Alone::NoBootstrapSource
    }

    fn load(&self) -> u32 {
        0
    }

    fn known(&self) -> usize {
        1
    }

    fn tell(&self, _: Facts) {}

    fn lead(&self, _: &Table) {}

    fn records(&self, peers: &[PeerId]) -> Vec<Vec<u8>> {
        peers.iter().map(|peer| peer.as_str().as_bytes().to_vec()).collect()
    }

    fn hint(&self, book: &[Vec<u8>]) {
        let book: Vec<String> =
            book.iter().map(|record| String::from_utf8_lossy(record).into_owned()).collect();
        self.asked.lock().unwrap().push(format!("hint {}", book.join(" ")));
    }

    fn opinions(&self) -> Vec<(u32, u32)> {
        Vec::new()
    }
}

fn node(lease: &Memory, number: u32) -> (Arc<Hermit>, [AbortOnDropHandle<()>; 2]) {
    let world =
        Arc::new(Hermit { here: id(number), changes: watch::Sender::default(), asked: Mutex::default() });
    let parts = Parts {
        lock: Arc::new(lease.handle()),
        clock: Arc::new(BootClock),
        duty: Arc::new(Idle),
        metrics: LeaseMetrics::default(),
        seed: 7,
    };
    let settings = lease::Settings::new(1_500, 300);
    let identity = identity::identity("node", &id(number), number.into());
    let (strict, driver) = Strict::new(&identity, &settings, parts);
    let config = Config { backend: Backend::Lease, ..Config::default() };
    let (policy, hash) = (Arc::new(NoRanking), || EffectiveHash::BUILT_IN);
    let election = Election::new(
        id(number),
        &config,
        policy,
        hash,
        Arc::clone(&world) as _,
        Some(strict),
        Metrics::default(),
    );
    let run = [tokio::spawn(driver.run()), tokio::spawn(election.follow())];
    (world, run.map(AbortOnDropHandle::new))
}

/// Guards that a node takes the hint before it says why it is alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leaders_book_reaches_a_node_that_sees_nobody() {
    let lease = Memory::default();
    let (_, _leads) = node(&lease, 1);
    let end = Instant::now() + Duration::from_secs(20);
    let until = async |is_so: &dyn Fn() -> bool| {
        while !is_so() {
            assert!(Instant::now() < end, "not in time");
            sleep(Duration::from_millis(20)).await;
        }
    };
    until(&|| lease.stored().is_some_and(|(_, notes)| !notes.book.is_empty())).await;
    assert_eq!(lease.stored().unwrap().1.book, [id(1).as_str().as_bytes()]);
    let (world, _reads) = node(&lease, 2);
    let hint = format!("hint {}", id(1));
    until(&|| world.asked.lock().unwrap().contains(&hint)).await;
    until(&|| world.asked.lock().unwrap().last().is_some_and(|last| last == "alone")).await;
    let asked = world.asked.lock().unwrap().clone();
    let at = asked.iter().position(|what| *what == hint).unwrap();
    assert!(asked[at + 1..].contains(&"alone".to_owned()), "{asked:?}");
}
