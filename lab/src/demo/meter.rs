//! What each node gave and got, read from its `/status` a few times a second, over restarts of the node too.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peili_lab::{Namespace, Node, Origin, http};
use serde_json::Value;

use super::screen::{Screen, bytes};

/// How often nodes are read.
const INTERVAL: Duration = Duration::from_millis(200);
/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// The readings of all nodes.
#[derive(Debug)]
pub(crate) struct Meter {
    rows: Mutex<Vec<Row>>,
    origin: Arc<Origin>,
    begin: Instant,
}

/// Where a node is read.
#[derive(Clone, Debug)]
struct Probe {
    namespace: Option<Namespace>,
    admin: SocketAddr,
}

#[derive(Debug)]
struct Row {
    name: String,
    probe: Probe,
    /// Raised with each kill, so that what was read before it does not count after it.
    life: u32,
    alive: bool,
    peers: u64,
    holds: u64,
    gave: Count,
    got: Count,
}

/// A count that begins anew with each life of a process.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    earlier: u64,
    now: u64,
}

impl Count {
    fn total(self) -> u64 {
        self.earlier + self.now
    }
}

impl Meter {
    /// Reads `nodes`, each seen from its namespace.
    pub(crate) fn new(nodes: &[(&Node, Option<Namespace>)], origin: Arc<Origin>) -> Self {
        let row = |(node, namespace): &(&Node, Option<Namespace>)| Row {
            name: node.plan.name.clone(),
            probe: Probe {
                namespace: namespace.clone(),
                admin: ([127, 0, 0, 1], node.plan.ports.admin).into(),
            },
            life: 0,
            alive: true,
            peers: 0,
            holds: 0,
            gave: Count::default(),
            got: Count::default(),
        };
        Self { rows: Mutex::new(nodes.iter().map(row).collect()), origin, begin: Instant::now() }
    }

    /// Reads all for ever and shows it.
    pub(crate) async fn watch(self: Arc<Self>, screen: Arc<Screen>) {
        let mut before: Option<Totals> = None;
        let mut line = (Instant::now(), 0);
        loop {
            self.read().await;
            let now = self.snapshot();
            screen.show(now.table(before.as_ref()));
            if !screen.is_live() && line.0.elapsed() >= LINE_INTERVAL && now.moved() != line.1 {
                line = (Instant::now(), now.moved());
                screen.say(&format!("   {:>5.1} s  {}", self.begin.elapsed().as_secs_f64(), now.line()));
            }
            before = Some(now);
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Reads all nodes that live.
    pub(crate) async fn read(&self) {
        let probes: Vec<(usize, u32, Probe)> = {
            let rows = self.lock();
            let alive = rows.iter().enumerate().filter(|(_, row)| row.alive);
            alive.map(|(index, row)| (index, row.life, row.probe.clone())).collect()
        };
        let reads = probes.into_iter().map(async |(index, life, probe)| {
            let status = probe.read().await;
            if let Some(status) = status {
                self.record(index, life, &status);
            }
        });
        futures::future::join_all(reads).await;
    }

    /// The node was killed; what it had counted stays.
    pub(crate) fn killed(&self, index: usize) {
        let mut rows = self.lock();
        let row = &mut rows[index];
        row.life += 1;
        (row.alive, row.peers) = (false, 0);
        for count in [&mut row.gave, &mut row.got] {
            *count = Count { earlier: count.total(), now: 0 };
        }
    }

    /// The node runs again.
    pub(crate) fn started(&self, index: usize) {
        self.lock()[index].alive = true;
    }

    /// What a node gave to peers so far.
    pub(crate) fn gave(&self, index: usize) -> u64 {
        self.lock()[index].gave.total()
    }

    /// What a node got from peers so far.
    pub(crate) fn got(&self, index: usize) -> u64 {
        self.lock()[index].got.total()
    }

    /// Name, bytes given to peers and bytes got from peers of each node.
    pub(crate) fn totals(&self) -> Vec<(String, u64, u64)> {
        let rows = self.lock();
        rows.iter().map(|row| (row.name.clone(), row.gave.total(), row.got.total())).collect()
    }

    /// Shows the present readings.
    pub(crate) fn show(&self, screen: &Screen) {
        screen.show(self.snapshot().table(None));
    }

    fn record(&self, index: usize, life: u32, status: &Value) {
        let mut rows = self.lock();
        let row = &mut rows[index];
        if row.life != life {
            return;
        }
        let number = |path: &str| status.pointer(path).and_then(Value::as_u64).unwrap_or(0);
        row.gave.now = number("/served/to_peers/bytes").max(row.gave.now);
        row.got.now = number("/served/from_peers/bytes").max(row.got.now);
        row.holds = number("/store/bytes");
        let peers = status["network"]["peers"].as_array().into_iter().flatten();
        row.peers = peers.filter(|peer| peer["connected"] == true).count() as u64;
    }

    fn snapshot(&self) -> Totals {
        let counts = self.origin.counts();
        let rows = self.lock();
        let rows = rows.iter().map(|row| Total {
            name: row.name.clone(),
            alive: row.alive,
            peers: row.peers,
            holds: row.holds,
            gave: row.gave.total(),
            got: row.got.total(),
        });
        Totals {
            at: Instant::now(),
            rows: rows.collect(),
            upstream: counts.blob_bytes + counts.manifest_bytes,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Probe {
    async fn read(&self) -> Option<Value> {
        let answer = http::get(self.namespace.as_ref(), self.admin, "/status").await.ok()?;
        serde_json::from_slice(&answer.body).ok()
    }
}

/// All readings at one time.
struct Totals {
    at: Instant,
    rows: Vec<Total>,
    upstream: u64,
}

struct Total {
    name: String,
    alive: bool,
    peers: u64,
    holds: u64,
    gave: u64,
    got: u64,
}

impl Totals {
    /// Grows with every byte.
    fn moved(&self) -> u64 {
        self.upstream + self.rows.iter().map(|row| row.gave + row.got).sum::<u64>()
    }

    fn line(&self) -> String {
        let nodes = self.rows.iter().map(|row| match row.alive {
            true => format!("{} gave {} got {}", row.name, bytes(row.gave), bytes(row.got)),
            false => format!("{} is dead", row.name),
        });
        let upstream = format!("registry gave {}", bytes(self.upstream));
        nodes.chain([upstream]).collect::<Vec<_>>().join(" | ")
    }

    fn table(&self, before: Option<&Self>) -> Vec<String> {
        let rate = |now: u64, then: Option<u64>| {
            let (Some(before), Some(then)) = (before, then) else { return String::new() };
            let millis = u64::try_from((self.at - before.at).as_millis()).unwrap_or(u64::MAX).max(1);
            match now.saturating_sub(then) * 1000 / millis {
                0 => String::new(),
                rate => format!("{}/s", bytes(rate)),
            }
        };
        let line = |name: &str, state: &str, holds: &str, gave: &str, rate: &str, got: &str| {
            format!("   {name:<9} {state:<13} {holds:>9} {gave:>13} {rate:>13} {got:>14}")
        };
        let mut lines = vec![line("", "", "holds", "gave", "now", "got from peers")];
        for (index, row) in self.rows.iter().enumerate() {
            let state = if row.alive { format!("up, {} peers", row.peers) } else { "dead".to_owned() };
            let then = before.and_then(|before| before.rows.get(index)).map(|row| row.gave);
            let (gave, got) = (bytes(row.gave), bytes(row.got));
            lines.push(line(&row.name, &state, &bytes(row.holds), &gave, &rate(row.gave, then), &got));
        }
        let rate = rate(self.upstream, before.map(|before| before.upstream));
        lines.push(line("registry", "", "", &bytes(self.upstream), &rate, ""));
        lines
    }
}
