//! Packages of any Debian suite, downloaded and unpacked beside the machine's own, and never installed: its apt does it,
//! with sources, lists and a cache in a folder of ours. The archive is the one that the machine's own sources name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::checked;
use crate::target;

/// A suite, with its lists read.
pub(super) struct Archive {
    folder: PathBuf,
    options: Vec<String>,
}

impl Archive {
    /// `types`: `deb`, and `deb-src` for sources.
    pub(super) fn open(suite: &str, types: &str) -> Result<Self> {
        let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
        ensure!(os.lines().any(|line| line == "ID=debian"), "only known how on Debian");
        let folder = target().join("tools").join(format!(".apt-{suite}"));
        let (sources, lists, cache) = (folder.join("sources"), folder.join("lists"), folder.join("cache"));
        for path in [&sources, &lists.join("partial"), &cache.join("archives/partial")] {
            fs::create_dir_all(path)?;
        }
        fs::write(sources.join("suite.sources"), source(suite, types)?)?;
        let options = vec![
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={}", sources.display()),
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            // The folder may be closed to apt's own user.
            "APT::Sandbox::User=root".to_owned(),
        ];
        let archive = Self { folder, options };
        archive.apt(&["update"])?;
        Ok(archive)
    }

    /// Downloads packages.
    pub(super) fn download(&self, names: &[&str]) -> Result<()> {
        self.apt(&[&["download"], names].concat())
    }

    /// Downloads the source of a package. Returns upstream's part of it, an archive of tar.
    pub(super) fn source(&self, name: &str) -> Result<PathBuf> {
        self.apt(&["source", "--download-only", name])?;
        self.find(|file| file.starts_with(&format!("{name}_")) && file.contains(".orig.tar."))
    }

    /// Unpacks a package that was downloaded. Returns its version.
    pub(super) fn unpack(&self, name: &str, folder: &Path) -> Result<String> {
        let package = self.find(|file| file.starts_with(&format!("{name}_")) && file.ends_with(".deb"))?;
        fs::create_dir_all(folder)?;
        checked(Command::new("dpkg-deb").arg("-x").arg(&package).arg(folder))?;
        let output = Command::new("dpkg-deb").arg("-f").arg(&package).arg("Version").output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Removes what was downloaded.
    pub(super) fn close(self) -> Result<()> {
        Ok(fs::remove_dir_all(self.folder)?)
    }

    fn find(&self, is_it: impl Fn(&str) -> bool) -> Result<PathBuf> {
        let mut files = fs::read_dir(&self.folder)?.flatten();
        let file = files.find(|file| file.file_name().to_str().is_some_and(&is_it));
        Ok(file.context("apt downloaded nothing")?.path())
    }

    fn apt(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new("apt-get");
        command.arg("-qq").args(self.options.iter().flat_map(|option| ["-o", option])).args(arguments);
        checked(command.current_dir(&self.folder))
    }
}

/// The first source of this machine that serves Debian, turned to another suite.
fn source(suite: &str, types: &str) -> Result<String> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let deb822 = files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "sources"))
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| from_deb822(&text, suite, types));
    let one_line = || from_one_line(&fs::read_to_string("/etc/apt/sources.list").ok()?, suite, types);
    deb822.or_else(one_line).context("no source of Debian packages on this machine")
}

/// The first stanza with component main, with its suites replaced.
fn from_deb822(text: &str, suite: &str, types: &str) -> Option<String> {
    let is_archive = |stanza: &&str| {
        let components = stanza.lines().find_map(|line| line.strip_prefix("Components:"));
        components.is_some_and(|components| components.split_whitespace().any(|name| name == "main"))
            && stanza.contains("URIs:")
            && !stanza.lines().any(|line| line.starts_with("Suites:") && line.contains("-security"))
    };
    let stanza = text.split("\n\n").find(is_archive)?;
    let replace = |line: &str| match line {
        line if line.starts_with("Suites:") => format!("Suites: {suite}\n"),
        line if line.starts_with("Types:") => format!("Types: {types}\n"),
        line => format!("{line}\n"),
    };
    Some(stanza.lines().map(replace).collect())
}

/// The same from `deb [OPTIONS] URI SUITE COMPONENT...`.
fn from_one_line(text: &str, suite: &str, types: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let rest =
            rest.strip_prefix('[').map_or(rest, |rest| rest.split_once(']').map_or("", |(_, rest)| rest));
        let mut words = rest.split_whitespace();
        let (uri, old) = (words.next()?, words.next()?);
        if old.contains("-security") || !words.any(|word| word == "main") {
            return None;
        }
        Some(format!("Types: {types}\nURIs: {uri}\nSuites: {suite}\nComponents: main\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_turned_to_another_suite() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://archive.test/debian\nSuites: old old-updates\n\
                    Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://other.test\n";
        let expected = "Types: deb\n# a comment\nURIs: http://archive.test/debian\nSuites: new\nComponents: main\n\
                        Signed-By: /k.gpg\n";
        assert_eq!(from_deb822(text, "new", "deb").as_deref(), Some(expected));
        let text = "# deb no\ndeb [arch=amd64] http://archive.test/debian old main contrib\n";
        let expected =
            "Types: deb deb-src\nURIs: http://archive.test/debian\nSuites: new\nComponents: main\n";
        assert_eq!(from_one_line(text, "new", "deb deb-src").as_deref(), Some(expected));
    }
}
