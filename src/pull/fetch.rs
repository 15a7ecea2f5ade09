//! One name, manifest or blob from the hosts in turn: resumed, verified, started again where it was wrong.

use std::time::Duration;

use futures::FutureExt;
use http::Method;
use reqwest::Response;
use tokio::time::{Instant, timeout};

use super::destination::Folder;
use super::progress::{Event, Progress};
use super::sink::Sink;
use super::{Error, Failure, Fetched, Options, Part, millis};
use crate::oci::{
    Algorithm, Descriptor, Digest, MANIFEST_LIMIT, MANIFEST_MEDIA_TYPES, ManifestError, RangeHeader,
    Reference,
};
use crate::upstream::endpoint::{self, Endpoint, describe};

/// How often one host may resume one content; containerd gives up after the third time without progress.
const RESUMES: u32 = 5;

/// The hosts of one pull.
pub(super) struct Session<'a> {
    endpoints: Vec<Endpoint>,
    stall_limit: Duration,
    begin: Instant,
    progress: &'a dyn Progress,
}

/// What a name stands for.
pub(super) struct Resolved {
    pub(super) target: Descriptor,
    pub(super) host: String,
    pub(super) failures: Vec<Failure>,
}

/// Why one host did not give a content to its end.
enum Stopped {
    /// The next host may.
    Host(String),
    /// No host can help.
    Local(Error),
}

/// One fetch on its way.
struct Fetch<'a> {
    session: &'a Session<'a>,
    descriptor: &'a Descriptor,
    path: String,
    accept: String,
    sink: Sink,
    fetched: Fetched,
}

impl<'a> Session<'a> {
    pub(super) fn new(options: &Options, progress: &'a dyn Progress) -> Self {
        let name = &options.reference.name;
        let endpoint = |host| Endpoint::mirroring(host, name, options.header_limit);
        Self {
            endpoints: options.hosts.iter().map(endpoint).collect(),
            stall_limit: options.stall_limit,
            begin: Instant::now(),
            progress,
        }
    }

    /// Asks each host in turn what a name stands for.
    pub(super) async fn resolve(&self, reference: &Reference) -> Result<Resolved, Error> {
        let object = match (&reference.digest, &reference.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_string(),
            (None, None) => "latest".into(),
        };
        let able = |endpoint: &&Endpoint| {
            if reference.digest.is_some() { endpoint.pulls() } else { endpoint.resolves() }
        };
        let mut failures = Vec::new();
        for endpoint in self.endpoints.iter().filter(able) {
            match self.resolve_by(endpoint, &object, reference.digest.as_ref()).await {
                Ok(target) => return Ok(Resolved { target, host: endpoint.url().to_owned(), failures }),
                Err(reason) => failures.push(self.failure(None, endpoint, reason)),
            }
        }
        Err(Error::Unresolved { reference: reference.to_string(), failures })
    }

    async fn resolve_by(
        &self,
        endpoint: &Endpoint,
        object: &str,
        wanted: Option<&Digest>,
    ) -> Result<Descriptor, String> {
        let (path, accept) = (format!("manifests/{object}"), accept_manifests());
        let ask = |method| ask(endpoint, method, &path, &accept).boxed();
        let algorithm = wanted.map_or(Algorithm::Sha256, Digest::algorithm);
        let target = endpoint::target(ask, |reason| reason, algorithm, self.stall_limit).await?;
        if wanted.is_some_and(|wanted| *wanted != target.digest) {
            return Err(format!("answers with the other digest {}", target.digest));
        }
        Ok(target)
    }

    /// A manifest's content, from the folder if it is there, and in the folder afterwards.
    pub(super) async fn manifest(
        &self,
        descriptor: &Descriptor,
        folder: Option<&Folder>,
    ) -> Result<(Vec<u8>, Fetched), Error> {
        if descriptor.size > MANIFEST_LIMIT {
            let source = ManifestError::TooLarge(descriptor.size);
            return Err(Error::Manifest { digest: descriptor.digest, source });
        }
        if let Some(folder) = folder
            && folder.has(descriptor).await?
        {
            return Ok((folder.read(descriptor).await?, self.held(descriptor)));
        }
        let path = format!("manifests/{}", descriptor.digest);
        let (sink, mut fetched) = self.fetch(descriptor, path, accept_manifests(), Sink::memory()).await?;
        let content = sink.into_memory();
        if let Some(folder) = folder {
            folder.put(descriptor, content.clone()).await?;
        }
        fetched.millis = millis(self.begin);
        self.progress.event(&Event::Finished(&fetched));
        Ok((content, fetched))
    }

    /// A blob, into the folder or nowhere.
    pub(super) async fn blob(
        &self,
        descriptor: &Descriptor,
        folder: Option<&Folder>,
        verify: bool,
    ) -> Result<Fetched, Error> {
        let algorithm = descriptor.digest.algorithm();
        let sink = match folder {
            Some(folder) if folder.has(descriptor).await? => return Ok(self.held(descriptor)),
            Some(folder) => match folder.partial(descriptor).await? {
                Some(partial) => Sink::file(partial, algorithm),
                None => return Ok(self.held(descriptor)),
            },
            None if verify => Sink::hash(algorithm),
            None => Sink::count(),
        };
        let accept = format!("{}, */*", descriptor.media_type);
        let path = format!("blobs/{}", descriptor.digest);
        let (_, fetched) = self.fetch(descriptor, path, accept, sink).await?;
        self.progress.event(&Event::Finished(&fetched));
        Ok(fetched)
    }

    async fn fetch(
        &self,
        descriptor: &Descriptor,
        path: String,
        accept: String,
        sink: Sink,
    ) -> Result<(Sink, Fetched), Error> {
        let fetched = Fetched { kept: sink.position(), held: false, ..self.held_quietly(descriptor) };
        self.progress.event(&Event::Started { descriptor, kept: fetched.kept });
        let mut fetch = Fetch { session: self, descriptor, path, accept, sink, fetched };
        for endpoint in self.endpoints.iter().filter(|endpoint| endpoint.pulls()) {
            match fetch.take_from(endpoint).await {
                Ok(()) => {
                    fetch.fetched.millis = millis(self.begin);
                    return Ok((fetch.sink, fetch.fetched));
                }
                Err(Stopped::Local(error)) => return Err(error),
                Err(Stopped::Host(reason)) => {
                    let failure = self.failure(Some(&descriptor.digest), endpoint, reason);
                    fetch.fetched.failures.push(failure);
                }
            }
        }
        Err(Error::NotFetched { digest: descriptor.digest, failures: fetch.fetched.failures })
    }

    fn held(&self, descriptor: &Descriptor) -> Fetched {
        let fetched = self.held_quietly(descriptor);
        self.progress.event(&Event::Finished(&fetched));
        fetched
    }

    fn held_quietly(&self, descriptor: &Descriptor) -> Fetched {
        Fetched {
            digest: descriptor.digest,
            media_type: descriptor.media_type.to_string(),
            size: descriptor.size,
            held: true,
            kept: 0,
            parts: Vec::new(),
            resumed: 0,
            failures: Vec::new(),
            first_byte_millis: None,
            millis: millis(self.begin),
        }
    }

    fn failure(&self, digest: Option<&Digest>, endpoint: &Endpoint, reason: String) -> Failure {
        let failure = Failure { host: endpoint.url().to_owned(), reason };
        self.progress.event(&Event::HostFailed { digest, failure: &failure });
        failure
    }
}

impl Fetch<'_> {
    /// Takes what is left from one host.
    async fn take_from(&mut self, endpoint: &Endpoint) -> Result<(), Stopped> {
        let (size, digest) = (self.descriptor.size, self.descriptor.digest);
        // Bytes that are not this host's: if the whole is wrong, it may not be this host that lied.
        let mut foreign = self.sink.position();
        let mut resumes = 0;
        loop {
            if self.sink.position() < size
                && let Err(cut) = self.body(endpoint).await?
            {
                if resumes == RESUMES {
                    return Err(Stopped::Host(format!("{cut}, after {RESUMES} resumes")));
                }
                resumes += 1;
                self.fetched.resumed += 1;
                self.session.progress.event(&Event::Resumed { digest: &digest, reason: &cut });
                continue;
            }
            if self.sink.finish(digest).await.map_err(|error| self.local(error))? {
                return Ok(());
            }
            self.fetched.kept = 0;
            self.session.progress.event(&Event::Restarted { digest: &digest });
            if foreign == 0 {
                return Err(Stopped::Host("sends other content than its digest says".into()));
            }
            foreign = 0;
        }
    }

    /// One request and its body. `Ok(Err(reason))`: the body ended early.
    async fn body(&mut self, endpoint: &Endpoint) -> Result<Result<(), String>, Stopped> {
        let size = self.descriptor.size;
        let offset = self.sink.position();
        let range = (offset > 0).then_some(RangeHeader::From(offset));
        let answer = endpoint.send(Method::GET, &self.path, &self.accept, range).await;
        let mut response = answer.map_err(|error| Stopped::Host(error.to_string()))?;
        let (mut skip, _) = endpoint::begin(&response, offset, Some(size)).map_err(Stopped::Host)?;
        while self.sink.position() < size {
            let chunk = match timeout(self.session.stall_limit, response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => return Ok(Err("the body ends early".into())),
                Ok(Err(error)) => return Ok(Err(describe(error))),
                Err(_) => return Ok(Err("the body stalls".into())),
            };
            let mut chunk = chunk;
            if skip > 0 {
                let count = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
                drop(chunk.split_to(count));
                skip -= count as u64;
            }
            if chunk.is_empty() {
                continue;
            }
            if chunk.len() as u64 > size - self.sink.position() {
                return Err(Stopped::Host(format!("sends more than the content's {size} bytes")));
            }
            self.take(endpoint, chunk).await?;
        }
        Ok(Ok(()))
    }

    async fn take(&mut self, endpoint: &Endpoint, chunk: bytes::Bytes) -> Result<(), Stopped> {
        let count = chunk.len() as u64;
        if self.fetched.first_byte_millis.is_none() {
            self.fetched.first_byte_millis = Some(millis(self.session.begin));
        }
        match self.fetched.parts.last_mut() {
            Some(part) if part.host == endpoint.url() => part.bytes += count,
            _ => self.fetched.parts.push(Part { host: endpoint.url().to_owned(), bytes: count }),
        }
        self.session.progress.event(&Event::Advanced { digest: &self.descriptor.digest, bytes: count });
        self.sink.write(chunk).await.map_err(|error| self.local(error))
    }

    fn local(&self, source: std::io::Error) -> Stopped {
        let path = format!("ingest/{}", self.descriptor.digest).into();
        Stopped::Local(Error::Io { path, source })
    }
}

async fn ask(endpoint: &Endpoint, method: Method, path: &str, accept: &str) -> Result<Response, String> {
    endpoint.send(method, path, accept, None).await.map_err(|error| error.to_string())
}

fn accept_manifests() -> String {
    format!("{}, */*", MANIFEST_MEDIA_TYPES.join(", "))
}
