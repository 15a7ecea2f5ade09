//! Stories on a real cluster, the seed's, that of other faults, and that of networks of the pods' own: `lab/cluster/story.sh` brings up etcd, a control plane and three nodes, each with a
//! containerd and a kubelet of its own, deploys the chart there and plays them; this gives it what it needs and shows what it says.
//! `lab/cluster/NOTES.md` has its steps, figures and traps.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use peili_lab::image::{Shipped, write_archive};
use peili_lab::requirements::{cluster, helm, kube_router, prometheus, target};
use peili_lab::scratch::Scratch;
use peili_lab::{Generation, Requirement, node};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::Case;

/// The acts take twelve minutes, nearly all of which is waiting.
const LIMIT: Duration = Duration::from_secs(1500);
/// For how long there is no API server, in each of its two ways; `PEILI_OUTAGE` (seconds) makes it as long.
const OUTAGE: &str = "30";

pub(crate) fn cases() -> Vec<Case> {
    let needs = [
        Requirement::Cluster,
        Requirement::Helm,
        Requirement::KubeRouter,
        Requirement::Prometheus,
        Requirement::Policies,
    ];
    vec![Case::new("story::a_cluster_without_its_api_server", &needs, played).within(LIMIT).throughout()]
}

/// What is in the image of this build: as `cargo xtask image` makes it, but for the program, which is not linked statically here and has its libraries
/// beside it. A file of it is written to `folder`.
pub(crate) fn shipped(folder: &Path) -> Shipped {
    let program = folder.join("peili");
    let built = node::binary().unwrap();
    let stripped = std::process::Command::new("strip").arg("-o").arg(&program).arg(&built).status().unwrap();
    assert!(stripped.success());
    Shipped {
        libraries: Shipped::libraries(&program).unwrap(),
        programs: vec![program],
        policies: Shipped::policies(&target().join("plugins")),
        roots: "/etc/ssl/certs/ca-certificates.crt".into(),
        version: "story".into(),
        revision: String::new(),
        created: 0,
    }
}

fn image(folder: &Path) -> PathBuf {
    let image = shipped(folder).build("localhost/peili").unwrap();
    let (layout, archive) = (folder.join("layout"), folder.join("image.tar"));
    image.write_layout(&layout, Some("localhost/peili:story")).unwrap();
    write_archive(&layout, 0, &archive).unwrap();
    archive
}

async fn played() {
    let scratch = Scratch::new().unwrap();
    let archive = image(scratch.path());
    let containerd = Generation::V1_6.binary().unwrap();
    let outage = std::env::var("PEILI_OUTAGE").unwrap_or_else(|_| OUTAGE.into());
    // By SIGTERM the script tears the cluster down.
    let mut script = Command::new("timeout");
    script
        .args(["--kill-after=60", "1400"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/cluster/story.sh"));
    script
        .env("K8S_BIN", cluster().unwrap())
        .env("CONTAINERD_BIN", containerd.parent().unwrap())
        .env("HELM", helm().unwrap())
        .env("KUBE_ROUTER", kube_router().unwrap())
        .env("PROMETHEUS", prometheus("prometheus").unwrap())
        .env("IMAGE", archive)
        .env("SEED_HOLD", outage)
        .env("LAB_PREFIX", format!("pc{}", std::process::id()))
        .stdout(Stdio::piped());
    let mut script = script.spawn().unwrap();
    let mut lines = BufReader::new(script.stdout.take().unwrap()).lines();
    let (mut steps, mut failed) = (0, String::new());
    while let Some(line) = lines.next_line().await.unwrap() {
        println!("{line}");
        steps += usize::from(line.starts_with("ok "));
        if failed.is_empty() && line.starts_with("FAILED ") {
            failed = line;
        }
    }
    let status = script.wait().await.unwrap();
    assert!(status.success(), "{failed} ({status} after {steps} steps)");
    // Those that NOTES.md lists.
    assert_eq!(steps, 28, "steps");
}
