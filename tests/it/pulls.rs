//! Pulls through CRI, from node to node, counted at the origin.

use peili_lab::{Generation, Image, Requirement};

use crate::Case;
use crate::cluster::Setup;

pub(crate) fn cases() -> Vec<Case> {
    Generation::ALL
        .map(|generation| {
            let name = format!("pulls::core::{}", short(generation));
            Case::new(name, &needs(generation), move || core(generation))
        })
        .into_iter()
        .collect()
}

/// For names of cases.
fn short(generation: Generation) -> &'static str {
    match generation {
        Generation::V1_6 => "containerd_1_6",
        Generation::V1_7 => "containerd_1_7",
        Generation::V2 => "containerd_2",
    }
}

fn needs(generation: Generation) -> [Requirement; 3] {
    [Requirement::Root, Requirement::Iproute2, Requirement::Containerd(generation)]
}

/// The promise: what one node pulled costs the next one not a layer byte from the origin.
async fn core(generation: Generation) {
    let cluster = Setup::new(generation).start().await;
    let image =
        Image::builder("library/app", "v1").layer(12 << 20).layer(1 << 20).layer(4096).build().unwrap();
    cluster.origin.add(&image);
    let [first, second] = &cluster.nodes[..] else { unreachable!() };
    first.pull(&image).await;
    assert_eq!(cluster.origin.layer_bytes(&image), image.layer_bytes());
    cluster.shared(0, &image).await;
    cluster.origin.reset();

    let pulled = second.pull(&image).await;
    eprintln!("{pulled:?} {:?}", cluster.origin.requests());
    assert_eq!(cluster.origin.layer_bytes(&image), 0);
    assert!(second.peer_bytes().await >= image.layer_bytes());
    assert!(image.layers.iter().all(|layer| second.containerd.has_blob(layer)));
}
