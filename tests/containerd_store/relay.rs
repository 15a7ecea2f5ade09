//! A relay before containerd's socket that passes everything on but events, as if they had been lost.
//!
//! It reads HTTP/2 frames no further than it must: the stream whose request names an event filter is the subscription,
//! and what containerd sends on it is dropped.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// What a client sends before its first frame (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// A frame's header (4.1): length, type, flags, stream.
const HEADER: usize = 9;
/// Type of a frame with data (6.1).
const DATA: u8 = 0;
/// In the filter of a subscription, and in no other request.
const FILTER: &[u8] = b"topic~=";

pub(crate) struct Relay {
    folder: tempfile::TempDir,
    lost: Arc<AtomicUsize>,
    _accept: AbortOnDropHandle<()>,
}

struct Frame {
    kind: u8,
    stream: u32,
    bytes: Vec<u8>,
}

impl Relay {
    pub(crate) fn start(target: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let lost = Arc::new(AtomicUsize::new(0));
        let (target, count) = (target.to_owned(), Arc::clone(&lost));
        let accept = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (target, lost) = (target.clone(), Arc::clone(&count));
                connections.spawn(async move { drop(relay(client, &target, &lost).await) });
            }
        });
        Self { folder, lost, _accept: AbortOnDropHandle::new(accept) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// Frames with events that were dropped.
    pub(crate) fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }
}

async fn relay(client: UnixStream, target: &Path, lost: &AtomicUsize) -> io::Result<()> {
    let server = UnixStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let subscriptions = Mutex::new(HashSet::new());
    let requests = async {
        let mut preface = [0; PREFACE];
        from_client.read_exact(&mut preface).await?;
        to_server.write_all(&preface).await?;
        pass(&mut from_client, &mut to_server, |frame| {
            if frame.kind == DATA && frame.bytes.windows(FILTER.len()).any(|part| part == FILTER) {
                subscriptions.lock().unwrap().insert(frame.stream);
            }
            true
        })
        .await
    };
    let answers = pass(&mut from_server, &mut to_client, |frame| {
        let event = frame.kind == DATA && subscriptions.lock().unwrap().contains(&frame.stream);
        lost.fetch_add(usize::from(event), Ordering::Relaxed);
        !event
    });
    tokio::try_join!(requests, answers).map(drop)
}

/// Passes on the frames that `wanted` says; ends by an error.
async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    wanted: impl Fn(&Frame) -> bool,
) -> io::Result<()> {
    loop {
        let mut bytes = vec![0; HEADER];
        from.read_exact(&mut bytes).await?;
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        let stream = u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & !(1 << 31);
        let kind = bytes[3];
        bytes.resize(HEADER + length, 0);
        from.read_exact(&mut bytes[HEADER..]).await?;
        let frame = Frame { kind, stream, bytes };
        if wanted(&frame) {
            to.write_all(&frame.bytes).await?;
        }
    }
}
