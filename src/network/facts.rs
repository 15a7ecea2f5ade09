//! What a member says of itself for elections, beside its addresses: a part of its signed record that the gossip passes on unread.
//!
//! All of it is the member's own word, and is such that it changes seldom: each change is a new record for all members.

use bytes::Bytes;
use prost::Message;

use super::claim;

/// Longest wire form of facts.
pub const LIMIT: usize = 320;
/// Labels of a member.
pub const LABELS: usize = 8;
/// Longest key or value of a label, in bytes.
pub const LABEL_LIMIT: usize = 63;

/// What a member says of itself. The default is that of one that says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Stands for the policies that it ranks by; zeros: by the built-in.
    pub policy: [u8; 16],
    /// Whether it reaches the Kubernetes API server.
    pub api_server: ApiServer,
    /// Tenths of its capacity in use, 0 to 10.
    pub load: u8,
    /// It runs for at least 2^this milliseconds; 0: not for long.
    pub uptime: u8,
    /// Its labels, sorted by key.
    pub labels: Vec<(String, String)>,
}

/// Whether a member reaches the Kubernetes API server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApiServer {
    /// It does not know, or has none.
    #[default]
    Unknown,
    /// It does.
    Reachable,
    /// It does not.
    Unreachable,
}

#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(bytes = "bytes", tag = "1")]
    policy: Bytes,
    #[prost(uint32, tag = "2")]
    api_server: u32,
    #[prost(uint32, tag = "3")]
    load: u32,
    #[prost(uint32, tag = "4")]
    uptime: u32,
    #[prost(message, repeated, tag = "5")]
    labels: Vec<Label>,
}

#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

impl Facts {
    /// The wire form; nothing for the default. Labels beyond the limits are left out.
    pub fn encode(&self) -> Bytes {
        let policy = if self.policy == [0; 16] { Bytes::new() } else { Bytes::copy_from_slice(&self.policy) };
        let labels = self.labels.iter().filter(|(key, value)| key.len().max(value.len()) <= LABEL_LIMIT);
        let labels = labels.take(LABELS).map(|(key, value)| Label { key: key.clone(), value: value.clone() });
        let mut body = Body {
            policy,
            api_server: match self.api_server {
                ApiServer::Unknown => 0,
                ApiServer::Reachable => 1,
                ApiServer::Unreachable => 2,
            },
            load: self.load.min(10).into(),
            uptime: self.uptime.min(63).into(),
            labels: labels.collect(),
        };
        while body.encoded_len() > LIMIT && body.labels.pop().is_some() {}
        body.encode_to_vec().into()
    }

    /// Reads the wire form. `None`: it is not as [`Facts::encode`] makes it.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > LIMIT {
            return None;
        }
        let body = Body::decode(bytes).ok()?;
        let policy = if body.policy.is_empty() { [0; 16] } else { *body.policy.as_array()? };
        if body.labels.len() > LABELS {
            return None;
        }
        let text = |text: String| claim::text(text).filter(|text| text.len() <= LABEL_LIMIT);
        let labels: Option<Vec<_>> =
            body.labels.into_iter().map(|label| Some((text(label.key)?, text(label.value)?))).collect();
        Some(Self {
            policy,
            api_server: match body.api_server {
                1 => ApiServer::Reachable,
                2 => ApiServer::Unreachable,
                // Also what a later version may say.
                _ => ApiServer::Unknown,
            },
            load: u8::try_from(body.load).ok().filter(|load| *load <= 10)?,
            uptime: u8::try_from(body.uptime).ok().filter(|uptime| *uptime < 64)?,
            labels: labels.filter(|labels| labels.is_sorted_by(|a, b| a.0 < b.0))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_as_they_were_written() {
        assert!(Facts::default().encode().is_empty());
        assert_eq!(Facts::decode(&[]), Some(Facts::default()));
        let label = |n: usize| (format!("k{n}"), "v".repeat(n));
        let facts = Facts {
            policy: [7; 16],
            api_server: ApiServer::Unreachable,
            load: 10,
            uptime: 24,
            labels: (0..8).map(label).collect(),
        };
        assert_eq!(Facts::decode(&facts.encode()), Some(facts.clone()));
        // What does not fit is left out, and never makes a record that nobody takes.
        let long = Facts { labels: (0..8).map(|n| (format!("k{n}"), "v".repeat(63))).collect(), ..facts };
        let bytes = long.encode();
        assert!(bytes.len() <= LIMIT);
        let read = Facts::decode(&bytes).unwrap();
        assert!(!read.labels.is_empty() && long.labels.starts_with(&read.labels));
    }

    #[test]
    fn what_is_out_of_bounds_is_nothing() {
        let body = |change: &dyn Fn(&mut Body)| {
            let mut body = Body::default();
            change(&mut body);
            Facts::decode(&body.encode_to_vec())
        };
        let label = |key: &str, value: &str| Label { key: key.into(), value: value.into() };
        assert_eq!(body(&|body| body.load = 11), None);
        assert_eq!(body(&|body| body.uptime = 64), None);
        assert_eq!(body(&|body| body.policy = Bytes::from_static(b"short")), None);
        assert_eq!(body(&|body| body.labels = vec![label("b", ""), label("a", "")]), None);
        assert_eq!(body(&|body| body.labels = vec![label("a", ""), label("a", "")]), None);
        assert_eq!(body(&|body| body.labels = vec![label("a", &"v".repeat(64))]), None);
        assert_eq!(body(&|body| body.labels = vec![label("a", "\n")]), None);
        assert_eq!(body(&|body| body.labels = (0..9).map(|n| label(&n.to_string(), "")).collect()), None);
        let long = (0..6).map(|n| label(&n.to_string(), &"v".repeat(60))).collect::<Vec<_>>();
        assert_eq!(
            body(&|body| body.labels = long.clone()),
            None,
            "no more bytes than a record has room for"
        );
        assert_eq!(body(&|body| body.api_server = 9).unwrap().api_server, ApiServer::Unknown);
    }
}
