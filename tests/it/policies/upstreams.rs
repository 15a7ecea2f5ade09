//! Upstreams that a policy names: the mirror itself fetches, by the operator's credentials, under another name, and goes on at
//! another upstream. Counted at each registry.

use std::time::Duration;

use peili_lab::origin::{Behaviour, Challenge, Scope};
use peili_lab::{Certificates, Generation, Image, Origin};
use serde_json::{Value, json};

use super::{needs_for, one};
use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

pub(super) fn cases() -> Vec<Case> {
    let needs = needs_for(Generation::V2);
    vec![
        Case::new("policies::upstreams::air_gap", &needs, air_gap),
        Case::new("policies::upstreams::fail_over", &needs, fail_over),
    ]
}

/// A registry of the house, in the namespace of the origin.
fn house(cluster: &Cluster, last: u16, certificates: Option<&Certificates>) -> Origin {
    let place = &cluster.network.nodes[2];
    let address = (place.address(), last).into();
    match certificates {
        Some(certificates) => Origin::start_tls(Some(&place.namespace), &[address], certificates).unwrap(),
        None => Origin::start_at(Some(&place.namespace), &[address]).unwrap(),
    }
}

fn order(upstreams: &Value, origin: bool) -> Value {
    let rule = json!({"match": [format!("{REGISTRY}/**")], "upstreams": upstreams, "origin": origin});
    one("upstream-order", "deny", &json!({"rules": [rule]}))
}

/// The same image under the name that it has at the house's registry.
fn image(repository: &str, seed: u64, size: u64) -> Image {
    Image::builder(repository, "v1").layer(size).layer(4096).seed(seed).build().unwrap()
}

async fn configured(cluster: &mut Cluster, node: usize, config: &Value, image: &str) {
    let peili = &mut cluster.nodes[node].peili;
    peili.plan.merge(config);
    peili.rewrite().unwrap();
    let peili = &cluster.nodes[node].peili;
    peili_lab::wait::until("the upstream gives it", Duration::from_secs(15), async || {
        let answer = peili.fetch(&format!("/v2/{image}/manifests/v1?ns={REGISTRY}")).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await
    .unwrap();
}

/// A closed registry whose own host is never asked: by a certificate of the house's and by a password, either way that registries
/// ask for one, under another name. The other node gets it from the first.
async fn air_gap() {
    let mut cluster = Setup::new(Generation::V2).start().await;
    let certificates = Certificates::of_server(cluster.network.nodes[2].address()).unwrap();
    let house = house(&cluster, 8443, Some(&certificates));
    let scratch = peili_lab::scratch::Scratch::new().unwrap();
    certificates.copy_to(scratch.path()).unwrap();
    let secret = scratch.path().join("config.json");
    let authority = house.address();
    for (seed, challenge) in [(1, Challenge::Basic), (2, Challenge::Bearer)] {
        let (inside, outside) = (format!("hub/library/app-{seed}"), format!("library/app-{seed}"));
        let (there, here) = (image(&inside, seed, 3 << 20), image(&outside, seed, 3 << 20));
        house.add(&there);
        house.set_password(&inside, "puller", "hunter2", challenge);
        let password =
            json!({"auths": {authority.to_string(): {"username": "puller", "password": "hunter2"}}});
        std::fs::write(&secret, password.to_string()).unwrap();
        let ca = scratch.path().join("ca.crt");
        let upstream = json!({"name": "house", "address": house.url(), "ca": ca, "credentials": secret,
            "repositories": ["hub"]});
        let mut config = order(&json!([{"name": "house", "repository": "hub/{repository}"}]), false);
        config["upstreams"] = json!([upstream]);
        for node in 0..2 {
            configured(&mut cluster, node, &config, &outside).await;
            let mirror = cluster.nodes[node].peili.registry_url();
            cluster.nodes[node].containerd.set_hosts(REGISTRY, &mirror, &[&mirror]).unwrap();
        }
        house.reset();
        cluster.origin.reset();
        cluster.nodes[0].pull(&here).await;
        assert_eq!(house.layer_bytes(&there), here.layer_bytes(), "{challenge:?}");
        assert!(house.requests().iter().any(|request| request.authorized));
        let status = cluster.nodes[0].peili.status().await.unwrap();
        assert_eq!(status["upstreams"][0]["health"], "healthy", "{status}");
        cluster.shared(0, &here).await;
        house.reset();
        cluster.nodes[1].pull(&here).await;
        assert_eq!(house.layer_bytes(&there), 0, "from the other node");
        assert_eq!(cluster.origin.requests().len(), 0, "nobody asks the registry itself");
        // What it has not got is refused, with the cause.
        let absent = image(&format!("library/absent-{seed}"), 9, 4096);
        let error =
            cluster.nodes[0].containerd.cri().pull(&absent.reference(REGISTRY), PULL).await.unwrap_err();
        assert!(error.to_string().contains("no node and no upstream has it"), "{error}");
    }
    for member in &cluster.nodes {
        let log = member.peili.log();
        // As it is, and as it is sent.
        for secret in ["hunter2", "cHVsbGVyOmh1bnRlcjI=", "Bearer "] {
            assert!(!log.contains(secret), "{secret} in the log");
        }
    }
}

/// The first upstream breaks off in mid-layer and is down after it: the rest, and the next pull, come from the second one; the
/// registry is not asked for layers although it could be.
async fn fail_over() {
    let mut cluster = Setup::new(Generation::V2).start().await;
    let (first, second) = (house(&cluster, 8081, None), house(&cluster, 8082, None));
    let upstream =
        |name: &str, origin: &Origin| json!({"name": name, "address": origin.url(), "repositories": ["/"]});
    let mut config = order(&json!([{"name": "first"}, {"name": "second"}]), true);
    config["upstreams"] = json!([upstream("first", &first), upstream("second", &second)]);
    let one = image("library/one", 1, 16 << 20);
    for origin in [&first, &second, &cluster.origin] {
        origin.add(&one);
    }
    configured(&mut cluster, 0, &config, "library/one").await;
    first.behave(|behaviour| {
        *behaviour = Behaviour { cut_after: Some(4 << 20), scope: Scope::Blobs, ..Behaviour::default() };
    });
    for origin in [&first, &second, &cluster.origin] {
        origin.reset();
    }
    cluster.nodes[0].pull(&one).await;
    assert_eq!(cluster.origin.layer_bytes(&one), 0);
    assert!(first.layer_bytes(&one) >= 4 << 20, "it began there");
    assert!(first.requests().iter().any(|request| request.range.is_some()), "and went on");

    first.refuse();
    let two = image("library/two", 2, 4 << 20);
    for origin in [&second, &cluster.origin] {
        origin.add(&two);
    }
    let began = std::time::Instant::now();
    cluster.nodes[0].pull(&two).await;
    println!("with one upstream down: {:?}", began.elapsed());
    assert_eq!((cluster.origin.layer_bytes(&two), second.layer_bytes(&two)), (0, two.layer_bytes()));
    let status = cluster.nodes[0].peili.status().await.unwrap();
    assert_eq!(status["upstreams"][0]["health"], "unreachable", "{status}");
    assert!(status["problems"].to_string().contains("upstream first: "), "{status}");
    assert!(status["served"]["from_upstreams"]["bytes"].as_u64().unwrap() > 0);
}
