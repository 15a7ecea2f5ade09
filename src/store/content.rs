//! Open content: an open file, or a stream where the content root is not mounted.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

/// Bytes read at once: large enough that a hop to the blocking pool (about 10 us) does not count, small enough that a
/// hundred transfers stay within 32 MiB.
const CHUNK: usize = 256 << 10;

/// What one read of a file may take, its wait for a thread of the blocking pool included. A disk that needs longer
/// hangs; the reader's connection ends, and its client goes on elsewhere.
const READ: Duration = Duration::from_secs(10);

/// Threads of the blocking pool, of 64, that may be with the stores' disk at the same time. One that hangs keeps each
/// thread that it got, long after whoever asked went away.
static DISK: Semaphore = Semaphore::const_new(16);

/// Content that is being read, from an offset to its end.
pub struct Content {
    size: u64,
    position: u64,
    source: Source,
}

enum Source {
    /// The file, where in it the content begins, and the last chunk: its memory is used again once its reader has let go
    /// of it, which saves an allocation and the zeroing of it for each.
    File(Arc<File>, u64, Bytes),
    /// The stream, and what it gave beyond the last limit.
    Stream(BoxStream<'static, io::Result<Bytes>>, Bytes),
}

impl Content {
    /// The rest of `file`, whose content has `size` bytes, from `offset`; an offset after the end counts as the end.
    pub fn file(file: File, size: u64, offset: u64) -> Self {
        Self::part(Arc::new(file), 0, size, offset)
    }

    /// The same of content that begins at `base` of a file that holds others too.
    pub fn part(file: Arc<File>, base: u64, size: u64, offset: u64) -> Self {
        Self { size, position: offset.min(size), source: Source::File(file, base, Bytes::new()) }
    }

    /// A content of `size` bytes whose bytes from `offset` on come from `stream`.
    pub fn stream(stream: BoxStream<'static, io::Result<Bytes>>, size: u64, offset: u64) -> Self {
        Self { size, position: offset.min(size), source: Source::Stream(stream, Bytes::new()) }
    }

    /// `bytes` from `offset`.
    pub fn bytes(bytes: &Bytes, offset: u64) -> Self {
        let size = bytes.len() as u64;
        let start = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
        let rest = bytes.slice(start..);
        Self {
            size,
            position: offset.min(size),
            source: Source::Stream(futures::stream::empty().boxed(), rest),
        }
    }

    /// Size of the whole content in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Next bytes, at most `limit` of them, or `None` at the end. Content that ends early is an error of the kind
    /// [`io::ErrorKind::UnexpectedEof`].
    pub async fn next(&mut self, limit: u64) -> io::Result<Option<Bytes>> {
        let left = (self.size - self.position).min(limit);
        if left == 0 {
            return Ok(None);
        }
        let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = match &mut self.source {
            Source::File(file, base, last) => {
                let mut buffer = std::mem::take(last).try_into_mut().unwrap_or_default();
                buffer.resize(wanted, 0);
                let chunk = read_at(file, *base + self.position, buffer).await?;
                *last = chunk.clone();
                chunk
            }
            Source::Stream(stream, rest) => {
                while rest.is_empty() {
                    let Some(chunk) = stream.next().await.transpose()? else { break };
                    *rest = chunk;
                }
                rest.split_to(wanted.min(rest.len()))
            }
        };
        if chunk.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += chunk.len() as u64;
        Ok(Some(chunk))
    }

    /// The next `length` bytes as a stream of chunks; fewer only by an error.
    pub fn into_stream(self, length: u64) -> BoxStream<'static, io::Result<Bytes>> {
        futures::stream::try_unfold((self, length), |(mut content, left)| async move {
            let chunk = content.next(left).await?;
            Ok(chunk.map(|chunk| {
                let left = left - chunk.len() as u64;
                (chunk, (content, left))
            }))
        })
        .boxed()
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content")
            .field("size", &self.size)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// Fills `buffer` from `position`, or as much of it as there is. What is in the page cache is read at once; only a read that would wait
/// for the disk goes to the blocking pool, so that hot content does not depend on it.
async fn read_at(file: &Arc<File>, position: u64, buffer: BytesMut) -> io::Result<Bytes> {
    let buffer = match cached(file, position, buffer) {
        Ok(chunk) => return Ok(chunk),
        Err(buffer) => buffer,
    };
    let file = Arc::clone(file);
    let read = move || {
        let mut buffer = buffer;
        let count = std::os::unix::fs::FileExt::read_at(&*file, &mut buffer, position)?;
        buffer.truncate(count);
        Ok(buffer.freeze())
    };
    within(READ, read).await
}

/// Runs `work` on the stores' disk where it may block, at most 16 at once. Work that has begun goes on after the limit,
/// as nothing can end it; what still waits for its turn never begins.
pub(super) async fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    within_of(&DISK, limit, work).await
}

async fn within_of<T: Send + 'static>(
    disk: &'static Semaphore,
    limit: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let working = async {
        let turn = disk.acquire().await.map_err(io::Error::other)?;
        let work = move || {
            let _turn = turn;
            work()
        };
        AbortOnDropHandle::new(tokio::task::spawn_blocking(work)).await.map_err(io::Error::other)?
    };
    timeout(limit, working).await.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the disk does not answer (nothing within {limit:?})"),
        ))
    })
}

/// `Err` gives the buffer back: nothing is cached there, or the file system cannot tell.
fn cached(file: &File, position: u64, mut buffer: BytesMut) -> Result<Bytes, BytesMut> {
    use rustix::io::{IoSliceMut, ReadWriteFlags, preadv2};
    let read = preadv2(file.as_fd(), &mut [IoSliceMut::new(&mut buffer)], position, ReadWriteFlags::NOWAIT);
    match read {
        Ok(count) if count > 0 => {
            buffer.truncate(count);
            Ok(buffer.freeze())
        }
        _ => Err(buffer),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    async fn check(mut content: Content, whole: &[u8], offset: usize) {
        let mut read = Vec::new();
        // Odd limits, so that chunks of the source are cut.
        for limit in (1..).step_by(70_001) {
            match content.next(limit).await.unwrap() {
                Some(chunk) => {
                    assert!(!chunk.is_empty() && chunk.len() as u64 <= limit);
                    read.extend_from_slice(&chunk);
                }
                None => break,
            }
        }
        assert!(read == whole[offset..], "{} bytes from {offset}", read.len());
    }

    fn stream(whole: &[u8], offset: usize) -> BoxStream<'static, io::Result<Bytes>> {
        let mut chunks: Vec<_> =
            whole[offset..].chunks(300_000).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        chunks.insert(0, Ok(Bytes::new()));
        futures::stream::iter(chunks).boxed()
    }

    #[tokio::test]
    async fn reads_from_an_offset_to_the_end() {
        let whole: Vec<u8> = (0..1_000_003_u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&whole).unwrap();
        let size = whole.len() as u64;
        for offset in [0, 1, 500_000, whole.len()] {
            let at = offset as u64;
            check(Content::file(file.try_clone().unwrap(), size, at), &whole, offset).await;
            check(Content::stream(stream(&whole, offset), size, at), &whole, offset).await;
            check(Content::bytes(&whole.clone().into(), at), &whole, offset).await;
        }
        let part = Content::part(Arc::new(file.try_clone().unwrap()), 1000, 70_000, 3);
        check(part, &whole[1000..71_000], 3).await;
        check(Content::bytes(&whole.clone().into(), size + 9), &whole, whole.len()).await;
        check(Content::file(file, size, size + 9), &whole, whole.len()).await;
    }

    #[tokio::test]
    async fn content_that_ends_early_is_an_error() {
        let mut content = Content::stream(stream(b"abc", 0), 4, 0);
        assert_eq!(content.next(9).await.unwrap().as_deref(), Some(&b"abc"[..]));
        assert_eq!(content.next(9).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let file = tempfile::tempfile().unwrap();
        let mut content = Content::file(file, 4, 0);
        assert_eq!(content.next(9).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_disk_that_hangs_ends_the_read() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let began = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let begin = Arc::clone(&began);
        runtime.block_on(async move {
            let limit = Duration::from_millis(50);
            let hung = within(limit, move || hang.recv().map_err(io::Error::other)).await;
            assert_eq!(hung.unwrap_err().kind(), io::ErrorKind::TimedOut);
            // The pool has no thread left for the next one.
            let queued = within(limit, move || {
                begin.store(true, std::sync::atomic::Ordering::Relaxed);
                Ok(())
            });
            assert_eq!(queued.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
            release.send(()).unwrap();
            within(READ, || Ok(())).await.unwrap();
        });
        assert!(!began.load(std::sync::atomic::Ordering::Relaxed), "nobody waits for it");
    }

    #[test]
    fn a_disk_that_hangs_keeps_no_more_than_its_threads() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let begun = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let disk = Box::leak(Box::new(Semaphore::new(2)));
            let (release, hang) = std::sync::mpsc::channel::<()>();
            let hang = Arc::new(std::sync::Mutex::new(hang));
            for _ in 0..5 {
                let (hang, begun) = (Arc::clone(&hang), Arc::clone(&begun));
                let work = move || {
                    begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    hang.lock().unwrap().recv().map_err(io::Error::other)
                };
                let outcome = within_of(disk, Duration::from_millis(20), work).await;
                assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::TimedOut);
            }
            assert_eq!(begun.load(std::sync::atomic::Ordering::Relaxed), 2);
            for _ in 0..2 {
                release.send(()).unwrap();
            }
            within_of(disk, READ, || Ok(())).await.unwrap();
        });
    }

    #[tokio::test]
    async fn memory_of_a_chunk_is_used_again_only_after_its_reader() {
        let mut file = tempfile::tempfile().unwrap();
        let whole: Vec<u8> = (0..4 * CHUNK).map(|i| (i / CHUNK) as u8).collect();
        file.write_all(&whole).unwrap();
        let mut content = Content::file(file, whole.len() as u64, 0);
        let first = content.next(u64::MAX).await.unwrap().unwrap();
        let second = content.next(u64::MAX).await.unwrap().unwrap();
        assert!(first[..] == whole[..CHUNK] && second[..] == whole[CHUNK..2 * CHUNK]);
        let address = second.as_ptr();
        drop(second);
        let third = content.next(u64::MAX).await.unwrap().unwrap();
        assert_eq!(third.as_ptr(), address);
        assert!(first[..] == whole[..CHUNK] && third[..] == whole[2 * CHUNK..3 * CHUNK]);
    }

    #[tokio::test]
    async fn into_stream_gives_no_more_than_its_length() {
        let content = Content::bytes(&Bytes::from_static(b"0123456789"), 2);
        let chunks: Vec<_> = content.into_stream(5).collect().await;
        let read: Vec<u8> = chunks.into_iter().flat_map(Result::unwrap).collect();
        assert_eq!(read, b"23456");
    }
}
