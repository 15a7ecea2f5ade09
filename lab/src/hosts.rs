//! containerd's `hosts.toml`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Writes `FOLDER/hosts.toml` for `registry` below `config_path`: first the `mirrors`, then `server`.
///
/// Without mirrors the server stands as a host too: containerd 1.6 and 1.7 ignore a whole file without a `[host]` table.
pub fn write(config_path: &Path, registry: &str, server: &str, mirrors: &[&str]) -> Result<PathBuf> {
    let folder = config_path.join(folder(registry));
    fs::create_dir_all(&folder)?;
    let path = folder.join("hosts.toml");
    fs::write(&path, render(server, mirrors)).with_context(|| format!("cannot write {}", path.display()))?;
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
/// Hosts stand as inline values where one has an IPv6 address: the TOML parser of containerd 1.6 and 1.7 takes no `]`
/// in the name of a table, and then ignores the whole file.
pub fn render(server: &str, mirrors: &[&str]) -> String {
    let hosts = if mirrors.is_empty() { std::slice::from_ref(&server) } else { mirrors };
    let inline = hosts.iter().any(|host| host.contains(']'));
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
        assert!(render("http://a", &[]).contains("[host.\"http://a\"]"));
        assert_eq!(
            render("http://a", &["http://b"]),
            "server = \"http://a\"\n\n[host.\"http://b\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
    }

    #[test]
    fn folders() {
        assert_eq!(folder("a.io"), "a.io");
        assert_eq!(folder("a.io:5000"), "a.io_5000_");
        assert_eq!(folder("[fd77::1]:5000"), "[fd77::1]_5000_");
    }
}
