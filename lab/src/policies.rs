//! Which policies there are, as folders of `plugins` and names of components. Read by `xtask` too, which builds them.

/// Those that are shipped in the image.
pub(crate) const SHIPPED: [&str; 8] = [
    "allow-list",
    "api-reachable",
    "node-allow",
    "prefer-labels",
    "tag-freshness",
    "upstream-order",
    "zone-boundary",
    "zone-spread",
];

/// Those that misbehave on purpose.
pub(crate) const FOR_TESTS: [&str; 3] = ["testguests", "testguests-election", "testguests-trust"];
