//! The seam to where a lease is kept: the API server (`cluster`), or memory.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::Fault;
use crate::election::lease::{Answer, Object, Write};

/// Records of nodes that a lease may carry.
pub const BOOK: usize = 5;
/// Bytes of all of them.
pub const BOOK_LIMIT: usize = 4 << 10;

/// Keeps one lease. Each call ends within the time that it is given, and never writes twice.
#[async_trait]
pub trait Lock: Send + Sync {
    /// Reads the newest.
    async fn get(&self, limit: Duration) -> Reply;

    /// Makes the object.
    async fn create(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply;

    /// Replaces the object of this uid and version, and no other one.
    async fn put(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply;

    /// Tells all changes after a version, in their order, until it cannot any longer; then what was wrong, if something was.
    /// Silence proves nothing.
    async fn watch(&self, version: u64, changes: mpsc::Sender<Change>) -> Result<(), Fault>;

    /// Whether a connection to where it is kept comes about.
    async fn knock(&self, limit: Duration) -> bool;

    /// What keeps it, for people: `Lease peili`.
    fn name(&self) -> String;

    /// Where it is kept, for people.
    fn place(&self) -> String;
}

/// What a call came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// For the core.
    pub answer: Answer,
    /// For people.
    pub fault: Option<Fault>,
    /// What else the object says, where there is one.
    pub notes: Option<Notes>,
}

/// What a watch says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The object is so now.
    Seen(Object, Notes),
    /// The object was deleted; its version then.
    Gone(u64),
}

/// What a holder publishes beside the record. Readers take it for a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Live members, as the holder sees them; 0: not said.
    pub members: u32,
    /// Signed records of nodes, at most [`BOOK`] and [`BOOK_LIMIT`] bytes: whom a node without peers may ask.
    pub book: Vec<Vec<u8>>,
}

impl Reply {
    /// Without a fault.
    pub fn of(answer: Answer) -> Self {
        Self { answer, fault: None, notes: None }
    }

    /// With one.
    pub fn failed(answer: Answer, fault: Fault) -> Self {
        Self { answer, fault: Some(fault), notes: None }
    }
}

impl Notes {
    /// Cut to what a lease may carry.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.book.truncate(BOOK);
        let mut bytes = 0;
        self.book.retain(|record| {
            bytes += record.len();
            bytes <= BOOK_LIMIT
        });
        self
    }
}
