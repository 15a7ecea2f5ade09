//! Policies of the registry world that do not answer: the failure verdict of each decides, and nothing else. Counted at the origin and
//! at both peers.

use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Image, policy, wait};
use serde_json::{Value, json};

use super::{APPLIED, from_origin, images, needs_for, path, pulled, sent};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};
use crate::pulls::tags::cause;

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![
        Case::new("policies::failing::trapped", &needs, trapped),
        Case::new("policies::failing::absent", &needs, absent),
    ]
}

/// A pull over a closed registry that must be refused: nobody sends anything for it.
async fn is_refused(cluster: &Cluster, node: usize, image: &Image) {
    let mirror = cluster.nodes[node].peili.registry_url();
    cluster.nodes[node].containerd.set_hosts(REGISTRY, &mirror, &[&mirror]).unwrap();
    cluster.origin.reset();
    let before = sent(cluster, 0).await;
    let pulled = cluster.nodes[node].containerd.cri().pull(&image.reference(REGISTRY), PULL).await;
    assert!(pulled.unwrap_err().to_string().contains("403"));
    assert_eq!((cluster.origin.requests(), sent(cluster, 0).await), (Vec::new(), before));
    cluster.mirror(node, REGISTRY, &mirror);
}

/// A policy that traps on one repository is bypassed or denied there, and asked everywhere else.
async fn trapped() {
    for act in ["panic", "loop", "allocate"] {
        let guest = |failure: &str, on: &str| {
            json!({"name": failure, "path": policy("testguests"), "failure": failure,
                "settings": {"act": act, "on": on}})
        };
        let config =
            json!({"policies": {"registry": [guest("bypass", "special/"), guest("deny", "closed/")]}});
        let cluster = Setup { configs: vec![(1, config)], ..Setup::new(Generation::V2) }.start().await;
        let [special, plain] = images();
        let closed = Image::builder("closed/app", "v1").layer(1 << 20).seed(3).build().unwrap();
        for image in [&special, &plain, &closed] {
            cluster.seed(0, image).await;
        }
        assert_eq!(from_origin(&cluster, &special).await, special.layer_bytes(), "{act}");
        is_refused(&cluster, 1, &closed).await;
        assert_eq!(from_origin(&cluster, &plain).await, 0, "{act}");
        for name in ["bypass", "deny"] {
            let label = format!("policy=\"{name}\",outcome=\"failed\"");
            let failures = cluster.nodes[1].peili.metric("peili_policy_decisions_total", &label).await;
            assert!(failures.unwrap() > 0.0, "{act}: {name}");
        }
    }
}

/// A policy that cannot be loaded: one node goes to the registry for all, another one refuses all; both ask their peer as soon as the
/// policy is there.
async fn absent() {
    let scratch = Scratch::new().unwrap();
    let file = scratch.path().join("policy.wasm");
    let config = |failure: &str| -> Value {
        json!({"policies": {"registry": [{"name": "late", "path": &file, "failure": failure}]}})
    };
    let configs = vec![(1, config("bypass")), (2, config("deny"))];
    let cluster = Setup { count: 3, configs, ..Setup::new(Generation::V2) }.start().await;
    let [first, second] = images();
    for image in [&first, &second] {
        cluster.seed(0, image).await;
    }
    assert_eq!(from_origin(&cluster, &first).await, first.layer_bytes());
    is_refused(&cluster, 2, &first).await;
    assert_eq!(cause(&cluster.nodes[2].peili.fetch(&path(&first)).await.unwrap()), "denied");

    std::fs::copy(policy("allow-list"), &file).unwrap();
    for node in [1, 2] {
        wait::until("the policy is there", APPLIED * 2, async || {
            let answer = cluster.nodes[node].peili.fetch(&path(&second)).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await
        .unwrap();
        let taken = pulled(&cluster, node, &second).await;
        assert!(taken.origin == 0 && taken.got >= second.layer_bytes(), "{taken:?}");
    }
}
