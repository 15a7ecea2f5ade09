//! Registries that answer or not, as a test says.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use tokio::time::Instant;

use super::{FetchError, Fetched, Known, Route, State, Upstream, Upstreams, Want};
use crate::oci::{ByteRange, Descriptor, Digest, Health, Name, Registry, Repository, Tag};

/// Answers from a table; registries that are not in it do not answer.
#[derive(Debug, Default)]
pub struct Memory {
    answers: Mutex<HashMap<Registry, bool>>,
    tags: Mutex<HashMap<(Name, Tag), Result<Descriptor, FetchError>>>,
    resolved: AtomicU32,
}

impl Memory {
    /// From now on `registry` answers, or does not.
    pub fn set(&self, registry: &Registry, answers: bool) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(registry.clone(), answers);
    }

    /// From now on a tag stands for this at its registry, or is not told.
    pub fn tag(&self, name: &Name, tag: &Tag, answer: Result<Descriptor, FetchError>) {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner).insert((name.clone(), tag.clone()), answer);
    }

    /// How often a registry was asked what a tag stands for.
    pub fn resolved(&self) -> u32 {
        self.resolved.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl Upstream for Memory {
    async fn answers(&self, registry: &Registry) -> bool {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(registry).copied().unwrap_or(false)
    }

    async fn is_open(&self, _: &Registry) -> bool {
        true
    }

    async fn resolve(&self, name: &Name, tag: &Tag) -> Result<Descriptor, FetchError> {
        self.resolved.fetch_add(1, Ordering::Relaxed);
        // As a registry takes its time.
        tokio::task::yield_now().await;
        let tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        tags.get(&(name.clone(), tag.clone())).cloned().unwrap_or(Err(FetchError::NotFound))
    }
}

/// What an upstream in memory does wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Every request comes to this.
    pub error: Option<FetchError>,
    /// Bodies end after so many bytes, so many times.
    pub cut: Option<(u64, u32)>,
    /// The first byte of each body is another one.
    pub lies: bool,
}

/// Upstreams in memory; clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryUpstreams(Arc<Mutex<BTreeMap<String, Held>>>);

#[derive(Debug, Default)]
struct Held {
    repositories: Arc<[String]>,
    contents: HashMap<(Repository, Digest), (String, Bytes)>,
    tags: HashMap<(Repository, Tag), Digest>,
    fault: Fault,
    asked: Vec<Want>,
    /// Changed by blame alone.
    state: State,
}

impl MemoryUpstreams {
    /// Adds an upstream for repositories below these prefixes.
    pub fn add(&self, name: &str, repositories: &[&str]) {
        let repositories = repositories.iter().map(|prefix| (*prefix).to_owned()).collect();
        self.lock().insert(name.to_owned(), Held { repositories, ..Held::default() });
    }

    /// Lets an upstream hold a content.
    pub fn put(
        &self,
        name: &str,
        repository: &Repository,
        media_type: &str,
        content: &[u8],
        tag: Option<&Tag>,
    ) {
        let digest = Digest::sha256(content);
        if let Some(held) = self.lock().get_mut(name) {
            let content = (media_type.to_owned(), Bytes::copy_from_slice(content));
            held.contents.insert((repository.clone(), digest), content);
            if let Some(tag) = tag {
                held.tags.insert((repository.clone(), tag.clone()), digest);
            }
        }
    }

    /// From now on an upstream does this wrong.
    pub fn set(&self, name: &str, fault: Fault) {
        if let Some(held) = self.lock().get_mut(name) {
            held.fault = fault;
        }
    }

    /// What was asked of an upstream.
    pub fn asked(&self, name: &str) -> Vec<Want> {
        self.lock().get(name).map(|held| held.asked.clone()).unwrap_or_default()
    }

    /// What an upstream is blamed for.
    pub fn blamed(&self, name: &str) -> Option<String> {
        self.lock().get(name)?.state.problem.clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Upstreams for MemoryUpstreams {
    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn known(&self) -> Arc<[Known]> {
        let known = |(name, held): (&String, &Held)| Known {
            name: name.as_str().into(),
            repositories: Arc::clone(&held.repositories),
            state: held.state.clone(),
        };
        self.lock().iter().map(known).collect()
    }

    async fn resolve(&self, route: &Route, tag: &Tag) -> Result<Descriptor, FetchError> {
        let held = self.lock();
        let held = held.get(&*route.upstream).ok_or(FetchError::Unknown)?;
        held.check(&route.repository)?;
        let digest = held.tags.get(&(route.repository.clone(), tag.clone())).ok_or(FetchError::NotFound)?;
        let (media_type, content) =
            held.contents.get(&(route.repository.clone(), *digest)).ok_or(FetchError::NotFound)?;
        Ok(Descriptor::new(*digest, content.len() as u64, media_type))
    }

    async fn fetch(&self, route: &Route, want: &Want) -> Result<Fetched, FetchError> {
        let mut held = self.lock();
        let held = held.get_mut(&*route.upstream).ok_or(FetchError::Unknown)?;
        held.check(&route.repository)?;
        held.asked.push(*want);
        let (media_type, content) =
            held.contents.get(&(route.repository.clone(), want.digest)).ok_or(FetchError::NotFound)?;
        let size = content.len() as u64;
        let descriptor = Descriptor::new(want.digest, size, media_type);
        if want.head {
            let range = ByteRange::whole(size);
            return Ok(Fetched { descriptor, range, body: futures::stream::empty().boxed() });
        }
        if want.start > size || (want.start == size && size > 0) {
            return Err(FetchError::Range);
        }
        let range = ByteRange { start: want.start, end: want.end.unwrap_or(size).min(size) };
        let mut bytes = content[range.start as usize..range.end as usize].to_vec();
        if held.fault.lies
            && let Some(first) = bytes.first_mut()
        {
            *first ^= 1;
        }
        let mut chunks: Vec<io::Result<Bytes>> = Vec::new();
        let mut is_cut = false;
        if let Some((after, times @ 1..)) = held.fault.cut
            && (after as usize) < bytes.len()
        {
            bytes.truncate(after as usize);
            held.fault.cut = Some((after, times - 1));
            is_cut = true;
        }
        chunks.extend(bytes.chunks(16 << 10).map(|chunk| Ok(Bytes::copy_from_slice(chunk))));
        chunks.extend(is_cut.then(|| Err(io::Error::other("cut"))));
        Ok(Fetched { descriptor, range, body: futures::stream::iter(chunks).boxed() })
    }

    fn blame(&self, upstream: &str, problem: &str) {
        if let Some(held) = self.lock().get_mut(upstream) {
            held.state.failed(Health::Degraded, problem.to_owned(), Instant::now());
        }
    }
}

impl Held {
    fn check(&self, repository: &Repository) -> Result<(), FetchError> {
        if !self.repositories.iter().any(|prefix| repository.is_below(prefix)) {
            return Err(FetchError::Unknown);
        }
        if self.state.is_held(Instant::now()) {
            return Err(FetchError::Held);
        }
        self.fault.error.clone().map_or(Ok(()), Err)
    }
}
