//! Pulls through trees of `hosts.toml` of each shape.

use std::fs;

use peili_lab::{Generation, Image};

use super::{needs, only_the_tag_from_the_origin, short};
use crate::Case;
use crate::cluster::{Cluster, Setup};

const MIRROR: &str = "http://127.0.0.1:5000";

pub(super) fn cases() -> Vec<Case> {
    let case = |generation| {
        let name = format!("pulls::hosts::{}", short(generation));
        Case::new(name, &needs(generation), move || shapes(generation))
    };
    Generation::ALL.map(case).into()
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
        pulled_by_both(&cluster, &image, registry).await;
        only_the_tag_from_the_origin(&cluster, &image);
        let asked = cluster.origin.requests().iter().any(|request| request.method == "HEAD");
        assert!(asked, "{registry}: the tag goes upstream");
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
    check(8, "_default", "any.test", &format!("{resolve}{second}")).await;

    // No `server`, and a registry that does not exist: this node depends on its peers for the tag too.
    write(&cluster, 1, "_default", &resolve);
    let image = Image::builder("team/alone", "v1").layer(1 << 20).seed(9).build().unwrap();
    cluster.origin.add(&image);
    pulled_by_both(&cluster, &image, "alone.test").await;
    assert_eq!(cluster.origin.requests(), []);
}

fn write(cluster: &Cluster, node: usize, folder: &str, text: &str) {
    let folder = cluster.nodes[node].containerd.hosts_dir().join(folder);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("hosts.toml"), text).unwrap();
}

async fn pulled_by_both(cluster: &Cluster, image: &Image, registry: &str) {
    let reference = image.reference(registry);
    cluster.nodes[0].pull_as(&reference).await;
    cluster.shared(0, image).await;
    cluster.origin.reset();
    cluster.nodes[1].pull_as(&reference).await;
}
