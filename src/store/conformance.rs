//! One suite for all stores: the memory twin, OCI layouts and real containerds run it.
//!
//! It puts artifacts of its own names into a store that may hold others, and panics at the first difference.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::memory::{Artifact, CONFIG, LAYER, Stored};
use super::{Change, Error, Provider, Watcher};
use crate::oci::{Algorithm, Descriptor, Digest, MANIFEST_MEDIA_TYPES, Name, Reference};

/// Until when a change must be seen: reconciliation's 30 s, and some for a slow machine.
const LIMIT: Duration = Duration::from_secs(40);

/// A store under test, and the way to change what it holds.
#[async_trait]
pub trait Subject: Send + Sync {
    /// The store's provider.
    fn provider(&self) -> &dyn Provider;

    /// The store's watcher.
    fn watcher(&self) -> &dyn Watcher;

    /// Stores the content that is not there yet, then the image record.
    async fn put(&self, artifact: &Artifact);

    /// Deletes the image record and the content that the artifact carries.
    async fn delete(&self, artifact: &Artifact);

    /// Whether content has labels, and image records may have any name.
    fn is_containerd_like(&self) -> bool {
        true
    }

    /// Whether content by sha512 can be put: the writers of containerd up to 2.1 hash by sha256 only.
    fn takes_sha512(&self) -> bool {
        true
    }

    /// Whether open content stays readable when it is deleted.
    fn reads_files(&self) -> bool {
        true
    }
}

/// Runs the suite. The subject's process, if there is one, must be up.
pub async fn conformance(subject: &dyn Subject) {
    resolves_and_describes(subject).await;
    opens_at_offsets(subject).await;
    artifacts_keep_their_media_types(subject).await;
    missing_children_are_normal(subject).await;
    layers_are_shared(subject).await;
    registries_may_have_ports(subject).await;
    watches_without_a_gap(subject).await;
    deletes_under_an_open_content(subject).await;
    if subject.is_containerd_like() {
        labels_come_second(subject).await;
        names_without_a_registry(subject).await;
    }
}

/// Waits until `condition` holds; panics with `what` after 40 s.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

async fn resolves_and_describes(subject: &dyn Subject) {
    let provider = subject.provider();
    let artifact = Artifact::image("one.test/app:1", &[b"resolve: one layer", b"resolve: another"]);
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;

    assert_eq!(provider.resolve(&reference("one.test/app:1")), Some(artifact.target.clone()));
    assert_eq!(provider.resolve(&reference("one.test/app:2")), None, "another tag");
    assert_eq!(provider.resolve(&reference("one.test/other:1")), None, "another repository");
    assert_eq!(provider.resolve(&reference("two.test/app:1")), None, "another registry");
    for blob in &artifact.blobs {
        let digest = blob.descriptor.digest;
        let by_digest = |name: &str| provider.resolve(&Reference::digested(self::name(name), digest));
        assert_eq!(by_digest("one.test/app"), Some(blob.descriptor.clone()), "by digest");
        assert_eq!(by_digest("one.test/other"), None, "by digest under another repository");
        assert_described(subject, &blob.descriptor, &["one.test/app"]);
    }
    // What is held is no unfinished download.
    let held = artifact.target.digest;
    assert_eq!(provider.discard_ingests(&held).await.expect("a store that answers"), 0);
    assert!(!provider.discard_stuck(&held).await.expect("a store that answers"));
    let unknown = Digest::sha256(b"resolve: unknown");
    assert_eq!(provider.describe(&unknown), None);
    assert!(matches!(provider.open(&unknown, 0).await, Err(Error::NotFound(digest)) if digest == unknown));

    let moved = Artifact::image("one.test/app:1", &[b"resolve: a new layer"]);
    subject.put(&moved).await;
    eventually("a tag that moved", || {
        provider.resolve(&reference("one.test/app:1")) == Some(moved.target.clone())
    })
    .await;
}

async fn opens_at_offsets(subject: &dyn Subject) {
    let layer: Vec<u8> = (0..700_001_u32).map(|i| (i % 241) as u8).collect();
    let config = Stored::new(CONFIG, "{}");
    let sha512 = Stored::hashed(Algorithm::Sha512, LAYER, layer.iter().rev().copied().collect::<Vec<_>>());
    let mut layers = vec![Stored::new(LAYER, layer)];
    layers.extend(subject.takes_sha512().then_some(sha512));
    let artifact = Artifact::manifest("one.test/open:1", config, layers, None);
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;
    for blob in &artifact.blobs {
        let (digest, size) = (blob.descriptor.digest, blob.bytes.len());
        for offset in [0, 1, size / 2, size - 1, size] {
            let read = read(subject, &digest, offset as u64).await;
            assert!(read == blob.bytes[offset..], "{digest} at {offset}: {} bytes", read.len());
        }
        let past = subject.provider().open(&digest, size as u64 + 1).await;
        assert!(matches!(past, Err(Error::Offset { .. })), "{digest} past the end");
    }
}

async fn artifacts_keep_their_media_types(subject: &dyn Subject) {
    let amd64 = Artifact::image("", &[b"types: amd64"]);
    let arm64 = Artifact::image("", &[b"types: arm64"]);
    let index = Artifact::index("one.test/types:1", vec![amd64, arm64]);
    let chart = Artifact::helm("one.test/charts/types:1");
    let signature = Artifact::cosign("one.test/types:sha256-0.sig", &index.target);
    for artifact in [&index, &chart, &signature] {
        subject.put(artifact).await;
        wait_held(subject, artifact).await;
        for blob in &artifact.blobs {
            let described = subject.provider().describe(&blob.descriptor.digest);
            let described =
                described.unwrap_or_else(|| panic!("{} of {}", blob.descriptor.digest, artifact.name));
            assert_eq!(described.descriptor, blob.descriptor, "{}", artifact.name);
        }
        let target = subject.provider().resolve(&reference(&artifact.name));
        assert_eq!(target.as_ref(), Some(&artifact.target), "{}", artifact.name);
    }
    assert_eq!(&*index.target.media_type, MANIFEST_MEDIA_TYPES[0]);
}

async fn missing_children_are_normal(subject: &dyn Subject) {
    let here = Artifact::image("", &[b"missing: here"]);
    let other = Artifact::image("", &[b"missing: other platform"]);
    let mut index = Artifact::index("one.test/missing:1", vec![here, other.clone()]);
    index.blobs.retain(|blob| other.blobs.iter().all(|missing| missing.descriptor != blob.descriptor));
    // Of the image that is here, a layer is missing too: the runtime may discard unpacked layers.
    let layer = index.blobs.iter().position(|blob| &*blob.descriptor.media_type == LAYER);
    let layer = index.blobs.remove(layer.expect("an image has a layer"));
    subject.put(&index).await;
    wait_held(subject, &index).await;
    for blob in &index.blobs {
        assert_described(subject, &blob.descriptor, &["one.test/missing"]);
    }
    for missing in [&other.target.digest, &layer.descriptor.digest] {
        assert_eq!(subject.provider().describe(missing), None);
        assert!(matches!(subject.provider().open(missing, 0).await, Err(Error::NotFound(_))));
    }
}

async fn layers_are_shared(subject: &dyn Subject) {
    let shared: &[u8] = b"shared: base layer";
    let allowed = Artifact::image("one.test/allowed:1", &[shared, b"shared: allowed"]);
    let denied = Artifact::image("two.test/denied:1", &[shared, b"shared: denied"]);
    subject.put(&allowed).await;
    subject.put(&denied).await;
    wait_held(subject, &allowed).await;
    wait_held(subject, &denied).await;
    assert_described(subject, &allowed.blobs[0].descriptor, &["one.test/allowed", "two.test/denied"]);
    assert_described(subject, &allowed.blobs[1].descriptor, &["one.test/allowed"]);
    assert_described(subject, &denied.blobs[1].descriptor, &["two.test/denied"]);
}

async fn registries_may_have_ports(subject: &dyn Subject) {
    let artifact = Artifact::image("port.test:5000/team/app:1", &[b"port: layer"]);
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;
    assert_described(subject, &artifact.blobs[0].descriptor, &["port.test:5000/team/app"]);
    assert!(subject.provider().resolve(&reference("port.test:5000/team/app:1")).is_some());
    assert_eq!(subject.provider().resolve(&reference("port.test/team/app:1")), None);
}

async fn watches_without_a_gap(subject: &dyn Subject) {
    let before = Artifact::image("one.test/watch:before", &[b"watch: before"]);
    let after = Artifact::image("one.test/watch:after", &[b"watch: after"]);
    subject.put(&before).await;
    wait_held(subject, &before).await;
    let mut watch = subject.watcher().watch();
    let held: HashSet<_> = watch.held.drain(..).collect();
    for blob in &before.blobs {
        assert!(held.contains(&blob.descriptor.digest), "the snapshot has what is held");
    }
    subject.put(&after).await;
    let mut missing: HashSet<_> = after.blobs.iter().map(|blob| blob.descriptor.digest).collect();
    assert!(missing.is_disjoint(&held));
    let mut told = async |wanted: fn(Change) -> Option<Digest>, missing: &mut HashSet<Digest>| {
        while !missing.is_empty() {
            let change = tokio::time::timeout(LIMIT, watch.changes.recv()).await;
            let change = change.expect("a change in time").expect("a watch that does not lag");
            wanted(change).map(|digest| missing.remove(&digest));
        }
    };
    let added = |change| match change {
        Change::Added(digest) => Some(digest),
        Change::Removed(_) => None,
    };
    let removed = |change| match change {
        Change::Removed(digest) => Some(digest),
        Change::Added(_) => None,
    };
    told(added, &mut missing).await;
    subject.delete(&after).await;
    missing.extend(after.blobs.iter().map(|blob| blob.descriptor.digest));
    told(removed, &mut missing).await;
    assert_eq!(subject.provider().resolve(&reference("one.test/watch:after")), None);
}

async fn deletes_under_an_open_content(subject: &dyn Subject) {
    let layer: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 239) as u8).collect();
    let artifact = Artifact::image("one.test/deleted:1", &[&layer]);
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;
    let digest = artifact.blobs[0].descriptor.digest;
    let mut content = subject.provider().open(&digest, 0).await.expect("held content opens");
    let first = content.next(1).await.expect("readable").expect("not empty");
    subject.delete(&artifact).await;
    eventually("deleted content", || subject.provider().describe(&digest).is_none()).await;
    assert!(matches!(subject.provider().open(&digest, 0).await, Err(Error::NotFound(_))));
    if subject.reads_files() {
        let mut read = first.to_vec();
        while let Some(chunk) = content.next(u64::MAX).await.expect("an open file outlives its name") {
            read.extend_from_slice(&chunk);
        }
        assert!(read == layer);
    }
}

async fn labels_come_second(subject: &dyn Subject) {
    // Content that no tree reaches is put beside an image that has nothing to do with it.
    let mut artifact = Artifact::image("labels.test:5000/x:1", &[b"labels: layer"]);
    artifact.blobs[0] = artifact.blobs[0].clone().labelled("elsewhere.test", "not/asked");
    let stray = |text: &str| Stored::new("application/octet-stream", text.as_bytes().to_vec());
    let expected: [(Stored, &[&str]); 5] = [
        (stray("labels: port").labelled("labels.test", "team/app"), &["labels.test:5000/team/app"]),
        (stray("labels: two").labelled("two.test", "a/b,c"), &["two.test/a/b", "two.test/c"]),
        (
            stray("labels: hosts").labelled("two.test", "a").labelled("docker.io", "library/nginx"),
            &["docker.io/library/nginx", "two.test/a"],
        ),
        (stray("labels: malformed").labelled("two.test", "UPPER,,a b,good"), &["two.test/good"]),
        // containerd leaves a label out that would exceed 4,096 bytes.
        (stray("labels: oversized"), &[]),
    ];
    artifact.blobs.extend(expected.iter().map(|(blob, _)| blob.clone()));
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;
    assert_described(subject, &artifact.blobs[0].descriptor, &["labels.test:5000/x"]);
    for (blob, names) in &expected {
        eventually(&format!("{names:?}"), || repositories(subject, &blob.descriptor.digest) == *names).await;
    }
}

async fn names_without_a_registry(subject: &dyn Subject) {
    let artifact = Artifact::image("import-2026-01-01@sha256:00", &[b"import: layer"]);
    subject.put(&artifact).await;
    wait_held(subject, &artifact).await;
    for blob in &artifact.blobs {
        assert_described(subject, &blob.descriptor, &[]);
    }
    let config = artifact.blobs[1].descriptor.digest;
    let again = Artifact { name: config.to_string(), ..artifact.clone() };
    subject.put(&again).await;
    let named = Artifact { name: "one.test/import:1".into(), ..artifact.clone() };
    subject.put(&named).await;
    eventually("a name for an import", || {
        repositories(subject, &artifact.blobs[0].descriptor.digest) == ["one.test/import"]
    })
    .await;
}

/// Waits until all content of `artifact` is there and its name stands for it.
async fn wait_held(subject: &dyn Subject, artifact: &Artifact) {
    eventually(&format!("content of {}", artifact.name), || {
        let provider = subject.provider();
        artifact.blobs.iter().all(|blob| {
            let described = provider.describe(&blob.descriptor.digest);
            described.is_some_and(|described| described.descriptor == blob.descriptor)
        }) && Reference::parse_full(&artifact.name)
            .map_or(true, |name| provider.resolve(&name).as_ref() == Some(&artifact.target))
    })
    .await;
}

fn assert_described(subject: &dyn Subject, descriptor: &Descriptor, names: &[&str]) {
    let blob = subject.provider().describe(&descriptor.digest);
    assert_eq!(blob.map(|blob| blob.descriptor.clone()).as_ref(), Some(descriptor));
    assert_eq!(repositories(subject, &descriptor.digest), names, "{}", descriptor.digest);
}

fn repositories(subject: &dyn Subject, digest: &Digest) -> Vec<String> {
    let blob = subject.provider().describe(digest);
    blob.map(|blob| blob.repositories.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

async fn read(subject: &dyn Subject, digest: &Digest, offset: u64) -> Bytes {
    let mut content = subject.provider().open(digest, offset).await.expect("held content opens");
    let mut read = Vec::new();
    while let Some(chunk) = content.next(u64::MAX).await.expect("held content is readable") {
        read.extend_from_slice(&chunk);
    }
    read.into()
}

fn reference(text: &str) -> Reference {
    Reference::parse_full(text).expect("a full name")
}

fn name(text: &str) -> Name {
    text.parse().expect("a repository")
}
