//! What a policy costs: how long it takes to load, and how long to ask.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::oci::Reference as Image;
use crate::policy::LoadError;
use crate::policy::registry::{Availability, RegistryPolicy, Request, Requester, Way};

/// Requests that are measured, after a tenth as many that are not.
const REQUESTS: u32 = 20_000;

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
    /// How many were mirrored, as the policy says or since it abstains.
    pub mirrored: u32,
}

/// Loads `path`, and asks it for the manifest of `image` as a runtime does.
///
/// # Errors
/// Why a node would not take it.
pub fn bench(path: &Path, settings: serde_json::Value, image: &Image) -> Result<Measured, LoadError> {
    let began = Instant::now();
    let policies = super::load(path, settings)?;
    let load = began.elapsed();
    let availability = Availability { local: false, peers: 3 };
    let request = Request::manifest(image, Requester::Runtime, availability, Arc::default());
    for _ in 0..REQUESTS / 10 {
        policies.decide(&request);
    }
    let mut mirrored = 0;
    let mut times: Vec<Duration> = (0..REQUESTS)
        .map(|_| {
            let began = Instant::now();
            let ruling = policies.decide(&request);
            let took = began.elapsed();
            mirrored += u32::from(matches!(ruling.way, Way::Mirror(_)));
            took
        })
        .collect();
    times.sort_unstable();
    let at = |share: usize| micros(times[(times.len() - 1) * share / 100]);
    Ok(Measured { requests: REQUESTS, load: micros(load), median: at(50), p99: at(99), mirrored })
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
