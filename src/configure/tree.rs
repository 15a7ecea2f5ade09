//! The folders of hosts: which one counts for a registry, and what a new one would hide.
//!
//! containerd's rule (`core/remotes/docker/config/hosts.go`): in each folder of `config_path`, in order, the candidates
//! are `host_port_`, the registry's name and `_default`; the first that exists is the only one that is read. Reads only.

use std::fs;
use std::path::{Path, PathBuf};

use super::disk::{self, Content, DiskError};
use super::edit;
use super::find::Root;
use super::journal::Journal;
use super::{DEFAULT, Error, Mirror, Target};
use crate::oci::Registry;
use crate::upstream::hosts;

/// Name of the file in a registry's folder.
pub(super) const FILE: &str = "hosts.toml";

/// One value of `config_path`.
pub(super) struct Tree<'a> {
    pub(super) root: &'a Root,
    /// In order, as the host names them.
    pub(super) folders: &'a [PathBuf],
}

/// Where a registry is configured, or would be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its folder, as the host names it.
    pub(super) folder: PathBuf,
    /// The folder is there.
    pub(super) exists: bool,
    /// The `_default` that counts for it until the folder is there.
    pub(super) hides: Option<PathBuf>,
}

impl Tree<'_> {
    pub(super) fn place(&self, target: &Target) -> Result<Place, DiskError> {
        let there = |folder: PathBuf| Place { folder, exists: true, hides: None };
        let Target::Registry(registry) = target else {
            if let Some(folder) = self.default()? {
                return Ok(there(folder));
            }
            // In the last one that has anything in it: from an earlier one it would hide what a later one has.
            let last = self.folders.iter().rev().find(|folder| !self.names(folder).is_empty());
            let folder =
                last.or(self.folders.first()).map_or_else(PathBuf::new, |folder| folder.join(DEFAULT));
            return Ok(Place { folder, exists: false, hides: None });
        };
        let name = folder_name(registry);
        let new = |hides| Place {
            folder: self.folders.first().map_or_else(PathBuf::new, |folder| folder.join(&name)),
            exists: false,
            hides,
        };
        for folder in self.folders {
            for candidate in [&name[..], registry.as_str()] {
                if self.exists(&folder.join(candidate))? {
                    return Ok(there(folder.join(candidate)));
                }
            }
            let default = folder.join(DEFAULT);
            if self.exists(&default)? {
                return Ok(new(Some(default)));
            }
        }
        Ok(new(None))
    }

    /// The `_default` that counts.
    pub(super) fn default(&self) -> Result<Option<PathBuf>, DiskError> {
        for folder in self.folders.iter().map(|folder| folder.join(DEFAULT)) {
            if self.exists(&folder)? {
                return Ok(Some(folder));
            }
        }
        Ok(None)
    }

    /// What a hosts.toml must say in this place, which has none, so that the registry is reached as it is now:
    /// certificates by their names, or all that the hidden `_default` says. Empty if there is nothing to say.
    pub(super) fn inherited(
        &self,
        place: &Place,
        target: &Target,
        journal: &Journal<'_>,
        mirror: &Mirror,
    ) -> Result<Option<Content>, Error> {
        let Some(default) = &place.hides else {
            return if place.exists { self.certificates(&place.folder, "", target) } else { Ok(None) };
        };
        let prefix = if default.parent() == place.folder.parent() {
            format!("../{DEFAULT}/")
        } else {
            format!("{}/", default.display())
        };
        let file = default.join(FILE);
        let Some(content) = disk::read(&self.root.at(&file))?.filter(|content| !content.text.is_empty())
        else {
            return self.certificates(default, &prefix, target);
        };
        let text = match journal.get(&file)? {
            Some(record) if record.wrote(&content.text) => match record.original {
                Some(original) => original.text,
                None => return self.certificates(default, &prefix, target),
            },
            _ => edit::strip(&content.text, mirror).map_err(|fault| Error::file(&file, fault))?,
        };
        let text = edit::rebase(&text, &prefix).map_err(|fault| Error::file(&file, fault))?;
        Ok(Some(Content { text, ..content }))
    }

    /// Folders that are there for single registries and do not ask Peili first.
    pub(super) fn shadows(&self, mirror: &Mirror) -> Result<Vec<(String, PathBuf)>, DiskError> {
        let mut shadows = Vec::new();
        for folder in self.folders {
            for name in self.names(folder) {
                let Some(registry) = registry_of(&name) else { continue };
                let found = folder.join(&name);
                let is_asked = self
                    .hosts(&registry)
                    .is_some_and(|hosts| edit::is_asked(&hosts, mirror, super::Mode::First));
                let is_folder = fs::metadata(self.root.at(&found)).is_ok_and(|metadata| metadata.is_dir());
                if is_folder && !is_asked {
                    shadows.push((registry.to_string(), found));
                }
            }
        }
        Ok(shadows)
    }

    /// The hosts that a pull of this registry asks now; `None` if they cannot be read.
    pub(super) fn hosts(&self, registry: &Registry) -> Option<Vec<hosts::Host>> {
        let folders: Vec<_> = self.folders.iter().map(|folder| self.root.at(folder)).collect();
        hosts::load(&folders, registry).ok()
    }

    /// `ca` and `client` entries for what lies in a folder, if there is any.
    fn certificates(&self, folder: &Path, prefix: &str, target: &Target) -> Result<Option<Content>, Error> {
        let here = self.root.at(folder);
        let found = hosts::certificates(&here, &target.sample()).map_err(Error::Hosts)?;
        let name = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            format!("{prefix}{name}")
        };
        let Some(host) = found.first().filter(|host| !host.ca.is_empty() || !host.client.is_empty()) else {
            return Ok(None);
        };
        let ca: Vec<_> = host.ca.iter().map(name).collect();
        let client: Vec<_> = host
            .client
            .iter()
            .map(|(certificate, key)| (name(certificate), key.as_ref().map(name)))
            .collect();
        let text = edit::certificates(&ca, &client);
        Ok(Some(Content { text, access: disk::Access::of_new() }))
    }

    fn exists(&self, path: &Path) -> Result<bool, DiskError> {
        disk::exists(&self.root.at(path))
    }

    /// Names in a folder, but not ours of files that are being made.
    fn names(&self, folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(self.root.at(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.retain(|name| !name.starts_with('.') && name != DEFAULT);
        names.sort();
        names
    }
}

/// A registry's folder: `host_port_`, which is looked for first and is a name on every system.
pub(super) fn folder_name(registry: &Registry) -> String {
    match registry.as_str().strip_prefix(registry.host()).and_then(|rest| rest.strip_prefix(':')) {
        Some(port) => format!("{}_{port}_", registry.host()),
        None => registry.to_string(),
    }
}

/// What is configured by a folder of this name, as [`Target::name`] calls it.
pub(super) fn target_name(folder: &str) -> String {
    match registry_of(folder) {
        Some(registry) if folder != DEFAULT => registry.to_string(),
        _ => folder.to_owned(),
    }
}

/// The registry whose folder has this name.
fn registry_of(name: &str) -> Option<Registry> {
    let with_port = name.strip_suffix('_').and_then(|name| {
        let (host, port) = name.rsplit_once('_')?;
        format!("{host}:{port}").parse().ok()
    });
    with_port.or_else(|| name.parse().ok())
}
