//! The runtime of a node, with a real containerd, and the mirror that runs there.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use peili_lab::containerd::Options;
use peili_lab::node::{Plan, binary};
use peili_lab::scratch::Scratch;
use peili_lab::{Containerd, Generation, Requirement, wait};
use serde_json::json;

use super::{Doctor, SOON};
use crate::Case;

pub(super) fn cases() -> Vec<Case> {
    let needs = [Requirement::Root, Requirement::Containerd(Generation::V2)];
    vec![
        Case::new("doctor::what_stops_a_runtime_is_named", &needs, runtime),
        Case::new("doctor::the_mirror_that_runs_is_heard", &[], mirror),
    ]
}

const CONFIG: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n";
const DISCARD: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true\n\
                       [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n";

/// A node's files in a folder.
struct Host {
    scratch: Scratch,
}

impl Host {
    fn path(&self, path: &str) -> PathBuf {
        self.scratch.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn root(&self) -> String {
        self.path("").display().to_string()
    }

    /// As the fix says.
    fn configure(&self, doctor: &Doctor) {
        let mut command = Command::new(binary().unwrap());
        command
            .args(["configure", "--root", &self.root(), "--data-dir"])
            .arg(doctor.scratch.path().join("data"));
        let output = command.env_remove("PEILI_CONFIG").output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

async fn runtime() {
    let mut containerd = Containerd::start(Options::new(Generation::V2)).await.unwrap();
    let host = Host { scratch: Scratch::new().unwrap() };
    host.write("etc/containerd/config.toml", CONFIG);
    let config = json!({
        "store": {"source": "containerd", "socket": containerd.socket()},
        "election": {"backend": "gossip"},
    });
    let doctor = Doctor::new(&config).with_arguments(&["--root", &host.root()]);
    let found = doctor.finds("no folder of hosts", &["hosts-folder-missing"]).await;
    assert!(found.verdict("hosts-folder-missing")["fix"].to_string().contains("peili configure"));
    std::fs::create_dir_all(host.path("etc/containerd/certs.d")).unwrap();
    doctor.finds("not set up", &["registry-not-set-up"]).await;
    host.configure(&doctor);
    doctor.finds("set up, as the fix says", &[]).await;

    host.write("etc/containerd/config.toml", DISCARD);
    doctor.finds("layers are forgotten", &["layers-discarded"]).await;
    host.write("etc/containerd/config.toml", "version = 2\n");
    doctor.finds("no folder is read", &["registry-ignored"]).await;
    host.write("etc/containerd/config.toml", "version = [\n");
    doctor.finds("no TOML", &["registry-unreadable"]).await;
    host.write("etc/containerd/config.toml", CONFIG);
    let hosts = host.path("etc/containerd/certs.d/_default/hosts.toml");
    let written = std::fs::read_to_string(&hosts).unwrap();
    std::fs::write(&hosts, written.replacen("capabilities", "ca = \"gone.crt\"\ncapabilities", 1)).unwrap();
    doctor.finds("a certificate is missing", &["registry-file-missing"]).await;
    std::fs::write(&hosts, &written).unwrap();
    std::fs::remove_dir_all(host.path("etc/containerd/certs.d")).unwrap();
    doctor.finds("the folder was wiped", &["hosts-folder-missing"]).await;
    host.configure(&doctor);
    doctor.finds("set up again", &[]).await;

    let empty = Scratch::new().unwrap();
    let root = empty.path().display().to_string();
    let blind = Doctor::new(&config).with_arguments(&["--root", &root]);
    blind.finds("no file of the host is seen", &["runtime-unseen"]).await;

    // k3s makes its folder anew at each start.
    let k3s = Host { scratch: Scratch::new().unwrap() };
    k3s.write("etc/rancher/k3s/config.yaml", "{}\n");
    std::fs::create_dir_all(k3s.path("var/lib/rancher/k3s/agent/etc/containerd/certs.d")).unwrap();
    Doctor::new(&config)
        .with_arguments(&["--root", &k3s.root()])
        .finds("a distribution's own folder", &["registry-owned"])
        .await;

    // Somebody else than root.
    let mut nobody = Doctor::new(&config).with_arguments(&["--root", &host.root()]);
    nobody.uid = Some(65_534);
    for folder in [nobody.scratch.path().to_owned(), host.path("")] {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    nobody.finds("the socket is root's", &["containerd-denied"]).await;

    containerd.process().unwrap().pause().unwrap();
    doctor.finds("containerd stands still", &["containerd-silent"]).await;
    containerd.process().unwrap().resume().unwrap();
    containerd.kill();
    // The folder's fault is another one.
    host.write("etc/containerd/config.toml", DISCARD);
    doctor.finds("containerd is gone, and forgets layers", &["containerd-down", "layers-discarded"]).await;
    host.write("etc/containerd/config.toml", CONFIG);
    std::fs::remove_file(containerd.socket()).unwrap();
    doctor.finds("its socket, too", &["containerd-absent"]).await;
}

async fn mirror() {
    let scratch = Scratch::new().unwrap();
    let socket = scratch.path().join("containerd.sock");
    let root = scratch.path().display().to_string();
    crate::cli::layout(&scratch.path().join("layout"), &[]);
    let layout = format!("layout:{}", scratch.path().join("layout").display());
    let [mut one, mut other, mut third] =
        [("one", layout.as_str()), ("other", &layout), ("third", "containerd")]
            .map(|(name, store)| Plan::on_loopback(name, store).unwrap());
    third.merge(&json!({"store": {"socket": socket}}));
    let mut doctors = Vec::new();
    for plan in [&mut one, &mut other, &mut third] {
        plan.merge(&json!({"election": {"backend": "auto"}}));
        let doctor = Doctor::new(&json!({
            "admin": {"listen": [format!("127.0.0.1:{}", plan.ports.admin)]},
            "election": {"backend": "gossip"},
        }));
        doctors.push(doctor.with_arguments(&["--root", &root]));
    }
    let mut pair = vec![one, other];
    Plan::introduce(&mut pair);
    let [one, other] = pair.try_into().unwrap_or_else(|_| panic!("two"));
    let mut one = one.start().await.unwrap();
    let until = async |doctor: &Doctor, what: &str, codes: &[&str]| {
        wait::until(what, SOON, async || (doctor.run().await.codes == super::sorted(codes)).then_some(()))
            .await
            .unwrap();
        doctor.finds(what, codes).await
    };
    let found = until(&doctors[0], "nobody else is there", &["mirror-alone"]).await;
    assert!(found.verdict("mirror-alone")["evidence"].to_string().contains("unreached"), "{found:?}");
    let _other = other.start().await.unwrap();
    let found = until(&doctors[0], "two know each other", &[]).await;
    assert!(found.report["seen"].to_string().contains("2 members"), "{found:?}");

    // A file that is no component, and its end.
    let broken = scratch.path().join("broken.wasm");
    std::fs::write(&broken, "no component").unwrap();
    one.plan.merge(&json!({"policies": {"registry": [{"name": "broken", "path": broken}]}}));
    one.rewrite().unwrap();
    let found = until(&doctors[0], "its policy is none", &["policies-refused"]).await;
    assert!(found.verdict("policies-refused")["evidence"].to_string().contains("broken"), "{found:?}");
    one.plan.merge(&json!({"policies": {"registry": []}}));
    one.rewrite().unwrap();
    until(&doctors[0], "none is wanted any more", &[]).await;
    drop(one);

    let fourth = Plan::on_loopback("fourth", &layout).unwrap();
    std::fs::write(fourth.data_dir().join("identity.key"), "no key").unwrap();
    let mut doctor = Doctor::of(&fourth);
    doctor.merge(&json!({"election": {"backend": "gossip"}}));
    let _fourth = fourth.start().await.unwrap();
    let found = until(&doctor, "its identity is damaged", &["identity-passing", "mirror-alone"]).await;
    assert!(
        found.verdict("identity-passing")["evidence"].to_string().contains("holds no identity"),
        "{found:?}"
    );

    // It is not ready without containerd, and says why.
    let _third = third.launch().unwrap();
    wait::until("its store", Duration::from_secs(30), async || {
        (doctors[2].run().await.codes == super::sorted(&["mirror-alone", "mirror-store"])).then_some(())
    })
    .await
    .unwrap();
    // What is said of containerd is not said again of the store.
    doctors[2].merge(&json!({"store": {"source": "containerd", "socket": socket}}));
    let _ = doctors[2].finds("without a socket", &["containerd-absent", "mirror-alone"]).await;
    // What kubelet makes of a path that is not there.
    std::fs::create_dir(&socket).unwrap();
    let _ = doctors[2].finds("a folder for a socket", &["containerd-absent", "mirror-alone"]).await;
}
