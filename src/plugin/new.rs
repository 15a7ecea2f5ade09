//! `peili plugin new`: a crate of a policy that builds, with all that it is built from.
//!
//! What it writes is in this program (`build.rs` packs it), so nothing is fetched. It does not run cargo.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde::Serialize;

/// `Cargo.lock`, `sdk/` and `vendor/`; empty where the build could not pack them.
const ARCHIVE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sdk.tar.gz"));
/// What stands for the crate's name in the lock file of the archive.
const STAND_IN: &str = "peili-stand-in";
/// Longest name, in bytes; also that of a policy in the configuration.
const NAME: usize = 63;
/// Names that cargo does not take for a crate, or that Rust's own crates have.
const RESERVED: [&str; 50] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc-macro",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "unsafe",
    "while",
];

const MANIFEST: &str = r#"[package]
name = "NAME"
version = "0.1.0"
edition = "2024"
publish = false

[lib]
# `cdylib` becomes the component, `rlib` is what its tests use.
crate-type = ["cdylib", "rlib"]

[dependencies]
peili-policy = { path = "sdk" }
serde = { version = "1", features = ["derive"] }

[dev-dependencies]
serde_json = "1"

# Its own one, whatever folder it is in.
[workspace]

# A ConfigMap holds 1 MiB, and each node compiles what it loads.
[profile.release]
opt-level = "s"
lto = true
codegen-units = 1
panic = "abort"
strip = true
"#;

const CARGO: &str = r#"# Crates come from `vendor`, so that no network is needed.
[source.crates-io]
replace-with = "vendored"

[source.vendored]
directory = "vendor"
"#;

const IGNORED: &str = "/target\n/*.wasm\n";

/// What a new policy decides about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum World {
    /// Which registries and repositories are mirrored.
    Registry,
    /// Which peers are trusted.
    Trust,
    /// Who leads.
    Election,
}

/// What was written, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Made {
    /// The crate's name.
    pub name: String,
    /// What it decides about.
    pub world: World,
    /// Its folder.
    pub path: PathBuf,
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// No name of a crate and of a policy.
    #[error(
        "`{0}` is no name for a policy: it {1}\nhint: lower-case letters, digits and dashes, as in `only-signed`"
    )]
    Name(String, &'static str),
    /// Something is there.
    #[error("{} is there already, and is not written over\nhint: `--path` names another folder", .0.display())]
    Exists(PathBuf),
    /// The build of this program had no sources to pack.
    #[error(
        "this peili was built without the SDK (its build has warned of it)\nhint: take another build, or start from \
         plugins/allow-list of its sources"
    )]
    NoArchive,
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Writes the crate `name` to `path`, or to a folder of its name here: all of it, or nothing.
///
/// # Errors
/// The name is none, something is there, or it cannot be written.
pub fn new(name: &str, world: World, path: Option<&Path>) -> Result<Made, NewError> {
    check(name).map_err(|reason| NewError::Name(name.to_owned(), reason))?;
    if ARCHIVE.is_empty() {
        return Err(NewError::NoArchive);
    }
    let path = path.map_or_else(|| PathBuf::from(name), Path::to_owned);
    // Without `.` and a slash at the end, so that what is written first is beside it.
    let path: PathBuf = std::path::absolute(&path).unwrap_or(path).components().collect();
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| NewError::File { path, source }
    };
    match fs::read_dir(&path).map(Iterator::count) {
        Ok(0) => {}
        Ok(_) => return Err(NewError::Exists(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(NewError::Exists(path)),
        Err(error) => return Err(at(&path)(error)),
    }
    let unfinished = path.with_file_name(format!(".{name}.{}", std::process::id()));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(at(parent))?;
    }
    // New: nothing of another's is written to, or removed.
    fs::create_dir(&unfinished).map_err(at(&unfinished))?;
    let written = write(&unfinished, name, world).and_then(|()| fs::rename(&unfinished, &path));
    if let Err(error) = written {
        // The error that matters is the first one.
        let _ = fs::remove_dir_all(&unfinished);
        return Err(at(&path)(error));
    }
    Ok(Made { name: name.to_owned(), world, path })
}

/// What is wrong with a name.
fn check(name: &str) -> Result<(), &'static str> {
    let is_plain = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'-';
    if name.len() > NAME {
        return Err("has more than 63 letters");
    }
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) || name.ends_with('-') {
        return Err("does not begin with a letter, or ends with a dash");
    }
    if !name.bytes().all(is_plain) {
        return Err("has other letters");
    }
    if RESERVED.contains(&name) {
        return Err("is a word of Rust");
    }
    Ok(())
}

fn write(folder: &Path, name: &str, world: World) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut archive = tar::Archive::new(GzDecoder::new(ARCHIVE));
    archive.set_preserve_mtime(false);
    archive.unpack(folder)?;
    let lock = folder.join("Cargo.lock");
    fs::write(&lock, locked(&fs::read_to_string(&lock)?, name)?)?;
    fs::create_dir_all(folder.join(".cargo"))?;
    fs::create_dir_all(folder.join("src"))?;
    let [source, cases, schema, settings] = world.files();
    let fill = |text: &str| {
        text.replace("NAME", name).replace("WORLD", &world.to_string()).replace("SETTINGS", settings)
    };
    for (file, text) in [
        (".cargo/config.toml", CARGO),
        (".gitignore", IGNORED),
        ("Cargo.toml", &fill(MANIFEST)),
        ("README.md", &fill(include_str!("new/README.md"))),
        ("cases.yaml", cases),
        ("settings.schema.json", schema),
        ("src/lib.rs", source),
    ] {
        fs::write(folder.join(file), text)?;
    }
    Ok(())
}

/// The lock file with the crate's own name, in cargo's order, so that it need not be written again (`--locked`).
fn locked(text: &str, name: &str) -> io::Result<String> {
    let (head, packages) = text.split_once("[[package]]\n").unwrap_or((text, ""));
    let mut packages: Vec<String> =
        packages.split("[[package]]\n").map(|package| package.trim_end().to_owned()).collect();
    if packages.iter().any(|package| package.starts_with(&format!("name = \"{name}\"\n"))) {
        let reason = format!("a crate that policies stand on has the name `{name}`; take another one");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, reason));
    }
    let (stand_in, own) = (format!("name = \"{STAND_IN}\"\n"), format!("name = \"{name}\"\n"));
    for package in &mut packages {
        *package = package.replace(&stand_in, &own);
    }
    packages.sort_by(|one, other| one.lines().next().cmp(&other.lines().next()));
    Ok(format!("{head}[[package]]\n{}\n", packages.join("\n\n[[package]]\n")))
}

impl World {
    /// Its source, its cases, the schema of its settings, and some of these. Crates of the plugins' workspace, so that they are built and tested there.
    fn files(self) -> [&'static str; 4] {
        match self {
            Self::Registry => [
                include_str!("../../plugins/template-registry/src/lib.rs"),
                include_str!("../../plugins/template-registry/cases.yaml"),
                include_str!("../../plugins/template-registry/settings.schema.json"),
                r#"'{"deny": ["quay.io/**"]}'"#,
            ],
            Self::Trust => [
                include_str!("../../plugins/template-trust/src/lib.rs"),
                include_str!("../../plugins/template-trust/cases.yaml"),
                include_str!("../../plugins/template-trust/settings.schema.json"),
                r#"'{"deny": ["gpu-*"], "claimed": true}'"#,
            ],
            Self::Election => [
                include_str!("../../plugins/template-election/src/lib.rs"),
                include_str!("../../plugins/template-election/cases.yaml"),
                include_str!("../../plugins/template-election/settings.schema.json"),
                r#"'{"exclude": ["spot-*"]}'"#,
            ],
        }
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registry => "registry",
            Self::Trust => "trust",
            Self::Election => "election",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_crates_and_policies() {
        for name in ["only-signed", "a", "p2p"] {
            assert_eq!(check(name), Ok(()), "{name}");
        }
        for name in ["", "-a", "a-", "1a", "A", "a_b", "a/b", "..", "test", "core", &"a".repeat(64)] {
            assert!(check(name).is_err(), "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["serde", "peili-policy"] {
            let error = new(name, World::Registry, Some(&folder.path().join("x"))).unwrap_err();
            assert!(error.to_string().contains("take another one"), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn what_is_there_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        for path in [folder.path(), &file] {
            assert!(matches!(new("a", World::Trust, Some(path)), Err(NewError::Exists(_))));
        }
        assert_eq!(fs::read_to_string(file).unwrap(), "mine");
        let empty = folder.path().join("empty");
        fs::create_dir(&empty).unwrap();
        new("a", World::Trust, Some(&empty)).unwrap();
    }

    /// All crates of the lock file are there, and nothing of it is fetched or built.
    #[test]
    fn what_is_locked_is_vendored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("zz-last");
        new("zz-last", World::Registry, Some(&path)).unwrap();
        let lock = fs::read_to_string(path.join("Cargo.lock")).unwrap();
        assert!(!lock.contains(STAND_IN) && lock.contains("name = \"zz-last\""));
        let mut count = 0;
        for package in lock.split("[[package]]\n").filter(|package| package.contains("\nchecksum = ")) {
            let value = |key: &str| {
                let line = package.lines().find_map(|line| line.strip_prefix(key)).unwrap();
                line.trim_matches('"').to_owned()
            };
            let (name, version) = (value("name = "), value("version = "));
            let vendored = path.join("vendor").join(format!("{name}-{version}"));
            assert!(vendored.join("Cargo.toml").is_file(), "{}", vendored.display());
            let checksum = fs::read_to_string(vendored.join(".cargo-checksum.json")).unwrap();
            assert!(checksum.contains(&value("checksum = ")), "{name}");
            count += 1;
        }
        assert!(count > 5, "{count}");
        assert!(path.join("sdk/wit/policy.wit").is_file() && path.join("sdk/bindings/base.rs").is_file());
        let sdk = fs::read_to_string(path.join("sdk/Cargo.toml")).unwrap();
        assert!(!sdk.contains("workspace"), "{sdk}");
    }
}
