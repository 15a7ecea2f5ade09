//! Each field of a plan, beside those of tags (`policies::tags`): who is asked for content, and who is not. Counted at the origin, at an
//! upstream and at all peers.

use std::time::Duration;

use peili::oci::Digest;
use peili_lab::liar::{Lie, ZONE};
use peili_lab::{Generation, Image, Liar, Origin, policy, wait};
use serde_json::{Value, json};

use super::{APPLIED, Taken, needs_for, path, pulled, tags_asked};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![
        // Alone: five policies share the 10 ms of a chain, in a debug build.
        Case::new("policies::plans::sources", &needs, sources).alone(),
        Case::new("policies::plans::min_trust", &needs, min_trust),
        // Alone: who is slow for want of a processor is asked beside as one that hangs.
        Case::new("policies::plans::max_fan_out", &needs, max_fan_out).alone(),
        Case::new("policies::plans::tag_resolution", &needs, tag_resolution).timed(),
        Case::new("policies::plans::always_verify", &needs, always_verify),
    ]
}

/// A policy that gives this plan to repositories that have its name.
fn plan(name: &str, plan: &Value) -> Value {
    let settings = json!({"act": "plan", "on": format!("{name}/"), "plan": plan});
    json!({"name": name, "path": policy("testguests"), "failure": "deny", "settings": settings})
}

fn registry(policies: &[Value]) -> Value {
    json!({"policies": {"registry": policies}})
}

fn image(repository: &str, seed: u64) -> Image {
    Image::builder(repository, "v1").layer(5 << 20).layer(4096).seed(seed).build().unwrap()
}

/// Gives the second node this configuration, and waits until its policies keep `path` back.
async fn in_force(cluster: &mut Cluster, config: &Value, path: &str) {
    let node = &mut cluster.nodes[1].peili;
    node.plan.merge(config);
    node.rewrite().unwrap();
    wait::until("the policies are in force", APPLIED * 2, async || {
        (node.fetch(path).await.ok()?.status == 404).then_some(())
    })
    .await
    .unwrap();
}

/// Where sources come in another order, or are forbidden, those that are left give all, and the others nothing.
async fn sources() {
    let mut cluster = Setup::new(Generation::V2).start().await;
    let place = &cluster.network.nodes[2];
    let house = Origin::start_at(Some(&place.namespace), &[(place.address(), 8081).into()]).unwrap();
    let rule = |repository: &str, peers: &str| {
        json!({"match": [format!("{REGISTRY}/{repository}/**")], "peers": peers,
            "upstreams": [{"name": "house"}], "origin": true})
    };
    let rules = [
        rule("first", "first"),
        rule("last", "last"),
        rule("never", "never"),
        rule("no-upstreams", "last"),
        rule("no-peers-but-upstreams", "first"),
    ];
    let order = json!({"name": "order", "path": policy("upstream-order"), "settings": {"rules": rules}});
    let mut config = registry(&[
        order,
        plan("no-upstreams", &json!({"forbidden": ["upstreams"]})),
        plan("no-peers-but-upstreams", &json!({"forbidden": ["peers"]})),
        plan("no-peers", &json!({"forbidden": ["peers"]})),
        plan("no-origin", &json!({"forbidden": ["origin"]})),
    ]);
    config["upstreams"] = json!([{"name": "house", "address": house.url(), "repositories": ["/"]}]);

    let images = [
        ("first", "peer"),
        ("last", "house"),
        ("never", "house"),
        ("no-upstreams", "peer"),
        ("no-peers-but-upstreams", "house"),
        ("no-peers", "origin"),
        ("no-origin", "peer"),
    ];
    let images: Vec<_> = images
        .into_iter()
        .zip(1..)
        .map(|((name, source), seed)| (image(&format!("{name}/app"), seed), source))
        .collect();
    for (image, _) in &images {
        cluster.seed(0, image).await;
        house.add(image);
    }
    in_force(&mut cluster, &config, &path(&images[5].0)).await;
    let node = &cluster.nodes[1].peili;
    for (image, source) in &images {
        house.reset();
        let Taken { origin, nodes, got } = pulled(&cluster, 1, image).await;
        let all = image.layer_bytes();
        let of = |who: &str| if who == *source { all } else { 0 };
        assert_eq!((origin, house.layer_bytes(image)), (of("origin"), of("house")), "{}", image.repository);
        for count in [nodes[0], got] {
            assert!(
                if *source == "peer" { count >= all } else { count == 0 },
                "{}: {count}",
                image.repository
            );
        }
    }

    // What nobody has, and the origin must not be asked for: the runtime, which could ask it, is told that it is denied.
    let absent = image("no-origin/absent", 99);
    cluster.origin.add(&absent);
    let mirror = node.registry_url();
    cluster.nodes[1].containerd.set_hosts(REGISTRY, &mirror, &[&mirror]).unwrap();
    cluster.origin.reset();
    let error = cluster.nodes[1].containerd.cri().pull(&absent.reference(REGISTRY), PULL).await.unwrap_err();
    assert!(error.to_string().contains("policy keeps the registry from being asked"), "{error}");
    assert_eq!(cluster.origin.requests(), []);
}

/// Of two holders the one that is trusted less than the plan demands gives nothing: not where the other one has it too, and not where it
/// is the only one. All other content comes from it, and once it is trusted enough that too.
async fn min_trust() {
    let grant = |level: &str| {
        let settings = json!({"act": "grant", "on": "node-1", "level": level});
        json!([{"name": "grant", "path": policy("testguests-trust"), "settings": settings}])
    };
    let mut config = registry(&[plan("special", &json!({"min-trust": "tags"}))]);
    config["policies"]["trust"] = grant("blobs");
    let setup = Setup { count: 3, configs: vec![(2, config)], ..Setup::new(Generation::V2) };
    let mut cluster = setup.start().await;
    let names = ["special/both", "special/lone", "special/later", "plain/lone"];
    let [both, lone, later, plain] = [0, 1, 2, 3].map(|number| image(names[number], number as u64 + 1));
    for image in [&both, &lone, &later, &plain] {
        cluster.seed(0, image).await;
    }
    cluster.nodes[1].pull(&both).await;
    cluster.shared(1, &both).await;
    let first = cluster.nodes[0].peili.plan.peer_id.clone();
    let is_at = async |cluster: &Cluster, level: &str| {
        wait::until(&format!("node-1 is at {level}"), APPLIED * 2, async || {
            let status = cluster.nodes[2].peili.status().await.ok()?;
            let peers = status["network"]["peers"].as_array()?.iter();
            let mut peers = peers.filter(|peer| peer["id"] == *first);
            peers.any(|peer| peer["level"] == *level).then_some(())
        })
        .await
        .unwrap();
    };
    is_at(&cluster, "blobs").await;

    let taken = pulled(&cluster, 2, &both).await;
    assert_eq!((taken.origin, taken.nodes[0]), (0, 0), "all from the one that is trusted");
    assert!(taken.nodes[1] >= both.layer_bytes() && taken.got >= both.layer_bytes(), "{taken:?}");
    let taken = pulled(&cluster, 2, &lone).await;
    assert_eq!((taken.origin, &taken.nodes[..], taken.got), (lone.layer_bytes(), &[0; 3][..], 0));
    for image in [&plain, &later] {
        let taken = pulled(&cluster, 2, image).await;
        assert_eq!((taken.origin, taken.nodes[1]), (0, 0));
        assert!(taken.nodes[0] >= image.layer_bytes() && taken.got >= image.layer_bytes(), "{taken:?}");
        let node = &mut cluster.nodes[2].peili;
        node.plan.merge(&json!({"policies": {"trust": grant("tags")}}));
        node.rewrite().unwrap();
        is_at(&cluster, "tags").await;
    }
}

/// The holder that is asked first hangs. Where the plan lets one be asked at a time, the other one is asked once the first has failed;
/// where it does not say, beside it. Both ways all comes from the other one.
async fn max_fan_out() {
    for (constraints, is_beside) in [(json!({"max-fan-out": 1}), false), (json!({}), true)] {
        // The liar's zone is this node's, so that it is asked first.
        let mut config = registry(&[plan("special", &constraints)]);
        config["node"] = json!({"zone": ZONE});
        let setup = Setup { configs: vec![(1, config)], ..Setup::new(Generation::V2) };
        let mut cluster = setup.start().await;
        let image = image("special/app", 1);
        cluster.seed(0, &image).await;
        let liar = liar(&mut cluster, &[&image], Lie::Hang).await;
        let node = &cluster.nodes[1].peili;
        let taken = pulled(&cluster, 1, &image).await;
        let hedges = node.metric("peili_mirror_hedges_total", "").await.unwrap();
        println!("{constraints}: {hedges} asked beside, {} requests at the one that hangs", liar.requests());
        assert!(liar.requests() > 0, "it was asked");
        assert_eq!(hedges > 0.0, is_beside, "{hedges} asked beside by {constraints}");
        assert_eq!(taken.origin, 0);
        assert!(taken.nodes[0] >= image.layer_bytes() && taken.got >= image.layer_bytes(), "{taken:?}");
    }
}

/// A peer in a place of its own that claims these images; the second node trusts it and knows what it claims.
async fn liar(cluster: &mut Cluster, images: &[&Image], lie: Lie) -> Liar {
    let place = &cluster.network.nodes[2];
    let liar = Liar::start(&place.namespace, place.address(), images).unwrap();
    liar.lie(lie);
    let node = &mut cluster.nodes[1].peili;
    let peers = node.plan.config["network"]["peers"].as_array_mut().unwrap();
    peers.push(json!({"id": liar.peer_id(), "addresses": [liar.address().to_string()]}));
    node.rewrite().unwrap();
    let all: usize = images.iter().map(|image| image.blobs.len()).sum();
    wait::until("what the other one claims", Duration::from_secs(20), async || {
        let status = node.status().await.ok()?;
        let mut peers = status["network"]["peers"].as_array()?.iter();
        peers
            .any(|peer| peer["id"] == *liar.peer_id() && peer["holds"].as_u64() >= Some(all as u64))
            .then_some(())
    })
    .await
    .unwrap();
    liar
}

/// A tag that peers may tell by the configuration, and by a plan only the registry may: it is asked once, and for nothing else. Where the
/// plan has an upstream, that is asked instead.
async fn tag_resolution() {
    let mirror = json!({"mirror": {"tags-peers-first": ["**"]}});
    let mut cluster = Setup { config: mirror, ..Setup::new(Generation::V2) }.start().await;
    let place = &cluster.network.nodes[2];
    let house = Origin::start_at(Some(&place.namespace), &[(place.address(), 8081).into()]).unwrap();
    let rules = [
        json!({"match": [format!("{REGISTRY}/house-*/**")], "peers": "first", "upstreams": [{"name": "house"}]}),
    ];
    let order = json!({"name": "order", "path": policy("upstream-order"), "settings": {"rules": rules}});
    let [revalidated, only] =
        ["revalidated", "upstream-only"].map(|name| plan(name, &json!({"tag-resolution": name})));
    let mut config = registry(&[order, revalidated, only]);
    config["upstreams"] = json!([{"name": "house", "address": house.url(), "repositories": ["/"]}]);
    let names = [
        "free/app",
        "revalidated/app",
        "upstream-only/app",
        "house-revalidated/app",
        "house-upstream-only/app",
    ];
    let images: Vec<_> = names.into_iter().zip(1..).map(|(name, seed)| image(name, seed)).collect();
    for image in &images {
        cluster.seed(0, image).await;
        house.add(image);
    }
    let tag = format!("/v2/{}/manifests/v1?ns={REGISTRY}", images[1].repository);
    in_force(&mut cluster, &config, &tag).await;
    for image in &images {
        house.reset();
        let name = image.repository.as_str();
        let Taken { origin, nodes, got } = pulled(&cluster, 1, image).await;
        assert!(origin == 0 && nodes[0] >= image.layer_bytes() && got >= image.layer_bytes(), "{name}");
        let (free, at_house) = (name.starts_with("free"), name.starts_with("house-"));
        assert_eq!(tags_asked(&cluster, image), usize::from(!free && !at_house), "{name} at the registry");
        let asked = house.requests().iter().filter(|request| request.path.ends_with("/v1")).count();
        assert_eq!((asked > 0, house.layer_bytes(image)), (at_house, 0), "{name} at the house");
    }
}

/// What a peer sends is verified before the runtime sees it where the plan says so, although the configuration turned that off: a lie
/// becomes the next source's answer. Without the plan the runtime gets it.
async fn always_verify() {
    let verified = plan("special", &json!({"always-verify": true}));
    let mut config = registry(&[verified]);
    config["mirror"] = json!({"verify": false});
    config["node"] = json!({"zone": ZONE});
    let setup = Setup { configs: vec![(1, config)], ..Setup::new(Generation::V2) };
    let mut cluster = setup.start().await;
    // Small enough to be verified as a whole, and larger than what is verified in any case, of which no lie is told.
    let [special, plain] = [("special/app", 1), ("plain/app", 2)]
        .map(|(name, seed)| Image::builder(name, "v1").layer(1 << 20).seed(seed).build().unwrap());
    for image in [&special, &plain] {
        cluster.seed(0, image).await;
    }
    let liar = liar(&mut cluster, &[&special, &plain], Lie::BytesAfter(512 << 10)).await;
    let node = &cluster.nodes[1].peili;
    let layer = |image: &Image| format!("/v2/{}/blobs/{}?ns={REGISTRY}", image.repository, image.layers[0]);
    let is_true = async |image: &Image| {
        let answer = node.fetch(&layer(image)).await.unwrap();
        assert_eq!(answer.status, 200);
        Digest::sha256(&answer.body) == image.layers[0]
    };
    let asked = liar.requests();
    assert!(!is_true(&plain).await, "the runtime would get the lie");
    assert!(liar.requests() > asked);
    let mismatches =
        async || node.metric("peili_mirror_verifications_total", "verdict=\"mismatch\"").await.unwrap_or(0.0);
    assert_eq!(mismatches().await, 0.0);
    let asked = liar.requests();
    let taken = pulled(&cluster, 1, &special).await;
    assert!(liar.requests() > asked, "it was asked, and lied");
    assert!(mismatches().await > 0.0);
    assert_eq!(taken.origin, 0);
    assert!(taken.nodes[0] >= special.layer_bytes(), "from the other one: {taken:?}");
}
