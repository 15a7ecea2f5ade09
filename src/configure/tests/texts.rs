//! The text of a hosts.toml.

use insta::assert_snapshot;
use proptest::prelude::*;

use super::super::edit::{self, Fault};
use super::*;

fn mirror() -> Mirror {
    MIRROR.parse().unwrap()
}

fn add(text: &str) -> Result<String, Fault> {
    edit::add(text, Path::new("/certs.d/a"), &"a.io".parse().unwrap(), &mirror(), Mode::First)
}

#[test]
fn an_empty_text_gets_one_entry() {
    assert_snapshot!(add("").unwrap(), @r#"
    # Peili: written by `peili configure`, taken out by `peili cleanup`.
    [host."http://127.0.0.1:5000"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
}

#[test]
fn what_is_there_keeps_its_bytes() {
    let text = "# Ours, do not touch\nserver = 'https://a.io'   # the registry\nfuture_key = { a = 1 }\nca = [\n  \"x.pem\", # one\n]\n\
                \n# The mirror of the house\n[host.\"https://m.io\"]\n  capabilities=[\"pull\"]\n\n  [host.\"https://m.io\".header]\n    \
                x-a = \"\"\"\n[not.a.header]\n\"\"\"\n\n# The second one\n\n[host.\"https://n.io\"]\n# end\n";
    let added = add(text).unwrap();
    let block = "# Peili: written by `peili configure`, taken out by `peili cleanup`.\n[host.\"http://127.0.0.1:5000\"]\n  \
                 capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"200ms\"\n\n";
    let at = added.find(block).unwrap();
    assert_eq!(format!("{}{}", &added[..at], &added[at + block.len()..]), text);
    assert!(added[at + block.len()..].starts_with("# The mirror of the house\n"), "{added}");
    assert_eq!(edit::strip(&added, &mirror()).unwrap(), text);
    assert_eq!(add(&added).unwrap(), added);
}

#[test]
fn line_ends_and_last_lines_of_any_kind() {
    for text in [
        "server = \"https://a.io\"",
        "server = \"https://a.io\"\n\n\n",
        "# only a comment",
        "[host.\"https://m.io\"]",
        "[host.\"https://m.io\"]\r\ncapabilities = [\"pull\"]\r\n\r\n# c\r\n[host.\"https://n.io\"]\r\n",
        "[host]\n\"https://m.io\" = { capabilities = [\"pull\"] }\n",
        "  [host.\"https://m.io\"]\n\t[host.\"https://m.io\".header]\n\tx = \"y\"",
        "[host.'https://m.io']\n[host.'https://m.io'.header]\n",
        "server = \"https://a.io\"\n[[other]]\na = 1\n[[other]]\na = 2\n",
    ] {
        let added = add(text).unwrap_or_else(|fault| panic!("{text}: {fault}"));
        let hosts = edit::read(&added, Path::new("/c"), &"a.io".parse().unwrap()).unwrap();
        assert_eq!(hosts[0].url, "http://127.0.0.1:5000/v2", "{added}");
        let stripped = edit::strip(&added, &mirror()).unwrap();
        assert_eq!(stripped.trim_end(), text.trim_end());
        assert_eq!(add(&stripped).unwrap().trim_end(), added.trim_end());
    }
}

#[test]
fn an_entry_that_is_there_moves_to_the_front_with_its_settings() {
    let text = "server = \"https://a.io\"\n\n[host.\"https://m.io\"]\n\n# by hand\n[host.\"http://127.0.0.1:5000/v2\"]\n  \
                capabilities = [\"pull\"]\n  [host.\"http://127.0.0.1:5000/v2\".header]\n    x = \"y\"\n# end\n";
    assert_snapshot!(add(text).unwrap(), @r#"
    server = "https://a.io"

    # Peili: written by `peili configure`, taken out by `peili cleanup`.
    [host."http://127.0.0.1:5000/v2"]
      capabilities = ["pull"]
      [host."http://127.0.0.1:5000/v2".header]
        x = "y"

    [host."https://m.io"]

    # by hand
    # end
    "#);
    // One that forbids what it is for is replaced.
    let text = "[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"push\"]\n";
    assert!(add(text).unwrap().contains("capabilities = [\"pull\", \"resolve\"]"));
    // First already: as it is.
    let text = "[host.\"http://127.0.0.1:5000/\"]\ncapabilities = [\"pull\"]\n[host.\"https://m.io\"]\n";
    assert_eq!(add(text).unwrap(), text);
}

#[test]
fn only() {
    let text = "ca = \"x\"\nserver = \"https://a.io\"\n[host.\"https://m.io\"]\n";
    let (folder, registry) = (Path::new("/c"), "a.io".parse().unwrap());
    let written = edit::add(text, folder, &registry, &mirror(), Mode::Only).unwrap();
    assert_snapshot!(written, @r#"
    # Pulls of this registry depend on Peili: `peili configure --mode only` left out all other hosts, and
    # `peili cleanup` puts back what was here.
    server = "http://127.0.0.1:5000"

    # Peili: written by `peili configure`, taken out by `peili cleanup`.
    [host."http://127.0.0.1:5000"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
    let hosts = edit::read(&written, folder, &registry).unwrap();
    assert!(hosts.iter().all(|host| host.url == "http://127.0.0.1:5000/v2" && host.ca.is_empty()));
    assert!(!edit::strip(&written, &mirror()).unwrap().contains("127.0.0.1"));
}

#[test]
fn what_containerd_does_not_read_is_refused_with_its_line() {
    assert_eq!(add("a = 1\n[host\n").unwrap_err().to_string(), "2: unclosed table, expected `]`");
    assert!(matches!(add("\n[host.\"https://m.io\"]\ncapabilities = [\"fly\"]\n"), Err(Fault::Form(3, _))));
    assert!(matches!(add("\u{feff}server = \"https://a.io\"\n"), Err(Fault::Form(1, _))));
    for text in
        ["host = { \"https://m.io\" = {} }\n", "host.\"http://127.0.0.1:5000\".capabilities = [\"pull\"]\n"]
    {
        assert_eq!(add(text), Err(Fault::Inline), "{text}");
    }
}

#[test]
fn certificates_and_their_folder() {
    let pair = |certificate: &str, key: Option<&str>| (certificate.to_owned(), key.map(str::to_owned));
    let head = edit::certificates(
        &["ca.crt".into(), "it's \"quoted\".crt".into()],
        &[pair("a.cert", Some("a.key")), pair("both.cert", None)],
    );
    assert_snapshot!(head, @r#"
    # Certificates that lie here by their names, which count only where there is no hosts.toml.
    ca = ["ca.crt", "it's \"quoted\".crt"]
    client = [["a.cert", "a.key"], "both.cert"]
    "#);
    let text = format!("{head}[host.\"https://m.io\"]\nca = '/abs.pem'\nclient = \"m.pem\"\n");
    assert_snapshot!(edit::rebase(&text, "../_default/").unwrap(), @r#"
    # Certificates that lie here by their names, which count only where there is no hosts.toml.
    ca = ["../_default/ca.crt", "../_default/it's \"quoted\".crt"]
    client = [["../_default/a.cert", "../_default/a.key"], "../_default/both.cert"]
    [host."https://m.io"]
    ca = '/abs.pem'
    client = "../_default/m.pem"
    "#);
}

proptest! {
    /// Whatever the text is: Peili is first by it, or it is refused; a second time nothing changes; and all of it goes.
    #[test]
    fn texts_near_real_ones(which in prop::sample::select(vec![
        "# c\nserver = \"https://a.io\"\n\n# d\n[host.\"https://m.io\"]\n  capabilities = [\"pull\"]\n[host.\"https://m.io\".header]\nx = 1\n",
        "ca = [\"a\", \"b\"]\n[host.\"http://127.0.0.1:5000\"]\n# x\n[host.'https://n.io']\n[host.\"http://127.0.0.1:5000\".header]\n# end",
        "[host]\n\"https://m.io\" = { capabilities = [\"pull\"] }\n[x]\ny = \"\"\"\n[z]\n\"\"\"\n",
    ]), changes in proptest::collection::vec((any::<prop::sample::Index>(), prop::sample::select("[]\"'\n\r#=.{}h \u{e9}".chars().collect::<Vec<_>>())), 0..4)) {
        let mut text: Vec<char> = which.chars().collect();
        for (index, character) in changes {
            let at = index.index(text.len());
            text[at] = character;
        }
        let text: String = text.into_iter().collect();
        if let Ok(added) = add(&text) {
            prop_assert_eq!(add(&added), Ok(added.clone()));
            let hosts = edit::read(&added, Path::new("/c"), &"a.io".parse().unwrap()).unwrap();
            prop_assert_eq!(&hosts[0].url, "http://127.0.0.1:5000/v2");
            let stripped = edit::strip(&added, &mirror()).unwrap();
            let left = edit::read(&stripped, Path::new("/c"), &"a.io".parse().unwrap()).unwrap();
            prop_assert_eq!(&left[..], &hosts[1..]);
        }
    }
}
