//! A question as people and files have it: what cases ask, what `peili plugin run` takes, and what the decision log records.
//! One form for all of them, so that what was recorded can be asked again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::view::{self, Holds, Led, Stands};
use crate::oci::{Health, Level, Name, PeerId, Reference as Image, ReferenceError};
use crate::policy::election::View;
use crate::policy::registry::{
    Availability, Operation, Reference, Request as RegistryRequest, Requester, Upstream,
};
use crate::policy::trust::{Claim, Conduct, Evidence, Method, Request as TrustRequest};
use crate::policy::{Node, Provenance, zone};

/// What a case is about.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Asked {
    /// Registry world: the image whose manifest is asked for; by a peer, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    /// Registry world: its registry, where `image` is not the name that people write.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry: Option<String>,
    /// Registry world: what is asked for.
    #[serde(skip_serializing_if = "is_default")]
    operation: Operation,
    #[serde(skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    /// In bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// Registry world: where it is; without it, what a peer asks for is here, and nothing else is anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    available: Option<Available>,
    /// Registry world: those of the configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    upstreams: Option<Vec<Known>>,
    /// Those of the file, where it has none of its own.
    #[serde(skip)]
    pub(super) shared: Arc<[Known]>,
    /// Registry world: who asks, if not the runtime. Trust world: who is judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Who>,
    #[serde(skip_serializing_if = "is_default")]
    level: Level,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    observed: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    announced: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    evidence: Vec<Proof>,
    #[serde(skip_serializing_if = "is_default")]
    conduct: Seen,
    /// Election world: what is led. Questions of this world are not recorded.
    #[serde(skip_serializing)]
    role: Option<Led>,
    /// Election world: who may lead.
    #[serde(skip_serializing)]
    candidates: Vec<Stands>,
    /// Election world: who leads.
    #[serde(skip_serializing)]
    holder: Option<Holds>,
    /// The time of day that the policy is told; without it, [`then`].
    #[serde(with = "timestamp", skip_serializing_if = "Option::is_none")]
    pub(in crate::policy) now: Option<SystemTime>,
}

/// Where content is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Available {
    local: bool,
    peers: u32,
    /// Of a tag that the node knows: since its registry said what it stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    tag_age_millis: Option<u64>,
}

/// An upstream, and how it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Known {
    name: String,
    repositories: Vec<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    health: Health,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    latency_millis: Option<u64>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Who {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<PeerId>,
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    zone: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    version: String,
    /// Whether name and zone are checked, and not its own word.
    #[serde(skip_serializing_if = "is_default")]
    verified: bool,
}

/// What a peer proved, and what that says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Proof {
    Alone(Method),
    Claiming(Claiming),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Claiming {
    method: Method,
    claims: std::collections::BTreeMap<Claim, String>,
}

/// What was seen of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Seen {
    bytes: u64,
    digest_mismatches: u32,
    timeouts: u32,
    protocol_errors: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_since_last_fault: Option<f64>,
}

/// Times of day as RFC 3339 has them, to the millisecond, which is what policies are told.
pub(in crate::policy) mod timestamp {
    use std::time::SystemTime;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::policy) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => serializer.collect_str(&humantime::format_rfc3339_millis(*time)),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::policy) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let parse = |text: String| {
            let hint = "no time, such as 2026-01-31T12:00:00Z";
            humantime::parse_rfc3339(&text).map_err(|_| D::Error::custom(format!("`{text}` is {hint}")))
        };
        text.map(parse).transpose()
    }
}

/// The time of a question that names none: a case says the same whenever it is asked. The first of January 2026.
fn then() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Asked {
    /// Reads the keys of a case without `name`, `settings` and `expect`, YAML or JSON.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        serde_saphyr::from_str(text).map_err(|error| error.to_string())
    }

    /// The question to a policy of the registry world.
    ///
    /// # Errors
    /// It is none.
    pub fn registry(&self) -> Result<RegistryRequest, String> {
        let image = self.image.as_ref().ok_or("it names no `image`")?;
        let (name, reference) = named(self.registry.as_deref(), image).map_err(|error| error.to_string())?;
        let reference = if self.operation == Operation::Tags { None } else { reference };
        let requester = match &self.peer {
            Some(peer) => Requester::Peer(peer.peer(), self.level),
            None => Requester::Runtime,
        };
        let assumed = Available { local: self.peer.is_some(), ..Available::default() };
        let Available { local, peers, tag_age_millis } = self.available.unwrap_or(assumed);
        let tag_age = tag_age_millis.map(Duration::from_millis);
        let upstreams = self.upstreams.as_deref().unwrap_or(&self.shared).iter().map(|known| Upstream {
            name: known.name.as_str().into(),
            repositories: known.repositories.clone().into(),
            health: known.health,
            latency: known.latency_millis.map(Duration::from_millis),
        });
        Ok(RegistryRequest {
            operation: self.operation,
            requester,
            name,
            reference,
            descriptor: (self.media_type.as_deref().map(Into::into), self.size),
            availability: Availability { local, peers, tag_age },
            upstreams: upstreams.collect(),
            now: self.now.unwrap_or_else(then),
        })
    }

    /// The question to a policy of the election world.
    ///
    /// # Errors
    /// It is none.
    pub fn election(&self) -> Result<View, String> {
        view::view(self.role.as_ref(), &self.candidates, self.holder.as_ref())
    }

    /// The question to a policy of the trust world.
    ///
    /// # Errors
    /// It is none.
    pub fn trust(&self) -> Result<TrustRequest, String> {
        let peer = self.peer.as_ref().ok_or("it names no `peer`")?;
        Ok(TrustRequest {
            peer: peer.peer(),
            observed: self.observed.clone(),
            announced: self.announced.clone(),
            evidence: self.evidence.iter().map(Into::into).collect(),
            conduct: self.conduct.conduct()?,
            level: self.level,
            now: self.now.unwrap_or_else(then),
        })
    }

    /// What tells it from others that were asked at another time.
    pub fn timeless(&self) -> String {
        format!("{:?}", Self { now: None, ..self.clone() })
    }

    /// What it is about, for people: the image, or the peer.
    pub fn subject(&self) -> String {
        let peer = self.peer.as_ref().map(|peer| match (&peer.id, peer.name.as_str()) {
            (Some(id), "") => id.to_string(),
            (_, name) => name.to_owned(),
        });
        let image = self.image.as_ref().map(|image| match &self.registry {
            Some(registry) => format!("{registry}/{image}"),
            None => image.clone(),
        });
        match (image, peer) {
            (Some(image), None) => image,
            (Some(image), Some(peer)) => format!("{image} for {peer}"),
            (None, peer) => peer.unwrap_or_default(),
        }
    }
}

/// A request as it can be asked again.
impl From<&RegistryRequest> for Asked {
    fn from(request: &RegistryRequest) -> Self {
        let RegistryRequest {
            operation,
            requester,
            name,
            reference,
            descriptor,
            availability,
            upstreams,
            now,
        } = request;
        let tail = match reference {
            Some(Reference::Tag(tag)) => format!(":{tag}"),
            Some(Reference::Digest(digest)) => format!("@{digest}"),
            None => String::new(),
        };
        let image = format!("{name}{tail}");
        // Not all that a client can ask for is what people write: `foo/bar` at the registry `docker.io`'s neighbour `corp`.
        let is_plain = named(None, &image).is_ok_and(|(parsed, _)| parsed == *name);
        let (registry, image) = if is_plain {
            (None, image)
        } else {
            (Some(name.registry.to_string()), format!("{}{tail}", name.repository))
        };
        let (peer, level) = match requester {
            Requester::Runtime => (None, Level::default()),
            Requester::Peer(node, level) => (Some(node.into()), *level),
        };
        let known = upstreams.iter().map(|upstream| Known {
            name: upstream.name.to_string(),
            repositories: upstream.repositories.to_vec(),
            health: upstream.health,
            latency_millis: upstream.latency.map(millis),
        });
        let Availability { local, peers, tag_age } = *availability;
        let tag_age_millis = tag_age.map(millis);
        Self {
            image: Some(image),
            registry,
            operation: *operation,
            media_type: descriptor.0.as_deref().map(Into::into),
            size: descriptor.1,
            available: Some(Available { local, peers, tag_age_millis }),
            // Even where there are none: those of a file of cases do not count.
            upstreams: Some(known.collect()),
            peer,
            level,
            now: Some(*now),
            ..Self::default()
        }
    }
}

/// A request as it can be asked again.
impl From<&TrustRequest> for Asked {
    fn from(request: &TrustRequest) -> Self {
        let TrustRequest { peer, observed, announced, evidence, conduct, level, now } = request;
        Self {
            peer: Some(peer.into()),
            level: *level,
            observed: observed.clone(),
            announced: announced.clone(),
            evidence: evidence.iter().map(Into::into).collect(),
            conduct: conduct.into(),
            now: Some(*now),
            ..Self::default()
        }
    }
}

/// The name of what is asked for. With a registry, all of `image` before the tag or the digest is the repository.
fn named(registry: Option<&str>, image: &str) -> Result<(Name, Option<Reference>), ReferenceError> {
    let Some(registry) = registry else {
        let image: Image = image.parse()?;
        return Ok((image.name.clone(), Reference::of(&image)));
    };
    let (repository, reference) = if let Some((repository, digest)) = image.split_once('@') {
        (repository, Some(Reference::Digest(digest.parse()?)))
    } else if let Some((repository, tag)) = image.split_once(':') {
        (repository, Some(Reference::Tag(tag.parse()?)))
    } else {
        (image, None)
    };
    Ok((Name { registry: registry.parse()?, repository: repository.parse()? }, reference))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Who {
    /// Who asks or is judged: one of no list, where the case names no ID.
    fn peer(&self) -> Node {
        self.node("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", Provenance::Claimed)
    }

    pub(super) fn node(&self, id: &str, provenance: Provenance) -> Node {
        let provenance = if self.verified { Provenance::Verified } else { provenance };
        Node {
            id: self.id.as_ref().map_or_else(|| id.to_owned(), ToString::to_string),
            name: self.name.clone(),
            name_provenance: provenance,
            version: self.version.clone(),
            labels: zone(&self.zone, provenance),
        }
    }

    /// The node that asks, as policies are told.
    pub fn here(&self) -> Node {
        self.node("here", Provenance::Configured)
    }
}

impl From<&Node> for Who {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.parse().ok(),
            name: node.name.clone(),
            // The only label that there is; see `zone`.
            zone: node.labels.first().map(|label| label.value.clone()).unwrap_or_default(),
            version: node.version.clone(),
            verified: node.name_provenance == Provenance::Verified,
        }
    }
}

impl From<&Proof> for Evidence {
    fn from(proof: &Proof) -> Self {
        match proof {
            Proof::Alone(method) => Self { method: *method, claims: Vec::new() },
            Proof::Claiming(Claiming { method, claims }) => {
                let claims = claims.iter().map(|(claim, value)| (*claim, value.clone()));
                Self { method: *method, claims: claims.collect() }
            }
        }
    }
}

impl From<&Evidence> for Proof {
    fn from(evidence: &Evidence) -> Self {
        let Evidence { method, claims } = evidence;
        if claims.is_empty() {
            return Self::Alone(*method);
        }
        Self::Claiming(Claiming { method: *method, claims: claims.iter().cloned().collect() })
    }
}

impl Seen {
    fn conduct(&self) -> Result<Conduct, String> {
        let since = self.seconds_since_last_fault.map(Duration::try_from_secs_f64).transpose();
        let since = since.map_err(|error| format!("seconds-since-last-fault: {error}"))?;
        Ok(Conduct {
            bytes: self.bytes,
            digest_mismatches: self.digest_mismatches,
            timeouts: self.timeouts,
            protocol_errors: self.protocol_errors,
            since_last_fault: since.map(|since| Duration::from_millis(millis(since + HALF))),
        })
    }
}

/// So that a time that was cut to milliseconds, and is written as a fraction, is what it was.
const HALF: Duration = Duration::from_micros(500);

impl From<&Conduct> for Seen {
    fn from(conduct: &Conduct) -> Self {
        Self {
            bytes: conduct.bytes,
            digest_mismatches: conduct.digest_mismatches,
            timeouts: conduct.timeouts,
            protocol_errors: conduct.protocol_errors,
            seconds_since_last_fault: conduct
                .since_last_fault
                .map(|since| Duration::from_millis(millis(since)).as_secs_f64()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
    }

    fn node() -> Node {
        Node {
            id: "12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD".into(),
            name: "node-7".into(),
            name_provenance: Provenance::Claimed,
            version: "0.1.0".into(),
            labels: zone("a", Provenance::Claimed),
        }
    }

    /// By both parsers: the log is JSON, cases are YAML.
    fn again(asked: &Asked) -> Asked {
        let text = serde_json::to_string(asked).unwrap();
        let read: Asked = serde_json::from_str(&text).unwrap();
        assert_eq!(read, Asked::parse(&text).unwrap(), "{text}");
        assert_eq!(read, Asked::parse(&serde_saphyr::to_string(asked).unwrap()).unwrap());
        assert_eq!(read, *asked, "{text}");
        read
    }

    /// Guards that what is replayed is what was asked, of all that can be asked.
    #[test]
    fn a_request_of_the_registry_world_is_written_whole() {
        let digest = "sha256:".to_owned() + &"ab".repeat(32);
        let upstream = Upstream {
            name: "corp".into(),
            repositories: Arc::new(["dockerhub".to_owned()]),
            health: Health::RateLimited,
            latency: Some(Duration::from_millis(12)),
        };
        let peer = Requester::Peer(node(), Level::Blobs);
        for (registry, repository) in [
            ("docker.io", "library/nginx"),
            // What no name that people write means.
            ("docker.io", "nginx"),
            ("corp", "team/app"),
            ("[::1]:5000", "a/b"),
            ("registry.test:5000", "a"),
        ] {
            let name = Name { registry: registry.parse().unwrap(), repository: repository.parse().unwrap() };
            let tag = Some(Reference::Tag("v1".parse().unwrap()));
            let digest = Some(Reference::Digest(digest.parse().unwrap()));
            for (operation, requester, reference, upstreams) in [
                (Operation::Manifests, Requester::Runtime, tag, Arc::default()),
                (Operation::Blobs, peer.clone(), digest.clone(), Arc::new([upstream.clone()]) as Arc<[_]>),
                (Operation::Tags, Requester::Runtime, None, Arc::default()),
                (Operation::Referrers, Requester::Runtime, digest, Arc::default()),
            ] {
                let request = RegistryRequest {
                    operation,
                    requester,
                    name: name.clone(),
                    reference,
                    descriptor: (Some("application/octet-stream".into()), Some(7)),
                    availability: Availability {
                        local: false,
                        peers: 3,
                        tag_age: Some(Duration::from_millis(60_001)),
                    },
                    upstreams,
                    now: time(1_795_734_660_123),
                };
                assert_eq!(again(&(&request).into()).registry().unwrap(), request);
            }
        }
    }

    #[test]
    fn a_request_of_the_trust_world_is_written_whole() {
        let request = TrustRequest {
            peer: node(),
            observed: vec!["10.0.0.7".parse().unwrap()],
            announced: vec!["/ip4/10.0.0.7/tcp/5002".into()],
            evidence: vec![
                Evidence { method: Method::PeerIdList, claims: Vec::new() },
                Evidence { method: Method::ClusterKey, claims: vec![(Claim::KeyId, "00ff".into())] },
            ],
            conduct: Conduct {
                bytes: 7,
                digest_mismatches: 1,
                timeouts: 2,
                protocol_errors: 3,
                since_last_fault: Some(Duration::from_millis(12_345)),
            },
            level: Level::Tags,
            now: time(1_795_734_660_123),
        };
        assert_eq!(again(&(&request).into()).trust().unwrap(), request);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("{image: nginx, now: yesterday}", "`yesterday` is no time"),
            ("{image: nginx, evidence: [cluster-kye]}", "evidence"),
            ("{pear: {}}", "pear"),
        ] {
            let error = Asked::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let asked = Asked::parse("{peer: {}, conduct: {seconds-since-last-fault: -1}}").unwrap();
        assert!(asked.trust().unwrap_err().contains("seconds-since-last-fault"));
    }
}
