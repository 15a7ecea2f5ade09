//! The text of a `hosts.toml`.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use reqwest::Url;
use toml_edit::{Document, Item, TableLike, Value};

use super::{Error, HOST_LIMIT, Host};
use crate::oci::Registry;

/// Where an error is: the span in the text, and what is wrong there.
struct Fault(Option<Range<usize>>, String);

pub(super) fn hosts(
    folder: &Path,
    file: &Path,
    bytes: &[u8],
    registry: &Registry,
) -> Result<Vec<Host>, Error> {
    let form = |(line, message)| Error::Form { path: file.to_owned(), line, message };
    let at = |offset, message| form((line(bytes, offset), message));
    let text =
        std::str::from_utf8(bytes).map_err(|error| at(error.valid_up_to(), "not UTF-8 text".to_owned()))?;
    let document = document(text).map_err(form)?;
    read(folder, &document, registry)
        .map_err(|Fault(span, message)| at(span.map_or(0, |span| span.start), message))
}

/// The TOML document that a text is, or the line, from 1, at which it is none, and why.
pub fn document(text: &str) -> Result<Document<&str>, (usize, String)> {
    Document::parse(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        (line(text.as_bytes(), offset), error.message().trim().replace('\n', ", "))
    })
}

/// The line, from 1, in which the byte at `offset` is.
pub fn line(bytes: &[u8], offset: usize) -> usize {
    bytes[..offset.min(bytes.len())].iter().filter(|&&byte| byte == b'\n').count() + 1
}

fn read(folder: &Path, document: &Document<&str>, registry: &Registry) -> Result<Vec<Host>, Fault> {
    let root = document.as_table();
    let mut hosts = Vec::new();
    if let Some(item) = root.get("host") {
        let tables = item.as_table_like().ok_or_else(|| {
            Fault(item.span(), "`host` must be tables: [host.\"https://mirror\"]".to_owned())
        })?;
        // The order of asking is the order in the file.
        for (name, item) in tables.iter() {
            let span = item.span().or_else(|| tables.key(name).and_then(toml_edit::Key::span));
            let table = item
                .as_table_like()
                .ok_or_else(|| Fault(span.clone(), format!("host `{name}` must be a table")))?;
            if hosts.len() == HOST_LIMIT {
                return Err(Fault(span, format!("more than {HOST_LIMIT} hosts")));
            }
            hosts.push(host(folder, name, span, table)?);
        }
    }
    hosts.push(match root.get("server") {
        Some(item) if item.as_str() != Some("") => host(folder, string(item, "server")?, item.span(), root)?,
        _ => {
            // The registry itself has all capabilities, whatever the file says.
            let mut server = Host { skip_verify: false, ..Host::server(registry) };
            let skip_verify = settings(folder, root, &mut server)?;
            server.skip_verify = skip_verify.unwrap_or(Host::server(registry).skip_verify);
            (server.pull, server.resolve) = (true, true);
            server
        }
    });
    Ok(hosts)
}

fn host(folder: &Path, name: &str, span: Option<Range<usize>>, table: &dyn TableLike) -> Result<Host, Fault> {
    let override_path = match table.get("override_path") {
        Some(item) => boolean(item, "override_path")?,
        None => false,
    };
    let url = base(name, override_path).map_err(|message| Fault(span, message))?;
    let mut host = Host::new(&url);
    host.skip_verify = settings(folder, table, &mut host)?.unwrap_or(false);
    Ok(host)
}

/// The base of the API for what a file calls a host: `https` where there is no scheme, `/v2` at the end.
fn base(name: &str, override_path: bool) -> Result<String, String> {
    let text = if name.starts_with("http") { name.to_owned() } else { format!("https://{name}") };
    let url = Url::parse(&text).map_err(|error| format!("`{name}` is not an address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("`{name}` is not an address: only http and https are possible"));
    }
    // What containerd takes of it: scheme, host, port and a clean path.
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let mut path = String::new();
    for part in url.path().split('/').filter(|part| !part.is_empty()) {
        path.push('/');
        path.push_str(part);
    }
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    Ok(format!("{}://{host}{port}{path}", url.scheme()))
}

/// Reads all but the address into `host`; returns `skip_verify` where it is set.
fn settings(folder: &Path, table: &dyn TableLike, host: &mut Host) -> Result<Option<bool>, Fault> {
    if let Some(item) = table.get("capabilities") {
        let capabilities = strings(item, "capabilities")?;
        // An empty list is none at all, which means all.
        if !capabilities.is_empty() {
            (host.pull, host.resolve) = (false, false);
        }
        for capability in capabilities {
            match capability.to_ascii_lowercase().as_str() {
                "pull" => host.pull = true,
                "resolve" => host.resolve = true,
                "push" => {}
                // Of mid-2026: says nothing about pulling by digest or by tag.
                "referrers" => {}
                _ => return Err(Fault(item.span(), format!("unknown capability `{capability}`"))),
            }
        }
    }
    if let Some(item) = table.get("ca") {
        host.ca = match item.as_str() {
            Some(file) => vec![folder.join(file)],
            None => strings(item, "ca")?.into_iter().map(|file| folder.join(file)).collect(),
        };
    }
    if let Some(item) = table.get("client") {
        host.client = clients(folder, item)?;
    }
    if let Some(item) = table.get("header") {
        let headers =
            item.as_table_like().ok_or_else(|| Fault(item.span(), "`header` must be a table".to_owned()))?;
        for (name, value) in headers.iter() {
            let values = match value.as_str() {
                Some(value) => vec![value],
                None => strings(value, name)?,
            };
            host.headers.extend(values.into_iter().map(|value| (name.to_owned(), value.to_owned())));
        }
    }
    if let Some(item) = table.get("dial_timeout") {
        let text = string(item, "dial_timeout")?;
        if !text.is_empty() {
            let limit = duration(text).ok_or_else(|| {
                Fault(item.span(), format!("`{text}` is not a duration such as 5s or 1m30s"))
            })?;
            host.dial_timeout = Some(limit);
        }
    }
    table.get("skip_verify").map(|item| boolean(item, "skip_verify")).transpose()
}

/// `client`: a file with certificate and key, a list of those, or a list of pairs.
fn clients(
    folder: &Path,
    item: &Item,
) -> Result<Vec<(std::path::PathBuf, Option<std::path::PathBuf>)>, Fault> {
    let fault = || {
        Fault(
            item.span(),
            "`client` must be a file, a list of files, or a list of [certificate, key]".to_owned(),
        )
    };
    if let Some(file) = item.as_str() {
        return Ok(vec![(folder.join(file), None)]);
    }
    let entries = item.as_array().ok_or_else(fault)?;
    let mut pairs = Vec::new();
    for entry in entries {
        pairs.push(match entry {
            Value::String(file) => (folder.join(file.value()), None),
            Value::Array(pair) => {
                let files: Vec<&str> = pair.iter().filter_map(Value::as_str).collect();
                let (2, &[certificate, key]) = (pair.len(), files.as_slice()) else { return Err(fault()) };
                (folder.join(certificate), Some(folder.join(key)))
            }
            _ => return Err(fault()),
        });
    }
    Ok(pairs)
}

fn string<'a>(item: &'a Item, key: &str) -> Result<&'a str, Fault> {
    item.as_str().ok_or_else(|| Fault(item.span(), format!("`{key}` must be a text")))
}

fn boolean(item: &Item, key: &str) -> Result<bool, Fault> {
    item.as_bool().ok_or_else(|| Fault(item.span(), format!("`{key}` must be true or false")))
}

fn strings<'a>(item: &'a Item, key: &str) -> Result<Vec<&'a str>, Fault> {
    let fault = || Fault(item.span(), format!("`{key}` must be a list of texts"));
    item.as_array().ok_or_else(fault)?.iter().map(|value| value.as_str().ok_or_else(fault)).collect()
}

/// A duration as Go writes it: `1h2m3.5s`, `300ms`; not negative.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..number].parse().ok()?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        rest = &rest[unit..];
        total = total.checked_add(Duration::try_from_secs_f64(value * seconds).ok()?)?;
    }
    Some(total)
}
