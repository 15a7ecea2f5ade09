//! What is measured on: namespaces or loopback, an nginx, one large image and many small ones.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use peili::oci::Digest;
use peili_lab::image::architecture;
use peili_lab::netns::Addresses;
use peili_lab::node::{Node, Plan};
use peili_lab::process::{Process, Usage};
use peili_lab::scratch::Scratch;
use peili_lab::{
    Containerd, Generation, Image, Namespace, Network, Requirement, containerd, require, requirements, wait,
};
use serde_json::{Value, json};

use super::{PATIENCE, load};

/// The registry that images are known by; only `hosts.toml` says where it is.
pub(crate) const REGISTRY: &str = "bench.test";
/// Manifests of about 1 KiB, and as many configs.
pub(crate) const SMALL: usize = 500;
/// Nodes: a holder and four that pull.
const NODES: usize = 5;
const NGINX_PORT: u16 = 8080;

pub(crate) struct Bed {
    pub(crate) image: Image,
    /// Manifests and configs of the small images.
    pub(crate) small: Vec<(Digest, Digest)>,
    /// The one that holds the image, and the one that pulls it; only in namespaces.
    pub(crate) containerds: Option<(Containerd, Containerd)>,
    place: String,
    nginx: Process,
    nginx_address: SocketAddr,
    network: Option<Network>,
    files: Scratch,
}

/// What a node's store is.
#[derive(Clone, Copy)]
pub(crate) enum Store {
    /// The large image.
    Holder,
    /// The small images.
    Small,
    /// Nothing.
    Empty,
}

impl Bed {
    pub(crate) async fn new(size: u64, loopback: bool) -> Result<Self> {
        require(&[Requirement::Nginx]).map_err(anyhow::Error::msg)?;
        let generation = Generation::ALL.into_iter().rev().find(|generation| generation.binary().is_some());
        let generation =
            generation.filter(|_| !loopback && require(&[Requirement::Root, Requirement::Iproute2]).is_ok());
        let network = generation.map(|_| Network::new(NODES, Addresses::V4)).transpose()?;
        let files = Scratch::new()?;
        let image = Image::builder("bench/app", "v1").layer(size << 20).build()?;
        image.write_layout(&files.path().join("large"), Some(&image.reference(REGISTRY)))?;
        fs::create_dir_all(files.path().join("empty/blobs"))?;
        write_index(&files.path().join("empty"), &[])?;
        let small = write_small(&files.path().join("small"))?;
        let address =
            network.as_ref().map_or(Ipv4Addr::LOCALHOST.into(), |network| network.nodes[0].address());
        let nginx_address = SocketAddr::new(address, NGINX_PORT);
        let namespace = network.as_ref().map(|network| network.nodes[0].namespace.clone());
        let nginx = nginx(files.path(), &image, nginx_address, namespace.as_ref())?;
        let mut bed = Self {
            image,
            small,
            containerds: None,
            place: "loopback with layout folders".into(),
            nginx,
            nginx_address,
            network,
            files,
        };
        wait::until("nginx", PATIENCE, async || {
            let get = load::with(bed.namespace(0), bed.nginx(), |client| client.request("GET", "/v2/"));
            get.await.ok()
        })
        .await?;
        ensure!(bed.nginx.is_running(), "nginx ended: {}", bed.nginx.log_tail());
        if let Some(generation) = generation {
            let holder = bed.containerd(generation, 0).await?;
            let reference = bed.image.reference(REGISTRY);
            holder.cri().pull(&reference, PATIENCE).await.context("the holder cannot pull")?;
            let puller = bed.containerd(generation, 1).await?;
            bed.place = format!("namespaces with {generation}");
            bed.containerds = Some((holder, puller));
        }
        Ok(bed)
    }

    /// Where this is.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// nginx, as its clients reach it.
    pub(crate) fn nginx(&self) -> SocketAddr {
        self.nginx_address
    }

    pub(crate) fn nginx_usage(&self) -> Result<Usage> {
        self.nginx.usage()
    }

    /// `http://ADDRESS` of nginx.
    pub(crate) fn nginx_url(&self) -> String {
        format!("http://{}", self.nginx_address)
    }

    pub(crate) fn namespace(&self, index: usize) -> Option<Namespace> {
        self.network.as_ref().map(|network| network.nodes[index].namespace.clone())
    }

    /// The large layer.
    pub(crate) fn layer(&self) -> Result<Digest> {
        self.image.layers.first().copied().context("the image has a layer")
    }

    /// Starts nodes that know each other, the first with `store`, the rest with nothing, and waits until the last one
    /// has what the first one holds.
    pub(crate) async fn nodes(&self, count: usize, store: Store, verify: bool) -> Result<Vec<Node>> {
        self.nodes_with(count, store, |_| json!({"mirror": {"verify": verify}})).await
    }

    /// The same, each with a configuration of its own laid over the common one.
    pub(crate) async fn nodes_with(
        &self,
        count: usize,
        store: Store,
        config: impl Fn(usize) -> Value,
    ) -> Result<Vec<Node>> {
        let mut plans = Vec::new();
        for index in 0..count {
            let store = if index == 0 { store } else { Store::Empty };
            let mut plan = self.plan(index, store)?;
            plan.merge(&config(index));
            plans.push(plan);
        }
        Plan::introduce(&mut plans);
        let mut nodes = Vec::new();
        for plan in plans {
            nodes.push(plan.start().await?);
        }
        let probe = match store {
            Store::Small => self.small.first().map(|(manifest, _)| manifest_path("small", manifest)),
            Store::Holder => Some(manifest_path("bench/app", &self.image.root)),
            Store::Empty => None,
        };
        if let Some(path) = probe {
            for (index, node) in nodes.iter().enumerate() {
                wait::until("the holder's content is known", PATIENCE, async || {
                    let path = path.clone();
                    let get = load::with(self.namespace(index), node.registry(), move |client| {
                        client.request("GET", &path)
                    });
                    get.await.is_ok_and(|answer| answer.status == 200).then_some(())
                })
                .await?;
            }
        }
        Ok(nodes)
    }

    fn plan(&self, index: usize, store: Store) -> Result<Plan> {
        let name = format!("node-{index}");
        let folder = match store {
            Store::Holder => "large",
            Store::Small => "small",
            Store::Empty => "empty",
        };
        let source = format!("layout:{}", self.files.path().join(folder).display());
        let plan = match &self.network {
            None => Plan::on_loopback(&name, &source)?,
            Some(network) => {
                let node = &network.nodes[index];
                Plan::in_namespace(&name, &source, &node.namespace, node.address())?
            }
        };
        Ok(match (&self.containerds, store, index) {
            (Some((holder, _)), Store::Holder, _) => plan.with_containerd(holder),
            (Some((_, puller)), Store::Empty, 1) => plan.with_containerd(puller),
            _ => plan,
        })
    }

    async fn containerd(&self, generation: Generation, index: usize) -> Result<Containerd> {
        let namespace = self.namespace(index).context("containerds run in namespaces")?;
        let options = containerd::Options::new(generation).in_namespace(&namespace);
        let containerd = Containerd::start(options).await?;
        containerd.set_hosts(REGISTRY, &self.nginx_url(), &[])?;
        Ok(containerd)
    }
}

/// A blob, as the runtime asks for it.
pub(crate) fn blob_path(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}?ns={REGISTRY}")
}

/// A manifest, as the runtime asks for it.
pub(crate) fn manifest_path(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/manifests/{digest}?ns={REGISTRY}")
}

fn write_index(folder: &Path, manifests: &[Value]) -> Result<()> {
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    fs::write(folder.join("index.json"), json!({"schemaVersion": 2, "manifests": manifests}).to_string())?;
    Ok(())
}

/// [`SMALL`] images without layers, their manifests filled up to 1 KiB.
pub(crate) fn write_small(folder: &Path) -> Result<Vec<(Digest, Digest)>> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |content: &str| -> Result<Digest> {
        let digest = Digest::sha256(content.as_bytes());
        fs::write(blobs.join(digest.hex()), content)?;
        Ok(digest)
    };
    let (mut entries, mut small) = (Vec::new(), Vec::new());
    for number in 0..SMALL {
        let config = json!({"architecture": architecture(), "os": "linux", "number": number}).to_string();
        let config_digest = put(&config)?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = |filler: &str| {
            json!({
                "schemaVersion": 2, "mediaType": media_type,
                "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": config_digest.to_string(), "size": config.len(),
                },
                "layers": [],
                "annotations": {"filler": filler},
            })
            .to_string()
        };
        let filler = "x".repeat(1024_usize.saturating_sub(manifest("").len()));
        let content = manifest(&filler);
        let digest = put(&content)?;
        entries.push(json!({
            "mediaType": media_type, "digest": digest.to_string(), "size": content.len(),
            "annotations": {"io.containerd.image.name": format!("{REGISTRY}/small:v{number}")},
        }));
        small.push((digest, config_digest));
    }
    write_index(folder, &entries)?;
    Ok(small)
}

/// nginx with sendfile, as a registry of the large image and of the small ones' manifests.
fn nginx(files: &Path, image: &Image, address: SocketAddr, namespace: Option<&Namespace>) -> Result<Process> {
    let link = |repository: &str, kind: &str, name: &str, from: PathBuf| -> Result<()> {
        let folder = files.join("www/v2").join(repository).join(kind);
        fs::create_dir_all(&folder)?;
        fs::hard_link(&from, folder.join(name)).with_context(|| format!("cannot link {}", from.display()))
    };
    let large = files.join("large/blobs/sha256");
    for digest in image.blobs.keys() {
        let kind = if image.manifests.contains(digest) { "manifests" } else { "blobs" };
        link(&image.repository, kind, &digest.to_string(), large.join(digest.hex()))?;
    }
    link(&image.repository, "manifests", &image.tag, large.join(image.root.hex()))?;
    for entry in fs::read_dir(files.join("small/blobs/sha256"))? {
        let entry = entry?;
        let name = format!("sha256:{}", entry.file_name().to_string_lossy());
        link("small", "manifests", &name, entry.path())?;
    }
    let folder = files.display();
    // One process, so that its CPU time is all of it; many requests on a connection, as for Peili.
    let text = format!(
        "user root;\nmaster_process off;\ndaemon off;\npid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\n\
         events {{}}\nhttp {{\n  access_log off;\n  sendfile on;\n  tcp_nopush on;\n  keepalive_requests 1000000;\n\
         \x20 default_type application/octet-stream;\n  client_body_temp_path {folder}/t1;\n  proxy_temp_path {folder}/t2;\n\
         \x20 fastcgi_temp_path {folder}/t3;\n  uwsgi_temp_path {folder}/t4;\n  scgi_temp_path {folder}/t5;\n\
         \x20 server {{\n    listen {address};\n    root {folder}/www;\n    location = /v2/ {{ return 200; }}\n\
         \x20   location ~ /manifests/ {{ default_type application/vnd.oci.image.manifest.v1+json; }}\n  }}\n}}\n"
    );
    let path = files.join("nginx.conf");
    fs::write(&path, text)?;
    let program = requirements::program("nginx").context("no nginx")?;
    let mut command = Command::new(program);
    command.arg("-c").arg(&path).arg("-p").arg(files);
    Process::spawn("nginx", command, &files.join("nginx.out"), namespace)
}
