//! containerd's own configuration, `config.toml` with its imports: what of it decides whether a `hosts.toml` is read.
//!
//! Read only. The rules are those of containerd's `cmd/containerd/server/config` and `internal/cri/config`, for
//! versions 1 to 4 of the format. Values that it does not name stay unknown: the defaults are the distribution's.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use toml_edit::{Item, TableLike};

use super::disk::{self, DiskError};
use super::find::Root;
use crate::upstream::hosts;

/// Files that are followed through `imports`. containerd has no limit; real nodes have a handful.
const IMPORT_LIMIT: usize = 100;

/// One file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Of the format; 1 if the file does not say.
    pub version: i64,
    /// More files, as written: absolute, or relative to this one, with `*`.
    pub imports: Vec<String>,
    /// Where content is kept, in `io.containerd.content.v1.content`.
    pub root: Option<String>,
    /// The socket.
    pub address: Option<String>,
    /// CRI is switched off: kubelet does not pull by this containerd.
    pub cri_disabled: bool,
    /// What stands under CRI's plugin, by the name that this version has for it.
    pub cri: Option<Cri>,
    /// A `config_path` under a name that this version does not read: the name.
    pub misplaced: Option<String>,
}

/// Settings of CRI's images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cri {
    /// Folders of hosts, separated by `:`. Empty is unset.
    pub config_path: Option<String>,
    /// Registries with mirrors in the old way, which excludes `config_path`.
    pub mirrors: Vec<String>,
    /// Layers are forgotten once they are unpacked.
    pub discard: Option<bool>,
    /// CRI pulls by itself, not through the transfer service.
    pub local_pull: Option<bool>,
}

/// All files together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Runtime {
    /// Of the first file.
    pub(super) version: i64,
    pub(super) root: Option<String>,
    pub(super) address: Option<String>,
    pub(super) cri_disabled: bool,
    pub(super) cri: Cri,
    pub(super) misplaced: Option<String>,
    /// The file with `config_path`, and a later one with CRI's plugin but without it: containerd 1.x then forgets it.
    pub(super) replaced: Option<(PathBuf, PathBuf)>,
}

/// Why containerd's configuration cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// A file that cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Not TOML, or not of the form that containerd takes: line, from 1.
    #[error("{}:{line}: {message}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

/// Reads one file's text; the error is the line, from 1, and what is wrong there.
pub fn parse(text: &str) -> Result<Parsed, (usize, String)> {
    let document = hosts::document(text)?;
    let table = document.as_table();
    let fault = |item: &Item, message: &str| {
        let offset = item.span().map_or(0, |span| span.start);
        (hosts::line(text.as_bytes(), offset), message.to_owned())
    };
    let version = match table.get("version") {
        Some(item) => item.as_integer().ok_or_else(|| fault(item, "`version` must be a number"))?,
        None => 1,
    };
    let texts = |key: &str| match table.get(key) {
        Some(item) => {
            let values = item.as_array().map(|array| array.iter().map(toml_edit::Value::as_str));
            let texts = values.and_then(|mut values| {
                values.try_fold(Vec::new(), |mut texts, text| {
                    texts.push(text?.to_owned());
                    Some(texts)
                })
            });
            texts.ok_or_else(|| fault(item, &format!("`{key}` must be a list of texts")))
        }
        None => Ok(Vec::new()),
    };
    let text_of =
        |item: Option<&Item>| item.and_then(Item::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    let plugins = table.get("plugins");
    let grpc = child(plugins, "io.containerd.server.v1.grpc").filter(|_| version >= 4);
    let address = child(table.get("grpc"), "address").or_else(|| child(grpc, "address"));
    let names = cri_names(version);
    let disabled = texts("disabled_plugins")?;
    let plugin = names.iter().find_map(|name| child(plugins, name));
    let misplaced = CRI_NAMES.iter().filter(|name| !names.contains(name)).find(|name| {
        let registry = child(child(plugins, name), "registry");
        text_of(child(registry, "config_path")).is_some()
    });
    Ok(Parsed {
        version,
        imports: texts("imports")?,
        root: text_of(table.get("root")),
        address: text_of(address),
        cri_disabled: disabled.iter().any(|name| name == "cri" || CRI_NAMES.contains(&name.as_str())),
        cri: plugin.map(|plugin| {
            let registry = child(Some(plugin), "registry");
            let flag = |item: Option<&Item>| item.and_then(Item::as_bool);
            let mirrors = child(registry, "mirrors").and_then(Item::as_table_like);
            Cri {
                config_path: text_of(child(registry, "config_path")),
                mirrors: mirrors
                    .into_iter()
                    .flat_map(TableLike::iter)
                    .map(|(name, _)| name.to_owned())
                    .collect(),
                discard: flag(child(Some(plugin), "discard_unpacked_layers"))
                    .or_else(|| flag(child(child(Some(plugin), "containerd"), "discard_unpacked_layers"))),
                local_pull: flag(child(Some(plugin), "use_local_image_pull")),
            }
        }),
        misplaced: misplaced.map(|name| (*name).to_owned()),
    })
}

impl Runtime {
    /// Reads `path` (as the host names it) and what it imports; `None` if there is no such file.
    pub(super) fn load(root: &Root, path: &Path) -> Result<Option<Self>, RuntimeError> {
        let Some(content) = disk::read(&root.at(path))? else { return Ok(None) };
        let mut runtime = Self::default();
        let mut seen = BTreeSet::from([path.to_owned()]);
        let mut pending = VecDeque::from([(path.to_owned(), content.text)]);
        let mut named = None;
        while let Some((path, text)) = pending.pop_front() {
            let file = parse(&text).map_err(|(line, message)| RuntimeError::Form {
                path: path.clone(),
                line,
                message,
            })?;
            for import in file.imports.iter().flat_map(|import| resolve(root, &path, import)) {
                if seen.len() < IMPORT_LIMIT
                    && seen.insert(import.clone())
                    && let Some(content) = disk::read(&root.at(&import))?
                {
                    pending.push_back((import, content.text));
                }
            }
            runtime.merge(path, file, &mut named);
        }
        Ok(Some(runtime))
    }

    /// What a later file says wins, as far as it says something.
    fn merge(&mut self, path: PathBuf, file: Parsed, named: &mut Option<PathBuf>) {
        if self.version == 0 {
            self.version = file.version;
        }
        self.root = file.root.or(self.root.take());
        self.address = file.address.or(self.address.take());
        self.cri_disabled |= file.cri_disabled;
        self.misplaced = self.misplaced.take().or(file.misplaced);
        let Some(cri) = file.cri else { return };
        if cri.config_path.is_some() {
            (self.cri.config_path, self.replaced) = (cri.config_path, None);
            *named = Some(path);
        } else if let Some(named) = named {
            self.replaced = Some((named.clone(), path));
        }
        self.cri.mirrors.extend(cri.mirrors);
        self.cri.discard = cri.discard.or(self.cri.discard);
        self.cri.local_pull = cri.local_pull.or(self.cri.local_pull);
    }
}

/// All names that CRI's plugin has had.
const CRI_NAMES: [&str; 3] = ["io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri", "cri"];

/// The name under which the settings of CRI's images are read. Version 2 is read by 1.x and, moved, by 2.x.
pub(super) fn cri_names(version: i64) -> &'static [&'static str] {
    match version {
        ..=1 => &CRI_NAMES[1..],
        2 => &CRI_NAMES[1..2],
        _ => &CRI_NAMES[..1],
    }
}

fn child<'a>(item: Option<&'a Item>, key: &str) -> Option<&'a Item> {
    item.and_then(Item::as_table_like).and_then(|table| table.get(key))
}

/// The files that an import means: relative to the file with it, `*` in the last component only (containerd takes any
/// of Go's patterns; distributions use `*.toml`).
fn resolve(root: &Root, parent: &Path, import: &str) -> Vec<PathBuf> {
    let path = disk::lexical(&parent.parent().unwrap_or(Path::new("/")).join(import));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((start, end)) = name.split_once('*') else { return vec![path] };
    let folder = path.parent().unwrap_or(Path::new("/"));
    let entries = std::fs::read_dir(root.at(folder)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let matching = names.filter(|name| {
        name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
    });
    let mut files: Vec<_> = matching.map(|name| folder.join(name)).collect();
    files.sort();
    files
}
