//! A name server: the names that a test gives it, with their addresses, over UDP and TCP (RFC 1035). All other names do not exist.
//!
//! It answers questions for A and AAAA and no others. What does not fit into 512 bytes is only answered over TCP, and there as much of
//! it as a message can hold: some 4,000 IPv4 addresses. It is silenced from outside, by rules of the network.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::netns::Namespace;

const PORT: u16 = 53;
/// Of an answer over UDP (RFC 1035), and of any message over TCP.
const DATAGRAM: usize = 512;
const MESSAGE: usize = u16::MAX as usize;
/// Bytes of a question that are read: a name has at most 255.
const QUESTION: usize = 1 << 10;
/// Connections at once, and how long one may be silent.
const CONNECTIONS: usize = 64;
const SILENCE: Duration = Duration::from_secs(10);

const HEADER: usize = 12;
const A: u16 = 1;
const AAAA: u16 = 28;
const INTERNET: u16 = 1;
/// An answer, authoritative, with what the question wished for recursion left out.
const ANSWER: u16 = 0x8400;
const TRUNCATED: u16 = 0x0200;
const NO_SUCH_NAME: u16 = 3;

type Names = Arc<Mutex<HashMap<String, Vec<IpAddr>>>>;

/// A running name server. Dropped: gone.
#[derive(Debug)]
pub struct Dns {
    names: Names,
    questions: Arc<AtomicU64>,
    address: IpAddr,
    _serving: AbortOnDropHandle<()>,
}

impl Dns {
    /// Starts one at port 53 of an address of a namespace. It knows no name yet.
    pub fn start(namespace: &Namespace, address: IpAddr) -> Result<Self> {
        let at = SocketAddr::new(address, PORT);
        let bind = || -> io::Result<_> {
            let (datagrams, connections) = (std::net::UdpSocket::bind(at)?, std::net::TcpListener::bind(at)?);
            datagrams.set_nonblocking(true)?;
            connections.set_nonblocking(true)?;
            Ok((datagrams, connections))
        };
        let (datagrams, connections) =
            namespace.run(bind)?.with_context(|| format!("cannot listen at {at}"))?;
        let datagrams = UdpSocket::from_std(datagrams)?;
        let connections = TcpListener::from_std(connections)?;
        let (names, questions) = (Names::default(), Arc::new(AtomicU64::new(0)));
        let server = Server { names: Arc::clone(&names), questions: Arc::clone(&questions) };
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            tokio::join!(server.clone().serve_datagrams(datagrams), server.serve_connections(connections));
        }));
        Ok(Self { names, questions, address, _serving: serving })
    }

    /// Where it answers.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Lets a name have these addresses, of both families; `None`: there is no such name.
    pub fn set(&self, name: &str, addresses: Option<Vec<IpAddr>>) {
        let mut names = lock(&self.names);
        match addresses {
            Some(addresses) => names.insert(name.to_ascii_lowercase(), addresses),
            None => names.remove(&name.to_ascii_lowercase()),
        };
    }

    /// Questions that it has read so far.
    pub fn questions(&self) -> u64 {
        self.questions.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Server {
    names: Names,
    questions: Arc<AtomicU64>,
}

impl Server {
    async fn serve_datagrams(self, socket: UdpSocket) {
        let mut question = [0; QUESTION];
        loop {
            // An error is of a client that has gone.
            let Ok((length, from)) = socket.recv_from(&mut question).await else { continue };
            if let Some(answer) = self.answer(&question[..length], DATAGRAM) {
                let _ = socket.send_to(&answer, from).await;
            }
        }
    }

    async fn serve_connections(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                Ok((stream, _)) = listener.accept(), if connections.len() < CONNECTIONS => {
                    let server = self.clone();
                    connections.spawn(async move { server.serve_connection(stream).await });
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = usize::from(timeout(SILENCE, stream.read_u16()).await??);
            let mut question = vec![0; length.min(QUESTION)];
            timeout(SILENCE, stream.read_exact(&mut question)).await??;
            let Some(answer) = self.answer(&question, MESSAGE) else { return Ok(()) };
            // No longer than `MESSAGE`.
            stream.write_u16(u16::try_from(answer.len()).unwrap_or(u16::MAX)).await?;
            stream.write_all(&answer).await?;
        }
    }

    fn answer(&self, question: &[u8], limit: usize) -> Option<Vec<u8>> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        answer(question, limit, |name| lock(&self.names).get(name).cloned())
    }
}

/// The answer to a message; `None`: it is no question.
fn answer(message: &[u8], limit: usize, find: impl Fn(&str) -> Option<Vec<IpAddr>>) -> Option<Vec<u8>> {
    let number = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let (id, is_answer) = (number(0)?, number(2)? & 0x8000 != 0);
    if is_answer || number(4)? != 1 {
        return None;
    }
    let (mut at, mut name) = (HEADER, String::new());
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        let label = message.get(at..at + length).filter(|_| length < 64)?;
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
    let kind = number(at)?;
    let question = &message[HEADER..at + 4.min(message.len() - at)];
    let addresses = find(&name);
    let records = addresses.iter().flatten().filter_map(|address| match (kind, address) {
        (A, IpAddr::V4(address)) => Some(record(A, &address.octets())),
        (AAAA, IpAddr::V6(address)) => Some(record(AAAA, &address.octets())),
        _ => None,
    });
    let (mut body, mut count, mut flags) = (Vec::new(), 0_u16, ANSWER);
    for record in records {
        if HEADER + question.len() + body.len() + record.len() > limit {
            if limit == DATAGRAM {
                // To be asked again over TCP.
                (flags, count) = (flags | TRUNCATED, 0);
                body.clear();
            }
            break;
        }
        body.extend(record);
        count += 1;
    }
    if addresses.is_none() {
        flags |= NO_SUCH_NAME;
    }
    let header = [id, flags, 1, count, 0, 0];
    let header = header.iter().flat_map(|number| number.to_be_bytes());
    Some(header.chain(question.iter().copied()).chain(body).collect())
}

/// For the name of the question, valid for a second.
fn record(kind: u16, data: &[u8]) -> Vec<u8> {
    const NAME_OF_THE_QUESTION: u16 = 0xc00c;
    let length = u16::try_from(data.len()).unwrap_or_default();
    let head = [NAME_OF_THE_QUESTION, kind, INTERNET, 0, 1, length];
    head.iter().flat_map(|number| number.to_be_bytes()).chain(data.iter().copied()).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(name: &str, kind: u16) -> Vec<u8> {
        let header = [7_u16, 0x0100, 1, 0, 0, 0];
        let mut message: Vec<u8> = header.iter().flat_map(|number| number.to_be_bytes()).collect();
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend([kind, INTERNET].iter().flat_map(|number| number.to_be_bytes()));
        message
    }

    fn number(message: &[u8], at: usize) -> u16 {
        u16::from_be_bytes(message[at..at + 2].try_into().unwrap())
    }

    #[test]
    fn names_are_answered_in_their_family_and_others_do_not_exist() {
        let find = |name: &str| {
            let addresses = ["10.0.0.1", "fd00::1", "10.0.0.2"];
            (name == "peers.test").then(|| addresses.iter().map(|address| address.parse().unwrap()).collect())
        };
        let asked = question("Peers.test", A);
        let said = answer(&asked, DATAGRAM, find).unwrap();
        assert_eq!((number(&said, 0), number(&said, 2), number(&said, 6)), (7, ANSWER, 2));
        assert_eq!(said[HEADER..asked.len()], asked[HEADER..]);
        assert_eq!(said[said.len() - 4..], [10, 0, 0, 2]);
        assert_eq!(number(&answer(&question("peers.test", AAAA), DATAGRAM, find).unwrap(), 6), 1);
        let said = answer(&question("x.test", A), DATAGRAM, find).unwrap();
        assert_eq!((number(&said, 2), number(&said, 6)), (ANSWER | NO_SUCH_NAME, 0));
        for end in 0..asked.len() - 4 {
            assert!(answer(&asked[..end], DATAGRAM, find).is_none(), "{end}");
        }
        assert!(answer(&said, DATAGRAM, find).is_none(), "an answer is no question");
    }

    #[test]
    fn what_is_long_is_answered_over_tcp_as_far_as_it_goes() {
        let many: Vec<IpAddr> =
            (0..5_000_u32).map(|n| IpAddr::from(std::net::Ipv4Addr::from_bits(n))).collect();
        let find = |_: &str| Some(many.clone());
        let short = answer(&question("a.b", A), DATAGRAM, find).unwrap();
        assert_eq!((number(&short, 2), number(&short, 6)), (ANSWER | TRUNCATED, 0));
        let long = answer(&question("a.b", A), MESSAGE, find).unwrap();
        assert!((4_000..5_000).contains(&number(&long, 6)) && long.len() <= MESSAGE, "{}", long.len());
    }
}
