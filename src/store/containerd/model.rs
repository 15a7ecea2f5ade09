//! What containerd said it holds, namespace by namespace, and the manifests that were read: from this a snapshot is
//! made. Asks nobody and reads no files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::oci::{Descriptor, Digest, MANIFEST_LIMIT, Manifest, Reference, is_manifest};
use crate::store::{Held, Image, Snapshot, Source};

/// Manifests that are kept. A node with 5,000 images has some 15,000.
const MANIFESTS: usize = 100_000;

/// Children that all kept manifests may have together, as many as the view follows: some 100 MiB of descriptors at most,
/// which only a hostile set of images reaches.
const CHILDREN: usize = 300_000;

/// All configured namespaces, and what was read of their manifests.
#[derive(Debug, Default)]
pub(super) struct Model {
    namespaces: BTreeMap<String, Namespace>,
    /// `None`: it cannot be parsed, and is not read again.
    manifests: HashMap<Digest, Option<Arc<Manifest>>>,
    children: usize,
    unpublished: Unpublished,
}

/// What the view does not know yet. It outlives a call that failed and a connection that ended: a listing that equals
/// the model says nothing about the view.
#[derive(Debug, Default, PartialEq)]
pub(super) enum Unpublished {
    #[default]
    Nothing,
    /// Content came, went or changed; its repositories follow from trees that the view knows.
    Contents(HashSet<Digest>),
    /// Image records or manifests changed.
    Everything,
}

/// One namespace.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Namespace {
    /// Targets of image records by name.
    pub(super) images: BTreeMap<String, Descriptor>,
    /// Complete content.
    pub(super) content: HashMap<Digest, Entry>,
}

/// Some complete content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Size in bytes.
    pub(super) size: u64,
    /// Where labels say that it came from, in order.
    pub(super) sources: Vec<Source>,
    /// containerd knows children of it: it is a manifest or an index.
    pub(super) has_children: bool,
}

impl Model {
    /// Makes a namespace equal to what was listed.
    pub(super) fn list(&mut self, name: &str, listed: Namespace) {
        if self.namespaces.get(name) != Some(&listed) {
            self.unpublished = Unpublished::Everything;
            self.namespaces.insert(name.to_owned(), listed);
        }
    }

    /// Sets the target of an image record, or takes the record away.
    pub(super) fn set_image(&mut self, namespace: &str, name: &str, target: Option<Descriptor>) {
        let images = &mut self.namespaces.entry(namespace.to_owned()).or_default().images;
        let changed = match target {
            Some(target) => images.insert(name.to_owned(), target.clone()) != Some(target),
            None => images.remove(name).is_some(),
        };
        if changed {
            self.unpublished = Unpublished::Everything;
        }
    }

    /// Sets what is known about content, or takes it away; returns what was known.
    pub(super) fn set_content(
        &mut self,
        namespace: &str,
        digest: Digest,
        entry: Option<Entry>,
    ) -> Option<Entry> {
        let content = &mut self.namespaces.entry(namespace.to_owned()).or_default().content;
        let changed = content.get(&digest) != entry.as_ref();
        let old = match entry {
            Some(entry) => content.insert(digest, entry),
            None => content.remove(&digest),
        };
        if changed {
            self.doubt(digest);
        }
        old
    }

    /// The view may be wrong about this content.
    pub(super) fn doubt(&mut self, digest: Digest) {
        match &mut self.unpublished {
            Unpublished::Nothing => self.unpublished = Unpublished::Contents(HashSet::from([digest])),
            Unpublished::Contents(contents) => {
                contents.insert(digest);
            }
            Unpublished::Everything => {}
        }
    }

    /// What the view does not know yet.
    pub(super) fn unpublished(&self) -> &Unpublished {
        &self.unpublished
    }

    /// The view equals the model now.
    pub(super) fn published(&mut self) {
        self.unpublished = Unpublished::Nothing;
    }

    /// What is known about content, by any namespace.
    pub(super) fn held(&self, digest: &Digest) -> Option<Held> {
        let mut entries = self.namespaces.values().filter_map(|namespace| namespace.content.get(digest));
        let first = entries.next()?;
        let mut sources = first.sources.clone();
        sources.extend(entries.flat_map(|entry| entry.sources.iter().cloned()));
        Some(Held { digest: *digest, size: first.size, sources })
    }

    /// Manifests that are held but not read yet: those that image records and read manifests lead to, and those that
    /// containerd marked (of pulls that still run, and signatures that nothing leads to).
    pub(super) fn unread(&self) -> Vec<(Digest, u64)> {
        let mut wanted = HashSet::new();
        for namespace in self.namespaces.values() {
            let targets = namespace.images.values();
            wanted
                .extend(targets.filter(|target| is_manifest(&target.media_type)).map(|target| target.digest));
            let marked = namespace.content.iter().filter(|(_, entry)| entry.has_children);
            wanted.extend(marked.map(|(digest, _)| *digest));
        }
        for manifest in self.manifests.values().flatten() {
            let children = manifest.children.iter().filter(|child| is_manifest(&child.media_type));
            wanted.extend(children.map(|child| child.digest));
        }
        wanted.retain(|digest| !self.manifests.contains_key(digest));
        let size = |digest: &Digest| {
            self.namespaces
                .values()
                .find_map(|namespace| namespace.content.get(digest))
                .map(|entry| entry.size)
        };
        let held = wanted.into_iter().filter_map(|digest| Some((digest, size(&digest)?)));
        held.filter(|(_, size)| *size <= MANIFEST_LIMIT).collect()
    }

    /// Keeps a manifest that was read. `None`: its bytes are none, or not those of the digest.
    pub(super) fn learn(&mut self, digest: Digest, manifest: Option<Manifest>) {
        let children = manifest.as_ref().map_or(0, |manifest| manifest.children.len());
        let fits = self.manifests.len() < MANIFESTS && self.children + children <= CHILDREN;
        if !fits {
            tracing::debug!(%digest, "too many manifests are held: this one is not followed");
        }
        self.children += if fits { children } else { 0 };
        self.manifests.insert(digest, manifest.filter(|_| fits).map(Arc::new));
        self.unpublished = Unpublished::Everything;
    }

    /// Digests of the tree of `target` that are not held by `namespace`, as far as it is read.
    pub(super) fn missing(&self, namespace: &str, target: &Digest) -> Vec<Digest> {
        let Some(namespace) = self.namespaces.get(namespace) else { return Vec::new() };
        let mut seen = HashSet::from([*target]);
        let mut queue = vec![*target];
        let mut missing = Vec::new();
        while let Some(digest) = queue.pop() {
            if !namespace.content.contains_key(&digest) {
                missing.push(digest);
            }
            let children =
                self.manifests.get(&digest).into_iter().flatten().flat_map(|manifest| &manifest.children);
            queue.extend(children.map(|child| child.digest).filter(|child| seen.insert(*child)));
        }
        missing
    }

    /// Forgets manifests that are no longer held.
    pub(super) fn forget(&mut self) {
        let namespaces = &self.namespaces;
        self.manifests
            .retain(|digest, _| namespaces.values().any(|space| space.content.contains_key(digest)));
        self.children = self.manifests.values().flatten().map(|manifest| manifest.children.len()).sum();
    }

    /// What the view is made from.
    pub(super) fn snapshot(&self) -> Snapshot {
        let images = self
            .namespaces
            .values()
            .flat_map(|namespace| &namespace.images)
            .map(|(name, target)| Image { name: Reference::parse_full(name).ok(), target: target.clone() });
        let digests: HashSet<_> =
            self.namespaces.values().flat_map(|namespace| namespace.content.keys()).collect();
        let manifests =
            self.manifests.iter().filter_map(|(digest, manifest)| Some((*digest, manifest.clone()?)));
        Snapshot {
            images: images.collect(),
            held: digests.into_iter().filter_map(|digest| self.held(digest)).collect(),
            manifests: manifests.collect(),
        }
    }
}
