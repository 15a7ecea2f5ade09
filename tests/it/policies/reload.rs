//! Policies that are replaced again and again under requests: none is lost, and nothing grows.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use peili_lab::image::Image;
use peili_lab::node::{Node, Plan};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, policy};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Case;
use crate::cluster::REGISTRY;

const RELOADS: usize = 1000;
/// After these, what is allocated once is.
const WARM: usize = 200;
/// Longest for one of them.
const EACH: Duration = Duration::from_secs(20);

pub(super) fn cases() -> Vec<Case> {
    let case = Case::new("policies::reload::a_thousand_times", &[Requirement::Policies], a_thousand_times);
    vec![case.within(Duration::from_secs(300))]
}

fn set(number: usize) -> Value {
    let settings = json!({"deny": [format!("{REGISTRY}/special/**")], "message": format!("set {number}.")});
    let plugin = json!({"name": "allow-list", "path": policy("allow-list"), "settings": settings});
    json!({"policies": {"registry": [plugin]}})
}

/// Each SIGHUP puts other settings in force, while others ask for what is denied by all sets and for what is by none.
async fn a_thousand_times() {
    let scratch = Scratch::new().unwrap();
    let layout = scratch.path().join("layout");
    let image = Image::builder("plain/app", "v1").layer(4096).build().unwrap();
    image.write_layout(&layout, Some(&image.reference(REGISTRY))).unwrap();
    let mut plan = Plan::on_loopback("node-1", &format!("layout:{}", layout.display())).unwrap();
    plan.merge(&set(0));
    let node = RefCell::new(plan.start().await.unwrap());
    let allowed = format!("/v2/{}/manifests/{}?ns={REGISTRY}", image.repository, image.root);
    let denied = format!("/v2/special/app/manifests/{}?ns={REGISTRY}", image.root);
    let (ends, asked, late) = (Cell::new(false), Cell::new(0_u32), Cell::new(0_u32));
    let address = node.borrow().registry();
    let get = async |path: &str| peili_lab::http::get(None, address, path).await;
    let load = async || {
        while !ends.get() {
            for (path, expected) in [(&allowed, 200), (&denied, 403)] {
                let answer = get(path).await.unwrap();
                // One that is not decided in 10 ms, on a machine that does other things too, is bypassed.
                let is_late = answer.status == 404;
                assert!(answer.status == expected || is_late, "{path}: {}", answer.status);
                asked.set(asked.get() + 1);
                late.set(late.get() + u32::from(is_late));
            }
        }
    };
    let usage = || node.borrow().usage().unwrap();
    let reloads = async || {
        let began = Instant::now();
        let mut before = usage();
        for number in 1..=RELOADS {
            renew(&mut node.borrow_mut(), number);
            let (sent, text) = (Instant::now(), format!("set {number}."));
            while !get(&denied).await.unwrap().text().contains(&text) {
                assert!(sent.elapsed() < EACH, "{text}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            if number == WARM {
                before = usage();
            }
        }
        ends.set(true);
        (before, began.elapsed())
    };
    let ((before, took), (), ()) = futures::join!(reloads(), load(), load());
    let after = usage();
    println!(
        "{RELOADS} reloads in {took:?}, {} requests, {} late\n{before:?}\n{after:?}",
        asked.get(),
        late.get()
    );
    assert!(asked.get() > 1000 && late.get() * 20 < asked.get(), "{} of {}", late.get(), asked.get());
    assert!(after.threads <= before.threads + 4, "threads that come and go are few");
    assert!(after.descriptors <= before.descriptors + 8, "connections of the load come and go");
    assert!(after.resident < before.resident + (16 << 20), "16 KiB for each would be growth");
}

fn renew(node: &mut Node, number: usize) {
    node.plan.merge(&set(number));
    node.rewrite().unwrap();
    node.process().unwrap().signal(Signal::HUP).unwrap();
}
