//! What distributions need that write the folder of hosts themselves: their own configuration, for the same registries.

use std::fmt::Write as _;

use super::{Mirror, Mode, Target};

/// The configuration of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Talos Linux: a patch of the machine configuration.
    Talos,
    /// k3s: `registries.yaml`.
    K3s,
    /// RKE2: `registries.yaml`.
    Rke2,
    /// Bottlerocket: settings.
    Bottlerocket,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Talos => "talos",
            Self::K3s => "k3s",
            Self::Rke2 => "rke2",
            Self::Bottlerocket => "bottlerocket",
        }
    }

    /// What to give the distribution; the error says why it has nothing like it.
    pub fn render(self, targets: &[Target], mirror: &Mirror, mode: Mode) -> Result<String, String> {
        match self {
            Self::Talos => Ok(talos(targets, mirror, mode)),
            Self::K3s | Self::Rke2 => Ok(self.rancher(targets, mirror, mode)),
            Self::Bottlerocket if mode == Mode::Only => {
                Err("Bottlerocket always goes on to the registry itself: \
                there is no --mode only"
                    .to_owned())
            }
            Self::Bottlerocket => Ok(bottlerocket(targets, mirror)),
        }
    }

    /// <https://docs.k3s.io/installation/private-registry>; RKE2 has the same under its own name.
    fn rancher(self, targets: &[Target], mirror: &Mirror, mode: Mode) -> String {
        let name = self.name();
        let mut text = format!(
            "# Merge into /etc/rancher/{name}/registries.yaml on every node and restart {name}. A registry that has an\n\
             # entry of its own there does not take part in \"*\": let its endpoint begin with the same address.\nmirrors:\n"
        );
        for target in targets {
            let _ = write!(
                text,
                "  {}:\n    endpoint:\n      - {}\n",
                json(wildcard(target)),
                json(mirror.url())
            );
        }
        if mode == Mode::Only {
            let _ = write!(
                text,
                "# Pulls then depend on Peili. In /etc/rancher/{name}/config.yaml of every node; it holds for all registries\n\
                 # of registries.yaml, not only for these:\n# disable-default-registry-endpoint: true\n"
            );
        }
        text
    }
}

/// `machine.registries` is read by all versions; from 1.12 a `RegistryMirrorConfig` document says the same. Layers are
/// kept by a fragment of containerd's configuration; from 1.14 it is a `CRICustomizationConfig` document, and the file
/// is still read (<https://docs.siderolabs.com/talos/v1.15/configure-your-talos-cluster/images-container-runtime/containerd>).
/// containerd 1.x (Talos 1.7 and older) and 2.x have it in different tables, and each passes over the other's.
fn talos(targets: &[Target], mirror: &Mirror, mode: Mode) -> String {
    let mut text = String::from(
        "# Apply to every node: talosctl patch machineconfig --patch @FILE --nodes NODES\n\
         # The file in machine.files needs a reboot. It is there once: merge, if you have it already.\n\
         # A registry with an entry of its own under machine.registries has a folder of its own and does not take part\n\
         # in \"*\": list it too, with its own address as the second endpoint.\n\
         # Before Talos 1.9 no \"*\": its own pulls (kubelet, etcd, installer) would not go on to the registry.\n\
         machine:\n  registries:\n    mirrors:\n",
    );
    for target in targets {
        let _ = write!(
            text,
            "      {}:\n        endpoints:\n          - {}\n",
            json(wildcard(target)),
            json(mirror.url())
        );
        if mode == Mode::Only {
            text.push_str("        # Pulls then depend on Peili.\n        skipFallback: true\n");
        }
    }
    text.push_str(
        "  files:\n    - path: /etc/cri/conf.d/20-customization.part\n      op: create\n      content: |\n        \
         # containerd 2.x, and 1.x\n        \
         [plugins.\"io.containerd.cri.v1.images\"]\n          discard_unpacked_layers = false\n        \
         [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n          discard_unpacked_layers = false\n",
    );
    text
}

/// <https://bottlerocket.dev/en/os/latest/api/settings/container-registry/>
fn bottlerocket(targets: &[Target], mirror: &Mirror) -> String {
    let mut text = String::from(
        "# User data, or: apiclient apply < FILE. It replaces the list of mirrors: merge, if you have one already. A\n\
         # registry with credentials has a folder of its own and does not take part in \"*\": list it too.\n",
    );
    for target in targets {
        let _ = write!(
            text,
            "[[settings.container-registry.mirrors]]\nregistry = {}\nendpoint = [{}]\n",
            json(wildcard(target)),
            json(mirror.url())
        );
    }
    text
}

/// All of them call the default `*`.
fn wildcard(target: &Target) -> &str {
    match target {
        Target::Default => "*",
        Target::Registry(registry) => registry.as_str(),
    }
}

/// A quoted text of JSON is one of YAML and of TOML too.
fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
