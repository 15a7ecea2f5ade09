//! Folders of hosts: what is written where, and what comes back.

use insta::assert_snapshot;

use super::*;

#[test]
fn default_of_a_node_that_has_nothing() {
    let host = Host::new(&[(
        "etc/containerd/config.toml",
        "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d'\n",
    )]);
    let before = host.snapshot();
    let report = check(&host.options(&[])).unwrap();
    assert_eq!((report.ready, codes(&report)), (false, vec![Code::NotSetUp]));
    let preview = preview(&host.options(&[])).unwrap();
    assert_eq!(host.snapshot(), before);
    assert_snapshot!(preview.changes[0].diff, @r#"
    --- /dev/null
    +++ b/etc/containerd/certs.d/_default/hosts.toml
    @@ -0,0 +1,4 @@
    +# Peili: written by `peili configure`, taken out by `peili cleanup`.
    +[host."http://127.0.0.1:5000"]
    +  capabilities = ["pull", "resolve"]
    +  dial_timeout = "200ms"
    "#);
    let report = host.configure(&[]);
    assert!(report.ready && report.changes[0].action == Action::Create, "{report:?}");
    assert_eq!(urls(&host.asked("_default")), ["http://127.0.0.1:5000/v2", "https://any.invalid/v2"]);
    assert!(host.check(&[]).ready);
    let again = host.configure(&[]);
    assert_eq!((again.changes, again.unchanged), (vec![], vec!["_default".to_owned()]));
    host.cleanup();
    assert_eq!(host.snapshot(), before);
    assert_eq!(host.cleanup().changes, []);
}

#[test]
fn certificates_by_their_names_become_entries() {
    let host = Host::plain(&[
        ("r.test_5000_/ca.crt", "CA"),
        ("r.test_5000_/client.cert", "C"),
        ("r.test_5000_/client.key", "K"),
    ]);
    let (before, asked) = (host.snapshot(), host.asked("r.test:5000"));
    assert!(host.configure(&["r.test:5000"]).ready);
    assert_snapshot!(host.read("r.test_5000_/hosts.toml"), @r#"
    # Certificates that lie here by their names, which count only where there is no hosts.toml.
    ca = ["ca.crt"]
    client = [["client.cert", "client.key"]]

    # Peili: written by `peili configure`, taken out by `peili cleanup`.
    [host."http://127.0.0.1:5000"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
    assert_eq!(host.asked("r.test:5000")[1..], asked);
    host.cleanup();
    assert_eq!(host.snapshot(), before);
}

/// containerd takes an empty file for none: certificates count, and it must come back.
#[test]
fn an_empty_file_is_none() {
    let host = Host::plain(&[("a.io/hosts.toml", ""), ("a.io/ca.crt", "CA")]);
    let before = host.snapshot();
    host.configure(&["a.io"]);
    assert!(host.read("a.io/hosts.toml").contains("ca = [\"ca.crt\"]"));
    host.cleanup();
    assert_eq!(host.snapshot(), before);
}

/// A new folder would hide what `_default` says for its registry.
#[test]
fn a_new_folder_says_what_the_default_said() {
    let default = "# house\nserver = \"https://proxy.test\"\nca = \"proxy.pem\"\n[host.\"https://m.test\"]\nclient = [\"m.pem\"]\n";
    let files = [("_default/hosts.toml", default), ("_default/proxy.pem", ""), ("_default/m.pem", "")];
    for targets in [&["a.io"][..], &["_default", "a.io"], &["a.io", "_default"]] {
        let host = Host::plain(&files);
        let (before, asked) = (host.snapshot(), host.asked("a.io"));
        assert!(host.configure(targets).ready);
        assert!(host.read("a.io/hosts.toml").contains("ca = \"../_default/proxy.pem\""));
        assert_eq!(host.asked("a.io")[1..], asked);
        let first = host.snapshot();
        assert_eq!(host.configure(targets).changes, []);
        // In the other mode and back again: still made from the default.
        configure(&Options { mode: Some(Mode::Only), ..host.options(targets) }).unwrap();
        assert_eq!(urls(&host.asked("a.io")), ["http://127.0.0.1:5000/v2"; 2]);
        configure(&Options { mode: Some(Mode::First), ..host.options(targets) }).unwrap();
        assert_eq!(host.snapshot(), first, "{targets:?}");
        host.cleanup();
        assert_eq!(host.snapshot(), before);
    }
}

#[test]
fn the_folder_that_counts_is_changed() {
    let text = "server = \"https://a.test\"\n[host.\"https://m.test\"]\n";
    for (folder, registry) in
        [("a.test:5000", "a.test:5000"), ("a.test_5000_", "a.test:5000"), ("docker.io", "index.docker.io")]
    {
        let host = Host::plain(&[(&format!("{folder}/hosts.toml"), text)]);
        let before = host.snapshot();
        host.configure(&[registry]);
        assert_eq!(fs::read_dir(host.hosts()).unwrap().count(), 1);
        assert!(host.read(&format!("{folder}/hosts.toml")).ends_with(text.split_once('\n').unwrap().1));
        host.cleanup();
        assert_eq!(host.snapshot(), before);
    }
    let host = Host::plain(&[]);
    host.configure(&["a.test:5000", "[fd00::1]:5000"]);
    assert!(host.hosts().join("a.test_5000_/hosts.toml").exists());
    assert!(host.hosts().join("[fd00::1]_5000_/hosts.toml").exists());
}

/// `_default` of an earlier folder would hide what a later one has for a single registry.
#[test]
fn several_folders() {
    let host = Host::new(&[
        ("one/x.io/hosts.toml", "server = \"https://x.test\"\n[host.\"https://m.test\"]\n"),
        ("two/y.io/ca.crt", ""),
        ("other/z.io/ca.crt", ""),
    ]);
    let before = host.snapshot();
    let options = |targets: &[&str]| Options {
        config_paths: vec!["/one:/two:/three".into(), "/other".into()],
        ..host.options(targets)
    };
    let report = configure(&options(&["_default", "x.io", "y.io"])).unwrap();
    let paths: Vec<_> = report.changes.iter().map(|change| change.path.to_str().unwrap()).collect();
    let expected = [
        "/two/_default/hosts.toml",
        "/one/x.io/hosts.toml",
        "/two/y.io/hosts.toml",
        "/other/_default/hosts.toml",
        "/other/x.io/hosts.toml",
        "/other/y.io/hosts.toml",
    ];
    assert_eq!(paths, expected);
    assert!(cleanup(&options(&[]), false).unwrap().ready);
    assert_eq!(host.snapshot(), before);
}

#[test]
fn modes_and_links_stay() {
    let host = Host::plain(&[("a.io/hosts.toml", "server = \"https://a.test\"\n")]);
    let file = host.hosts().join("a.io/hosts.toml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    host.write("store/managed.toml", "server = \"https://b.test\"\n");
    fs::create_dir(host.hosts().join("b.io")).unwrap();
    // As a host names it: its root is not ours.
    std::os::unix::fs::symlink("/store/managed.toml", host.hosts().join("b.io/hosts.toml")).unwrap();
    std::os::unix::fs::symlink("a.io", host.hosts().join("alias.io")).unwrap();
    let before = host.snapshot();
    let report = host.configure(&["a.io", "b.io", "alias.io"]);
    assert_eq!(report.changes.len(), 2, "one file by two names is changed once");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(host.hosts().join("b.io/hosts.toml").is_symlink());
    assert!(fs::read_to_string(host.path("store/managed.toml")).unwrap().contains(MIRROR));
    host.cleanup();
    assert_eq!(host.snapshot(), before);
}

#[test]
fn changes_by_others_stay() {
    let text = "server = \"https://a.test\"\n";
    let host = Host::plain(&[("a.io/hosts.toml", text)]);
    let before = host.snapshot();
    host.configure(&["a.io", "b.io"]);
    let change = |path: &str, f: &dyn Fn(&str) -> String| {
        fs::write(host.hosts().join(path), f(&host.read(path))).unwrap();
    };
    let added = "\n# added\n[host.\"https://added.test\"]\n";
    change("a.io/hosts.toml", &|text| format!("{text}{added}"));
    change("b.io/hosts.toml", &|text| format!("{text}{added}"));
    let report = host.check(&[]);
    assert!(report.ready, "it is still asked first: {report:?}");
    let report = host.cleanup();
    let actions: Vec<_> = report.changes.iter().map(|change| change.action).collect();
    assert_eq!(actions, [Action::Strip, Action::Strip]);
    assert!(report.render(true).contains("the other changes stay"));
    assert_eq!(host.read("a.io/hosts.toml").trim_end(), format!("{text}{added}").trim_end());
    assert_eq!(urls(&host.asked("b.io")), ["https://added.test/v2", "https://b.io/v2"]);
    fs::remove_dir_all(host.hosts().join("b.io")).unwrap();
    fs::write(host.hosts().join("a.io/hosts.toml"), text).unwrap();
    assert_eq!(host.snapshot(), before);

    // A change within Peili's own entry is Peili's: all comes back.
    host.configure(&["a.io"]);
    change("a.io/hosts.toml", &|text| text.replace("200ms", "1s"));
    assert_eq!(host.cleanup().changes[0].action, Action::Restore);
    assert_eq!(host.snapshot(), before);
}

#[test]
fn only_keeps_what_it_cannot_put_back() {
    let text = "server = \"https://a.test\"\n[host.\"https://m.test\"]\n";
    let host = Host::plain(&[("a.io/hosts.toml", text)]);
    let before = host.snapshot();
    let only = Options { mode: Some(Mode::Only), ..host.options(&["a.io"]) };
    let report = configure(&only).unwrap();
    assert_eq!((report.ready, codes(&report)), (true, vec![Code::Only]));
    assert!(report.render(true).contains("pulls of a.io depend on Peili"));
    assert!(host.check(&[]).ready, "as it was set up");
    host.cleanup();
    assert_eq!(host.snapshot(), before);

    configure(&only).unwrap();
    let written = host.read("a.io/hosts.toml");
    fs::write(host.hosts().join("a.io/hosts.toml"), format!("{written}[host.\"https://new.test\"]\n"))
        .unwrap();
    let first = Options { mode: Some(Mode::First), ..only };
    assert!(matches!(configure(&first), Err(Error::Edited(_))));
    assert_eq!(codes(&host.check(&[])), [Code::NotSetUp, Code::Only]);
    let report = host.cleanup();
    assert!(host.read("a.io/hosts.toml").ends_with("[host.\"https://new.test\"]\n"));
    let note = report.changes[0].note.clone().unwrap();
    let kept = note.rsplit_once("is in ").unwrap().1;
    assert_eq!(fs::read_to_string(kept).unwrap(), text);
}

#[test]
fn a_wiped_folder_is_noticed_and_repaired() {
    let text = "server = \"https://a.test\"\n[host.\"https://m.test\"]\n";
    let host = Host::plain(&[("a.io/hosts.toml", text), ("c.io/ca.crt", "")]);
    let before = host.snapshot();
    host.configure(&["a.io", "b.io", "c.io"]);
    let after = host.snapshot();
    fs::remove_dir_all(host.hosts()).unwrap();
    let report = host.check(&[]);
    assert!(!report.ready);
    assert_eq!(report.render(false).matches("changed since it was set up: it was gone").count(), 3);
    host.configure(&[]);
    // What was in records is there again; the certificate was in none, and nothing names it.
    assert_eq!(
        host.read("a.io/hosts.toml"),
        String::from_utf8(after[&host.hosts().join("a.io/hosts.toml")].1.clone().unwrap()).unwrap()
    );
    assert_eq!(urls(&host.asked("c.io")), ["http://127.0.0.1:5000/v2", "https://c.io/v2"]);
    host.cleanup();
    assert_eq!(host.read("a.io/hosts.toml"), text);

    // A certificate that a text names is gone with the folder: without it the text would fail every pull.
    let named = Host::plain(&[
        ("d.io/hosts.toml", "ca = \"d.pem\"\nserver = \"https://d.test\"\n"),
        ("d.io/d.pem", ""),
    ]);
    named.configure(&["d.io"]);
    fs::remove_dir_all(named.hosts()).unwrap();
    assert!(named.configure(&["d.io"]).ready);
    assert!(!named.read("d.io/hosts.toml").contains("d.pem"));

    // Gone, and cleaned up: nothing appears that was not there, and nothing is lost.
    let host = Host::plain(&[("a.io/hosts.toml", text)]);
    host.configure(&["a.io"]);
    fs::remove_dir_all(host.hosts()).unwrap();
    let note = host.cleanup().changes[0].note.clone().unwrap();
    assert_eq!(fs::read_to_string(note.rsplit_once("is in ").unwrap().1).unwrap(), text);
    assert!(!host.hosts().exists());
    drop(before);
}

#[test]
fn replaced_by_somebody() {
    let host = Host::plain(&[]);
    host.configure(&["a.io"]);
    let text = "server = \"https://new.test\"\n";
    fs::write(host.hosts().join("a.io/hosts.toml"), text).unwrap();
    let report = host.check(&[]);
    assert!(
        report.render(false).contains("Peili was not the first host any more"),
        "{}",
        report.render(false)
    );
    host.configure(&[]);
    assert_eq!(urls(&host.asked("a.io")), ["http://127.0.0.1:5000/v2", "https://new.test/v2"]);
    host.cleanup();
    assert_eq!(host.read("a.io/hosts.toml"), text);
}

#[test]
fn another_address() {
    let host = Host::plain(&[("a.io/hosts.toml", "server = \"https://a.test\"\n")]);
    let before = host.snapshot();
    host.configure(&["a.io"]);
    let moved = Options { mirror: "http://127.0.0.1:5555".parse().unwrap(), ..host.options(&[]) };
    assert!(!check(&moved).unwrap().ready);
    assert!(configure(&moved).unwrap().ready);
    assert_eq!(urls(&host.asked("a.io")), ["http://127.0.0.1:5555/v2", "https://a.test/v2"]);
    host.cleanup();
    assert_eq!(host.snapshot(), before);
}

/// Written by hand as the README says it, or the records are lost.
#[test]
fn entries_without_a_record() {
    let text = "server = \"https://a.test\"\n\n[host.\"http://127.0.0.1:5000\"]\n  capabilities = [\"pull\", \"resolve\"]\n";
    let host =
        Host::plain(&[("a.io/hosts.toml", text), ("b.io/hosts.toml", "server = \"https://b.test\"\n")]);
    assert!(host.check(&["a.io"]).ready);
    assert_eq!(host.configure(&["a.io"]).changes, []);
    let report = host.cleanup();
    assert_eq!(report.changes.len(), 1);
    assert!(report.render(true).contains("no record"), "{}", report.render(true));
    assert_eq!(host.read("a.io/hosts.toml"), "server = \"https://a.test\"\n\n");
}

#[test]
fn one_registry_is_cleaned_up_by_itself() {
    let host = Host::new(&[("etc/containerd/config.toml", "version = 2\n")]);
    let before = host.snapshot();
    let options = |targets: &[&str]| Options {
        config_paths: vec!["/etc/containerd/certs.d".into()],
        ..host.options(targets)
    };
    configure(&options(&["a.io", "b.io"])).unwrap();
    // The folder of hosts was made for the first; the other takes it away in the end.
    cleanup(&options(&["a.io"]), false).unwrap();
    assert!(!host.hosts().join("a.io").exists() && host.hosts().join("b.io/hosts.toml").exists());
    cleanup(&options(&[]), false).unwrap();
    assert_eq!(host.snapshot(), before);
}

#[test]
fn errors_name_the_file_and_what_helps() {
    let host =
        Host::plain(&[("a.io/hosts.toml", "server = 1\n"), ("b.io/hosts.toml", "server = \"https://b\"\n")]);
    let before = host.snapshot();
    let error = configure(&host.options(&["b.io", "a.io"])).unwrap_err().to_string();
    assert_snapshot!(error, @r"
    /etc/containerd/certs.d/a.io/hosts.toml:1: `server` must be a text
    hint: nothing was written; containerd ignores a file that it cannot read, so repair it first
    ");
    assert_eq!(host.snapshot(), before, "the other one is left alone too");

    let options = Options { config_paths: vec!["/no/such/folder".into()], ..host.options(&[]) };
    let error = configure(&options).unwrap_err().to_string();
    assert!(error.starts_with("/no/such/folder is not there, and neither"), "{error}");

    let empty = Host::new(&[]);
    assert!(configure(&empty.options(&[])).unwrap_err().to_string().starts_with("no containerd found below"));

    let host = Host::plain(&[]);
    host.configure(&["a.io"]);
    for entry in fs::read_dir(host.state.path().join("configure")).unwrap() {
        fs::write(entry.unwrap().path(), "{").unwrap();
    }
    assert!(matches!(configure(&host.options(&["a.io"])), Err(Error::State { .. })));
}

#[test]
fn two_at_once_wait_for_nobody() {
    let host = Host::plain(&[]);
    let disk = Disk::default();
    let mut journal = journal::Journal::new(host.options(&[]).state, &disk);
    journal.lock().unwrap();
    assert!(matches!(configure(&host.options(&[])), Err(Error::Busy(_))));
    assert!(matches!(cleanup(&host.options(&[]), false), Err(Error::Busy(_))));
    assert!(preview(&host.options(&[])).is_ok());
    drop(journal);
    assert!(configure(&host.options(&[])).is_ok());
}

/// A hosts.toml may hold a password: whoever could not read it cannot read what is made of it.
#[test]
fn copies_are_no_more_readable() {
    let text =
        "[host.\"https://m.test\"]\n[host.\"https://m.test\".header]\nAuthorization = \"Basic secret\"\n";
    let host = Host::plain(&[("_default/hosts.toml", text)]);
    fs::set_permissions(host.hosts().join("_default/hosts.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    host.configure(&["_default", "a.io"]);
    let mut files = vec![host.hosts().join("a.io/hosts.toml"), host.hosts().join("_default/hosts.toml")];
    files.extend(fs::read_dir(host.options(&[]).state).unwrap().map(|entry| entry.unwrap().path()));
    files.retain(|path| fs::read_to_string(path).unwrap().contains("secret"));
    assert_eq!(files.len(), 4, "{files:?}");
    for path in files {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
    }
}

/// A pod that lacks a mount would else forget what it has to undo.
#[test]
fn what_is_not_mounted_is_not_gone() {
    let text = "server = \"https://a.test\"\n[host.\"https://m.test\"]\n";
    let host = Host::plain(&[("a.io/hosts.toml", text)]);
    host.configure(&["a.io"]);
    let (folder, aside) = (host.path("etc/containerd"), host.path("aside"));
    fs::rename(&folder, &aside).unwrap();
    assert!(matches!(cleanup(&host.options(&[]), false), Err(Error::NoFolder(_))));
    fs::rename(&aside, &folder).unwrap();
    host.cleanup();
    assert_eq!(host.read("a.io/hosts.toml"), text);
}
