//! `index.json`: the images of a layout and their names.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::super::view::Image;
use crate::oci::{Descriptor, Digest, Name, Reference};

/// Largest `index.json` that is read.
pub(super) const INDEX_LIMIT: u64 = 4 << 20;

/// Images in one layout. A node's containerd holds some hundreds.
const IMAGES_LIMIT: usize = 10_000;

/// The annotation by which containerd names an image: a full reference.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// The annotation that other tools use: a tag, or a full reference (image specification, "Pre-Defined Annotation Keys").
const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Deserialize)]
struct Wire {
    manifests: Vec<Value>,
}

#[derive(Deserialize)]
struct Entry {
    digest: Digest,
    size: u64,
    #[serde(rename = "mediaType", default)]
    media_type: String,
    annotations: Option<HashMap<String, String>>,
}

/// The images, and what is wrong with those that are left out. An error means that the whole text is unusable.
pub(super) fn parse(text: &[u8], name: Option<&Name>) -> Result<(Vec<Image>, Option<String>), String> {
    if text.len() as u64 > INDEX_LIMIT {
        return Err("index.json is larger than 4 MiB".into());
    }
    let wire: Wire = serde_json::from_slice(text).map_err(|error| format!("index.json: {error}"))?;
    if wire.manifests.len() > IMAGES_LIMIT {
        return Err(format!("index.json has {} images, more than {IMAGES_LIMIT}", wire.manifests.len()));
    }
    let mut images = Vec::with_capacity(wire.manifests.len());
    let mut cause = None;
    for (at, value) in wire.manifests.into_iter().enumerate() {
        match Entry::deserialize(value) {
            Ok(entry) => images.push(image(&entry, name)),
            Err(error) => {
                cause.get_or_insert_with(|| format!("index.json: image {at} is left out: {error}"));
            }
        }
    }
    Ok((images, cause))
}

fn image(entry: &Entry, name: Option<&Name>) -> Image {
    let annotation = |key: &str| entry.annotations.as_ref()?.get(key);
    let full = |key: &str| Reference::parse_full(annotation(key)?).ok();
    let named = || {
        let name = name?.clone();
        match annotation(REF_NAME).map(|tag| tag.parse()) {
            Some(Ok(tag)) => Some(Reference::tagged(name, tag)),
            _ => Some(Reference::digested(name, entry.digest)),
        }
    };
    Image {
        name: full(IMAGE_NAME).or_else(|| full(REF_NAME)).or_else(named),
        target: Descriptor::new(entry.digest, entry.size, &entry.media_type),
    }
}
