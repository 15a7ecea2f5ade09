//! One connection of a client, from accept to FIN.

use std::convert::Infallible;
use std::future::Future as _;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _, poll_fn};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::socket::{Exchange, Socket};
use super::{Body, Handler, Limits, OVERLOADED_HEAD, Overloaded};

/// Bytes that hyper reads ahead for a head, and collects of an answer before it waits for the client: so large that a
/// chunk of the store goes through in one call, and a slow reader holds one chunk. Heads above it are malformed.
const BUFFER: usize = 64 << 10;

/// After our FIN, the client's bytes are read for so long: closing with unread bytes would send an RST, which can destroy
/// what the client has not read yet.
const LINGER: Duration = Duration::from_secs(2);

/// And no more than so many of them.
const LINGER_BYTES: usize = 1 << 20;

/// A request's body is dropped unread; hyper then closes the connection after the answer.
struct Service {
    handler: Handler,
    exchange: Arc<Exchange>,
    overloaded: bool,
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.exchange.begin();
        let exchange = Arc::clone(&self.exchange);
        let mut head = request.into_parts().0;
        if self.overloaded {
            head.extensions.insert(Overloaded);
        }
        let answer = (self.handler)(head);
        answer
            .map(|mut response| {
                response.body_mut().attach(exchange);
                Ok(response)
            })
            .boxed()
    }
}

/// Serves until the client or `stop` ends it; an answer under way is finished first. One that is `overloaded` gets one
/// answer.
pub(super) async fn serve(
    stream: TcpStream,
    limits: &Limits,
    handler: Handler,
    stop: &CancellationToken,
    overloaded: bool,
) {
    // A head and a body's end must not wait for an acknowledgement. Failing only makes it slower.
    let _ = stream.set_nodelay(true);
    let exchange = Arc::new(Exchange::default());
    let socket = Socket::new(stream, Arc::clone(&exchange), limits.malformed.clone(), limits.write);
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if overloaded { limits.head.min(OVERLOADED_HEAD) } else { limits.head })
        .keep_alive(!overloaded)
        .max_buf_size(BUFFER)
        .max_header_size(BUFFER)
        .writev(true)
        .serve_connection(socket, Service { handler, exchange, overloaded });
    let mut stopped = pin!(stop.cancelled());
    let mut stopping = false;
    let ended = poll_fn(|context| {
        if !stopping && stopped.as_mut().poll(context).is_ready() {
            stopping = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        connection.poll_without_shutdown(context)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of a client ended early");
    }
    // Drops the body, so that nothing is fetched for a client that is gone.
    close(connection.into_parts().io.into_stream()).await;
}

/// FIN, and no RST.
async fn close(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let drained = async {
        let mut buffer = [0; 4096];
        let mut left = LINGER_BYTES;
        while let Ok(count) = stream.read(&mut buffer).await {
            if count == 0 || left < count {
                return;
            }
            left -= count;
        }
    };
    // The limit only bounds the wait; there is nothing to do about a client that keeps its end open.
    let _ = tokio::time::timeout(LINGER, drained).await;
}
