//! A client of the registry that does what a runtime would not: many connections, slow ones, odd ranges.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a header.
const SOON: Duration = Duration::from_secs(10);

/// A client on one connection, as the runtime of the node that asks.
pub(super) struct Client {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(super) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self { address, stream: BufReader::new(stream) }
    }

    /// Sends a request and reads the header: the status and the length of the body.
    pub(super) fn send(&mut self, path: &str, header: &str) -> (u16, u64) {
        let address = self.address;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{header}\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).unwrap();
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).unwrap();
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                return (status, length);
            }
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest[..3].parse().unwrap();
            }
            if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse().unwrap();
            }
        }
    }

    /// Reads so much of a body, and says how much came.
    pub(super) fn read(&mut self, length: u64) -> u64 {
        std::io::copy(&mut self.stream.by_ref().take(length), &mut std::io::sink()).unwrap()
    }
}
