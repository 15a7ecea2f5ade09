//! The act of the stranger: who has not the cluster's key gets nothing, by no port, while a member gets all.

use anyhow::{Context, Result, bail, ensure};
use peili::network::identity::Identity;
use peili_lab::peer as peer_port;
use peili_lab::scratch::Scratch;
use peili_lab::wait;

use super::screen::bytes;
use super::stage::{LIMIT, REGISTRY, Stage, peer};

const SEGMENT: u64 = 1 << 20;

/// Starts another Peili that knows where all nodes are, and has a key that is not theirs.
pub(super) async fn gets_nothing(stage: &mut Stage) -> Result<String> {
    let image = stage.image.clone().context("there is no image")?;
    let layer = *image.layers.first().context("the image has no layer")?;
    let scratch = Scratch::new()?;
    let key = scratch.path().join("other.key");
    std::fs::write(&key, "the key of another cluster, 32 bytes at least")?;
    let plan = stage.outsider("stranger", &scratch, &key, &stage.nodes)?;
    let refused = async |stage: &Stage| -> Result<f64> {
        let mut refused = 0.0;
        for member in &stage.nodes {
            refused += member.node.metric("peili_network_refused_connections_total", "").await?;
        }
        Ok(refused)
    };
    let before = refused(stage).await?;
    let stranger = plan.start().await?;

    // It dials the nodes by itself.
    wait::until("nodes refuse the stranger", LIMIT, async || {
        refused(stage).await.is_ok_and(|count| count > before).then_some(())
    })
    .await?;
    let path = format!("/v2/{}/blobs/{layer}?ns={REGISTRY}", image.repository);
    let answer = stranger.fetch(&path).await?;
    ensure!(answer.status == 404, "the stranger's own Peili answers {}", answer.status);
    for member in &stage.nodes {
        let (name, status) = (&member.node.plan.name, member.node.status().await?);
        ensure!(peer(&status, &stranger.plan.peer_id).is_none(), "{name} counts the stranger as a peer");
    }

    // It also speaks the protocol of the peer port, straight to node-1. The same words with node-2's identity are heard.
    let served = &stage.nodes[0].node.plan;
    let target = peer_port::of(served)?;
    let foreign = stage.elsewhere();
    let known = Identity::load_or_create(&stage.nodes[1].node.plan.data_dir())?;
    let unknown = Identity::load_or_create(&stranger.plan.data_dir())?;
    let ask = |asker: &peer_port::Asker| asker.ask(&target, &layer, SEGMENT);
    let control = peer_port::run(stage.namespace(1), &known, ask)?;
    let control = control.context("node-2's identity gets nothing either, so that this shows nothing")?;
    if let Ok(count) = peer_port::run(foreign, &unknown, ask)? {
        bail!("node-1 sent {} to the stranger", bytes(count));
    }
    Ok(format!(
        "its connections were refused, its pull found nothing, and node-1's peer port gave it 0 B ({} to node-2)",
        bytes(control)
    ))
}
