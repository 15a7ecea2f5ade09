//! The OCI distribution API as a runtime uses it, of the node that holds and of one that asks it, and `peili pull`.

use peili::oci::{Algorithm, Digest};
use peili_lab::{Image, Node};
use serde_json::{Value, json};

use super::{Pair, peili, text};
use crate::Case;
use crate::cluster::REGISTRY;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("cli::registry::distribution", &[], distribution),
        Case::new("cli::registry::pull", &[], pull),
    ]
}

/// `/v2/REPOSITORY/KIND/REFERENCE` with the registry as containerd names it.
fn path(image: &Image, kind: &str, reference: impl std::fmt::Display) -> String {
    format!("/v2/{}/{kind}/{reference}?ns={REGISTRY}", image.repository)
}

async fn distribution() {
    let image = Image::builder("library/app", "v1").layer(100_000).build().unwrap();
    let pair = Pair::start(&[&image], &json!({})).await;
    pair.known().await;
    for node in [&pair.holder, &pair.other] {
        manifests(node, &image).await;
        blobs(node, &image).await;
        refusals(node, &image).await;
    }
}

async fn manifests(node: &Node, image: &Image) {
    let manifest = &image.blobs[&image.root];
    assert_eq!(node.fetch("/v2/").await.unwrap().status, 200);
    let digest = image.root.to_string();
    // The registry does not exist, so that peers are asked about the tag.
    for (reference, what) in [(&digest[..], "by digest"), ("v1", "by tag")] {
        let with_ns = path(image, "manifests", reference);
        let in_path = format!("/v2/{REGISTRY}/{}/manifests/{reference}", image.repository);
        for path in [with_ns, in_path] {
            for method in ["HEAD", "GET"] {
                let answer = node.request(method, &path, &["Authorization: Basic eDp5"]).await.unwrap();
                assert_eq!(answer.status, 200, "{method} {what} at {}", node.plan.name);
                assert_eq!(answer.header("content-type"), Some(&manifest.media_type[..]));
                assert_eq!(answer.header("content-length"), Some(&manifest.size.to_string()[..]));
                assert_eq!(answer.header("docker-content-digest"), Some(&digest[..]));
                assert_eq!(answer.header("content-encoding"), None);
                let body = if method == "GET" { manifest.read().unwrap() } else { bytes::Bytes::new() };
                assert_eq!(answer.body, body);
            }
        }
    }
}

async fn blobs(node: &Node, image: &Image) {
    let layer = image.layers[0];
    let content = image.blobs[&layer].read().unwrap();
    let path = path(image, "blobs", layer);
    let check = async |range: Option<&str>, status: u16, from: usize, to: usize| {
        let lines: Vec<String> = range.iter().map(|range| format!("Range: bytes={range}")).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let answer = node.request("GET", &path, &lines).await.unwrap();
        let name = &node.plan.name;
        assert_eq!(answer.status, status, "{range:?} at {name}");
        assert!(answer.body == content[from..to], "{range:?} at {name}: {} bytes", answer.body.len());
        assert_eq!(answer.header("content-length"), Some(&(to - from).to_string()[..]), "{range:?}");
        assert_eq!(answer.header("docker-content-digest"), Some(&layer.to_string()[..]));
        if status == 206 {
            let expected = format!("bytes {from}-{}/{}", to - 1, content.len());
            assert_eq!(answer.header("content-range"), Some(&expected[..]));
        }
    };
    let size = content.len();
    check(None, 200, 0, size).await;
    check(Some("0-"), 206, 0, size).await;
    check(Some("5-9"), 206, 5, 10).await;
    check(Some("99990-"), 206, 99_990, size).await;
    check(Some("-10"), 206, size - 10, size).await;
    check(Some("99990-999999"), 206, 99_990, size).await;
    check(Some("-999999"), 206, 0, size).await;
    let beyond = format!("Range: bytes={size}-");
    let answer = node.request("GET", &path, &[&beyond]).await.unwrap();
    assert_eq!(answer.status, 416);
    assert_eq!(answer.header("content-range"), Some(&format!("bytes */{size}")[..]));
    let answer = node.request("HEAD", &path, &[]).await.unwrap();
    assert_eq!((answer.status, answer.body.len()), (200, 0));
    assert_eq!(answer.header("content-length"), Some(&size.to_string()[..]));
}

async fn refusals(node: &Node, image: &Image) {
    let unknown = Digest::sha256(b"unknown");
    let signature = format!("sha256-{}", image.root.hex());
    let cases = [
        ("GET", path(image, "manifests", unknown), "MANIFEST_UNKNOWN"),
        ("GET", path(image, "manifests", "no-such-tag"), "MANIFEST_UNKNOWN"),
        ("GET", path(image, "blobs", unknown), "BLOB_UNKNOWN"),
        ("GET", path(image, "blobs", "sha256:12"), "DIGEST_INVALID"),
        ("GET", path(image, "manifests", &signature), "UNSUPPORTED"),
        ("GET", path(image, "manifests", format!("{signature}.sig")), "UNSUPPORTED"),
        ("GET", path(image, "referrers", image.root), "UNSUPPORTED"),
        ("GET", path(image, "tags", "list"), "UNSUPPORTED"),
        ("POST", path(image, "blobs", "uploads/"), "UNSUPPORTED"),
        ("PUT", path(image, "manifests", "v1"), "UNSUPPORTED"),
        ("DELETE", path(image, "manifests", image.root), "UNSUPPORTED"),
        ("GET", "/v1/".to_owned(), "UNSUPPORTED"),
    ];
    for (method, path, code) in cases {
        let answer = node.request(method, &path, &[]).await.unwrap();
        assert_eq!(answer.status, 404, "{method} {path}");
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{method} {path}: {body}");
        assert!(body["errors"][0]["detail"]["cause"].is_string(), "{body}");
        assert_eq!(answer.header("www-authenticate"), None);
    }
}

/// `peili pull` from one node's layout through another node, of what CRI cannot pull: sha512, charts, signatures.
async fn pull() {
    let sha512 = Image::builder("library/long", "v1").layers(3, 1 << 20).algorithm(Algorithm::Sha512);
    let sha512 = sha512.build().unwrap();
    let chart = Image::helm_chart("charts/app", "1.2.3");
    let signature = Image::cosign_signature(&chart);
    let pair = Pair::start(&[&sha512, &chart, &signature], &json!({})).await;
    pair.known().await;
    let host = format!("{}/v2", pair.other.registry_url());
    for (number, image) in [&sha512, &chart, &signature].into_iter().enumerate() {
        let folder = pair.scratch.path().join(format!("pulled-{number}"));
        let to = format!("layout:{}", folder.display());
        // A signature's tag is always upstream's to resolve.
        let reference = image.digest_reference(REGISTRY);
        let output = peili(&["pull", &reference, "--to", &to, "--host", &host, "--json"]).await;
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        for (digest, blob) in &image.blobs {
            let file = folder.join("blobs").join(digest.algorithm().as_str()).join(digest.hex());
            assert!(std::fs::read(file).unwrap() == blob.read().unwrap(), "{digest}");
        }
    }
    let bytes = pair.other.status().await.unwrap()["served"]["from_peers"]["bytes"].as_u64().unwrap();
    assert!(bytes >= sha512.layer_bytes());
    let to = format!("layout:{}", pair.scratch.path().join("none").display());
    let reference = format!("{REGISTRY}/no/such:v1");
    let output = peili(&["pull", &reference, "--to", &to, "--host", &host]).await;
    assert_eq!(output.status.code(), Some(1));
    // Without a terminal the progress is plain lines; here why the host failed.
    let said = text(&output.stderr);
    assert!(said.starts_with("http://") && said.contains("404") && said.contains("\nerror: "), "{said}");
    let output = peili(&["pull", &reference, "--to", &to, "--host", &host, "--quiet"]).await;
    assert!(text(&output.stderr).starts_with("error: "), "{}", text(&output.stderr));
    let output = peili(&["pull", "NOT a reference", "--to", &to]).await;
    assert_eq!(output.status.code(), Some(2));
}
