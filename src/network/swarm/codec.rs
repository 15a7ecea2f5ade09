//! Messages on a stream: a length in four bytes, big-endian, and the message.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response};

use crate::network::versions;

use super::message::{MESSAGE_LIMIT, Message, decode, encode};

/// The names of the control protocol that are spoken, the best first.
pub(super) fn protocols() -> Vec<StreamProtocol> {
    stream_protocols("/peili/control/")
}

/// A protocol's names, by what comes before the number of its version.
pub(super) fn stream_protocols(prefix: &str) -> Vec<StreamProtocol> {
    versions::names(prefix).filter_map(|name| StreamProtocol::try_from_owned(name).ok()).collect()
}

/// One of them, in words.
pub(super) fn either(protocols: &[StreamProtocol]) -> String {
    protocols.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

/// A request, or why it cannot be read: libp2p reports no failure to read one.
pub(super) type Request = Result<Message, String>;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Codec;

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Request;
    type Response = Message;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Request>
    where
        T: AsyncRead + Unpin + Send,
    {
        match read(io, MESSAGE_LIMIT).await {
            Ok(message) => Ok(Ok(message)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Message>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io, MESSAGE_LIMIT).await
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: Request) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &request.map_err(io::Error::other)?).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, message: Message) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &message).await
    }
}

async fn read<T: AsyncRead + Unpin + Send>(io: &mut T, limit: usize) -> io::Result<Message> {
    let bytes = read_framed(io, limit).await?;
    decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

async fn write<T: AsyncWrite + Unpin + Send>(io: &mut T, message: &Message) -> io::Result<()> {
    write_framed(io, &encode(message)).await
}

/// Reads what [`write_framed`] wrote.
pub(super) async fn read_framed<T: AsyncRead + Unpin + Send>(
    io: &mut T,
    limit: usize,
) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        let text = format!("a message of {length} bytes, more than {limit}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    // Grows with what arrives: a length that is only claimed takes no memory.
    let mut bytes = Vec::new();
    (&mut *io).take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

/// Writes `bytes` after their length, in one piece.
pub(super) async fn write_framed<T: AsyncWrite + Unpin + Send>(io: &mut T, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    io.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await
}
