//! From a crate to a component: cargo for WebAssembly, with a standard library built from source where the target is not
//! installed, and the wrapping that makes a component of a module.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use wit_component::ComponentEncoder;

use super::{Component, vendored};
use crate::policy::{EMBEDDED_LIMIT, Embedded, cases};

const TARGET: &str = "wasm32-unknown-unknown";
/// Of the guest's own stack, in its memory: what does not fit ends in a trap.
const STACK: &str = "-Clink-arg=-zstack-size=65536";
/// What is taken into the component, where it stands beside the crate: the schema of its settings, and what it must answer.
const SCHEMA: &str = "settings.schema.json";
const CASES: &str = "cases.yaml";
/// Linkers of Debian's packages, newest first; a target that is installed brings its own.
const LINKERS: [&str; 4] = ["wasm-ld", "wasm-ld-20", "wasm-ld-19", "wasm-ld-18"];

/// Why there is no component.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No compiler for the target, and no sources of the standard library.
    #[error(
        "no compiler here makes WebAssembly; `rustup target add {TARGET}`, or on Debian `apt-get install rustc-web cargo-web \
         rust-web-src lld-19`"
    )]
    NoTarget,
    /// A program does not run.
    #[error("cannot run {program}: {source}")]
    Program {
        /// Which.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The crate does not compile; cargo has said why.
    #[error("the crate does not compile")]
    Compile,
    /// It is no policy's crate.
    #[error(
        "the crate makes no WebAssembly; its Cargo.toml needs `[lib]` with `crate-type = [\"cdylib\", \"rlib\"]`"
    )]
    NoLibrary,
    /// The module cannot become a component.
    #[error("cannot make a component of it: {0}")]
    Component(String),
    /// What stands beside the crate cannot be taken into the component.
    #[error("{}: {reason}", path.display())]
    Embedded {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A compiler, and what it needs to make WebAssembly.
struct Toolchain {
    cargo: OsString,
    rustc: OsString,
    /// Sources of the standard library, which are compiled too.
    library: Option<PathBuf>,
    linker: Option<&'static str>,
}

/// Builds the policy in `folder` and writes its component to `out`. What the compiler says goes to standard error.
///
/// # Errors
/// Why there is none.
pub fn build(folder: &Path, out: Option<&Path>) -> Result<Component, BuildError> {
    let toolchain = Toolchain::find()?;
    let module = toolchain.build(folder)?;
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildError::File { path, source }
    };
    let bytes = std::fs::read(&module).map_err(file(&module))?;
    let encode = || ComponentEncoder::default().module(&bytes)?.validate(true).encode();
    let mut component = encode().map_err(|error| BuildError::Component(format!("{error:#}")))?;
    Embedded {
        package: toolchain.package(folder)?,
        schema: beside(folder, SCHEMA, |text| {
            let schema: Result<serde_json::Map<String, serde_json::Value>, _> = serde_json::from_slice(text);
            schema.map(drop).map_err(|error| format!("it is no JSON schema: {error}"))
        })?,
        cases: beside(folder, CASES, |text| cases::File::parse(text)?.check_embedded())?,
    }
    .put(&mut component);
    let path = out.map_or_else(|| module.with_extension("component.wasm"), Path::to_owned);
    // A node that watches the file sees the old one or the new one.
    let new = path.with_extension("new");
    std::fs::write(&new, &component).map_err(file(&new))?;
    std::fs::rename(&new, &path).map_err(file(&path))?;
    Ok(Component::of(&path, &component))
}

/// A file beside the crate, if there is one.
fn beside(
    folder: &Path,
    name: &str,
    check: impl FnOnce(&[u8]) -> Result<(), String>,
) -> Result<Option<Vec<u8>>, BuildError> {
    let path = folder.join(name);
    let text = match std::fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|source| BuildError::File { path: path.clone(), source })?,
    };
    let checked =
        if text.len() > EMBEDDED_LIMIT { Err("it has more than 256 KiB".into()) } else { check(&text) };
    checked.map_err(|reason| BuildError::Embedded { path, reason })?;
    Ok(Some(text))
}

impl Toolchain {
    /// What the crate says of itself, by cargo's word; none, where it says nothing of this folder.
    fn package(&self, folder: &Path) -> Result<Option<Vec<u8>>, BuildError> {
        let mut command = Command::new(&self.cargo);
        let output = command
            .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
            .env("RUSTC", &self.rustc)
            .env_remove("CARGO")
            .current_dir(folder)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let program = || self.cargo.to_string_lossy().into_owned();
        let output = output.map_err(|source| BuildError::Program { program: program(), source })?;
        let manifest = folder.join("Cargo.toml").canonicalize().ok();
        Ok(manifest.and_then(|manifest| package(&output.stdout, &manifest)))
    }

    /// The one that is used here, if it can; else that of Debian's packages.
    fn find() -> Result<Self, BuildError> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let has_target = print(&rustc, &["--print", "target-libdir", "--target", TARGET]);
        if has_target.is_some_and(|path| Path::new(&path).is_dir()) {
            return Ok(Self { cargo, rustc, library: None, linker: None });
        }
        let linker =
            LINKERS.into_iter().find(|linker| print(&OsString::from(linker), &["--version"]).is_some());
        for (cargo, rustc) in [(cargo, rustc), ("/usr/bin/cargo".into(), "/usr/bin/rustc".into())] {
            let sysroot = print(&rustc, &["--print", "sysroot"]);
            let library = sysroot.map(|path| Path::new(&path).join("lib/rustlib/src/rust/library"));
            let library = library.filter(|path| path.join("std/Cargo.toml").is_file());
            if library.is_some() && linker.is_some() {
                return Ok(Self { cargo, rustc, library, linker });
            }
        }
        Err(BuildError::NoTarget)
    }

    /// The module that cargo makes.
    fn build(&self, folder: &Path) -> Result<PathBuf, BuildError> {
        let mut command = Command::new(&self.cargo);
        command
            .args(["build", "--release", "--target", TARGET, "--message-format", "json-render-diagnostics"])
            .arg("--config")
            .arg(format!("target.{TARGET}.rustflags=[{STACK:?}]"))
            .env("RUSTC", &self.rustc)
            // Of a cargo or a rustup that called this program.
            .env_remove("CARGO")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .current_dir(folder)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        if let Some(library) = &self.library {
            let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
            let target = folder.join(target);
            let arguments = vendored::arguments(folder, library, &target)
                .map_err(|source| BuildError::File { path: target, source })?;
            command.arg("-Zbuild-std=std,panic_abort").args(arguments).env("RUSTC_BOOTSTRAP", "1");
        }
        if let Some(linker) = self.linker {
            command.arg("--config").arg(format!("target.{TARGET}.linker={linker:?}"));
        }
        let program = self.cargo.to_string_lossy().into_owned();
        let output = command.output().map_err(|source| BuildError::Program { program, source })?;
        if !output.status.success() {
            return Err(BuildError::Compile);
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        messages.lines().filter_map(module).next_back().ok_or(BuildError::NoLibrary)
    }
}

/// What `cargo metadata` says of one package, but for what is only of this machine.
fn package(metadata: &[u8], manifest: &Path) -> Option<Vec<u8>> {
    let metadata: serde_json::Value = serde_json::from_slice(metadata).ok()?;
    let mut packages = metadata["packages"].as_array()?.iter();
    let found =
        packages.find(|package| package["manifest_path"].as_str().map(Path::new) == Some(manifest))?;
    let kept = ["name", "version", "description", "license", "repository"];
    let kept = kept.into_iter().filter(|key| found[key].is_string());
    let package: std::collections::BTreeMap<&str, &serde_json::Value> =
        kept.map(|key| (key, &found[key])).collect();
    serde_json::to_vec(&package).ok()
}

/// The module that a message of cargo tells of. That of the crate itself is the last.
fn module(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let files = message.get("filenames").filter(|_| message["reason"] == "compiler-artifact")?;
    let file =
        files.as_array()?.iter().filter_map(|file| file.as_str()).find(|file| file.ends_with(".wasm"))?;
    Some(file.into())
}

/// What a program prints in one line, if it runs and says so.
fn print(program: &OsString, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
    let line = String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned();
    output.status.success().then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_told_without_this_machine() {
        let metadata = br#"{"packages": [{"name": "other", "manifest_path": "/b/Cargo.toml"}, {"name": "a", "version": "0.1.0",
            "license": null, "description": "x", "manifest_path": "/a/Cargo.toml", "id": "path+file:///a"}]}"#;
        let package = package(metadata, Path::new("/a/Cargo.toml")).unwrap();
        assert_eq!(
            String::from_utf8(package).unwrap(),
            r#"{"description":"x","name":"a","version":"0.1.0"}"#
        );
    }

    #[test]
    fn what_cannot_be_taken_in_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let check = |text: &[u8]| cases::File::parse(text).map(drop);
        assert_eq!(beside(folder.path(), CASES, check).unwrap(), None);
        for (text, part) in
            [(&b"cases: 7"[..], "cases.yaml: "), (&[b'#'; EMBEDDED_LIMIT + 1], "more than 256 KiB")]
        {
            std::fs::write(folder.path().join(CASES), text).unwrap();
            let error = beside(folder.path(), CASES, check).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_module_is_found_in_what_cargo_says() {
        let line = r#"{"reason":"compiler-artifact","filenames":["/t/liba.rlib","/t/a.wasm"]}"#;
        assert_eq!(module(line), Some("/t/a.wasm".into()));
        for other in ["", "warning", r#"{"reason":"build-finished","success":true}"#] {
            assert_eq!(module(other), None);
        }
    }
}
