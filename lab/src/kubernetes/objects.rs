//! What tests of accounts and rights need: namespaces, service accounts, roles, tokens. Made by the administrator; whatever the
//! server says but that it is made is an error.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::ApiServer;
use super::credentials::Account;
use crate::wait;

/// Longest until the server acts by a right that it was told of.
const RIGHTS_LIMIT: Duration = Duration::from_secs(10);

/// What a role allows.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// `get`, `create`, ...
    pub verbs: &'a [&'a str],
    /// With their group after a dot: `leases.coordination.k8s.io`, `configmaps`.
    pub resources: &'a [&'a str],
    /// Only objects of these names, which nothing can be created by. Empty: all.
    pub names: &'a [&'a str],
}

impl<'a> Rule<'a> {
    /// All that a coordinator has any use for (docs/elections.md), by leases of these names.
    pub fn of_coordinator(leases: &'a [&'a str]) -> [Self; 5] {
        let lease = &["leases.coordination.k8s.io"];
        [
            Rule { verbs: &["get", "update", "watch"], resources: lease, names: leases },
            Rule { verbs: &["create"], resources: lease, names: &[] },
            Rule { verbs: &["get", "update"], resources: &["configmaps"], names: &["peili-fleet"] },
            Rule { verbs: &["create"], resources: &["configmaps"], names: &[] },
            Rule { verbs: &["create"], resources: &["events.events.k8s.io"], names: &[] },
        ]
    }

    fn to_json(self) -> Value {
        let parts: Vec<_> =
            self.resources.iter().map(|name| name.split_once('.').unwrap_or((name, ""))).collect();
        let (resources, groups): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let mut rule = json!({"verbs": self.verbs, "resources": resources, "apiGroups": groups});
        if !self.names.is_empty() {
            rule["resourceNames"] = json!(self.names);
        }
        rule
    }
}

impl ApiServer {
    /// Makes a namespace.
    pub async fn namespace(&self, name: &str) -> Result<()> {
        self.create("/api/v1/namespaces", &json!({"metadata": {"name": name}})).await.map(drop)
    }

    /// Makes a service account.
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        self.create(&path, &json!({"metadata": {"name": name}})).await.map(drop)
    }

    /// Makes a role of a namespace.
    pub async fn role(&self, namespace: &str, name: &str, rules: &[Rule<'_>]) -> Result<()> {
        let rules: Vec<_> = rules.iter().map(|rule| rule.to_json()).collect();
        let role = json!({"metadata": {"name": name}, "rules": rules});
        self.create(&roles(namespace, "roles"), &role).await.map(drop)
    }

    /// Gives a role to a service account of its namespace, by a binding `ROLE-ACCOUNT`, and waits until the server acts by it.
    pub async fn role_binding(&self, namespace: &str, role: &str, account: &str) -> Result<()> {
        let subject = json!({"kind": "ServiceAccount", "namespace": namespace, "name": account});
        let reference = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role});
        let name = format!("{role}-{account}");
        let binding = json!({"metadata": {"name": name}, "subjects": [subject], "roleRef": reference});
        self.create(&roles(namespace, "rolebindings"), &binding).await?;
        let (status, role) =
            self.admin("GET", &format!("{}/{role}", roles(namespace, "roles")), None).await?;
        ensure!(status == 200, "the role: {status} {role}");
        let first = &role["rules"][0];
        let question = json!({
            "spec": {
                "user": format!("system:serviceaccount:{namespace}:{account}"),
                "resourceAttributes": {
                    "namespace": namespace,
                    "verb": first["verbs"][0],
                    "group": first["apiGroups"][0],
                    "resource": first["resources"][0],
                    "name": first["resourceNames"].get(0),
                },
            },
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        wait::until("the right", RIGHTS_LIMIT, async || {
            let (_, answer) = self.admin("POST", path, Some(&question)).await.ok()?;
            (answer["status"]["allowed"] == true).then_some(())
        })
        .await
    }

    /// A token of a service account, bound to it as TokenRequest does, but of any lifetime. The server takes it for a minute longer
    /// (the leeway for clocks), and for 10 s more after it has seen it.
    pub async fn token(&self, namespace: &str, account: &str, lifetime: Duration) -> Result<String> {
        self.token_until(namespace, account, SystemTime::now() + lifetime).await
    }

    /// The same with its end, which may be over.
    pub async fn token_until(&self, namespace: &str, account: &str, until: SystemTime) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}");
        let (status, found) = self.admin("GET", &path, None).await?;
        ensure!(status == 200, "no account {account}: {status} {found}");
        let uid = found["metadata"]["uid"].as_str().context("an account without a UID")?;
        self.credentials.token(&Account { namespace, name: account, uid }, until)
    }

    /// Lays out what a pod finds in `/var/run/secrets/kubernetes.io/serviceaccount`: `token`, `ca.crt` and `namespace`. Called
    /// again it replaces them at once, as kubelet does.
    pub fn write_service_account_dir(&self, folder: &Path, token: &str, namespace: &str) -> Result<()> {
        let written = self.credentials.write_volume(folder, token, namespace);
        written.with_context(|| format!("cannot write {}", folder.display()))
    }

    async fn create(&self, path: &str, object: &Value) -> Result<Value> {
        let (status, made) = self.admin("POST", path, Some(object)).await?;
        ensure!(status == 201, "POST {path}: {status} {made}");
        Ok(made)
    }
}

fn roles(namespace: &str, kind: &str) -> String {
    format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/{kind}")
}
