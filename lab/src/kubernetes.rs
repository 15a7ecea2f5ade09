//! A Kubernetes API server of one's own: the real kube-apiserver with an etcd, in a namespace or on loopback, with accounts,
//! tokens and an audit log. No kubelet, scheduler or controller: objects stay as they are written, and nothing is collected.
//!
//! Whatever exists in kube-apiserver 1.20 and in 1.34 is used and nothing else, so that any in between will do.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use self::credentials::{Credentials, ISSUER};
use crate::netns::Namespace;
use crate::process::Process;
use crate::requirements::kubernetes;
use crate::scratch::Scratch;
use crate::{http, wait};

mod audit;
mod client;
mod credentials;
mod objects;
mod standin;

pub use audit::Request;
pub use client::Client;
pub use objects::Rule;
pub use standin::StandIn;

/// Both are ready within a few seconds; a busy machine gets more.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How often it is asked: each time is a handshake, for a server that is busy starting.
const READY_POLL: Duration = Duration::from_millis(40);
/// Where the server listens in a namespace of its own.
const PORT: u16 = 6443;
/// The address of the Service `kubernetes`, in the range below. The certificate has it; that it leads anywhere is the test's
/// business.
pub const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const SERVICE_RANGE: &str = "10.96.0.0/16";
const SERVICE_RANGE_V6: &str = "fd00:10:96::/112";
/// Admission that is for pods and what comes with them. Tests have none, and some of it would wait for controllers.
/// Of what is on by itself namespaces and webhooks remain.
const NO_ADMISSION: &str = "CertificateApproval,CertificateSigning,CertificateSubjectRestriction,DefaultIngressClass,\
                            DefaultStorageClass,DefaultTolerationSeconds,LimitRanger,PersistentVolumeClaimResize,Priority,\
                            RuntimeClass,ServiceAccount,StorageObjectInUseProtection,TaintNodesByCondition";
/// Where betas are on by themselves (before 1.24): their descriptions, and those of what only controllers act upon, are a third of
/// the time to its start.
const FEW_GROUPS: &str = "api/beta=false,api/alpha=false,autoscaling/v1=false,batch/v1=false,certificates.k8s.io/v1=false,\
                          networking.k8s.io/v1=false,node.k8s.io/v1=false,storage.k8s.io/v1=false";

/// How one is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it runs. None: on loopback of this machine.
    pub namespace: Option<Namespace>,
    /// Where it is reached.
    pub address: IpAddr,
    /// Its port. None: a free one on loopback, 6443 in a namespace.
    pub port: Option<u16>,
    /// Further names and addresses in its certificate.
    pub names: Vec<String>,
    /// Further flags of kube-apiserver, which count more than those that it has anyhow: `--runtime-config=api/beta=true`.
    pub flags: Vec<String>,
}

/// One of its two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// kube-apiserver.
    Server,
    /// etcd.
    Storage,
}

/// A running API server. Dropped: gone, with its files.
#[derive(Debug)]
pub struct ApiServer {
    namespace: Option<Namespace>,
    address: SocketAddr,
    storage_address: SocketAddr,
    version: String,
    flags: Vec<String>,
    credentials: Credentials,
    admin: Client,
    server: Option<Process>,
    storage: Option<Process>,
    // After the processes, so that it is dropped after them.
    scratch: Scratch,
}

impl Options {
    /// On loopback, at a free port.
    pub fn on_loopback() -> Self {
        Self::new(None, Ipv4Addr::LOCALHOST.into())
    }

    /// In a namespace, reached by others at `address`. It listens at all addresses of the namespace.
    pub fn in_namespace(namespace: &Namespace, address: IpAddr) -> Self {
        Self::new(Some(namespace.clone()), address)
    }

    fn new(namespace: Option<Namespace>, address: IpAddr) -> Self {
        Self { namespace, address, port: None, names: Vec::new(), flags: Vec::new() }
    }

    /// Names and addresses by which its certificate is valid too.
    #[must_use]
    pub fn named(mut self, names: &[&str]) -> Self {
        self.names.extend(names.iter().map(ToString::to_string));
        self
    }

    fn ports(&self) -> Result<(u16, u16)> {
        if self.namespace.is_some() {
            return Ok((self.port.unwrap_or(PORT), 2379));
        }
        // Both are held until both are known, so that they differ.
        let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (server, storage) = (free()?, free()?);
        let port = self.port.map_or_else(|| server.local_addr().map(|address| address.port()), Ok)?;
        Ok((port, storage.local_addr()?.port()))
    }
}

impl ApiServer {
    /// Starts one and waits until it is ready.
    pub async fn start(options: Options) -> Result<Self> {
        let scratch = Scratch::new()?;
        let (port, storage_port) = options.ports()?;
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "127.0.0.1",
            "::1",
        ];
        let mut names: Vec<String> = names.iter().map(ToString::to_string).collect();
        names.extend([SERVICE_ADDRESS.to_string(), options.address.to_string()]);
        names.extend(options.names);
        let credentials = Credentials::make(scratch.path(), &names)?;
        let address = SocketAddr::new(options.address, port);
        let admin = Client::new(address, options.namespace.clone(), credentials.admin());
        let mut server = Self {
            namespace: options.namespace,
            address,
            storage_address: (Ipv4Addr::LOCALHOST, storage_port).into(),
            version: version(&program("kube-apiserver")?)?,
            flags: options.flags,
            credentials,
            admin,
            server: None,
            storage: None,
            scratch,
        };
        server.write_files()?;
        server.start_again().await?;
        Ok(server)
    }

    /// Where it is reached.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `https://ADDRESS:PORT`
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Its version: `1.20.2`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether it is of this minor version of 1, or of a later one.
    pub fn is_at_least(&self, minor: u32) -> bool {
        let is = self.version.split('.').nth(1).and_then(|minor| minor.parse().ok());
        is.is_some_and(|is: u32| is >= minor)
    }

    /// The certificate of its authority, which a client verifies it by.
    pub fn authority(&self) -> PathBuf {
        self.scratch.path().join("ca.crt")
    }

    /// A kubeconfig of its administrator, for programs that take one.
    pub fn kubeconfig(&self) -> PathBuf {
        self.scratch.path().join("kubeconfig")
    }

    /// A process; `None` between [`Self::stop_hard`] and [`Self::start_again`].
    pub fn process(&self, part: Part) -> Option<&Process> {
        match part {
            Part::Server => self.server.as_ref(),
            Part::Storage => self.storage.as_ref(),
        }
    }

    /// SIGKILL. Without its storage the server lives and answers, mostly with errors.
    pub fn stop_hard(&mut self, part: Part) {
        match part {
            Part::Server => self.server = None,
            Part::Storage => self.storage = None,
        }
    }

    /// SIGSTOP: connections are taken by the kernel, and nothing is answered.
    pub fn freeze(&self, part: Part) -> Result<()> {
        self.process(part).context("it was stopped")?.pause()
    }

    /// SIGCONT.
    pub fn thaw(&self, part: Part) -> Result<()> {
        self.process(part).context("it was stopped")?.resume()
    }

    /// Starts what was stopped, with the same data, port and keys, and waits until it is ready.
    pub async fn start_again(&mut self) -> Result<()> {
        if self.storage.is_none() {
            self.storage = Some(self.spawn_storage()?);
        }
        // The server would look for it once a second.
        let (namespace, address) = (self.namespace.clone(), self.storage_address);
        ready("etcd", &mut self.storage, async || {
            let answer = http::get(namespace.as_ref(), address, "/health").await?;
            ensure!(answer.status == 200, "{}", answer.text());
            Ok(())
        })
        .await?;
        if self.server.is_none() {
            self.server = Some(self.spawn_server()?);
        }
        let admin = self.admin.clone();
        ready("kube-apiserver", &mut self.server, async || {
            let (status, said) = admin.send("GET", "/readyz", None).await?;
            ensure!(status == 200, "{said}");
            Ok(())
        })
        .await
    }

    /// A request of the administrator, who may do everything: the answer's status and body.
    pub async fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        self.admin.send(method, path, body).await
    }

    /// A client that shows this token, in the server's namespace.
    pub fn client(&self, token: &str) -> Client {
        Client::new(self.address, self.namespace.clone(), self.credentials.nobody()).with_token(token)
    }

    /// What it was asked so far, by its audit log, oldest first; without what it asks itself and without health. An entry is
    /// written as the answer ends, so that it may be there shortly after it.
    pub fn requests(&self, is_wanted: impl Fn(&Request) -> bool) -> Result<Vec<Request>> {
        let log = fs::read_to_string(self.audit_log()).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(String::new()),
            _ => Err(error),
        })?;
        Ok(audit::read(&log)?.into_iter().filter(is_wanted).collect())
    }

    fn audit_log(&self) -> PathBuf {
        self.scratch.path().join("audit.json")
    }

    fn write_files(&self) -> Result<()> {
        let path = |name: &str| self.scratch.path().join(name);
        fs::write(path("audit-policy"), audit::policy().to_string())?;
        let cluster = json!({"server": self.url(), "certificate-authority": path("ca.crt")});
        let user = json!({"client-certificate": path("admin.crt"), "client-key": path("admin.key")});
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        });
        fs::write(self.kubeconfig(), config.to_string()).context("cannot write the kubeconfig")
    }

    fn spawn_storage(&self) -> Result<Process> {
        let mut command = Command::new(program("etcd")?);
        let url = format!("http://{}", self.storage_address);
        command.arg("--data-dir").arg(self.scratch.path().join("data"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        // It has no peers, but wants a port for them.
        command.args(["--listen-peer-urls", "http://127.0.0.1:0"]);
        // A killed process loses nothing by that, and the machine is not switched off.
        command.arg("--unsafe-no-fsync");
        self.spawn("etcd", command)
    }

    fn spawn_server(&self) -> Result<Process> {
        let path = |name: &str| self.scratch.path().join(name).display().to_string();
        let address = self.address.ip();
        let listen = match address {
            address if self.namespace.is_none() => address.to_string(),
            IpAddr::V4(_) => "0.0.0.0".to_owned(),
            IpAddr::V6(_) => "::".to_owned(),
        };
        let range = if address.is_ipv4() { SERVICE_RANGE } else { SERVICE_RANGE_V6 };
        let flags = [
            ("etcd-servers", format!("http://{}", self.storage_address)),
            ("bind-address", listen),
            ("secure-port", self.address.port().to_string()),
            ("advertise-address", address.to_string()),
            ("service-cluster-ip-range", range.to_owned()),
            // Nobody asks for the endpoints of the Service `kubernetes`, and loopback may be none.
            ("endpoint-reconciler-type", "none".to_owned()),
            ("cert-dir", path("certificates")),
            ("tls-cert-file", path("server.crt")),
            ("tls-private-key-file", path("server.key")),
            ("client-ca-file", path("ca.crt")),
            ("service-account-issuer", ISSUER.to_owned()),
            ("service-account-key-file", path("accounts.pub")),
            ("service-account-signing-key-file", path("accounts.key")),
            ("authorization-mode", "RBAC".to_owned()),
            ("disable-admission-plugins", NO_ADMISSION.to_owned()),
            ("audit-policy-file", path("audit-policy")),
            ("audit-log-path", self.audit_log().display().to_string()),
            ("audit-log-mode", "blocking".to_owned()),
            // Few ask it, and its queues are objects that would be made first.
            ("enable-priority-and-fairness", "false".to_owned()),
            ("profiling", "false".to_owned()),
        ];
        let mut command = Command::new(program("kube-apiserver")?);
        command.args(flags.map(|(name, value)| format!("--{name}={value}")));
        if !self.is_at_least(24) {
            command.arg(format!("--runtime-config={FEW_GROUPS}"));
        }
        command.args(&self.flags);
        // Its memory matters less than its time.
        command.env("GOGC", "400");
        self.spawn("kube-apiserver", command)
    }

    fn spawn(&self, name: &str, mut command: Command) -> Result<Process> {
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(variable);
        }
        command.current_dir(self.scratch.path());
        let log = self.scratch.path().join(format!("{name}.log"));
        Process::spawn(name, command, &log, self.namespace.as_ref())
    }
}

/// Waits until `is_ready` is fine with it.
async fn ready(
    name: &str,
    process: &mut Option<Process>,
    is_ready: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let ready = wait::until(name, READY_LIMIT, async || match is_ready().await {
        Ok(()) => Some(Ok(())),
        Err(_) if process.as_mut().is_some_and(Process::is_running) => {
            tokio::time::sleep(READY_POLL).await;
            None
        }
        Err(error) => Some(Err(error.context("it ended"))),
    })
    .await
    .and_then(|ready| ready);
    let log = || process.as_ref().map(Process::log_tail).unwrap_or_default();
    ready.with_context(|| format!("{name} does not start; its log:\n{}", log()))
}

/// One of the two programs.
fn program(name: &str) -> Result<PathBuf> {
    Ok(kubernetes().context("no kube-apiserver and etcd on this machine")?.join(name))
}

/// `Kubernetes v1.20.2` is 1.20.2.
fn version(server: &Path) -> Result<String> {
    let output = Command::new(server).arg("--version").output().context("cannot run kube-apiserver")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match said.strip_prefix("Kubernetes v") {
        Some(version) => Ok(version.to_owned()),
        None => bail!("kube-apiserver says it is `{said}`"),
    }
}
