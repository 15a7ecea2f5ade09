//! The containerd store against real containerds of every generation: conformance, then each way in which containerd
//! fails. A generation that the machine has not is skipped with the reason.
//!
//! A harness of its own (libtest-mimic), so that skipped cases are counted as ignored.

#![expect(clippy::unwrap_used, reason = "a case fails by panicking")]

mod daemon;
mod relay;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use libtest_mimic::{Arguments, Failed, Trial};
use peili::oci::{Digest, Reference};
use peili::store::conformance::{Subject, conformance, eventually};
use peili::store::containerd::ContainerdStore;
use peili::store::memory::{Artifact, Stored};
use peili::store::{Change, Config, Error, Health, Provider, Watcher};
use peili_lab::{Generation, Requirement, require};

use daemon::{Containerd, NAMESPACE};
use relay::Relay;

/// What a case may take: conformance waits for several reconciliations.
const LIMIT: Duration = Duration::from_secs(180);
/// Cases at once: some look at the clock. `--test-threads` overrides it.
const AT_ONCE: usize = 1;
/// How soon a change is promised to be seen. An event may be lost, or the machine busy: most are to keep to it.
const FRESH: Duration = Duration::from_secs(1);
/// How soon any change is to be seen in these cases: a poll, and the list that makes up for an event that was lost.
const SLOWEST: Duration = Duration::from_secs(5);

struct Real {
    containerd: Containerd,
    store: ContainerdStore,
    files: bool,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let trials = Generation::ALL.into_iter().flat_map(cases);
    let trials = trials.map(|(trial, missing)| {
        let ignored = missing.is_some();
        if let Some(reason) = missing
            && !arguments.list
            && !arguments.is_filtered_out(&trial)
        {
            report(trial.name(), &reason);
        }
        trial.with_ignored_flag(ignored)
    });
    let trials = trials.collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The cases of one generation, and why they cannot run.
fn cases(generation: Generation) -> Vec<(Trial, Option<String>)> {
    let missing = require(&[Requirement::Root, Requirement::Containerd(generation)]).err();
    let mut cases = Vec::new();
    macro_rules! case {
        ($($name:ident),+ $(,)?) => {$(
            let name = format!("{}::{}", module(generation), stringify!($name));
            cases.push((Trial::test(name, move || execute($name(generation))), missing.clone()));
        )+};
    }
    case!(
        conforms_by_files,
        conforms_by_the_api,
        absent_then_started_then_killed_then_restarted,
        stopped_and_continued,
        images_are_seen_within_a_second,
        layers_of_a_running_pull_are_seen,
        lost_events_are_made_up_for,
        other_namespaces_are_closed,
        ingests_that_began_before_are_discarded,
        a_download_that_is_complete_and_wrong_goes,
    );
    cases
}

fn module(generation: Generation) -> &'static str {
    match generation {
        Generation::V1_6 => "containerd_1_6",
        Generation::V1_7 => "containerd_1_7",
        Generation::V2 => "containerd_2",
    }
}

fn execute(case: impl Future<Output = ()>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async { tokio::time::timeout(LIMIT, case).await });
    ended.map_err(|_| format!("not done within {LIMIT:?}").into())
}

/// `cargo xtask test` collects these lines; the harness itself counts the case as ignored.
#[expect(clippy::print_stdout, reason = "the reason is the test's output")]
fn report(name: &str, reason: &str) {
    println!("skipped: {name}: {reason}");
}

#[async_trait]
impl Subject for Real {
    fn provider(&self) -> &dyn Provider {
        &self.store
    }

    fn watcher(&self) -> &dyn Watcher {
        &self.store
    }

    async fn put(&self, artifact: &Artifact) {
        self.containerd.put(NAMESPACE, artifact).await;
    }

    async fn delete(&self, artifact: &Artifact) {
        self.containerd.delete(artifact).await;
    }

    fn takes_sha512(&self) -> bool {
        false
    }

    fn reads_files(&self) -> bool {
        self.files
    }
}

fn reference(text: &str) -> Reference {
    Reference::parse_full(text).unwrap()
}

async fn health(store: &ContainerdStore, wanted: impl Fn(&Health) -> bool) -> Health {
    let mut health = store.health();
    let wait = tokio::time::timeout(Duration::from_secs(20), health.wait_for(|health| wanted(health))).await;
    wait.expect("health changes in time").unwrap().clone()
}

async fn ready(store: &ContainerdStore) {
    health(store, |health| *health == Health::Ready).await;
}

async fn degraded(store: &ContainerdStore) -> String {
    match health(store, |health| matches!(health, Health::Degraded(_))).await {
        Health::Degraded(reason) => reason,
        other => panic!("{other:?}"),
    }
}

async fn read(store: &ContainerdStore, digest: &Digest) -> Vec<u8> {
    let mut content = store.open(digest, 0).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = content.next(u64::MAX).await.unwrap() {
        bytes.extend_from_slice(&chunk);
    }
    bytes
}

/// Waits until `condition` holds; how long that was since `began`.
async fn seen(what: &str, began: Instant, condition: impl Fn() -> bool) -> Duration {
    eventually(what, condition).await;
    let took = began.elapsed();
    assert!(took < SLOWEST, "{what}: {took:?}");
    took
}

fn assert_fresh(mut times: Vec<Duration>) {
    times.sort();
    assert!(times[times.len() / 2] < FRESH, "{times:?}");
}

async fn conforms_by_files(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    assert!(store.content_root().is_some());
    assert_eq!(store.problem(), None);
    conformance(&Real { containerd, store, files: true }).await;
}

async fn conforms_by_the_api(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let config = Config { content_root: Some("/nonexistent".into()), ..containerd.config() };
    let store = ContainerdStore::new(&config);
    ready(&store).await;
    assert_eq!(store.content_root(), None);
    assert!(store.problem().unwrap().contains("content folder"));
    conformance(&Real { containerd, store, files: false }).await;
}

async fn absent_then_started_then_killed_then_restarted(generation: Generation) {
    let mut containerd = Containerd::absent(generation);
    let store = ContainerdStore::new(&containerd.config());
    let reason = degraded(&store).await;
    assert!(reason.ends_with("No such file or directory; is the socket mounted?"), "{reason}");

    containerd.start().await;
    ready(&store).await;
    let artifact = Artifact::image("one.test/restart:1", &[b"restart: layer"]);
    let began = containerd.put(NAMESPACE, &artifact).await;
    let name = reference("one.test/restart:1");
    seen("an image", began, || store.resolve(&name).is_some()).await;

    containerd.kill().await;
    degraded(&store).await;
    let layer = &artifact.blobs[0];
    assert_eq!(store.resolve(&name), Some(artifact.target.clone()), "the view stands");
    assert_eq!(read(&store, &layer.descriptor.digest).await, layer.bytes, "files stay readable");

    containerd.start().await;
    ready(&store).await;
    let again = Artifact::image("one.test/restart:2", &[b"restart: another"]);
    let began = containerd.put(NAMESPACE, &again).await;
    let name = reference("one.test/restart:2");
    seen("an image after a restart", began, || store.resolve(&name).is_some()).await;
}

async fn stopped_and_continued(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let files = ContainerdStore::new(&containerd.config());
    let config = Config { content_root: Some("/nonexistent".into()), ..containerd.config() };
    let api = ContainerdStore::new(&config);
    ready(&files).await;
    ready(&api).await;
    let artifact = Artifact::image("one.test/stopped:1", &[b"stopped: layer"]);
    containerd.put(NAMESPACE, &artifact).await;
    let name = reference("one.test/stopped:1");
    eventually("an image", || files.resolve(&name).is_some() && api.resolve(&name).is_some()).await;

    containerd.signal(rustix::process::Signal::STOP);
    let layer = &artifact.blobs[0];
    let digest = layer.descriptor.digest;
    let began = Instant::now();
    assert!(matches!(api.open(&digest, 0).await, Err(Error::Unavailable(_))));
    assert!(api.discard_ingests(&digest).await.is_err());
    assert!(began.elapsed() < Duration::from_secs(6), "calls have limits");
    let reason = degraded(&files).await;
    assert!(reason.contains("does not answer"), "{reason}");
    assert_eq!(files.resolve(&name), Some(artifact.target.clone()), "the view stands");
    assert_eq!(read(&files, &digest).await, layer.bytes);

    containerd.signal(rustix::process::Signal::CONT);
    ready(&files).await;
    ready(&api).await;
    assert_eq!(read(&api, &digest).await, layer.bytes);
}

/// From 2.1 containerd tells of content; before, the layers of a running pull are found by their unfinished downloads.
async fn layers_of_a_running_pull_are_seen(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let (mut watch, mut times) = (store.watch(), Vec::new());
    for number in 0..3_u8 {
        let layer =
            Stored::new("application/octet-stream", vec![number; 100_000]).labelled("one.test", "flight");
        let digest = layer.descriptor.digest;
        containerd.write(NAMESPACE, &layer, 50_000).await.unwrap();
        if generation != Generation::V2 {
            // Two polls, so that the download is seen before it ends.
            tokio::time::sleep(Duration::from_millis(1100)).await;
        }
        assert!(store.describe(&digest).is_none(), "not complete");
        let began = Instant::now();
        containerd.write_rest(&layer, 50_000).await.unwrap();
        let what = "a layer without an image record";
        times.push(seen(what, began, || store.describe(&digest).is_some()).await);
        assert_eq!(watch.changes.recv().await.unwrap(), Change::Added(digest));
        let owner = || store.describe(&digest).is_some_and(|blob| blob.repositories.len() == 1);
        eventually("its owner", owner).await;
    }
    assert_fresh(times);
}

async fn images_are_seen_within_a_second(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let mut times = Vec::new();
    for number in 0..5 {
        let text = format!("one.test/soon:{number}");
        let artifact = Artifact::image(&text, &[text.as_bytes(), b"soon: a shared layer"]);
        let began = containerd.put(NAMESPACE, &artifact).await;
        let name = reference(&text);
        let is_seen = || {
            store.resolve(&name).is_some()
                && artifact.blobs.iter().all(|blob| store.describe(&blob.descriptor.digest).is_some())
        };
        times.push(seen(&text, began, is_seen).await);
    }
    assert_fresh(times);
}

async fn lost_events_are_made_up_for(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let relay = Relay::start(&containerd.socket());
    let store = ContainerdStore::new(&Config { socket: relay.socket(), ..containerd.config() });
    ready(&store).await;
    let before = Artifact::image("one.test/lost:before", &[b"lost: before"]);
    containerd.put(NAMESPACE, &before).await;
    let held = |artifact: &Artifact| store.resolve(&reference(&artifact.name)).is_some();
    // Its events are lost already, but for the list that follows a connection soon.
    eventually("an image without events", || held(&before)).await;
    // So that no such list is near.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let after = Artifact::image("one.test/lost:after", &[b"lost: after"]);
    let lost = relay.lost();
    containerd.put(NAMESPACE, &after).await;
    containerd.delete(&before).await;
    let began = Instant::now();
    eventually("reconciliation", || {
        held(&after) && !held(&before) && store.describe(&before.blobs[0].descriptor.digest).is_none()
    })
    .await;
    assert!(relay.lost() > lost, "events were lost");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(*store.health().borrow(), Health::Ready, "nobody noticed");
}

async fn other_namespaces_are_closed(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let other = Artifact::image("one.test/other:1", &[b"other namespace: layer"]);
    containerd.put("other", &other).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let both = Config { namespaces: vec![NAMESPACE.into(), "other".into()], ..containerd.config() };
    let both = ContainerdStore::new(&both);
    ready(&both).await;
    let later = Artifact::image("one.test/other:2", &[b"other namespace: later"]);
    containerd.put("other", &later).await;
    eventually("the other namespace", || both.resolve(&reference("one.test/other:2")).is_some()).await;
    for artifact in [&other, &later] {
        let digest = artifact.blobs[0].descriptor.digest;
        let file = store.content_root().unwrap().join("blobs/sha256").join(digest.hex());
        assert!(Path::new(&file).exists(), "the file is there for all");
        assert_eq!(store.describe(&digest), None);
        assert!(matches!(store.open(&digest, 0).await, Err(Error::NotFound(_))));
        assert_eq!(read(&both, &digest).await, artifact.blobs[0].bytes);
    }
}

async fn ingests_that_began_before_are_discarded(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let poisoned = Stored::new("application/octet-stream", vec![1; 9000]);
    let innocent = Stored::new("application/octet-stream", vec![2; 9000]);
    for blob in [&poisoned, &innocent] {
        containerd.write(NAMESPACE, blob, 5000).await.unwrap();
    }
    assert_eq!(containerd.ingests().await, 2);
    assert_eq!(store.discard_ingests(&poisoned.descriptor.digest).await.unwrap(), 1);
    assert_eq!(containerd.ingests().await, 1);
    // A new attempt is not touched by what still looks for the old one.
    containerd.write(NAMESPACE, &poisoned, 4000).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2300)).await;
    assert_eq!(containerd.ingests().await, 2);
}

/// containerd's issue 3974: it would commit such a download for ever, and ask nobody.
async fn a_download_that_is_complete_and_wrong_goes(generation: Generation) {
    let containerd = Containerd::started(generation).await;
    let store = ContainerdStore::new(&containerd.config());
    ready(&store).await;
    let blob = |byte: u8| Stored::new("application/octet-stream", vec![byte; 9000]);
    let (wrong, right) = (blob(1), blob(2));
    containerd.write_only(&wrong, &[9; 9000]).await;
    containerd.write_only(&right, &right.bytes).await;
    assert!(containerd.write_rest(&wrong, 9000).await.is_err(), "it cannot be committed");
    assert_eq!(containerd.ingests().await, 2, "containerd keeps it");

    // As while it is being committed.
    let writer = containerd.hold(&wrong).await;
    let held = tokio::time::timeout(Duration::from_secs(6), store.discard_stuck(&wrong.descriptor.digest));
    assert!(held.await.is_err(), "somebody is at it");
    assert_eq!(containerd.ingests().await, 2);
    drop(writer);

    assert!(store.discard_stuck(&wrong.descriptor.digest).await.unwrap());
    assert_eq!(containerd.ingests().await, 1);
    assert!(!store.discard_stuck(&right.descriptor.digest).await.unwrap());
    assert_eq!(containerd.ingests().await, 1, "right, and about to be committed");
    containerd.write_rest(&right, 9000).await.unwrap();
    containerd.write(NAMESPACE, &wrong, 9000).await.unwrap();
    assert_eq!(containerd.ingests().await, 0);
}
