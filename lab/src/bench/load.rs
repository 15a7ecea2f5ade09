//! The client: one connection that is kept, whose bodies are read and dropped.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peili_lab::Namespace;

/// Longest pause of a server.
const LIMIT: Duration = Duration::from_secs(30);
/// Read at once: so large that the client costs little.
const BUFFER: usize = 1 << 20;

/// A connection to a server.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
    address: SocketAddr,
}

/// What an answer was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Bytes of its body.
    pub(crate) bytes: u64,
    /// From the request to the last byte.
    pub(crate) elapsed: Duration,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream =
            TcpStream::connect_timeout(&address, LIMIT).with_context(|| format!("cannot reach {address}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; BUFFER], address })
    }

    /// One request and its whole answer.
    pub(crate) fn request(&mut self, method: &str, path: &str) -> Result<Answer> {
        let began = Instant::now();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        self.stream.write_all(request.as_bytes())?;
        let mut filled = 0;
        let head = loop {
            let count = self.stream.read(&mut self.buffer[filled..])?;
            ensure!(count > 0, "{path}: the connection ended in the header");
            filled += count;
            if let Some(end) = self.buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let text = String::from_utf8_lossy(&self.buffer[..head]).to_ascii_lowercase();
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
        let bytes = if method == "HEAD" { 0 } else { length.context("no Content-Length")? };
        let mut left = bytes - ((filled - head) as u64).min(bytes);
        while left > 0 {
            let count = self.stream.read(&mut self.buffer)?;
            ensure!(count > 0, "{path}: the connection ended {left} bytes early");
            left = left.saturating_sub(count as u64);
        }
        Ok(Answer { status, bytes, elapsed: began.elapsed() })
    }
}

/// Runs `work` with a connection to `address`, inside `namespace`, off the executor.
pub(crate) async fn with<T: Send + 'static>(
    namespace: Option<Namespace>,
    address: SocketAddr,
    work: impl FnOnce(&mut Client) -> Result<T> + Send + 'static,
) -> Result<T> {
    let connected = move || Client::connect(address).and_then(|mut client| work(&mut client));
    tokio::task::spawn_blocking(move || match namespace {
        Some(namespace) => namespace.run(connected)?,
        None => connected(),
    })
    .await?
}
