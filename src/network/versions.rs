//! Which versions of the wire protocols this program speaks, and what makes one of them the next.
//!
//! Of each protocol (control, gossip, peer port) a program speaks its own version and the one before, so that a cluster is
//! upgraded node by node and back. Within a version fields are added; who does not know them ignores them. What is signed is
//! passed on as it came. Files say their version in their first line.
//!
//! A build with the feature `next-version`, which only tests make, speaks as the version after this one might: a second version
//! of each protocol, and a field in each message that this one does not know.

/// The versions that are spoken, the best first.
pub const SPOKEN: &[u32] = if cfg!(feature = "next-version") { &[2, 1] } else { &[1] };

/// The program's version, as peers and people see it.
pub const PROGRAM: &str = if cfg!(feature = "next-version") {
    concat!(env!("CARGO_PKG_VERSION"), "+next")
} else {
    env!("CARGO_PKG_VERSION")
};

/// The names of a protocol in the versions that are spoken, the best first: `prefix` and a number.
pub fn names(prefix: &str) -> impl Iterator<Item = String> {
    SPOKEN.iter().map(move |version| format!("{prefix}{version}"))
}

/// What there is to say besides in a message that was encoded by protobuf: in this version nothing.
pub(crate) fn besides(mut message: Vec<u8>) -> Vec<u8> {
    if cfg!(feature = "next-version") {
        message.extend(UNKNOWN);
    }
    message
}

/// Field 1000, four bytes.
const UNKNOWN: &[u8] = b"\xc2\x3e\x04next";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::admission::certificate;
    use crate::network::gossip::record::{Record, Suspicion};
    use crate::network::gossip::wire;
    use crate::network::swarm::message;

    /// What the next version says is the same to this one as if it had not said it.
    #[test]
    fn unknown_fields_are_ignored() {
        let unknown = |bytes: &[u8]| [bytes, UNKNOWN].concat();
        let heard = message::encode(&message::Message::Heard);
        assert_eq!(message::decode(&unknown(&heard)).unwrap(), message::Message::Heard);
        let frame = wire::Frame { bulk_wanted: true, ..wire::Frame::default() };
        assert_eq!(wire::decode(unknown(&wire::encode(&frame)).into()).unwrap(), frame);
        let record = Record { seq: 7, node: "n".into(), ..Record::default() };
        let sealed = record.clone().sealed(unknown(&record.body()), vec![1; 64]);
        let (parsed, parts) = Record::parse(&sealed.signed).unwrap();
        assert_eq!((parsed.seq, parsed.node.as_str()), (7, "n"));
        // What is signed stays what it was.
        assert!(parts.body.ends_with(UNKNOWN));
        let suspicion = Suspicion::sealed(1, 2, 3, vec![1; 64]);
        assert!(Suspicion::parse(&unknown(&suspicion.signed).into()).is_ok());
        assert!(certificate::decode(UNKNOWN).is_err(), "an unknown field alone is no certificate");
    }

    #[test]
    fn names_are_of_what_is_spoken() {
        let names: Vec<String> = names("/peili/gossip/").collect();
        assert_eq!(names.last().unwrap(), "/peili/gossip/1");
        assert_eq!(names.len(), SPOKEN.len());
    }
}
