//! The acts, in their order. To add one: write a function that shows it and checks what is seen, and name it in
//! [`ACTS`].

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use peili_lab::image::Image;
use peili_lab::wait;

use super::Act;
use super::screen::bytes;
use super::stage::{LIMIT, Main, REGISTRY, Stage, size};
use super::{coordinator, diagnosis, distrust, newcomer, policy, stranger};

const MIB: u64 = 1 << 20;

/// Everything that is shown.
pub(super) const ACTS: &[Act] = &[
    Act {
        title: "Three nodes find each other: two were told the address of the first, and all have the cluster's key.",
        run: |stage| Box::pin(meet(stage)),
    },
    Act {
        title: "node-1 pulls an image that no node has: it comes from the registry.",
        run: |stage| Box::pin(first_pull(stage)),
    },
    Act {
        title: "node-2 and then node-3 pull it: it comes from the nodes that have it.",
        run: |stage| Box::pin(node_to_node(stage)),
    },
    Act {
        title: "node-3 pulls a layer that node-1 and node-2 have; the one that sends is killed in mid-layer.",
        run: |stage| Box::pin(holder_dies(stage)),
    },
    Act {
        title: "node-2 pulls a layer that only node-1 has; node-1 is killed in mid-layer.",
        run: |stage| Box::pin(last_holder_dies(stage)),
    },
    Act {
        title: "The registry goes down; node-3 pulls by tag an image that the others have.",
        run: |stage| Box::pin(registry_dies(stage)),
    },
    Act {
        title: "A fourth node joins by one address, uses what the others hold, and leaves.",
        run: |stage| Box::pin(newcomer::joins_and_leaves(stage)),
    },
    Act {
        title: "A stranger with another cluster's key asks for an image that all nodes have.",
        run: |stage| Box::pin(stranger::gets_nothing(stage)),
    },
    Act {
        title: "A policy, one mounted file of WebAssembly, decides on node-3 what is mirrored.",
        run: |stage| Box::pin(policy::decides(stage)),
    },
    Act {
        title: "A policy on node-3 distrusts the node that is sending it a layer.",
        run: |stage| Box::pin(distrust::ends_a_transfer(stage)),
    },
    Act {
        title: "One node coordinates, as a policy says; the policy is replaced, the API server cut off, and who leads killed.",
        run: |stage| Box::pin(coordinator::is_elected(stage)),
    },
    Act {
        title: "A right is taken from the nodes' account; `peili doctor` names it and prints what gives it back, which is applied.",
        run: |stage| Box::pin(diagnosis::names_a_right(stage)),
    },
];

async fn meet(stage: &mut Stage) -> Result<String> {
    stage.settle().await?;
    let count = stage.nodes.len();
    for member in &stage.nodes {
        let (name, status) = (&member.node.plan.name, member.node.status().await?);
        ensure!(status["network"]["members"] == count, "{name} does not see {count} members");
        let peers = status["network"]["peers"].as_array().context("no peers")?;
        let proved =
            peers.iter().filter(|peer| peer["proof"].as_str().is_some_and(|proof| proof.starts_with("key ")));
        ensure!(proved.count() == count - 1, "not all have proved themselves to {name}");
    }
    Ok(format!("each sees {count} members, who have proved by the key that they are"))
}

async fn first_pull(stage: &mut Stage) -> Result<String> {
    let image = Image::builder("demo/app", &stage.tag()).layers(12, 8 * MIB).seed(stage.seed()).build()?;
    stage.origin.add(&image);
    let (before, got) = (stage.upstream_bytes(), stage.meter.got(0));
    let took = stage.nodes[0].puller().pull(&image).await?;
    stage.arrived(0, &image)?;
    stage.meter.read().await;
    let upstream = stage.origin.layer_bytes(&image);
    ensure!(
        upstream == image.layer_bytes(),
        "{} of layers came from the registry, the image has {}",
        bytes(upstream),
        bytes(image.layer_bytes())
    );
    ensure!(stage.meter.got(0) == got, "something came from a node");
    stage.main = Main { image: size(&image), upstream: stage.upstream_bytes() - before, peers: 0 };
    stage.image = Some(image);
    stage.settle().await?;
    Ok(format!("{} from the registry in {:.1} s", bytes(stage.main.upstream), took.as_secs_f64()))
}

async fn node_to_node(stage: &mut Stage) -> Result<String> {
    if stage.image.is_none() {
        first_pull(stage).await?;
    }
    let image = stage.image.take().context("there is no image")?;
    let (before, got) = (stage.upstream_bytes(), [1, 2].map(|index| stage.meter.got(index)));
    let (two, three) = (stage.nodes[1].puller(), stage.nodes[2].puller());
    let took = two.pull(&image).await? + three.pull(&image).await?;
    for index in [1, 2] {
        stage.arrived(index, &image)?;
    }
    stage.meter.read().await;
    let layers = stage.origin.layer_bytes(&image);
    ensure!(
        layers == image.layer_bytes(),
        "the registry sent layers again: {}",
        bytes(layers - image.layer_bytes())
    );
    for (index, before) in [1, 2].into_iter().zip(got) {
        let got = stage.meter.got(index) - before;
        let name = &stage.nodes[index].node.plan.name;
        ensure!(got >= image.layer_bytes(), "only {} came to {name} from other nodes", bytes(got));
        stage.main.peers += got;
    }
    stage.main.upstream += stage.upstream_bytes() - before;
    stage.image = Some(image);
    stage.settle().await?;
    Ok(format!(
        "{} from node to node in {:.1} s, 0 B of layers from the registry",
        bytes(stage.main.peers),
        took.as_secs_f64()
    ))
}

async fn holder_dies(stage: &mut Stage) -> Result<String> {
    let image = Image::builder("demo/model", &stage.tag()).layer(64 * MIB).seed(stage.seed()).build()?;
    stage.origin.add(&image);
    for index in [0, 1] {
        stage.nodes[index].puller().pull(&image).await?;
        stage.arrived(index, &image)?;
        stage.settle().await?;
    }
    let gave = [stage.meter.gave(0), stage.meter.gave(1)];
    let puller = stage.nodes[2].puller();
    let victim = async {
        flowing(stage, 2, 16 * MIB).await?;
        let victim = usize::from(stage.meter.gave(1) - gave[1] > stage.meter.gave(0) - gave[0]);
        stage.kill(victim);
        anyhow::Ok(victim)
    };
    let (took, victim) = tokio::try_join!(puller.pull(&image), victim)?;
    stage.arrived(2, &image)?;
    stage.meter.read().await;
    let parts = [0, 1].map(|index| stage.meter.gave(index) - gave[index]);
    let survivor = 1 - victim;
    let layers = stage.origin.layer_bytes(&image);
    ensure!(
        layers == image.layer_bytes(),
        "the registry had to help with {}",
        bytes(layers - image.layer_bytes())
    );
    ensure!(parts[victim] > 0, "the killed node had sent nothing");
    ensure!(parts[survivor] > 0, "the other node has sent nothing");
    let names = [victim, survivor].map(|index| stage.nodes[index].node.plan.name.clone());
    let seen = format!(
        "{} was killed after {}, {} sent {}; the pull ended right after {:.1} s, 0 B from the registry",
        names[0],
        bytes(parts[victim]),
        names[1],
        bytes(parts[survivor]),
        took.as_secs_f64()
    );
    stage.restart(victim).await?;
    stage.settle().await?;
    Ok(seen)
}

async fn last_holder_dies(stage: &mut Stage) -> Result<String> {
    let image = Image::builder("demo/data", &stage.tag()).layer(64 * MIB).seed(stage.seed()).build()?;
    stage.origin.add(&image);
    stage.nodes[0].puller().pull(&image).await?;
    stage.arrived(0, &image)?;
    stage.settle().await?;
    stage.meter.read().await;
    let (layers, got) = (stage.origin.layer_bytes(&image), stage.meter.got(1));
    let puller = stage.nodes[1].puller();
    let kill = async {
        flowing(stage, 1, 16 * MIB).await?;
        stage.kill(0);
        anyhow::Ok(())
    };
    let (took, ()) = tokio::try_join!(puller.pull(&image), kill)?;
    stage.arrived(1, &image)?;
    stage.meter.read().await;
    let (upstream, peer) = (stage.origin.layer_bytes(&image) - layers, stage.meter.got(1) - got);
    ensure!(upstream > 0, "nothing came from the registry");
    ensure!(
        upstream < image.layer_bytes(),
        "the registry had to send the whole layer: what had come was lost"
    );
    stage.restart(0).await?;
    stage.settle().await?;
    Ok(format!(
        "{} came from node-1, and from where that ended {} from the registry; the pull ended right after {:.1} s",
        bytes(peer),
        bytes(upstream),
        took.as_secs_f64()
    ))
}

async fn registry_dies(stage: &mut Stage) -> Result<String> {
    let image = Image::builder("demo/tool", &stage.tag()).layers(4, 8 * MIB).seed(stage.seed()).build()?;
    stage.origin.add(&image);
    for index in [0, 1] {
        stage.nodes[index].puller().pull(&image).await?;
        stage.arrived(index, &image)?;
        stage.settle().await?;
    }
    stage.origin.refuse();
    let before = (stage.upstream_bytes(), stage.meter.got(2));
    // A registry that answers is the one to ask what a tag means; that it does not is noticed by a probe.
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.tag);
    wait::until("node-3 notices that the registry is down", LIMIT, async || {
        stage.nodes[2].node.fetch(&path).await.is_ok_and(|answer| answer.status == 200).then_some(())
    })
    .await?;
    let took = stage.nodes[2].puller().pull(&image).await?;
    stage.arrived(2, &image)?;
    stage.meter.read().await;
    ensure!(stage.upstream_bytes() == before.0, "the registry was not down");
    let got = stage.meter.got(2) - before.1;
    ensure!(got >= image.layer_bytes(), "only {} came from nodes", bytes(got));
    stage.origin.accept();
    stage.settle().await?;
    Ok(format!("the tag and {} came from nodes in {:.1} s", bytes(got), took.as_secs_f64()))
}

/// Waits until node `index` has got `count` bytes more from peers.
pub(super) async fn flowing(stage: &Stage, index: usize, count: u64) -> Result<()> {
    let before = stage.meter.got(index);
    let deadline = tokio::time::Instant::now() + LIMIT;
    while stage.meter.got(index) < before + count {
        if tokio::time::Instant::now() > deadline {
            bail!("nothing comes from other nodes");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        stage.meter.read().await;
    }
    Ok(())
}
