//! A list that a policy gets as a file beside it, changed under a running mirror.

use std::time::{Duration, Instant};

use peili_lab::image::Image;
use peili_lab::node::{Node, Plan};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, policy, wait};
use serde_json::json;

use crate::Case;
use crate::cluster::REGISTRY;

/// Longest from a changed file to what it changes, on a machine that does other things too.
const EACH: Duration = Duration::from_secs(20);

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new("policies::data::a_list_in_a_file", &[Requirement::Policies], a_list_in_a_file)]
}

async fn until(node: &Node, path: &str, status: u16) {
    let began = Instant::now();
    let mut last = None;
    let what = format!("{status} for {path}");
    let waited = wait::until(&what, EACH, async || {
        last = Some(node.fetch(path).await.unwrap());
        last.as_ref().filter(|answer| answer.status == status).map(|_| ())
    });
    if let Err(error) = waited.await {
        panic!("{error}: the last answer is {last:?}");
    }
    println!("{status} after {:?}", began.elapsed());
}

/// What is put on the list is served without another word, what is taken off it is not; a wrong list, and one that is gone, change
/// nothing and are named.
async fn a_list_in_a_file() {
    let scratch = Scratch::new().unwrap();
    let (layout, list) = (scratch.path().join("layout"), scratch.path().join("images.txt"));
    let image = Image::builder("team/app", "v1").layer(4096).build().unwrap();
    image.write_layout(&layout, Some(&image.reference(REGISTRY))).unwrap();
    // As whoever keeps a list should write it: a reader finds the old one or the new one.
    let put = |text: &str| {
        std::fs::write(scratch.path().join("new"), text).unwrap();
        std::fs::rename(scratch.path().join("new"), &list).unwrap();
    };
    let ours = format!("# Ours.\n{REGISTRY}/team/*\n");
    put(&ours);
    let mut plan = Plan::on_loopback("node-1", &format!("layout:{}", layout.display())).unwrap();
    plan.merge(&json!({"policies": {"registry": [{
        "name": "allow-list",
        "path": policy("allow-list"),
        "failure": "deny",
        "settings": {"allow-data": ["images"]},
        "data": [{"name": "images", "path": list}],
        "limits": {"memory": "8MiB", "log": 1},
    }]}}));
    let node = plan.start().await.unwrap();
    let path = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    let problems = async || node.status().await.unwrap()["problems"].to_string();
    until(&node, &path, 200).await;
    put(&format!("{REGISTRY}/other/*\n"));
    until(&node, &path, 403).await;
    for (wrong, part) in
        [(Some(format!("{REGISTRY}//x\n")), "line 1 of `images`"), (None, "is its mount gone")]
    {
        match wrong {
            Some(text) => put(&text),
            None => std::fs::remove_file(&list).unwrap(),
        }
        wait::until(part, EACH, async || problems().await.contains(part).then_some(())).await.unwrap();
        assert_eq!(node.fetch(&path).await.unwrap().status, 403, "the last good list stands");
    }
    put(&ours);
    until(&node, &path, 200).await;
    assert!(!problems().await.contains("images.txt"), "{}", problems().await);
}
