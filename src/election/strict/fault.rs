//! What is wrong between a candidate and the API server, by a closed list of causes, each with what to do about it.

use std::fmt;

/// What is wrong, and the words of who found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind.
    pub cause: Cause,
    /// The details: addresses, status and message of the server, bounded.
    pub text: String,
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Nothing was answered yet, and nothing has failed.
    Starting,
    /// No connection came about in time.
    Timeout,
    /// The connection was refused.
    Refused,
    /// There is no way there: unreachable, or forbidden by this node.
    Unroutable,
    /// The name has no address.
    Unresolved,
    /// There is a connection, and no secure one.
    Tls,
    /// There is a connection, and no answer, or a broken one.
    NoAnswer,
    /// Something else than an API server answers.
    Malformed,
    /// The token or the authority's certificate cannot be read.
    NoCredentials,
    /// The token is not accepted.
    Unauthorized,
    /// A right is missing.
    Forbidden,
    /// A right to the ConfigMap that is the lock is missing.
    ConfigMapForbidden,
    /// The namespace does not exist, or is being deleted.
    NoNamespace,
    /// The object does not exist and may not be made.
    NoObject,
    /// The ConfigMap that is the lock does not exist and may not be made.
    NoConfigMap,
    /// The request is refused by its contents: a webhook, a quota, a rule of validation.
    Rejected,
    /// The server asks for fewer requests.
    Throttled,
    /// The server has an error of its own.
    Server,
    /// Nothing is wrong here, and nobody takes the lease.
    NoLeader,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Starting,
        Self::Timeout,
        Self::Refused,
        Self::Unroutable,
        Self::Unresolved,
        Self::Tls,
        Self::NoAnswer,
        Self::Malformed,
        Self::NoCredentials,
        Self::Unauthorized,
        Self::Forbidden,
        Self::ConfigMapForbidden,
        Self::NoNamespace,
        Self::NoObject,
        Self::NoConfigMap,
        Self::Rejected,
        Self::Throttled,
        Self::Server,
        Self::NoLeader,
    ];

    /// As metrics and people see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Timeout => "api-timeout",
            Self::Refused => "api-refused",
            Self::Unroutable => "api-unroutable",
            Self::Unresolved => "api-unresolved",
            Self::Tls => "api-tls",
            Self::NoAnswer => "api-no-answer",
            Self::Malformed => "api-malformed",
            Self::NoCredentials => "no-credentials",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::ConfigMapForbidden => "configmap-forbidden",
            Self::NoNamespace => "no-namespace",
            Self::NoObject => "no-lease",
            Self::NoConfigMap => "no-configmap",
            Self::Rejected => "rejected",
            Self::Throttled => "throttled",
            Self::Server => "api-error",
            Self::NoLeader => "no-leader",
        }
    }

    /// What to do about it; empty: nothing.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Starting => "",
            Self::Timeout => {
                "no TCP connection to the API server: with a default-deny policy allow egress to it (Cilium: toEntities: \
                 [kube-apiserver]; else the endpoints' addresses and ports as well as the Service); with host networking look at \
                 the host's firewall. Mirroring goes on without it"
            }
            Self::Refused => {
                "the API server is down, the Service has no endpoint on this node, or a policy rejects: it is tried again every \
                 second. Mirroring goes on without it"
            }
            Self::Unroutable => {
                "no way to the API server: look at routes and at policies that reject with ICMP. Mirroring goes on without it"
            }
            Self::Unresolved => {
                "the name of the API server has no address: look at DNS, or name an address under `kubernetes.endpoints`"
            }
            Self::Tls => {
                "the server's certificate is not the cluster's, or not for this address: a proxy in between, another address, or \
                 the clock of this node; see `kubernetes.endpoints` and `kubernetes.credentials`"
            }
            Self::NoAnswer => {
                "there is a connection to the API server, and no answer: overload, a frozen server, a load balancer, the MTU, or a \
                 connection that was cut, after which another one is made. Mirroring goes on without it"
            }
            Self::Malformed => {
                "what answers is no Kubernetes API server: look at `kubernetes.endpoints` and at proxies in between"
            }
            Self::NoCredentials => {
                "mount a service account's token (a projected volume with token, ca.crt and namespace; see \
                 `kubernetes.credentials`), or set `election.backend: gossip`"
            }
            Self::Unauthorized => {
                "the token is not accepted: it has expired, is for another audience, or its service account is gone"
            }
            Self::Forbidden => {
                "give the service account a Role with the verbs get, update and watch on this lease (resourceNames), and a \
                 RoleBinding; see docs/elections.md"
            }
            Self::ConfigMapForbidden => {
                "give the service account a Role with the verbs get, update and watch on this ConfigMap (resourceNames), and a \
                 RoleBinding; where it is observed get is enough; see docs/elections.md"
            }
            Self::NoNamespace => "make the namespace, or name another one under `kubernetes.namespace`",
            Self::NoObject => {
                "make the Lease beforehand, empty, or give the service account the verb create on leases; see docs/elections.md"
            }
            Self::NoConfigMap => {
                "make the ConfigMap beforehand, empty, or give the service account the verb create on configmaps; see \
                 docs/elections.md"
            }
            Self::Rejected => {
                "a webhook, a quota or a rule of validation refuses the object: exempt the Lease (or the ConfigMap in its place) from it"
            }
            Self::Throttled => {
                "the API server asks for fewer requests: give Peili's service account a priority level (a FlowSchema), or find who \
                 else uses it up"
            }
            Self::Server => "the control plane is not well; it is tried again",
            Self::NoLeader => {
                "nobody takes the lease: the candidates say why (`peili election explain coordinator` shows who they are, \
                 `peili status` on them what is wrong)"
            }
        }
    }

    /// Whether an API server was reached: it has answered, whatever it said. `None`: that is not known.
    pub const fn reached(self) -> Option<bool> {
        match self {
            Self::Starting | Self::NoCredentials | Self::NoLeader => None,
            Self::Timeout
            | Self::Refused
            | Self::Unroutable
            | Self::Unresolved
            | Self::Tls
            | Self::NoAnswer
            | Self::Malformed => Some(false),
            Self::Unauthorized
            | Self::Forbidden
            | Self::ConfigMapForbidden
            | Self::NoNamespace
            | Self::NoObject
            | Self::NoConfigMap
            | Self::Rejected
            | Self::Throttled
            | Self::Server => Some(true),
        }
    }

    /// Whether one TCP connection would show that it is over.
    pub const fn knocks(self) -> bool {
        matches!(self, Self::Timeout | Self::Refused | Self::Unroutable)
    }
}

impl Fault {
    /// Bytes of a text, at most: a server's message may be long.
    const TEXT: usize = 512;

    /// Of a kind, with details.
    pub fn new(cause: Cause, text: impl Into<String>) -> Self {
        let text: String = text.into();
        let text =
            text.chars().map(|char| if char.is_control() { ' ' } else { char }).take(Self::TEXT).collect();
        Self { cause, text }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause.name(), self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_a_name_of_its_own_and_a_remedy() {
        let mut names: Vec<&str> = Cause::ALL.iter().map(|cause| cause.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Cause::ALL.len());
        assert!(Cause::ALL.iter().all(|cause| *cause == Cause::Starting || !cause.remedy().is_empty()));
    }

    #[test]
    fn a_text_is_bounded_and_has_no_control_characters() {
        let fault = Fault::new(Cause::Server, format!("a\nb\u{1b}[31m{}", "x".repeat(4_000)));
        assert_eq!(fault.text.chars().count(), 512);
        assert!(fault.text.starts_with("a b [31mx"));
    }
}
