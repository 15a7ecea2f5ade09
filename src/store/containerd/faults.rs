//! Calls that fail at the worst moment, against a containerd in memory.

use tokio_util::task::AbortOnDropHandle;

use super::fake::{Fake, socket};
use super::*;
use crate::oci::Reference;
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
        let folder = tempfile::tempdir().unwrap();
        let store = ContainerdStore::new(&Config { socket: socket(folder.path()), ..Config::default() });
        Self { fake: Fake::new(version), folder, store }
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

async fn check_discarded(case: &Case, digest: &Digest) {
    case.fake.begin_ingest(&format!("layer-{digest}"));
    case.fake.begin_ingest("layer-of-another");
    let outcome = case.store.discard_ingests(digest).await;
    assert!(matches!(outcome, Err(Error::Unavailable(_))), "{outcome:?}");
    assert_eq!(case.fake.ingests(), 2);
}

#[tokio::test]
async fn a_discard_is_remembered_while_containerd_is_away() {
    let case = Case::new("v2.1.0");
    check_discarded(&case, &Digest::sha256(b"poison")).await;
    let _server = case.serve();
    eventually("the discard", || case.fake.ingests() == 1).await;
}

#[tokio::test]
async fn a_discard_that_failed_is_tried_again() {
    let case = Case::new("v2.1.0");
    let _server = case.serve();
    case.ready().await;
    case.fake.fail_after("Content/ListStatuses", 0, 2);
    check_discarded(&case, &Digest::sha256(b"poison")).await;
    eventually("the discard", || case.fake.ingests() == 1).await;
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
    assert_eq!(store.discards.lock().unwrap().len(), ingests::FOLLOWED);
}
