//! The configuration: one file, with flags and environment on top.
