//! libp2p.
