//! The composition root: the only module that names adapters. Builds, spawns, drains.
