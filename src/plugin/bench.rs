//! What a policy costs: how long it takes to load, and how long to ask. One question, again and again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::{Candidate, Given};
use crate::oci::{Level, Reference as Image};
use crate::policy::election::{self, ElectionPolicy, Role, RoleKind, Selection, View};
use crate::policy::registry::{Availability, RegistryPolicy, Request, Requester, Way};
use crate::policy::trust::{Conduct, Evidence, Method, Request as Peer, TrustPolicy, Way as Standing};
use crate::policy::{LoadError, Node, Noop};

/// Requests that are measured, after a tenth as many that are not.
const REQUESTS: u32 = 20_000;
/// The same, of rankings that take longer.
const RANKINGS: u32 = 500;
/// Zones of the candidates.
const ZONES: usize = 3;

/// The times of one run, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measured {
    /// Requests that were measured.
    pub requests: u32,
    /// From the file to a policy that can be asked: read, checked, compiled, configured.
    pub load: f64,
    /// Half of the requests took no longer.
    pub median: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// Half of as many calls of a component that does nothing took no longer, just before; none: it cannot be called here.
    pub noop: Option<f64>,
    /// How many went through: what is mirrored, a peer that is neither denied nor failed about, a
    /// ranking without a fault.
    pub allowed: u32,
}

/// Loads `path`, and asks it for the manifest of `image` as a runtime does; a policy of the trust world, about a newcomer; one of
/// the election world, who of so many `candidates` coordinates.
///
/// # Errors
/// Why a node would not take it.
pub fn bench(path: &Path, given: Given, image: &Image, candidates: usize) -> Result<Measured, LoadError> {
    let began = Instant::now();
    let candidate = Candidate::read(path);
    let policies = candidate.load(given)?;
    let load = began.elapsed();
    let noop = Noop::new().ok().map(|mut noop| measure(REQUESTS, || noop.call()).median);
    let measured = match candidate.world() {
        Some("trust") => {
            let request = newcomer();
            let passes = |way: &Standing| matches!(way, Standing::Allow(_) | Standing::BuiltIn);
            measure(REQUESTS, || passes(&policies.evaluate(&request).way))
        }
        Some("election") => {
            let view = view(candidates);
            measure(RANKINGS, || !policies.rank(&view).why.is_fault())
        }
        _ => {
            let availability = Availability { peers: 3, ..Availability::default() };
            let request = Request::manifest(image, Requester::Runtime, availability, Arc::default());
            measure(REQUESTS, || matches!(policies.decide(&request).way, Way::Mirror(_)))
        }
    };
    Ok(Measured { load: micros(load), noop, ..measured })
}

/// The times of one question; whether what it asks about went through is counted.
fn measure(requests: u32, mut ask: impl FnMut() -> bool) -> Measured {
    for _ in 0..requests / 10 {
        ask();
    }
    let mut allowed = 0;
    let mut times: Vec<Duration> = (0..requests)
        .map(|_| {
            let began = Instant::now();
            let passes = ask();
            let took = began.elapsed();
            allowed += u32::from(passes);
            took
        })
        .collect();
    times.sort_unstable();
    let at = |share: usize| micros(times[(times.len() - 1) * share / 100]);
    Measured { requests, load: 0.0, median: at(50), p99: at(99), noop: None, allowed }
}

/// A peer that was just met, and is known by its name and an address.
fn newcomer() -> Peer {
    Peer {
        peer: Node {
            id: "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".into(),
            name: "node-1".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Node::default()
        },
        observed: vec![[10, 0, 0, 1].into()],
        announced: Vec::new(),
        evidence: vec![Evidence { method: Method::ClusterKey, claims: Vec::new() }],
        conduct: Conduct::default(),
        level: Level::default(),
        now: SystemTime::now(),
    }
}

/// Nodes of a cluster, in a few zones.
fn view(candidates: usize) -> View {
    let candidate = |number: usize| election::Candidate {
        name: format!("node-{number}.eu-central.example.test"),
        version: env!("CARGO_PKG_VERSION").into(),
        zone: Some(format!("eu-central-1{}", number % ZONES)),
        api_server: election::Reachability::Reachable,
        uptime: Duration::from_hours(1),
        ..election::Candidate::default()
    };
    let role =
        Role { name: "coordinator".into(), kind: RoleKind::Strict, selection: Selection::Ranked, seats: 1 };
    View { role, candidates: (0..candidates).map(candidate).collect(), holder: None }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
