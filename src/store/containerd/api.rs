//! containerd's gRPC API, as far as the store needs it. Every call has a time limit, since containerd may hang, and
//! every answer is bounded and parsed here; no type of the protocol leaves this file.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use containerd_client::events::{ContentCreate, ContentDelete};
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    AbortRequest, GetImageRequest, ImageCreate, Info, InfoRequest, ListContentRequest, ListImagesRequest,
    ListStatusesRequest, PluginsRequest, ReadContentRequest, Status as WireStatus, StatusRequest,
    SubscribeRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use containerd_client::types::{Descriptor as WireDescriptor, Envelope};
use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::model::Entry;
use crate::oci::{Descriptor, Digest};
use crate::store::Source;

/// A call that reads or changes one thing. containerd answers in milliseconds; two seconds of nothing is a hang.
const CALL: Duration = Duration::from_secs(2);
/// A list of everything, or the next message of one: thousands of records on a busy disk.
const LIST: Duration = Duration::from_secs(10);
/// The next message of a content that is read; beyond it the read has stalled.
const READ: Duration = Duration::from_secs(5);
/// Before containerd gives an unfinished download to a writer, it hashes what is there: 60 GiB at 500 MB/s.
const HASH: Duration = Duration::from_secs(120);
/// Largest message: an image list of some 50,000 records.
const MESSAGE_LIMIT: usize = 64 << 20;
/// Content of one namespace that is read. A node holds some 10,000; a million would take 500 MiB here.
const CONTENT_LIMIT: usize = 1_000_000;
/// Where containerd marks content whose children it knows: a manifest or an index.
const CHILD_LABEL: &str = "containerd.io/gc.ref.content";

/// A connection. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Api {
    channel: Channel,
}

/// Why containerd did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// It has not got it.
    #[error("not found")]
    NotFound,
    /// It cannot be reached, does not answer in time, or refuses; the text says which.
    #[error("{0}")]
    Failed(String),
}

/// What happened in a namespace. Only what is to be asked again: events may be late, lost, or out of order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Event {
    /// An image record was created, changed or deleted.
    Image { namespace: String, name: String },
    /// Content was created or deleted.
    Content { namespace: String, digest: Digest },
}

/// An unfinished download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ingest {
    pub(super) reference: String,
    pub(super) started: Option<SystemTime>,
    /// The last write.
    pub(super) updated: Option<SystemTime>,
    /// Bytes that are written.
    pub(super) offset: u64,
    /// Bytes that there will be; 0: unknown.
    pub(super) total: u64,
}

/// The writer of an unfinished download. While it is there, nobody else can write to the download, commit it or begin
/// it anew.
pub(super) struct Writer {
    /// Digest of what is written. `None`: one that is not known here.
    pub(super) digest: Option<Digest>,
    /// Bytes that are written.
    pub(super) offset: u64,
    /// Dropping it ends the requests.
    open: oneshot::Sender<Infallible>,
    answers: Streaming<WriteContentResponse>,
}

impl Api {
    /// Connects, and proves that somebody answers: returns containerd's version too.
    pub(super) async fn connect(socket: &Path) -> Result<(Self, String), ApiError> {
        let shown = socket.display();
        let failed = |text: String| ApiError::Failed(format!("cannot connect to {shown}: {text}"));
        let probe = timeout(CALL, UnixStream::connect(socket)).await;
        // Connected once by hand, for the error's exact text: a channel hides it.
        match probe {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let hint = match error.kind() {
                    io::ErrorKind::NotFound => "; is the socket mounted?",
                    io::ErrorKind::ConnectionRefused => "; is containerd running?",
                    io::ErrorKind::PermissionDenied => "; Peili needs the rights of the socket's owner",
                    _ => "",
                };
                return Err(failed(format!("{}{hint}", text_of(&error))));
            }
            Err(_) => return Err(failed(format!("no answer within {CALL:?}"))),
        }
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(UnixStream::connect(path).await?)) }
        });
        // The address is not used: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://containerd.invalid")
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20);
        let channel =
            async { endpoint.connect_with_connector(connector).await.map_err(|e| failed(e.to_string())) };
        let channel = limited("connect", CALL, channel).await?;
        let api = Self { channel };
        let version = api.version().await?;
        Ok((api, version))
    }

    /// containerd's version; also the sign of life.
    pub(super) async fn version(&self) -> Result<String, ApiError> {
        let mut client = VersionClient::new(self.channel.clone());
        Ok(call("version", CALL, client.version(())).await?.version)
    }

    /// Where the content store is, as containerd sees it.
    pub(super) async fn content_root(&self) -> Result<Option<PathBuf>, ApiError> {
        let mut client = IntrospectionClient::new(self.channel.clone());
        let request = PluginsRequest { filters: vec!["type==io.containerd.content.v1".to_owned()] };
        let plugins = call("plugins", CALL, client.plugins(request)).await?.plugins;
        let root = plugins.iter().find_map(|plugin| plugin.exports.get("root"));
        Ok(root.map(PathBuf::from).filter(|root| root.is_absolute()))
    }

    /// All image records of a namespace: names and targets. Records without a usable target are left out.
    pub(super) async fn images(&self, namespace: &str) -> Result<Vec<(String, Descriptor)>, ApiError> {
        let mut client = ImagesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = within(namespace, ListImagesRequest::default())?;
        let images = match call("list images", LIST, client.list(request)).await {
            Ok(response) => response.images,
            // No namespace yet.
            Err(ApiError::NotFound) => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(images.into_iter().filter_map(|image| Some((image.name, descriptor(&image.target?)?))).collect())
    }

    /// The target of one image record; `None`: there is none of this name.
    pub(super) async fn image(&self, namespace: &str, name: &str) -> Result<Option<Descriptor>, ApiError> {
        let mut client = ImagesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = within(namespace, GetImageRequest { name: name.to_owned() })?;
        let response = optional(call("get image", CALL, client.get(request)).await)?;
        Ok(response.and_then(|response| response.image?.target).and_then(|wire| descriptor(&wire)))
    }

    /// All complete content of a namespace.
    pub(super) async fn content(&self, namespace: &str) -> Result<Vec<(Digest, Entry)>, ApiError> {
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = within(namespace, ListContentRequest::default())?;
        let mut stream = match call("list content", LIST, client.list(request)).await {
            Ok(stream) => stream,
            Err(ApiError::NotFound) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut content = Vec::new();
        loop {
            match optional(answer("list content", LIST, stream.message()).await)?.flatten() {
                Some(part) => content.extend(part.info.iter().filter_map(entry)),
                None => return Ok(content),
            }
            if content.len() > CONTENT_LIMIT {
                return Err(ApiError::Failed(format!(
                    "namespace {namespace} holds over {CONTENT_LIMIT} blobs"
                )));
            }
        }
    }

    /// One content of a namespace; `None`: not there, or not complete.
    pub(super) async fn info(&self, namespace: &str, digest: &Digest) -> Result<Option<Entry>, ApiError> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = within(namespace, InfoRequest { digest: digest.to_string() })?;
        let response = optional(call("content info", CALL, client.info(request)).await)?;
        Ok(response.and_then(|response| entry(&response.info?)).map(|(_, entry)| entry))
    }

    /// Bytes of content from `offset` (before its end) to its end. The first are there when this returns.
    pub(super) async fn read(
        &self,
        namespace: &str,
        digest: &Digest,
        offset: u64,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, ApiError> {
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let offset = i64::try_from(offset).map_err(|_| ApiError::NotFound)?;
        let request = within(namespace, ReadContentRequest { digest: digest.to_string(), offset, size: 0 })?;
        let mut stream = call("read content", CALL, client.read(request)).await?;
        let first = answer("read content", CALL, stream.message()).await?;
        let first = Ok(first.map(|message| message.data).unwrap_or_default().into());
        let rest = futures::stream::try_unfold(stream, |mut stream| async move {
            let message = answer("read content", READ, stream.message()).await.map_err(io::Error::other)?;
            Ok(message.map(|message| (Bytes::from(message.data), stream)))
        });
        Ok(futures::stream::once(std::future::ready(first)).chain(rest).boxed())
    }

    /// Unfinished downloads of a namespace.
    pub(super) async fn ingests(&self, namespace: &str) -> Result<Vec<Ingest>, ApiError> {
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = within(namespace, ListStatusesRequest::default())?;
        let response = optional(call("list ingests", CALL, client.list_statuses(request)).await)?;
        let statuses = response.map(|response| response.statuses).unwrap_or_default();
        Ok(statuses.into_iter().map(ingest).collect())
    }

    /// One unfinished download; `None`: there is none of this reference.
    pub(super) async fn ingest(&self, namespace: &str, reference: &str) -> Result<Option<Ingest>, ApiError> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = within(namespace, StatusRequest { r#ref: reference.to_owned() })?;
        let response = optional(call("ingest", CALL, client.status(request)).await)?;
        Ok(response.and_then(|response| response.status).map(ingest))
    }

    /// Becomes the writer of an unfinished download of `digest`; `None`: another one is at it, or the content is
    /// complete. Where there is no such download, this begins an empty one.
    pub(super) async fn writer(
        &self,
        namespace: &str,
        reference: &str,
        digest: &Digest,
    ) -> Result<Option<Writer>, ApiError> {
        let (open, closed) = oneshot::channel::<Infallible>();
        let request = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            expected: digest.to_string(),
            ..WriteContentRequest::default()
        };
        let last = futures::stream::once(closed).filter_map(|_| std::future::ready(None));
        let requests = within(namespace, futures::stream::iter([request]).chain(last))?;
        let mut client = ContentClient::new(self.channel.clone());
        let opened = async {
            let mut answers = client.write(requests).await?.into_inner();
            Ok::<_, Status>((answers.message().await?, answers))
        };
        let (answer, answers) = match limited("open ingest", HASH, async { Ok(opened.await) }).await? {
            Ok(opened) => opened,
            Err(status) if matches!(status.code(), Code::Unavailable | Code::AlreadyExists) => {
                tracing::debug!(reference, reason = status.message(), "somebody is at a download");
                return Ok(None);
            }
            Err(status) => return Err(failure("open ingest", &status)),
        };
        Ok(answer.map(|answer| Writer {
            digest: answer.digest.parse().ok(),
            offset: bytes(answer.offset),
            open,
            answers,
        }))
    }

    /// Discards an unfinished download; whether it was there.
    pub(super) async fn abort(&self, namespace: &str, reference: &str) -> Result<bool, ApiError> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = within(namespace, AbortRequest { r#ref: reference.to_owned() })?;
        Ok(optional(call("abort ingest", CALL, client.abort(request)).await)?.is_some())
    }

    /// Events of these namespaces. Has no time limit: containerd answers with the first event, be it in a day.
    pub(super) async fn subscribe(
        &self,
        namespaces: &[String],
    ) -> Result<BoxStream<'static, Result<Event, ApiError>>, ApiError> {
        let filter = |namespace: &String| format!(r#"namespace=="{namespace}",topic~="^/(images|content)/""#);
        let request = SubscribeRequest { filters: namespaces.iter().map(filter).collect() };
        let mut client = EventsClient::new(self.channel.clone());
        let stream =
            client.subscribe(request).await.map_err(|status| failure("events", &status))?.into_inner();
        Ok(stream
            .filter_map(|envelope| {
                std::future::ready(match envelope {
                    Ok(envelope) => event(envelope).map(Ok),
                    Err(status) => Some(Err(failure("events", &status))),
                })
            })
            .boxed())
    }
}

impl Writer {
    /// Leaves the download to others.
    pub(super) async fn close(self) {
        let Self { open, mut answers, .. } = self;
        drop(open);
        // Whatever it says, the writer is gone: at the latest when this ends.
        let _ = answer("close ingest", CALL, answers.message()).await;
    }
}

/// A request in a namespace.
fn within<T>(namespace: &str, message: T) -> Result<Request<T>, ApiError> {
    let value = MetadataValue::try_from(namespace)
        .map_err(|_| ApiError::Failed(format!("{namespace:?} is not a namespace")))?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

async fn call<T>(
    what: &str,
    limit: Duration,
    response: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ApiError> {
    answer(what, limit, response).await.map(tonic::Response::into_inner)
}

async fn answer<T>(
    what: &str,
    limit: Duration,
    response: impl Future<Output = Result<T, Status>>,
) -> Result<T, ApiError> {
    limited(what, limit, async { response.await.map_err(|status| failure(what, &status)) }).await
}

async fn limited<T>(
    what: &str,
    limit: Duration,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let expired =
        || ApiError::Failed(format!("containerd does not answer ({what}: nothing within {limit:?})"));
    timeout(limit, work).await.unwrap_or_else(|_| Err(expired()))
}

fn failure(what: &str, status: &Status) -> ApiError {
    if status.code() == Code::NotFound {
        return ApiError::NotFound;
    }
    let text: String = status.message().chars().take(200).collect();
    ApiError::Failed(format!("containerd failed ({what}: {:?}: {text})", status.code()))
}

fn optional<T>(result: Result<T, ApiError>) -> Result<Option<T>, ApiError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ApiError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `No such file or directory`, without the number that Rust adds.
fn text_of(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn ingest(status: WireStatus) -> Ingest {
    Ingest {
        reference: status.r#ref,
        started: status.started_at.and_then(|time| SystemTime::try_from(time).ok()),
        updated: status.updated_at.and_then(|time| SystemTime::try_from(time).ok()),
        offset: bytes(status.offset),
        total: bytes(status.total),
    }
}

/// The protocol has signed counts; a negative one is none.
fn bytes(count: i64) -> u64 {
    u64::try_from(count).unwrap_or_default()
}

fn descriptor(wire: &WireDescriptor) -> Option<Descriptor> {
    let size = u64::try_from(wire.size).ok()?;
    Some(Descriptor::new(wire.digest.parse().ok()?, size, &wire.media_type))
}

fn entry(info: &Info) -> Option<(Digest, Entry)> {
    let digest = info.digest.parse().ok()?;
    let sources = info.labels.iter().flat_map(|(key, value)| Source::parse_label(key, value));
    let mut sources: Vec<_> = sources.collect();
    sources.sort();
    let has_children = info.labels.keys().any(|key| key.starts_with(CHILD_LABEL));
    Some((digest, Entry { size: u64::try_from(info.size).ok()?, sources, has_children }))
}

fn event(envelope: Envelope) -> Option<Event> {
    let Envelope { namespace, topic, event, .. } = envelope;
    let value = event?.value;
    let digest = |text: String| text.parse().ok();
    match topic.as_str() {
        // The three image events share the field that is read.
        "/images/create" | "/images/update" | "/images/delete" => {
            let name = ImageCreate::decode(&*value).ok()?.name;
            Some(Event::Image { namespace, name })
        }
        "/content/create" => {
            let digest = digest(ContentCreate::decode(&*value).ok()?.digest)?;
            Some(Event::Content { namespace, digest })
        }
        "/content/delete" => {
            let digest = digest(ContentDelete::decode(&*value).ok()?.digest)?;
            Some(Event::Content { namespace, digest })
        }
        _ => None,
    }
}
