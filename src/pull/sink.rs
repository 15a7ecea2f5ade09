//! Where the bytes of one content go: memory, a file or nowhere, hashed on the way.
//!
//! Hashing and writing happen on a blocking thread behind a short channel, so that the executor only moves references
//! and the network is read while the disk writes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::destination::Partial;
use crate::oci::{Algorithm, Digest, Hasher};

/// Chunks in flight between network and disk; hyper's are at most about 400 KiB.
const CHANNEL: usize = 16;

/// Bytes read at once when what an earlier pull left is hashed.
const CHUNK: usize = 1 << 20;

/// Takes the bytes of one content in order.
pub(super) struct Sink {
    position: u64,
    kind: Kind,
}

enum Kind {
    Memory(Vec<u8>),
    Count,
    Worker { messages: mpsc::Sender<Message>, task: Option<JoinHandle<io::Result<()>>> },
}

enum Message {
    Bytes(Bytes),
    Reset,
    /// Compare, and put the file in its place. The answer: whether the content is right; if not, the sink is empty again.
    Finish(Digest, oneshot::Sender<bool>),
}

impl Sink {
    /// Keeps everything in memory.
    pub(super) fn memory() -> Self {
        Self { position: 0, kind: Kind::Memory(Vec::new()) }
    }

    /// Counts bytes and believes them.
    pub(super) fn count() -> Self {
        Self { position: 0, kind: Kind::Count }
    }

    /// Hashes only.
    pub(super) fn hash(algorithm: Algorithm) -> Self {
        Self::worker(0, algorithm, None)
    }

    /// Goes on with a partial file.
    pub(super) fn file(partial: Partial, algorithm: Algorithm) -> Self {
        Self::worker(partial.length, algorithm, Some(partial))
    }

    fn worker(position: u64, algorithm: Algorithm, partial: Option<Partial>) -> Self {
        let (messages, receiver) = mpsc::channel(CHANNEL);
        // It ends when the sink is dropped and the channel is empty.
        let task = tokio::task::spawn_blocking(move || run(partial, algorithm, receiver));
        Self { position, kind: Kind::Worker { messages, task: Some(task) } }
    }

    /// Bytes so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Adds bytes.
    pub(super) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        self.position += bytes.len() as u64;
        match &mut self.kind {
            Kind::Memory(buffer) => buffer.extend_from_slice(&bytes),
            Kind::Count => {}
            Kind::Worker { .. } => self.tell(Message::Bytes(bytes)).await?,
        }
        Ok(())
    }

    /// Whether everything so far is the content of `digest`. If it is, a file is in its place afterwards; if not, the
    /// sink is empty again.
    pub(super) async fn finish(&mut self, digest: Digest) -> io::Result<bool> {
        let right = match &self.kind {
            Kind::Memory(buffer) => Digest::of(digest.algorithm(), buffer) == digest,
            Kind::Count => true,
            Kind::Worker { .. } => {
                let (answer, right) = oneshot::channel();
                self.tell(Message::Finish(digest, answer)).await?;
                match right.await {
                    Ok(right) => right,
                    Err(_) => return Err(self.failure().await),
                }
            }
        };
        if !right {
            self.reset().await?;
        }
        Ok(right)
    }

    /// Forgets everything.
    pub(super) async fn reset(&mut self) -> io::Result<()> {
        self.position = 0;
        match &mut self.kind {
            Kind::Memory(buffer) => buffer.clear(),
            Kind::Count => {}
            Kind::Worker { .. } => self.tell(Message::Reset).await?,
        }
        Ok(())
    }

    /// The content of a sink in memory; empty for others.
    pub(super) fn into_memory(self) -> Vec<u8> {
        match self.kind {
            Kind::Memory(buffer) => buffer,
            Kind::Count | Kind::Worker { .. } => Vec::new(),
        }
    }

    async fn tell(&mut self, message: Message) -> io::Result<()> {
        let Kind::Worker { messages, .. } = &self.kind else { return Ok(()) };
        match messages.send(message).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.failure().await),
        }
    }

    /// Why the worker ended.
    async fn failure(&mut self) -> io::Error {
        let ended = || io::Error::other("the writer has ended");
        let Kind::Worker { task, .. } = &mut self.kind else { return ended() };
        let Some(task) = task.take() else { return ended() };
        match task.await {
            Ok(Ok(())) => ended(),
            Ok(Err(error)) => error,
            Err(error) => io::Error::other(error),
        }
    }
}

fn run(
    mut partial: Option<Partial>,
    algorithm: Algorithm,
    mut messages: mpsc::Receiver<Message>,
) -> io::Result<()> {
    let mut hasher = Hasher::new(algorithm);
    if let Some(partial) = &mut partial {
        hash_kept(&mut partial.file, partial.length, &mut hasher)?;
    }
    while let Some(message) = messages.blocking_recv() {
        match message {
            Message::Bytes(bytes) => {
                hasher.update(&bytes);
                if let Some(partial) = &mut partial {
                    partial.file.write_all(&bytes)?;
                }
            }
            Message::Reset => {
                hasher = Hasher::new(algorithm);
                if let Some(partial) = &mut partial {
                    partial.file.set_len(0)?;
                    partial.file.seek(SeekFrom::Start(0))?;
                }
            }
            Message::Finish(digest, answer) => {
                let right = std::mem::replace(&mut hasher, Hasher::new(algorithm)).finish() == digest;
                if right && let Some(partial) = &partial {
                    partial.commit()?;
                }
                // Nobody waits if the pull was given up meanwhile.
                let _ = answer.send(right);
            }
        }
    }
    Ok(())
}

/// Hashes the first `length` bytes and leaves the file's position behind them.
fn hash_kept(file: &mut File, length: u64, hasher: &mut Hasher) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0; if length == 0 { 0 } else { CHUNK }];
    let mut left = length;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = file.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..count]);
        left -= count as u64;
    }
    Ok(())
}
