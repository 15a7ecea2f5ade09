//! An API server: the real one where this machine has it, else the laboratory's stand-in. It can be made to stand still.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use peili_lab::kubernetes::{Options, Part, Rule, StandIn};
use peili_lab::netns::NetworkNode;
use peili_lab::scratch::Scratch;
use peili_lab::{ApiServer, Requirement, require};

/// Of Peili's objects, and the name of its account.
const PEILI: &str = "peili";
/// Longer than any demonstration.
const TOKEN_TIME: Duration = Duration::from_secs(3_600);

/// One of the two.
pub(crate) enum Api {
    Real(Box<ApiServer>, Scratch),
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
        server.role(PEILI, "coordinates", &Rule::of_coordinator(&names)).await?;
        server.role_binding(PEILI, "coordinates", PEILI).await?;
        Ok(Self::Real(Box::new(server), Scratch::new()?))
    }

    /// `https://ADDRESS:PORT`
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Real(server, _) => server.url(),
            Self::StandIn(server) => server.url(),
        }
    }

    /// A folder with the account's token.
    pub(crate) async fn credentials(&self) -> Result<PathBuf> {
        match self {
            Self::Real(server, scratch) => {
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
            Self::Real(server, _) => format!("kube-apiserver {}", server.version()),
            Self::StandIn(_) => {
                "a stand-in for the API server (this machine has no kube-apiserver)".to_owned()
            }
        }
    }

    /// From now on it answers nothing (`true`), or all as ever.
    pub(crate) fn freeze(&self, freezes: bool) -> Result<()> {
        match self {
            Self::Real(server, _) if freezes => server.freeze(Part::Server),
            Self::Real(server, _) => server.thaw(Part::Server),
            Self::StandIn(server) => {
                server.freeze(freezes);
                Ok(())
            }
        }
    }
}
