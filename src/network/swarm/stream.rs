//! Frames of the gossip on a libp2p stream: one task reads, one writes, and the driver is told.
//!
//! A neighbour that sends faster than its frames are taken waits (the channel to the driver is bounded, and so is
//! yamux's window); one that does not read gets nothing more, and the gossip finds it silent.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures::io::{ReadHalf, WriteHalf};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{Stream, StreamProtocol};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::super::gossip::LinkId;
use super::super::gossip::wire::{self, FRAME_LIMIT, Frame};
use super::codec::{read_framed, stream_protocols, write_framed};

/// The names of the gossip's protocol that are spoken, the best first.
pub(super) fn protocols() -> Vec<StreamProtocol> {
    stream_protocols("/peili/gossip/")
}

/// Frames that wait to be written.
const WAITING: usize = 4;
/// Frames that wait for the driver, of all neighbours.
pub(super) const EVENTS: usize = 64;
/// What a neighbour may send at once, and from then on per second: a whole view of 5,000 nodes is 10 MB, and all that
/// goes on among them 30 KB/s.
const BURST: f64 = 32e6;
const RATE: f64 = 1e6;
/// The most that a frame costs besides its bytes: its records may have to be verified, at 60 us for about 200 bytes.
const PER_FRAME: f64 = 200.0;

/// What a stream tells the driver.
pub(super) enum Event {
    /// A frame came.
    Frame(LinkId, Box<Frame>),
    /// There is room for another frame.
    Written,
    /// The stream is at its end, and why.
    Ended(LinkId, String),
}

/// A neighbour's stream; dropping it ends it.
pub(super) struct Link {
    frames: Option<mpsc::Sender<Bytes>>,
    reader: Option<AbortOnDropHandle<()>>,
    writer: Option<tokio::task::JoinHandle<()>>,
}

impl Link {
    pub(super) fn new(id: LinkId, stream: Stream, events: &mpsc::Sender<Event>) -> Self {
        let (reader, writer) = stream.split();
        let (frames, waiting) = mpsc::channel(WAITING);
        let (read, written) = (events.clone(), events.clone());
        let reader = AbortOnDropHandle::new(tokio::spawn(async move {
            let Err(error) = read_all(id, reader, &read).await else { return };
            // An error is a driver that has ended.
            let _ = read.send(Event::Ended(id, error.to_string())).await;
        }));
        let writer = tokio::spawn(write_all(id, writer, waiting, written));
        Self { frames: Some(frames), reader: Some(reader), writer: Some(writer) }
    }

    /// Whether a frame can be sent now.
    pub(super) fn has_room(&self) -> bool {
        self.frames.as_ref().is_some_and(|frames| frames.capacity() > 0)
    }

    pub(super) fn send(&self, frame: Bytes) {
        if let Some(frames) = &self.frames {
            // The caller has looked for room; a writer that has ended tells so itself.
            let _ = frames.try_send(frame);
        }
    }

    /// Ends the stream when what waits is written; the future is over then.
    pub(super) fn finish(mut self) -> impl Future<Output = ()> + Send + use<> {
        self.frames = None;
        let writer = self.writer.take();
        let reader = self.reader.take();
        async move {
            if let Some(writer) = writer {
                // An error is a writer that was ended.
                let _ = writer.await;
            }
            drop(reader);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(writer) = &self.writer {
            writer.abort();
        }
    }
}

async fn read_all(id: LinkId, mut stream: ReadHalf<Stream>, events: &mpsc::Sender<Event>) -> io::Result<()> {
    let (mut allowance, mut since) = (BURST, Instant::now());
    loop {
        let bytes = read_framed(&mut stream, FRAME_LIMIT).await?;
        let length = bytes.len();
        let frame =
            wire::decode(bytes.into()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if events.send(Event::Frame(id, Box::new(frame))).await.is_err() {
            return Ok(());
        }
        let now = Instant::now();
        allowance = (allowance + (now - since).as_secs_f64() * RATE).min(BURST) - length as f64 - PER_FRAME;
        since = now;
        if allowance < 0.0 {
            sleep_until(now + Duration::from_secs_f64(-allowance / RATE)).await;
        }
    }
}

async fn write_all(
    id: LinkId,
    mut stream: WriteHalf<Stream>,
    mut frames: mpsc::Receiver<Bytes>,
    events: mpsc::Sender<Event>,
) {
    while let Some(frame) = frames.recv().await {
        let written = async {
            write_framed(&mut stream, &frame).await?;
            stream.flush().await
        };
        let event = match written.await {
            Ok(()) => Event::Written,
            Err(error) => Event::Ended(id, error.to_string()),
        };
        let is_end = matches!(event, Event::Ended(..));
        if events.send(event).await.is_err() || is_end {
            return;
        }
    }
    // An error is a neighbour that is gone.
    let _ = stream.close().await;
}
