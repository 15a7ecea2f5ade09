//! Keeps the view right: one task that connects, lists, follows events and reconciles, for ever.
//!
//! ```text
//! connect --> list everything --> Ready --+-- event: ask again for what it names -----+--> view
//!    ^                                    +-- 500 ms: ingests (before 2.1)            |
//!    |                                    +-- 20 s: list everything, compare ---------+
//!    +---- 100 ms .. 5 s ---- Degraded <--+-- any call fails or takes too long
//! ```
//!
//! An event only says what to ask about, so late, lost, doubled and reordered ones do no harm. Labels are written
//! after content is announced, so new content without an owner is asked about again.
//!
//! containerd before 2.1 announces images only. There, layers of a running pull are found by their ingests. Whether
//! any exist is learned from the change time of the content root's `ingest` folder (one `stat` each 500 ms, no call);
//! where the folder is not mounted, from a list at each reconciliation, and for 10 s after any activity.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::api::{Api, ApiError, Event};
use super::files::{DISK, disk, find_root, read_file};
use super::model::{Model, Namespace, Unpublished};
use crate::oci::{Digest, MANIFEST_LIMIT, Manifest};
use crate::store::Health;

/// Pauses between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Between reconciliations, so that the view is right within 30 s whatever was lost.
const RECONCILE: Duration = Duration::from_secs(20);
/// The first one after a connection: a subscription has no confirmation, so its first events may be missed.
const RECONCILE_SOON: Duration = Duration::from_secs(1);
/// After an image record went: containerd collects its content a moment later, before 2.1 without an event.
const RECONCILE_DELETED: Duration = Duration::from_secs(2);
/// After a change of the `ingest` folder that no list explains: a download that came and went between two looks.
const RECONCILE_MISSED: Duration = Duration::from_secs(1);
/// Between signs of life.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Events that come within this time are handled together.
const COALESCE: Duration = Duration::from_millis(30);
/// More pending events than this are cheaper to handle by a list of everything.
const PENDING: usize = 500;
/// Events that wait for the synchronizer.
const EVENTS: usize = 1024;
/// Between looks at ingests.
const POLL: Duration = Duration::from_millis(500);
/// How long ingests are polled after activity, where only containerd can tell.
const ACTIVE: Duration = Duration::from_secs(10);
/// When to ask again for the owner of new content, or for content whose download ended: before 2.1 it is listed a moment
/// after its ingest has gone.
const OWNER_AGAIN: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(5)];
/// New content that waits for its owner.
const OWNERLESS: usize = 10_000;
/// How long manifests that cannot be read may keep everything else waiting.
const UNREADABLE: Duration = Duration::from_secs(10);

/// The task's state across connections.
pub(super) struct Synchronizer {
    shared: Arc<Shared>,
    rechecks: mpsc::Receiver<Digest>,
    /// Kept while containerd is away.
    model: Model,
}

/// The state of one connection.
struct Session {
    shared: Arc<Shared>,
    api: Api,
    model: Model,
    pending: HashSet<Event>,
    reconcile_at: Instant,
    /// Manifests that containerd could not read, so that each is told of once.
    unreadable: HashSet<Digest>,
    /// Content without an owner: when to ask again, and how often that was done.
    ownerless: Vec<(Instant, Event, usize)>,
    ingests: Ingests,
}

/// What is known about unfinished downloads; only used before 2.1.
#[derive(Default)]
struct Ingests {
    needed: bool,
    changed: Option<SystemTime>,
    active_until: Option<Instant>,
    /// By namespace and digest.
    known: HashSet<(String, Digest)>,
}

impl Synchronizer {
    pub(super) fn new(shared: Arc<Shared>, rechecks: mpsc::Receiver<Digest>) -> Self {
        Self { shared, rechecks, model: Model::default() }
    }

    pub(super) async fn run(mut self) {
        let mut pause = BACKOFF.0;
        loop {
            let began = Instant::now();
            let error = self.connected().await;
            self.shared.api.store(None);
            let reason = error.to_string();
            if self.shared.view.set_health(Health::Degraded(reason.clone())) {
                tracing::warn!(reason, "the view of containerd may be old");
            }
            // A connection that lasted was a good one.
            if began.elapsed() > BACKOFF.1 * 2 {
                pause = BACKOFF.0;
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Connects and follows containerd until something fails.
    async fn connected(&mut self) -> ApiError {
        let (api, version) = match Api::connect(&self.shared.socket).await {
            Ok(connected) => connected,
            Err(error) => return error,
        };
        let root = match find_root(&self.shared, &api).await {
            Ok(root) => root,
            Err(error) => return error,
        };
        let files = root.is_some();
        if !files {
            tracing::info!("content is read over containerd's API until its content root can be read here");
        }
        self.shared.root.store(root.map(Arc::new));
        let mut session = Session {
            shared: Arc::clone(&self.shared),
            api: api.clone(),
            model: std::mem::take(&mut self.model),
            pending: HashSet::new(),
            reconcile_at: Instant::now() + RECONCILE_SOON,
            unreadable: HashSet::new(),
            ownerless: Vec::new(),
            ingests: Ingests { needed: !has_content_events(&version), ..Ingests::default() },
        };
        let error = session.run(&mut self.rechecks, &version, files).await;
        self.model = session.model;
        error
    }
}

impl Session {
    async fn run(&mut self, rechecks: &mut mpsc::Receiver<Digest>, version: &str, files: bool) -> ApiError {
        let (sender, mut events) = mpsc::channel(EVENTS);
        let subscription = subscribe(self.api.clone(), self.shared.namespaces.clone(), sender);
        let _subscription = AbortOnDropHandle::new(tokio::spawn(subscription));
        if let Err(error) = self.reconcile().await {
            return error;
        }
        self.shared.api.store(Some(Arc::new(self.api.clone())));
        if self.shared.view.set_health(Health::Ready) {
            tracing::info!(version, files, "following containerd");
        }
        let mut heartbeat = ticks(HEARTBEAT);
        let mut poll = ticks(POLL);
        let mut flush_at = None;
        loop {
            let owner_at = self.ownerless.iter().map(|(at, ..)| *at).min();
            let outcome = tokio::select! {
                event = events.recv() => match event {
                    Some(Ok(event)) => {
                        flush_at.get_or_insert_with(|| Instant::now() + COALESCE);
                        self.note(event);
                        Ok(())
                    }
                    Some(Err(error)) => Err(error),
                    None => Err(ApiError::Failed("containerd ended its events".to_owned())),
                },
                Some(digest) = rechecks.recv() => {
                    flush_at.get_or_insert_with(|| Instant::now() + COALESCE);
                    // Its reader took it out of the view, whatever the model says.
                    self.model.doubt(digest);
                    for namespace in self.shared.namespaces.clone() {
                        self.note(Event::Content { namespace, digest });
                    }
                    Ok(())
                }
                () = sleep_until(flush_at.unwrap_or(self.reconcile_at)), if flush_at.is_some() => {
                    flush_at = None;
                    let pending = std::mem::take(&mut self.pending);
                    self.refresh(pending).await
                }
                () = sleep_until(owner_at.unwrap_or(self.reconcile_at)), if owner_at.is_some() => {
                    let now = Instant::now();
                    let due = self.ownerless.extract_if(.., |(at, ..)| *at <= now).collect();
                    self.ask_owners(due).await
                }
                () = sleep_until(self.reconcile_at) => {
                    self.reconcile_at = Instant::now() + RECONCILE;
                    self.reconcile().await
                }
                _ = poll.tick(), if self.ingests.needed => self.poll_ingests().await,
                _ = heartbeat.tick() => self.api.version().await.map(drop),
            };
            if let Err(error) = outcome {
                return error;
            }
        }
    }

    fn note(&mut self, event: Event) {
        let (Event::Image { namespace, .. } | Event::Content { namespace, .. }) = &event;
        // The subscription filters already; what is served must not depend on that.
        if !self.shared.namespaces.contains(namespace) {
            return;
        }
        self.ingests.active_until = Some(Instant::now() + ACTIVE);
        if self.pending.len() < PENDING {
            self.pending.insert(event);
        } else {
            self.reconcile_at = Instant::now();
        }
    }

    /// Lists everything and makes the view equal to it.
    async fn reconcile(&mut self) -> Result<(), ApiError> {
        if self.shared.root.load().is_none()
            && let Some(root) = find_root(&self.shared, &self.api).await?
        {
            // A new containerd makes its folders with its first content.
            tracing::info!(path = %root.display(), "containerd's content root can be read now");
            self.shared.root.store(Some(Arc::new(root)));
        }
        for name in &self.shared.namespaces {
            let images = self.api.images(name).await?.into_iter().collect();
            let content = self.api.content(name).await?.into_iter().collect::<HashMap<_, _>>();
            self.model.list(name, Namespace { images, content });
        }
        self.read_manifests().await?;
        if *self.model.unpublished() != Unpublished::Nothing {
            self.model.forget();
        }
        self.unreadable.retain(|digest| self.model.held(digest).is_some());
        self.publish().await?;
        if self.ingests.needed && self.shared.root.load().is_none() {
            self.ingests.active_until.get_or_insert_with(Instant::now);
            self.list_ingests().await?;
        }
        Ok(())
    }

    /// Asks again for what events named.
    async fn refresh(&mut self, pending: HashSet<Event>) -> Result<(), ApiError> {
        for event in pending {
            match event {
                Event::Image { namespace, name } => {
                    let target = self.api.image(&namespace, &name).await?;
                    self.model.set_image(&namespace, &name, target.clone());
                    match target {
                        Some(target) => self.complete(&namespace, &target.digest).await?,
                        None => {
                            self.reconcile_at = self.reconcile_at.min(Instant::now() + RECONCILE_DELETED);
                        }
                    }
                }
                Event::Content { namespace, digest } => self.ask_content(&namespace, digest).await?,
            }
        }
        self.read_manifests().await?;
        self.publish().await?;
        Ok(())
    }

    /// Finds what is there of an image's tree, level by level: before 2.1 no event told of it.
    async fn complete(&mut self, namespace: &str, target: &Digest) -> Result<(), ApiError> {
        let mut asked = HashSet::new();
        loop {
            let mut missing = self.model.missing(namespace, target);
            missing.retain(|digest| asked.insert(*digest));
            if missing.is_empty() {
                return Ok(());
            }
            if asked.len() > PENDING {
                self.reconcile_at = Instant::now();
                return Ok(());
            }
            for digest in missing {
                self.ask_content(namespace, digest).await?;
            }
            self.read_manifests().await?;
        }
    }

    async fn ask_content(&mut self, namespace: &str, digest: Digest) -> Result<(), ApiError> {
        let entry = self.api.info(namespace, &digest).await?;
        if entry.as_ref().is_some_and(|entry| entry.sources.is_empty()) {
            self.await_owner(Event::Content { namespace: namespace.to_owned(), digest }, 0);
        }
        self.model.set_content(namespace, digest, entry);
        Ok(())
    }

    fn await_owner(&mut self, event: Event, attempt: usize) {
        if let Some(pause) = OWNER_AGAIN.get(attempt)
            && self.ownerless.len() < OWNERLESS
            && !self.ownerless.iter().any(|(_, waiting, _)| *waiting == event)
        {
            self.ownerless.push((Instant::now() + *pause, event, attempt));
        }
    }

    async fn ask_owners(&mut self, due: Vec<(Instant, Event, usize)>) -> Result<(), ApiError> {
        let mut marked = false;
        for (_, event, attempt) in due {
            let Event::Content { namespace, digest } = &event else { continue };
            let Some(entry) = self.api.info(namespace, digest).await? else {
                self.await_owner(event, attempt + 1);
                continue;
            };
            let (ownerless, has_children) = (entry.sources.is_empty(), entry.has_children);
            let old = self.model.set_content(namespace, *digest, Some(entry));
            marked |= has_children && !old.is_some_and(|old| old.has_children);
            if ownerless {
                self.await_owner(event, attempt + 1);
            }
        }
        if marked {
            self.read_manifests().await?;
        }
        self.publish().await?;
        Ok(())
    }

    /// Reads manifests that are held and not known yet, until they lead to no others. What cannot be read now is tried
    /// again by the next reconciliation.
    async fn read_manifests(&mut self) -> Result<(), ApiError> {
        let patient_until = Instant::now() + UNREADABLE;
        let mut failed = HashSet::new();
        loop {
            let mut progress = false;
            let mut unread = self.model.unread();
            unread.retain(|(digest, _)| !failed.contains(digest));
            for (digest, size) in unread {
                let bytes = match self.read_small(&digest, size).await {
                    Ok(Some(bytes)) => bytes,
                    Ok(None) => continue,
                    Err(error) => {
                        // Is it this one, or containerd? Only that ends the connection.
                        self.api.version().await?;
                        failed.insert(digest);
                        if self.unreadable.insert(digest) {
                            tracing::warn!(%digest, %error, "a manifest in containerd's store cannot be read");
                        }
                        if Instant::now() > patient_until {
                            return Ok(());
                        }
                        continue;
                    }
                };
                self.unreadable.remove(&digest);
                let manifest = if Digest::of(digest.algorithm(), &bytes) == digest {
                    Manifest::parse_known(&bytes)
                        .inspect_err(|error| tracing::debug!(%digest, %error, "not a manifest"))
                        .ok()
                        .map(|(manifest, _)| manifest)
                } else {
                    tracing::warn!(%digest, "a manifest is damaged in containerd's store");
                    None
                };
                self.model.learn(digest, manifest);
                progress = true;
            }
            if !progress {
                return Ok(());
            }
        }
    }

    /// Small content whole: by its file, else by the API. `None`: it is gone, or has another size.
    async fn read_small(&self, digest: &Digest, size: u64) -> Result<Option<Vec<u8>>, ApiError> {
        if let Some(root) = self.shared.root.load_full()
            && let Some(bytes) = read_file(&root, digest, size).await
        {
            return Ok(Some(bytes));
        }
        for namespace in &self.shared.namespaces {
            let mut stream = match self.api.read(namespace, digest, 0).await {
                Ok(stream) => stream,
                Err(ApiError::NotFound) => continue,
                Err(error) => return Err(error),
            };
            let mut bytes = Vec::new();
            while let Some(part) = stream.next().await {
                let part = part.map_err(|error| ApiError::Failed(error.to_string()))?;
                if bytes.len() + part.len() > MANIFEST_LIMIT as usize {
                    return Ok(None);
                }
                bytes.extend_from_slice(&part);
            }
            return Ok((bytes.len() as u64 == size).then_some(bytes));
        }
        Ok(None)
    }

    /// Tells the view what it does not know yet.
    async fn publish(&mut self) -> Result<(), ApiError> {
        match self.model.unpublished() {
            Unpublished::Nothing => return Ok(()),
            Unpublished::Contents(contents) => {
                for digest in contents {
                    match self.model.held(digest) {
                        Some(held) => self.shared.view.add(&held),
                        None => self.shared.view.remove(digest),
                    }
                }
            }
            Unpublished::Everything => {
                // Off the executor: with thousands of images it takes a tenth of a second.
                let (shared, snapshot) = (Arc::clone(&self.shared), self.model.snapshot());
                let (begin, begun) = oneshot::channel();
                let replace = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || {
                    let _ = begin.send(());
                    shared.view.replace(snapshot);
                }));
                let failed = |reason: &str| ApiError::Failed(format!("cannot make the view: {reason}"));
                // Only the wait for a thread has no end of its own.
                if timeout(DISK, begun).await.is_err() {
                    return Err(failed("no thread is free, as when a disk does not answer"));
                }
                replace.await.map_err(|error| failed(&error.to_string()))?;
            }
        }
        self.model.published();
        Ok(())
    }

    async fn poll_ingests(&mut self) -> Result<(), ApiError> {
        match self.shared.root.load_full() {
            Some(root) => {
                let path = root.join("ingest");
                let changed = disk(move || std::fs::metadata(path)?.modified()).await?.ok();
                let same = changed == self.ingests.changed;
                self.ingests.changed = changed;
                if same && self.ingests.known.is_empty() {
                    return Ok(());
                }
                let before = self.ingests.known.clone();
                self.list_ingests().await?;
                if !same && before == self.ingests.known {
                    self.reconcile_at = self.reconcile_at.min(Instant::now() + RECONCILE_MISSED);
                }
                Ok(())
            }
            None if self.ingests.active_until.is_none_or(|until| until < Instant::now())
                && self.ingests.known.is_empty() =>
            {
                Ok(())
            }
            None => self.list_ingests().await,
        }
    }

    /// Lists ingests; those that are gone since the last list are complete, or were given up.
    async fn list_ingests(&mut self) -> Result<(), ApiError> {
        let mut known = HashSet::new();
        for namespace in &self.shared.namespaces {
            let ingests = self.api.ingests(namespace).await?;
            let digests = ingests.iter().filter_map(|ingest| digest_of(&ingest.reference));
            known.extend(digests.map(|digest| (namespace.clone(), digest)));
        }
        let gone = self.ingests.known.difference(&known).cloned();
        let ended: HashSet<_> =
            gone.map(|(namespace, digest)| Event::Content { namespace, digest }).collect();
        self.ingests.known = known;
        if ended.is_empty() {
            return Ok(());
        }
        self.ingests.active_until = Some(Instant::now() + ACTIVE);
        self.refresh(ended.clone()).await?;
        for event in ended {
            if let Event::Content { digest, .. } = &event
                && self.model.held(digest).is_none()
            {
                self.await_owner(event, 0);
            }
        }
        Ok(())
    }
}

/// Sends events until the stream or the receiver ends.
async fn subscribe(api: Api, namespaces: Vec<String>, sender: mpsc::Sender<Result<Event, ApiError>>) {
    if namespaces.is_empty() {
        // A subscription without filters would be one to everything.
        return std::future::pending().await;
    }
    let mut events = match api.subscribe(&namespaces).await {
        Ok(events) => events,
        Err(error) => {
            let _ = sender.send(Err(error)).await;
            return;
        }
    };
    while let Some(event) = events.next().await {
        if sender.send(event).await.is_err() {
            return;
        }
    }
}

/// `layer-sha256:...` and its like end in the digest.
fn digest_of(reference: &str) -> Option<Digest> {
    let start = ["sha256:", "sha512:"].iter().filter_map(|algorithm| reference.rfind(algorithm)).max()?;
    reference[start..].parse().ok()
}

/// Whether this version announces content: 2.1 and later. One that cannot be read is taken for an old one.
fn has_content_events(version: &str) -> bool {
    let mut numbers = version
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(2), Some(1))
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_content_events() {
        for version in ["v2.1.0", "2.1.9~ds1", "2.10.1", "v3.0.0-beta.1"] {
            assert!(has_content_events(version), "{version}");
        }
        for version in ["1.6.20~ds1", "v1.7.24", "2.0.5", "v2.0", "", "dev"] {
            assert!(!has_content_events(version), "{version}");
        }
    }

    #[test]
    fn digests_of_ingests() {
        let digest = Digest::sha256(b"x");
        for prefix in ["layer-", "manifest-", "k8s.io/1/layer-", ""] {
            assert_eq!(digest_of(&format!("{prefix}{digest}")), Some(digest));
        }
        assert_eq!(digest_of("layer-sha256:00"), None);
        assert_eq!(digest_of("export"), None);
    }
}
