//! The name of a process in a lease: node, peer ID, and a number drawn at the start.
//!
//! Two processes never have the same, also not two pods of one host name, nor one that was started again.

use super::lease::IDENTITY_LIMIT;
use crate::oci::PeerId;

/// Bytes of the node's name in it.
const NODE: usize = 128;

/// The name of a process. `nonce`: drawn at its start.
pub fn identity(node: &str, peer: &PeerId, nonce: u64) -> String {
    let node: String = node
        .chars()
        .filter(|char| char.is_ascii_alphanumeric() || "-._".contains(*char))
        .take(NODE)
        .collect();
    let identity = format!("{node}/{peer}/{nonce:016x}");
    debug_assert!(identity.len() <= IDENTITY_LIMIT);
    identity
}

/// Whose process it is; `None`: another elector's.
pub(super) fn peer(identity: &str) -> Option<PeerId> {
    let mut parts = identity.split('/');
    let peer = parts.nth(1)?.parse().ok()?;
    parts.next()?;
    Some(peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_name() {
        let id: PeerId = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".parse().unwrap();
        let text = identity("node 1/ä", &id, 7);
        assert_eq!(text, format!("node1/{id}/0000000000000007"));
        assert_eq!(peer(&text), Some(id.clone()));
        assert!(identity(&"n".repeat(999), &id, u64::MAX).len() <= IDENTITY_LIMIT);
        for text in ["", "cp_5b2e", "a/b/c", &format!("a/{id}")] {
            assert_eq!(peer(text), None, "{text}");
        }
    }
}
