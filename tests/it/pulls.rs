//! Pulls through CRI, from node to node, counted at the origin.

mod artifacts;
mod clients;
mod hosts;
mod ownership;
pub(crate) mod tags;

use std::time::Duration;

use peili::oci::Algorithm;
use peili_lab::containerd::Options;
use peili_lab::image::{Compression, architecture};
use peili_lab::netns::Addresses;
use peili_lab::{Generation, Image, Origin, Requirement, wait};
use serde_json::json;

use crate::Case;
use crate::cluster::{Cluster, PULL, REGISTRY, Setup};

/// Longest pull of a layer of 1 GiB through programs that are not optimised.
const LARGE: Duration = Duration::from_secs(120);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = |what: &str| format!("pulls::{what}::{}", short(generation));
        let needs = needs(generation);
        let with_programs = [&needs[..], &[Requirement::Gzip, Requirement::Zstd]].concat();
        cases.push(Case::new(name("core"), &needs, move || core(Setup::new(generation))));
        cases.push(Case::new(name("images"), &with_programs, move || images(generation)));
        // Alone: it measures memory, and has the layer on the disk four times.
        let large = Case::new(name("large_layer"), &needs, move || large_layer(generation));
        cases.push(large.within(3 * LARGE).alone());
        cases.push(Case::new(name("sha512"), &needs, move || sha512(generation)));
        cases.push(Case::new(name("ipv6"), &needs, move || {
            core(Setup { addresses: Addresses::V6, ..Setup::new(generation) })
        }));
    }
    let needs = needs(Generation::V2);
    cases.push(Case::new("pulls::dual_stack", &needs, dual_stack));
    let ways: [(&str, fn(usize, &mut Options)); 3] = [
        ("local_pull", |_, options| options.local_pull = true),
        ("local_pull_in_pieces", |_, options| {
            options.local_pull = true;
            options.layer_fetch_buffer = 4 << 20;
        }),
        ("transfer_service_in_pieces", |_, options| options.layer_fetch_buffer = 4 << 20),
    ];
    for (name, way) in ways {
        let setup = move || Setup { containerd: way, ..Setup::new(Generation::V2) };
        cases.push(Case::new(format!("pulls::{name}"), &needs, move || core(setup())));
    }
    for generation in [Generation::V1_7, Generation::V2] {
        let name = format!("pulls::discarded_layers::{}", short(generation));
        cases.push(Case::new(name, &self::needs(generation), move || discarded_layers(generation)));
    }
    cases.extend(artifacts::cases());
    cases.extend(clients::cases());
    cases.extend(hosts::cases());
    cases.extend(ownership::cases());
    cases.extend(tags::cases());
    cases
}

/// For names of cases.
pub(crate) fn short(generation: Generation) -> &'static str {
    match generation {
        Generation::V1_6 => "containerd_1_6",
        Generation::V1_7 => "containerd_1_7",
        Generation::V2 => "containerd_2",
    }
}

pub(crate) fn needs(generation: Generation) -> [Requirement; 3] {
    [Requirement::Root, Requirement::Iproute2, Requirement::Containerd(generation)]
}

/// The promise: what one node pulled costs the next one not a byte from the origin, which only says what the tag means.
async fn core(setup: Setup) {
    let cluster = setup.start().await;
    let image = Image::builder("library/app", "v1").layer(24 << 20).layer(1 << 20).layer(4096);
    let image = image.build().unwrap();
    cluster.origin.add(&image);
    let [first, second] = &cluster.nodes[..] else { unreachable!("there are two nodes") };
    first.pull(&image).await;
    assert!(cluster.origin.layer_bytes(&image) >= image.layer_bytes());
    assert_eq!(first.peer_bytes().await, 0);
    cluster.shared(0, &image).await;
    cluster.origin.reset();

    second.pull(&image).await;
    only_the_tag_from(&cluster.origin, &image);
    assert!(second.peer_bytes().await >= image.layer_bytes());
    assert!(image.layers.iter().all(|layer| second.containerd.has_blob(layer)));
    let status = first.peili.status().await.unwrap();
    assert!(status["served"]["to_peers"]["bytes"].as_u64().unwrap() >= image.layer_bytes());
    let listed = second.containerd.cri().images_listed().await.unwrap();
    assert!(listed.contains(&image.reference(REGISTRY)), "{listed:?}");
    nothing_went_wrong(&cluster).await;
}

fn only_the_tag_from(origin: &Origin, image: &Image) {
    let (counts, requests) = (origin.counts(), origin.requests());
    assert_eq!(origin.layer_bytes(image), 0, "{requests:#?}");
    assert_eq!((counts.blob_bytes, counts.manifest_bytes), (0, 0), "{requests:#?}");
    let tag = format!("/v2/{}/manifests/{}", image.repository, image.tag);
    let others = requests.iter().filter(|request| {
        let is_tag = request.method == "HEAD" && request.path == tag;
        !is_tag && request.path != "/v2/"
    });
    assert_eq!(others.count(), 0, "{requests:#?}");
}

/// No peer failed, and nothing was wrong.
async fn nothing_went_wrong(cluster: &Cluster) {
    for member in &cluster.nodes {
        let check = async |name: &str, label: &str| {
            let count = member.peili.metric(name, label).await.unwrap();
            assert!(count.abs() < 0.5, "{} counts {count} {name} {label}", member.peili.plan.name);
        };
        check("peili_mirror_verifications_total", "mismatch").await;
        check("peili_mirror_failovers_total", "").await;
        check("peili_mirror_fetches_total", "failed").await;
        check("peili_mirror_fetches_total", "broken").await;
    }
}

async fn images(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let platforms = [("linux", architecture()), ("linux", "s390x")];
    let images = [
        Image::builder("library/index", "v1").layer(1 << 20).platforms(&platforms),
        Image::builder("library/many", "v1").layers(40, 4096).seed(2),
        Image::builder("library/gzip", "v1").compressed(1 << 20, Compression::Gzip).seed(3),
        Image::builder("library/zstd", "v1").compressed(1 << 20, Compression::Zstd).seed(4),
        Image::builder("library/docker", "v1").compressed(1 << 20, Compression::Gzip).docker().seed(5),
        Image::builder("library/list", "v1").layer(1 << 20).docker().platforms(&platforms).seed(6),
        Image::builder("a/b/c/d", "with.dots_and-dashes").layer(4096).seed(7),
    ];
    for builder in images {
        let image = builder.build().unwrap();
        cluster.seed(0, &image).await;
        cluster.nodes[1].pull(&image).await;
        only_the_tag_from(&cluster.origin, &image);
    }
    // By digest not even the tag.
    let image = Image::builder("library/digest", "v1").layer(4096).seed(8).build().unwrap();
    cluster.seed(0, &image).await;
    cluster.nodes[1].pull_as(&image.digest_reference(REGISTRY)).await;
    assert_eq!(cluster.origin.requests(), []);
    nothing_went_wrong(&cluster).await;
}

async fn dual_stack() {
    let listen = json!({
        "network": {"listen": ["0.0.0.0:5001", "[::]:5001"]},
        "transfer": {"listen": ["0.0.0.0:5002", "[::]:5002"]},
    });
    core(Setup { addresses: Addresses::Dual, config: listen, ..Setup::new(Generation::V2) }).await;
}

async fn large_layer(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let image = Image::builder("library/large", "v1").layer(1 << 30).build().unwrap();
    cluster.origin.add(&image);
    let reference = image.reference(REGISTRY);
    cluster.nodes[0].containerd.cri().pull(&reference, LARGE).await.unwrap();
    cluster.shared(0, &image).await;
    cluster.origin.reset();
    let pulled = cluster.nodes[1].containerd.cri().pull(&reference, LARGE).await.unwrap();
    println!("{generation}: 1 GiB in {:?}", pulled.elapsed);
    only_the_tag_from(&cluster.origin, &image);
    for member in &cluster.nodes {
        // Far below the layer: nothing keeps it. Unoptimised programs take more than the 64 MiB of released ones.
        let peak = member.peili.usage().unwrap().peak_resident;
        assert!(peak < 256 << 20, "{} had {peak} bytes", member.peili.plan.name);
    }
}

/// A containerd that takes such an image gets it from its peers; one that refuses it does so with Peili as without.
async fn sha512(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let image =
        Image::builder("library/app", "v1").layer(1 << 20).algorithm(Algorithm::Sha512).build().unwrap();
    cluster.origin.add(&image);
    cluster.nodes[0].containerd.set_hosts("direct.test", &cluster.origin.url(), &[]).unwrap();
    let cri = |node: usize| cluster.nodes[node].containerd.cri();
    if let Err(refused) = cri(0).pull(&image.reference("direct.test"), PULL).await {
        println!("{generation} takes no sha512: {}", refused.message);
        assert!(refused.message.contains("sha256"), "it is about the digest: {}", refused.message);
        let mirrored = cri(1).pull(&image.reference(REGISTRY), PULL).await.unwrap_err();
        assert!(mirrored.message.contains("sha256"), "{}", mirrored.message);
        return;
    }
    cluster.shared(0, &image).await;
    cluster.origin.reset();
    cluster.nodes[1].pull(&image).await;
    only_the_tag_from(&cluster.origin, &image);
    nothing_went_wrong(&cluster).await;
}

/// A holder whose containerd forgets layers has only manifests and config to give; the layers come from the origin.
async fn discarded_layers(generation: Generation) {
    let discard = |number: usize, options: &mut Options| options.discard_unpacked_layers = number == 0;
    let cluster = Setup { containerd: discard, ..Setup::new(generation) }.start().await;
    let image = Image::builder("library/app", "v1").layers(3, 1 << 20).build().unwrap();
    cluster.origin.add(&image);
    let [first, second] = &cluster.nodes[..] else { unreachable!("there are two nodes") };
    first.pull(&image).await;
    wait::until("layers discarded", Duration::from_secs(20), async || {
        image.layers.iter().all(|layer| !first.containerd.has_blob(layer)).then_some(())
    })
    .await
    .unwrap();
    cluster.shared(0, &image).await;
    cluster.origin.reset();
    second.pull(&image).await;
    assert_eq!(cluster.origin.layer_bytes(&image), image.layer_bytes());
    assert_eq!(cluster.origin.counts().manifest_bytes, 0);
}
