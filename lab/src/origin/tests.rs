//! The origin against a plain client: it counts right and misbehaves as asked.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::*;
use crate::http::request;

fn fixture() -> (Origin, Image) {
    let origin = Origin::start().unwrap();
    let image = Image::builder("library/app", "v1").layer(100_000).layer(9 << 20).build().unwrap();
    origin.add(&image);
    (origin, image)
}

fn blob(digest: Digest) -> String {
    format!("/v2/library/app/blobs/{digest}")
}

#[test]
fn serves_and_counts() {
    let (origin, image) = fixture();
    let head = request(origin.address(), "HEAD", "/v2/library/app/manifests/v1?ns=lab.io").unwrap();
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("docker-content-digest"), Some(&image.root.to_string()[..]));
    let manifest =
        request(origin.address(), "GET", &format!("/v2/library/app/manifests/{}", image.root)).unwrap();
    assert_eq!(Digest::sha256(&manifest.body), image.root);
    for digest in &image.layers {
        let answer = request(origin.address(), "GET", &blob(*digest)).unwrap();
        assert_eq!((answer.status, Digest::sha256(&answer.body)), (200, *digest));
    }
    assert_eq!(request(origin.address(), "GET", "/v2/other/manifests/v1").unwrap().status, 404);
    let counts = origin.counts();
    assert_eq!((counts.manifest_requests, counts.blob_requests), (2, 2));
    assert_eq!(counts.manifest_bytes, manifest.body.len() as u64);
    assert_eq!((counts.blob_bytes, origin.layer_bytes(&image)), (image.layer_bytes(), image.layer_bytes()));
    let requests = origin.requests();
    assert_eq!(
        (requests[0].ns.as_deref(), requests[0].status, &requests[0].method[..]),
        (Some("lab.io"), 200, "HEAD")
    );
    origin.reset();
    assert_eq!((origin.counts(), origin.requests()), (Counts::default(), Vec::new()));
}

#[test]
fn ranges() {
    let (origin, image) = fixture();
    let (digest, size) = (image.layers[1], image.blobs[&image.layers[1]].size);
    let whole = image.blobs[&digest].read().unwrap();
    let check = |range: &str, status: &str, start: u64, end: u64| {
        let mut stream = TcpStream::connect(origin.address()).unwrap();
        write!(stream, "GET {} HTTP/1.0\r\nRange: {range}\r\n\r\n", blob(digest)).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert!(bytes.starts_with(format!("HTTP/1.0 {status}").as_bytes()), "{range}");
        assert!(bytes.ends_with(&whole[start as usize..end as usize]), "{range}");
    };
    check("bytes=0-", "206", 0, size);
    check("bytes=8388608-", "206", 8 << 20, size);
    check("bytes=10-19", "206", 10, 20);
    check("bytes=-7", "206", size - 7, size);
    check(&format!("bytes={size}-"), "416", 0, 0);
}

#[test]
fn misbehaves_as_asked() {
    let (origin, image) = fixture();
    let layer = blob(image.layers[0]);
    origin.behave(|behaviour| {
        behaviour.status = Some(429);
        behaviour.scope = Scope::Manifests;
    });
    assert_eq!(request(origin.address(), "GET", "/v2/library/app/manifests/v1").unwrap().status, 429);
    assert_eq!(request(origin.address(), "GET", &layer).unwrap().status, 200);
    origin.behave(|behaviour| *behaviour = Behaviour { cut_after: Some(1000), ..Behaviour::default() });
    assert_eq!(request(origin.address(), "GET", &layer).unwrap().body.len(), 1000);
    origin.behave(|behaviour| *behaviour = Behaviour { rate: Some(200_000), ..Behaviour::default() });
    let started = std::time::Instant::now();
    assert_eq!(request(origin.address(), "GET", &layer).unwrap().body.len(), 100_000);
    assert!(started.elapsed() >= Duration::from_millis(490));
    origin.behave(|behaviour| *behaviour = Behaviour { hang: true, ..Behaviour::default() });
    let mut stream = TcpStream::connect(origin.address()).unwrap();
    write!(stream, "GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(stream.read(&mut [0]).is_err());
}

#[test]
fn refuses_and_comes_back() {
    let (origin, _image) = fixture();
    origin.refuse();
    let error = TcpStream::connect(origin.address()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    origin.accept();
    assert_eq!(request(origin.address(), "GET", "/v2/").unwrap().status, 200);
}

#[test]
fn private_repositories_need_the_password() {
    for challenge in [Challenge::Basic, Challenge::Bearer] {
        let (origin, _image) = fixture();
        origin.set_password("library/app", "user", "password", challenge);
        let answer = request(origin.address(), "GET", "/v2/library/app/manifests/v1").unwrap();
        assert_eq!(answer.status, 401);
        let asked = answer.header("www-authenticate").unwrap();
        assert!(asked.starts_with(&format!("{challenge:?}")), "{asked}");
    }
}
