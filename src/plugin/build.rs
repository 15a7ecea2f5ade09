//! From a crate to a component: cargo for WebAssembly, with a standard library built from source where the target is not
//! installed, and the wrapping that makes a component of a module.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use wit_component::ComponentEncoder;

use super::{Component, vendored};

const TARGET: &str = "wasm32-unknown-unknown";
/// Of the guest's own stack, in its memory: what does not fit ends in a trap.
const STACK: &str = "-Clink-arg=-zstack-size=65536";
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
    let component = encode().map_err(|error| BuildError::Component(format!("{error:#}")))?;
    let path = out.map_or_else(|| module.with_extension("component.wasm"), Path::to_owned);
    // A node that watches the file sees the old one or the new one.
    let new = path.with_extension("new");
    std::fs::write(&new, &component).map_err(file(&new))?;
    std::fs::rename(&new, &path).map_err(file(&path))?;
    Ok(Component::of(&path, &component))
}

impl Toolchain {
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
    fn the_module_is_found_in_what_cargo_says() {
        let line = r#"{"reason":"compiler-artifact","filenames":["/t/liba.rlib","/t/a.wasm"]}"#;
        assert_eq!(module(line), Some("/t/a.wasm".into()));
        for other in ["", "warning", r#"{"reason":"build-finished","success":true}"#] {
            assert_eq!(module(other), None);
        }
    }
}
