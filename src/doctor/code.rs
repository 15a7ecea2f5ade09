//! What can be wrong, by a closed list of codes. Their names are stable; docs/doctor.md has a row for each.

use serde::Serialize;

/// Whether something has to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing is wrong; it should be known.
    Note,
    /// It works, and not as it could.
    Warning,
    /// Something that is configured does not work. Mirroring may go on without it.
    Problem,
}

/// How sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confidence {
    /// It fits, and other things do.
    Low,
    /// Nothing that was seen speaks for another cause.
    Medium,
    /// It was seen itself.
    High,
}

/// Makes the list of codes once: name, severity, meaning.
macro_rules! codes {
    ($($code:ident $name:literal $severity:ident $meaning:literal)*) => {
        /// What is wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $meaning] $code,)*
        }

        impl Code {
            /// All of them, in the order of docs/doctor.md.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// As machines know it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$code => $name,)* }
            }

            /// Whether something has to be done about it.
            pub const fn severity(self) -> Severity {
                match self { $(Self::$code => Severity::$severity,)* }
            }

            /// In one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$code => $meaning,)* }
            }
        }
    };
}

codes! {
    NoCluster "no-cluster" Note "nothing says where a Kubernetes API is, and none is needed"
    NoToken "no-token" Problem "no token of a service account is mounted, or it cannot be read"
    NoAuthority "no-authority" Problem "the certificate of the cluster's authority is not mounted, or is none"
    NoNamespace "no-namespace" Problem "nothing says in which namespace Peili's objects are"
    TokenExpired "token-expired" Problem "the token is not accepted, and its time is over"
    TokenAudience "token-audience" Problem "the token is not accepted, and it is for somebody else"
    TokenRejected "token-rejected" Problem "the token is not accepted, and does not say why"
    ClockBehind "clock-behind" Warning "what the cluster has issued is of the future: this node's clock is behind"
    ApiUnresolved "api-unresolved" Problem "the name of the API server has no address"
    ApiUnreachable "api-unreachable" Problem "packets to the API server are not answered: its host is off, or something drops them"
    ApiBlocked "api-blocked" Problem "packets to the API server are dropped, while its host or its control plane is seen to live"
    ApiUnroutable "api-unroutable" Problem "there is no way to the API server: routes, or a rejection by ICMP"
    ApiRefused "api-refused" Problem "connections to the API server are refused: it is down, or something rejects them"
    AddressFamily "address-family" Problem "the API server's address is of a family that this node has no address of"
    ServiceUnreachable "service-unreachable" Warning "the API server answers, and its Service does not"
    EndpointUnreachable "endpoint-unreachable" Warning "one of the API servers that are named does not answer, and another does"
    TlsSilent "tls-silent" Problem "there is a connection to the API server, and its TLS never answers"
    TlsIssuer "tls-issuer" Problem "the API server's certificate is not by the cluster's authority"
    TlsName "tls-name" Problem "the API server's certificate is for other names than the one that is asked"
    TlsTime "tls-time" Problem "the API server's certificate does not count at this node's time of day"
    TlsBroken "tls-broken" Problem "what answers at the API server's address does not speak TLS as it should"
    ApiSilent "api-silent" Problem "there is a secure connection to the API server, and no answer"
    NotAnApiServer "not-an-api-server" Problem "what answers is no Kubernetes API server"
    ControlPlane "control-plane-unwell" Problem "the API server answers with errors of its own"
    Throttled "throttled" Warning "the API server asks for fewer requests"
    NamespaceMissing "namespace-missing" Problem "the namespace of Peili's objects does not exist"
    NamespaceTerminating "namespace-terminating" Problem "the namespace of Peili's objects is being deleted"
    RightsLock "rights-lock" Problem "the service account may not read or replace the lock of elections"
    RightsWatch "rights-watch" Warning "the service account may not watch the lock, so that it is read again and again"
    RightsCoordinator "rights-coordinator" Warning "the service account may not write the fleet summary, or Events"
    RightsNode "rights-node" Warning "the service account may not read its Node, which `kubernetes.read-node` asks for"
    ReviewRefused "review-refused" Note "the service account may not ask what it may do, so that only what was tried is known"
    LockMissing "lock-missing" Problem "the lock of elections does not exist and may not be made"
    LockForeign "lock-foreign" Warning "the lock of elections is held by something else than Peili"
    SummaryMissing "summary-missing" Warning "the ConfigMap of the fleet summary does not exist and may not be made"
    Quota "quota" Problem "a quota of the namespace refuses the lock"
    AdmissionDenied "admission-denied" Problem "a webhook or a policy of admission refuses the lock"
    WebhookDead "webhook-dead" Problem "a webhook that has to be asked about the lock does not answer"
    WriteRefused "write-refused" Problem "the API server refuses the lock for another reason"
    WriteSilent "write-silent" Problem "the API server answers, and not when the lock is written"
    DnsSilent "dns-silent" Problem "no name server answers"
    DnsNoName "dns-no-name" Problem "the cluster's DNS does not know the name by which peers are found"
    DnsNotTheClusters "dns-not-the-clusters" Problem "the name server is not the cluster's: it knows neither the peers' name nor the API server's"
    DnsFailing "dns-failing" Problem "the name by which peers are found cannot be resolved"
    ContainerdAbsent "containerd-absent" Problem "there is no containerd socket where the configuration says"
    ContainerdDenied "containerd-denied" Problem "containerd's socket may not be opened"
    ContainerdDown "containerd-down" Problem "nobody listens at containerd's socket"
    ContainerdSilent "containerd-silent" Problem "containerd takes a connection and does not answer"
    RuntimeUnseen "runtime-unseen" Note "containerd's configuration cannot be seen from here"
    HostsFolderMissing "hosts-folder-missing" Problem "the folder of registry hosts does not exist"
    RegistryNotSetUp "registry-not-set-up" Problem "containerd is not told to ask Peili"
    RegistryOwned "registry-owned" Problem "the distribution writes the folder of registry hosts itself and takes Peili out again"
    RegistryIgnored "registry-ignored" Problem "containerd does not read the folder of registry hosts"
    RegistryFile "registry-file-missing" Problem "a file that a hosts.toml names is not there, so that pulls fail"
    RegistryUnreadable "registry-unreadable" Problem "containerd's configuration cannot be read"
    RegistryWide "registry-port-wide" Warning "the registry's hostPort is open at the node's address too: only where connections come from keeps others out"
    LayersDiscarded "layers-discarded" Warning "containerd forgets layers once they are unpacked, so that this node has none to give"
    RegistriesSilent "registries-silent" Warning "none of the registries that pulls asked for lately answers this node, so that peers are asked about their tags"
    MirrorAlone "mirror-alone" Warning "the mirror that runs here knows no other member"
    PeerPort "peer-port-unreachable" Warning "members are known, and none of those that were tried is reached at its peer port"
    MirrorData "mirror-data" Warning "the mirror that runs here cannot write to its data folder, so that what it learns ends with it"
    IdentityPassing "identity-passing" Warning "the mirror that runs here has an identity that ends with it"
    PoliciesRefused "policies-refused" Warning "the policies that are configured are not in force: the mirror that runs here refuses one"
    MirrorStore "mirror-store" Problem "the mirror that runs here cannot follow its store"
}

impl Severity {
    /// As people and machines see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

impl Confidence {
    /// As people and machines see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ones_own_and_the_document_has_them_all() {
        let document = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
        let document = std::fs::read_to_string(document).unwrap();
        let rows: Vec<Vec<&str>> = document
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
            .collect();
        let shown: Vec<[&str; 3]> =
            rows.iter().map(|row| [row[0].trim_matches('`'), row[1], row[3]]).collect();
        let here: Vec<[&str; 3]> =
            Code::ALL.iter().map(|code| [code.name(), code.severity().name(), code.meaning()]).collect();
        assert_eq!(shown, here);
        let mut names: Vec<&str> = Code::ALL.iter().map(|code| code.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Code::ALL.len());
        let is_plain = |name: &str| name.chars().all(|char| char.is_ascii_lowercase() || char == '-');
        assert!(names.iter().all(|name| is_plain(name)));
    }

    /// A cause that was never seen is a guess: whoever adds a code makes its fault.
    #[test]
    fn each_is_expected_by_a_test_that_makes_its_fault() {
        let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it")];
        let mut expected = std::collections::HashSet::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let text = std::fs::read_to_string(path).unwrap();
                    expected.extend(text.split('"').map(str::to_owned));
                }
            }
        }
        let missing: Vec<&str> =
            Code::ALL.iter().map(|code| code.name()).filter(|name| !expected.contains(*name)).collect();
        assert!(missing.is_empty(), "no test expects {missing:?}");
    }
}
