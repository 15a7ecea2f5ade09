//! Counters of the mirror.
