//! The composition root: the only module that names adapters. Builds, spawns, drains.

use crate::config;

/// Runs this node's mirror until a signal ends it.
pub async fn run(config: config::Loaded) -> anyhow::Result<()> {
    std::future::ready(config).await;
    anyhow::bail!("the parts of the mirror are not joined in this build")
}
