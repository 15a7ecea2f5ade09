//! The laboratory: what Peili's integration tests, demo, benchmarks and soak are made of.
//!
//! Images ([`image`]), a registry that counts and misbehaves on request ([`origin`]), with TLS too ([`certificates`]), nodes as network namespaces
//! ([`netns`]), real containerds ([`containerd`]) driven as kubelet drives them ([`cri`]), a real Kubernetes API server ([`kubernetes`]), a name server ([`dns`]),
//! the chart as Helm renders it ([`chart`]) and the real `peili` program ([`node`]). It knows Peili from outside only: its program, its configuration file, its ports; from the library it
//! takes nothing but names and digests (`peili::oci`), except for the hostile node ([`liar`])
//! and the bare peer ([`peer`]), which speak its protocol, and a candidate ([`candidate`]) without a node around it.
//!
//! Whatever a machine may lack is a [`Requirement`]; a test asks [`require`] first and skips with the reason it gets.
//! Fixtures own what they start: dropping one ends its processes and removes its files, mounts and namespaces, and what
//! a killed run left behind is removed by the next.

pub mod candidate;
pub mod certificates;
pub mod chart;
pub mod containerd;
pub mod cri;
pub mod dns;
pub mod freeze;
pub mod hosts;
pub mod http;
pub mod image;
pub mod kubernetes;
pub mod liar;
pub mod netns;
pub mod node;
pub mod origin;
pub mod peer;
mod policies;
pub mod process;
pub mod requirements;
pub mod scratch;
pub mod wait;

pub use certificates::Certificates;
pub use containerd::Containerd;
pub use dns::Dns;
pub use freeze::Freezer;
pub use image::Image;
pub use kubernetes::ApiServer;
pub use liar::Liar;
pub use netns::{Namespace, Network};
pub use node::Node;
pub use origin::Origin;
pub use process::Process;
pub use requirements::{Generation, Requirement, policy, report_skip, require};

#[cfg(test)]
mod tests;
