//! One suite for all transfers.
