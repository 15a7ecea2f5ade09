//! One suite for all networks.
