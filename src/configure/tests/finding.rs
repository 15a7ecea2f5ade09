//! Which containerd is found, and what is said about it.

use super::super::find::Root;
use super::*;

fn node(files: &[(&str, &str)]) -> Result<Node, Error> {
    let host = Host::new(files);
    Node::find(&Root::new(host.root.path().to_owned()), false)
}

fn found(files: &[(&str, &str)]) -> (Distribution, String, String, Vec<Code>) {
    let node = node(files).unwrap();
    let folders: Vec<_> = node.config_path.iter().map(|folder| folder.display().to_string()).collect();
    let place = format!("{} {}", node.socket.display(), node.content_root.parent().unwrap().display());
    (node.distribution, place, folders.join(":"), node.findings.iter().map(|finding| finding.code).collect())
}

#[test]
fn distributions() {
    let check =
        |files: &[(&str, &str)], distribution: Distribution, place: &str, folders: &str, codes: &[Code]| {
            assert_eq!(
                found(files),
                (distribution, place.to_owned(), folders.to_owned(), codes.to_vec()),
                "{files:?}"
            );
        };
    let plain = "/run/containerd/containerd.sock /var/lib/containerd";
    let certs = "/etc/containerd/certs.d";
    let v3 = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d'\n";
    check(&[("etc/containerd/config.toml", v3)], Distribution::Plain, plain, certs, &[]);
    check(&[("var/lib/containerd/x", "")], Distribution::Plain, plain, "", &[Code::ConfigPath]);
    check(
        &[("usr/lib/os-release", "NAME=Talos\nID=talos\n"), ("etc/cri/conf.d/hosts/x", "")],
        Distribution::Talos,
        plain,
        "/etc/cri/conf.d/hosts",
        &[],
    );
    check(
        &[
            ("etc/os-release", "ID=\"talos\"\n"),
            ("etc/cri/containerd.toml", "version = 3\nimports = [\"/etc/cri/conf.d/cri.toml\"]\n"),
            (
                "etc/cri/conf.d/cri.toml",
                "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\ndiscard_unpacked_layers = true\n\
                 [plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/cri/conf.d/hosts\"\n",
            ),
        ],
        Distribution::Talos,
        plain,
        "/etc/cri/conf.d/hosts",
        &[Code::Discard],
    );
    check(&[("etc/os-release", "ID=bottlerocket\n")], Distribution::Bottlerocket, plain, certs, &[]);
    let k3s = "/run/k3s/containerd/containerd.sock /var/lib/rancher/k3s/agent/containerd";
    let k3s_certs = "/var/lib/rancher/k3s/agent/etc/containerd/certs.d";
    check(&[("etc/rancher/k3s/k3s.yaml", "")], Distribution::K3s, k3s, k3s_certs, &[]);
    check(
        &[("var/lib/rancher/k3s/agent/x", ""), ("etc/rancher/k3s/config.yaml", "embedded-registry: true\n")],
        Distribution::K3s,
        k3s,
        k3s_certs,
        &[Code::EmbeddedMirror],
    );
    check(
        &[
            ("etc/rancher/k3s/config.yaml", "data-dir: /data\n"),
            (
                "etc/systemd/system/k3s.service",
                "ExecStart=/usr/local/bin/k3s \\\n server --embedded-registry\n",
            ),
        ],
        Distribution::K3s,
        "/run/k3s/containerd/containerd.sock /data/agent/containerd",
        "/data/agent/etc/containerd/certs.d",
        &[Code::EmbeddedMirror],
    );
    check(
        &[
            ("etc/rancher/rke2/config.yaml.d/a.yaml", "embedded-registry: true\n"),
            ("etc/containerd/config.toml", v3),
        ],
        Distribution::Rke2,
        "/run/k3s/containerd/containerd.sock /var/lib/rancher/rke2/agent/containerd",
        "/var/lib/rancher/rke2/agent/etc/containerd/certs.d",
        &[Code::EmbeddedMirror],
    );
    let k0s = "/run/k0s/containerd.sock /var/lib/k0s/containerd";
    check(&[("etc/k0s/containerd.toml", "version = 3\n")], Distribution::K0s, k0s, "", &[Code::ConfigPath]);
    check(
        &[
            ("etc/k0s/containerd.toml", "version = 3\nimports = ['containerd.d/*.toml']\n"),
            (
                "etc/k0s/containerd.d/hosts.toml",
                "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/k0s/certs.d'\n",
            ),
        ],
        Distribution::K0s,
        k0s,
        "/etc/k0s/certs.d",
        &[],
    );
    check(
        &[(
            "var/snap/microk8s/current/args/containerd.toml",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"${SNAP_DATA}/args/certs.d\"\n",
        )],
        Distribution::Microk8s,
        "/var/snap/microk8s/common/run/containerd.sock /var/snap/microk8s/common/var/lib/containerd",
        "/var/snap/microk8s/current/args/certs.d",
        &[],
    );
    assert!(matches!(node(&[]), Err(Error::NoRuntime(_))));
}

#[test]
fn containerds_own_configuration() {
    let check = |config: &str, folders: &str, codes: &[Code]| {
        let (_, _, found, all) = found(&[("etc/containerd/config.toml", config)]);
        assert_eq!((found.as_str(), &all[..]), (folders, codes), "{config}");
    };
    let v2 = |rest: &str| format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n{rest}");
    let v3 = |rest: &str| format!("version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n{rest}");
    let two = "config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n";
    let both = "/etc/containerd/certs.d:/etc/docker/certs.d";
    let one = "config_path = '/a'\n";
    check("", "", &[Code::ConfigPath]);
    check(&v2("config_path = \"\"\n"), "", &[Code::ConfigPath]);
    check(&v2(two), both, &[]);
    check(&v3(two), both, &[Code::ConfigPathList]);
    // By itself, CRI takes both.
    check(
        &format!("{}[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n", v3(two)),
        both,
        &[],
    );
    check(
        &format!("{}[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n", v3(two)),
        both,
        &[Code::Discard],
    );
    check(
        &format!(
            "{}[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true\n",
            v2(one)
        ),
        "/a",
        &[Code::Discard],
    );
    let mirrors = "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]\n";
    check(&v2(mirrors), "", &[Code::ConfigPath]);
    check(&v2(&format!("{one}{mirrors}")), "/a", &[Code::Mirrors]);
    check(&format!("disabled_plugins = [\"cri\"]\n{}", v2(one)), "/a", &[Code::CriDisabled]);
    check("[plugins.cri.registry]\nconfig_path = \"/a\"\n", "/a", &[]);
    check(
        "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = '/s'\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a'\n",
        "/a",
        &[],
    );
    // The section of another version is not read.
    check(
        "version = 3\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a\"\n",
        "",
        &[Code::ConfigPath],
    );
    check(
        "version = 2\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/a\"\n",
        "",
        &[Code::ConfigPath],
    );
}

#[test]
fn what_to_write_is_said_exactly() {
    let host = Host::new(&[(
        "etc/containerd/config.toml",
        "version = 2\nroot = \"/data\"\n[grpc]\naddress = \"/s.sock\"\n",
    )]);
    let report = host.configure(&["a.io"]);
    assert!(!report.ready, "written, and not read");
    insta::assert_snapshot!(report.render(true), @r#"
    containerd: socket /s.sock, content /data/io.containerd.content.v1.content, config_path unset
    wrote /etc/containerd/certs.d/a.io/hosts.toml
    problem: /etc/containerd/config.toml: config_path is not set: containerd before 2.2 reads no hosts.toml then, and later ones take two folders by default, which their transfer service takes for one (containerd issue 12808)
      hint: let /etc/containerd/config.toml have these lines, and restart containerd:
      [plugins."io.containerd.grpc.v1.cri".registry]
        config_path = "/etc/containerd/certs.d"
    "#);
}

#[test]
fn imports() {
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\"]\nmax_concurrent_downloads = 3\n";
    let registry = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a\"\n";
    let load = |version: i64, first: &str, second: &str| {
        let main = format!(
            "version = {version}\nimports = [\"conf.d/*.toml\", \"/etc/containerd/config.toml\", \"/absent\"]\n{first}"
        );
        let import = format!("version = {version}\nimports = [\"../config.toml\"]\n{second}");
        found(&[
            ("etc/containerd/config.toml", &main),
            ("etc/containerd/conf.d/x.toml", &import),
            ("etc/containerd/conf.d/no.txt", "wrong"),
        ])
    };
    let (_, _, folders, codes) = load(2, "", registry);
    assert_eq!((folders.as_str(), &codes[..]), ("/a", &[][..]));
    // 1.x replaces the plugin's whole section.
    let (_, _, folders, codes) = load(2, registry, cri);
    assert_eq!((folders.as_str(), &codes[..]), ("/a", &[Code::Imports][..]));
    let error = node(&[("etc/containerd/config.toml", "version = 2\n\n[x\n")]).unwrap_err().to_string();
    assert!(error.starts_with("/etc/containerd/config.toml:3: "), "{error}");
}

#[test]
fn absolute_links_begin_at_the_prefix() {
    let host = Host::new(&[(
        "data/containerd.toml",
        "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/certs'\n",
    )]);
    fs::create_dir_all(host.path("etc/containerd")).unwrap();
    fs::create_dir_all(host.path("data/certs")).unwrap();
    std::os::unix::fs::symlink("/data/containerd.toml", host.path("etc/containerd/config.toml")).unwrap();
    std::os::unix::fs::symlink("data/../../../data/certs", host.path("certs")).unwrap();
    std::os::unix::fs::symlink("loop", host.path("loop")).unwrap();
    let before = host.snapshot();
    host.configure(&[]);
    assert!(host.path("data/certs/_default/hosts.toml").exists());
    host.cleanup();
    assert_eq!(host.snapshot(), before);
    let _ = Root::new(host.root.path().to_owned()).at(Path::new("/loop/a"));
}

#[test]
fn folders_of_a_distribution_are_left_to_it() {
    let host = Host::new(&[("etc/rancher/k3s/k3s.yaml", "")]);
    let before = host.snapshot();
    let error = configure(&host.options(&[])).unwrap_err();
    insta::assert_snapshot!(error, @r"
    k3s writes its folder of hosts itself and would remove Peili from it
    hint: give it what `peili configure --format k3s` prints; to write the folder all the same, name it by --config-path
    ");
    assert_eq!(host.snapshot(), before);
    let certs = "var/lib/rancher/k3s/agent/etc/containerd/certs.d";
    fs::create_dir_all(host.path(certs)).unwrap();
    let told = Options { config_paths: vec![format!("/{certs}")], ..host.options(&[]) };
    assert!(configure(&told).unwrap().ready);
    // It is there, and would not stay.
    let report = host.check(&[]);
    assert_eq!((report.ready, codes(&report)), (false, vec![Code::Owned]));
    cleanup(&told, false).unwrap();

    // Told by its own file: it stays.
    host.write(
        "etc/rancher/k3s/registries.yaml",
        &Format::K3s.render(&[Target::Default], &MIRROR.parse().unwrap(), Mode::First).unwrap(),
    );
    let report = host.check(&[]);
    assert!(report.render(false).contains("has not written it yet"), "{}", report.render(false));
    host.write(
        &format!("{certs}/_default/hosts.toml"),
        "[host.\"http://127.0.0.1:5000/v2\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
    );
    assert!(host.check(&[]).ready);

    // Talos does not show what it was told: what is there and not by Peili is its own.
    let host = Host::new(&[
        ("etc/os-release", "ID=talos\n"),
        ("etc/cri/conf.d/hosts/x.io/hosts.toml", "[host.\"http://127.0.0.1:5000\"]\n"),
    ]);
    assert!(host.check(&["x.io"]).ready);
    assert!(!host.check(&["_default"]).ready);
}

#[test]
fn surprises_are_named() {
    let host = Host::plain(&[
        ("a.io/ca.crt", ""),
        ("b.io/hosts.toml", "ca = \"gone.pem\"\n"),
        ("_default/hosts.toml", "server = \"https://d\"\n"),
    ]);
    let report = host.configure(&[]);
    assert_eq!(codes(&report), [Code::Shadowed, Code::Shadowed, Code::Ignored]);
    assert!(report.ready, "they may be meant so");
    let report = host.configure(&["_default", "a.io"]);
    assert_eq!(codes(&report), [Code::Shadowed, Code::Ignored]);
    let report = host.configure(&["b.io"]);
    assert_eq!((report.ready, codes(&report)), (false, vec![Code::MissingFile, Code::Ignored]));
    assert!(report.render(true).contains("/etc/containerd/certs.d/b.io/gone.pem is not there"));

    let host = Host::plain(&[]);
    let v6 = Options { mirror: "http://[fd00::1]:5000".parse().unwrap(), ..host.options(&[]) };
    assert_eq!(codes(&configure(&v6).unwrap()), [Code::Ipv6]);

    let host = Host::plain(&[]);
    let elsewhere = Options { config_paths: vec!["/etc/other".into()], ..host.options(&[]) };
    let report = configure(&elsewhere).unwrap();
    assert_eq!((report.ready, codes(&report)), (false, vec![Code::ConfigPath]));
    let settings = Settings {
        socket: "/run/other.sock".into(),
        hosts_dirs: vec![host.path("etc/containerd/certs.d")],
        containerd: true,
        policies: Vec::new(),
    };
    let report = configure(&Options { settings, ..host.options(&[]) }).unwrap();
    assert_eq!(codes(&report), [Code::Settings], "the folder is the same below the prefix");
}

/// Whoever closes nothing is told that denials are advice; whoever closes, what that is about Peili's own image.
#[test]
fn denials_are_advice_where_there_is_another_host() {
    let host = Host::plain(&[]);
    let options = |mode| {
        let settings = Settings { policies: vec!["allow-list".into()], ..Settings::default() };
        Options { settings, mode: Some(mode), ..host.options(&[]) }
    };
    let report = configure(&options(Mode::First)).unwrap();
    assert_eq!((report.ready, codes(&report)), (true, vec![Code::Advisory]));
    assert!(report.findings[0].text.contains("allow-list"), "{report:?}");
    let report = configure(&options(Mode::Only)).unwrap();
    assert_eq!((report.ready, codes(&report)), (true, vec![Code::Only]));
    assert!(report.findings[0].fix.as_ref().is_some_and(|fix| fix.contains("own image")), "{report:?}");
}
