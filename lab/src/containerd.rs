//! A containerd of one's own: any generation, with its own root, state and socket, in a namespace or not.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cri::Cri;
use crate::netns::Namespace;
use crate::process::Process;
use crate::requirements::Generation;
use crate::scratch::{Scratch, unmount_below};
use crate::{hosts, wait};

/// containerd is ready within about a second; a busy machine gets more.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// As on a node: among its state.
const SOCKET: &str = "state/containerd.sock";

/// How one is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which containerd.
    pub generation: Generation,
    /// Where it runs. None: beside the machine's own.
    pub namespace: Option<Namespace>,
    /// Layers fetched at once; containerd's own default is 3.
    pub concurrent_downloads: u32,
    /// Forget compressed layers after unpacking. Peili wants false, clouds set true.
    pub discard_unpacked_layers: bool,
    /// 2.x: pull by CRI itself instead of by the transfer service.
    pub local_pull: bool,
    /// 2.1 and later: size in bytes of the pieces in which layers are fetched in parallel; 0: one stream per layer.
    pub layer_fetch_buffer: u64,
    /// A second folder in `config_path`.
    pub second_hosts_dir: bool,
}

/// A running containerd. Dropped: gone, with its mounts and files.
#[derive(Debug)]
pub struct Containerd {
    options: Options,
    cri: Cri,
    process: Option<Process>,
    // After the process, so that it is dropped after it.
    scratch: Scratch,
}

impl Options {
    /// The defaults of a node.
    pub fn new(generation: Generation) -> Self {
        Self {
            generation,
            namespace: None,
            concurrent_downloads: 3,
            discard_unpacked_layers: false,
            local_pull: false,
            layer_fetch_buffer: 0,
            second_hosts_dir: false,
        }
    }

    /// In a namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }
}

impl Containerd {
    /// Starts one and waits until its CRI answers.
    pub async fn start(options: Options) -> Result<Self> {
        let scratch = Scratch::new()?;
        let cri = Cri::new(&scratch.path().join(SOCKET));
        let mut containerd = Self { options, cri, process: None, scratch };
        fs::create_dir_all(containerd.hosts_dir())?;
        containerd.write_config()?;
        containerd.restart().await?;
        Ok(containerd)
    }

    /// Its generation.
    pub fn generation(&self) -> Generation {
        self.options.generation
    }

    /// Its CRI.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.scratch.path().join(SOCKET)
    }

    /// Its folder of state, with its socket, as `/run/containerd` is on a node.
    pub fn state(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// Its content store: `blobs` and `ingest`.
    pub fn content_root(&self) -> PathBuf {
        self.scratch.path().join("root/io.containerd.content.v1.content")
    }

    /// Its `config_path`: one folder per registry.
    pub fn hosts_dir(&self) -> PathBuf {
        self.scratch.path().join("certs.d")
    }

    /// The second folder of its `config_path`, if it has one.
    pub fn second_hosts_dir(&self) -> Option<PathBuf> {
        self.options.second_hosts_dir.then(|| self.scratch.path().join("docker.d"))
    }

    /// Writes the `hosts.toml` of a registry: mirrors first, then `server`. Read by containerd at each pull.
    pub fn set_hosts(&self, registry: &str, server: &str, mirrors: &[&str]) -> Result<()> {
        hosts::write_for(self.generation(), &self.hosts_dir(), registry, server, mirrors).map(drop)
    }

    /// The process; `None` between [`Self::kill`] and [`Self::restart`].
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it, after [`Self::kill`] if it still runs, and waits until its CRI answers.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        let _ = fs::remove_file(self.socket());
        let binary = self.options.generation.binary().context("no such containerd on this machine")?;
        let mut command = Command::new(&binary);
        command.arg("--config").arg(self.scratch.path().join("config.toml"));
        // Its own shims and helpers before the machine's.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = binary.parent().map(Path::to_path_buf).into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders)?);
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(variable);
        }
        let name = self.options.generation.to_string();
        let log = self.scratch.path().join("log");
        let process = Process::spawn(&name, command, &log, self.options.namespace.as_ref())?;
        self.process = Some(process);
        let cri = self.cri.clone();
        let ready = wait::until(&name, READY_LIMIT, async || match cri.version().await {
            Ok(version) => Some(Ok(version)),
            Err(error) => {
                let running = self.process.as_mut().is_some_and(Process::is_running);
                (!running).then(|| Err(error.context("it ended")))
            }
        })
        .await
        .and_then(|ready| ready.map(drop));
        ready.with_context(|| format!("{name} does not start; its log:\n{}", self.log_tail()))
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }

    /// Whether its content store has a blob.
    pub fn has_blob(&self, digest: &peili::oci::Digest) -> bool {
        let algorithm = digest.algorithm().as_str();
        self.content_root().join("blobs").join(algorithm).join(digest.hex()).is_file()
    }

    /// What it asks of a runtime for a container that may nothing beyond its defaults, under its profile of seccomp: `config.json` of the OCI's
    /// runtime specification.
    ///
    /// # Errors
    /// There is no `ctr` beside it, or what that says is wrong.
    pub fn spec(&self) -> Result<Value> {
        let ctr = self.options.generation.binary().context("no such containerd")?.with_file_name("ctr");
        let run = |arguments: &[&str]| -> Result<Vec<u8>> {
            let output = Command::new(&ctr)
                .arg("--address")
                .arg(self.socket())
                .arg("containers")
                .args(arguments)
                .output();
            let output = output.with_context(|| format!("cannot run {}", ctr.display()))?;
            ensure!(output.status.success(), "ctr: {}", String::from_utf8_lossy(&output.stderr).trim());
            Ok(output.stdout)
        };
        run(&["create", "--rootfs", "--read-only", "--seccomp", "/nowhere", "spec"])?;
        let spec = serde_json::from_slice(&run(&["info", "--spec", "spec"])?)?;
        run(&["delete", "spec"])?;
        Ok(spec)
    }

    fn write_config(&self) -> Result<()> {
        let root = self.scratch.path();
        let snapshotter = if supports_overlay(root) { "overlayfs" } else { "native" };
        let config = render(&self.options, root, snapshotter);
        fs::write(root.join("config.toml"), config).context("cannot write containerd's configuration")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.process = None;
        unmount_below(self.scratch.path());
    }
}

/// `http://ADDRESS:PORT`, with brackets where IPv6 needs them.
pub fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}", std::net::SocketAddr::new(address, port))
}

fn render(options: &Options, root: &Path, snapshotter: &str) -> String {
    let (folder, downloads) = (root.display(), options.concurrent_downloads);
    let discard = options.discard_unpacked_layers;
    let second = if options.second_hosts_dir { format!(":{folder}/docker.d") } else { String::new() };
    // By default containerd collects after a hundred changes to its metadata, which one small pull may or may not reach.
    let collect =
        if discard { "\n[plugins.'io.containerd.gc.v1.scheduler']\n  deletion_threshold = 1\n" } else { "" };
    // NRI and OTLP would open sockets that all containerds of the machine share.
    let common = format!(
        r#"root = "{folder}/root"
state = "{folder}/state"

[grpc]
  address = "{folder}/{SOCKET}"

[ttrpc]
  address = "{folder}/{SOCKET}.ttrpc"

[debug]
  level = "debug"
{collect}"#
    );
    match options.generation {
        Generation::V1_6 | Generation::V1_7 => format!(
            r#"version = 2
{common}
[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.grpc.v1.cri"]
  max_concurrent_downloads = {downloads}
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    discard_unpacked_layers = {discard}
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{folder}/certs.d{second}"
"#
        ),
        Generation::V2 => {
            let (local, buffer) = (options.local_pull, options.layer_fetch_buffer);
            // The transfer service has settings of its own; CRI falls back to pulling by itself where its own differ.
            let own = if local {
                format!(
                    "  max_concurrent_downloads = {downloads}\n  concurrent_layer_fetch_buffer = {buffer}\n"
                )
            } else {
                String::new()
            };
            format!(
                r#"version = 3
{common}
[plugins.'io.containerd.nri.v1.nri']
  disable = true

[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_downloads = {downloads}
  concurrent_layer_fetch_buffer = {buffer}
  config_path = '{folder}/certs.d{second}'
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = 'linux/{architecture}'
    snapshotter = '{snapshotter}'

[plugins.'io.containerd.cri.v1.images']
  snapshotter = '{snapshotter}'
  discard_unpacked_layers = {discard}
  use_local_image_pull = {local}
{own}  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '{folder}/certs.d{second}'
"#,
                architecture = crate::image::architecture()
            )
        }
    }
}

/// Whether an overlay can be mounted on the file system of `folder`; not in a container on an overlay of its own.
fn supports_overlay(folder: &Path) -> bool {
    let test = folder.join("overlay");
    let [lower, upper, work, merged] = ["l", "u", "w", "m"].map(|name| test.join(name));
    for path in [&lower, &upper, &work, &merged] {
        if fs::create_dir_all(path).is_err() {
            return false;
        }
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let mounted = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged)
        .output()
        .is_ok_and(|output| output.status.success());
    if mounted {
        let _ = Command::new("umount").arg(&merged).status();
    }
    let _ = fs::remove_dir_all(test);
    mounted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_generation_has_its_own_configuration() {
        let check = |generation, version: &str, section: &str| {
            let text = render(&Options::new(generation), Path::new("/r"), "native");
            assert!(text.starts_with(version) && text.contains(section), "{text}");
            assert!(text.contains("/r/certs.d"), "{text}");
        };
        check(Generation::V1_6, "version = 2", "io.containerd.grpc.v1.cri");
        check(Generation::V1_7, "version = 2", "io.containerd.grpc.v1.cri");
        check(Generation::V2, "version = 3", "io.containerd.cri.v1.images");
    }
}
