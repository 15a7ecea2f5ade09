//! The engine with real components, well-behaved and not; files that change; generations; chains.

mod c;
mod data;
mod determinism;
mod election;
mod engine;
mod files;
mod foreign;
mod interpreted;
mod merge;
mod reload;
mod trust;

use std::sync::Arc;
use std::time::SystemTime;

use super::registry::{Availability, Operation, Reference, Request, Requester};

/// A runtime asks for a manifest by tag.
fn request(repository: &str) -> Request {
    Request {
        operation: Operation::Manifests,
        requester: Requester::Runtime,
        name: format!("docker.io/{repository}:v1").parse::<crate::oci::Reference>().unwrap().name,
        reference: Some(Reference::Tag("v1".parse().unwrap())),
        descriptor: (Some(Arc::from("application/vnd.oci.image.manifest.v1+json")), Some(1234)),
        availability: Availability { peers: 3, ..Availability::default() },
        upstreams: Arc::default(),
        now: SystemTime::now(),
    }
}
