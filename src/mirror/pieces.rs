//! Which contents the runtime takes in pieces at the moment.
//!
//! containerd (`concurrent_layer_fetch_buffer`, 2.1 and later) asks for the rest of a layer only after the first answer,
//! in pieces, of the same host: a 404 for one of them fails the pull, where one for the first would have sent it
//! upstream. So a piece of a content that is flowing is worth a longer wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::oci::Digest;

/// How long after the last piece another one is expected. One that waits for the disk has its answer open all the while.
const PAUSE: Duration = Duration::from_secs(1);
/// Contents that are remembered after their last piece.
const LIMIT: usize = 1024;

/// The contents that flow.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pieces(Arc<Mutex<HashMap<Digest, Flowing>>>);

#[derive(Clone, Copy, Debug, Default)]
struct Flowing {
    answers: usize,
    /// When the last answer ended well, or its client hung up.
    left: Option<Instant>,
}

/// One answer with bytes of a content; ends when dropped.
#[derive(Debug)]
pub(crate) struct Piece {
    pieces: Pieces,
    digest: Digest,
    /// The answer was cut: what comes next is another attempt, and not another piece.
    is_cut: bool,
}

impl Pieces {
    /// Notes that an answer with bytes of `digest` begins.
    pub(crate) fn begin(&self, digest: &Digest) -> Piece {
        let mut table = self.lock();
        if table.len() >= LIMIT {
            table.retain(|_, flowing| flowing.is_flowing(Instant::now()));
        }
        table.entry(*digest).or_default().answers += 1;
        Piece { pieces: self.clone(), digest: *digest, is_cut: false }
    }

    /// Whether the runtime has an answer with other bytes of `digest`, or had one a moment ago.
    pub(crate) fn is_flowing(&self, digest: &Digest) -> bool {
        self.lock().get(digest).is_some_and(|flowing| flowing.is_flowing(Instant::now()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Flowing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Piece {
    /// The answer ends before its time, by no doing of the client.
    pub(crate) fn cut(&mut self) {
        self.is_cut = true;
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut table = self.pieces.lock();
        let Some(flowing) = table.get_mut(&self.digest) else { return };
        flowing.answers -= 1;
        flowing.left = (!self.is_cut).then(Instant::now);
        if self.is_cut && flowing.answers == 0 {
            table.remove(&self.digest);
        }
    }
}

impl Flowing {
    fn is_flowing(&self, now: Instant) -> bool {
        self.answers > 0 || self.left.is_some_and(|left| now.duration_since(left) < PAUSE)
    }
}
