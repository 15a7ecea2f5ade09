//! The crates of a policy whose sources stand beside it, for a build that compiles the standard library too.
//!
//! Where a crate's `.cargo/config.toml` lets cargo take all crates from a folder, cargo looks there for those of the standard
//! library as well. Its sources have them in a folder of their own, and cargo reads one folder: so one is made that has both, as
//! links. What the author has is not touched.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use toml_edit::DocumentMut;

/// Arguments of cargo that let the crate in `folder` find both. None: it vendors nothing, or the sources of the standard library in
/// `library` come without their crates, and cargo gets them as it can.
///
/// # Errors
/// The folder of links, which is made in `target`, cannot be made.
pub(super) fn arguments(folder: &Path, library: &Path, target: &Path) -> io::Result<Vec<String>> {
    let Some((name, own)) = source(folder) else { return Ok(Vec::new()) };
    let standard = library.join("vendor");
    if !standard.is_dir() {
        return Ok(Vec::new());
    }
    // The same place each time, so that cargo finds what it has built; new each time, so that nothing old is in it.
    let both = target.join("peili-vendor");
    if both.exists() {
        fs::remove_dir_all(&both)?;
    }
    fs::create_dir_all(&both)?;
    // The names of the folders mean nothing to cargo.
    for (prefix, source) in [("std", &standard), ("own", &own)] {
        for entry in fs::read_dir(source)? {
            let path = entry?.path();
            let link = format!("{prefix}-{}", path.file_name().unwrap_or_default().to_string_lossy());
            symlink(fs::canonicalize(&path)?, both.join(link))?;
        }
    }
    let both = fs::canonicalize(both)?;
    Ok(vec!["--config".into(), format!("source.{name}.directory={:?}", both.display().to_string())])
}

/// The name and the folder of what replaces crates.io, if that is a folder.
fn source(folder: &Path) -> Option<(String, PathBuf)> {
    let text = fs::read_to_string(folder.join(".cargo/config.toml")).ok()?;
    let config: DocumentMut = text.parse().ok()?;
    let sources = config.get("source")?;
    let name = sources.get("crates-io")?.get("replace-with")?.as_str()?;
    let path = sources.get(name)?.get("directory")?.as_str()?;
    Some((name.to_owned(), folder.join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_folders_are_one() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        for path in ["crate/.cargo", "crate/vendor/serde-1.0.0", "library/vendor/cfg-if-1.0.0"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        let arguments = || arguments(&at("crate"), &at("library"), &at("target")).unwrap();
        assert!(arguments().is_empty(), "it vendors nothing");
        let config = "[source.crates-io]\nreplace-with = \"mine\"\n[source.mine]\ndirectory = \"vendor\"\n";
        fs::write(at("crate/.cargo/config.toml"), config).unwrap();
        for _ in 0..2 {
            let arguments = arguments();
            assert!(arguments[1].starts_with("source.mine.directory=\"/"), "{arguments:?}");
            let both = fs::read_dir(at("target/peili-vendor")).unwrap();
            let mut names: Vec<_> =
                both.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            assert_eq!(names, ["own-serde-1.0.0", "std-cfg-if-1.0.0"]);
        }
        fs::remove_dir_all(at("library/vendor")).unwrap();
        assert!(arguments().is_empty(), "there is nothing to add");
    }
}
