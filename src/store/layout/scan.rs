//! One look at a layout: what has changed, what is complete, which trees there are.
//!
//! While nothing changes, a look costs a few `stat`s. After a change the blobs are listed at the next looks too, as a
//! change within the same tick of a file's clock does not show; and once in a while anyway.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::super::view::{Held, Image, Snapshot};
use super::Spec;
use super::archive::Archive;
use super::folder::{self, Mark, Root, Unusable};
use super::index::{self, INDEX_LIMIT};
use crate::oci::{Algorithm, Digest, MANIFEST_LIMIT, Manifest, is_manifest};

/// Looks after a change at which all is listed again: 2 s at the usual rate, the coarsest clock of a file system (FAT).
const SETTLE: u32 = 4;

/// All is listed at least this often.
const RECONCILE: Duration = Duration::from_secs(10);

/// A file that was last written to so long ago is not being written to: the coarsest clock of a file system (FAT).
const SETTLED: Duration = Duration::from_secs(2);

/// A file with another size than its descriptor says is taken for unfinished until it has not changed for so long.
const ABANDONED: Duration = Duration::from_secs(10);

/// Manifests in one layout.
const MANIFESTS_LIMIT: usize = 10_000;

/// Levels of indexes and manifests.
const DEPTH_LIMIT: usize = 8;

/// Descriptors in all manifests together, so that memory stays bounded.
const DESCRIPTORS_LIMIT: usize = 1_000_000;

/// `oci-layout` has 30 bytes.
const MARKER_LIMIT: u64 = 4096;

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The new view, if it differs from the last one.
    pub(super) snapshot: Option<Snapshot>,
    /// The archive, where it is another one than before; `Some(None)`: none any more.
    pub(super) archive: Option<Option<Arc<Archive>>>,
    /// What is wrong.
    pub(super) cause: Option<String>,
}

/// Looks at one layout again and again.
#[derive(Debug)]
pub(super) struct Scanner {
    spec: Spec,
    index: Index,
    marks: [Option<Mark>; 2],
    blobs: HashMap<Digest, Seen>,
    manifests: HashMap<Digest, (Mark, Loaded)>,
    settle: u32,
    unfinished: bool,
    listed: Option<Instant>,
    cause: Option<String>,
    shown: Shown,
    /// The view may differ from what it was told.
    doubted: bool,
    archive: Option<Arc<Archive>>,
}

/// `index.json` as last read, and the images of its last good version.
#[derive(Debug, Default)]
struct Index {
    mark: Option<Mark>,
    images: Vec<Image>,
    cause: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    mark: Mark,
    /// Looks at which it was the same as before.
    same: u32,
    since: Instant,
}

/// What became of a manifest; known for as long as its file does not change.
#[derive(Clone, Debug)]
enum Loaded {
    Read(Arc<Manifest>),
    /// It is what its digest says, but no manifest.
    Opaque,
    /// It is not what its digest says.
    Damaged,
}

/// What the view was last told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shown {
    images: Vec<Image>,
    held: HashMap<Digest, u64>,
    manifests: HashSet<Digest>,
}

/// The trees below the images.
#[derive(Default)]
struct Trees {
    manifests: HashMap<Digest, Arc<Manifest>>,
    /// Sizes by the descriptors of what is there.
    sizes: HashSet<(Digest, u64)>,
    reached: HashSet<Digest>,
    damaged: HashSet<Digest>,
    cause: Option<String>,
}

impl Scanner {
    pub(super) fn new(spec: Spec) -> Self {
        Self {
            spec,
            index: Index::default(),
            marks: [None; 2],
            blobs: HashMap::new(),
            manifests: HashMap::new(),
            settle: 0,
            unfinished: false,
            listed: None,
            cause: None,
            shown: Shown::default(),
            doubted: false,
            archive: None,
        }
    }

    /// The view was changed by another: the next look that succeeds tells it everything again.
    pub(super) fn doubt(&mut self) {
        self.doubted = true;
        self.listed = None;
    }

    /// Looks. Blocks.
    pub(super) fn scan(&mut self) -> Found {
        let outcome = match Archive::mark(&self.spec.path) {
            Some(mark) => self.scan_archive(mark),
            None => self.scan_folder(),
        };
        match outcome {
            Ok(found) => found,
            Err(Unusable::Unreadable(cause)) => {
                // Whatever could not be read is looked at again as a whole.
                self.listed = None;
                Found { cause: Some(cause), ..Found::default() }
            }
            Err(Unusable::Gone(cause)) => {
                let was_archive = self.archive.is_some();
                *self = Self {
                    shown: std::mem::take(&mut self.shown),
                    doubted: self.doubted,
                    ..Self::new(self.spec.clone())
                };
                Found {
                    snapshot: self.show(Trees::default(), HashMap::new()),
                    archive: was_archive.then_some(None),
                    cause: Some(cause),
                }
            }
        }
    }

    fn scan_folder(&mut self) -> Result<Found, Unusable> {
        let root = Root::open(&self.spec.path)?;
        let dropped = self.archive.take().map(|_| None);
        let index_changed = self.look_at_index(&root)?;
        let algorithms = [Algorithm::Sha256, Algorithm::Sha512];
        let mut folders = [None, None];
        let mut marks = [None, None];
        for (i, algorithm) in algorithms.into_iter().enumerate() {
            if let Some((folder, mark)) = root.blobs(algorithm).map_err(|reason| self.unreadable(&reason))? {
                (folders[i], marks[i]) = (Some(folder), Some(mark));
            }
        }
        if index_changed || marks != self.marks {
            self.settle = SETTLE;
        } else if self.settle == 0
            && !self.unfinished
            && self.listed.is_some_and(|listed| listed.elapsed() < RECONCILE)
        {
            return Ok(Found { archive: dropped, cause: self.cause.clone(), ..Found::default() });
        } else {
            self.settle = self.settle.saturating_sub(1);
        }

        let mut blobs = HashMap::new();
        for (folder, algorithm) in folders.iter().zip(algorithms) {
            if let Some(folder) = folder {
                folder::list(folder, algorithm, &mut blobs).map_err(|reason| self.unreadable(&reason))?;
            }
        }
        let read = |digest: &Digest| match root.blob(digest)? {
            Some(file) => folder::read(file, MANIFEST_LIMIT).map_err(|error| format!("{digest}: {error}")),
            None => Err(format!("{digest} has gone")),
        };
        let trees = self.trees(&blobs, read);
        let held = self.complete(&trees, blobs);
        (self.marks, self.listed) = (marks, Some(Instant::now()));
        self.cause =
            self.index.cause.clone().or_else(|| trees.cause.clone()).map(|cause| self.prefix(&cause));
        Ok(Found { snapshot: self.show(trees, held), archive: dropped, cause: self.cause.clone() })
    }

    fn scan_archive(&mut self, mark: Mark) -> Result<Found, Unusable> {
        if self.index.mark == Some(mark) {
            return Ok(Found { cause: self.cause.clone(), ..Found::default() });
        }
        // Until the file changes again this outcome stands, good or bad.
        self.index.mark = Some(mark);
        let read = Archive::index(&self.spec.path)
            .and_then(|archive| Ok((index::parse(&archive.index_json, self.spec.name.as_ref())?, archive)));
        let ((images, cause), archive) = match read {
            Ok(read) => read,
            Err(reason) => {
                let cause = self.prefix(&reason);
                self.cause = Some(cause.clone());
                return Ok(Found { cause: Some(cause), ..Found::default() });
            }
        };
        let archive = Arc::new(archive);
        self.index.images = images;
        self.manifests.clear();
        let blobs = archive.blobs();
        let trees = self.trees(&blobs, |digest| archive.read(digest, MANIFEST_LIMIT));
        let held = blobs.into_iter().filter(|(digest, _)| !trees.damaged.contains(digest));
        let held = held.map(|(digest, mark)| (digest, mark.size)).collect();
        self.archive = Some(Arc::clone(&archive));
        self.cause = cause.or_else(|| trees.cause.clone()).map(|cause| self.prefix(&cause));
        let snapshot = self.show(trees, held);
        Ok(Found { snapshot, archive: Some(Some(archive)), cause: self.cause.clone() })
    }

    /// Reads `index.json` if it has changed. What cannot be read leaves the last good images and a cause.
    fn look_at_index(&mut self, root: &Root) -> Result<bool, Unusable> {
        let opened = root.file("index.json").map_err(|reason| self.unreadable(&reason))?;
        let Some((file, mark)) = opened else {
            let changed = self.index.mark.take().is_some() || self.index.cause.is_none();
            self.index.cause = Some("index.json is missing".into());
            return Ok(changed);
        };
        if self.index.mark == Some(mark) {
            return Ok(false);
        }
        let read = check_marker(root).and_then(|()| {
            let text = folder::read(file, INDEX_LIMIT).map_err(|error| format!("index.json: {error}"))?;
            index::parse(&text, self.spec.name.as_ref())
        });
        match read {
            Ok((images, cause)) => {
                self.index = Index { mark: Some(mark), images, cause };
            }
            // Not marked as read: a marker that is written later makes it good.
            Err(cause) => {
                self.index.mark = None;
                self.index.cause = Some(cause);
            }
        }
        Ok(true)
    }

    /// Follows the images' trees as far as their manifests are here.
    fn trees(
        &mut self,
        blobs: &HashMap<Digest, Mark>,
        read: impl Fn(&Digest) -> Result<Vec<u8>, String>,
    ) -> Trees {
        let mut trees = Trees::default();
        let mut known = std::mem::take(&mut self.manifests);
        let mut queue = VecDeque::new();
        for image in &self.index.images {
            trees.sizes.insert((image.target.digest, image.target.size));
            trees.reached.insert(image.target.digest);
            queue.push_back((image.target.clone(), 0));
        }
        let mut visited = HashSet::new();
        let mut descriptors = 0;
        while let Some((descriptor, depth)) = queue.pop_front() {
            let digest = descriptor.digest;
            let Some(mark) = blobs.get(&digest).filter(|mark| mark.size == descriptor.size) else { continue };
            if !is_manifest(&descriptor.media_type) || mark.size > MANIFEST_LIMIT || !visited.insert(digest) {
                continue;
            }
            let limit = if depth > DEPTH_LIMIT {
                Some(format!("the tree above {digest} has more than {DEPTH_LIMIT} levels"))
            } else if self.manifests.len() == MANIFESTS_LIMIT {
                Some(format!("it has more than {MANIFESTS_LIMIT} manifests"))
            } else if descriptors > DESCRIPTORS_LIMIT {
                Some(format!("its manifests have more than {DESCRIPTORS_LIMIT} descriptors"))
            } else {
                None
            };
            if let Some(limit) = limit {
                trees.cause.get_or_insert(limit);
                continue;
            }
            let loaded = match known.remove(&digest) {
                Some((read, loaded)) if read == *mark => loaded,
                _ => match read(&digest) {
                    Ok(content) => Loaded::new(&digest, &content),
                    Err(reason) => {
                        trees.cause.get_or_insert(reason);
                        continue;
                    }
                },
            };
            self.manifests.insert(digest, (*mark, loaded.clone()));
            match loaded {
                Loaded::Read(manifest) => {
                    let children = manifest.children.iter().chain(&manifest.subject);
                    for child in children.filter(|child| blobs.contains_key(&child.digest)) {
                        trees.sizes.insert((child.digest, child.size));
                        trees.reached.insert(child.digest);
                        queue.push_back((child.clone(), depth + 1));
                    }
                    descriptors += manifest.children.len();
                    trees.manifests.insert(digest, manifest);
                }
                Loaded::Opaque => {}
                Loaded::Damaged => {
                    trees.damaged.insert(digest);
                    trees.cause.get_or_insert(format!(
                        "the manifest {digest} is damaged: its bytes have another digest"
                    ));
                }
            }
        }
        trees
    }

    /// What of a folder's blobs is complete.
    fn complete(&mut self, trees: &Trees, blobs: HashMap<Digest, Mark>) -> HashMap<Digest, u64> {
        let now = Instant::now();
        let old = SystemTime::now().checked_sub(SETTLED).unwrap_or(SystemTime::UNIX_EPOCH);
        let before = std::mem::take(&mut self.blobs);
        self.unfinished = false;
        let mut held = HashMap::new();
        for (digest, mark) in blobs {
            let seen = match before.get(&digest) {
                Some(seen) if seen.mark == mark => Seen { same: seen.same.saturating_add(1), ..*seen },
                _ => Seen { mark, same: 0, since: now },
            };
            self.blobs.insert(digest, seen);
            let complete = if trees.damaged.contains(&digest) {
                false
            } else if trees.sizes.contains(&(digest, mark.size)) {
                // A copy that got its whole size before its bytes is written to until it is done.
                let written = seen.same > 0 || mark.was_modified_before(old);
                self.unfinished |= !written;
                written
            } else if trees.reached.contains(&digest) {
                // Given up for finished, it is shown to the view, which knows it for damaged and says so.
                let abandoned = now.duration_since(seen.since) > ABANDONED;
                self.unfinished |= !abandoned;
                abandoned
            } else {
                self.unfinished |= seen.same == 0;
                seen.same > 0
            };
            if complete {
                held.insert(digest, mark.size);
            }
        }
        held
    }

    /// The snapshot, if it says something else than the last one.
    fn show(&mut self, trees: Trees, held: HashMap<Digest, u64>) -> Option<Snapshot> {
        let shown = Shown {
            images: self.index.images.clone(),
            manifests: trees.manifests.keys().copied().collect(),
            held,
        };
        let doubted = std::mem::take(&mut self.doubted);
        if shown == self.shown && !doubted {
            return None;
        }
        let held = shown.held.iter().map(|(digest, size)| Held {
            digest: *digest,
            size: *size,
            sources: Vec::new(),
        });
        let snapshot =
            Snapshot { images: shown.images.clone(), held: held.collect(), manifests: trees.manifests };
        self.shown = shown;
        Some(snapshot)
    }

    fn prefix(&self, reason: &str) -> String {
        format!("{}: {reason}", self.spec.path.display())
    }

    fn unreadable(&self, reason: &str) -> Unusable {
        Unusable::Unreadable(self.prefix(reason))
    }
}

impl Loaded {
    fn new(digest: &Digest, content: &[u8]) -> Self {
        if Digest::of(digest.algorithm(), content) != *digest {
            return Self::Damaged;
        }
        Manifest::parse_known(content).map_or(Self::Opaque, |(manifest, _)| Self::Read(Arc::new(manifest)))
    }
}

fn check_marker(root: &Root) -> Result<(), String> {
    let Some((file, _)) = root.file("oci-layout")? else {
        return Err("not an OCI image layout: oci-layout is missing".into());
    };
    marker(folder::read(file, MARKER_LIMIT))
}

/// Checks the content of `oci-layout`.
pub(super) fn marker(content: io::Result<Vec<u8>>) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Wire {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let content = content.map_err(|error| format!("oci-layout: {error}"))?;
    let wire: Wire = serde_json::from_slice(&content).map_err(|error| format!("oci-layout: {error}"))?;
    if wire.version.starts_with("1.") {
        Ok(())
    } else {
        Err(format!("version {:.20} of image layouts is not known, 1 is", wire.version))
    }
}
