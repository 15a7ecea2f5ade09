//! Pulls through trees of `hosts.toml` of each shape.

use std::fs;

use peili_lab::containerd::Options;
use peili_lab::{Certificates, Generation, Image, Origin};

use super::tags::cause;
use super::{needs, only_the_tag_from, short};
use crate::Case;
use crate::cluster::{Cluster, Setup};

const MIRROR: &str = "http://127.0.0.1:5000";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for generation in Generation::ALL {
        let name = |what: &str| format!("pulls::{what}::{}", short(generation));
        let needs = needs(generation);
        cases.push(Case::new(name("hosts"), &needs, move || shapes(generation)));
        cases.push(Case::new(name("hosts_in_two_folders"), &needs, move || two_folders(generation)));
        cases.push(Case::new(name("hosts_with_tls"), &needs, move || certificates(generation)));
    }
    cases
}

async fn shapes(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let origin = cluster.origin.url();
    let server = format!("server = \"{origin}\"\n");
    let resolve = format!("[host.\"{MIRROR}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    let pull = format!("[host.\"{MIRROR}\"]\n  capabilities = [\"pull\"]\n");
    let second = format!("[host.\"{origin}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    let nowhere = "server = \"http://127.0.0.1:9\"\n";

    let check = async |seed: u64, folder: &str, registry: &str, text: &str| {
        write(&cluster, 0, folder, text);
        write(&cluster, 1, folder, text);
        let image = Image::builder("team/app", "v1").layer(1 << 20).seed(seed).build().unwrap();
        cluster.origin.add(&image);
        tag_from_upstream(&cluster, &cluster.origin, &image, registry).await;
    };
    check(1, "plain.test", "plain.test", &format!("{server}{resolve}")).await;
    check(2, "port.test_5000_", "port.test:5000", &format!("{server}{resolve}")).await;
    // The folder with underscores wins over the one with the colon, which would lead nowhere.
    for node in [0, 1] {
        write(&cluster, node, "both.test:5000", &format!("{nowhere}[host.\"http://127.0.0.1:9\"]\n"));
    }
    check(3, "both.test_5000_", "both.test:5000", &format!("{server}{resolve}")).await;
    check(4, "colon.test:5000", "colon.test:5000", &format!("{server}{resolve}")).await;
    check(5, "pull.test", "pull.test", &format!("{server}{pull}")).await;
    check(6, "second.test", "second.test", &format!("{nowhere}{resolve}{second}")).await;
    check(7, "docker.io", "docker.io", &format!("{server}{resolve}")).await;
    // A mirror that does not answer, before Peili.
    let dead = "[host.\"http://127.0.0.1:9\"]\n  capabilities = [\"pull\", \"resolve\"]\n";
    check(10, "dead.test", "dead.test", &format!("{server}{dead}{resolve}")).await;
    let overridden = |url: &str| {
        format!("[host.\"{url}/v2\"]\n  capabilities = [\"pull\", \"resolve\"]\n  override_path = true\n")
    };
    let header = format!("[host.\"{origin}/v2\".header]\n  x-lab = \"one\"\n");
    let text = format!("{nowhere}{}{}{header}", overridden(MIRROR), overridden(&origin));
    check(11, "path.test", "path.test", &text).await;
    // containerd 1.6 takes no such name for an image.
    if generation != Generation::V1_6 {
        check(12, "[fd77::9]_5000_", "[fd77::9]:5000", &format!("{server}{resolve}")).await;
    }
    check(8, "_default", "any.test", &format!("{resolve}{second}")).await;

    // No `server`, and a registry that does not exist: this node depends on its peers for the tag too.
    write(&cluster, 1, "_default", &resolve);
    let image = Image::builder("team/alone", "v1").layer(1 << 20).seed(9).build().unwrap();
    cluster.origin.add(&image);
    pulled_by_both(&cluster, &cluster.origin, &image, "alone.test").await;
    assert_eq!(cluster.origin.requests(), []);
}

/// `config_path` has two folders. The transfer service of containerd 2.x takes the whole for one, and its CRI does not.
async fn two_folders(generation: Generation) {
    let containerd = |_, options: &mut Options| {
        options.second_hosts_dir = true;
        options.local_pull = true;
    };
    let cluster = Setup { containerd, ..Setup::new(generation) }.start().await;
    let server = format!("server = \"{}\"\n", cluster.origin.url());
    let resolve = format!("[host.\"{MIRROR}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    for (seed, folder, registry) in
        [(1, "first.test", "first.test"), (2, "../docker.d/second.test", "second.test")]
    {
        write(&cluster, 0, folder, &format!("{server}{resolve}"));
        write(&cluster, 1, folder, &format!("{server}{resolve}"));
        let image = Image::builder("team/app", "v1").layer(1 << 20).seed(seed).build().unwrap();
        cluster.origin.add(&image);
        tag_from_upstream(&cluster, &cluster.origin, &image, registry).await;
    }
}

/// A registry with an authority of its own that wants a certificate of its clients.
async fn certificates(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let place = &cluster.network.nodes[2];
    let certificates = Certificates::new(place.address()).unwrap();
    let origin =
        Origin::start_tls(Some(&place.namespace), &[(place.address(), 443).into()], &certificates).unwrap();
    let server = format!("https://{}", place.address());
    let [ca, certificate, key] = certificates.files().map(|path| path.display().to_string());
    let tls = format!("ca = \"{ca}\"\nclient = [[\"{certificate}\", \"{key}\"]]\n");
    let resolve = format!("[host.\"{MIRROR}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    let second = format!("[host.\"{server}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    for (seed, registry, text) in [
        (1, "server.test", format!("server = \"{server}\"\n{tls}{resolve}")),
        (2, "second.test", format!("server = \"http://127.0.0.1:9\"\n{resolve}{second}{tls}")),
    ] {
        write(&cluster, 0, registry, &text);
        write(&cluster, 1, registry, &text);
        let image = Image::builder("team/app", "v1").layer(1 << 20).seed(seed).build().unwrap();
        origin.add(&image);
        tag_from_upstream(&cluster, &origin, &image, registry).await;
    }

    // Docker's way: certificates, and no hosts.toml. There is no mirror in that; whoever asks Peili itself is told that
    // the registry answers, which it knows by the same certificates.
    let registry = place.address().to_string();
    let image = Image::builder("team/docker", "v1").layer(1 << 20).seed(3).build().unwrap();
    origin.add(&image);
    for member in &cluster.nodes {
        certificates.copy_to(&member.containerd.hosts_dir().join(&registry)).unwrap();
        member.pull_as(&image.reference(&registry)).await;
    }
    let path = format!("/v2/{}/manifests/{}?ns={registry}", image.repository, image.tag);
    let answer = cluster.nodes[1].peili.fetch(&path).await.unwrap();
    assert_eq!((answer.status, cause(&answer)), (404, "tag-upstream".into()));
}

async fn tag_from_upstream(cluster: &Cluster, origin: &Origin, image: &Image, registry: &str) {
    pulled_by_both(cluster, origin, image, registry).await;
    only_the_tag_from(origin, image);
    let asked = origin.requests().iter().any(|request| request.method == "HEAD");
    assert!(asked, "{registry}: the tag goes upstream");
}

fn write(cluster: &Cluster, node: usize, folder: &str, text: &str) {
    let folder = cluster.nodes[node].containerd.hosts_dir().join(folder);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("hosts.toml"), text).unwrap();
}

async fn pulled_by_both(cluster: &Cluster, origin: &Origin, image: &Image, registry: &str) {
    let reference = image.reference(registry);
    cluster.nodes[0].pull_as(&reference).await;
    cluster.shared(0, image).await;
    origin.reset();
    cluster.nodes[1].pull_as(&reference).await;
}
