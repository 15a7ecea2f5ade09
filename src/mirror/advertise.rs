//! Tells the network what this node holds: a snapshot, then changes, and a snapshot again when changes were missed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;

use crate::network::{Advertisement, Network};
use crate::store::{Change, Health, Watcher};

/// How long a store may take to be read first.
const FIRST_LOOK: Duration = Duration::from_secs(30);

/// Runs until the store's view is gone. Holds no state of its own.
pub async fn advertise(store: Arc<dyn Watcher>, network: Arc<dyn Network>) {
    look_first(&*store).await;
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

/// Waits until the store was read, or something is seen in it: peers that know from an earlier life what this node holds
/// would else be told that it holds nothing. A store that is not there after a while has nothing to give either.
async fn look_first(store: &dyn Watcher) {
    let mut health = store.health();
    if *health.borrow() == Health::Ready {
        return;
    }
    let mut watch = store.watch();
    if watch.held.is_empty() {
        tokio::select! {
            // An error is a store that has ended.
            _ = health.wait_for(|health| *health == Health::Ready) => {}
            _ = watch.changes.recv() => {}
            () = tokio::time::sleep(FIRST_LOOK) => {}
        }
    }
}
