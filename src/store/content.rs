//! Open content: an open file, or a stream where the content root is not mounted.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;

/// Bytes read at once: large enough that a hop to the blocking pool (about 10 us) does not count, small enough that a
/// hundred transfers stay within 32 MiB.
const CHUNK: usize = 256 << 10;

/// Content that is being read, from an offset to its end.
pub struct Content {
    size: u64,
    position: u64,
    source: Source,
}

enum Source {
    File(Arc<File>),
    Stream(BoxStream<'static, io::Result<Bytes>>),
}

impl Content {
    /// The rest of `file`, whose content has `size` bytes, from `offset`.
    pub fn file(file: File, size: u64, offset: u64) -> Self {
        Self { size, position: offset, source: Source::File(Arc::new(file)) }
    }

    /// A content of `size` bytes whose bytes from `offset` on come from `stream`.
    pub fn stream(stream: BoxStream<'static, io::Result<Bytes>>, size: u64, offset: u64) -> Self {
        Self { size, position: offset, source: Source::Stream(stream) }
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
            Source::File(file) => read_at(file, self.position, wanted).await?,
            Source::Stream(stream) => match stream.next().await.transpose()? {
                Some(mut chunk) => {
                    chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                    chunk
                }
                None => Bytes::new(),
            },
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

/// Reads up to `wanted` bytes at `position`. What is in the page cache is read at once; only a read that would wait
/// for the disk goes to the blocking pool, so that hot content does not depend on it.
async fn read_at(file: &Arc<File>, position: u64, wanted: usize) -> io::Result<Bytes> {
    let buffer = match cached(file, position, BytesMut::zeroed(wanted)) {
        Ok(chunk) => return Ok(chunk),
        Err(buffer) => buffer,
    };
    let file = Arc::clone(file);
    tokio::task::spawn_blocking(move || {
        let mut buffer = buffer;
        let count = std::os::unix::fs::FileExt::read_at(&*file, &mut buffer, position)?;
        buffer.truncate(count);
        Ok(buffer.freeze())
    })
    .await
    .map_err(io::Error::other)?
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
