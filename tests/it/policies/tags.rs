//! How old a tag's meaning may be, and who asks the registry for it: counted at the registry.

use std::time::Duration;

use peili_lab::{Generation, Image, wait};
use serde_json::{Value, json};

use super::{needs_for, one, tags_asked};
use crate::Case;
use crate::cluster::{REGISTRY, Setup};
use crate::pulls::tags::cause;

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![Case::new("policies::tags::age", &needs, age), Case::new("policies::tags::home", &needs, home)]
}

fn rules(rules: &Value) -> Value {
    one("tag-freshness", "bypass", &json!({"rules": rules}))
}

fn image(repository: &str, seed: u64) -> Image {
    Image::builder(repository, "v1").layer(1 << 20).seed(seed).build().unwrap()
}

fn path(image: &Image) -> String {
    format!("/v2/{}/manifests/v1?ns={REGISTRY}", image.repository)
}

/// What a node's runtime got from the registry may come from it as long as it is young, and no longer; a node that was started again
/// does not know how old anything is; and no node tells a private tag.
async fn age() {
    let all = format!("{REGISTRY}/**");
    let config = rules(&json!([
        {"match": [format!("{REGISTRY}/secret/**")], "private": true},
        {"match": [format!("{REGISTRY}/short/**")], "resolve": "peers", "max-age": "1s"},
        {"match": [all], "resolve": "peers", "max-age": "1h"},
    ]));
    let mut cluster = Setup { config, ..Setup::new(Generation::V2) }.start().await;
    let [long, short, secret] = [image("long/app", 1), image("short/app", 2), image("secret/app", 3)];
    for image in [&long, &short, &secret] {
        cluster.seed(0, image).await;
    }
    cluster.origin.reset();
    cluster.nodes[1].pull(&long).await;
    assert_eq!(cluster.origin.requests(), [], "young enough");
    tokio::time::sleep(Duration::from_secs(1)).await;
    for image in [&short, &secret] {
        let answer = cluster.nodes[1].peili.fetch(&path(image)).await.unwrap();
        assert_eq!((answer.status, cause(&answer)), (404, "tag-upstream".into()), "{}", image.repository);
        cluster.origin.reset();
        cluster.nodes[1].pull(image).await;
        assert_eq!((tags_asked(&cluster, image), cluster.origin.layer_bytes(image)), (1, 0), "the tag alone");
    }
    // The second node does not know any more, and the first one does.
    for (node, status) in [(1, 200), (0, 404)] {
        cluster.nodes[node].peili.restart().await.unwrap();
        cluster.connected().await;
        wait::until(&format!("node {node}: {status}"), Duration::from_secs(20), async || {
            let other = &cluster.nodes[1 - node].peili;
            (other.fetch(&path(&long)).await.ok()?.status == status).then_some(())
        })
        .await
        .unwrap();
    }
}

/// Three nodes that pull one tag at once cost its registry one request; a home that is gone one more.
async fn home() {
    let config = rules(&json!([{"match": [format!("{REGISTRY}/**")], "resolve": "home", "max-age": "10m"}]));
    let mut cluster = Setup { count: 3, config, ..Setup::new(Generation::V2) }.start().await;
    let (first, second) = (image("library/first", 1), image("library/second", 2));
    for image in [&first, &second] {
        cluster.origin.add(image);
    }
    // Before they know each other each is the home of all.
    for node in &cluster.nodes {
        wait::until("all take part", Duration::from_secs(20), async || {
            (node.peili.status().await.ok()?["election"]["members"] == 3).then_some(())
        })
        .await
        .unwrap();
    }
    let pulls = cluster.nodes.iter().map(|node| node.pull(&first));
    futures::future::join_all(pulls).await;
    assert_eq!(tags_asked(&cluster, &first), 1, "{:?}", cluster.origin.requests());

    let home = cluster.origin.requests().iter().find(|request| request.path.ends_with("/v1")).unwrap().remote;
    let nodes = &cluster.network.nodes;
    let number = nodes.iter().position(|node| node.addresses().any(|own| own == home.ip())).unwrap();
    cluster.nodes[number].peili.kill();
    for (other, node) in cluster.nodes.iter().enumerate().filter(|(other, _)| *other != number) {
        let answer = node.peili.request("HEAD", &path(&first), &[]).await.unwrap();
        assert_eq!(answer.status, 200, "node {other}");
        node.pull(&second).await;
    }
    assert!(tags_asked(&cluster, &first) <= 2, "{:?}", cluster.origin.requests());
    assert!(tags_asked(&cluster, &second) <= 1, "{:?}", cluster.origin.requests());
}
