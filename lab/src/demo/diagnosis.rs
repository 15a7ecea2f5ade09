//! The act of the doctor: a right is taken from the account of the nodes, so that nobody can lead; `peili doctor` says which, and prints the
//! Role that gives it back; that is applied as it was printed, and one leads again. Images go on all the while.

use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use peili_lab::node::binary;
use peili_lab::scratch::Scratch;
use peili_lab::wait;
use serde_json::Value;

use super::coordinator::leading;
use super::stage::{LIMIT, REGISTRY, Stage};

/// What doctor is to say.
const CODE: &str = "rights-lock";

/// Fault, verdict, fix, and it is gone.
pub(super) async fn names_a_right(stage: &mut Stage) -> Result<String> {
    let image = stage.image.clone().context("there is no image")?;
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    stage.api.give_right_back().await?;
    wait::until("one node leads", LIMIT, async || leading(stage).await.ok()?).await?;
    ensure!(
        problems(&doctor(stage, &["--json"]).await?)?.is_empty(),
        "something is wrong before anything is"
    );

    stage.api.take_right().await?;
    let began = Instant::now();
    wait::until("nobody leads", LIMIT, async || leading(stage).await.ok()?.is_none().then_some(())).await?;
    let lost = began.elapsed();
    let answer = stage.nodes[0].node.fetch(&path).await?;
    ensure!(answer.status == 200, "node-1 answers {}", answer.status);

    let began = Instant::now();
    let report = doctor(stage, &["--json"]).await?;
    let took = began.elapsed();
    let problems = problems(&report)?;
    ensure!(problems == [CODE], "doctor says {problems:?}");
    let fixes = Scratch::new()?;
    let folder = fixes.path().display().to_string();
    let said = doctor(stage, &["--fix-manifests", &folder]).await?;
    for line in String::from_utf8_lossy(&said.stdout).lines().take_while(|line| !line.is_empty()) {
        stage.screen.say(&format!("   | {line}"));
    }

    let report: Value = serde_json::from_slice(&report.stdout)?;
    let verdicts = report["verdicts"].as_array().context("no verdicts")?;
    let verdict = verdicts.iter().find(|verdict| verdict["code"] == CODE).context("no verdict")?;
    for manifest in verdict["manifests"].as_array().context("no manifests")? {
        let file = fixes.path().join(manifest["file"].as_str().unwrap_or_default());
        ensure!(file.is_file(), "{} was not written", file.display());
        for object in manifest["objects"].as_array().context("no objects")? {
            stage.api.apply(object).await?;
        }
    }
    let began = Instant::now();
    let leader = wait::until("one node leads again", LIMIT, async || leading(stage).await.ok()?).await?;
    let back = began.elapsed();
    wait::until("doctor finds no problem", LIMIT, async || {
        let report = doctor(stage, &["--json"]).await.ok()?;
        self::problems(&report).ok()?.is_empty().then_some(())
    })
    .await?;
    Ok(format!(
        "nobody leads {:.1} s after the right to replace the Lease was taken, and images go on; doctor says {CODE} in {:.2} s and prints the \
         Role; applied, {} leads {:.1} s later, and doctor finds no problem",
        lost.as_secs_f64(),
        took.as_secs_f64(),
        stage.nodes[leader].node.plan.name,
        back.as_secs_f64(),
    ))
}

/// Runs it where node-1 is, as somebody would who looks for what is wrong there.
async fn doctor(stage: &Stage, arguments: &[&str]) -> Result<Output> {
    let plan = &stage.nodes[0].node.plan;
    let mut command = Command::new(binary()?);
    command.args(["doctor", "--config"]).arg(plan.config_path()).arg("--data-dir").arg(plan.data_dir());
    command.args(arguments).env_remove("PEILI_CONFIG");
    let place = stage.namespace(0).cloned();
    let run = move || match place {
        Some(place) => place.run(|| command.output()).and_then(|output| Ok(output?)),
        None => Ok(command.output()?),
    };
    tokio::task::spawn_blocking(run).await?
}

/// The codes of problems in a report.
fn problems(output: &Output) -> Result<Vec<String>> {
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let verdicts = report["verdicts"].as_array().context("no verdicts")?;
    let is_problem = |verdict: &&Value| verdict["severity"] == "problem";
    let code = |verdict: &Value| verdict["code"].as_str().unwrap_or_default().to_owned();
    Ok(verdicts.iter().filter(is_problem).map(code).collect())
}
