//! A few bytes over HTTP from wherever a port is reachable: health, status and metrics of a node.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Namespace;

/// Most that is read of an answer.
const LIMIT: u64 = 64 << 20;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Header lines as they came.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value; its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// GET, seen from `namespace`; off the executor.
pub async fn get(namespace: Option<&Namespace>, address: SocketAddr, path: &str) -> Result<Answer> {
    send(namespace, address, "GET", path, &[]).await
}

/// Any request, with header lines (`Range: bytes=0-1`), seen from `namespace`; off the executor.
pub async fn send(
    namespace: Option<&Namespace>,
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
) -> Result<Answer> {
    let (namespace, method, path) = (namespace.cloned(), method.to_owned(), path.to_owned());
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let send = move || match namespace {
        Some(namespace) => namespace.run(move || exchange(address, &method, &path, &headers))?,
        None => exchange(address, &method, &path, &headers),
    };
    tokio::task::spawn_blocking(send).await?
}

/// One request on a connection of its own, in HTTP/1.0 so that the body needs no decoding; 5 s for each step.
pub fn request(address: SocketAddr, method: &str, path: &str) -> Result<Answer> {
    exchange(address, method, path, "")
}

/// `further`: header lines, each with its end.
fn exchange(address: SocketAddr, method: &str, path: &str, further: &str) -> Result<Answer> {
    let limit = Duration::from_secs(5);
    let mut stream =
        TcpStream::connect_timeout(&address, limit).with_context(|| format!("cannot reach {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n{further}\r\n")?;
    let mut bytes = Vec::new();
    stream.take(LIMIT).read_to_end(&mut bytes)?;
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").context("no end of the headers")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .and_then(|status| status.parse().ok())
        .context("no status line")?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect();
    Ok(Answer { status, headers, body: bytes.split_off(end + 4) })
}
