//! Layouts that appear, grow, break and come back.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::oci::Reference;
use crate::store::conformance::{Subject, conformance, eventually};
use crate::store::memory::Artifact;

const FAST: Duration = Duration::from_millis(5);

struct Layout {
    store: LayoutStore,
    folder: tempfile::TempDir,
}

impl Layout {
    /// An empty layout and its store.
    fn start() -> Self {
        Self::start_polling(FAST)
    }

    fn start_polling(poll: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        write_index(folder.path(), &[]);
        for algorithm in ["sha256", "sha512"] {
            fs::create_dir_all(folder.path().join("blobs").join(algorithm)).unwrap();
        }
        let store = LayoutStore::start_polling(spec(folder.path()), poll);
        Self { store, folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    fn write_blobs(&self, artifact: &Artifact) {
        for blob in &artifact.blobs {
            let path = self.blob(&blob.descriptor.digest);
            let temporary = self.path().join("temporary");
            fs::write(&temporary, &blob.bytes).unwrap();
            fs::rename(temporary, path).unwrap();
        }
    }

    fn put_now(&self, artifact: &Artifact) {
        self.write_blobs(artifact);
        let mut entries = read_index(self.path());
        entries.retain(|entry| entry["annotations"]["io.containerd.image.name"] != *artifact.name);
        entries.push(entry(artifact, &json!({ "io.containerd.image.name": artifact.name })));
        write_index(self.path(), &entries);
    }

    async fn wait_described(&self, digest: &Digest, repositories: &[&str]) {
        eventually(&format!("{digest} in {repositories:?}"), || {
            let blob = self.store.describe(digest);
            let names =
                blob.map(|blob| blob.repositories.iter().map(ToString::to_string).collect::<Vec<_>>());
            names.as_deref() == Some(&repositories.iter().map(ToString::to_string).collect::<Vec<_>>()[..])
        })
        .await;
    }

    async fn wait_health(&self, expected: Result<(), &str>) {
        wait_health(&self.store, expected).await;
    }
}

#[async_trait]
impl Subject for Layout {
    fn provider(&self) -> &dyn Provider {
        &self.store
    }

    fn watcher(&self) -> &dyn Watcher {
        &self.store
    }

    async fn put(&self, artifact: &Artifact) {
        self.put_now(artifact);
    }

    async fn delete(&self, artifact: &Artifact) {
        let mut entries = read_index(self.path());
        entries.retain(|entry| entry["annotations"]["io.containerd.image.name"] != *artifact.name);
        write_index(self.path(), &entries);
        for blob in &artifact.blobs {
            fs::remove_file(self.blob(&blob.descriptor.digest)).unwrap();
        }
    }

    fn is_containerd_like(&self) -> bool {
        false
    }
}

/// An archive that is written anew at each change.
struct Tar {
    store: LayoutStore,
    folder: tempfile::TempDir,
    artifacts: Mutex<BTreeMap<String, Artifact>>,
}

impl Tar {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layout.tar");
        write_archive(&path, &[], |_| {});
        Self { store: LayoutStore::start_polling(spec(&path), FAST), folder, artifacts: Mutex::default() }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Artifact>)) {
        let mut artifacts = self.artifacts.lock().unwrap();
        change(&mut artifacts);
        let artifacts: Vec<_> = artifacts.values().cloned().collect();
        write_archive(&self.folder.path().join("layout.tar"), &artifacts, |_| {});
    }
}

#[async_trait]
impl Subject for Tar {
    fn provider(&self) -> &dyn Provider {
        &self.store
    }

    fn watcher(&self) -> &dyn Watcher {
        &self.store
    }

    async fn put(&self, artifact: &Artifact) {
        self.change(|artifacts| drop(artifacts.insert(artifact.name.clone(), artifact.clone())));
    }

    async fn delete(&self, artifact: &Artifact) {
        self.change(|artifacts| drop(artifacts.remove(&artifact.name)));
    }

    fn is_containerd_like(&self) -> bool {
        false
    }
}

fn spec(path: &Path) -> Spec {
    Spec { path: path.to_owned(), name: None }
}

fn entry(artifact: &Artifact, annotations: &Value) -> Value {
    json!({
        "mediaType": &*artifact.target.media_type,
        "digest": artifact.target.digest,
        "size": artifact.target.size,
        "annotations": annotations,
    })
}

fn index_text(entries: &[Value]) -> String {
    json!({ "schemaVersion": 2, "manifests": entries }).to_string()
}

fn write_index(path: &Path, entries: &[Value]) {
    fs::write(path.join("index.json.new"), index_text(entries)).unwrap();
    fs::rename(path.join("index.json.new"), path.join("index.json")).unwrap();
}

fn read_index(path: &Path) -> Vec<Value> {
    let index: Value = serde_json::from_slice(&fs::read(path.join("index.json")).unwrap()).unwrap();
    index["manifests"].as_array().unwrap().clone()
}

/// Waits for the health: `Err` is a part of the cause.
async fn wait_health(store: &LayoutStore, expected: Result<(), &str>) {
    let health = store.health();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let now = health.borrow().clone();
        match (&now, expected) {
            (Health::Ready, Ok(())) => return,
            (Health::Degraded(cause), Err(part)) if cause.contains(part) => return,
            _ => assert!(tokio::time::Instant::now() < deadline, "{now:?} instead of {expected:?}"),
        }
        tokio::time::sleep(FAST).await;
    }
}

async fn read_all(store: &LayoutStore, digest: &Digest, offset: u64) -> Vec<u8> {
    let mut content = store.open(digest, offset).await.unwrap();
    let mut read = Vec::new();
    while let Some(chunk) = content.next(u64::MAX).await.unwrap() {
        read.extend_from_slice(&chunk);
    }
    read
}

#[tokio::test]
async fn conforms() {
    conformance(&Layout::start()).await;
}

#[tokio::test]
async fn archives_conform() {
    conformance(&Tar::start()).await;
}

#[test]
fn an_archive_is_indexed_once_for_each_version() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layout.tar");
    let mut scanner = Scanner::new(spec(&path));
    for _ in 0..2 {
        write_archive(&path, &[Artifact::image("a.test/x:1", &[b"a layer"])], |_| {});
        assert!(matches!(scanner.scan().archive, Some(Some(_))));
        assert!(scanner.scan().archive.is_none());
    }
}

#[test]
fn a_copy_that_has_its_size_before_its_bytes_is_not_shown() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    // Its store is not asked here.
    let layout = runtime.block_on(async { Layout::start() });
    let mut artifact = Artifact::image("a.test/x:1", &[b"written to after its size is set"]);
    let layer = artifact.blobs[0].clone();
    artifact.blobs.remove(0);
    layout.put_now(&artifact);
    let path = layout.blob(&layer.descriptor.digest);
    let mut file = fs::File::create(&path).unwrap();
    file.set_len(layer.descriptor.size).unwrap();
    let shows = |scanner: &mut Scanner| {
        let snapshot = scanner.scan().snapshot;
        snapshot.is_some_and(|shown| shown.held.iter().any(|held| held.digest == layer.descriptor.digest))
    };
    let mut scanner = Scanner::new(spec(layout.path()));
    assert!(!shows(&mut scanner));
    for (number, part) in (1..).zip(layer.bytes.chunks(8)) {
        file.write_all(part).unwrap();
        // The file's own clock may stand still between two writes.
        file.set_modified(std::time::SystemTime::now() + Duration::from_millis(number)).unwrap();
        assert!(!shows(&mut scanner));
    }
    assert!(shows(&mut scanner), "unchanged since the last look");
    // What was written long ago is shown at the first look.
    assert!(!shows(&mut Scanner::new(spec(layout.path()))));
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(10)).unwrap();
    assert!(shows(&mut Scanner::new(spec(layout.path()))));
}

#[tokio::test]
async fn content_that_is_back_before_the_next_look_is_shown_again() {
    let layout = Layout::start_polling(Duration::from_millis(300));
    let artifact = Artifact::image("a.test/x:1", &[b"a layer"]);
    layout.put_now(&artifact);
    let layer = artifact.blobs[0].descriptor.digest;
    layout.wait_described(&layer, &["a.test/x"]).await;
    let away = layout.path().join("away");
    fs::rename(layout.blob(&layer), &away).unwrap();
    assert!(matches!(layout.store.open(&layer, 0).await, Err(Error::NotFound(_))));
    assert_eq!(layout.store.describe(&layer), None);
    fs::rename(&away, layout.blob(&layer)).unwrap();
    layout.wait_described(&layer, &["a.test/x"]).await;
}

/// The only thread that may block is with a disk that does not answer.
#[test]
fn a_layout_that_hangs_is_told() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(1).build().unwrap();
    let (release, hang) = std::sync::mpsc::channel::<()>();
    runtime.block_on(async {
        let hung = tokio::task::spawn_blocking(move || hang.recv());
        let layout = Layout::start();
        layout.wait_health(Err("takes more than 5s")).await;
        let mut health = layout.store.health();
        release.send(()).unwrap();
        health.wait_for(|health| *health == Health::Ready).await.unwrap();
        hung.await.unwrap().unwrap();
    });
}

#[test]
fn specifications() {
    let check = |text: &str, path: &str, name: Option<&str>| {
        let name = name.map(|name| name.parse().unwrap());
        assert_eq!(text.parse(), Ok(Spec { path: path.into(), name }), "{text}");
    };
    check("layout:/a b/c", "/a b/c", None);
    check("layout:x.tar,name=registry.test:5000/team/app", "x.tar", Some("registry.test:5000/team/app"));
    let refuse = |text: &str, expected: &str| {
        let error = text.parse::<Spec>().unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    };
    refuse("containerd", "layout:PATH");
    refuse("layout:", "needs the path");
    refuse("layout:,name=a.io/b", "needs the path");
    refuse("layout:/a,b/c", "a path must not have a comma");
    refuse("layout:/a,name=team/app", "must begin with a registry");
    refuse("layout:/a,name=a.io/b:tag", "not a repository");
    refuse("layout:/a,name=a.io/b,name=a.io/c", "twice");
    refuse("layout:/a.tar.gz", "compressed");
}

#[test]
fn names_of_images() {
    let digest = Digest::sha256(b"x");
    let check = |annotations: Value, name: Option<&str>, expected: Option<&str>| {
        let entry = json!({ "digest": digest, "size": 1, "mediaType": "a/b", "annotations": annotations });
        let name = name.map(|name| name.parse().unwrap());
        let (images, cause) = index::parse(index_text(&[entry]).as_bytes(), name.as_ref()).unwrap();
        assert_eq!((images.len(), cause), (1, None));
        assert_eq!(images[0].name.as_ref().map(ToString::to_string).as_deref(), expected);
    };
    let (containerd, tag) = ("io.containerd.image.name", "org.opencontainers.image.ref.name");
    let given = Some("given.test/app");
    check(json!({ containerd: "a.test/x:1", tag: "b.test/y:2" }), given, Some("a.test/x:1"));
    check(json!({ containerd: "import-1@sha256:0", tag: "b.test/y:2" }), given, Some("b.test/y:2"));
    check(json!({ tag: "v1" }), given, Some("given.test/app:v1"));
    check(json!({ tag: "v1" }), None, None);
    let by_digest = format!("given.test/app@{digest}");
    check(json!({}), given, Some(&by_digest));
    check(Value::Null, given, Some(&by_digest));
    check(Value::Null, None, None);
}

#[test]
fn one_bad_image_does_not_take_the_others() {
    let good = json!({ "digest": Digest::sha256(b"x"), "size": 1 });
    let text = index_text(&[json!({ "digest": "md5:00", "size": 1 }), good.clone(), json!(1)]);
    let (images, cause) = index::parse(text.as_bytes(), None).unwrap();
    assert_eq!(images.len(), 1);
    assert!(cause.unwrap().contains("image 0 is left out"));
    assert!(index::parse(b"{", None).is_err());
    assert!(
        index::parse(index_text(&vec![good; 10_001]).as_bytes(), None).unwrap_err().contains("more than")
    );
    let large = vec![b' '; usize::try_from(index::INDEX_LIMIT).unwrap() + 1];
    assert_eq!(index::parse(&large, None).unwrap_err(), "index.json is larger than 4 MiB");
}

#[tokio::test]
async fn absent_broken_and_back() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("layout");
    let store = LayoutStore::start_polling(spec(&path), FAST);
    wait_health(&store, Err("there is no layout at")).await;
    fs::create_dir(&path).unwrap();
    wait_health(&store, Err("index.json is missing")).await;
    write_index(&path, &[]);
    wait_health(&store, Err("oci-layout is missing")).await;
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    wait_health(&store, Err("version 2.0.0")).await;
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.1.0"}"#).unwrap();
    wait_health(&store, Ok(())).await;
    drop(store);

    let layout = Layout::start();
    let artifact = Artifact::image("a.test/x:1", &[b"a layer"]);
    layout.put_now(&artifact);
    let layer = artifact.blobs[0].descriptor.digest;
    layout.wait_described(&layer, &["a.test/x"]).await;
    let good = fs::read(layout.path().join("index.json")).unwrap();
    fs::write(layout.path().join("index.json"), &good[..good.len() / 2]).unwrap();
    layout.wait_health(Err("index.json: EOF")).await;
    layout.wait_described(&layer, &["a.test/x"]).await;
    fs::write(layout.path().join("index.json"), &good).unwrap();
    layout.wait_health(Ok(())).await;

    let away = layout.path().with_extension("away");
    fs::rename(layout.path(), &away).unwrap();
    layout.wait_health(Err("there is no layout at")).await;
    assert_eq!(layout.store.describe(&layer), None, "what is gone is not shown");
    assert!(matches!(layout.store.open(&layer, 0).await, Err(Error::NotFound(_))));
    fs::rename(&away, layout.path()).unwrap();
    layout.wait_described(&layer, &["a.test/x"]).await;
    layout.wait_health(Ok(())).await;
}

#[tokio::test]
async fn only_complete_blobs_are_shown() {
    let layout = Layout::start();
    let artifact = Artifact::image("a.test/x:1", &[b"a layer that comes slowly"]);
    let (layer, bytes) = (artifact.blobs[0].descriptor.digest, artifact.blobs[0].bytes.clone());
    layout.put_now(&artifact);
    layout.wait_described(&layer, &["a.test/x"]).await;
    fs::remove_file(layout.blob(&layer)).unwrap();
    eventually("gone", || layout.store.describe(&layer).is_none()).await;

    // Copied in place, as other tools do.
    let mut file = fs::File::create(layout.blob(&layer)).unwrap();
    let stray = Digest::sha256(b"no tree has it");
    for (i, part) in bytes.chunks(5).enumerate() {
        // A blob beside it tells when the layout has been looked at since.
        let seen = Digest::sha256(&i.to_le_bytes());
        fs::write(layout.blob(&seen), i.to_le_bytes()).unwrap();
        layout.wait_described(&seen, &[]).await;
        let outcome = layout.store.open(&layer, 0).await;
        assert!(matches!(outcome, Err(Error::NotFound(_))), "unfinished is not damaged: {outcome:?}");
        file.write_all(part).unwrap();
    }
    layout.wait_described(&layer, &["a.test/x"]).await;
    fs::write(layout.blob(&stray), b"no tree has it").unwrap();
    layout.wait_described(&stray, &[]).await;
    assert_eq!(read_all(&layout.store, &layer, 2).await, bytes[2..]);

    // Shorter than it was described, and not looked at since.
    file.set_len(3).unwrap();
    let outcome = layout.store.open(&layer, 0).await;
    assert!(matches!(outcome, Err(Error::Corrupt { .. } | Error::NotFound(_))), "{outcome:?}");
}

#[tokio::test]
async fn damaged_manifests_own_nothing() {
    let layout = Layout::start();
    let artifact = Artifact::image("a.test/x:1", &[b"a layer"]);
    layout.put_now(&artifact);
    let (layer, manifest) = (artifact.blobs[0].descriptor.digest, artifact.target.digest);
    layout.wait_described(&layer, &["a.test/x"]).await;
    let path = layout.blob(&manifest);
    let mut bytes = fs::read(&path).unwrap();
    bytes[0] = b' ';
    fs::write(&path, bytes).unwrap();
    layout.wait_health(Err("is damaged")).await;
    assert_eq!(layout.store.describe(&manifest), None);
    layout.wait_described(&layer, &[]).await;
}

#[tokio::test]
async fn links_are_not_followed() {
    let layout = Layout::start();
    let secret = tempfile::tempdir().unwrap();
    let content: &[u8] = b"a file of the node";
    fs::write(secret.path().join("secret"), content).unwrap();
    let artifact = Artifact::image("a.test/x:1", &[content]);
    let layer = artifact.blobs[0].descriptor.digest;
    symlink(secret.path().join("secret"), layout.blob(&layer)).unwrap();
    let mut without = artifact.clone();
    without.blobs.remove(0);
    layout.put_now(&without);
    layout.wait_described(&artifact.target.digest, &["a.test/x"]).await;
    assert_eq!(layout.store.describe(&layer), None);
    let error = folder::open_blob(layout.path(), &layer).unwrap_err();
    assert!(error.contains("symbolic link"), "{error}");

    fs::create_dir(secret.path().join("sha256")).unwrap();
    fs::write(secret.path().join("sha256").join(layer.hex()), content).unwrap();
    fs::rename(layout.path().join("blobs"), layout.path().join("old")).unwrap();
    symlink(secret.path(), layout.path().join("blobs")).unwrap();
    layout.wait_health(Err("blobs is not a folder, or a symbolic link")).await;
    assert!(folder::open_blob(layout.path(), &layer).is_err());
}

#[tokio::test]
async fn archives_are_read_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layout.tar");
    let store = LayoutStore::start_polling(spec(&path), FAST);
    wait_health(&store, Err("there is no layout at")).await;

    let layer: Vec<u8> = (0..700_000_u32).map(|i| (i % 251) as u8).collect();
    let artifact = Artifact::image("a.test/x:1", &[&layer, b"small"]);
    write_archive(&path, std::slice::from_ref(&artifact), |_| {});
    wait_health(&store, Ok(())).await;
    let name = Reference::parse_full("a.test/x:1").unwrap();
    assert_eq!(store.resolve(&name), Some(artifact.target.clone()));
    let digest = artifact.blobs[0].descriptor.digest;
    assert_eq!(read_all(&store, &digest, 0).await, layer);
    assert_eq!(read_all(&store, &digest, 699_999).await, layer[699_999..]);
    assert!(matches!(store.open(&digest, 700_001).await, Err(Error::Offset { .. })));

    let refuse = async |change: fn(&mut tar::Builder<fs::File>), expected: &str| {
        write_archive(&path, std::slice::from_ref(&artifact), change);
        wait_health(&store, Err(expected)).await;
        assert!(store.describe(&digest).is_some(), "the last good view stays");
    };
    refuse(
        |archive| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            let name = format!("blobs/sha256/{}", Digest::sha256(b"y").hex());
            archive.append_link(&mut header, name, "index.json").unwrap();
        },
        "is a hard link",
    )
    .await;
    refuse(
        |archive| {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            archive.append_data(&mut header, "x".repeat(200_000), &b"x"[..]).unwrap();
        },
        "headers are larger",
    )
    .await;
    refuse(
        |archive| {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            archive.append_data(&mut header, "x/".repeat(1000), &b"x"[..]).unwrap();
        },
        "name is longer",
    )
    .await;
    fs::write(&path, [0x1f, 0x8b, 8, 0, 0, 0, 0]).unwrap();
    wait_health(&store, Err("compressed")).await;
    write_archive(&path, std::slice::from_ref(&artifact), |_| {});
    wait_health(&store, Ok(())).await;
    let length = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    wait_health(&store, Err("layout.tar: ")).await;
}

fn write_archive(path: &Path, artifacts: &[Artifact], change: impl FnOnce(&mut tar::Builder<fs::File>)) {
    let temporary = path.with_extension("new");
    let mut archive = tar::Builder::new(fs::File::create(&temporary).unwrap());
    let mut append = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).unwrap();
    };
    append("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    let entry = |artifact: &Artifact| entry(artifact, &json!({ "io.containerd.image.name": artifact.name }));
    append("./index.json", index_text(&artifacts.iter().map(entry).collect::<Vec<_>>()).as_bytes());
    for blob in artifacts.iter().flat_map(|artifact| &artifact.blobs) {
        let digest = blob.descriptor.digest;
        append(&format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex()), &blob.bytes);
    }
    change(&mut archive);
    archive.into_inner().unwrap();
    fs::rename(temporary, path).unwrap();
}

/// Dropping the store ends its task, and with it the last holder of the view.
#[tokio::test]
async fn dropping_ends_the_watch() {
    let layout = Layout::start();
    layout.wait_health(Ok(())).await;
    let shared = Arc::downgrade(&layout.store.shared);
    drop(layout);
    eventually("the end of the task", || shared.upgrade().is_none()).await;
}
