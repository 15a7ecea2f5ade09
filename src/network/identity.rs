//! The node's identity on disk.
