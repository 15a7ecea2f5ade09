//! One suite for the upstreams of the configuration, on real sockets, and for their twin: what the mirror relies on.

use futures::TryStreamExt;

use super::endpoint::Server;
use super::*;
use crate::oci::{ByteRange, Descriptor, Digest, Health, OCTET_STREAM, Repository, Tag};
use crate::upstream::memory::{Fault, MemoryUpstreams};
use crate::upstream::metrics::Metrics;
use crate::upstream::named::{self, Named};
use crate::upstream::{FetchError, Fetched, Route, Upstreams, Want};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// What all hold of `team/app`: a manifest, tagged `v1`, and a blob.
const CONTENTS: [(&str, &str, &str); 2] =
    [("manifests", MANIFEST, "{\"schemaVersion\": 2}"), ("blobs", OCTET_STREAM, "all letters of a layer")];
/// One that does as it should, one whose bodies end after some bytes, and one that is not there.
const NAMES: [&str; 3] = ["cut", "down", "well"];
const CUT: usize = 5;

fn route(upstream: &str, repository: &str) -> Route {
    Route { upstream: upstream.into(), repository: repository.parse().unwrap() }
}

fn want(content: usize) -> Want {
    let (kind, _, text) = CONTENTS[content];
    let digest = Digest::sha256(text.as_bytes());
    Want { digest, is_manifest: kind == "manifests", start: 0, end: None, head: false }
}

/// What came before the body ended, and whether it ended well.
async fn read(mut fetched: Fetched) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    loop {
        match fetched.body.try_next().await {
            Ok(Some(chunk)) => all.extend_from_slice(&chunk),
            Ok(None) => return (all, true),
            Err(_) => return (all, false),
        }
    }
}

async fn suite(upstreams: &dyn Upstreams) {
    assert!(!upstreams.is_empty());
    let known = upstreams.known();
    assert_eq!(known.iter().map(|known| &*known.name).collect::<Vec<_>>(), NAMES);
    assert!(known.iter().all(|known| *known.repositories == ["team".to_owned()]));
    assert!(known.iter().all(|known| known.state.problem.is_none()), "{known:?}");

    tags(upstreams).await;
    contents(upstreams).await;
    for (upstream, repository) in [("well", "other/app"), ("well", "teams/app"), ("nobody", "team/app")] {
        let route = route(upstream, repository);
        assert_eq!(upstreams.resolve(&route, &"v1".parse().unwrap()).await, Err(FetchError::Unknown));
        let fetched = upstreams.fetch(&route, &want(1)).await;
        assert_eq!(fetched.map(drop), Err(FetchError::Unknown), "{upstream}, {repository}");
    }

    // What it has sent before is right, and no more comes than is there.
    let (came, is_whole) = read(upstreams.fetch(&route("cut", "team/app"), &want(1)).await.unwrap()).await;
    assert!(!is_whole && CONTENTS[1].2.as_bytes().starts_with(&came) && came.len() <= CUT, "{came:?}");
    let down = upstreams.fetch(&route("down", "team/app"), &want(1)).await.map(drop);
    assert!(matches!(down, Err(FetchError::Failed(_))), "{down:?}");

    // One that is blamed is left alone for a while, and no other one is.
    upstreams.blame("well", "wrong content");
    upstreams.blame("nobody", "wrong content");
    let held = upstreams.fetch(&route("well", "team/app"), &want(1)).await;
    assert_eq!(held.map(drop), Err(FetchError::Held));
    assert_eq!(
        upstreams.resolve(&route("well", "team/app"), &"v1".parse().unwrap()).await,
        Err(FetchError::Held)
    );
    let known = upstreams.known();
    assert_eq!(
        (known[2].state.health, known[2].state.problem.as_deref()),
        (Health::Degraded, Some("wrong content"))
    );
    assert!(upstreams.fetch(&route("cut", "team/app"), &want(1)).await.is_ok());
}

async fn tags(upstreams: &dyn Upstreams) {
    let at = route("well", "team/app");
    let (_, media_type, text) = CONTENTS[0];
    let expected = Descriptor::new(want(0).digest, text.len() as u64, media_type);
    assert_eq!(upstreams.resolve(&at, &"v1".parse().unwrap()).await, Ok(expected));
    assert_eq!(upstreams.resolve(&at, &"v2".parse().unwrap()).await, Err(FetchError::NotFound));
    let other = route("well", "team/other");
    assert_eq!(upstreams.resolve(&other, &"v1".parse().unwrap()).await, Err(FetchError::NotFound));
}

/// Whole, parts, heads, and what is not there.
async fn contents(upstreams: &dyn Upstreams) {
    let at = route("well", "team/app");
    for (content, (_, media_type, text)) in CONTENTS.into_iter().enumerate() {
        let (want, size) = (want(content), text.len() as u64);
        let described = Descriptor::new(want.digest, size, media_type);
        for head in [false, true] {
            let fetched = upstreams.fetch(&at, &Want { head, ..want }).await.unwrap();
            assert_eq!((&fetched.descriptor, fetched.range), (&described, ByteRange::whole(size)));
            let expected = if head { "" } else { text };
            assert_eq!(read(fetched).await, (expected.as_bytes().to_vec(), true));
        }
        let absent = Want { digest: Digest::sha256(b"nobody has this"), ..want };
        assert_eq!(upstreams.fetch(&at, &absent).await.map(drop), Err(FetchError::NotFound));
        let other = upstreams.fetch(&route("well", "team/other"), &want).await;
        assert_eq!(other.map(drop), Err(FetchError::NotFound), "it is of another repository");
    }
    let text = CONTENTS[1].2;
    let size = text.len() as u64;
    for (start, end) in [(0, Some(4)), (3, Some(9)), (3, None), (size - 1, None), (3, Some(size + 9))] {
        let fetched = upstreams.fetch(&at, &Want { start, end, ..want(1) }).await.unwrap();
        let range = ByteRange { start, end: end.unwrap_or(size).min(size) };
        assert_eq!((fetched.range, fetched.descriptor.size), (range, size), "{start} to {end:?}");
        let part = &text.as_bytes()[range.start as usize..range.end as usize];
        assert_eq!(read(fetched).await, (part.to_vec(), true), "{start} to {end:?}");
    }
    for start in [size, size + 1] {
        let past = upstreams.fetch(&at, &Want { start, ..want(1) }).await;
        assert_eq!(past.map(drop), Err(FetchError::Range), "from {start} on");
    }
}

#[tokio::test]
async fn in_memory() {
    let upstreams = MemoryUpstreams::default();
    assert!(upstreams.is_empty() && upstreams.known().is_empty());
    let (repository, tag): (Repository, Tag) = ("team/app".parse().unwrap(), "v1".parse().unwrap());
    for name in NAMES {
        upstreams.add(name, &["team"]);
        for (kind, media_type, text) in CONTENTS {
            let tag = (kind == "manifests").then_some(&tag);
            upstreams.put(name, &repository, media_type, text.as_bytes(), tag);
        }
    }
    upstreams.set("cut", Fault { cut: Some((CUT as u64, u32::MAX)), ..Fault::default() });
    let refused = FetchError::Failed("refused".into());
    upstreams.set("down", Fault { error: Some(refused), ..Fault::default() });
    suite(&upstreams).await;
}

#[tokio::test]
async fn on_real_sockets() {
    let upstreams = Named::new(Metrics::default());
    assert!(upstreams.is_empty() && upstreams.known().is_empty());
    let well = Server::start(|head| registry(head, false)).await;
    let cut = Server::start(|head| registry(head, true)).await;
    // Free a moment ago.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let addresses = [&cut.address, &nobody, &well.address];
    let configs = NAMES.into_iter().zip(addresses).map(|(name, address)| named::Config {
        name: name.into(),
        address: format!("http://{address}"),
        ca: None,
        credentials: None,
        repositories: vec!["team".into()],
    });
    upstreams.reconfigure(&configs.collect::<Vec<_>>());
    suite(&upstreams).await;
}

/// Answers a request as a registry does that has all contents. `is_cut`: bodies end early.
fn registry(head: &str, is_cut: bool) -> String {
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let found = CONTENTS.into_iter().enumerate().find(|(number, (kind, ..))| {
        let digest = want(*number).digest;
        let names = [format!("/v2/team/app/{kind}/{digest}"), "/v2/team/app/manifests/v1".to_owned()];
        path == names[0] || (*kind == "manifests" && path == names[1])
    });
    let Some((number, (_, media_type, text))) = found else {
        return "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into();
    };
    let range = head.split("range: bytes=").nth(1).map(|rest| rest.split("\r\n").next().unwrap());
    let (mut status, mut range_header, mut body) = ("200 OK", String::new(), text);
    if let Some((start, end)) = range.and_then(|range| range.split_once('-')) {
        let start: usize = start.parse().unwrap();
        let last = end.parse::<usize>().unwrap_or(usize::MAX).min(text.len() - 1);
        (status, body) = match text.get(start..=last) {
            Some(body) if !body.is_empty() => ("206 Partial Content", body),
            _ => ("416 Range Not Satisfiable", ""),
        };
        range_header = format!("Content-Range: bytes {start}-{last}/{}\r\n", text.len());
    }
    let length = body.len();
    let body = match (method, is_cut) {
        ("head", _) => "",
        (_, true) => &body[..body.len().min(CUT)],
        (_, false) => body,
    };
    let digest = want(number).digest;
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Type: {media_type}\r\n\
         Docker-Content-Digest: {digest}\r\nConnection: close\r\n{range_header}\r\n{body}"
    )
}
