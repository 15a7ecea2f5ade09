//! The act of the policy: a component in a mounted file refuses a repository with its reason; a broken one that takes its place
//! changes nothing; without it all is as before. The node runs all the while.

use anyhow::{Context, Result, ensure};
use peili_lab::{Requirement, policy, require, wait};
use serde_json::{Value, json};

use super::stage::{LIMIT, REGISTRY, Stage};

const MESSAGE: &str = "ask the platform team";

/// Puts `allow-list` in force on node-3, replaces it by a file that is none, and takes it away.
pub(super) async fn decides(stage: &mut Stage) -> Result<String> {
    require(&[Requirement::Policies]).map_err(anyhow::Error::msg)?;
    let image = stage.image.clone().context("there is no image")?;
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    let node = &mut stage.nodes[2].node;
    let file = node.plan.data_dir().join("policy.wasm");
    std::fs::copy(policy("allow-list"), &file)?;
    let settings = json!({"deny": [format!("{REGISTRY}/{}", image.repository)], "message": MESSAGE});
    let set = |node: &mut peili_lab::Node, policies: Value| {
        // All that is asked for here is one image, and each of these sets answers otherwise about it.
        node.plan.merge(&json!({"policies": {"registry": policies, "max-change": 100}}));
        node.rewrite()
    };
    let answers = async |node: &peili_lab::Node, status: u16, problem: &str| {
        wait::until(&format!("node-3 answers {status}"), LIMIT, async || {
            let problems = node.status().await.ok()?["problems"].to_string();
            let is_said = problems.contains("policies: ") != problem.is_empty() && problems.contains(problem);
            let answer = node.fetch(&path).await.ok()?;
            (answer.status == status && is_said).then_some(answer)
        })
        .await
    };
    answers(node, 200, "").await.context("node-3 has not got the image")?;

    set(node, json!([{"name": "allow-list", "path": file, "settings": settings, "failure": "deny"}]))?;
    let refused = answers(node, 403, "").await?;
    let body = String::from_utf8_lossy(&refused.body).into_owned();
    ensure!(body.contains(MESSAGE), "the reason is not in the answer: {body}");

    std::fs::write(&file, "no component")?;
    answers(node, 403, "no WebAssembly").await?;

    set(node, json!([]))?;
    answers(node, 200, "").await?;
    Ok(format!(
        "403 \"{MESSAGE}\"; a broken file in its place was refused with its cause, and the policy stood; without it 200 again"
    ))
}
