//! What a digest is and which repositories it belongs to.
//!
//! Trees first: from the target of each image record through indexes and manifests to configs and layers, and to
//! the referrers of each (signatures); all of it belongs to the record's repository. Labels second, for content that
//! no named tree reaches: containerd writes them late, leaves long ones out, drops the registry's port, and imports
//! have none. Media type and size come from parents and records, never from the bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::{Held, Image, Source};
use crate::oci::{Descriptor, Digest, Manifest, Name, OCTET_STREAM, Registry, is_manifest};
use crate::store::Blob;

/// Levels of a tree: index, manifest and layer make three; nested indexes and referrers of referrers some more.
const DEPTH: usize = 8;

/// Edges that are followed in one snapshot. A node with 5,000 images of 50 layers has 250,000; a hostile image of
/// indexes that name each other would have any number.
const EDGES: usize = 2_000_000;

/// All that image records, manifests and their descriptors say about digests, held or not.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// By size and media type: the repositories of the trees in which a descriptor says so. Ordered, so that many
    /// descriptors of one digest in a crafted manifest cost little.
    by_digest: HashMap<Digest, BTreeMap<(u64, Arc<str>), BTreeSet<Name>>>,
    /// Repositories of manifests by the manifest that they are about.
    referrers: HashMap<Digest, BTreeSet<Name>>,
    manifests: HashMap<Digest, Arc<Manifest>>,
    /// Registries of image records by their host without the port.
    hosts: HashMap<String, BTreeSet<Registry>>,
    /// Repositories of image records.
    names: HashSet<Name>,
}

impl Claims {
    pub(super) fn new(images: &[Image], manifests: HashMap<Digest, Arc<Manifest>>) -> Self {
        let mut claims = Self::default();
        let mut roots: HashMap<&Descriptor, BTreeSet<Name>> = HashMap::new();
        for image in images {
            let names = roots.entry(&image.target).or_default();
            if let Some(reference) = &image.name {
                let registry = &reference.name.registry;
                claims.hosts.entry(registry.host().to_owned()).or_default().insert(registry.clone());
                claims.names.insert(reference.name.clone());
                names.insert(reference.name.clone());
            }
        }
        let mut referrers: HashMap<Digest, Vec<Digest>> = HashMap::new();
        for (digest, manifest) in &manifests {
            if let Some(subject) = &manifest.subject {
                referrers.entry(subject.digest).or_default().push(*digest);
            }
        }
        let mut edges = EDGES;
        let mut reached = HashSet::new();
        for (target, names) in roots {
            claims.walk(target, &names, &manifests, &referrers, &mut edges, &mut reached);
        }
        // Manifests of pulls that still run: no record leads to them yet, but they say what their layers are.
        for (_, manifest) in manifests.iter().filter(|(digest, _)| !reached.contains(*digest)) {
            for child in &manifest.children {
                claims.add(child, &BTreeSet::new());
            }
        }
        if edges == 0 {
            tracing::warn!(
                limit = EDGES,
                "image trees are too large: the repositories of some content are unknown"
            );
        }
        claims.manifests = manifests;
        claims
    }

    /// What is known about content that is held, or why it cannot be what its descriptors say.
    pub(super) fn blob(&self, held: &Held) -> Result<Blob, String> {
        let claims = self.by_digest.get(&held.digest);
        let claims = || claims.into_iter().flatten();
        let own = self.manifests.get(&held.digest).and_then(|manifest| manifest.media_type.as_deref());
        let fitting = || claims().filter(|((size, _), _)| *size == held.size);
        // A descriptor of the wrong size counts for nothing, lest a crafted image takes the layers of others away.
        if let (Some(((size, _), _)), None) = (claims().next(), fitting().next()) {
            return Err(format!("it has {} bytes, its descriptor says {size}", held.size));
        }
        // Parents may differ (Docker's and OCI's names of one layer): prefer what a manifest says about itself, then
        // the first in order, so that the answer does not change from one snapshot to the next.
        let best = fitting()
            .map(|((_, media_type), _)| &**media_type)
            .min_by_key(|media_type| (Some(*media_type) != own, *media_type == OCTET_STREAM, *media_type));
        let media_type = best.or(own.filter(|own| is_manifest(own))).unwrap_or(OCTET_STREAM);
        let trees = fitting()
            .flat_map(|(_, names)| names)
            .chain(self.referrers.get(&held.digest).into_iter().flatten());
        let mut names: BTreeSet<Name> = trees.cloned().collect();
        if names.is_empty() {
            names = held.sources.iter().filter_map(|source| self.owner(source)).collect();
        }
        Ok(Blob {
            descriptor: Descriptor::new(held.digest, held.size, media_type),
            repositories: names.into_iter().collect(),
        })
    }

    /// Sizes that descriptors of `digest` name, held or not, in order; none where there are more than `limit`.
    pub(super) fn sizes(&self, digest: &Digest, limit: usize) -> Vec<u64> {
        let claims = self.by_digest.get(digest).into_iter().flatten();
        let sizes: BTreeSet<u64> = claims.map(|((size, _), _)| *size).collect();
        if sizes.len() > limit { Vec::new() } else { sizes.into_iter().collect() }
    }

    /// Manifests whose subject is `digest`, held or not.
    pub(super) fn about(&self, digest: &Digest) -> impl Iterator<Item = &Digest> {
        let about =
            |manifest: &Manifest| manifest.subject.as_ref().is_some_and(|subject| subject.digest == *digest);
        self.manifests.iter().filter(move |(_, manifest)| about(manifest)).map(|(referrer, _)| referrer)
    }

    /// The repository that a label means. Its key has lost the port, so the registry is the one of that host that an
    /// image record names. Where records name several registries of one host, only a record with the same repository
    /// can tell them apart; else the label says nothing, since a guess might serve what is denied.
    fn owner(&self, source: &Source) -> Option<Name> {
        let name =
            |registry: &Registry| Name { registry: registry.clone(), repository: source.repository.clone() };
        let registries = match self.hosts.get(source.host.as_str()) {
            Some(registries) if !registries.is_empty() => registries,
            _ => return Some(name(&source.host)),
        };
        let mut candidates = registries.iter();
        if let (Some(only), None) = (candidates.next(), candidates.next()) {
            return Some(name(only));
        }
        let mut known = registries.iter().map(name).filter(|name| self.names.contains(name));
        match (known.next(), known.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    }

    fn walk(
        &mut self,
        target: &Descriptor,
        names: &BTreeSet<Name>,
        manifests: &HashMap<Digest, Arc<Manifest>>,
        referrers: &HashMap<Digest, Vec<Digest>>,
        edges: &mut usize,
        reached: &mut HashSet<Digest>,
    ) {
        let mut expanded = HashSet::new();
        let mut queue = VecDeque::new();
        self.add(target, names);
        if is_manifest(&target.media_type) {
            queue.push_back((target.digest, 1));
        }
        while let Some((digest, depth)) = queue.pop_front() {
            if depth >= DEPTH || !expanded.insert(digest) {
                continue;
            }
            reached.insert(digest);
            for referrer in referrers.get(&digest).into_iter().flatten() {
                let Some(left) = edges.checked_sub(1) else { return };
                *edges = left;
                self.referrers.entry(*referrer).or_default().extend(names.iter().cloned());
                queue.push_back((*referrer, depth + 1));
            }
            let Some(manifest) = manifests.get(&digest) else { continue };
            for child in &manifest.children {
                let Some(left) = edges.checked_sub(1) else { return };
                *edges = left;
                self.add(child, names);
                if is_manifest(&child.media_type) {
                    queue.push_back((child.digest, depth + 1));
                }
            }
        }
    }

    fn add(&mut self, descriptor: &Descriptor, names: &BTreeSet<Name>) {
        let claims = self.by_digest.entry(descriptor.digest).or_default();
        let key = (descriptor.size, Arc::clone(&descriptor.media_type));
        claims.entry(key).or_default().extend(names.iter().cloned());
    }
}
