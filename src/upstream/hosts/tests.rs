use std::fs;

use super::*;

fn registry(text: &str) -> Registry {
    text.parse().unwrap()
}

/// A root with files in it: `(path, content)`.
fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root
}

fn urls(root: &tempfile::TempDir, name: &str) -> Vec<String> {
    let hosts = load(&[root.path().to_owned()], &registry(name)).unwrap();
    hosts.into_iter().map(|host| host.url).collect()
}

/// The hosts of one file for `a.io`.
fn parsed(text: &str) -> Result<Vec<Host>, String> {
    let root = root(&[("a.io/hosts.toml", text)]);
    load(&[root.path().to_owned()], &registry("a.io"))
        .map_err(|error| error.to_string().replace(root.path().to_str().unwrap(), ""))
}

#[test]
fn registries_without_configuration() {
    let check = |name: &str, url: &str, skip_verify: bool| {
        let expected = Host { skip_verify, ..Host::new(url) };
        assert_eq!(load(&[PathBuf::from("/nonexistent")], &registry(name)).unwrap(), [expected], "{name}");
    };
    check("docker.io", "https://registry-1.docker.io/v2", false);
    check("ghcr.io", "https://ghcr.io/v2", false);
    check("r.local:5000", "https://r.local:5000/v2", false);
    check("localhost", "https://localhost/v2", true);
    check("localhost:443", "https://localhost:443/v2", true);
    check("localhost:5000", "http://localhost:5000/v2", true);
    check("127.1.2.3:80", "http://127.1.2.3:80/v2", false);
    check("[::1]:5000", "http://[::1]:5000/v2", true);
    check("[fd00::1]:5000", "https://[fd00::1]:5000/v2", false);
}

#[test]
fn first_existing_folder_wins() {
    let own = |name: &str| format!("server = \"https://{name}\"\n");
    let root = root(&[
        ("a.io_5000_/hosts.toml", &own("with-port")),
        ("a.io/hosts.toml", &own("host")),
        ("_default/hosts.toml", &own("default")),
        ("shadow.io/notes.txt", ""),
        ("empty.io/hosts.toml", ""),
    ]);
    let check = |name: &str, expected: &str| {
        assert_eq!(urls(&root, name), [format!("https://{expected}/v2")], "{name}");
    };
    check("a.io:5000", "with-port");
    check("a.io", "host");
    check("b.io", "default");
    // Without a port's folder the name with its colon is next, not the bare host.
    check("a.io:6000", "default");
    // A folder without a usable hosts.toml still hides `_default`.
    check("shadow.io", "shadow.io");
    check("empty.io", "empty.io");
}

#[test]
fn roots_are_asked_in_order() {
    let (first, second) = (
        root(&[("_default/hosts.toml", "server = \"https://one\"")]),
        root(&[("a.io/hosts.toml", "server = \"https://two\"")]),
    );
    let dirs = [first.path().to_owned(), second.path().to_owned()];
    assert_eq!(load(&dirs, &registry("a.io")).unwrap()[0].url, "https://one/v2");
    let dirs = [PathBuf::from("/nonexistent"), second.path().to_owned()];
    assert_eq!(load(&dirs, &registry("a.io")).unwrap()[0].url, "https://two/v2");
}

#[test]
fn a_file_with_everything() {
    let root = root(&[(
        "_default/hosts.toml",
        r#"
server = "https://origin.io"
ca = "origin.crt"

[host."http://127.0.0.1:5000"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "1m1.5s"

[host."mirror.io/prefix/"]
  capabilities = ["PULL"]
  ca = ["/etc/one.pem", "two.pem"]
  client = [["c.pem", "k.pem"], "both.pem"]
  skip_verify = true
  [host."mirror.io/prefix/".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."https://override.io/oci"]
  override_path = true
  client = "single.pem"

[host."https://already.io/v2/"]
"#,
    )]);
    let folder = root.path().join("_default");
    let hosts = load(&[root.path().to_owned()], &registry("a.io")).unwrap();
    let text = |text: &str| text.to_owned();
    assert_eq!(
        hosts,
        [
            Host {
                dial_timeout: Some(Duration::from_millis(61_500)),
                ..Host::new("http://127.0.0.1:5000/v2")
            },
            Host {
                resolve: false,
                ca: vec!["/etc/one.pem".into(), folder.join("two.pem")],
                client: vec![
                    (folder.join("c.pem"), Some(folder.join("k.pem"))),
                    (folder.join("both.pem"), None)
                ],
                skip_verify: true,
                headers: vec![
                    (text("x-one"), text("1")),
                    (text("x-two"), text("2")),
                    (text("x-two"), text("3"))
                ],
                ..Host::new("https://mirror.io/prefix/v2")
            },
            Host { client: vec![(folder.join("single.pem"), None)], ..Host::new("https://override.io/oci") },
            Host::new("https://already.io/v2"),
            Host { ca: vec![folder.join("origin.crt")], ..Host::new("https://origin.io/v2") },
        ]
    );
}

#[test]
fn without_server_the_registry_is_last() {
    let hosts = parsed("capabilities = [\"push\"]\n[host.\"https://m\"]\n").unwrap();
    assert_eq!(hosts, [Host::new("https://m/v2"), Host::new("https://a.io/v2")]);
    let hosts = parsed("server = \"\"\n").unwrap();
    assert_eq!(hosts, [Host::new("https://a.io/v2")]);
}

#[test]
fn certificate_files_count_without_hosts_toml_only() {
    let files = [("a.io/ca.crt", ""), ("a.io/me.cert", ""), ("a.io/me.key", ""), ("a.io/solo.cert", "")];
    let root = root(&files);
    let folder = root.path().join("a.io");
    let expected = Host {
        ca: vec![folder.join("ca.crt")],
        client: vec![(folder.join("me.cert"), Some(folder.join("me.key"))), (folder.join("solo.cert"), None)],
        ..Host::new("https://a.io/v2")
    };
    let dirs = [root.path().to_owned()];
    assert_eq!(load(&dirs, &registry("a.io")).unwrap(), [expected]);
    fs::write(folder.join("hosts.toml"), "server = \"https://a.io\"").unwrap();
    assert_eq!(load(&dirs, &registry("a.io")).unwrap(), [Host::new("https://a.io/v2")]);
}

#[test]
fn errors_name_file_and_line() {
    let check = |text: &str, expected: &str| {
        assert_eq!(parsed(text).unwrap_err(), format!("/a.io/hosts.toml:{expected}"), "{text}");
    };
    check("\n\nserver = 1\n", "3: `server` must be a text");
    check("[host.\"https://m\"]\ncapabilities = [\"fly\"]\n", "2: unknown capability `fly`");
    check("[host.\"https://m\"]\nskip_verify = \"no\"\n", "2: `skip_verify` must be true or false");
    check(
        "[host.\"https://m\"]\ndial_timeout = \"soon\"\n",
        "2: `soon` is not a duration such as 5s or 1m30s",
    );
    check(
        "[host.\"https://m\"]\nclient = [[\"a\"]]\n",
        "2: `client` must be a file, a list of files, or a list of [certificate, key]",
    );
    check("\nhost = 1\n", "2: `host` must be tables: [host.\"https://mirror\"]");
    check("\na = \"x\n", "2: invalid basic string, expected `\"`");
    assert!(parsed("[host.\"https:// /\"]\n").unwrap_err().contains(":1: `https:// /` is not an address"));
}

#[test]
fn files_are_bounded() {
    let many: String = (0..=HOST_LIMIT).map(|i| format!("[host.\"https://m{i}\"]\n")).collect();
    assert!(parsed(&many).unwrap_err().ends_with("more than 100 hosts"));
    let large = format!("#{}\n", " ".repeat(FILE_LIMIT as usize));
    assert!(parsed(&large).unwrap_err().ends_with("is larger than 1 MiB"));
    let deep = format!("a = {}1{}\n", "[".repeat(100_000), "]".repeat(100_000));
    assert!(parsed(&deep).is_err());
    let root = root(&[]);
    fs::create_dir_all(root.path().join("a.io/hosts.toml")).unwrap();
    assert!(matches!(load(&[root.path().to_owned()], &registry("a.io")), Err(Error::Read { .. })));
}

#[test]
fn go_durations() {
    let check = |text: &str, expected: Option<u64>| {
        assert_eq!(parse::duration(text), expected.map(Duration::from_millis), "{text}");
    };
    check("5s", Some(5_000));
    check("1h2m3.5s", Some(3_723_500));
    check("300ms", Some(300));
    check("0", Some(0));
    for bad in ["", "5", "s", "-1s", "1d", "1.2.3s", "99999999999999999999h", "5s "] {
        check(bad, None);
    }
}

#[test]
fn clients_need_their_files() {
    let host = Host { ca: vec!["/nonexistent/ca.pem".into()], ..Host::new("https://a.io/v2") };
    assert!(matches!(host.client(), Err(Error::Read { .. })));
    let root = root(&[("not.pem", "hello")]);
    let host = Host { ca: vec![root.path().join("not.pem")], ..Host::new("https://a.io/v2") };
    assert!(host.client().unwrap_err().to_string().ends_with("has no certificate"));
    let host = Host { headers: vec![("a b".into(), "c".into())], ..Host::new("https://a.io/v2") };
    assert!(host.client().unwrap_err().to_string().contains("header `a b` is not valid"));
    assert!(Host::new("http://127.0.0.1:1/v2").client().is_ok());
}
