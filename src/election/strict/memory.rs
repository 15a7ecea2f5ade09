//! A lock in memory that does what an API server does, and what is to go wrong. For tests, and for the demonstration.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{broadcast, mpsc};
use tokio::time::sleep;

use super::{Cause, Change, Fault, Lock, Notes, Reply};
use crate::election::lease::{Answer, Object, Record, Write};

/// What goes wrong at each call from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    #[default]
    None,
    /// Nobody can be reached.
    Refused,
    /// Calls reach nobody and end with their time.
    Dropped,
    /// A write is carried out, and its answer is lost.
    Deaf,
    /// Reads may be made and nothing may be written.
    ReadOnly,
}

/// A lease in memory. Clones are handles of it.
#[derive(Clone, Default)]
pub struct Memory {
    shared: Arc<Mutex<Shared>>,
    changes: Changes,
    /// Of this handle.
    trouble: Arc<Mutex<Trouble>>,
}

#[derive(Clone)]
struct Changes(broadcast::Sender<(u64, Change)>);

impl Default for Changes {
    fn default() -> Self {
        Self(broadcast::Sender::new(64))
    }
}

#[derive(Default)]
struct Shared {
    version: u64,
    uids: u64,
    stored: Option<(Object, Notes)>,
    past: Vec<(u64, Change)>,
    calls: u64,
}

impl Memory {
    /// The same lease, with troubles of its own.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { trouble: Arc::default(), ..self.clone() }
    }

    /// What goes wrong for this handle.
    pub fn trouble(&self, trouble: Trouble) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Deletes the object, as an administrator would.
    pub fn delete(&self) {
        let mut shared = self.shared();
        shared.version += 1;
        let version = shared.version;
        if shared.stored.take().is_some() {
            self.tell(&mut shared, version, Change::Gone(version));
        }
    }

    /// How many calls were answered.
    pub fn calls(&self) -> u64 {
        self.shared().calls
    }

    /// The object and what it says beside.
    pub fn stored(&self) -> Option<(Object, Notes)> {
        self.shared().stored.clone()
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, shared: &mut Shared, version: u64, change: Change) {
        shared.past.push((version, change.clone()));
        // Nobody may listen.
        let _ = self.changes.0.send((version, change));
    }

    fn troubled(&self) -> Trouble {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn call(&self, write: Option<(&Write, &Notes, bool)>, limit: Duration) -> Reply {
        let trouble = self.troubled();
        match trouble {
            Trouble::Refused => {
                return Reply::failed(Answer::Unknown, Fault::new(Cause::Refused, "refused"));
            }
            Trouble::Dropped => {
                sleep(limit).await;
                return Reply::failed(Answer::Unknown, Fault::new(Cause::Timeout, "no connection"));
            }
            Trouble::ReadOnly if write.is_some() => {
                return Reply::failed(Answer::Rejected(None), Fault::new(Cause::Forbidden, "read only"));
            }
            Trouble::None | Trouble::Deaf | Trouble::ReadOnly => {}
        }
        let reply = self.apply(write);
        if trouble == Trouble::Deaf && write.is_some() {
            sleep(limit).await;
            return Reply::failed(Answer::Unknown, Fault::new(Cause::NoAnswer, "the answer was lost"));
        }
        reply
    }

    fn apply(&self, write: Option<(&Write, &Notes, bool)>) -> Reply {
        let mut shared = self.shared();
        shared.calls += 1;
        let Some((write, notes, creates)) = write else {
            return match &shared.stored {
                Some((object, notes)) => {
                    Reply { notes: Some(notes.clone()), ..Reply::of(Answer::Object(object.clone())) }
                }
                None => Reply::of(Answer::Absent),
            };
        };
        let is_as_said = match &shared.stored {
            Some((object, _)) => !creates && object.uid == write.uid && object.version == write.version,
            None => creates,
        };
        if !is_as_said {
            return Reply::of(Answer::Conflict);
        }
        shared.version += 1;
        let version = shared.version;
        let uid = match &shared.stored {
            Some((object, _)) => Arc::clone(&object.uid),
            None => {
                shared.uids += 1;
                format!("uid-{}", shared.uids).into()
            }
        };
        let record = Record {
            holder: Arc::clone(&write.holder),
            duration: write.duration.div_ceil(1_000) * 1_000,
            renewed: Some(format!("{version}").into()),
            transitions: write.transitions,
            preferred: false,
            mark: Some(write.mark.clone()),
        };
        let object = Object { uid, version, record };
        shared.stored = Some((object.clone(), notes.clone()));
        self.tell(&mut shared, version, Change::Seen(object.clone(), notes.clone()));
        Reply { notes: Some(notes.clone()), ..Reply::of(Answer::Object(object)) }
    }
}

#[async_trait]
impl Lock for Memory {
    async fn get(&self, limit: Duration) -> Reply {
        self.call(None, limit).await
    }

    async fn create(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        self.call(Some((write, notes, true)), limit).await
    }

    async fn put(&self, write: &Write, notes: &Notes, limit: Duration) -> Reply {
        self.call(Some((write, notes, false)), limit).await
    }

    async fn watch(&self, version: u64, changes: mpsc::Sender<Change>) -> Result<(), Fault> {
        let (past, mut coming) = {
            let shared = self.shared();
            (shared.past.clone(), self.changes.0.subscribe())
        };
        for (_, change) in past.into_iter().filter(|(at, _)| *at > version) {
            if changes.send(change).await.is_err() {
                return Ok(());
            }
        }
        loop {
            match self.troubled() {
                Trouble::Refused => return Err(Fault::new(Cause::NoAnswer, "cut")),
                // As a connection of which nothing is heard any more.
                Trouble::Dropped => std::future::pending().await,
                Trouble::None | Trouble::Deaf | Trouble::ReadOnly => {}
            }
            tokio::select! {
                told = coming.recv() => {
                    let Ok((_, change)) = told else { return Ok(()) };
                    if self.troubled() == Trouble::Dropped {
                        continue;
                    }
                    if changes.send(change).await.is_err() {
                        return Ok(());
                    }
                }
                () = sleep(Duration::from_millis(50)) => {}
            }
        }
    }

    async fn knock(&self, limit: Duration) -> bool {
        match self.troubled() {
            Trouble::Refused => false,
            Trouble::Dropped => {
                sleep(limit).await;
                false
            }
            Trouble::None | Trouble::Deaf | Trouble::ReadOnly => true,
        }
    }

    fn name(&self) -> String {
        "lease in memory".into()
    }

    fn place(&self) -> String {
        "memory".into()
    }
}
