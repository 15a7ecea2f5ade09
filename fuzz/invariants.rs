//! What holds of the parsers whatever they are given. The fuzz targets look for a counterexample as long as one likes,
//! `tests/properties.rs` a while in every test run.

use std::path::Path;

use peili::config::Inputs;
use peili::configure::runtime;
use peili::network::admission::certificate;
use peili::network::facts::Facts;
use peili::network::gossip::record::{Record, Suspicion};
use peili::network::gossip::wire;
use peili::network::swarm::message;
use peili::oci::{ByteRange, Digest, Manifest, Name, Patterns, PeerId, RangeHeader, Reference, Registry};
use peili::upstream::hosts;

/// Whatever parses as a name is printed in a form that parses to the same name.
pub(crate) fn reference(text: &str) {
    if let Ok(reference) = text.parse::<Reference>() {
        let printed = reference.to_string();
        assert_eq!(Reference::parse_full(&printed), Ok(reference.clone()));
        assert_eq!(printed.parse(), Ok(reference));
    }
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
    if let Ok(peer) = text.parse::<PeerId>() {
        assert_eq!(peer.as_str(), text);
    }
}

/// A digest has exactly one text.
pub(crate) fn digest(text: &str) {
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
        assert_eq!(Digest::from_bytes(digest.algorithm(), digest.as_bytes()), Some(digest));
    }
}

/// A resolved range lies within the content, and `Content-Range` is read as it was written.
pub(crate) fn range(size: u64, text: &str) {
    if let Some(Ok(range)) = RangeHeader::parse(text).map(|header| header.resolve(size)) {
        assert!(range.start <= range.end && range.end <= size);
        if !range.is_empty() {
            assert_eq!(ByteRange::parse_content_range(&range.content_range(size)), Some((range, size)));
        }
    }
    if let Some((range, size)) = ByteRange::parse_content_range(text) {
        assert!(range.start < range.end && range.end <= size);
    }
}

/// A manifest is read or refused, whatever its bytes are.
pub(crate) fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        assert!(manifest.children.len() <= 20_000);
    }
}

/// A pattern is refused or asked, whatever it is.
pub(crate) fn pattern(text: &str, name: &Name) {
    if let Ok(patterns) = Patterns::new(&[text.to_owned()]) {
        assert!(!patterns.is_empty());
        patterns.matches(name);
    }
}

/// A hosts file gives hosts that can be asked without credentials in their addresses, or an error with a line of it.
pub(crate) fn hosts_file(bytes: &[u8], registry: &Registry) {
    match hosts::parse(Path::new("/certs.d/a"), bytes, registry) {
        Ok(hosts) => {
            assert!((1..=101).contains(&hosts.len()));
            for host in hosts {
                let authority = host.url.strip_prefix("http://").or(host.url.strip_prefix("https://"));
                let authority = authority.and_then(|rest| rest.split('/').next()).expect("a scheme");
                assert!(!authority.is_empty() && !authority.contains('@'), "{}", host.url);
                assert!(!host.url.ends_with('/'), "{}", host.url);
            }
        }
        Err(hosts::Error::Form { line, .. }) => {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count() + 1;
            assert!((1..=lines).contains(&line), "line {line} of {lines}");
        }
        Err(error) => panic!("nothing else can be wrong with a text: {error}"),
    }
}

/// containerd's own configuration says something, or has an error with a line of it.
pub(crate) fn containerd_configuration(text: &str) {
    match runtime::parse(text) {
        Ok(parsed) => {
            let cri = parsed.cri.unwrap_or_default();
            for named in
                [&parsed.root, &parsed.address, &cri.config_path, &parsed.misplaced].into_iter().flatten()
            {
                assert!(!named.is_empty());
            }
        }
        Err((line, message)) => {
            let lines = text.bytes().filter(|byte| *byte == b'\n').count() + 1;
            assert!((1..=lines).contains(&line) && !message.is_empty(), "line {line} of {lines}");
        }
    }
}

/// A configuration is refused with a message, or shown as one that means the same.
pub(crate) fn configuration(text: &str) {
    let inputs = Inputs {
        path: Some("c.yaml".into()),
        set: Vec::new(),
        environment: vec![("NODE_NAME".into(), "n".into())],
    };
    match inputs.parse(Some(text)) {
        Ok(loaded) => {
            let shown = loaded.show();
            let again = inputs.parse(Some(&shown)).unwrap_or_else(|error| panic!("{shown}\n{error}"));
            assert_eq!(again.config, loaded.config, "{shown}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A message that is read is written in a form that reads the same.
pub(crate) fn message(bytes: &[u8]) {
    if let Ok(read) = message::decode(bytes) {
        let written = message::encode(&read);
        assert_eq!(message::decode(&written).expect("it was written here"), read);
    }
}

/// A certificate that is read is written in a form that reads the same, and that may be sent.
pub(crate) fn certificate(bytes: &[u8]) {
    if let Ok(read) = certificate::decode(bytes) {
        let written = read.encode();
        assert!(written.len() <= certificate::LIMIT && certificate::is_cluster(&read.cluster));
        assert_eq!(certificate::decode(&written).expect("it was written here"), read);
    }
}

/// A frame that is read keeps to its limits and is written in a form that reads the same; so is a record in it.
pub(crate) fn gossip(bytes: &[u8]) {
    let records = match wire::decode(bytes.to_vec().into()) {
        Ok(frame) => {
            let written = wire::encode(&frame).to_vec();
            assert_eq!(wire::decode(written.into()).expect("it was written here"), frame);
            frame.records
        }
        Err(_) => vec![bytes.to_vec().into()],
    };
    for signed in &records {
        if let Ok((record, parts)) = Record::parse(signed) {
            let written = record.clone().sealed(record.body(), parts.signature.to_vec());
            let (again, _) = Record::parse(&written.signed).expect("it was written here");
            assert_eq!(Record { signed: record.signed.clone(), ..again }, record);
            if let Some(facts) = Facts::decode(&record.facts) {
                assert_eq!(
                    Facts::decode(&facts.encode()),
                    Some(facts),
                    "what one says of itself is written as it is read"
                );
            }
        }
        let _ = Suspicion::parse(signed);
    }
}
