//! `peili plugin manifest`: a component, and the files that it gets, as a ConfigMap, the lines of configuration that name it, and whether it fits.
//!
//! A component is larger than what people put into ConfigMaps, and each way into a cluster ends at another size, mostly without
//! saying so before. Nothing here asks a cluster.

use std::io::Write as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Data, Given, InspectError};
use crate::oci::Digest;
use crate::policy;

/// All annotations of an object, in bytes: Kubernetes' `TotalAnnotationSizeLimitB` (apimachinery, `validation/objectmeta.go`).
/// `kubectl apply` writes the whole object into one.
const ANNOTATIONS: u64 = 256 << 10;
/// That annotation; its name counts too.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The values of a ConfigMap, in bytes, before base64; those of a Secret too: Kubernetes' `MaxSecretSize` (apis/core,
/// `validation/validation.go`; <https://kubernetes.io/docs/concepts/configuration/configmap/>).
const VALUES: u64 = 1 << 20;
/// A request of etcd, in bytes: its `--max-request-bytes` (<https://etcd.io/docs/v3.5/dev-guide/limit/>).
const REQUEST: u64 = 1_572_864;
/// Of a stored object, besides its values, in bytes: names, times, who manages which field. Rounded up.
const STORED: u64 = 4 << 10;
/// Where the folder of policies is mounted.
const MOUNTED: &str = "/etc/peili/policies";

/// A way into a cluster, and what the component takes there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Fit {
    /// `config-map`, `kubectl-apply`, `server-side-apply` or `helm`.
    pub way: &'static str,
    /// In bytes, as that way counts.
    pub size: u64,
    /// In bytes.
    pub limit: u64,
    /// What helps where it does not fit.
    #[serde(skip)]
    hint: &'static str,
}

/// What gets a component into a cluster, and in force there.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    /// The object.
    pub config_map: Value,
    /// The part of Peili's configuration.
    pub configuration: Value,
    /// The ways into a cluster.
    pub fits: Vec<Fit>,
}

impl Fit {
    /// Whether it does.
    pub fn is_within(&self) -> bool {
        self.size <= self.limit
    }

    /// A line for people.
    pub fn line(&self) -> String {
        let Self { way, size, limit, hint } = self;
        let (size, limit) = (size.div_ceil(1024), limit / 1024);
        if self.is_within() {
            format!("{way:<18} {size:>5} of {limit} KiB")
        } else {
            format!("{way:<18} {size:>5} of {limit} KiB: does not fit; {hint}")
        }
    }
}

/// The ways into a cluster, for a component of these bytes.
pub(super) fn fits(component: &[u8]) -> Vec<Fit> {
    fits_of(&[("policy.wasm", component)])
}

/// The ways into a cluster, for a ConfigMap of these keys.
fn fits_of(files: &[(&str, &[u8])]) -> Vec<Fit> {
    let object = config_map("policy", None, files);
    // As kubectl writes it: with empty annotations, a namespace, and a line's end.
    let mut applied = object.clone();
    applied["metadata"]["annotations"] = json!({});
    applied["metadata"]["namespace"] = json!("kube-system");
    let annotation = LAST_APPLIED.len() + applied.to_string().len() + 1;
    let values = files.iter().map(|(_, content)| content.len() as u64).sum();
    let fit = |way, size, limit, hint| Fit { way, size, limit, hint };
    vec![
        fit(
            "config-map",
            values,
            VALUES,
            "build it with `opt-level = \"s\"` and `lto`, and leave crates out",
        ),
        fit(
            "kubectl-apply",
            annotation as u64,
            ANNOTATIONS,
            "take `kubectl apply --server-side` or `kubectl create`",
        ),
        fit("server-side-apply", values + STORED, REQUEST, "no object of a cluster is that large"),
        fit(
            "helm",
            release(&object, files),
            VALUES,
            "leave the component out of the chart, and apply its ConfigMap beside it",
        ),
    ]
}

/// A ConfigMap of `path`, and the configuration that pins it.
///
/// `name`: of the policy, the ConfigMap and its key; the file's name if there is none. What else it is given stands in the same ConfigMap, so
/// that both change at once, and is pinned too.
///
/// # Errors
/// The file is no policy, a file of `data` cannot be read, or a name is none.
pub fn manifest(
    path: &Path,
    name: Option<&str>,
    namespace: Option<&str>,
    given: &Given,
) -> Result<Manifest, InspectError> {
    let read = |path: &Path| {
        policy::read(path).map_err(|source| InspectError::Read { path: path.to_owned(), source })
    };
    let bytes = read(path)?;
    let facts =
        policy::facts(&bytes).map_err(|reason| InspectError::Form { path: path.to_owned(), reason })?;
    let world = facts.world.ok_or_else(|| InspectError::World(path.to_owned()))?;
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let own = file.strip_suffix(".wasm").unwrap_or(&file);
    let name = name.unwrap_or_else(|| own.strip_suffix(".component").unwrap_or(own));
    if !is_name(name) || !namespace.is_none_or(is_name) {
        return Err(InspectError::Name(namespace.filter(|_| is_name(name)).unwrap_or(name).to_owned()));
    }
    let mut plugin = json!({"name": name, "path": format!("{MOUNTED}/{name}.wasm"), "sha256": Digest::sha256(&bytes).hex()});
    if given.settings.as_object().is_none_or(|settings| !settings.is_empty()) {
        plugin["settings"] = given.settings.clone();
    }
    let mut files = vec![(format!("{name}.wasm"), bytes)];
    let mut data = Vec::new();
    for Data { name: own, path, .. } in &given.data {
        if !is_name(own) {
            return Err(InspectError::Name(own.clone()));
        }
        let (key, content) = (format!("{name}.{own}"), read(path)?);
        data.push(json!({"name": own, "path": format!("{MOUNTED}/{key}"), "sha256": Digest::sha256(&content).hex()}));
        files.push((key, content));
    }
    if !data.is_empty() {
        plugin["data"] = json!(data);
    }
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(key, content)| (key.as_str(), content.as_slice())).collect();
    Ok(Manifest {
        config_map: config_map(name, namespace, &files),
        configuration: json!({"policies": {world: [plugin]}}),
        fits: fits_of(&files),
    })
}

fn config_map(name: &str, namespace: Option<&str>, files: &[(&str, &[u8])]) -> Value {
    let mut metadata = json!({"name": name});
    if let Some(namespace) = namespace {
        metadata["namespace"] = json!(namespace);
    }
    let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata});
    for &(key, content) in files {
        // What people edit stays text.
        match std::str::from_utf8(content) {
            Ok(text) if is_plain(text) => object["data"][key] = json!(text),
            _ => object["binaryData"][key] = json!(STANDARD.encode(content)),
        }
    }
    object
}

/// Whether YAML keeps each letter of it as it stands.
fn is_plain(text: &str) -> bool {
    text.chars().all(|letter| letter == '\n' || !letter.is_control())
}

/// What Helm keeps of a chart that has the component as a file and the ConfigMap as a manifest, in bytes: both as JSON, by gzip
/// and base64, as a value of a Secret (helm, `pkg/storage/driver/util.go`). The rest of a chart comes on top.
fn release(object: &Value, files: &[(&str, &[u8])]) -> u64 {
    let files: Vec<Value> =
        files.iter().map(|(_, content)| json!({"data": STANDARD.encode(content)})).collect();
    let kept = json!({"chart": {"files": files}, "manifest": object.to_string()});
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    // Memory takes all that is written.
    let _ = gzip.write_all(kept.to_string().as_bytes());
    (gzip.finish().unwrap_or_default().len() as u64).div_ceil(3) * 4
}

/// A label of DNS: what a namespace has to be, and a policy of the configuration.
fn is_name(name: &str) -> bool {
    let is_plain = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(is_plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that do not get smaller, as those of a component hardly do.
    fn noise(size: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..size).map(|_| next()).collect()
    }

    fn too_large(size: usize) -> Vec<&'static str> {
        fits(&noise(size)).into_iter().filter(|fit| !fit.is_within()).map(|fit| fit.way).collect()
    }

    /// Guards that each limit is its own: the sizes are those just below and above one.
    #[test]
    fn each_way_has_its_size() {
        assert!(too_large(190 << 10).is_empty());
        assert_eq!(too_large(197 << 10), ["kubectl-apply"]);
        assert_eq!(too_large(420 << 10), ["kubectl-apply", "helm"]);
        assert_eq!(too_large((1 << 20) + 1), ["config-map", "kubectl-apply", "helm"]);
        assert_eq!(too_large(1_572_864), ["config-map", "kubectl-apply", "server-side-apply", "helm"]);
    }

    /// Guards that what the component gets goes with it: pinned, counted, and text where people edit it.
    #[test]
    fn files_of_the_policy_are_keys_of_its_config_map() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        // It exports an empty instance by the name of a world: an instance section, and an export section.
        let mut component = b"\0asm\x0d\0\x01\0\x05\x03\x01\x01\0\x0b\x21\x01\0\x1b".to_vec();
        component.extend_from_slice(b"peili:policy/registry@0.1.0\x05\0\0");
        let component = write("a.wasm", &component);
        let (list, odd) = (write("list.txt", b"docker.io/**\n"), write("odd", b"a\r\n"));
        let mut given =
            Given { settings: json!({}), data: vec![Given::file("images", &list), Given::file("odd", &odd)] };
        let made = match manifest(&component, None, None, &given) {
            Ok(made) => made,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(made.config_map["data"], json!({"a.images": "docker.io/**\n"}));
        assert_eq!(made.config_map["binaryData"]["a.odd"], json!(STANDARD.encode("a\r\n")));
        let plugin = made.configuration["policies"].as_object().unwrap().values().next().unwrap()[0].clone();
        let configured: Vec<Data> = serde_json::from_value(plugin["data"].clone()).unwrap();
        assert_eq!(configured[0].path, Path::new("/etc/peili/policies/a.images"));
        assert_eq!(configured[0].sha256, Some(Digest::sha256(b"docker.io/**\n").hex()));
        assert!(made.fits[0].size > fits(&std::fs::read(&component).unwrap())[0].size);

        given.data = vec![Given::file("No", &list)];
        assert!(
            matches!(manifest(&component, None, None, &given), Err(InspectError::Name(name)) if name == "No")
        );
        given.data = vec![Given::file("images", &folder.path().join("absent"))];
        assert!(matches!(manifest(&component, None, None, &given), Err(InspectError::Read { .. })));
    }

    #[test]
    fn names_are_those_of_kubernetes() {
        for name in ["a", "allow-list", "1"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a_b", "a.b", "a/b", &"a".repeat(64)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
