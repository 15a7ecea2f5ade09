//! Manifests that mend what is wrong: only what is missing, and whole, so that applying one takes nothing else away.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::Ports;
use super::code::Code;
use super::place::{Cni, Place};
use crate::cluster::{Kind, Right};
use crate::oci::Digest;

/// Name of what is printed: not one that the chart renders, which Helm would refuse to take over.
const POLICY: &str = "peili-allow";
/// The cluster's DNS.
const DNS: u16 = 53;

/// Objects to apply, in one file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Manifest {
    /// Name of the file.
    pub file: String,
    /// The objects, in order.
    pub objects: Vec<Value>,
}

impl Manifest {
    /// As YAML, with a line between objects.
    pub fn text(&self) -> String {
        // Maps with texts as keys always are YAML.
        let all: Vec<String> =
            self.objects.iter().map(|object| serde_saphyr::to_string(object).unwrap_or_default()).collect();
        all.join("---\n")
    }

    /// What is in it, for people: `Role peili-rights-lock, RoleBinding peili-rights-lock`.
    pub fn contents(&self) -> String {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name =
            |object: &Value| format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]));
        self.objects.iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

/// A Role with these rights and no others, and who has it; without an account the Role alone, and a ClusterRole for what is in no
/// namespace. `account`: as the API server names it.
pub fn role(namespace: &str, account: Option<&str>, code: Code, rights: &[&Right]) -> Vec<Manifest> {
    let mut all = Vec::new();
    for namespaced in [true, false] {
        let rights: Vec<&Right> =
            rights.iter().copied().filter(|right| right.namespaced == namespaced).collect();
        if rights.is_empty() {
            continue;
        }
        let prefix = if namespaced { "" } else { "Cluster" };
        let rules = rules(&rights);
        // Applying it must not replace one that gives other rights, of another node or another time.
        let mark: String =
            Digest::sha256(Value::from(rules.clone()).to_string().as_bytes()).hex().chars().take(8).collect();
        let name = format!("peili-{}-{mark}", code.name());
        let metadata = if namespaced {
            json!({"name": name, "namespace": namespace})
        } else {
            // One that is in no namespace must not meet that of another fleet.
            json!({"name": format!("{name}-{namespace}")})
        };
        let group = "rbac.authorization.k8s.io";
        let role = json!({
            "apiVersion": format!("{group}/v1"),
            "kind": format!("{prefix}Role"),
            "metadata": metadata,
            "rules": rules,
        });
        let binding = account.map(|account| {
            json!({
                "apiVersion": format!("{group}/v1"),
                "kind": format!("{prefix}RoleBinding"),
                "metadata": metadata,
                "roleRef": {"apiGroup": group, "kind": format!("{prefix}Role"), "name": metadata["name"]},
                "subjects": [subject(account)],
            })
        });
        let file = format!("{}-{}role-{mark}.yaml", code.name(), prefix.to_ascii_lowercase());
        all.push(Manifest { file, objects: [Some(role), binding].into_iter().flatten().collect() });
    }
    all
}

fn rules(rights: &[&Right]) -> Vec<Value> {
    let mut rules: BTreeMap<(&str, &str, Option<&str>), Vec<&str>> = BTreeMap::new();
    for right in rights {
        let verbs = rules.entry((right.group, right.resource, right.name.as_deref())).or_default();
        if !verbs.contains(&right.verb) {
            verbs.push(right.verb);
        }
    }
    let rule = |((group, resource, name), verbs): ((&str, &str, Option<&str>), Vec<&str>)| {
        let mut rule = json!({"apiGroups": [group], "resources": [resource], "verbs": verbs});
        if let Some(name) = name {
            rule["resourceNames"] = json!([name]);
        }
        rule
    };
    rules.into_iter().map(rule).collect()
}

fn subject(account: &str) -> Value {
    match account.strip_prefix("system:serviceaccount:").and_then(|names| names.split_once(':')) {
        Some((namespace, name)) => json!({"kind": "ServiceAccount", "namespace": namespace, "name": name}),
        None => json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": account}),
    }
}

/// An object that is made beforehand, empty: a lock, or the fleet summary.
pub fn lock(kind: Kind, namespace: &str, name: &str) -> Manifest {
    let metadata = json!({"name": name, "namespace": namespace});
    let object = json!({"apiVersion": kind.api_version(), "kind": kind.name(), "metadata": metadata});
    Manifest { file: format!("{}-{name}.yaml", kind.name().to_ascii_lowercase()), objects: vec![object] }
}

/// Policies of the network that let through all that Peili needs: the API, DNS, peers in both directions, registries, metrics. For pods with
/// a network of their own: they count for no other. Cilium's where Cilium is certain, both where it may be.
pub fn policies(namespace: &str, place: &Place, ports: &Ports) -> Vec<Manifest> {
    // A policy that selects nobody, or opens all ports, would be worse than none.
    if place.label.1.is_empty() || ports.peers.is_empty() {
        return Vec::new();
    }
    let one = |file: &str, object| Manifest { file: file.to_owned(), objects: vec![object] };
    let plain = || one("networkpolicy.yaml", network_policy(namespace, place, ports));
    let cilium = || one("ciliumnetworkpolicy.yaml", cilium_policy(namespace, place, ports));
    match place.cni {
        Cni::Cilium => vec![cilium()],
        Cni::PerhapsCilium => vec![cilium(), plain()],
        Cni::Unknown => vec![plain()],
    }
}

fn labels(place: &Place) -> Value {
    let (key, value) = &place.label;
    json!({"matchLabels": {key: value}})
}

fn network_policy(namespace: &str, place: &Place, ports: &Ports) -> Value {
    let tcp = |ports: &[u16]| -> Vec<Value> {
        ports.iter().map(|port| json!({"protocol": "TCP", "port": port})).collect()
    };
    let peers = json!([{"podSelector": labels(place)}]);
    let mut ingress = vec![json!({"from": peers, "ports": tcp(&ports.peers)})];
    if let Some(port) = ports.metrics {
        ingress.push(json!({"from": [{"namespaceSelector": {}}], "ports": tcp(&[port])}));
    }
    // The API server's addresses are not known as the policy sees them (most see them behind the Service): by port to all.
    let egress = [
        json!({"ports": [{"protocol": "UDP", "port": DNS}, {"protocol": "TCP", "port": DNS}]}),
        json!({"ports": tcp(&ports.out)}),
        json!({"to": peers, "ports": tcp(&ports.peers)}),
    ];
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY, "namespace": namespace},
        "spec": {
            "podSelector": labels(place),
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    })
}

fn cilium_policy(namespace: &str, place: &Place, ports: &Ports) -> Value {
    let port = |port: &u16, protocol: &str| json!({"port": port.to_string(), "protocol": protocol});
    let tcp = |ports: &[u16]| -> Value {
        let ports: Vec<Value> = ports.iter().map(|number| port(number, "TCP")).collect();
        json!([{"ports": ports}])
    };
    let mut ingress = vec![json!({"fromEndpoints": [labels(place)], "toPorts": tcp(&ports.peers)})];
    if let Some(port) = ports.metrics {
        ingress.push(json!({"fromEntities": ["cluster"], "toPorts": tcp(&[port])}));
    }
    let dns = json!([{"ports": [port(&DNS, "UDP"), port(&DNS, "TCP")]}]);
    let egress = [
        // An ipBlock does not match the API server: it has an identity of its own.
        json!({"toEntities": ["kube-apiserver"]}),
        json!({"toEntities": ["cluster"], "toPorts": dns}),
        json!({"toEntities": ["world", "cluster"], "toPorts": tcp(&ports.out)}),
        json!({"toEndpoints": [labels(place)], "toPorts": tcp(&ports.peers)}),
    ];
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": POLICY, "namespace": namespace},
        "spec": {"endpointSelector": labels(place), "ingress": ingress, "egress": egress},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(verb: &'static str, name: Option<&str>) -> Right {
        Right {
            verb,
            group: "coordination.k8s.io",
            resource: "leases",
            name: name.map(str::to_owned),
            namespaced: true,
        }
    }

    #[test]
    fn a_role_has_the_missing_verbs_and_no_others() {
        let (get, update, create) =
            (right("get", Some("peili")), right("update", Some("peili")), right("create", None));
        let account = Some("system:serviceaccount:a:b");
        let made = role("ns", account, Code::RightsLock, &[&get, &update, &create]);
        let [Manifest { file, objects }] = &made[..] else { panic!("{made:?}") };
        assert!(file.starts_with("rights-lock-role-") && file.ends_with(".yaml"), "{file}");
        let other = role("ns", account, Code::RightsLock, &[&get]);
        assert_ne!(
            other[0].objects[0]["metadata"]["name"], objects[0]["metadata"]["name"],
            "one takes nothing from the other"
        );
        let rules = objects[0]["rules"].as_array().unwrap();
        assert_eq!(rules.len(), 2, "{rules:?}");
        assert_eq!(rules[0]["verbs"], json!(["create"]));
        assert!(rules[0].get("resourceNames").is_none(), "nothing is created by a name");
        assert_eq!(
            (&rules[1]["verbs"], &rules[1]["resourceNames"]),
            (&json!(["get", "update"]), &json!(["peili"]))
        );
        let subject = json!({"kind": "ServiceAccount", "namespace": "a", "name": "b"});
        assert_eq!(objects[1]["subjects"], json!([subject]));
        assert_eq!(objects[1]["roleRef"]["name"], objects[0]["metadata"]["name"]);
        // Nobody is guessed.
        assert_eq!(role("ns", None, Code::RightsLock, &[&get])[0].objects.len(), 1);
        let node = Right { namespaced: false, group: "", resource: "nodes", ..get };
        let made = role("ns", Some("admin"), Code::RightsNode, &[&node]);
        assert_eq!(made[0].objects[0]["kind"], "ClusterRole");
        assert_eq!(made[0].objects[1]["subjects"][0]["kind"], "User");
        assert!(made[0].objects[0]["metadata"].get("namespace").is_none());
    }

    #[test]
    fn a_policy_is_whole() {
        let ports = Ports { peers: vec![5001, 5002], metrics: Some(5003), out: vec![443, 6443] };
        let place = |cni| Place { cni, label: ("app".into(), "peili".into()), ..Place::default() };
        let kinds = |cni| -> Vec<String> {
            policies("ns", &place(cni), &ports).iter().map(Manifest::contents).collect()
        };
        assert_eq!(kinds(Cni::Unknown), ["NetworkPolicy peili-allow"]);
        assert_eq!(kinds(Cni::Cilium), ["CiliumNetworkPolicy peili-allow"]);
        assert_eq!(kinds(Cni::PerhapsCilium).len(), 2);
        for manifest in policies("ns", &place(Cni::PerhapsCilium), &ports) {
            let text = manifest.text();
            for needed in ["53", "443", "6443", "5001", "5002", "5003"] {
                assert!(text.contains(needed), "{needed}: {text}");
            }
            let read: Value = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(read, manifest.objects[0], "what is printed is what is meant");
        }
        let without = Ports { metrics: None, ..ports };
        let text = policies("ns", &place(Cni::Unknown), &without)[0].text();
        assert!(!text.contains("5003"), "{text}");
    }
}
