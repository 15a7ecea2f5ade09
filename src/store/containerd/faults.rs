//! Calls that fail at the worst moment, against a containerd in memory.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use super::fake::{Fake, socket};
use super::*;
use crate::oci::{Algorithm, Reference};
use crate::store::Change;
use crate::store::conformance::eventually;
use crate::store::memory::{Artifact, Stored};

struct Case {
    fake: Fake,
    folder: tempfile::TempDir,
    store: ContainerdStore,
}

impl Case {
    /// A store of a containerd of this version that does not run yet.
    fn new(version: &'static str) -> Self {
        Self::rooted(version, None)
    }

    /// The same with a content root, of this name below its folder.
    fn rooted(version: &'static str, root: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let content_root = root.map(|root| folder.path().join(root));
        if let Some(root) = &content_root {
            std::fs::create_dir_all(root.join("blobs")).unwrap();
        }
        let config = Config { socket: socket(folder.path()), content_root, ..Config::default() };
        Self { fake: Fake::new(version), folder, store: ContainerdStore::new(&config) }
    }

    fn serve(&self) -> AbortOnDropHandle<()> {
        self.fake.serve(self.folder.path())
    }

    async fn ready(&self) {
        let mut health = self.store.health();
        health.wait_for(|health| *health == Health::Ready).await.unwrap();
    }

    async fn resolves(&self, artifact: &Artifact) {
        let name = Reference::parse_full(&artifact.name).unwrap();
        eventually(&artifact.name, || self.store.resolve(&name).as_ref() == Some(&artifact.target)).await;
    }
}

#[tokio::test]
async fn what_was_learned_before_an_error_is_published_after_it() {
    let case = Case::new("v1.7.0");
    let _server = case.serve();
    case.ready().await;
    eventually("a subscription", || case.fake.followers() > 0).await;
    // Its manifest is there, its layers are not: nothing in the next listing is new.
    let artifact = Artifact::image("one.test/error:1", &[b"error: layer"]);
    case.fake.put(artifact.blobs.last().unwrap());
    // Its answer for the manifest is right, the one for a child fails.
    case.fake.fail_after("Content/Info", 1, 1);
    case.fake.name(&artifact.name, &artifact.target);
    eventually("an error", || case.fake.failing("Content/Info") == 0).await;
    case.resolves(&artifact).await;
}

#[tokio::test]
async fn a_first_listing_is_published_although_ingests_cannot_be_listed() {
    let case = Case::new("v1.7.0");
    let artifact = Artifact::image("one.test/ingests:1", &[b"ingests: layer"]);
    for blob in &artifact.blobs {
        case.fake.put(blob);
    }
    case.fake.name(&artifact.name, &artifact.target);
    case.fake.fail_after("Content/ListStatuses", 0, 1);
    let _server = case.serve();
    case.ready().await;
    assert_eq!(case.fake.failing("Content/ListStatuses"), 0);
    case.resolves(&artifact).await;
}

#[tokio::test]
async fn content_that_came_back_while_containerd_failed_is_seen() {
    let case = Case::new("v2.1.0");
    let blob = Stored::new("application/octet-stream", &b"came back"[..]);
    let digest = blob.descriptor.digest;
    case.fake.put(&blob);
    let _server = case.serve();
    case.ready().await;
    assert!(case.store.describe(&digest).is_some());
    // A reader is told that it is gone; by the time that the synchronizer asks, containerd fails, then it is there again.
    case.fake.take(&digest);
    case.fake.fail_after("Content/Info", 1, 1);
    assert!(matches!(case.store.open(&digest, 0).await, Err(Error::NotFound(_))));
    case.fake.put(&blob);
    eventually("an error", || case.fake.failing("Content/Info") == 0).await;
    eventually("the content", || case.store.describe(&digest).is_some()).await;
}

#[tokio::test]
async fn a_manifest_that_cannot_be_read_takes_nothing_else_away() {
    let case = Case::new("v2.1.0");
    let artifact = Artifact::image("one.test/unreadable:1", &[b"unreadable: layer"]);
    for blob in &artifact.blobs {
        case.fake.put(blob);
    }
    case.fake.name(&artifact.name, &artifact.target);
    case.fake.fail_after("Content/Read", 0, usize::MAX);
    let _server = case.serve();
    case.ready().await;
    case.resolves(&artifact).await;
    let layer = &artifact.blobs[0].descriptor.digest;
    assert!(case.store.describe(layer).is_some_and(|blob| blob.repositories.is_empty()));
    // As soon as it can be read, it is.
    case.fake.fail_after("Content/Read", 0, 0);
    eventually("an owner", || !case.store.describe(layer).unwrap().repositories.is_empty()).await;
}

#[tokio::test]
async fn content_by_sha512_is_read_from_its_file() {
    let case = Case::rooted("v2.1.0", Some("content"));
    let blob = Stored::hashed(Algorithm::Sha512, "application/octet-stream", &b"by sha512"[..]);
    let digest = blob.descriptor.digest;
    let path = blob_path(&case.folder.path().join("content"), &digest);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, &blob.bytes).unwrap();
    case.fake.put(&blob);
    let _server = case.serve();
    case.ready().await;
    let mut content = case.store.open(&digest, 3).await.unwrap();
    assert_eq!(content.next(u64::MAX).await.unwrap().as_deref(), Some(&b"sha512"[..]));
    assert_eq!(case.fake.calls("Content/Read"), 0);
}

#[tokio::test]
async fn events_that_are_late_or_doubled_or_out_of_order_change_nothing() {
    let case = Case::new("v2.1.0");
    let _server = case.serve();
    case.ready().await;
    eventually("a subscription", || case.fake.followers() > 0).await;
    let blob = Stored::new("application/octet-stream", &b"events"[..]);
    let digest = blob.descriptor.digest;
    let mut watch = case.store.watch();
    case.fake.put(&blob);
    for topic in ["/content/create", "/content/create", "/content/delete"] {
        case.fake.tell_of(topic, &digest);
    }
    assert_eq!(watch.changes.recv().await.unwrap(), Change::Added(digest));
    case.fake.take(&digest);
    for topic in ["/content/delete", "/content/delete", "/content/create"] {
        case.fake.tell_of(topic, &digest);
    }
    assert_eq!(watch.changes.recv().await.unwrap(), Change::Removed(digest));
    // Everything has been asked again.
    let asked = case.fake.calls("Content/List");
    eventually("a reconciliation", || case.fake.calls("Content/List") > asked).await;
    assert!(watch.changes.try_recv().is_err(), "told once");
}

/// The only thread that may block is with a disk that does not answer.
#[test]
fn a_disk_that_hangs_is_told_and_recovered_from() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let (release, hang) = std::sync::mpsc::channel::<()>();
    runtime.block_on(async {
        // An old one: its `ingest` folder is looked at twice a second.
        let case = Case::rooted("v1.7.0", Some("content"));
        let _server = case.serve();
        case.ready().await;
        let hung = tokio::task::spawn_blocking(move || hang.recv());
        let mut health = case.store.health();
        let degraded = health.wait_for(|health| matches!(health, Health::Degraded(_)));
        let degraded =
            tokio::time::timeout(Duration::from_secs(10), degraded).await.unwrap().unwrap().clone();
        let Health::Degraded(reason) = degraded else { unreachable!("waited for") };
        assert!(reason.contains("the disk does not answer"), "{reason}");
        release.send(()).unwrap();
        case.ready().await;
        hung.await.unwrap().unwrap();
    });
}

async fn check_discarded(case: &Case, digest: &Digest) {
    case.fake.begin_ingest(&format!("layer-{digest}"));
    case.fake.begin_ingest("layer-of-another");
    let outcome = case.store.discard_ingests(digest).await;
    assert!(matches!(outcome, Err(Error::Unavailable(_))), "{outcome:?}");
    assert_eq!(case.fake.ingests().len(), 2);
}

async fn gone(case: &Case) {
    eventually("the discard", || case.fake.ingests() == ["layer-of-another"]).await;
}

#[tokio::test]
async fn a_discard_is_remembered_while_containerd_is_away() {
    let case = Case::new("v2.1.0");
    check_discarded(&case, &Digest::sha256(b"poison")).await;
    let _server = case.serve();
    gone(&case).await;
}

#[tokio::test]
async fn a_discard_that_failed_is_tried_again() {
    let case = Case::new("v2.1.0");
    let _server = case.serve();
    case.ready().await;
    case.fake.fail_after("Content/ListStatuses", 0, 2);
    check_discarded(&case, &Digest::sha256(b"poison")).await;
    gone(&case).await;
}

/// The fake's ingests begin an hour ahead of this machine's clock, as after a clock that was set back.
#[tokio::test]
async fn a_discard_needs_no_clock() {
    let case = Case::new("v2.1.0");
    let _server = case.serve();
    case.ready().await;
    let digest = Digest::sha256(b"poison");
    case.fake.begin_ingest(&format!("layer-{digest}"));
    assert_eq!(case.store.discard_ingests(&digest).await.unwrap(), 1);
    assert!(case.fake.ingests().is_empty());
}

#[tokio::test]
async fn a_new_attempt_is_not_discarded_by_a_request_that_knew_of_an_older_one() {
    let case = Case::new("v2.1.0");
    let _server = case.serve();
    case.ready().await;
    case.fake.fail_after("Content/Abort", 0, 1);
    let digest = Digest::sha256(b"poison");
    check_discarded(&case, &digest).await;
    // Before the next look the poisoned one is gone, and another has begun under its reference.
    case.fake.begin_ingest(&format!("layer-{digest}"));
    let looks = case.fake.calls("Content/Status");
    eventually("all looks", || case.fake.calls("Content/Status") == looks + 3).await;
    assert_eq!(case.fake.ingests().len(), 2);
}

#[tokio::test]
async fn remembered_discards_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let store = ContainerdStore::new(&Config { socket: socket(folder.path()), ..Config::default() });
    for number in 0..ingests::FOLLOWED + 10 {
        let digest = Digest::sha256(&number.to_be_bytes());
        for _ in 0..2 {
            assert!(store.discard_ingests(&digest).await.is_err());
        }
    }
    assert_eq!(store.discards.len(), ingests::FOLLOWED);
}

const WHOLE: &[u8] = b"a layer, whole";

/// A containerd with an unfinished download of [`WHOLE`] that has these bytes.
async fn downloading(data: &[u8]) -> (Case, AbortOnDropHandle<()>, Digest, String) {
    let case = Case::new("v2.1.0");
    let server = case.serve();
    case.ready().await;
    let digest = Digest::sha256(WHOLE);
    let reference = format!("layer-{digest}");
    case.fake.write_ingest("layer-of-another", b"wrong", 5);
    case.fake.write_ingest(&reference, data, WHOLE.len());
    (case, server, digest, reference)
}

#[tokio::test]
async fn a_download_that_is_complete_and_wrong_is_discarded() {
    let (case, _server, digest, _) = downloading(b"a lie, as long").await;
    assert!(case.store.discard_stuck(&digest).await.unwrap());
    assert_eq!(case.fake.ingests(), ["layer-of-another"]);
}

#[tokio::test]
async fn a_download_that_is_complete_and_right_is_left() {
    let (case, _server, digest, _) = downloading(WHOLE).await;
    assert!(!case.store.discard_stuck(&digest).await.unwrap());
    assert_eq!(case.fake.ingests().len(), 2);
}

/// A commit may take long, and looks like a download that is stuck.
#[tokio::test]
async fn a_download_that_somebody_writes_or_commits_is_left() {
    let (case, _server, digest, reference) = downloading(b"a lie, as long").await;
    case.fake.lock_ingest(&reference, true);
    let stuck = case.store.discard_stuck(&digest);
    let released = async {
        eventually("two questions", || case.fake.calls("Content/Write") >= 2).await;
        assert_eq!(case.fake.ingests().len(), 2, "held by another");
        case.fake.lock_ingest(&reference, false);
    };
    let (discarded, ()) = tokio::join!(stuck, released);
    assert!(discarded.unwrap(), "once nobody holds it");
}

#[tokio::test]
async fn a_watch_ends_with_the_content() {
    let (case, _server, digest, _) = downloading(b"a layer,").await;
    case.fake.put(&Stored::new("application/octet-stream", WHOLE));
    // No event tells of it: the store finds it by its first reconciliation after the start.
    assert!(!case.store.discard_stuck(&digest).await.unwrap());
    assert_eq!(case.fake.calls("Content/Write"), 0, "it is not complete");
    assert_eq!(case.fake.ingests().len(), 2);
}

#[tokio::test]
async fn watches_cost_nothing_without_containerd_and_are_bounded() {
    let case = Case::new("v2.1.0");
    let digests = (0..ingests::FOLLOWED + 10).map(|number| Digest::sha256(&number.to_be_bytes()));
    let watches = digests.map(async |digest| {
        let waiting = tokio::time::timeout(Duration::from_millis(50), case.store.discard_stuck(&digest));
        waiting.await.ok()
    });
    let outcomes = futures::future::join_all(watches).await;
    assert_eq!(case.store.watches.len(), ingests::FOLLOWED);
    let refused = outcomes.iter().flatten().filter(|outcome| matches!(outcome, Ok(false)));
    assert_eq!((outcomes.iter().flatten().count(), refused.count()), (10, 10));
}
