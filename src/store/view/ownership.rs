//! What a digest is and which repositories it belongs to.
//!
//! Trees first: from the target of each image record through indexes and manifests to configs and layers, and to
//! the referrers of each (signatures); all of it belongs to the record's repository. Labels second, for content that
//! no named tree reaches: containerd writes them late, leaves long ones out, drops the registry's port, and imports
//! have none. Media type and size come from parents and records; where there are none yet, a manifest's form tells.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::{Held, Image, Source};
use crate::oci::{Descriptor, Digest, Manifest, Name, OCTET_STREAM, Registry, is_manifest};
use crate::store::Blob;

/// Levels of a tree: index, manifest and layer make three; nested indexes and referrers of referrers some more.
const DEPTH: usize = 8;

/// Edges that are followed in one snapshot. A node with 5,000 images of 50 layers has 250,000; a hostile image of
/// indexes that name each other would have any number. An edge to a digest of its own costs some 150 to 300 bytes.
const EDGES: usize = 300_000;

/// All that image records, manifests and their descriptors say about digests, held or not.
#[derive(Debug, Default)]
pub(super) struct Claims {
    by_digest: HashMap<Digest, Parents>,
    /// Trees of manifests that are about another one.
    referrers: HashMap<Digest, Trees>,
    /// Repositories of each tree.
    trees: Vec<BTreeSet<Name>>,
    /// Edges that may still be followed.
    edges: usize,
    manifests: HashMap<Digest, Arc<Manifest>>,
    /// Registries of image records by their host without the port.
    hosts: HashMap<String, BTreeSet<Registry>>,
    /// Repositories of image records.
    names: HashSet<Name>,
}

/// The repository that a label means.
enum Owner {
    Known(Name),
    /// Its registry may have any port.
    Portless(Name),
}

/// What descriptors say that a digest is: size in bytes and media type.
type Claim = (u64, Arc<str>);

/// The trees in which something stands, as indices.
#[derive(Clone, Debug, Default, PartialEq)]
enum Trees {
    /// In manifests that no record leads to.
    #[default]
    None,
    One(u32),
    /// In ascending order.
    Many(Vec<u32>),
}

/// What the descriptors of one digest say. Nearly always they agree.
#[derive(Debug)]
enum Parents {
    One(Claim, Trees),
    /// Ordered, so that many descriptors of one digest in a crafted manifest cost little.
    Many(BTreeMap<Claim, Trees>),
}

impl Trees {
    /// Adds a tree; they are walked one after the other.
    fn add(&mut self, tree: Option<u32>) {
        match (&mut *self, tree) {
            (_, None) => {}
            (Self::None, Some(tree)) => *self = Self::One(tree),
            (Self::One(first), Some(tree)) if *first != tree => *self = Self::Many(vec![*first, tree]),
            (Self::Many(trees), Some(tree)) if trees.last() != Some(&tree) => trees.push(tree),
            (Self::One(_) | Self::Many(_), Some(_)) => {}
        }
    }

    fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(tree) => std::slice::from_ref(tree),
            Self::Many(trees) => trees,
        }
    }
}

impl Parents {
    fn add(&mut self, claim: Claim, tree: Option<u32>) {
        match self {
            Self::One(first, trees) if *first == claim => trees.add(tree),
            Self::One(first, trees) => {
                let mut claims = BTreeMap::from([(first.clone(), std::mem::take(trees))]);
                claims.entry(claim).or_default().add(tree);
                *self = Self::Many(claims);
            }
            Self::Many(claims) => claims.entry(claim).or_default().add(tree),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&Claim, &Trees)> {
        let (one, many) = match self {
            Self::One(claim, trees) => (Some((claim, trees)), None),
            Self::Many(claims) => (None, Some(claims)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

impl Claims {
    pub(super) fn new(images: &[Image], manifests: HashMap<Digest, Arc<Manifest>>) -> Self {
        let mut claims = Self { edges: EDGES, ..Self::default() };
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
        // Small images first, and in the same order each time: a crafted one costs itself its repositories.
        let mut roots: Vec<_> = roots.into_iter().collect();
        let children = |digest: &Digest| manifests.get(digest).map_or(0, |manifest| manifest.children.len());
        roots.sort_by_cached_key(|(target, _)| {
            let claim = (target.size, Arc::clone(&target.media_type));
            (children(&target.digest), target.digest.to_string(), claim)
        });
        let mut reached = HashSet::new();
        for (target, names) in roots {
            claims.walk(target, names, &manifests, &referrers, &mut reached);
        }
        // Manifests of pulls that still run: no record leads to them yet, but they say what their layers are.
        let mut unreached: Vec<_> =
            manifests.iter().filter(|(digest, _)| !reached.contains(*digest)).collect();
        unreached.sort_by_cached_key(|(digest, manifest)| (manifest.children.len(), digest.to_string()));
        for child in unreached.into_iter().flat_map(|(_, manifest)| &manifest.children) {
            if !claims.follow() {
                break;
            }
            claims.add(child, None);
        }
        if claims.edges == 0 {
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
        let claims = || self.by_digest.get(&held.digest).into_iter().flat_map(Parents::iter);
        let manifest = self.manifests.get(&held.digest);
        let own = manifest.and_then(|manifest| manifest.media_type.as_deref());
        // Any JSON object reads as a manifest without children, a config for one.
        let has_form =
            manifest.is_some_and(|manifest| !manifest.children.is_empty() || manifest.subject.is_some());
        let fitting = || claims().filter(|((size, _), _)| *size == held.size);
        // A descriptor of the wrong size counts for nothing, lest a crafted image takes the layers of others away.
        if let (Some(((size, _), _)), None) = (claims().next(), fitting().next()) {
            return Err(format!("it has {} bytes, its descriptor says {size}", held.size));
        }
        // Parents may differ (Docker's and OCI's names of one layer): prefer what a manifest says about itself, then for
        // what has a manifest's form the type of one, lest a crafted index makes it something else for all, then the
        // first in order, so that the answer does not change from one snapshot to the next.
        let best = fitting().map(|((_, media_type), _)| &**media_type).min_by_key(|media_type| {
            (
                Some(*media_type) != own,
                has_form && !is_manifest(media_type),
                *media_type == OCTET_STREAM,
                *media_type,
            )
        });
        // Nobody may have said yet what it is: it is there before its image record.
        let media_type = best.or(manifest.and_then(|manifest| manifest.form())).unwrap_or(OCTET_STREAM);
        let trees = fitting().map(|(_, trees)| trees).chain(self.referrers.get(&held.digest));
        let mut names: BTreeSet<Name> = self.names_of(trees);
        let mut portless = BTreeSet::new();
        if names.is_empty() {
            for owner in held.sources.iter().filter_map(|source| self.owner(source)) {
                if let Owner::Portless(name) = &owner {
                    portless.insert(name.clone());
                }
                let (Owner::Known(name) | Owner::Portless(name)) = owner;
                names.insert(name);
            }
        }
        Ok(Blob {
            descriptor: Descriptor::new(held.digest, held.size, media_type),
            repositories: names.into_iter().collect(),
            portless: portless.into_iter().collect(),
        })
    }

    /// Sizes that descriptors of `digest` name, held or not, in order; `None` where there are more than `limit`.
    pub(super) fn sizes(&self, digest: &Digest, limit: usize) -> Option<Vec<u64>> {
        let claims = self.by_digest.get(digest).into_iter().flat_map(Parents::iter);
        let sizes: BTreeSet<u64> = claims.map(|((size, _), _)| *size).collect();
        (sizes.len() <= limit).then(|| sizes.into_iter().collect())
    }

    /// Manifests whose subject is `digest`, held or not.
    pub(super) fn about(&self, digest: &Digest) -> impl Iterator<Item = &Digest> {
        let about =
            |manifest: &Manifest| manifest.subject.as_ref().is_some_and(|subject| subject.digest == *digest);
        self.manifests.iter().filter(move |(_, manifest)| about(manifest)).map(|(referrer, _)| referrer)
    }

    /// The repository that a label means. Its key has lost the port, so the registry is the one of that host that an
    /// image record names. Where records name several registries of one host, only a record with the same repository
    /// can tell them apart; else the label says nothing, since a guess might serve what is denied. Of a host that no record
    /// names, the port stays unknown.
    fn owner(&self, source: &Source) -> Option<Owner> {
        let name =
            |registry: &Registry| Name { registry: registry.clone(), repository: source.repository.clone() };
        let registries = match self.hosts.get(source.host.as_str()) {
            Some(registries) if !registries.is_empty() => registries,
            _ => return Some(Owner::Portless(name(&source.host))),
        };
        let mut candidates = registries.iter();
        if let (Some(only), None) = (candidates.next(), candidates.next()) {
            return Some(Owner::Known(name(only)));
        }
        let mut known = registries.iter().map(name).filter(|name| self.names.contains(name));
        match (known.next(), known.next()) {
            (Some(only), None) => Some(Owner::Known(only)),
            _ => None,
        }
    }

    /// Repositories of these trees.
    fn names_of<'a>(&self, trees: impl Iterator<Item = &'a Trees>) -> BTreeSet<Name> {
        let trees: BTreeSet<u32> = trees.flat_map(Trees::as_slice).copied().collect();
        trees.into_iter().filter_map(|tree| self.trees.get(tree as usize)).flatten().cloned().collect()
    }

    fn walk(
        &mut self,
        target: &Descriptor,
        names: BTreeSet<Name>,
        manifests: &HashMap<Digest, Arc<Manifest>>,
        referrers: &HashMap<Digest, Vec<Digest>>,
        reached: &mut HashSet<Digest>,
    ) {
        let tree = u32::try_from(self.trees.len()).ok();
        self.trees.push(names);
        let mut expanded = HashSet::new();
        let mut queue = VecDeque::new();
        self.add(target, tree);
        if is_manifest(&target.media_type) {
            queue.push_back((target.digest, 1));
        }
        while let Some((digest, depth)) = queue.pop_front() {
            if depth >= DEPTH || !expanded.insert(digest) {
                continue;
            }
            reached.insert(digest);
            for referrer in referrers.get(&digest).into_iter().flatten() {
                if !self.follow() {
                    return;
                }
                self.referrers.entry(*referrer).or_default().add(tree);
                queue.push_back((*referrer, depth + 1));
            }
            let Some(manifest) = manifests.get(&digest) else { continue };
            for child in &manifest.children {
                if !self.follow() {
                    return;
                }
                self.add(child, tree);
                if is_manifest(&child.media_type) {
                    queue.push_back((child.digest, depth + 1));
                }
            }
        }
    }

    /// Whether one more edge may be followed.
    fn follow(&mut self) -> bool {
        let may = self.edges > 0;
        self.edges = self.edges.saturating_sub(1);
        may
    }

    fn add(&mut self, descriptor: &Descriptor, tree: Option<u32>) {
        let claim = (descriptor.size, Arc::clone(&descriptor.media_type));
        match self.by_digest.entry(descriptor.digest) {
            Entry::Occupied(mut parents) => parents.get_mut().add(claim, tree),
            Entry::Vacant(vacant) => {
                vacant.insert(Parents::One(claim, tree.map_or(Trees::None, Trees::One)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inserts measured by `size_of`, times the two slots that a table of the worst load has for each.
    #[test]
    fn a_claim_is_small() {
        let entry = size_of::<(Digest, Parents)>();
        assert!(entry <= 128, "{entry} bytes");
        assert!(EDGES * 2 * (entry + 1) < 80 << 20);
    }

    #[test]
    fn crafted_indexes_end_at_the_limit_and_cost_only_themselves() {
        let mut manifests = HashMap::new();
        let mut images = Vec::new();
        let mut put = |name: &str, count: usize, seed: &str, is_named: bool| {
            let child = |number: usize| {
                let digest = Digest::sha256(format!("{seed} {number}").as_bytes());
                Descriptor::new(digest, 1, "x/y")
            };
            let children = (0..count).map(child).collect();
            let digest = Digest::sha256(seed.as_bytes());
            manifests.insert(digest, Arc::new(Manifest { children, ..Manifest::default() }));
            if is_named {
                let target = Descriptor::new(digest, 1, crate::oci::MANIFEST_MEDIA_TYPES[0]);
                images.push(Image { name: crate::oci::Reference::parse_full(name).ok(), target });
            }
        };
        for number in 0..20 {
            put("evil.io/x:1", 10_000, &format!("named {number}"), true);
            put("", 10_000, &format!("unnamed {number}"), false);
        }
        put("a.io/app:1", 50, "good", true);
        let claims = Claims::new(&images, manifests);
        assert!(claims.by_digest.len() <= EDGES + images.len(), "{}", claims.by_digest.len());
        assert_eq!(claims.edges, 0);
        for number in 0..50 {
            let digest = Digest::sha256(format!("good {number}").as_bytes());
            let blob = claims.blob(&Held { digest, size: 1, sources: Vec::new() }).unwrap();
            assert_eq!(blob.repositories, ["a.io/app".parse().unwrap()]);
        }
    }
}
