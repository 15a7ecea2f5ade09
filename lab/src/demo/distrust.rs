//! The act of distrust: the node that is sending a layer is denied by a policy of the one that takes it, and the other holder
//! sends the rest.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use peili_lab::image::Image;
use peili_lab::{Node, Requirement, policy, require, wait};
use serde_json::{Value, json};

use super::acts::flowing;
use super::screen::bytes;
use super::stage::{LIMIT, Stage};

const MIB: u64 = 1 << 20;
/// A transfer is cut at its next chunk: what comes after so long would be a transfer that goes on.
const CUT: Duration = Duration::from_millis(500);

/// Puts `node-allow` in force on node-3, lets it pull, and has it deny whoever sends.
pub(super) async fn ends_a_transfer(stage: &mut Stage) -> Result<String> {
    require(&[Requirement::Policies]).map_err(anyhow::Error::msg)?;
    let image = Image::builder("demo/secret", &stage.tag()).layer(128 * MIB).seed(stage.seed()).build()?;
    stage.origin.add(&image);
    set(&mut stage.nodes[2].node, &json!([]))?;
    let (one, two) = (stage.nodes[0].puller(), stage.nodes[1].puller());
    tokio::try_join!(one.pull(&image), two.pull(&image))?;
    for index in [0, 1] {
        stage.arrived(index, &image)?;
    }
    said(&stage.nodes[2].node, "leaves all to admission").await?;
    stage.settle().await?;
    stage.meter.read().await;
    let (layers, gave) = (stage.origin.layer_bytes(&image), [stage.meter.gave(0), stage.meter.gave(1)]);
    let puller = stage.nodes[2].puller();
    let deny = async {
        flowing(stage, 2, 16 * MIB).await?;
        let denied = usize::from(stage.meter.gave(1) - gave[1] > stage.meter.gave(0) - gave[0]);
        let name = stage.nodes[denied].node.plan.name.clone();
        let began = Instant::now();
        set(&mut stage.nodes[2].node, &json!([{"names": [name]}]))?;
        said(&stage.nodes[2].node, "refuses peer").await?;
        let after = began.elapsed();
        tokio::time::sleep(CUT).await;
        stage.meter.read().await;
        anyhow::Ok((denied, after, stage.meter.gave(denied) - gave[denied]))
    };
    let (_, (denied, after, cut)) = tokio::try_join!(puller.pull(&image), deny)?;
    stage.arrived(2, &image)?;
    stage.meter.read().await;
    let parts = [0, 1].map(|index| stage.meter.gave(index) - gave[index]);
    let other = 1 - denied;
    let names = [denied, other].map(|index| stage.nodes[index].node.plan.name.clone());
    ensure!(parts[denied] == cut, "{} went on sending", names[0]);
    ensure!(cut > 0 && cut < image.layer_bytes(), "{} sent {}", names[0], bytes(cut));
    ensure!(parts[other] > 0, "{} has sent nothing", names[1]);
    ensure!(stage.origin.layer_bytes(&image) == layers, "the registry had to help");

    let node = &mut stage.nodes[2].node;
    node.plan.merge(&json!({"policies": {"trust": []}}));
    node.rewrite()?;
    stage.settle().await?;
    Ok(format!(
        "{} had sent {} when node-3 was told to deny it; {:.1} s later it was cut off, and {} sent {}",
        names[0],
        bytes(cut),
        after.as_secs_f64(),
        names[1],
        bytes(parts[other])
    ))
}

fn set(node: &mut Node, deny: &Value) -> Result<()> {
    let path = policy("node-allow");
    let plugin = json!({"name": "node-allow", "path": path, "settings": {"deny": deny}});
    node.plan.merge(&json!({"policies": {"trust": [plugin]}}));
    node.rewrite()
}

async fn said(node: &Node, sign: &str) -> Result<()> {
    let is_said = async || node.status().await.ok()?.to_string().contains(sign).then_some(());
    wait::until(&format!("the status says: {sign}"), LIMIT, is_said).await
}
