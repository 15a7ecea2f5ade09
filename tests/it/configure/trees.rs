//! Real containerds pull through every kind of tree that `peili configure` writes, and as before after `peili cleanup`.

use std::fs;
use std::time::Duration;

use peili_lab::{Certificates, Generation, Image, Origin, Requirement, wait};
use serde_json::json;

use super::snapshot;
use crate::Case;
use crate::cluster::{Cluster, Member, Setup};

/// How long a node keeps what `hosts.toml` says of a registry.
const CACHE: Duration = Duration::from_secs(1);

pub(super) fn cases() -> Vec<Case> {
    let needs = |generation| [Requirement::Root, Requirement::Iproute2, Requirement::Containerd(generation)];
    let case = |generation: Generation| {
        let name = format!("configure::pulls::{generation}").replace([' ', '.'], "_");
        Case::new(name, &needs(generation), move || pulls(generation))
    };
    Generation::ALL.map(case).into()
}

/// One tree: what is there before, and how it is set up.
struct Tree<'a> {
    /// Files below the folder of hosts.
    files: Vec<(&'a str, String)>,
    /// Folders with the certificates of the TLS registry, by their names.
    certificates: Vec<&'a str>,
    /// Of the image.
    registry: &'a str,
    /// Arguments of `peili configure`.
    arguments: Vec<&'a str>,
    /// The image is at the registry with TLS.
    tls: bool,
}

async fn pulls(generation: Generation) {
    let config =
        json!({"log": {"level": "info,peili=debug"}, "upstream": {"cache": format!("{}s", CACHE.as_secs())}});
    let cluster = Setup { config, ..Setup::new(generation) }.start().await;
    let place = &cluster.network.nodes[2];
    let certificates = Certificates::new(place.address()).unwrap();
    let secure =
        Origin::start_tls(Some(&place.namespace), &[(place.address(), 443).into()], &certificates).unwrap();
    let address = place.address().to_string();
    let origin = cluster.origin.url();
    let server = format!("# the house's\nserver = \"{origin}\"\n");
    let host =
        |url: &str| format!("\n# one of ours\n[host.\"{url}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    let tree = |files: &[(&'static str, String)], registry: &'static str, arguments: &[&'static str]| Tree {
        files: files.to_vec(),
        certificates: Vec::new(),
        registry,
        arguments: arguments.to_vec(),
        tls: false,
    };
    let nowhere = "server = \"http://127.0.0.1:9\"\n".to_owned();
    let trees = [
        tree(&[("server.test/hosts.toml", server.clone())], "server.test", &["server.test"]),
        tree(
            &[("hosts.test/hosts.toml", format!("{nowhere}{}{}", host("http://127.0.0.1:9"), host(&origin)))],
            "hosts.test",
            &["hosts.test"],
        ),
        tree(&[("port.test_5000_/hosts.toml", server.clone())], "port.test:5000", &["port.test:5000"]),
        tree(&[("colon.test:5000/hosts.toml", server.clone())], "colon.test:5000", &["colon.test:5000"]),
        tree(&[("docker.io/hosts.toml", server.clone())], "docker.io", &["docker.io"]),
        tree(&[("_default/hosts.toml", host(&origin))], "any.test", &[]),
        // A new folder says what the default said.
        tree(&[("_default/hosts.toml", host(&origin))], "new.test", &["new.test", "_default"]),
        // By a name, as for IPv6.
        tree(
            &[("name.test/hosts.toml", server.clone())],
            "name.test",
            &["name.test", "--mirror", "http://localhost:5000"],
        ),
        Tree {
            certificates: vec![&address],
            registry: &address,
            arguments: vec![&address],
            tls: true,
            ..tree(&[], "", &[])
        },
        Tree {
            certificates: vec!["_default"],
            registry: &address,
            arguments: vec!["_default"],
            tls: true,
            ..tree(&[], "", &[])
        },
        Tree {
            certificates: vec!["_default"],
            registry: &address,
            arguments: vec![&address],
            tls: true,
            ..tree(&[], "", &[])
        },
    ];
    let mut last = "";
    for (seed, tree) in (1..).zip(&trees) {
        if std::mem::replace(&mut last, tree.registry) == tree.registry {
            // What the tree before said of this registry is forgotten; else it is asked with the certificates of then.
            tokio::time::sleep(CACHE * 2).await;
        }
        let origin = if tree.tls { &secure } else { &cluster.origin };
        // Not the tag of another tree, which the other node would tell where the registry does not answer.
        let repository = format!("team/app-{seed}");
        let image = Image::builder(&repository, "v1").layer(1 << 18).seed(seed).build().unwrap();
        origin.add(&image);
        let reference = image.reference(tree.registry);
        let mut before = Vec::new();
        for member in &cluster.nodes {
            let hosts = member.containerd.hosts_dir();
            fs::remove_dir_all(&hosts).unwrap();
            fs::create_dir(&hosts).unwrap();
            for (path, text) in &tree.files {
                fs::create_dir_all(hosts.join(path).parent().unwrap()).unwrap();
                fs::write(hosts.join(path), text).unwrap();
            }
            for folder in &tree.certificates {
                certificates.copy_to(&hosts.join(folder)).unwrap();
            }
            before.push(snapshot(&hosts));
            run(member, "configure", &tree.arguments);
        }
        cluster.nodes[0].pull_as(&reference).await;
        cluster.shared(0, &image).await;
        origin.reset();
        let taken = cluster.nodes[1].peer_bytes().await;
        cluster.nodes[1].pull_as(&reference).await;
        let asked = origin.requests();
        assert_eq!(origin.layer_bytes(&image), 0, "{}: {asked:#?}", tree.registry);
        assert!(cluster.nodes[1].peer_bytes().await >= taken + image.layer_bytes(), "{}", tree.registry);
        // The registry is asked what the tag means, with its certificates.
        assert!(asked.iter().any(|request| request.method == "HEAD"), "{}: {asked:#?}", tree.registry);

        if seed == 1 {
            only(&cluster, &reference, &image, &tree.arguments).await;
        }
        for (member, before) in cluster.nodes.iter().zip(before) {
            run(member, "cleanup", &[]);
            assert_eq!(snapshot(&member.containerd.hosts_dir()), before, "{}", tree.registry);
        }
        // And as before: all from the registry. 1.6 and 1.7 ignored a file without a [host] table, and do so again.
        let is_ignored = tree.files.iter().any(|(_, text)| !text.contains("[host."));
        if is_ignored && generation != Generation::V2 {
            continue;
        }
        let (first, cri) = (&cluster.nodes[0], cluster.nodes[0].containerd.cri());
        cri.remove(&reference).await.unwrap();
        let other = Image::builder("team/after", "v1").layer(1 << 16).seed(100 + seed).build().unwrap();
        origin.add(&other);
        origin.reset();
        first.pull_as(&other.reference(tree.registry)).await;
        assert_eq!(origin.layer_bytes(&other), other.layer_bytes(), "{}", tree.registry);
    }
}

/// Peili is the only host: what it has comes without any registry, and what it has not fails.
async fn only(cluster: &Cluster, reference: &str, image: &Image, arguments: &[&str]) {
    let second = &cluster.nodes[1];
    run(second, "configure", &[arguments, &["--mode", "only"]].concat());
    second.containerd.cri().remove(reference).await.unwrap();
    let other = Image::builder("team/unknown", "v1").layer(4096).seed(99).build().unwrap();
    cluster.origin.add(&other);
    cluster.origin.reset();
    wait::until("a pull without any registry", Duration::from_secs(20), async || {
        second.containerd.cri().pull(reference, crate::cluster::PULL).await.ok()
    })
    .await
    .unwrap();
    assert!(image.layers.iter().all(|layer| second.containerd.has_blob(layer)));
    let registry = reference.split('/').next().unwrap_or_default();
    let limit = crate::cluster::PULL;
    let refused = second.containerd.cri().pull(&other.reference(registry), limit).await.unwrap_err();
    assert!(refused.message.contains("not found") || refused.message.contains("404"), "{}", refused.message);
    // Asked by nobody, but for the probe of who pulled before.
    let asked = cluster.origin.requests();
    assert!(asked.iter().all(|request| request.path == "/v2/"), "{asked:#?}");
}

/// `peili configure` or `peili cleanup` on this member's folder of hosts.
fn run(member: &Member, command: &str, arguments: &[&str]) {
    let mut program = std::process::Command::new(peili_lab::node::binary().unwrap());
    let (hosts, plan) = (member.containerd.hosts_dir(), &member.peili.plan);
    program
        .arg(command)
        .args(arguments)
        .arg("--config")
        .arg(plan.config_path())
        .arg("--config-path")
        .arg(&hosts);
    // The machine's own containerd, if it has one, is not what this is about.
    program.arg("--root").arg("/").env_remove("PEILI_CONFIG");
    let output = program.output().unwrap();
    let code = output.status.code();
    // Exit code 3: the machine has a containerd of its own, which reads other folders.
    assert!(code == Some(0) || code == Some(3) && command == "configure", "{output:?}");
}
