//! A containerd in memory for tests: the calls that the store makes, each of which can be made to fail.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use containerd_client::events::ContentDelete;
use containerd_client::services::v1::{
    AbortRequest, GetImageRequest, GetImageResponse, Image, ImageCreate, Info, InfoRequest, InfoResponse,
    ListContentResponse, ListImagesResponse, ListStatusesResponse, PluginsResponse, ReadContentRequest,
    ReadContentResponse, Status, StatusRequest, StatusResponse, VersionResponse, WriteContentRequest,
    WriteContentResponse,
};
use containerd_client::types::{Descriptor as WireDescriptor, Envelope};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tonic::body::Body;
use tonic::server::NamedService;

use crate::oci::{Descriptor, Digest};
use crate::store::memory::Stored;

/// Namespace of all that it holds.
const NAMESPACE: &str = "k8s.io";

/// Its state, which outlives its server. Cheap to clone.
#[derive(Clone)]
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<Vec<u8>>,
}

struct State {
    version: &'static str,
    images: BTreeMap<String, Descriptor>,
    content: BTreeMap<String, Stored>,
    ingests: BTreeMap<String, Ingest>,
    /// When the next ingest begins: no clock of this machine says so.
    begins: SystemTime,
    calls: HashMap<String, usize>,
    /// Calls of a method that succeed, and then that fail.
    failing: HashMap<&'static str, (usize, usize)>,
}

struct Ingest {
    data: Vec<u8>,
    total: usize,
    started: SystemTime,
    /// Somebody writes or commits.
    is_locked: bool,
}

/// The only writer of an ingest.
struct Lock(Fake, String);

impl Drop for Lock {
    fn drop(&mut self) {
        self.0.lock_ingest(&self.1, false);
    }
}

impl Fake {
    pub(super) fn new(version: &'static str) -> Self {
        let state = State {
            version,
            images: BTreeMap::new(),
            content: BTreeMap::new(),
            ingests: BTreeMap::new(),
            begins: SystemTime::now() + Duration::from_secs(3600),
            calls: HashMap::new(),
            failing: HashMap::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), events: broadcast::Sender::new(16) }
    }

    /// Serves at `folder/s` until the handle is dropped.
    pub(super) fn serve(&self, folder: &Path) -> AbortOnDropHandle<()> {
        let listener = UnixListener::bind(socket(folder)).unwrap();
        let incoming = futures::stream::unfold(listener, |listener| async {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        });
        let server = tonic::transport::Server::builder().add_service(self.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            server.serve_with_incoming(incoming).await.unwrap();
        }))
    }

    /// Lets `good` calls of this method succeed, and then `bad` ones fail.
    pub(super) fn fail_after(&self, method: &'static str, good: usize, bad: usize) {
        self.state().failing.insert(method, (good, bad));
    }

    /// How many calls of this method are still to fail.
    pub(super) fn failing(&self, method: &str) -> usize {
        self.state().failing.get(method).map_or(0, |(_, bad)| *bad)
    }

    pub(super) fn put(&self, blob: &Stored) {
        self.state().content.insert(blob.descriptor.digest.to_string(), blob.clone());
    }

    pub(super) fn take(&self, digest: &Digest) {
        self.state().content.remove(&digest.to_string());
    }

    /// Sets an image record and tells of it.
    pub(super) fn name(&self, name: &str, target: &Descriptor) {
        self.state().images.insert(name.to_owned(), target.clone());
        self.tell("/images/create", &ImageCreate { name: name.to_owned(), ..ImageCreate::default() });
    }

    /// Tells that content came or went, whether it did or not.
    pub(super) fn tell_of(&self, topic: &str, digest: &Digest) {
        // The two events have their digest in the same field.
        self.tell(topic, &ContentDelete { digest: digest.to_string() });
    }

    fn tell(&self, topic: &str, event: &impl Message) {
        let event = prost_types::Any { type_url: String::new(), value: event.encode_to_vec() };
        let envelope = Envelope {
            timestamp: None,
            namespace: NAMESPACE.into(),
            topic: topic.into(),
            event: Some(event),
        };
        let _ = self.events.send(message(&envelope));
    }

    /// Clients that follow events now.
    pub(super) fn followers(&self) -> usize {
        self.events.receiver_count()
    }

    /// Begins an ingest in place of the one that may be there.
    pub(super) fn begin_ingest(&self, reference: &str) {
        self.write_ingest(reference, b"", 0);
    }

    /// An ingest that began just now and has these bytes of `total`.
    pub(super) fn write_ingest(&self, reference: &str, data: &[u8], total: usize) {
        let mut state = self.state();
        state.begins += Duration::from_secs(1);
        let ingest = Ingest { data: data.to_vec(), total, started: state.begins, is_locked: false };
        state.ingests.insert(reference.to_owned(), ingest);
    }

    /// Whether somebody writes to an ingest or commits it.
    pub(super) fn lock_ingest(&self, reference: &str, is_locked: bool) {
        if let Some(ingest) = self.state().ingests.get_mut(reference) {
            ingest.is_locked = is_locked;
        }
    }

    pub(super) fn ingests(&self) -> Vec<String> {
        self.state().ingests.keys().cloned().collect()
    }

    /// Calls of this method so far.
    pub(super) fn calls(&self, method: &str) -> usize {
        self.state().calls.get(method).copied().unwrap_or_default()
    }

    /// Becomes the writer of an ingest, and begins it if it is not there.
    fn writer(&self, request: &WriteContentRequest) -> Result<(WriteContentResponse, Lock), Code> {
        *self.state().calls.entry("Content/Write".to_owned()).or_default() += 1;
        if self.state().content.contains_key(&request.expected) {
            return Err(Code::AlreadyExists);
        }
        if !self.state().ingests.contains_key(&request.r#ref) {
            self.begin_ingest(&request.r#ref);
        }
        let mut state = self.state();
        let ingest = state.ingests.get_mut(&request.r#ref).ok_or(Code::NotFound)?;
        if std::mem::replace(&mut ingest.is_locked, true) {
            return Err(Code::Unavailable);
        }
        let answer = WriteContentResponse {
            offset: ingest.data.len().try_into().unwrap(),
            digest: Digest::sha256(&ingest.data).to_string(),
            ..WriteContentResponse::default()
        };
        Ok((answer, Lock(self.clone(), request.r#ref.clone())))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The messages that answer a call.
    fn answer(&self, method: &str, request: &[u8]) -> Result<Vec<u8>, Code> {
        let mut state = self.state();
        *state.calls.entry(method.to_owned()).or_default() += 1;
        match state.failing.get_mut(method) {
            Some((good, _)) if *good > 0 => *good -= 1,
            Some((_, bad)) if *bad > 0 => {
                *bad -= 1;
                return Err(Code::Unavailable);
            }
            _ => {}
        }
        let wire = |descriptor: &Descriptor| WireDescriptor {
            media_type: descriptor.media_type.to_string(),
            digest: descriptor.digest.to_string(),
            size: descriptor.size.try_into().unwrap(),
            ..WireDescriptor::default()
        };
        let image = |(name, target): (&String, &Descriptor)| Image {
            name: name.clone(),
            target: Some(wire(target)),
            ..Image::default()
        };
        let info = |blob: &Stored| Info {
            digest: blob.descriptor.digest.to_string(),
            size: blob.descriptor.size.try_into().unwrap(),
            labels: blob.labels.iter().cloned().collect(),
            ..Info::default()
        };
        let status = |(reference, ingest): (&String, &Ingest)| Status {
            r#ref: reference.clone(),
            offset: ingest.data.len().try_into().unwrap(),
            total: ingest.total.try_into().unwrap(),
            started_at: Some(ingest.started.into()),
            updated_at: Some(ingest.started.into()),
            ..Status::default()
        };
        Ok(match method {
            "Version/Version" => {
                message(&VersionResponse { version: state.version.into(), ..VersionResponse::default() })
            }
            "Introspection/Plugins" => message(&PluginsResponse::default()),
            "Images/List" => {
                message(&ListImagesResponse { images: state.images.iter().map(image).collect() })
            }
            "Images/Get" => {
                let name = GetImageRequest::decode(request).unwrap().name;
                let found = state.images.get_key_value(&name).map(image).ok_or(Code::NotFound)?;
                message(&GetImageResponse { image: Some(found) })
            }
            "Content/List" => {
                message(&ListContentResponse { info: state.content.values().map(info).collect() })
            }
            "Content/Info" => {
                let digest = InfoRequest::decode(request).unwrap().digest;
                let found = state.content.get(&digest).map(info).ok_or(Code::NotFound)?;
                message(&InfoResponse { info: Some(found) })
            }
            "Content/Read" => {
                let digest = ReadContentRequest::decode(request).unwrap().digest;
                let data = state.content.get(&digest).ok_or(Code::NotFound)?.bytes.to_vec();
                message(&ReadContentResponse { offset: 0, data })
            }
            "Content/ListStatuses" => {
                message(&ListStatusesResponse { statuses: state.ingests.iter().map(status).collect() })
            }
            "Content/Status" => {
                let reference = StatusRequest::decode(request).unwrap().r#ref;
                let found = state.ingests.get_key_value(&reference).map(status).ok_or(Code::NotFound)?;
                message(&StatusResponse { status: Some(found) })
            }
            "Content/Abort" => {
                let reference = AbortRequest::decode(request).unwrap().r#ref;
                state.ingests.remove(&reference).ok_or(Code::NotFound)?;
                message(&())
            }
            _ => return Err(Code::Unimplemented),
        })
    }
}

impl NamedService for Fake {
    /// A pattern of the router: all services.
    const NAME: &'static str = "{service}";
}

impl tower::Service<http::Request<Body>> for Fake {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let fake = self.clone();
        async move {
            // `/containerd.services.content.v1.Content/Read`
            let path = request.uri().path().to_owned();
            let method = path.rsplit('.').next().unwrap();
            let frame = |bytes: Vec<u8>| Ok::<_, tonic::Status>(Frame::data(Bytes::from(bytes)));
            let response = http::Response::builder().header("content-type", "application/grpc");
            let trailers = |code: Code| {
                let status = http::HeaderValue::from(code as u16);
                Frame::trailers([("grpc-status".parse().unwrap(), status)].into_iter().collect())
            };
            if method == "Content/Write" {
                let mut requests = request.into_body();
                let first = requests.frame().await.unwrap().unwrap().into_data().unwrap();
                let first = WriteContentRequest::decode(first.get(5..).unwrap()).unwrap();
                let frames = match fake.writer(&first) {
                    Err(code) => futures::stream::iter([Ok(trailers(code))]).boxed(),
                    // Held until the client has no more to ask.
                    Ok((answer, lock)) => {
                        let last = async move {
                            while requests.frame().await.is_some() {}
                            drop(lock);
                            Ok(trailers(Code::Ok))
                        };
                        let answer = std::future::ready(frame(message(&answer)));
                        futures::stream::once(answer).chain(futures::stream::once(last)).boxed()
                    }
                };
                return Ok(response.body(Body::new(StreamBody::new(frames))).unwrap());
            }
            let request = request.into_body().collect().await.unwrap().to_bytes();
            if method == "Events/Subscribe" {
                let events = futures::stream::unfold(fake.events.subscribe(), move |mut events| async move {
                    Some((events.recv().await.ok()?, events))
                });
                let body = Body::new(StreamBody::new(events.map(frame)));
                return Ok(response.body(body).unwrap());
            }
            let (messages, code) = match fake.answer(method, request.get(5..).unwrap()) {
                Ok(messages) => (Some(messages), Code::Ok),
                Err(code) => (None, code),
            };
            let frames = messages.map(frame).into_iter().chain([Ok(trailers(code))]);
            Ok(response.body(Body::new(StreamBody::new(futures::stream::iter(frames)))).unwrap())
        }
        .boxed()
    }
}

/// Where it listens in `folder`.
pub(super) fn socket(folder: &Path) -> PathBuf {
    folder.join("s")
}

/// A message with its prefix: not compressed, length.
fn message(message: &impl Message) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len().try_into().unwrap());
    message.encode(&mut bytes).unwrap();
    bytes.to_vec()
}
