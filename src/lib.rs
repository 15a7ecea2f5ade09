//! Peili: a peer-to-peer mirror of OCI images for Kubernetes nodes.
//!
//! ARCHITECTURE.md draws the modules and the one-way graph between them; `tests/tidy.rs` holds the code to it.

pub mod admin;
pub mod app;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod configure;
pub mod doctor;
pub mod election;
pub mod listener;
pub mod mirror;
pub mod network;
pub mod oci;
pub mod plugin;
pub mod policy;
pub mod pull;
pub mod registry;
pub mod store;
pub mod telemetry;
pub mod transfer;
pub mod trust;
pub mod upstream;
pub mod watchdog;
