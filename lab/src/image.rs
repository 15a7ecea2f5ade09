//! Images and artifacts, made on the spot: the same arguments give the same bytes on every machine.
//!
//! Layers are real tars, since containerd unpacks what a CRI pull fetched, with content that does not compress. Large
//! ones are written to a file piece by piece and never held in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use peili::oci::{Algorithm, Digest};
use serde_json::{Value, json};

use crate::scratch::Scratch;

mod layer;
mod shipped;

pub use layer::Compression;
pub use shipped::{Shipped, write_archive};

/// How old the files of a layout are when it is written.
const AGE: Duration = Duration::from_secs(60);

/// Layers above this size live in a file.
const MEMORY_LIMIT: u64 = 8 << 20;

/// Where a blob's bytes are.
#[derive(Clone, Debug)]
pub enum Content {
    /// In memory.
    Memory(Bytes),
    /// In a file.
    File(PathBuf),
}

/// Some content of an image.
#[derive(Clone, Debug)]
pub struct Blob {
    /// What it is.
    pub media_type: String,
    /// Size in bytes.
    pub size: u64,
    /// Where its bytes are.
    pub content: Content,
}

/// An image, an index of images, or another artifact: everything that one name leads to.
#[derive(Clone, Debug)]
pub struct Image {
    /// `library/app`
    pub repository: String,
    /// `v1`
    pub tag: String,
    /// The manifest or index that the tag names.
    pub root: Digest,
    /// Manifests and indexes, the root first.
    pub manifests: Vec<Digest>,
    /// Configs.
    pub configs: Vec<Digest>,
    /// Layers, without repeats.
    pub layers: Vec<Digest>,
    /// All of them.
    pub blobs: BTreeMap<Digest, Blob>,
    files: Option<Arc<Scratch>>,
}

/// Describes an image to build.
#[derive(Clone, Debug)]
pub struct Builder {
    repository: String,
    tag: String,
    layers: Vec<(u64, Compression)>,
    platforms: Vec<(&'static str, &'static str)>,
    algorithm: Algorithm,
    docker: bool,
    seed: u64,
}

impl Blob {
    /// The bytes; for content in a file they are read whole.
    pub fn read(&self) -> Result<Bytes> {
        match &self.content {
            Content::Memory(bytes) => Ok(bytes.clone()),
            Content::File(path) => Ok(fs::read(path)?.into()),
        }
    }
}

impl Builder {
    /// A layer of `size` bytes: the size of its tar, before compression.
    #[must_use]
    pub fn layer(self, size: u64) -> Self {
        self.compressed(size, Compression::None)
    }

    /// `count` layers of `size` bytes.
    #[must_use]
    pub fn layers(mut self, count: usize, size: u64) -> Self {
        self.layers.extend(std::iter::repeat_n((size, Compression::None), count));
        self
    }

    /// A compressed layer; needs the program `gzip` or `zstd`.
    #[must_use]
    pub fn compressed(mut self, size: u64, compression: Compression) -> Self {
        self.layers.push((size, compression));
        self
    }

    /// An index with an image for each of these (operating system, architecture), each with layers of its own.
    #[must_use]
    pub fn platforms(mut self, platforms: &[(&'static str, &'static str)]) -> Self {
        self.platforms = platforms.to_vec();
        self
    }

    /// The algorithm of all digests but the `diff_ids`.
    #[must_use]
    pub fn algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// The media types of Docker's schema 2 instead of OCI's.
    #[must_use]
    pub fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Other content for the same shape. Images with the same seed share layers of the same size and place.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Makes the bytes.
    pub fn build(self) -> Result<Image> {
        let mut image = Image::empty(&self.repository, &self.tag);
        if self.platforms.is_empty() {
            let (_, digest) = self.manifest(&mut image, 0, ("linux", architecture()))?;
            image.root = digest;
            return Ok(image);
        }
        let mut entries = Vec::new();
        for (index, &(os, architecture)) in self.platforms.iter().enumerate() {
            let (mut entry, _) = self.manifest(&mut image, index as u64, (os, architecture))?;
            entry["platform"] = json!({"os": os, "architecture": architecture});
            entries.push(entry);
        }
        let media_type = if self.docker {
            "application/vnd.docker.distribution.manifest.list.v2+json"
        } else {
            "application/vnd.oci.image.index.v1+json"
        };
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
        let digest = image.put_json(self.algorithm, media_type, &index);
        image.root = digest;
        image.manifests.insert(0, digest);
        Ok(image)
    }

    /// Returns the manifest's descriptor and digest.
    fn manifest(&self, image: &mut Image, number: u64, platform: (&str, &str)) -> Result<(Value, Digest)> {
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for (position, &(size, compression)) in self.layers.iter().enumerate() {
            let seed = self.seed << 32 | number << 16 | position as u64;
            let path = if size > MEMORY_LIMIT {
                Some(image.folder()?.join(format!("layer-{seed:x}")))
            } else {
                None
            };
            let layer = layer::build(size, seed, compression, self.algorithm, path)?;
            let media_type = self.layer_media_type(compression);
            layers.push(descriptor(media_type, layer.digest, layer.size));
            diff_ids.push(layer.diff_id.to_string());
            if !image.layers.contains(&layer.digest) {
                image.layers.push(layer.digest);
            }
            let blob = Blob { media_type: media_type.to_owned(), size: layer.size, content: layer.content };
            image.blobs.insert(layer.digest, blob);
        }
        let config = json!({
            "architecture": platform.1,
            "os": platform.0,
            "config": {"Cmd": ["/bin/true"], "Labels": {"lab.seed": self.seed.to_string()}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let (config_type, media_type) = if self.docker {
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.distribution.manifest.v2+json",
            )
        } else {
            ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.manifest.v1+json")
        };
        Ok(image.put_manifest(self.algorithm, media_type, config_type, &config, &layers, &json!({})))
    }

    fn layer_media_type(&self, compression: Compression) -> &'static str {
        match (self.docker, compression) {
            (false, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
            (false, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (false, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (true, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
            (true, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (true, Compression::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }
}

impl Image {
    /// Begins to describe an image; as it is, it has no layers.
    pub fn builder(repository: &str, tag: &str) -> Builder {
        Builder {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            layers: Vec::new(),
            platforms: Vec::new(),
            algorithm: Algorithm::Sha256,
            docker: false,
            seed: 1,
        }
    }

    /// An artifact with a config and layers of any media type.
    pub fn artifact(
        repository: &str,
        tag: &str,
        (config_type, config): (&str, &Value),
        layers: &[(&str, Bytes)],
        extra: &Value,
    ) -> Self {
        let mut image = Self::empty(repository, tag);
        let mut descriptors = Vec::new();
        for (media_type, bytes) in layers {
            let digest = image.put(Algorithm::Sha256, media_type, bytes.clone());
            image.layers.push(digest);
            descriptors.push(descriptor(media_type, digest, bytes.len() as u64));
        }
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let (_, digest) =
            image.put_manifest(Algorithm::Sha256, media_type, config_type, config, &descriptors, extra);
        image.root = digest;
        image
    }

    /// A Helm chart as `helm push` stores it.
    pub fn helm_chart(repository: &str, tag: &str) -> Self {
        let config = json!({"name": repository, "version": tag, "apiVersion": "v2", "type": "application"});
        let chart = Bytes::from_static(b"\x1f\x8b a chart, opaque to registries");
        Self::artifact(
            repository,
            tag,
            ("application/vnd.cncf.helm.config.v1+json", &config),
            &[("application/vnd.cncf.helm.chart.content.v1.tar+gzip", chart)],
            &json!({"annotations": {"org.opencontainers.image.title": repository}}),
        )
    }

    /// A WebAssembly module as Wasm runtimes store it.
    pub fn wasm(repository: &str, tag: &str) -> Self {
        let config = json!({"architecture": "wasm", "os": "wasip1", "layerDigests": []});
        Self::artifact(
            repository,
            tag,
            ("application/vnd.wasm.config.v0+json", &config),
            &[("application/wasm", Bytes::from_static(b"\0asm\x01\0\0\0"))],
            &json!({}),
        )
    }

    /// A signature of `image` as cosign stores it: under the tag `sha256-HEX.sig` of the same repository.
    pub fn cosign_signature(image: &Self) -> Self {
        let payload = json!({"critical": {"image": {"docker-manifest-digest": image.root}}}).to_string();
        let tag = format!("{}-{}.sig", image.root.algorithm().as_str(), image.root.hex());
        let config = json!({"architecture": "", "os": "", "rootfs": {"type": "layers", "diff_ids": []}});
        Self::artifact(
            &image.repository,
            &tag,
            ("application/vnd.oci.image.config.v1+json", &config),
            &[("application/vnd.dev.cosign.simplesigning.v1+json", payload.into())],
            &json!({}),
        )
    }

    /// `registry/repository:tag`
    pub fn reference(&self, registry: &str) -> String {
        format!("{registry}/{}:{}", self.repository, self.tag)
    }

    /// `registry/repository@digest`
    pub fn digest_reference(&self, registry: &str) -> String {
        format!("{registry}/{}@{}", self.repository, self.root)
    }

    /// Of an index: the platforms, `linux/arm64`, with the digests of their manifests.
    ///
    /// # Errors
    /// The root is no index of platforms.
    pub fn platforms(&self) -> Result<Vec<(String, Digest)>> {
        let root: Value = serde_json::from_slice(&self.blobs[&self.root].read()?)?;
        let entries = root["manifests"].as_array().context("not an index")?.iter().map(|entry| {
            let text =
                |value: &Value| value.as_str().map(str::to_owned).context("an entry without a platform");
            let (os, architecture) =
                (text(&entry["platform"]["os"])?, text(&entry["platform"]["architecture"])?);
            Ok((format!("{os}/{architecture}"), text(&entry["digest"])?.parse()?))
        });
        entries.collect()
    }

    /// Bytes of all layers together.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().filter_map(|digest| self.blobs.get(digest)).map(|blob| blob.size).sum()
    }

    /// Writes an OCI image layout, its one entry named by tag (`org.opencontainers.image.ref.name`) and, where `name` is
    /// given, in full (`io.containerd.image.name`).
    pub fn write_layout(&self, folder: &Path, name: Option<&str>) -> Result<()> {
        for (digest, blob) in &self.blobs {
            let directory = folder.join("blobs").join(digest.algorithm().as_str());
            fs::create_dir_all(&directory)?;
            let path = directory.join(digest.hex());
            match &blob.content {
                Content::Memory(bytes) => fs::write(&path, bytes),
                Content::File(file) => fs::copy(file, &path).map(drop),
            }
            .with_context(|| format!("cannot write {}", path.display()))?;
            // As of an image that was copied there before: what is new may still be written to, and is not shown at once.
            fs::File::options().write(true).open(&path)?.set_modified(SystemTime::now() - AGE)?;
        }
        let root = &self.blobs[&self.root];
        let mut entry = descriptor(&root.media_type, self.root, root.size);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": self.tag});
        if let Some(name) = name {
            entry["annotations"]["io.containerd.image.name"] = name.into();
        }
        write_index(folder, &[entry])
    }

    fn empty(repository: &str, tag: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            root: Digest::sha256(b""),
            manifests: Vec::new(),
            configs: Vec::new(),
            layers: Vec::new(),
            blobs: BTreeMap::new(),
            files: None,
        }
    }

    fn folder(&mut self) -> Result<PathBuf> {
        let files = match self.files.take() {
            Some(files) => files,
            None => Arc::new(Scratch::new()?),
        };
        Ok(self.files.insert(files).path().to_owned())
    }

    fn put(&mut self, algorithm: Algorithm, media_type: &str, bytes: Bytes) -> Digest {
        let digest = Digest::of(algorithm, &bytes);
        let (media_type, size) = (media_type.to_owned(), bytes.len() as u64);
        self.blobs.insert(digest, Blob { media_type, size, content: Content::Memory(bytes) });
        digest
    }

    fn put_json(&mut self, algorithm: Algorithm, media_type: &str, value: &Value) -> Digest {
        self.put(algorithm, media_type, value.to_string().into())
    }

    /// `extra`: further fields of the manifest. Returns its descriptor and digest.
    fn put_manifest(
        &mut self,
        algorithm: Algorithm,
        media_type: &str,
        config_type: &str,
        config: &Value,
        layers: &[Value],
        extra: &Value,
    ) -> (Value, Digest) {
        let config_digest = self.put_json(algorithm, config_type, config);
        self.configs.push(config_digest);
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": descriptor(config_type, config_digest, self.blobs[&config_digest].size),
            "layers": layers,
        });
        for (key, value) in extra.as_object().into_iter().flatten() {
            manifest[key] = value.clone();
        }
        let digest = self.put_json(algorithm, media_type, &manifest);
        self.manifests.push(digest);
        (descriptor(media_type, digest, self.blobs[&digest].size), digest)
    }
}

/// Writes an OCI image layout without images: with no layout at all a node has nothing to read, and is not ready.
pub fn write_empty_layout(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    write_index(folder, &[])
}

fn write_index(folder: &Path, manifests: &[Value]) -> Result<()> {
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    fs::write(folder.join("index.json"), index.to_string()).context("cannot write the layout's index")
}

/// This machine's architecture as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": size})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_leads_to_everything() {
        let builder = Image::builder("library/app", "v1").layers(3, 4096);
        let image = builder.platforms(&[("linux", "amd64"), ("linux", "arm64")]).build().unwrap();
        assert_eq!((image.manifests.len(), image.configs.len(), image.layers.len()), (3, 2, 6));
        assert_eq!(image.blobs.len(), 11);
        assert_eq!(image.layer_bytes(), 6 * 4096);
        for (digest, blob) in &image.blobs {
            let bytes = blob.read().unwrap();
            assert_eq!((Digest::of(digest.algorithm(), &bytes), bytes.len() as u64), (*digest, blob.size));
        }
        let index = peili::oci::Manifest::parse(&image.blobs[&image.root].read().unwrap()).unwrap();
        assert_eq!(index.children.iter().map(|child| child.digest).collect::<Vec<_>>(), image.manifests[1..]);
    }

    #[test]
    fn the_same_arguments_give_the_same_bytes_and_seeds_differ() {
        let build = |seed| Image::builder("a", "b").layer(9 << 20).seed(seed).build().unwrap();
        assert_eq!(build(1).root, build(1).root);
        assert_ne!(build(1).root, build(2).root);
        let large = build(1);
        let blob = &large.blobs[&large.layers[0]];
        assert!(matches!(blob.content, Content::File(_)));
        assert_eq!(Digest::sha256(&blob.read().unwrap()), large.layers[0]);
    }

    #[test]
    fn a_layout_holds_every_blob() {
        let scratch = Scratch::new().unwrap();
        let image =
            Image::builder("a", "b").layer(2048).algorithm(Algorithm::Sha512).docker().build().unwrap();
        image.write_layout(scratch.path(), Some("lab.io/a:b")).unwrap();
        for digest in image.blobs.keys() {
            assert!(scratch.path().join("blobs/sha512").join(digest.hex()).is_file());
        }
        let index = fs::read_to_string(scratch.path().join("index.json")).unwrap();
        assert!(index.contains("lab.io/a:b") && index.contains(&image.root.to_string()));
        assert!(scratch.path().join("oci-layout").is_file());
    }
}
