//! An API server: the real one where this machine has it, else the laboratory's stand-in. It can be made to stand still.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use peili_lab::kubernetes::{Options, Part, Rule, StandIn};
use peili_lab::netns::NetworkNode;
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement, require};
use serde_json::{Value, json};

/// Of Peili's objects, and the name of its account.
const PEILI: &str = "peili";
/// Its Role.
const ROLE: &str = "coordinates";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/peili";
/// Longer than any demonstration.
const TOKEN_TIME: Duration = Duration::from_secs(3_600);

/// One of the two.
pub(crate) enum Api {
    /// With the Role as it was first, and where credentials are.
    Real(Box<ApiServer>, Value, Scratch),
    StandIn(Box<StandIn>),
}

impl Api {
    /// Starts it with an account that may what a coordinator has any use for, by these leases. `place`: where; `None`: on loopback.
    pub(crate) async fn start(place: Option<&NetworkNode>, leases: &[String]) -> Result<Self> {
        if require(&[Requirement::Kubernetes]).is_err() {
            let place = place.map(|place| (&place.namespace, place.address()));
            return Ok(Self::StandIn(Box::new(StandIn::start(place, PEILI)?)));
        }
        let options = match place {
            Some(place) => Options::in_namespace(&place.namespace, place.address()),
            None => Options::on_loopback(),
        };
        let server = ApiServer::start(options).await?;
        server.namespace(PEILI).await?;
        server.service_account(PEILI, PEILI).await?;
        let names: Vec<&str> = leases.iter().map(String::as_str).collect();
        server.role(PEILI, ROLE, &Rule::of_coordinator(&names)).await?;
        server.role_binding(PEILI, ROLE, PEILI).await?;
        let (status, role) = server.admin("GET", &format!("{RBAC}/roles/{ROLE}"), None).await?;
        ensure!(status == 200, "the Role: {status} {role}");
        Ok(Self::Real(Box::new(server), role, Scratch::new()?))
    }

    /// `https://ADDRESS:PORT`
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Real(server, ..) => server.url(),
            Self::StandIn(server) => server.url(),
        }
    }

    /// A folder with the account's token.
    pub(crate) async fn credentials(&self) -> Result<PathBuf> {
        match self {
            Self::Real(server, _, scratch) => {
                let token = server.token(PEILI, PEILI, TOKEN_TIME).await?;
                let folder = scratch.path().join("account");
                server.write_service_account_dir(&folder, &token, PEILI)?;
                Ok(folder)
            }
            Self::StandIn(server) => server.credentials(),
        }
    }

    /// Which one it is, for people.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Real(server, ..) => format!("kube-apiserver {}", server.version()),
            Self::StandIn(_) => {
                "a stand-in for the API server (this machine has no kube-apiserver)".to_owned()
            }
        }
    }

    /// From now on it answers nothing (`true`), or all as ever.
    pub(crate) fn freeze(&self, freezes: bool) -> Result<()> {
        match self {
            Self::Real(server, ..) if freezes => server.freeze(Part::Server),
            Self::Real(server, ..) => server.thaw(Part::Server),
            Self::StandIn(server) => {
                server.freeze(freezes);
                Ok(())
            }
        }
    }

    /// Takes the right to replace leases from the account.
    pub(crate) async fn take_right(&self) -> Result<()> {
        match self {
            Self::Real(_, role, _) => {
                let mut role = role.clone();
                let verbs = role["rules"][0]["verbs"].as_array_mut().context("a Role without verbs")?;
                verbs.retain(|verb| verb != "update");
                self.write_role(role).await
            }
            Self::StandIn(server) => {
                server.forbid(Some(("update", "leases")));
                Ok(())
            }
        }
    }

    /// All is as at the start: what [`Self::apply`] made is gone, too.
    pub(crate) async fn give_right_back(&self) -> Result<()> {
        for kind in ["roles", "rolebindings"] {
            let (status, all) = self.admin("GET", &format!("{RBAC}/{kind}"), None).await?;
            ensure!(status == 200, "{kind}: {status} {all}");
            let names = all["items"].as_array().into_iter().flatten();
            for name in names.filter_map(|object| object["metadata"]["name"].as_str()) {
                if !name.starts_with(ROLE) {
                    self.admin("DELETE", &format!("{RBAC}/{kind}/{name}"), None).await?;
                }
            }
        }
        match self {
            Self::Real(_, role, _) => self.write_role(role.clone()).await,
            Self::StandIn(server) => {
                server.forbid(None);
                Ok(())
            }
        }
    }

    /// Makes a Role or a RoleBinding, as `kubectl apply` does.
    pub(crate) async fn apply(&self, object: &Value) -> Result<()> {
        let kind = match object["kind"].as_str() {
            Some("Role") => "roles",
            Some("RoleBinding") => "rolebindings",
            _ => bail!("no Role and no RoleBinding: {object}"),
        };
        let (status, made) = self.admin("POST", &format!("{RBAC}/{kind}"), Some(object)).await?;
        ensure!(status == 201, "{kind}: {status} {made}");
        Ok(())
    }

    async fn write_role(&self, mut role: Value) -> Result<()> {
        role["metadata"] = json!({"name": ROLE});
        let (status, written) = self.admin("PUT", &format!("{RBAC}/roles/{ROLE}"), Some(&role)).await?;
        ensure!(status == 200, "the Role: {status} {written}");
        Ok(())
    }

    async fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        match self {
            Self::Real(server, ..) => server.admin(method, path, body).await,
            Self::StandIn(server) => server.admin(method, path, body).await,
        }
    }
}
