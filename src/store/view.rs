//! The view of a store in memory: names, blobs and their repositories, and who is told of changes.
//!
//! Adapters make a [`Snapshot`] of what they hold and give it to [`View::replace`], which finds the differences;
//! between snapshots they may [`View::add`] and [`View::remove`] single blobs. All reads are reads of a map. What a
//! digest is and whom it belongs to is derived here (`ownership`), by one rule for all stores; nothing is read here.

mod ownership;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::{broadcast, watch};

use super::{Blob, Change, Error, Health, Watch};
use crate::oci::{Descriptor, Digest, Manifest, Name, Reference, Registry, Repository, Tag};

use ownership::Claims;

/// Changes that a watcher may be behind before it has to watch anew: a node's whole churn of some minutes.
const CHANGES: usize = 4096;

/// Repositories read from one label: containerd bounds a label to 4,096 bytes, a name takes two at least.
const LABEL_REPOSITORIES: usize = 2048;

/// Sizes of one digest that are told apart; parents that agree name one.
const EXPECTED_SIZES: usize = 16;

/// containerd's label for the repositories of some content, before the registry's host.
const SOURCE_LABEL: &str = "containerd.io/distribution.source.";

/// The shared view: adapters write it, [`Provider`](super::Provider) and [`Watcher`](super::Watcher) read it.
#[derive(Debug)]
pub struct View {
    /// Orders writers with each other and with the beginning of watches. Taken before `table`.
    writer: Mutex<broadcast::Sender<Change>>,
    /// Held for map reads and swaps only.
    table: RwLock<Table>,
    health: watch::Sender<Health>,
    was_read: AtomicBool,
}

/// One image record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its full name. `None`: a name without a registry (`sha256:...`, `import-...`), which owns nothing but says
    /// what its content is.
    pub name: Option<Reference>,
    /// What it stands for.
    pub target: Descriptor,
}

/// Complete content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The digest.
    pub digest: Digest,
    /// Size in bytes as stored.
    pub size: u64,
    /// Where labels say that it came from.
    pub sources: Vec<Source>,
}

/// A repository that a label names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// The registry as the label has it: containerd drops the port.
    pub host: Registry,
    /// The repository.
    pub repository: Repository,
}

/// What a store holds at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Image records; where two have one name, the first counts.
    pub images: Vec<Image>,
    /// Complete content.
    pub held: Vec<Held>,
    /// Manifests and indexes that could be read, by their digests, whether an image record leads to them or not.
    pub manifests: HashMap<Digest, Arc<Manifest>>,
}

/// How much is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Names of images with a tag.
    pub tags: usize,
    /// Digests.
    pub digests: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// What is derived from a snapshot.
#[derive(Debug, Default)]
struct Table {
    tags: HashMap<(Name, Tag), Descriptor>,
    blobs: HashMap<Digest, Arc<Blob>>,
    /// Held, but no descriptor of it has the right size.
    damaged: HashMap<Digest, String>,
    claims: Claims,
}

impl Source {
    /// The repositories that a label names: none if it is not containerd's label for them. Malformed ones are left out.
    pub fn parse_label(key: &str, value: &str) -> Vec<Self> {
        let Some(host) = key.strip_prefix(SOURCE_LABEL) else { return Vec::new() };
        // Go's `Hostname()` takes the brackets of an IPv6 address away.
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]").parse::<Registry>(),
            Err(_) => host.parse(),
        };
        let Ok(host) = host else { return Vec::new() };
        let names = value.split(',').take(LABEL_REPOSITORIES);
        names
            .filter_map(|repository| Name::new(host.clone(), repository.trim()).ok())
            .map(|name| Self { host: name.registry, repository: name.repository })
            .collect()
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

impl View {
    /// An empty view whose health is [`Health::Starting`].
    pub fn new() -> Self {
        Self {
            writer: Mutex::new(broadcast::Sender::new(CHANGES)),
            table: RwLock::default(),
            health: watch::Sender::new(Health::Starting),
            was_read: AtomicBool::new(false),
        }
    }

    /// Makes `snapshot` the view and tells watchers of the differences.
    pub fn replace(&self, snapshot: Snapshot) {
        let table = Table::new(snapshot);
        let changes = self.writer();
        let (added, removed, damaged) = {
            let old = self.read();
            let missing_in =
                |blobs: &HashMap<Digest, Arc<Blob>>, digest: &Digest| !blobs.contains_key(digest);
            let added: Vec<_> =
                table.blobs.keys().filter(|digest| missing_in(&old.blobs, digest)).copied().collect();
            let removed: Vec<_> =
                old.blobs.keys().filter(|digest| missing_in(&table.blobs, digest)).copied().collect();
            let known: HashSet<_> = old.damaged.keys().copied().collect();
            let damaged: Vec<_> = table
                .damaged
                .iter()
                .filter(|(digest, _)| !known.contains(digest))
                .map(|(digest, reason)| (*digest, reason.clone()))
                .collect();
            (added, removed, damaged)
        };
        let old = std::mem::replace(&mut *self.write(), table);
        for (digest, reason) in damaged {
            tracing::warn!(%digest, reason, "content is not served: it contradicts its descriptors");
        }
        // Nobody watching is no error.
        for digest in removed {
            let _ = changes.send(Change::Removed(digest));
        }
        for digest in added {
            let _ = changes.send(Change::Added(digest));
        }
        drop(changes);
        drop(old);
    }

    /// Adds content that became complete since the last snapshot, or replaces what is known about it.
    pub fn add(&self, held: &Held) {
        let changes = self.writer();
        let outcome = self.read().claims.blob(held);
        let mut table = self.write();
        match outcome {
            Ok(blob) => {
                table.damaged.remove(&held.digest);
                if table.blobs.insert(held.digest, Arc::new(blob)).is_none() {
                    let _ = changes.send(Change::Added(held.digest));
                }
            }
            Err(reason) => {
                table.damaged.insert(held.digest, reason);
                if table.blobs.remove(&held.digest).is_some() {
                    let _ = changes.send(Change::Removed(held.digest));
                }
            }
        }
    }

    /// Takes content away that was deleted since the last snapshot.
    pub fn remove(&self, digest: &Digest) {
        let changes = self.writer();
        let mut table = self.write();
        table.damaged.remove(digest);
        if table.blobs.remove(digest).is_some() {
            let _ = changes.send(Change::Removed(*digest));
        }
    }

    /// [`Provider::resolve`](super::Provider::resolve). A tag whose manifest is not held stands for nothing.
    pub fn resolve(&self, name: &Reference) -> Option<Descriptor> {
        let table = self.read();
        if let Some(digest) = &name.digest {
            let blob = table.blobs.get(digest)?;
            return blob.repositories.contains(&name.name).then(|| blob.descriptor.clone());
        }
        let key = (name.name.clone(), name.tag.clone()?);
        let target = table.tags.get(&key)?;
        let blob = table.blobs.get(&target.digest)?;
        (blob.descriptor.size == target.size).then(|| target.clone())
    }

    /// [`Provider::describe`](super::Provider::describe).
    pub fn describe(&self, digest: &Digest) -> Option<Arc<Blob>> {
        self.read().blobs.get(digest).cloned()
    }

    /// What an adapter asks before it opens `digest` at `offset`: what it is, or why it cannot be opened there.
    pub fn check_open(&self, digest: &Digest, offset: u64) -> Result<Arc<Blob>, Error> {
        let table = self.read();
        let Some(blob) = table.blobs.get(digest) else {
            return Err(match table.damaged.get(digest) {
                Some(reason) => Error::Corrupt { digest: *digest, reason: reason.clone() },
                None => Error::NotFound(*digest),
            });
        };
        let size = blob.descriptor.size;
        if offset > size {
            return Err(Error::Offset { digest: *digest, offset, size });
        }
        Ok(Arc::clone(blob))
    }

    /// Sizes in bytes that parents name for `digest`, held or not: image records, and all manifests that were read, also
    /// those that no record leads to yet, as of a pull that still runs. Different ones, in order, at most 16; none: unknown.
    /// `None`: parents contradict each other more than that, and a part of the sizes might lack the right one.
    pub fn expected_sizes(&self, digest: &Digest) -> Option<Vec<u64>> {
        self.read().claims.sizes(digest, EXPECTED_SIZES)
    }

    /// Tags of `name` whose manifest is held, in order.
    pub fn tags(&self, name: &Name) -> Vec<Tag> {
        let table = self.read();
        let tags = table.tags.iter().filter(|((owner, _), _)| owner == name);
        let mut tags: Vec<_> = tags
            .filter(|(_, target)| table.blobs.contains_key(&target.digest))
            .map(|((_, tag), _)| tag.clone())
            .collect();
        tags.sort();
        tags
    }

    /// Manifests held under `name` that are about `digest` (distribution specification, "Listing Referrers").
    pub fn referrers(&self, name: &Name, digest: &Digest) -> Vec<Descriptor> {
        let table = self.read();
        let about = table.claims.about(digest);
        let blobs = about.filter_map(|referrer| table.blobs.get(referrer));
        blobs.filter(|blob| blob.repositories.contains(name)).map(|blob| blob.descriptor.clone()).collect()
    }

    /// How much is held.
    pub fn counts(&self) -> Counts {
        let table = self.read();
        Counts {
            tags: table.tags.len(),
            digests: table.blobs.len(),
            bytes: table.blobs.values().map(|blob| blob.descriptor.size).sum(),
        }
    }

    /// [`Watcher::watch`](super::Watcher::watch).
    pub fn watch(&self) -> Watch {
        let changes = self.writer();
        Watch { held: self.read().blobs.keys().copied().collect(), changes: changes.subscribe() }
    }

    /// Sets the health; returns whether it changed, so that the adapter logs once per change.
    pub fn set_health(&self, health: Health) -> bool {
        if health == Health::Ready {
            self.was_read.store(true, Ordering::Relaxed);
        }
        self.health.send_if_modified(|current| {
            let changed = *current != health;
            *current = health;
            changed
        })
    }

    /// Whether the health was ever [`Health::Ready`]: what the view says was true once.
    pub fn was_read(&self) -> bool {
        self.was_read.load(Ordering::Relaxed)
    }

    /// [`Watcher::health`](super::Watcher::health).
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    fn writer(&self) -> MutexGuard<'_, broadcast::Sender<Change>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn new(snapshot: Snapshot) -> Self {
        let claims = Claims::new(&snapshot.images, snapshot.manifests);
        let mut table = Self::default();
        for image in snapshot.images {
            // A record by tag and digest says nothing about what the tag means by itself.
            if let Some(Reference { name, tag: Some(tag), digest: None }) = image.name {
                table.tags.entry((name, tag)).or_insert(image.target);
            }
        }
        for held in snapshot.held {
            match claims.blob(&held) {
                Ok(blob) => {
                    table.blobs.insert(held.digest, Arc::new(blob));
                }
                Err(reason) => {
                    table.damaged.insert(held.digest, reason);
                }
            }
        }
        table.claims = claims;
        table
    }
}
