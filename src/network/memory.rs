//! The in-memory twin.
