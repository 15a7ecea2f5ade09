//! The image that Peili is shipped as: its program, the policies beside it and roots for TLS on an empty base, without a shell.
//!
//! The same files and the same time give the same bytes. It compiles nothing; `cargo xtask image` does.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use flate2::GzBuilder;
use flate2::write::GzEncoder;
use peili::oci::{Algorithm, Digest};
use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::{Blob, Content, Image, descriptor};
use crate::policies::SHIPPED;

/// Where the image has them.
const PROGRAM: &str = "usr/bin/peili";
const POLICIES: &str = "usr/share/peili/policies";
/// Where Debian and the libraries of TLS have it.
const ROOTS: &str = "etc/ssl/certs/ca-certificates.crt";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What goes into it.
#[derive(Clone, Debug)]
pub struct Shipped {
    /// The program, which needs no others' libraries.
    pub program: PathBuf,
    /// What a program needs that is linked dynamically, for tests: its linker and libraries, which get the paths that they have here.
    pub libraries: Vec<PathBuf>,
    /// Policies: components, at most one of a name.
    pub policies: Vec<PathBuf>,
    /// Roots for TLS, as PEM.
    pub roots: PathBuf,
    /// `0.1.0`
    pub version: String,
    /// The commit it was built from; empty: not known.
    pub revision: String,
    /// Seconds since 1970 of all files and of the image.
    pub created: u64,
}

/// A file or a folder of a layer.
struct Entry {
    path: String,
    mode: u32,
    /// `None`: a folder.
    content: Option<Vec<u8>>,
}

impl Shipped {
    /// Those of this folder's components that are shipped.
    #[must_use]
    pub fn policies(folder: &Path) -> Vec<PathBuf> {
        SHIPPED.map(|name| folder.join(name).with_extension("wasm")).into()
    }

    /// The linker and the libraries of a program, as the linker of this machine finds them.
    ///
    /// # Errors
    /// It finds one of them not, or there is no `ldd`.
    pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
        let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && !text.contains("not found"), "{}: {text}", program.display());
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f...)", "/lib64/ld-linux-x86-64.so.2 (0x7f...)"
        let words = text.split_whitespace().filter(|word| word.starts_with('/'));
        Ok(words.map(PathBuf::from).collect())
    }

    /// Makes the image `repository:version`.
    ///
    /// # Errors
    /// A file that cannot be read, a program that is none of Linux or needs a dynamic linker.
    pub fn build(&self, repository: &str) -> Result<Image> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let program = read(&self.program)?;
        let architecture = architecture(&program, !self.libraries.is_empty())
            .with_context(|| format!("{} does not suit", self.program.display()))?;
        let roots = read(&self.roots)?;
        ensure!(
            roots.starts_with(b"-----BEGIN") || roots.windows(11).any(|line| line == b"\n-----BEGIN"),
            "{} has no certificates",
            self.roots.display()
        );
        let mut beside = folders(ROOTS);
        beside.push(Entry { path: ROOTS.into(), mode: 0o644, content: Some(roots) });
        beside.extend(folders(&format!("{POLICIES}/x")));
        // By name: the same bytes in whatever order they are given.
        let named = self.policies.iter().map(|path| (path.file_name().unwrap_or_default(), path));
        for (name, path) in named.collect::<BTreeMap<_, _>>() {
            let path_in_image = format!("{POLICIES}/{}", name.to_string_lossy());
            beside.push(Entry { path: path_in_image, mode: 0o644, content: Some(read(path)?) });
        }
        for path in &self.libraries {
            let name = path.to_string_lossy().trim_start_matches('/').to_owned();
            beside.extend(folders(&name));
            beside.push(Entry { path: name, mode: 0o755, content: Some(read(path)?) });
        }
        let mut programs = folders(PROGRAM);
        programs.push(Entry { path: PROGRAM.into(), mode: 0o755, content: Some(program) });

        let mut image = Image::empty(repository, &self.version);
        // What changes most stands last.
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for entries in [beside, programs] {
            let tar = self.tar(&entries)?;
            diff_ids.push(Digest::sha256(&tar).to_string());
            let bytes = compressed(&tar)?;
            let (digest, size) = (Digest::sha256(&bytes), bytes.len() as u64);
            layers.push(descriptor(LAYER, digest, size));
            image.layers.push(digest);
            image.blobs.insert(
                digest,
                Blob { media_type: LAYER.into(), size, content: Content::Memory(bytes.into()) },
            );
        }
        let config = self.config(architecture, &diff_ids);
        let (_, digest) = image.put_manifest(
            Algorithm::Sha256,
            MANIFEST,
            CONFIG,
            &config,
            &layers,
            &json!({"annotations": self.labels()}),
        );
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": MANIFEST, "digest": digest.to_string(), "size": image.blobs[&digest].size,
                "platform": {"os": "linux", "architecture": architecture},
            }],
        });
        image.root = image.put_json(Algorithm::Sha256, "application/vnd.oci.image.index.v1+json", &index);
        image.manifests.insert(0, image.root);
        Ok(image)
    }

    fn time(&self) -> String {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.created);
        humantime::format_rfc3339_seconds(time).to_string()
    }

    /// As the image specification names them (annotations.md).
    fn labels(&self) -> Value {
        let mut labels = json!({
            "org.opencontainers.image.title": "peili",
            "org.opencontainers.image.description": "A container-image mirror for the nodes of a cluster",
            "org.opencontainers.image.version": self.version,
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.opencontainers.image.created": self.time(),
        });
        if !self.revision.is_empty() {
            labels["org.opencontainers.image.revision"] = self.revision.as_str().into();
        }
        labels
    }

    fn config(&self, architecture: &str, diff_ids: &[String]) -> Value {
        json!({
            "created": self.time(),
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Entrypoint": [format!("/{PROGRAM}")],
                "Cmd": ["run"],
                "Env": ["PATH=/usr/bin", format!("SSL_CERT_FILE=/{ROOTS}")],
                "WorkingDir": "/",
                "Labels": self.labels(),
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
    }

    fn tar(&self, entries: &[Entry]) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for entry in entries {
            append(&mut tar, entry, self.created)?;
        }
        Ok(tar.into_inner()?)
    }
}

/// Writes a layout as one file, as `docker load`, `ctr images import` and `skopeo copy oci-archive:` read it.
///
/// # Errors
/// What cannot be read or written.
pub fn write_archive(layout: &Path, created: u64, file: &Path) -> Result<()> {
    let mut paths = Vec::new();
    list(layout, layout, &mut paths)?;
    paths.sort();
    let out = fs::File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let mut tar = tar::Builder::new(std::io::BufWriter::new(out));
    for path in paths {
        let content = Some(fs::read(layout.join(&path))?);
        append(&mut tar, &Entry { path, mode: 0o644, content }, created)?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

fn list(folder: &Path, root: &Path, found: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, root, found)?;
        } else if let Ok(path) = path.strip_prefix(root) {
            found.push(path.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// Nobody's time, no owner but root: nothing of the machine that builds.
fn append(tar: &mut tar::Builder<impl Write>, entry: &Entry, created: u64) -> Result<()> {
    let content = entry.content.as_deref();
    let mut header = Header::new_gnu();
    header.set_entry_type(if content.is_some() { EntryType::Regular } else { EntryType::Directory });
    header.set_mode(entry.mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(created);
    let content = content.unwrap_or_default();
    header.set_size(content.len() as u64);
    let end = if entry.content.is_some() { "" } else { "/" };
    Ok(tar.append_data(&mut header, format!("{}{end}", entry.path), content)?)
}

/// The folders above a path.
fn folders(path: &str) -> Vec<Entry> {
    let ends = path.match_indices('/').map(|(end, _)| end);
    ends.map(|end| Entry { path: path[..end].to_owned(), mode: 0o755, content: None }).collect()
}

fn compressed(tar: &[u8]) -> Result<Vec<u8>> {
    let mut gzip: GzEncoder<Vec<u8>> = GzBuilder::new().write(Vec::new(), flate2::Compression::best());
    gzip.write_all(tar)?;
    Ok(gzip.finish()?)
}

/// Of a program that runs by itself, the architecture as images name it. The layout is that of the System V ABI's chapters 4 and 5.
fn architecture(program: &[u8], has_linker: bool) -> Result<&'static str> {
    const INTERPRETER: u64 = 3;
    let number = |at: usize, size: usize| -> Result<u64> {
        let bytes = program.get(at..).and_then(|rest| rest.get(..size)).context("a file that was cut off")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    ensure!(program.starts_with(b"\x7fELF\x02\x01"), "not a program of Linux with 64 bits, little end first");
    let architecture = match number(18, 2)? {
        62 => "amd64",
        183 => "arm64",
        other => bail!("unknown machine {other}"),
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for place in 0..count {
        let at = table
            .checked_add(place * size)
            .and_then(|at| usize::try_from(at).ok())
            .context("a file that was cut off")?;
        ensure!(
            has_linker || number(at, 4)? != INTERPRETER,
            "it needs a dynamic linker, which an empty base does not have: link it with -C target-feature=+crt-static"
        );
    }
    Ok(architecture)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::scratch::Scratch;

    /// A program's head with one entry in its table.
    fn program(kind: u8) -> Vec<u8> {
        let mut program = vec![0; 64 + 56];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[18] = 62;
        program[32] = 64;
        (program[54], program[56], program[64]) = (56, 1, kind);
        program
    }

    fn shipped(folder: &Path) -> Shipped {
        fs::create_dir_all(folder.join("policies")).unwrap();
        for (name, content) in
            [("peili", program(1)), ("roots", b"# x\n-----BEGIN CERTIFICATE-----".to_vec())]
        {
            fs::write(folder.join(name), content).unwrap();
        }
        let policies = ["b.wasm", "a.wasm"].map(|name| folder.join("policies").join(name));
        for path in &policies {
            fs::write(path, "policy").unwrap();
        }
        Shipped {
            program: folder.join("peili"),
            libraries: Vec::new(),
            policies: policies.into(),
            roots: folder.join("roots"),
            version: "1.2.3".into(),
            revision: "abc".into(),
            created: 1_700_000_000,
        }
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let scratch = Scratch::new().unwrap();
        let archive = |name: &str| {
            let folder = scratch.path().join(name);
            let image = shipped(&folder).build("peili").unwrap();
            image.write_layout(&folder.join("layout"), Some("peili:1.2.3")).unwrap();
            write_archive(&folder.join("layout"), 1_700_000_000, &folder.join("image.tar")).unwrap();
            (image.root, fs::read(folder.join("image.tar")).unwrap())
        };
        let (one, other) = (archive("one"), archive("other"));
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
        let config: Value = serde_json::from_slice(&image.blobs[&image.configs[0]].read().unwrap()).unwrap();
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        assert_eq!((&config["architecture"], &config["config"]["Cmd"]), (&json!("amd64"), &json!(["run"])));
    }

    #[test]
    fn what_would_not_run_is_refused() {
        let scratch = Scratch::new().unwrap();
        let shipped = shipped(scratch.path());
        let refused = |content: Vec<u8>, why: &str| {
            fs::write(&shipped.program, content).unwrap();
            let error = format!("{:#}", shipped.build("peili").unwrap_err());
            assert!(error.contains(why), "{error}");
        };
        refused(program(3), "needs a dynamic linker");
        fs::write(&shipped.program, program(3)).unwrap();
        let libraries = vec![shipped.roots.clone()];
        let with_linker = Shipped { libraries, ..shipped.clone() };
        with_linker.build("peili").unwrap();
        refused(b"#!/bin/sh".to_vec(), "not a program of Linux");
        refused(program(1)[..65].to_vec(), "cut off");
        let mut far = program(1);
        far[32..40].fill(0xff);
        refused(far, "cut off");
        let mut strange = program(1);
        strange[18] = 8;
        refused(strange, "unknown machine 8");
    }
}
