//! Registries that answer or not, as a test says.
