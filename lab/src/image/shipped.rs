//! The image that Peili is shipped as: its program, the policies beside it and roots for TLS on an empty base, without a shell. For one
//! architecture or for several, under one index.
//!
//! The same files and the same time give the same bytes. It compiles nothing; `cargo xtask image` does.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use flate2::GzBuilder;
use flate2::write::GzEncoder;
use peili::oci::{Algorithm, Digest};
use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::{Image, descriptor};
use crate::policies::SHIPPED;

/// Where the image has them.
const PROGRAM: &str = "usr/bin/peili";
const POLICIES: &str = "usr/share/peili/policies";
/// Where Debian and the libraries of TLS have it.
const ROOTS: &str = "etc/ssl/certs/ca-certificates.crt";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What goes into it.
#[derive(Clone, Debug)]
pub struct Shipped {
    /// The program, which needs no others' libraries: once for each architecture.
    pub programs: Vec<PathBuf>,
    /// What a single program needs that is linked dynamically, for tests: its linker and libraries, which get the paths that they have here.
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

    /// Makes the image `repository:version`: an index, also of a single architecture, so that the digest that is deployed stays of one kind.
    ///
    /// # Errors
    /// A file that cannot be read, a program that is none of Linux or needs a dynamic linker, two for one architecture.
    pub fn build(&self, repository: &str) -> Result<Image> {
        let programs = self.read_programs()?;
        let mut image = Image::empty(repository, &self.version);
        // What changes most stands last; what stands first is the same for all architectures.
        let (beside, beside_id) = self.put_layer(&mut image, &self.beside()?)?;
        let mut manifests = Vec::new();
        for (architecture, program) in programs {
            let (program, program_id) = self.put_layer(&mut image, &program_entries(program))?;
            let config = self.config(architecture, &[&beside_id, &program_id]);
            let labels = json!({"annotations": self.labels()});
            let layers = [beside.clone(), program];
            let (mut entry, _) =
                image.put_manifest(Algorithm::Sha256, MANIFEST, CONFIG, &config, &layers, &labels);
            entry["platform"] = platform(architecture);
            manifests.push(entry);
        }
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests, "annotations": self.labels(),
        });
        image.root = image.put_json(Algorithm::Sha256, INDEX, &index);
        image.manifests.insert(0, image.root);
        Ok(image)
    }

    /// Writes the files of the image of a single program into a new folder, for a build by a container engine.
    ///
    /// # Errors
    /// As [`Shipped::build`], and a folder that is there already.
    pub fn write_tree(&self, folder: &Path) -> Result<()> {
        let programs = self.read_programs()?;
        ensure!(programs.len() == 1, "the files of an image are those of one architecture");
        let mut entries = self.beside()?;
        entries.extend(programs.into_values().flat_map(program_entries));
        fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for entry in &entries {
            let path = folder.join(&entry.path);
            match &entry.content {
                Some(content) => fs::write(&path, content)?,
                None => fs::create_dir_all(&path)?,
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode))?;
        }
        // The folders' times change with what is written into them.
        for entry in &entries {
            fs::File::open(folder.join(&entry.path))?.set_modified(self.at())?;
        }
        Ok(())
    }

    /// By architecture, and so in the same order however they are given.
    fn read_programs(&self) -> Result<BTreeMap<&'static str, Vec<u8>>> {
        let has_linker = !self.libraries.is_empty();
        ensure!(!has_linker || self.programs.len() == 1, "libraries are of one architecture");
        let mut programs = BTreeMap::new();
        for path in &self.programs {
            let program = read(path)?;
            let architecture = architecture(&program, has_linker)
                .with_context(|| format!("{} does not suit", path.display()))?;
            let other = programs.insert(architecture, program);
            ensure!(other.is_none(), "{} is a second program for {architecture}", path.display());
        }
        ensure!(!programs.is_empty(), "an image needs a program");
        Ok(programs)
    }

    /// All but the program.
    fn beside(&self) -> Result<Vec<Entry>> {
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
        Ok(beside)
    }

    /// Returns the layer's descriptor, and the digest of its tar.
    fn put_layer(&self, image: &mut Image, entries: &[Entry]) -> Result<(Value, String)> {
        let tar = self.tar(entries)?;
        let bytes = compressed(&tar)?;
        let size = bytes.len() as u64;
        let digest = image.put(Algorithm::Sha256, LAYER, bytes.into());
        image.layers.push(digest);
        Ok((descriptor(LAYER, digest, size), Digest::sha256(&tar).to_string()))
    }

    fn at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.created)
    }

    fn time(&self) -> String {
        humantime::format_rfc3339_seconds(self.at()).to_string()
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

    fn config(&self, architecture: &str, diff_ids: &[&str]) -> Value {
        let mut config = json!({
            "created": self.time(),
            "config": {
                "Entrypoint": [format!("/{PROGRAM}")],
                "Cmd": ["run"],
                "Env": ["PATH=/usr/bin", format!("SSL_CERT_FILE=/{ROOTS}")],
                "WorkingDir": "/",
                "Labels": self.labels(),
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        for (key, value) in platform(architecture).as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
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

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// As the image specification wants it in an index and in a config: all arm64 is of variant v8.
fn platform(architecture: &str) -> Value {
    let mut platform = json!({"os": "linux", "architecture": architecture});
    if architecture == "arm64" {
        platform["variant"] = "v8".into();
    }
    platform
}

fn program_entries(program: Vec<u8>) -> Vec<Entry> {
    let mut entries = folders(PROGRAM);
    entries.push(Entry { path: PROGRAM.into(), mode: 0o755, content: Some(program) });
    entries
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
mod tests;
