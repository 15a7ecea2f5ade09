//! Trust policies from mounted files: who gives and gets what, while it flows. Counted at the origin and at both peers.

use std::time::{Duration, Instant, SystemTime};

use peili_lab::cri::Pulled;
use peili_lab::{Generation, Image, policy, wait};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{APPLIED, Taken, needs_for, path, pulled, sent, tags_asked};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

/// From the moment that a changed configuration is written: half a second until it has settled, half for the compiler, and a second
/// for the verdict; with a compiler that is not optimised and a busy machine, some more.
const ACTS: Duration = Duration::from_secs(8);
/// After it acts, for the chunks that are on their way: less than the rest of a segment takes.
const CUT: Duration = Duration::from_millis(300);
/// What of a segment is on its way to the one that distrusts is thrown away, for 2 s at most (`transfer/client/body.rs`).
const DRAINED: Duration = Duration::from_millis(2300);
/// Slow enough that a change comes in the middle.
const RATE: u64 = 2 << 20;
const LAYER: u64 = 24 << 20;
/// How long a grant counts, in the case of that.
const TTL: Duration = Duration::from_secs(24);
/// Longest case with many pulls.
const LONG: Duration = Duration::from_secs(240);

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![
        // Alone: what counts is how soon the bytes stop.
        Case::new("policies::trust::distrusted_while_it_serves", &needs, distrusted_while_it_serves).alone(),
        Case::new("policies::trust::distrusted_while_it_is_served", &needs, distrusted_while_it_is_served)
            .alone(),
        Case::new("policies::trust::levels", &needs, levels).within(LONG),
        Case::new("policies::trust::limits", &needs, limits).within(LONG),
        Case::new("policies::trust::ttl", &needs, ttl),
        Case::new("policies::trust::failing", &needs, failing),
    ]
}

fn trust(component: &str, settings: &Value) -> Value {
    json!({"policies": {"trust": [{"name": component, "path": policy(component), "settings": settings}]}})
}

fn deny(node: &str) -> Value {
    trust("node-allow", &json!({"deny": [{"names": [node]}]}))
}

fn guest(settings: &Value) -> Value {
    trust("testguests-trust", settings)
}

fn image() -> Image {
    Image::builder("library/app", "v1").layer(LAYER).build().unwrap()
}

fn pull(cluster: &Cluster, node: usize, image: &Image) -> JoinHandle<Pulled> {
    let (cri, reference) = (cluster.nodes[node].containerd.cri().clone(), image.reference(REGISTRY));
    tokio::spawn(async move { cri.pull(&reference, PULL).await.unwrap() })
}

/// Writes a node's configuration, and waits until its status shows that it acts: what peer it refuses, or which policy is
/// in force.
async fn rewrite(cluster: &mut Cluster, node: usize, config: &Value, sign: &str) {
    let node = &mut cluster.nodes[node].peili;
    node.plan.merge(config);
    node.rewrite().unwrap();
    let began = Instant::now();
    wait::until(sign, ACTS, async || node.status().await.ok()?.to_string().contains(sign).then_some(()))
        .await
        .unwrap();
    println!("{sign}: {:?} after it was written", began.elapsed());
}

/// The peer that is giving a layer is distrusted by the one that takes it: not a byte more comes from it, and the rest comes from
/// the other holder.
async fn distrusted_while_it_serves() {
    let config = json!({"transfer": {"upload-rate": RATE}});
    let mut cluster = Setup { count: 3, config, ..Setup::new(Generation::V2) }.start().await;
    let image = image();
    cluster.seed(0, &image).await;
    cluster.nodes[1].containerd.cri().pull(&image.reference(REGISTRY), PULL).await.unwrap();
    cluster.shared(1, &image).await;
    cluster.origin.reset();
    let before = [sent(&cluster, 0).await, sent(&cluster, 1).await];

    let pulling = pull(&cluster, 2, &image);
    let giver = wait::until("one of them gives", PULL, async || {
        let now = [sent(&cluster, 0).await, sent(&cluster, 1).await];
        (0..2).find(|node| now[*node] > before[*node] + (1 << 20))
    });
    let giver = giver.await.unwrap();
    let name = format!("node-{}", giver + 1);
    rewrite(&mut cluster, 2, &deny(&name), "refuses peer").await;
    tokio::time::sleep(DRAINED).await;
    let at_once = sent(&cluster, giver).await;
    assert!(!pulling.is_finished(), "the change came in the middle");
    pulling.await.unwrap();
    assert_eq!(sent(&cluster, giver).await, at_once, "nothing more came from {name}");
    assert!(at_once - before[giver] < LAYER);
    assert!(sent(&cluster, 1 - giver).await > before[1 - giver], "the rest came from the other one");
    assert_eq!(cluster.origin.layer_bytes(&image), 0);
}

/// The peer that is given a layer is distrusted by the one that gives it: it gets no byte more, and the rest comes from the origin.
async fn distrusted_while_it_is_served() {
    let config = json!({"transfer": {"upload-rate": RATE}});
    let mut cluster = Setup { config, ..Setup::new(Generation::V2) }.start().await;
    let image = image();
    cluster.seed(0, &image).await;
    let before = sent(&cluster, 0).await;
    let pulling = pull(&cluster, 1, &image);
    wait::until("it gives", PULL, async || (sent(&cluster, 0).await > before + (1 << 20)).then_some(()))
        .await
        .unwrap();
    rewrite(&mut cluster, 0, &deny("node-2"), "refuses peer").await;
    tokio::time::sleep(CUT).await;
    let at_once = sent(&cluster, 0).await;
    pulling.await.unwrap();
    assert_eq!(sent(&cluster, 0).await, at_once, "nothing more went to it");
    assert!(at_once - before < LAYER);
    assert!(cluster.origin.layer_bytes(&image) > 0, "the rest came from the origin");
}

/// What each level lets through, by policies of the node that pulls and then of the one that holds.
async fn levels() {
    let config = json!({"mirror": {"tags-peers-first": ["**"]}});
    let mut cluster = Setup { config, ..Setup::new(Generation::V2) }.start().await;
    let image = Image::builder("library/app", "v1").layer(4096).build().unwrap();
    cluster.seed(0, &image).await;
    let digest = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    let tag = format!("/v2/{}/manifests/v1?ns={REGISTRY}", image.repository);
    let answers = async |cluster: &Cluster| {
        let node = &cluster.nodes[1].peili;
        [node.fetch(&digest).await.unwrap().status, node.fetch(&tag).await.unwrap().status]
    };
    assert_eq!(answers(&cluster).await, [200, 200]);
    let grant = |level: &str| guest(&json!({"act": "grant", "level": level}));
    let withhold = guest(&json!({"act": "grant", "withhold": true}));
    let none = json!({"policies": {"trust": []}});
    let table = [
        (1, grant("introduce"), [404, 404]),
        (1, grant("blobs"), [200, 404]),
        (1, grant("tags"), [200, 200]),
        (1, guest(&json!({"act": "deny"})), [404, 404]),
        (1, none.clone(), [200, 200]),
        (0, withhold, [404, 404]),
        (0, grant("blobs"), [200, 404]),
        (0, guest(&json!({"act": "deny"})), [404, 404]),
        (0, none, [200, 200]),
    ];
    // What was pulled once is asked for no more: an image for each.
    let mut images = Vec::new();
    for number in 0..table.len() {
        let name = format!("library/app-{number}");
        let image = Image::builder(&name, "v1").layer(1 << 20).seed(number as u64 + 2).build().unwrap();
        cluster.seed(0, &image).await;
        images.push(image);
    }
    for ((node, config, expected), image) in table.into_iter().zip(images) {
        let peili = &mut cluster.nodes[node].peili;
        peili.plan.merge(&config);
        peili.rewrite().unwrap();
        let what = format!("{expected:?} by {config} on node {}", node + 1);
        wait::until(&what, APPLIED * 2, async || (answers(&cluster).await == expected).then_some(()))
            .await
            .unwrap();
        let Taken { origin, nodes, got } = pulled(&cluster, 1, &image).await;
        let [content, tag] = expected.map(|status| status == 200);
        let of_origin = if content { 0 } else { image.layer_bytes() };
        assert_eq!((origin, tags_asked(&cluster, &image) == 0), (of_origin, tag), "{what}");
        assert_eq!([nodes[0] > 0, got > 0], [content; 2], "{what}");
    }
}

/// What a grant says about the rate and the number of uploads is kept to.
async fn limits() {
    let limits = |most: Option<u32>, on: &str| {
        guest(&json!({"act": "grant", "on": on, "max-upload-rate": RATE, "max-uploads": most}))
    };
    let setup = Setup { configs: vec![(0, limits(Some(1), "node"))], ..Setup::new(Generation::V2) };
    let mut cluster = setup.start().await;
    let image = Image::builder("library/app", "v1").layer(8 << 20).build().unwrap();
    cluster.seed(0, &image).await;
    let began = Instant::now();
    assert_eq!(pulled(&cluster, 1, &image).await.origin, 0);
    let took = began.elapsed();
    // 8 MiB at 2 MiB/s, but for what goes before the rate is known.
    assert!(took > Duration::from_secs(3), "{took:?}");

    // A layer takes longer than a request waits for a busy peer: who asks for the next one meanwhile gets it elsewhere.
    let [one, all] = [("library/one", 2), ("library/all", 3)]
        .map(|(name, seed)| Image::builder(name, "v1").layers(3, 8 << 20).seed(seed).build().unwrap());
    for image in [&one, &all] {
        cluster.seed(0, image).await;
    }
    let Taken { origin, nodes, got } = pulled(&cluster, 1, &one).await;
    assert!(origin > 0 && nodes[0] > 0 && got > 0, "one at a time");
    rewrite(&mut cluster, 0, &limits(None, "node-2"), "with `node-2`").await;
    // The judge looks four times a second.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let Taken { origin, nodes, got } = pulled(&cluster, 1, &all).await;
    assert!(origin == 0 && nodes[0] >= all.layer_bytes() && got >= all.layer_bytes(), "all at once");
}

/// What was granted counts until its time is over although the policy answers no more, and then no longer: on a node where that time
/// is short. Where it is long it still counts.
async fn ttl() {
    let mut cluster = Setup { count: 3, ..Setup::new(Generation::V2) }.start().await;
    let [during, after, lasting] = [("library/during", 1), ("library/after", 2), ("library/lasting", 3)]
        .map(|(name, seed)| Image::builder(name, "v1").layer(1 << 20).seed(seed).build().unwrap());
    for image in [&during, &after, &lasting] {
        cluster.seed(0, image).await;
    }
    let stuck = SystemTime::now() + TTL / 2;
    let from = stuck.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    for (node, seconds) in [(1, TTL.as_secs()), (2, 300)] {
        let grant = json!({"act": "grant", "on": "node-1", "ttl-seconds": seconds, "stuck-from": from});
        rewrite(&mut cluster, node, &guest(&grant), "does Grant").await;
    }
    wait::until("it answers no more", TTL, async || {
        let status = cluster.nodes[1].peili.status().await.ok()?;
        status.to_string().contains("does not judge peer").then_some(())
    })
    .await
    .unwrap();
    // It is asked anew a quarter of its time before the end.
    let Taken { origin, nodes, got } = pulled(&cluster, 1, &during).await;
    assert!(origin == 0 && nodes[0] >= during.layer_bytes() && got >= during.layer_bytes(), "still granted");
    wait::until("its time is over", TTL, async || {
        let answer = cluster.nodes[1].peili.fetch(&path(&after)).await.ok()?;
        (answer.status == 404).then_some(())
    })
    .await
    .unwrap();
    let Taken { origin, nodes, got } = pulled(&cluster, 1, &after).await;
    assert_eq!((origin, nodes[0], got), (after.layer_bytes(), 0, 0), "not granted any more");
    let Taken { origin, nodes, got } = pulled(&cluster, 2, &lasting).await;
    assert!(
        origin == 0 && nodes[0] >= lasting.layer_bytes() && got >= lasting.layer_bytes(),
        "granted for long"
    );
}

/// A policy that never answers: newcomers get nothing, who has a grant keeps it, and the node says so. All is well again once it
/// is replaced.
async fn failing() {
    let stuck = guest(&json!({"act": "loop", "on": "node-1"}));
    let setup = Setup { configs: vec![(1, stuck.clone())], ..Setup::new(Generation::V2) };
    let mut cluster = setup.start().await;
    let image = Image::builder("library/app", "v1").layer(1 << 20).build().unwrap();
    cluster.origin.add(&image);
    cluster.nodes[0].pull(&image).await;
    rewrite(&mut cluster, 1, &stuck, "does not judge peer").await;
    cluster.origin.reset();
    cluster.nodes[1].pull(&image).await;
    assert_eq!((sent(&cluster, 0).await, cluster.origin.layer_bytes(&image)), (0, image.layer_bytes()));

    rewrite(&mut cluster, 1, &guest(&json!({"act": "grant"})), "does Grant").await;
    // The policy is in force; that it judged is another moment.
    wait::until("it judges", ACTS, async || {
        let status = cluster.nodes[1].peili.status().await.ok()?.to_string();
        (!status.contains("does not judge peer")).then_some(())
    })
    .await
    .unwrap();
    let other = Image::builder("library/other", "v1").layer(1 << 20).seed(7).build().unwrap();
    cluster.seed(0, &other).await;
    cluster.nodes[1].pull(&other).await;
    assert_eq!(cluster.origin.layer_bytes(&other), 0, "granted");

    rewrite(&mut cluster, 1, &stuck, "does not judge peer").await;
    let third = Image::builder("library/third", "v1").layer(1 << 20).seed(8).build().unwrap();
    cluster.seed(0, &third).await;
    cluster.nodes[1].pull(&third).await;
    assert_eq!(cluster.origin.layer_bytes(&third), 0, "what was granted stands");
}
