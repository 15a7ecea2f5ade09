//! Which policies there are, as folders of `plugins` and names of components. Read by `xtask` too, which builds them.

/// All of them.
pub(crate) const ALL: [&str; 11] = [
    "allow-list",
    "api-reachable",
    "node-allow",
    "prefer-labels",
    "tag-freshness",
    "upstream-order",
    "zone-boundary",
    "zone-spread",
    "testguests",
    "testguests-election",
    "testguests-trust",
];
