//! When the view is written to the disk, and what a start makes of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::disk;
use super::super::view::{Shared, Subject};
use super::Driver;

/// At least so long between two times.
const PAUSE: Duration = Duration::from_secs(120);
/// And bytes per second on average: a view of 5,000 nodes every ten minutes.
const RATE: usize = 20_000;

/// The view on disk.
pub(super) struct Keeping {
    /// `None`: it is not kept.
    folder: Option<PathBuf>,
    due: Instant,
    /// Bytes that were written, or why not.
    writing: JoinSet<Result<usize, String>>,
}

impl Keeping {
    pub(super) fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, due: Instant::now() + PAUSE, writing: JoinSet::new() }
    }

    /// Starts with what was kept.
    pub(super) fn restore(&self, shared: &Shared) {
        let Some(folder) = &self.folder else { return };
        let path = disk::path(folder);
        match disk::read(folder, SystemTime::now()) {
            Ok(None) => {}
            Ok(Some(kept)) => {
                let now = shared.now();
                let members = {
                    let gossip = &mut shared.view_mut().gossip;
                    let members = gossip.restore(kept.parts, kept.is_fresh, now);
                    gossip.begin(shared.now());
                    members
                };
                let (age, fresh) = (kept.age, kept.is_fresh);
                tracing::info!(members, age, fresh, path = %path.display(), "the view of the last run is taken");
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the view of the last run is of no use, starting without it");
            }
        }
    }

    /// Writes what is known, unless that is less than what may be on the disk.
    fn write(&mut self, shared: &Arc<Shared>) {
        let Some(folder) = self.folder.clone().filter(|_| self.writing.is_empty()) else { return };
        if !shared.view().gossip.is_complete() {
            return;
        }
        let shared = Arc::clone(shared);
        self.writing.spawn_blocking(move || {
            // The view is not locked while it is encoded.
            let parts = shared.view().gossip.kept();
            let bytes = disk::encode(parts, SystemTime::now());
            let written = disk::write(&folder, &bytes);
            written.map_err(|error| {
                format!("cannot keep the view in {}: {error}", disk::path(&folder).display())
            })?;
            Ok(bytes.len())
        });
    }

    /// Waits for what is being written.
    async fn finish(&mut self) {
        while self.writing.join_next().await.is_some() {}
    }
}

impl Driver {
    /// Keeps the view, if it is time.
    pub(super) fn keep(&mut self, now: Instant) {
        while let Some(done) = self.keeping.writing.try_join_next() {
            let done = done.unwrap_or_else(|error| Err(format!("cannot keep the view: {error}")));
            if let Ok(bytes) = done {
                self.keeping.due = now + PAUSE.max(Duration::from_secs((bytes / RATE) as u64));
            }
            self.shared.problem(Subject::Kept, done.err());
        }
        if self.keeping.due <= now {
            self.keeping.due = now + PAUSE;
            self.keeping.write(&self.shared);
        }
    }

    /// Keeps it a last time.
    pub(super) async fn keep_last(&mut self) {
        self.keeping.finish().await;
        self.keeping.write(&self.shared);
        self.keeping.finish().await;
    }
}
