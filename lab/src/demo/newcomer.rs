//! The act of the newcomer: one address and the key are all that it takes to be a member, and who leaves is not waited for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peili_lab::scratch::Scratch;
use peili_lab::wait;

use super::screen::bytes;
use super::stage::{LIMIT, REGISTRY, Stage, peer};

/// Longest time in which a node that is told to end does.
const END: Duration = Duration::from_secs(15);

/// Starts a fourth node, lets it get a layer, and ends it.
pub(super) async fn joins_and_leaves(stage: &mut Stage) -> Result<String> {
    let image = stage.image.clone().context("there is no image")?;
    let layer = image.layers.first().context("the image has no layer")?;
    let scratch = Scratch::new()?;
    // Any member's address does.
    let plan = stage.outsider("node-4", &scratch, &stage.key(), &stage.nodes[2..])?;
    let count = stage.nodes.len();
    let began = Instant::now();
    let mut newcomer = plan.launch()?;
    wait::until("node-4 is a member", LIMIT, async || {
        let status = newcomer.status().await.ok()?;
        let network = &status["network"];
        (network["members"] == count + 1 && network["complete"] == true).then_some(())
    })
    .await?;
    let joined = began.elapsed();
    let path = format!("/v2/{}/blobs/{layer}?ns={REGISTRY}", image.repository);
    let answer = newcomer.fetch(&path).await?;
    ensure!(
        answer.status == 200,
        "node-4 answers {} for what the others hold: {}",
        answer.status,
        answer.text()
    );

    let began = Instant::now();
    newcomer.terminate(END).await?;
    for member in &stage.nodes {
        wait::until("the others know that node-4 has left", LIMIT, async || {
            let status = member.node.status().await.ok()?;
            let is_gone = peer(&status, &newcomer.plan.peer_id).is_none_or(|peer| peer["state"] == "left");
            (is_gone && status["network"]["members"] == count).then_some(())
        })
        .await?;
    }
    Ok(format!(
        "a member {:.1} s after its start, with {} from the others; {:.1} s after SIGTERM all knew that it had left",
        joined.as_secs_f64(),
        bytes(answer.body.len() as u64),
        began.elapsed().as_secs_f64()
    ))
}
