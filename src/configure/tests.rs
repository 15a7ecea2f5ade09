//! Hosts made of files in a folder, set up and cleaned up.

mod crashes;
mod finding;
mod folders;
mod texts;
mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::*;

pub(super) const MIRROR: &str = "http://127.0.0.1:5000";

/// A host's file system in a folder.
pub(super) struct Host {
    root: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Host {
    /// With these files: `(path, text)`.
    pub(super) fn new(files: &[(&str, &str)]) -> Self {
        let host = Self { root: tempfile::tempdir().unwrap(), state: tempfile::tempdir().unwrap() };
        for (path, text) in files {
            host.write(path, text);
        }
        host
    }

    /// A node of kubeadm with containerd 1.7, and these files below its folder of hosts.
    pub(super) fn plain(files: &[(&str, &str)]) -> Self {
        let host = Self::new(&[(
            "etc/containerd/config.toml",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n",
        )]);
        fs::create_dir_all(host.hosts()).unwrap();
        for (path, text) in files {
            host.write(&format!("etc/containerd/certs.d/{path}"), text);
        }
        host
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    pub(super) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(super) fn hosts(&self) -> PathBuf {
        self.path("etc/containerd/certs.d")
    }

    pub(super) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.hosts().join(path)).unwrap()
    }

    pub(super) fn options(&self, targets: &[&str]) -> Options {
        Options {
            root: self.root.path().to_owned(),
            state: self.state.path().join("configure"),
            config_paths: Vec::new(),
            targets: targets.iter().map(|target| target.parse().unwrap()).collect(),
            mirror: MIRROR.parse().unwrap(),
            mode: None,
            settings: Settings::default(),
        }
    }

    pub(super) fn configure(&self, targets: &[&str]) -> Report {
        configure(&self.options(targets)).unwrap()
    }

    pub(super) fn cleanup(&self) -> Report {
        cleanup(&self.options(&[]), false).unwrap()
    }

    pub(super) fn check(&self, targets: &[&str]) -> Report {
        check(&self.options(targets)).unwrap()
    }

    /// All below it: paths with mode and content; `None` for folders.
    pub(super) fn snapshot(&self) -> BTreeMap<PathBuf, (u32, Option<Vec<u8>>)> {
        let mut all = BTreeMap::new();
        let mut folders = vec![self.root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let content = if metadata.is_dir() {
                    folders.push(path.clone());
                    None
                } else if metadata.is_symlink() {
                    Some(fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes())
                } else {
                    Some(fs::read(&path).unwrap())
                };
                all.insert(path, (metadata.permissions().mode(), content));
            }
        }
        all
    }

    /// The hosts that a pull asks, `ca` and `client` by clean paths.
    pub(super) fn asked(&self, registry: &str) -> Vec<hosts::Host> {
        let registry = registry.replace("_default", "any.invalid").parse().unwrap();
        let mut hosts = hosts::load(&[self.hosts()], &registry).unwrap();
        let clean = |path: &mut PathBuf| {
            let mut clean = PathBuf::new();
            for part in path.components() {
                if part == std::path::Component::ParentDir {
                    clean.pop();
                } else {
                    clean.push(part);
                }
            }
            *path = clean;
        };
        for host in &mut hosts {
            host.ca.iter_mut().for_each(clean);
            for (certificate, key) in &mut host.client {
                clean(certificate);
                key.iter_mut().for_each(clean);
            }
        }
        hosts
    }
}

pub(super) fn codes(report: &Report) -> Vec<Code> {
    report.findings.iter().map(|finding| finding.code).collect()
}

pub(super) fn urls(hosts: &[hosts::Host]) -> Vec<&str> {
    hosts.iter().map(|host| host.url.as_str()).collect()
}

#[test]
fn mirrors_have_one_form() {
    let check = |text: &str, expected: Option<&str>| {
        let mirror = text.parse::<Mirror>().ok();
        assert_eq!(mirror.as_ref().map(Mirror::url), expected, "{text}");
    };
    check("http://127.0.0.1:5000", Some("http://127.0.0.1:5000"));
    check("HTTP://LocalHost:5000/v2/", Some("http://localhost:5000"));
    check("https://[::1]:5000/", Some("https://[::1]:5000"));
    for wrong in ["127.0.0.1:5000", "ftp://a", "http://u:p@a", "http://a/b", "http://a?b", "", "http://"] {
        check(wrong, None);
    }
    let of = |listen: &[&str]| {
        let listen: Vec<SocketAddr> = listen.iter().map(|address| address.parse().unwrap()).collect();
        Mirror::of(&listen).map(String::from)
    };
    assert_eq!(of(&["127.0.0.1:5000", "[::1]:5000"]).unwrap(), "http://127.0.0.1:5000");
    assert_eq!(of(&["[::1]:5000", "127.0.0.1:5001"]).unwrap(), "http://127.0.0.1:5001");
    assert_eq!(of(&["[::1]:5000"]).unwrap(), "http://localhost:5000");
    assert_eq!(of(&["0.0.0.0:5000"]).unwrap(), "http://127.0.0.1:5000");
    assert_eq!(of(&["[fd00::1]:5000"]).unwrap(), "http://[fd00::1]:5000");
    assert_eq!(of(&[]), None);
}

/// What distributions are given, whole.
#[test]
fn formats() {
    let targets: Vec<Target> =
        ["_default", "registry.local:5000"].iter().map(|t| t.parse().unwrap()).collect();
    let mirror: Mirror = MIRROR.parse().unwrap();
    let render = |format: Format, mode| format.render(&targets, &mirror, mode).unwrap();
    insta::assert_snapshot!(render(Format::Talos, Mode::Only), @r#"
    # Apply to every node: talosctl patch machineconfig --patch @FILE --nodes NODES
    # The file in machine.files needs a reboot. It is there once: merge, if you have it already.
    # A registry with an entry of its own under machine.registries has a folder of its own and does not take part
    # in "*": list it too, with its own address as the second endpoint.
    # Before Talos 1.9 no "*": its own pulls (kubelet, etcd, installer) would not go on to the registry.
    machine:
      registries:
        mirrors:
          "*":
            endpoints:
              - "http://127.0.0.1:5000"
            # Pulls then depend on Peili.
            skipFallback: true
          "registry.local:5000":
            endpoints:
              - "http://127.0.0.1:5000"
            # Pulls then depend on Peili.
            skipFallback: true
      files:
        - path: /etc/cri/conf.d/20-customization.part
          op: create
          content: |
            # containerd 2.x, and 1.x
            [plugins."io.containerd.cri.v1.images"]
              discard_unpacked_layers = false
            [plugins."io.containerd.grpc.v1.cri".containerd]
              discard_unpacked_layers = false
    "#);
    insta::assert_snapshot!(render(Format::K3s, Mode::First), @r#"
    # Merge into /etc/rancher/k3s/registries.yaml on every node and restart k3s. A registry that has an
    # entry of its own there does not take part in "*": let its endpoint begin with the same address.
    mirrors:
      "*":
        endpoint:
          - "http://127.0.0.1:5000"
      "registry.local:5000":
        endpoint:
          - "http://127.0.0.1:5000"
    "#);
    insta::assert_snapshot!(render(Format::Bottlerocket, Mode::First), @r#"
    # User data, or: apiclient apply < FILE. It replaces the list of mirrors: merge, if you have one already. A
    # registry with credentials has a folder of its own and does not take part in "*": list it too.
    [[settings.container-registry.mirrors]]
    registry = "*"
    endpoint = ["http://127.0.0.1:5000"]
    [[settings.container-registry.mirrors]]
    registry = "registry.local:5000"
    endpoint = ["http://127.0.0.1:5000"]
    "#);
    assert!(render(Format::Rke2, Mode::Only).contains("/etc/rancher/rke2/config.yaml"));
    assert!(render(Format::Rke2, Mode::Only).contains("# disable-default-registry-endpoint: true"));
    assert!(Format::Bottlerocket.render(&targets, &mirror, Mode::Only).is_err());
    for format in [Format::Talos, Format::K3s, Format::Rke2] {
        for mode in [Mode::First, Mode::Only] {
            let value: serde_json::Value = serde_saphyr::from_str(&render(format, mode)).unwrap();
            assert!(value.to_string().matches(MIRROR).count() == 2, "{value}");
        }
    }
    let settings: toml_edit::DocumentMut = render(Format::Bottlerocket, Mode::First).parse().unwrap();
    assert_eq!(settings["settings"]["container-registry"]["mirrors"].as_array_of_tables().unwrap().len(), 2);
}
