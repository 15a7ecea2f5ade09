//! The text of a `hosts.toml`: Peili's entry put into it and taken out of it. Pure.
//!
//! It cuts and joins the text itself, at the places where the TOML parser found tables: all that is not Peili's keeps
//! its bytes, comments and order. What it made is read again before anybody gets it, as containerd would read it.

use std::ops::Range;
use std::path::Path;

use toml_edit::{Document, Item, Table};

use crate::oci::Registry;
use crate::upstream::hosts::{self, Host};

use super::{Mirror, Mode};

/// Above Peili's entry, so that whoever reads the file knows where it is from.
const MARK: &str = "# Peili: written by `peili configure`, taken out by `peili cleanup`.";
/// Above all of a file in which Peili is the only host.
const ONLY: &str = "# Pulls of this registry depend on Peili: `peili configure --mode only` left out all other hosts, and\n\
                    # `peili cleanup` puts back what was here.\n";
/// How long containerd may take to connect to Peili (2.1 and later; older ones ignore the key). On one machine a
/// connection takes no time, so that this is only ever reached by a mirror that hangs or by an address of elsewhere.
const DIAL_TIMEOUT: &str = "200ms";

/// Why a text cannot be changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not what containerd reads: line, from 1, and what is wrong there. containerd ignores such a file.
    #[error("{0}: {1}")]
    Form(usize, String),
    /// The hosts are written in a way to which nothing can be added.
    #[error("its hosts are written in line, to which no table can be added; write each as [host.\"URL\"]")]
    Inline,
}

/// A table of the file with all that belongs to it.
#[derive(Debug)]
struct Section {
    /// Its keys: `host`, `https://mirror`, `header`.
    path: Vec<String>,
    /// Where the comment right above it begins.
    comment: usize,
    /// From its `[` to the end of its last line.
    body: Range<usize>,
}

/// Puts Peili before all other hosts, or makes it the only one. A text that does that already is returned as it is.
///
/// `folder` and `registry` are for reading the result only.
pub(super) fn add(
    text: &str,
    folder: &Path,
    registry: &Registry,
    mirror: &Mirror,
    mode: Mode,
) -> Result<String, Fault> {
    if is_set(text, folder, registry, mirror, mode)? {
        return Ok(text.to_owned());
    }
    if mode == Mode::Only {
        return Ok(only(mirror));
    }
    // An entry that is there keeps its settings, unless it forbids what it is for.
    for own in [own(text, mirror)?, Some(entry(mirror))].into_iter().flatten() {
        let added = first(text, &own, mirror)?;
        if is_set(&added, folder, registry, mirror, mode) == Ok(true)
            && kept(text, &added, folder, registry, mirror)
        {
            return Ok(added);
        }
    }
    Err(Fault::Inline)
}

/// The text without Peili's entry. A text that has none is returned as it is.
pub(super) fn strip(text: &str, mirror: &Mirror) -> Result<String, Fault> {
    let sections = sections(text)?;
    let mut stripped = String::with_capacity(text.len());
    let mut at = 0;
    for section in sections.iter().filter(|section| section.is_of(mirror)) {
        let above = &text[section.comment..section.body.start];
        // Other comments above it are somebody's; the mark and the empty line below the entry came with it.
        let start = above.find(MARK).map_or(section.line(text), |mark| section.comment + mark);
        if start > at {
            stripped.push_str(&text[at..start]);
        }
        let rest = &text[section.body.end..];
        let blank = if rest.starts_with("\r\n") { 2 } else { usize::from(rest.starts_with('\n')) };
        at = section.body.end + blank;
    }
    stripped.push_str(&text[at.min(text.len())..]);
    // What `--mode only` made of the file.
    let server: Vec<_> = server(&stripped)?.filter(|(value, _)| mirror.is(value)).into_iter().collect();
    for (_, line) in server {
        stripped.replace_range(line, "");
        stripped = stripped.replacen(ONLY, "", 1);
    }
    Ok(stripped)
}

/// Whether Peili is asked first, or as the only one, for `registry` by this text.
pub(super) fn is_set(
    text: &str,
    folder: &Path,
    registry: &Registry,
    mirror: &Mirror,
    mode: Mode,
) -> Result<bool, Fault> {
    let hosts = read(text, folder, registry)?;
    // The parser takes hosts in line too; containerd 2.x sees tables only.
    let is_table = sections(text)?.iter().any(|section| section.is_of(mirror));
    Ok(is_table && is_asked(&hosts, mirror, mode))
}

/// Whether Peili is the first of these hosts that is asked for content, or all of them.
pub(super) fn is_asked(hosts: &[Host], mirror: &Mirror, mode: Mode) -> bool {
    let is_own = |host: &Host| mirror.is(&host.url);
    match mode {
        Mode::First => hosts.first().is_some_and(|host| is_own(host) && host.pull),
        Mode::Only => hosts.iter().all(is_own),
    }
}

/// The head of a file that is made because of certificates beside it: `ca` and `client` entries, for the registry itself.
pub(super) fn certificates(ca: &[String], client: &[(String, Option<String>)]) -> String {
    if ca.is_empty() && client.is_empty() {
        return String::new();
    }
    let list = |items: Vec<String>| items.join(", ");
    let mut text =
        "# Certificates that lie here by their names, which count only where there is no hosts.toml.\n"
            .to_owned();
    if !ca.is_empty() {
        text.push_str(&format!("ca = [{}]\n", list(ca.iter().map(|name| quoted(name)).collect())));
    }
    if !client.is_empty() {
        let pairs = client.iter().map(|(certificate, key)| match key {
            Some(key) => format!("[{}, {}]", quoted(certificate), quoted(key)),
            None => quoted(certificate),
        });
        text.push_str(&format!("client = [{}]\n", list(pairs.collect())));
    }
    text
}

/// Lets the files that the text names relative to `from` be found from another folder: `prefix` leads there.
pub(super) fn rebase(text: &str, prefix: &str) -> Result<String, Fault> {
    let document = parse(text)?;
    let mut names = Vec::new();
    let root = document.as_table();
    files(root, &mut names);
    for (_, item) in root.get("host").and_then(Item::as_table_like).into_iter().flat_map(|hosts| hosts.iter())
    {
        if let Some(host) = item.as_table_like() {
            files(host, &mut names);
        }
    }
    names.sort_by_key(|(span, _)| span.start);
    let mut rebased = text.to_owned();
    for (span, name) in names.into_iter().rev().filter(|(_, name)| !name.starts_with('/')) {
        rebased.replace_range(span, &quoted(&format!("{prefix}{name}")));
    }
    Ok(rebased)
}

/// The hosts of the text, as containerd takes them.
pub(super) fn read(text: &str, folder: &Path, registry: &Registry) -> Result<Vec<Host>, Fault> {
    hosts::parse(folder, text.as_bytes(), registry).map_err(|error| match error {
        hosts::Error::Form { line, message, .. } => Fault::Form(line, message),
        // Nothing else can be wrong with a text.
        other => Fault::Form(1, other.to_string()),
    })
}

/// The whole of a file in which Peili is the only host. It has a table beside `server`, since containerd 1.6 and 1.7
/// ignore a whole file that has none.
fn only(mirror: &Mirror) -> String {
    format!("{ONLY}server = {}\n\n{}", quoted(mirror.url()), entry(mirror))
}

/// The entry that the text has for Peili, with the tables within it.
fn own(text: &str, mirror: &Mirror) -> Result<Option<String>, Fault> {
    let mut block = String::new();
    for section in sections(text)?.iter().filter(|section| section.is_of(mirror)) {
        block.push_str(&text[section.line(text)..section.body.end]);
        if !block.ends_with('\n') {
            block.push('\n');
        }
    }
    Ok(if block.is_empty() { None } else { Some(format!("{MARK}\n{block}")) })
}

/// The text with `own` before all its tables, and nowhere else.
fn first(text: &str, own: &str, mirror: &Mirror) -> Result<String, Fault> {
    let mut text = strip(text, mirror)?;
    match sections(&text)?.first() {
        Some(section) => text.insert_str(section.comment, &format!("{own}\n")),
        None => {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            if !text.is_empty() && !text.ends_with("\n\n") {
                text.push('\n');
            }
            text.push_str(own);
        }
    }
    Ok(text)
}

/// Peili's table.
fn entry(mirror: &Mirror) -> String {
    format!(
        "{MARK}\n[host.{}]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"{DIAL_TIMEOUT}\"\n",
        quoted(mirror.url())
    )
}

/// Whether `new` asks the hosts of `old`, all as they were and in their order, after Peili.
fn kept(old: &str, new: &str, folder: &Path, registry: &Registry, mirror: &Mirror) -> bool {
    let others = |text: &str| {
        let hosts = read(text, folder, registry).ok()?;
        Some(hosts.into_iter().filter(|host| !mirror.is(&host.url)).collect::<Vec<_>>())
    };
    others(old).is_some_and(|old| others(new) == Some(old))
}

/// As a basic string: JSON's are the same. The writer of the library would take other kinds, which old parsers lack.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn parse(text: &str) -> Result<Document<&str>, Fault> {
    // Go's parsers take it for a part of the first key.
    if text.starts_with('\u{feff}') {
        return Err(Fault::Form(
            1,
            "it begins with a byte order mark, which containerd does not read".into(),
        ));
    }
    hosts::document(text).map_err(|(line, message)| Fault::Form(line, message))
}

/// All tables that have a header of their own, in the order of the text.
fn sections(text: &str) -> Result<Vec<Section>, Fault> {
    let document = parse(text)?;
    let mut found = Vec::new();
    headers(document.as_table(), &mut Vec::new(), &mut found);
    found.sort_by_key(|(start, _, _)| *start);
    let trailing = document.trailing().span().map_or(text.len(), |span| span.start);
    let ends: Vec<_> =
        found.iter().skip(1).map(|(_, above, _)| *above).chain([trailing.min(text.len())]).collect();
    let sections = found.into_iter().zip(ends).map(|((start, above, path), end)| {
        let line = line_start(text, start);
        let mut comment = line;
        // Lines right above that are comments, down from what belongs to the table before.
        for (offset, above) in lines_up(text, line).take_while(|(offset, _)| *offset >= above) {
            if !above.trim_start().starts_with('#') {
                break;
            }
            comment = offset;
        }
        Section { path, comment, body: start..end.max(start) }
    });
    Ok(sections.collect())
}

/// Collects `(start of the header, start of what stands above it, path)`.
fn headers(table: &Table, path: &mut Vec<String>, found: &mut Vec<(usize, usize, Vec<String>)>) {
    for (key, item) in table {
        path.push(key.to_owned());
        let mut add = |table: &Table, path: &mut Vec<String>| {
            if !table.is_implicit()
                && !table.is_dotted()
                && let Some(span) = table.span()
            {
                let above = table.decor().prefix().and_then(toml_edit::RawString::span);
                let above = above.map_or(span.start, |above| above.start.min(span.start));
                found.push((span.start, above, path.clone()));
            }
            headers(table, path, found);
        };
        match item {
            Item::Table(table) => add(table, path),
            Item::ArrayOfTables(tables) => tables.iter().for_each(|table| add(table, path)),
            Item::None | Item::Value(_) => {}
        }
        path.pop();
    }
}

/// Where the line begins that the offset `at` is in.
fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

/// Lines before the offset `end`, which begins a line, the nearest first, each with where it begins.
fn lines_up(text: &str, end: usize) -> impl Iterator<Item = (usize, &str)> {
    let mut end = end;
    std::iter::from_fn(move || {
        let line = &text[..end.checked_sub(1)?];
        let start = line.rfind('\n').map_or(0, |newline| newline + 1);
        end = start;
        Some((start, &line[start..]))
    })
}

/// The value of `server`, and its whole line.
fn server(text: &str) -> Result<Option<(String, Range<usize>)>, Fault> {
    let document = parse(text)?;
    let root = document.as_table();
    let found = root.get_key_value("server").and_then(|(key, item)| {
        let (start, end) = (key.span()?.start, item.span()?.end);
        let start = line_start(text, start);
        let end = text[end..].find('\n').map_or(text.len(), |newline| end + newline + 1);
        Some((item.as_str()?.to_owned(), start..end))
    });
    Ok(found)
}

/// Names of files in `ca` and `client` of one host, with their places.
fn files(table: &dyn toml_edit::TableLike, names: &mut Vec<(Range<usize>, String)>) {
    fn texts(value: &toml_edit::Value, names: &mut Vec<(Range<usize>, String)>) {
        match value {
            toml_edit::Value::String(text) => {
                if let Some(span) = value.span() {
                    names.push((span, text.value().clone()));
                }
            }
            toml_edit::Value::Array(values) => values.iter().for_each(|value| texts(value, names)),
            _ => {}
        }
    }
    for key in ["ca", "client"] {
        if let Some(value) = table.get(key).and_then(Item::as_value) {
            texts(value, names);
        }
    }
}

impl Section {
    /// Whether it is the table of this host, or one within it.
    fn is_of(&self, mirror: &Mirror) -> bool {
        matches!(&self.path[..], [host, url, ..] if host == "host" && mirror.is(url))
    }

    /// Where its header's line begins.
    fn line(&self, text: &str) -> usize {
        line_start(text, self.body.start)
    }
}
