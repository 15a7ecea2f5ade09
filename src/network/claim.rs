//! What a node says of itself, in the wire form: names, and addresses as one comma-separated text. Bounded, since a peer
//! claims it; whether it is so is not known here.

use std::net::SocketAddr;

/// Longest claimed text, in bytes.
const TEXT_LIMIT: usize = 256;
/// Addresses that a peer may claim for one port; more are ignored.
pub(super) const ADDRESS_LIMIT: usize = 8;
/// Longest list of addresses: eight of the longest form of IPv6 with a port, and some room.
const ADDRESSES_LIMIT: usize = 1024;

/// A claimed text as a peer may send it: what is too long is cut, control characters are dropped.
pub(super) fn clean(text: &str) -> String {
    let mut clean: String = text.chars().filter(|c| !c.is_control()).collect();
    while clean.len() > TEXT_LIMIT {
        clean.pop();
    }
    clean
}

/// A claimed text; `None`: it is not as [`clean`] makes it.
pub(super) fn text(text: String) -> Option<String> {
    let is_clean = text.len() <= TEXT_LIMIT && !text.chars().any(char::is_control);
    is_clean.then_some(text)
}

/// Claimed addresses; `None`: one of them is none, or the text is too long.
pub(super) fn addresses(text: &str) -> Option<Vec<SocketAddr>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    if text.len() > ADDRESSES_LIMIT {
        return None;
    }
    let parse = |address: &str| address.parse::<SocketAddr>().ok().filter(|address| address.port() != 0);
    text.split(',').take(ADDRESS_LIMIT).map(parse).collect()
}

/// The wire form of addresses.
pub(super) fn join(addresses: &[SocketAddr]) -> String {
    let texts: Vec<String> = addresses.iter().take(ADDRESS_LIMIT).map(ToString::to_string).collect();
    texts.join(",")
}
