//! What a tag means is the registry's to say, while it answers; then the peers'.

use std::time::Duration;

use peili_lab::http::Answer;
use peili_lab::{Generation, Image, wait};
use serde_json::{Value, json};

use super::{needs, only_the_tag_from, short};
use crate::Case;
use crate::cluster::{Cluster, REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = format!("pulls::tags_while_the_registry_is_down::{}", short(generation));
        cases.push(Case::new(name, &needs(generation), move || registry_down(generation)));
    }
    let needs = needs(Generation::V1_7);
    cases.push(Case::new("pulls::tags_of_peers_first", &needs, peers_first));
    cases.push(Case::new("pulls::tags_that_peers_disagree_about", &needs, disputed));
    cases
}

/// An answer of a registry is believed for a second only, so that these cases are short.
fn quick() -> Value {
    json!({"upstream": {"cache": "1s"}, "log": {"level": "info,peili=debug"}})
}

async fn ask(cluster: &Cluster, node: usize, image: &Image) -> Answer {
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.tag);
    cluster.nodes[node].peili.fetch(&path).await.unwrap()
}

pub(crate) fn cause(answer: &Answer) -> Value {
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    body["errors"][0]["detail"]["cause"].clone()
}

async fn registry_down(generation: Generation) {
    let cluster = Setup { config: quick(), ..Setup::new(generation) }.start().await;
    for (seed, down) in [None, Some(503), Some(429)].into_iter().enumerate() {
        let image = Image::builder("library/app", &format!("v{seed}")).layer(1 << 20).seed(seed as u64 + 1);
        let image = image.build().unwrap();
        cluster.seed(0, &image).await;
        let answer = ask(&cluster, 1, &image).await;
        assert_eq!((answer.status, cause(&answer)), (404, "tag-upstream".into()));

        match down {
            Some(status) => cluster.origin.behave(|behaviour| behaviour.status = Some(status)),
            None => cluster.origin.refuse(),
        }
        wait::until("peers asked about the tag", Duration::from_secs(10), async || {
            (ask(&cluster, 1, &image).await.status == 200).then_some(())
        })
        .await
        .unwrap();
        cluster.nodes[1].pull(&image).await;
        let counts = cluster.origin.counts();
        assert_eq!((counts.blob_bytes, counts.manifest_bytes), (0, 0));

        match down {
            Some(_) => cluster.origin.behave(|behaviour| behaviour.status = None),
            None => cluster.origin.accept(),
        }
        wait::until("the tag goes upstream again", Duration::from_secs(10), async || {
            (ask(&cluster, 1, &image).await.status == 404).then_some(())
        })
        .await
        .unwrap();
    }
}

async fn peers_first() {
    let config = json!({"mirror": {"tags-peers-first": [format!("{REGISTRY}/first/*")]}});
    let cluster = Setup { config, ..Setup::new(Generation::V1_7) }.start().await;
    let first = Image::builder("first/app", "v1").layer(1 << 20).build().unwrap();
    cluster.seed(0, &first).await;
    cluster.nodes[1].pull(&first).await;
    assert_eq!(cluster.origin.requests(), [], "nobody asks the registry");
    let other = Image::builder("other/app", "v1").layer(1 << 20).seed(2).build().unwrap();
    cluster.seed(0, &other).await;
    cluster.nodes[1].pull(&other).await;
    only_the_tag_from(&cluster.origin, &other);
    assert!(cluster.origin.requests().iter().any(|request| request.method == "HEAD"));
    // A tag that no peer knows goes upstream all the same.
    let unknown = Image::builder("first/unknown", "v1").layer(1 << 20).seed(3).build().unwrap();
    cluster.origin.add(&unknown);
    cluster.nodes[1].pull(&unknown).await;
    assert_eq!(cluster.origin.layer_bytes(&unknown), unknown.layer_bytes());
}

async fn disputed() {
    let config = json!({"mirror": {"tags-peers-first": ["**"]}});
    let cluster = Setup { count: 3, config, ..Setup::new(Generation::V1_7) }.start().await;
    let old = Image::builder("library/app", "v1").layer(1 << 20).build().unwrap();
    let new = Image::builder("library/app", "v1").layer(1 << 20).seed(2).build().unwrap();
    cluster.origin.add(&old);
    cluster.nodes[0].pull(&old).await;
    cluster.origin.add(&new);
    // The second node has to ask the origin, or it would get the old one from the first.
    cluster.mirror(1, REGISTRY, &cluster.origin.url());
    cluster.nodes[1].pull(&new).await;
    cluster.shared(0, &old).await;
    cluster.shared(1, &new).await;

    let answer = ask(&cluster, 2, &old).await;
    assert_eq!((answer.status, cause(&answer)), (404, "tag-disputed".into()));
    cluster.origin.reset();
    cluster.nodes[2].pull(&new).await;
    // The registry decided, and the bytes of its answer came from the peer that has it.
    only_the_tag_from(&cluster.origin, &new);
    assert!(cluster.nodes[2].containerd.has_blob(&new.root));
    assert!(!cluster.nodes[2].containerd.has_blob(&old.root));
    let disputed = cluster.nodes[2].peili.metric("peili_mirror_tags_total", "disputed").await.unwrap();
    assert!(disputed >= 1.0);
}
