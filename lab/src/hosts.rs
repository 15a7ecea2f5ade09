//! containerd's `hosts.toml`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::requirements::Generation;

/// Writes `FOLDER/hosts.toml` for `registry` below `config_path`: first the `mirrors`, then `server`.
pub fn write(config_path: &Path, registry: &str, server: &str, mirrors: &[&str]) -> Result<PathBuf> {
    put(config_path, registry, &render(server, mirrors, false))
}

/// The same for this generation of containerd.
pub fn write_for(
    generation: Generation,
    config_path: &Path,
    registry: &str,
    server: &str,
    mirrors: &[&str],
) -> Result<PathBuf> {
    put(config_path, registry, &render(server, mirrors, generation != Generation::V2))
}

fn put(config_path: &Path, registry: &str, text: &str) -> Result<PathBuf> {
    let folder = config_path.join(folder(registry));
    fs::create_dir_all(&folder)?;
    let path = folder.join("hosts.toml");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The folder of a registry: its port after an underscore, `localhost_5000_`, as Windows has no colons.
pub fn folder(registry: &str) -> String {
    match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => format!("{host}_{port}_"),
        _ => registry.to_owned(),
    }
}

/// The text of the file.
///
/// Without mirrors the server stands as a host too: containerd 1.6 and 1.7 ignore a whole file without a `[host]` table.
/// Nor does `old`, their TOML parser, take a `]` in the name of a table: there a host with an IPv6 address is an inline
/// value, which 2.x in turn does not see.
fn render(server: &str, mirrors: &[&str], old: bool) -> String {
    let hosts = if mirrors.is_empty() { std::slice::from_ref(&server) } else { mirrors };
    let inline = old && hosts.iter().any(|host| host.contains(']'));
    let mut text = format!("server = \"{server}\"\n");
    if inline {
        text.push_str("\n[host]\n");
    }
    for host in hosts {
        text.push_str(&if inline {
            format!("\"{host}\" = {{ capabilities = [\"pull\", \"resolve\"] }}\n")
        } else {
            format!("\n[host.\"{host}\"]\n  capabilities = [\"pull\", \"resolve\"]\n")
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_a_host_table() {
        assert!(render("http://a", &[], true).contains("[host.\"http://a\"]"));
        for old in [false, true] {
            assert_eq!(
                render("http://a", &["http://b"], old),
                "server = \"http://a\"\n\n[host.\"http://b\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
            );
        }
        assert!(render("http://a", &["http://[::1]"], false).contains("[host.\"http://[::1]\"]"));
        assert!(render("http://a", &["http://[::1]"], true).contains("[host]\n\"http://[::1]\" = {"));
    }

    #[test]
    fn folders() {
        assert_eq!(folder("a.io"), "a.io");
        assert_eq!(folder("a.io:5000"), "a.io_5000_");
        assert_eq!(folder("[fd77::1]:5000"), "[fd77::1]_5000_");
    }
}
