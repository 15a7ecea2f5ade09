//! A candidate for the strict role without a node around it: the driver that ships, over any lock, in this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use peili::election::lease::{Settings, Standing};
use peili::election::strict::{BootClock, Idle, LeaseMetrics, Lock, Parts, State, Strict};
use tokio_util::task::AbortOnDropHandle;

/// How often it is looked who leads.
const LOOK: Duration = Duration::from_millis(5);

/// One of them. Dropped: it has gone without a word, as by SIGKILL.
pub struct Candidate {
    /// Its role.
    pub strict: Strict,
    /// What drives it, which ends only with it.
    pub driving: AbortOnDropHandle<()>,
}

impl Candidate {
    /// Starts one by this name, with the times `fast`.
    pub fn start(lock: Arc<dyn Lock>, name: &str, standing: Standing) -> Self {
        let parts = Parts {
            lock,
            clock: Arc::new(BootClock),
            duty: Arc::new(Idle),
            metrics: LeaseMetrics::default(),
            seed: name.bytes().map(u64::from).sum(),
        };
        let (strict, driver) = Strict::new(name, &Settings::FAST, parts);
        strict.stand(standing);
        Self { strict, driving: AbortOnDropHandle::new(tokio::spawn(driver.run())) }
    }

    /// Whether it may act now.
    pub fn leads(&self) -> bool {
        self.strict.state().leads()
    }
}

/// Waits until one leads: which, and how long that took. Two at once are an error.
pub async fn leader(candidates: &[&Candidate], limit: Duration) -> Result<(usize, Duration)> {
    let start = Instant::now();
    while start.elapsed() < limit {
        let leading: Vec<usize> =
            (0..candidates.len()).filter(|number| candidates[*number].leads()).collect();
        ensure!(leading.len() <= 1, "two lead: {leading:?}");
        if let [one] = leading[..] {
            return Ok((one, start.elapsed()));
        }
        tokio::time::sleep(LOOK).await;
    }
    let states: Vec<State> = candidates.iter().map(|candidate| candidate.strict.state()).collect();
    bail!("nobody leads within {limit:?}: {states:#?}")
}
