//! Tells the network what this node holds: a snapshot, then changes, and a snapshot again when changes were missed.

use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;

use crate::network::{Advertisement, Network};
use crate::store::{Change, Watcher};

/// Runs until the store's view is gone. Holds no state of its own.
pub async fn advertise(store: Arc<dyn Watcher>, network: Arc<dyn Network>) {
    loop {
        let mut watch = store.watch();
        network.advertise(Advertisement::All(std::mem::take(&mut watch.held)));
        loop {
            match watch.changes.recv().await {
                Ok(Change::Added(digest)) => network.advertise(Advertisement::Added(digest)),
                Ok(Change::Removed(digest)) => network.advertise(Advertisement::Removed(digest)),
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return,
            }
        }
    }
}
