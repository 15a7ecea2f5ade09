//! What carries a connection: TCP, whose dead are found by the kernel, TLS with the node's identity, and yamux. Not what is
//! said on it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, TryFutureExt};
use futures::io::{AsyncRead, AsyncWrite, BufWriter};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::Boxed;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo, Version};
use libp2p::{PeerId, Transport as _, tcp, tls, yamux};
use socket2::{SockRef, TcpKeepalive};

use super::behaviour::STREAMS;
use crate::network::identity::Identity;

/// TLS and yamux of who connects here: one who proves no identity takes the place of others for so long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// Streams that are open, or opened and not yet looked at. Far above what both sides' protocols open, so that it is
/// never a connection's end by mistake; each may hold a window of 256 KiB.
const OPEN_STREAMS: usize = 4 * STREAMS;
/// Where nothing is said for so long, the kernel asks whether the other end is there. Neighbours ask each other more often.
const KEEPALIVE: Duration = Duration::from_secs(45);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// What the other end's kernel does not confirm for so long ends the connection; without it, after a quarter of an hour. With
/// it, the number of questions does not count (tcp(7), TCP_USER_TIMEOUT).
const UNCONFIRMED: Duration = Duration::from_secs(15);
/// Yamux writes a frame's header, its body and the next frame one after the other. What is smaller than this together becomes
/// one TLS record and one packet.
const RECORD: usize = 2048;

pub(super) fn transport(identity: &Identity) -> Result<Boxed<(PeerId, StreamMuxerBox)>, String> {
    let mut streams = yamux::Config::default();
    streams.set_max_num_streams(OPEN_STREAMS);
    let security = tls::Config::new(identity.keypair()).map_err(|error| error.to_string())?;
    let transport = tcp::tokio::Transport::new(tcp::Config::new().nodelay(true))
        .map(|stream, _| {
            if let Err(error) = watch(&SockRef::from(&stream.0)) {
                tracing::debug!(%error, "the kernel does not watch a connection");
            }
            stream
        })
        .upgrade(Version::V1Lazy)
        .authenticate(Whole(security))
        .multiplex(streams)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    Ok(TransportTimeout::with_ingoing_timeout(transport, HANDSHAKE_TIMEOUT).boxed())
}

fn watch(socket: &SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNCONFIRMED))
}

/// A stream that sends what one turn of its task writes as one record: it is flushed at the second time of asking, when
/// nothing was written since the first.
struct Records<S> {
    stream: BufWriter<S>,
    is_written: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Records<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Records<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.is_written = true;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.is_written) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}

/// A security protocol whose streams are [`Records`].
#[derive(Clone)]
struct Whole<U>(U);

type Upgrade<S, E> = BoxFuture<'static, Result<(PeerId, Records<S>), E>>;

fn records<S: AsyncWrite>((peer, stream): (PeerId, S)) -> (PeerId, Records<S>) {
    (peer, Records { stream: BufWriter::with_capacity(RECORD, stream), is_written: false })
}

impl<U: UpgradeInfo> UpgradeInfo for Whole<U> {
    type Info = U::Info;
    type InfoIter = U::InfoIter;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.protocol_info()
    }
}

impl<C, S, U> InboundConnectionUpgrade<C> for Whole<U>
where
    U: InboundConnectionUpgrade<C, Output = (PeerId, S), Future: Send + 'static>,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    type Output = (PeerId, Records<S>);
    type Error = U::Error;
    type Future = Upgrade<S, U::Error>;

    fn upgrade_inbound(self, socket: C, info: Self::Info) -> Self::Future {
        self.0.upgrade_inbound(socket, info).map_ok(records).boxed()
    }
}

impl<C, S, U> OutboundConnectionUpgrade<C> for Whole<U>
where
    U: OutboundConnectionUpgrade<C, Output = (PeerId, S), Future: Send + 'static>,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    type Output = (PeerId, Records<S>);
    type Error = U::Error;
    type Future = Upgrade<S, U::Error>;

    fn upgrade_outbound(self, socket: C, info: Self::Info) -> Self::Future {
        self.0.upgrade_outbound(socket, info).map_ok(records).boxed()
    }
}
