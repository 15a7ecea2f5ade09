//! Packs what `peili plugin new` writes besides the author's own files: the SDK, the contract, the crates that the SDK stands on,
//! and the lock file of a policy's crate. So the program alone, with a Rust toolchain and without network, makes a policy.
//!
//! Nothing is downloaded: the crates are dependencies of this build too, and cargo has their sources. Where it has not (a build
//! that replaces sources in an unusual way), the build goes on with a warning and without them, and `peili plugin new` says so.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::{Compression, GzBuilder};
use serde_json::Value;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Of a crate, what no build of a policy reads.
const LEFT_OUT: [&str; 8] = [
    ".cargo-ok",
    ".cargo_vcs_info.json",
    ".github",
    "Cargo.lock",
    "Cargo.toml.orig",
    "benches",
    "examples",
    "tests",
];
/// The name that stands for the author's in the lock file; `src/plugin/new.rs` replaces it.
const STAND_IN: &str = "peili-stand-in";

fn main() {
    for path in ["build.rs", "Cargo.lock", "plugins/Cargo.toml", "plugins/sdk", "wit/policy.wit"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let packed = pack();
    let archive = packed.unwrap_or_else(|error| {
        println!("cargo::warning=`peili plugin new` of this build cannot write the SDK: {error}");
        Vec::new()
    });
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("sdk.tar.gz");
    if let Err(error) = fs::write(&out, archive) {
        println!("cargo::error={}: {error}", out.display());
    }
}

/// The archive: `Cargo.lock`, `sdk/` and `vendor/`. The same for the same sources.
fn pack() -> Result<Vec<u8>> {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").ok_or("no folder of the package")?);
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("policy");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let plugins = fs::read_to_string(root.join("plugins/Cargo.toml"))?;
    let sdk = folder.join("sdk");
    copy(&root.join("plugins/sdk"), &sdk)?;
    fs::create_dir_all(sdk.join("wit"))?;
    fs::copy(root.join("wit/policy.wit"), sdk.join("wit/policy.wit"))?;
    let manifest = fs::read_to_string(root.join("plugins/sdk/Cargo.toml"))?;
    fs::write(sdk.join("Cargo.toml"), standalone(&manifest, &plugins)?)?;
    vendor(&root, &folder, &plugins)?;

    let gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    let mut archive = tar::Builder::new(gzip);
    archive.mode(tar::HeaderMode::Deterministic);
    archive.append_path_with_name(folder.join("Cargo.lock"), "Cargo.lock")?;
    for part in ["sdk", "vendor"] {
        for path in files(&folder.join(part))? {
            archive.append_path_with_name(&path, path.strip_prefix(&folder)?)?;
        }
    }
    Ok(archive.into_inner()?.finish()?)
}

/// Resolves a crate as `peili plugin new` writes it, with the versions of this build, and copies what it stands on. `cargo
/// vendor` would do the same, but waits for the lock that the cargo which runs this holds.
fn vendor(root: &Path, folder: &Path, plugins: &str) -> Result<()> {
    let (serde, serde_json) = (dependency(plugins, "serde")?, dependency(plugins, "serde_json")?);
    let manifest = format!(
        "[package]\nname = \"{STAND_IN}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n\
         peili-policy = {{ path = \"sdk\" }}\n{serde}\n[dev-dependencies]\n{serde_json}\n"
    );
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("src/lib.rs"), "")?;
    // With more than is needed; cargo keeps the versions, and drops the rest.
    fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--offline", "--format-version", "1", "--manifest-path"]);
    // In the root, where a configuration of cargo may replace sources.
    cargo.arg(folder.join("Cargo.toml")).current_dir(root).stdin(Stdio::null());
    let output = cargo.output()?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr).replace('\n', " ")
        )
        .into());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let lock = fs::read_to_string(folder.join("Cargo.lock"))?;
    for package in metadata["packages"].as_array().ok_or("no packages")? {
        if package["source"].is_null() {
            continue;
        }
        let text = |key: &str| package[key].as_str().ok_or_else(|| format!("a package without {key}"));
        let (name, version) = (text("name")?, text("version")?);
        let source = Path::new(text("manifest_path")?).parent().ok_or("a manifest without a folder")?;
        let target = folder.join("vendor").join(format!("{name}-{version}"));
        copy(source, &target)?;
        // Without digests of single files, since some are left out.
        let checksum = checksum(&lock, name, version).ok_or_else(|| format!("{name} is not locked"))?;
        let checksums = serde_json::json!({"files": {}, "package": checksum});
        fs::write(target.join(".cargo-checksum.json"), checksums.to_string())?;
    }
    Ok(())
}

/// The digest of a package in a lock file.
fn checksum<'a>(lock: &'a str, name: &str, version: &str) -> Option<&'a str> {
    let head = format!("name = \"{name}\"\nversion = \"{version}\"\n");
    let package = lock.split("[[package]]\n").find(|package| package.starts_with(&head))?;
    package.lines().find_map(|line| line.strip_prefix("checksum = \""))?.strip_suffix('"')
}

/// The SDK's manifest without its workspace: what it takes from there is written out, and its tests are left out.
fn standalone(manifest: &str, workspace: &str) -> Result<String> {
    let mut text = String::new();
    for section in manifest.split("\n\n") {
        if section.starts_with("[dev-dependencies]") || section.starts_with("[lints]") {
            continue;
        }
        for line in section.lines() {
            let inherited = line.strip_suffix(".workspace = true");
            text.push_str(inherited.map_or(Ok(line), |key| dependency(workspace, key))?);
            text.push('\n');
        }
        text.push('\n');
    }
    Ok(text)
}

/// The line of the workspace's manifest that gives a key.
fn dependency<'a>(workspace: &'a str, key: &str) -> Result<&'a str> {
    let is_it = |line: &&str| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(" = "));
    workspace.lines().find(is_it).ok_or_else(|| format!("plugins/Cargo.toml has no `{key}`").into())
}

/// Copies the files of a crate.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (name, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
        let is_left_out = LEFT_OUT.iter().any(|left_out| name == *left_out);
        if is_left_out || path.extension().is_some_and(|extension| extension == "wasm") {
            continue;
        }
        if path.is_dir() {
            copy(&path, &to.join(name))?;
        } else {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// All files below a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}
