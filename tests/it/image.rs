//! Peili's own image where no registry is: containerd of each generation imports the archive of several architectures, and pods find it by tag
//! and by digest. What the image has is tested where it is written (`lab/src/image/shipped`); no pod runs of it here.

use std::fs;
use std::path::Path;

use peili_lab::containerd::Options;
use peili_lab::image::{Shipped, write_archive};
use peili_lab::requirements::program;
use peili_lab::scratch::Scratch;
use peili_lab::{Containerd, Generation, Image, Requirement};
use serde_json::Value;
use tokio::process::Command;

use crate::Case;
use crate::pulls::{needs, short};

const NAME: &str = "localhost/peili";

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Generation::ALL
        .map(|generation| {
            let name = format!("image::imported::{}", short(generation));
            Case::new(name, &needs(generation), move || imported(generation))
        })
        .into();
    cases.push(Case::new("image::copied_by_skopeo", &[Requirement::Skopeo], copied));
    cases
}

/// The image for two architectures, and its archive. The programs are heads of programs, which nobody runs.
fn two(folder: &Path) -> Image {
    let programs = [62, 183].map(|machine| {
        let mut program = vec![0; 64];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[18] = machine;
        let path = folder.join(format!("program-{machine}"));
        fs::write(&path, program).unwrap();
        path
    });
    let roots = folder.join("roots");
    fs::write(&roots, "-----BEGIN CERTIFICATE-----\n").unwrap();
    let shipped = Shipped {
        programs: programs.into(),
        libraries: Vec::new(),
        policies: Vec::new(),
        roots,
        version: "1.2.3".into(),
        revision: String::new(),
        created: 1_700_000_000,
    };
    let image = shipped.build(NAME).unwrap();
    let layout = folder.join("layout");
    image.write_layout(&layout, Some(&format!("{NAME}:1.2.3"))).unwrap();
    write_archive(&layout, 1_700_000_000, &folder.join("image.tar")).unwrap();
    image
}

/// The commands of docs/image.md and examples/kubernetes/air-gap.md.
async fn imported(generation: Generation) {
    let scratch = Scratch::new().unwrap();
    let image = two(scratch.path());
    let containerd = Containerd::start(Options::new(generation)).await.unwrap();
    let ctr = async |arguments: &[&str]| {
        let mut ctr = Command::new(generation.binary().unwrap().with_file_name("ctr"));
        ctr.arg("--address").arg(containerd.socket()).args(["--namespace", "k8s.io", "images"]);
        let output = ctr.args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    let (tag, digest) = (format!("{NAME}:1.2.3"), format!("{NAME}@{}", image.root));
    let archive = scratch.path().join("image.tar");
    ctr(&["import", "--all-platforms", archive.to_str().unwrap()]).await;
    // `import --digests` of 2.1 names no image by digest that has a name.
    ctr(&["tag", &tag, &digest]).await;
    let names = containerd.cri().images_listed().await.unwrap();
    for name in [tag, digest] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    // All of it is there to be given to nodes of the other architecture, not only this machine's.
    for digest in image.blobs.keys() {
        let blob = containerd.content_root().join("blobs/sha256").join(digest.hex());
        assert!(blob.is_file(), "{digest} is not in the store");
    }
}

/// Another's reader takes the index and both platforms, from the layout and from the archive, and keeps the digest.
async fn copied() {
    let scratch = Scratch::new().unwrap();
    let image = two(scratch.path());
    let skopeo = async |arguments: &[&str]| {
        let mut skopeo = Command::new(program("skopeo").unwrap());
        let output = skopeo.arg("--insecure-policy").args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let at = |name: &str| scratch.path().join(name).display().to_string();
    let layout = format!("oci:{}:1.2.3", at("layout"));
    let raw: Value = serde_json::from_str(&skopeo(&["inspect", "--raw", &layout]).await).unwrap();
    assert_eq!(raw["manifests"][1]["platform"]["variant"], "v8");
    for (number, architecture) in ["amd64", "arm64"].into_iter().enumerate() {
        let of = ["--override-os", "linux", "--override-arch", architecture];
        let told = skopeo(&[&of[..], &["inspect", &layout]].concat()).await;
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["Architecture"], architecture);
        let layers: Vec<_> =
            told["Layers"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
        assert!(layers.contains(&&*image.layers[1 + number].to_string()), "{architecture}: {told}");
    }
    for (number, source) in [layout, format!("oci-archive:{}:1.2.3", at("image.tar"))].iter().enumerate() {
        let copy = at(&format!("copy-{number}"));
        skopeo(&["copy", "--all", source, &format!("dir:{copy}")]).await;
        let manifest = fs::read(Path::new(&copy).join("manifest.json")).unwrap();
        assert_eq!(peili::oci::Digest::sha256(&manifest), image.root, "{source}");
    }
}
