//! What the image has, that the same files give the same bytes, and that the Containerfile makes the same.

use std::collections::BTreeMap;
use std::io::Read;

use super::*;
use crate::scratch::Scratch;

const AMD64: u8 = 62;
const ARM64: u8 = 183;

/// A program's head with one entry in its table.
fn program(machine: u8, kind: u8) -> Vec<u8> {
    let mut program = vec![0; 64 + 56];
    program[..6].copy_from_slice(b"\x7fELF\x02\x01");
    program[18] = machine;
    program[32] = 64;
    (program[54], program[56], program[64]) = (56, 1, kind);
    program
}

fn shipped(folder: &Path) -> Shipped {
    fs::create_dir_all(folder.join("policies")).unwrap();
    for (name, content) in [
        ("peili", program(AMD64, 1)),
        ("peili-arm64", program(ARM64, 1)),
        ("roots", b"# x\n-----BEGIN CERTIFICATE-----".to_vec()),
    ] {
        fs::write(folder.join(name), content).unwrap();
    }
    let policies = ["b.wasm", "a.wasm"].map(|name| folder.join("policies").join(name));
    for path in &policies {
        fs::write(path, "policy").unwrap();
    }
    Shipped {
        programs: vec![folder.join("peili")],
        libraries: Vec::new(),
        policies: policies.into(),
        roots: folder.join("roots"),
        version: "1.2.3".into(),
        revision: "abc".into(),
        created: 1_700_000_000,
    }
}

fn both(folder: &Path) -> Shipped {
    let shipped = shipped(folder);
    Shipped { programs: vec![folder.join("peili-arm64"), folder.join("peili")], ..shipped }
}

fn json_of(image: &Image, digest: &Digest) -> Value {
    serde_json::from_slice(&image.blobs[digest].read().unwrap()).unwrap()
}

/// Neither the folder, nor the files' times and modes, nor the order in which they are named is in the image.
#[test]
fn the_same_files_give_the_same_bytes() {
    let scratch = Scratch::new().unwrap();
    let archive = |name: &str, is_odd: bool| {
        let folder = scratch.path().join(name);
        let mut shipped = both(&folder);
        if is_odd {
            shipped.programs.reverse();
            shipped.policies.reverse();
            for path in shipped.programs.iter().chain(&shipped.policies).chain([&shipped.roots]) {
                fs::File::options().write(true).open(path).unwrap().set_modified(UNIX_EPOCH).unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
            }
        }
        let image = shipped.build("peili").unwrap();
        let layout = folder.join("layout");
        image.write_layout(&layout, Some("peili:1.2.3")).unwrap();
        if is_odd {
            fs::set_permissions(layout.join("index.json"), fs::Permissions::from_mode(0o600)).unwrap();
        }
        write_archive(&layout, 1_700_000_000, &folder.join("image.tar")).unwrap();
        (image.root, fs::read(folder.join("image.tar")).unwrap())
    };
    let (one, other) = (archive("one", false), archive("other/below", true));
    assert!(one == other, "{} {}", one.0, other.0);
}

#[test]
fn it_has_the_program_the_policies_and_roots_and_nothing_of_the_machine() {
    let scratch = Scratch::new().unwrap();
    let image = shipped(scratch.path()).build("peili").unwrap();
    let mut found = Vec::new();
    for digest in &image.layers {
        let bytes = image.blobs[digest].read().unwrap();
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 1_700_000_000);
            let (path, mode) = (entry.path().unwrap().display().to_string(), header.mode().unwrap());
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.push(format!("{path} {mode:o} {}", content.len()));
        }
    }
    let expected = [
        "etc/ 755 0",
        "etc/ssl/ 755 0",
        "etc/ssl/certs/ 755 0",
        "etc/ssl/certs/ca-certificates.crt 644 31",
        "usr/ 755 0",
        "usr/share/ 755 0",
        "usr/share/peili/ 755 0",
        "usr/share/peili/policies/ 755 0",
        "usr/share/peili/policies/a.wasm 644 6",
        "usr/share/peili/policies/b.wasm 644 6",
        "usr/ 755 0",
        "usr/bin/ 755 0",
        "usr/bin/peili 755 120",
    ];
    assert_eq!(found, expected);
    let config = json_of(&image, &image.configs[0]);
    assert_eq!(config["created"], "2023-11-14T22:13:20Z");
    assert_eq!((&config["architecture"], &config["config"]["Cmd"]), (&json!("amd64"), &json!(["run"])));
}

/// As a runtime reads it: from the name to the platform's manifest, its config and its layers.
#[test]
fn an_index_leads_each_platform_to_its_program() {
    let scratch = Scratch::new().unwrap();
    let image = both(scratch.path()).build("peili").unwrap();
    let index = json_of(&image, &image.root);
    assert_eq!(index["mediaType"], INDEX);
    assert_eq!(index["annotations"]["org.opencontainers.image.version"], "1.2.3");
    let entries = index["manifests"].as_array().unwrap();
    let expected = [
        (json!({"os": "linux", "architecture": "amd64"}), program(AMD64, 1)),
        (json!({"os": "linux", "architecture": "arm64", "variant": "v8"}), program(ARM64, 1)),
    ];
    assert_eq!(entries.len(), expected.len());
    let mut shared = Vec::new();
    for (entry, (platform, program)) in entries.iter().zip(expected) {
        assert_eq!(entry["platform"], platform);
        let digest = |descriptor: &Value| -> Digest {
            let digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
            assert_eq!(descriptor["size"], image.blobs[&digest].size);
            digest
        };
        let manifest = json_of(&image, &digest(entry));
        assert_eq!(manifest["annotations"], index["annotations"]);
        let config = json_of(&image, &digest(&manifest["config"]));
        for (key, value) in platform.as_object().unwrap() {
            assert_eq!(config[key], *value);
        }
        let layers: Vec<_> = manifest["layers"].as_array().unwrap().iter().map(digest).collect();
        let tars = layers.iter().map(|layer| {
            let mut tar = Vec::new();
            let bytes = image.blobs[layer].read().unwrap();
            flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut tar).unwrap();
            tar
        });
        let tars: Vec<_> = tars.collect();
        let ids: Vec<_> = tars.iter().map(|tar| json!(Digest::sha256(tar))).collect();
        assert_eq!(config["rootfs"]["diff_ids"], json!(ids));
        let mut tar = tar::Archive::new(&tars[1][..]);
        let contents = tar.entries().unwrap().map(|entry| {
            let mut content = Vec::new();
            entry.unwrap().read_to_end(&mut content).unwrap();
            content
        });
        assert_eq!(contents.last().unwrap(), program);
        shared.push(layers[0]);
    }
    assert_eq!(shared[0], shared[1], "what is the same for all is there once");
    // Index, manifests and configs; one layer for all, and one of each.
    assert_eq!(image.blobs.len(), 1 + 2 + 2 + 3);
}

#[test]
fn the_files_for_an_engine_are_those_of_the_layers() {
    let scratch = Scratch::new().unwrap();
    let shipped = shipped(scratch.path());
    let folder = scratch.path().join("tree");
    shipped.write_tree(&folder).unwrap();
    let mut expected = shipped.beside().unwrap();
    expected.extend(program_entries(program(AMD64, 1)));
    for entry in expected {
        let path = folder.join(&entry.path);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, entry.mode, "{}", entry.path);
        assert_eq!(metadata.modified().unwrap(), shipped.at(), "{}", entry.path);
        if let Some(content) = entry.content {
            assert_eq!(fs::read(path).unwrap(), content);
        }
    }
    let mut files = Vec::new();
    list(&folder, &folder, &mut files).unwrap();
    assert_eq!(files.len(), 4, "{files:?}");
    assert!(shipped.write_tree(&folder).is_err(), "into a folder that is there");
    assert!(both(scratch.path()).write_tree(&scratch.path().join("other")).is_err(), "of two programs");
}

#[test]
fn what_would_not_run_is_refused() {
    let scratch = Scratch::new().unwrap();
    let shipped = shipped(scratch.path());
    let refused_as = |shipped: &Shipped, why: &str| {
        let error = format!("{:#}", shipped.build("peili").unwrap_err());
        assert!(error.contains(why), "{error}");
    };
    let peili = &shipped.programs[0];
    let refused = |content: Vec<u8>, why: &str| {
        fs::write(peili, content).unwrap();
        refused_as(&shipped, why);
    };
    refused(program(AMD64, 3), "needs a dynamic linker");
    let libraries = vec![shipped.roots.clone()];
    let with_linker = Shipped { libraries, ..shipped.clone() };
    with_linker.build("peili").unwrap();
    let programs = vec![peili.clone(), scratch.path().join("peili-arm64")];
    refused_as(&Shipped { programs, ..with_linker }, "libraries are of one architecture");
    refused(b"#!/bin/sh".to_vec(), "not a program of Linux");
    refused(program(AMD64, 1)[..65].to_vec(), "cut off");
    let mut far = program(AMD64, 1);
    far[32..40].fill(0xff);
    refused(far, "cut off");
    refused(program(8, 1), "unknown machine 8");
    fs::write(peili, program(AMD64, 1)).unwrap();
    let twice = Shipped { programs: vec![peili.clone(), peili.clone()], ..shipped.clone() };
    refused_as(&twice, "a second program for amd64");
    refused_as(&Shipped { programs: Vec::new(), ..shipped.clone() }, "needs a program");
}

/// Without an engine nothing can run it; but what it says of the image is what the image says of itself.
#[test]
fn the_containerfile_says_what_the_config_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("deploy/Containerfile")).unwrap().replace("\\\n", " ");
    let stages: Vec<&str> = text.split("\nFROM ").collect();
    assert_eq!(stages.len(), 3, "a head, a build and the image");
    let (build, last) = (stages[1], stages[2]);
    assert!(last.starts_with("scratch\n"), "{last}");
    let lines = |stage: &str, word: &str| -> Vec<String> {
        let found = stage.lines().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
        found.map(|rest| rest.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let scratch = Scratch::new().unwrap();
    let shipped = Shipped { version: env!("CARGO_PKG_VERSION").into(), ..shipped(scratch.path()) };
    let config = shipped.config("amd64", &[])["config"].clone();
    let mut said = json!({"Env": lines(last, "ENV"), "WorkingDir": lines(last, "WORKDIR")[0]});
    for (word, key) in [("ENTRYPOINT", "Entrypoint"), ("CMD", "Cmd")] {
        said[key] = serde_json::from_str(&lines(last, word)[0]).unwrap();
    }
    for (word, key) in [("USER", "User"), ("EXPOSE", "ExposedPorts"), ("VOLUME", "Volumes")] {
        if let Some(value) = lines(last, word).pop() {
            said[key] = value.into();
        }
    }
    let labels = lines(last, "LABEL").into_iter().map(|label| {
        let (key, value) = label.split_once('=').unwrap();
        (key.to_owned(), value.trim_matches('"').to_owned())
    });
    let mut labels: BTreeMap<_, _> = labels.collect();
    // The engine's arguments say these.
    for (name, argument, value) in
        [("created", "CREATED", shipped.time()), ("revision", "REVISION", "abc".into())]
    {
        let label = labels.get_mut(&format!("org.opencontainers.image.{name}")).unwrap();
        assert_eq!(*label, format!("${{{argument}}}"));
        assert!(lines(last, "ARG").iter().any(|known| known.split('=').next() == Some(argument)));
        *label = value;
    }
    said["Labels"] = json!(labels);
    assert_eq!(said, config);

    let copied = lines(build, "COPY").into_iter().flat_map(|line| {
        let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        words.pop();
        words
    });
    for source in copied {
        assert!(root.join(&source).exists(), "COPY {source}: there is none");
    }
    let from = lines(last, "COPY");
    assert_eq!(from, ["--from=build /image/ /"]);
    assert!(build.contains("--tree /image"), "{build}");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let rust =
        manifest.lines().find_map(|line| line.strip_prefix("rust-version = ")).unwrap().trim_matches('"');
    assert!(stages[0].contains(&format!("RUST_IMAGE=docker.io/library/rust:{rust}-")), "{}", stages[0]);
    // Each engine has its own name for it, and without it sends gigabytes of build folders.
    let ignored = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(ignored(".containerignore"), ignored("deploy/Containerfile.dockerignore"));
}
