//! Raw clients, for tests of servers, and the tests of this one.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt as _;
use futures::future::FutureExt as _;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::*;

/// Above what any step of a test takes.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// An answer as it came over the wire.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) body: Vec<u8>,
    headers: Vec<(String, String)>,
}

impl Reply {
    pub(crate) fn parse(raw: &[u8]) -> Self {
        let end = raw.windows(4).position(|window| window == b"\r\n\r\n").expect("a complete head");
        let head = std::str::from_utf8(&raw[..end]).expect("an ASCII head");
        assert!(head.is_ascii(), "{head}");
        let mut lines = head.split("\r\n");
        let mut line = lines.next().expect("a status line").splitn(3, ' ');
        assert!(line.next().is_some_and(|version| version.starts_with("HTTP/1.")), "{head}");
        let status = line.next().and_then(|status| status.parse().ok()).expect("a status");
        let reason = line.next().unwrap_or_default().to_owned();
        let headers = lines.map(|line| line.split_once(": ").expect("a header"));
        let headers = headers.map(|(key, value)| (key.to_ascii_lowercase(), value.to_owned())).collect();
        Self { status, reason, headers, body: raw[end + 4..].to_vec() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn length(&self) -> usize {
        self.header("content-length").and_then(|length| length.parse().ok()).expect("a length")
    }
}

/// Sends `request` and reads to the FIN; anything but a FIN fails the test.
pub(crate) async fn raw(address: SocketAddr, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    read_to_fin(&mut stream).await
}

pub(crate) async fn read_to_fin(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the answer ends");
    read.expect("a FIN, not an RST");
    bytes
}

/// One request on a connection of its own.
pub(crate) async fn ask(address: SocketAddr, method: &str, target: &str, headers: &str) -> Reply {
    let request = format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    Reply::parse(&raw(address, request.as_bytes()).await)
}

/// Waits for `condition` with a deadline.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn loopback() -> Sockets {
    Sockets::bind("test.listen", &[([127, 0, 0, 1], 0).into()]).unwrap()
}

fn start(limits: Limits, answer: impl Fn(Parts) -> Body + Send + Sync + 'static) -> Server {
    let handler: Handler =
        Arc::new(move |request| std::future::ready(Response::new(answer(request))).boxed());
    Server::start(loopback(), limits, &handler, "test", None)
}

fn limits() -> Limits {
    Limits {
        malformed: Some("HTTP/1.1 404 malformed\r\ncontent-length: 2\r\n\r\nno".into()),
        ..Limits::new(Clients::Loopback.admission(Counter::default()), 8)
    }
}

fn chunks(chunks: Vec<io::Result<Bytes>>) -> futures::stream::BoxStream<'static, io::Result<Bytes>> {
    futures::stream::iter(chunks).boxed()
}

const CHUNK: Bytes = Bytes::from_static(&[7; 100_000]);

/// What a body gives.
type Pieces = fn() -> Vec<io::Result<Bytes>>;

#[tokio::test]
async fn a_failing_body_ends_by_fin_after_all_that_came_before() {
    let cases: [(&str, Pieces, usize); 4] = [
        ("error", || vec![Ok(CHUNK), Err(io::Error::other("cut"))], 100_000),
        ("early end", || vec![Ok(CHUNK)], 100_000),
        ("too long", || vec![Ok(CHUNK), Ok(CHUNK), Ok(CHUNK)], 200_000),
        ("at once", || vec![Err(io::Error::other("cut"))], 0),
    ];
    for (what, body, before) in cases {
        let server = start(limits(), move |_| Body::stream(chunks(body()), 250_000));
        // The second request is never answered, and makes unread bytes at the server's end.
        for extra in [0, 60_000, 300_000] {
            let mut request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
            request.extend_from_slice(&vec![b'x'; extra]);
            let reply = Reply::parse(&raw(server.addresses()[0], &request).await);
            assert_eq!((reply.status, reply.length()), (200, 250_000), "{what}");
            assert_eq!(reply.body.len(), before, "{what}, {extra}");
        }
    }
}

#[tokio::test]
async fn a_panic_in_a_body_is_a_failure_of_it() {
    let server = start(limits(), |_| {
        let stream = chunks(vec![Ok(CHUNK)]).chain(futures::stream::poll_fn(|_| panic!("a bug")));
        Body::stream(stream.boxed(), 200_000)
    });
    let reply = ask(server.addresses()[0], "GET", "/", "").await;
    assert_eq!((reply.length(), reply.body.len()), (200_000, 100_000));
}

#[tokio::test]
async fn what_is_not_http_gets_our_answer() {
    let server = start(limits(), |_| Body::full("ok"));
    let long = "a".repeat(100_000);
    let many = "x: y\r\n".repeat(300);
    for request in [
        "nonsense\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        "GET /a b HTTP/1.1\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nbad header\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nx: {long}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{many}\r\n"),
    ] {
        let reply = Reply::parse(&raw(server.addresses()[0], request.as_bytes()).await);
        assert_eq!(
            (reply.status, reply.reason.as_str()),
            (404, "malformed"),
            "{}",
            &request[..20.min(request.len())]
        );
        assert_eq!(reply.body, b"no");
    }
    // After a good request on the same connection too.
    let both = raw(server.addresses()[0], b"GET / HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n").await;
    let text = String::from_utf8(both).unwrap();
    assert!(
        text.starts_with("HTTP/1.1 200 OK")
            && text.ends_with("HTTP/1.1 404 malformed\r\ncontent-length: 2\r\n\r\nno"),
        "{text}"
    );
}

#[tokio::test]
async fn a_body_that_looks_like_an_automatic_answer_is_left_alone() {
    const FAKE: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
    let server = start(limits(), |_| {
        let pieces = chunks(vec![Ok(Bytes::from_static(b"first"))]);
        let pause = futures::stream::once(async {
            // Lets the first piece be flushed, so that the second is a write of its own.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            Ok(Bytes::from_static(FAKE))
        });
        Body::stream(pieces.chain(pause).boxed(), 6 + FAKE.len() as u64)
    });
    let reply = ask(server.addresses()[0], "GET", "/", "").await;
    assert_eq!(reply.body, [b"first", FAKE].concat());
}

#[tokio::test]
async fn connections_are_bounded_and_slots_come_back() {
    let answer =
        |head: Parts| Body::full(if head.extensions.get::<Overloaded>().is_some() { "no" } else { "ok" });
    let server = start(Limits { connections: 2, ..limits() }, answer);
    let address = server.addresses()[0];
    let request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 1);
        held.push(stream);
    }
    // One too many is told so, once, even if it would send more.
    let told = Reply::parse(&raw(address, &request.repeat(2)).await);
    assert_eq!((told.body.as_slice(), told.header("connection")), (b"no".as_slice(), Some("close")));
    // Those that say nothing cannot pile up.
    let mut silent = Vec::new();
    for _ in 0..OVERLOADED {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut closed = TcpStream::connect(address).await.unwrap();
    let read = tokio::time::timeout(SOON, closed.read(&mut [0; 1])).await;
    assert!(matches!(read.expect("it is closed, it does not wait"), Ok(0) | Err(_)));
    assert_eq!(read_to_fin(&mut silent[0]).await, b"");
    drop((held, silent));
    let retry = async { while ask(address, "GET", "/", "").await.body != b"ok" {} };
    tokio::time::timeout(SOON, retry).await.expect("a slot comes back");
}

#[tokio::test]
async fn slow_heads_and_idle_connections_end() {
    let server = start(Limits { head: Duration::from_millis(100), ..limits() }, |_| Body::full("ok"));
    assert_eq!(raw(server.addresses()[0], b"GET / HT").await, b"");
    let idle = raw(server.addresses()[0], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(Reply::parse(&idle).body, b"ok");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off_and_holds_little() {
    let given = Arc::new(AtomicUsize::new(0));
    let (sender, mut ended) = mpsc::channel::<()>(1);
    let count = Arc::clone(&given);
    let server = start(Limits { write: Duration::from_millis(200), ..limits() }, move |_| {
        let count = Arc::clone(&count);
        let endless = futures::stream::repeat_with(move || {
            count.fetch_add(CHUNK.len(), Ordering::Relaxed);
            Ok(CHUNK)
        });
        Body::stream(endless.boxed(), 1 << 40).guarded(sender.clone())
    });
    let mut stream = TcpStream::connect(server.addresses()[0]).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream.readable().await.unwrap();
    eventually("the client is cut off", || {
        // Both ends' socket buffers on loopback take a few MiB, the server itself one chunk.
        assert!(given.load(Ordering::Relaxed) < 16 << 20);
        server.loops.len() == 1 && given.load(Ordering::Relaxed) > 0
    })
    .await;
    drop(server);
    assert!(tokio::time::timeout(SOON, ended.recv()).await.expect("the body is dropped").is_none());
}

#[tokio::test]
async fn draining_ends_idle_connections_and_lets_answers_end() {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(1);
    let receiver = std::sync::Mutex::new(Some(receiver));
    let server = start(limits(), move |_| match receiver.lock().unwrap().take() {
        Some(mut receiver) => {
            Body::stream(futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed(), 4)
        }
        None => Body::full("ok"),
    });
    let address = server.addresses()[0];
    let mut busy = TcpStream::connect(address).await.unwrap();
    busy.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    sender.send(Ok("ab".into())).await.unwrap();
    busy.readable().await.unwrap();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    idle.readable().await.unwrap();
    let drain = tokio::spawn(server.drain(SOON));
    assert_eq!(Reply::parse(&read_to_fin(&mut idle).await).body, b"ok");
    assert!(TcpStream::connect(address).await.is_err());
    sender.send(Ok("cd".into())).await.unwrap();
    assert_eq!(Reply::parse(&read_to_fin(&mut busy).await).body, b"abcd");
    drop((busy, idle));
    assert!(drain.await.unwrap());
}

#[tokio::test]
async fn draining_has_a_limit() {
    let server = start(limits(), |_| Body::stream(futures::stream::pending().boxed(), 4));
    let mut stream = TcpStream::connect(server.addresses()[0]).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream.readable().await.unwrap();
    assert!(!server.drain(Duration::from_millis(50)).await);
    let reply = Reply::parse(&read_to_fin(&mut stream).await);
    assert_eq!((reply.length(), reply.body.len()), (4, 0));
}

#[tokio::test]
async fn an_address_in_use_is_named_with_a_hint() {
    let taken = loopback();
    let address = taken.addresses()[0];
    let error = Sockets::bind("test.listen", &[address]).unwrap_err().to_string();
    let expected = format!(
        "cannot listen at {address} (`test.listen`): Address already in use (os error 98)\nhint: another program listens there, \
         perhaps a second peili: `ss -ltnp 'sport = :{}'` names it; stop it or change `test.listen`",
        address.port()
    );
    assert_eq!(error, expected);
    let none = Sockets::bind("test.listen", &[]).unwrap_err().to_string();
    assert_eq!(none, "`test.listen` names no address");
}

#[test]
fn only_loopback_without_leave() {
    let check = |address: &str, clients: Clients| {
        clients.check(&[address.parse().unwrap()], ("a.listen", "a.clients"), "all can read")
    };
    for address in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert_eq!(check(address, Clients::Loopback), Ok(()), "{address}");
    }
    for address in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1", "[fe80::1]:1"] {
        assert!(check(address, Clients::Loopback).is_err(), "{address}");
        assert_eq!(check(address, Clients::Node), Ok(()), "{address}");
        assert_eq!(check(address, Clients::All), Ok(()), "{address}");
    }
    insta::assert_snapshot!(check("0.0.0.0:1", Clients::Loopback).unwrap_err(), @r"
    `a.listen`: 0.0.0.0:1 is not a loopback address: all can read
    hint: use 127.0.0.1 or [::1], or set `a.clients`: `node` in a pod with a network of its own, `all` to take the risk
    ");
}

/// Runs the test of the same name again in a process of its own, where it may spoil the limits.
fn alone(name: &str) -> bool {
    const INNER: &str = "PEILI_TEST_ALONE";
    if std::env::var_os(INNER).is_some() {
        return true;
    }
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("listener::tests::{name}"), "--exact", "--test-threads=1"])
        .env(INNER, "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && output.contains("1 passed"), "{output}");
    false
}

#[test]
fn exhausted_descriptors_close_new_connections_and_do_not_stop_the_loop() {
    if !alone("exhausted_descriptors_close_new_connections_and_do_not_stop_the_loop") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = start(limits(), |_| Body::full("ok"));
        let address = server.addresses()[0];
        // A client that needs no new descriptor later.
        let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        let mut open = Vec::new();
        let limit = rustix::process::Rlimit { current: Some(128), maximum: Some(4096) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            open.push(file);
        }
        // Connecting goes on in the background: the backlog takes it.
        let _ = client.connect(&address.into());
        let client = TcpStream::from_std(client.into()).unwrap();
        client.writable().await.unwrap();
        let closed = async {
            loop {
                client.readable().await.unwrap();
                match client.try_read(&mut [0; 1]) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
            }
        };
        let closed =
            tokio::time::timeout(SOON, closed).await.expect("the connection is closed, it does not hang");
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
        open.clear();
        assert_eq!(ask(address, "GET", "/", "").await.body, b"ok");
    });
}
