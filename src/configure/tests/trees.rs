//! Generated folders of hosts: whatever is in them, it comes back.

use std::fmt::Write as _;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const FOLDERS: [&str; 6] = ["docker.io", "ghcr.io", "r.test_5000_", "r.test:5000", "_default", "x.test"];
const TARGETS: [&str; 5] = ["_default", "docker.io", "r.test:5000", "x.test", "new.test"];
const FILES: [&str; 6] = ["ca.crt", "other.crt", "client.cert", "client.key", "solo.cert", "notes.txt"];

/// A registry's folder before Peili.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    name: &'static str,
    hosts: Option<String>,
    mode: u32,
    files: Vec<&'static str>,
}

/// Pieces of a hosts.toml, in the ways people write them.
fn text() -> impl Strategy<Value = String> {
    let head = prop::sample::subsequence(
        vec![
            "# A comment, with \"quotes\" and [brackets]\n",
            "server = \"https://up.test\"\n",
            "capabilities = ['pull', \"resolve\"]   # all\n",
            "ca = [ \"ca.crt\",\n\n  # why\n  '/abs.pem' ]\n",
            "client = [[\"client.cert\", \"client.key\"]]\n",
            "unknown = { a = [1, 2], \"b c\" = \"\"\"x\n[host.\"no\"]\n\"\"\" }\n",
            "\n\n",
        ],
        0..=7,
    );
    let body = prop::sample::select(vec![
        "",
        "  capabilities = [\"pull\"]\n",
        "capabilities = [\"pull\", \"resolve\", \"push\"]\nskip_verify = true\n\n",
        "  ca = \"ca.crt\" # its own\n  unknown_key = 1979-05-27\n",
        "override_path = true\n\n# a comment that belongs to nothing\n\n",
        "dial_timeout = '5s'\n# about the next\n",
    ]);
    let host = (
        prop::sample::select(vec![
            "https://m1.test",
            "http://m2.test:8080/v2",
            "m3.test",
            "https://m4.test/p",
        ]),
        body,
        any::<bool>(),
    );
    (
        head,
        vec(host, 0..4),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(vec!["", "# end\n", "\n# end, without a line's end"]),
    )
        .prop_map(|(head, hosts, crlf, other, end)| {
            let mut text = head.concat();
            if other {
                text.push_str("[other.\"table\"]\na = 1\n");
            }
            let mut seen = Vec::new();
            for (url, body, header) in hosts {
                if seen.contains(&url) {
                    continue;
                }
                seen.push(url);
                let _ = write!(text, "[host.\"{url}\"]\n{body}");
                if header {
                    let _ = writeln!(text, "  [host.\"{url}\".header]\n    x-h = [\"1\", \"2\"]");
                }
            }
            text.push_str(end);
            if crlf { text.replace('\n', "\r\n") } else { text }
        })
}

pub(super) fn folders() -> impl Strategy<Value = Vec<Folder>> {
    let folder = (
        prop::option::weighted(0.7, prop_oneof![4 => text(), 1 => Just(String::new())]),
        prop::sample::select(vec![0o600, 0o640, 0o644, 0o444]),
        prop::sample::subsequence(FILES.to_vec(), 0..=FILES.len()),
    );
    prop::sample::subsequence(FOLDERS.to_vec(), 0..=FOLDERS.len()).prop_flat_map(move |names| {
        let count = names.len();
        vec(folder.clone(), count).prop_map(move |folders| {
            let folders = names.iter().zip(folders);
            folders.map(|(name, (hosts, mode, files))| Folder { name, hosts, mode, files }).collect()
        })
    })
}

pub(super) fn targets() -> impl Strategy<Value = (Vec<&'static str>, Mode)> {
    (
        prop::sample::subsequence(TARGETS.to_vec(), 1..=TARGETS.len()).prop_shuffle(),
        prop::sample::select(vec![Mode::First, Mode::Only]),
    )
}

pub(super) fn host(folders: &[Folder]) -> Host {
    let host = Host::plain(&[]);
    for folder in folders {
        let path = host.hosts().join(folder.name);
        fs::create_dir(&path).unwrap();
        for file in &folder.files {
            fs::write(path.join(file), "").unwrap();
        }
        if let Some(text) = &folder.hosts {
            let file = path.join("hosts.toml");
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(folder.mode)).unwrap();
        }
    }
    host
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Peili is first, all others are asked as before, a second run changes nothing, and all comes back.
    #[test]
    fn all_comes_back(folders in folders(), (targets, mode) in targets()) {
        let host = host(&folders);
        let options = Options { mode: Some(mode), ..host.options(&targets) };
        let before = host.snapshot();
        let asked: Vec<_> = targets.iter().map(|target| host.asked(target)).collect();
        preview(&options).unwrap();
        prop_assert_eq!(&host.snapshot(), &before);

        configure(&options).unwrap();
        for (target, before) in targets.iter().zip(&asked) {
            let after = host.asked(target);
            prop_assert_eq!(&after[0].url, "http://127.0.0.1:5000/v2");
            match mode {
                Mode::First => prop_assert_eq!(&after[1..], &before[..], "{}", target),
                Mode::Only => prop_assert!(after.iter().all(|host| host.url == after[0].url)),
            }
        }
        let after = host.snapshot();
        prop_assert_eq!(configure(&options).unwrap().changes, vec![]);
        prop_assert_eq!(check(&options).unwrap().findings.iter().filter(|found| found.code == Code::NotSetUp).count(), 0);
        prop_assert_eq!(&host.snapshot(), &after);

        host.cleanup();
        prop_assert_eq!(host.snapshot(), before);
    }

    /// What others write between stays, whatever they write it to.
    #[test]
    fn changes_between_stay(folders in folders(), (targets, _) in targets(), edited in any::<prop::sample::Index>()) {
        let host = host(&folders);
        let before = host.snapshot();
        let report = host.configure(&targets);
        let path = host.root.path().join(edited.get(&report.changes).path.strip_prefix("/").unwrap());
        let text = fs::read_to_string(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, format!("{text}\n# by somebody\n[host.\"https://added.test\"]\n")).unwrap();
        host.cleanup();
        let mut after = host.snapshot();
        let (_, left) = after.remove(&path).unwrap();
        let left = String::from_utf8(left.unwrap()).unwrap();
        prop_assert!(left.ends_with("# by somebody\n[host.\"https://added.test\"]\n") && !left.contains(MIRROR), "{}", left);
        let mut others = before;
        // The file that is left keeps its folder.
        others.remove(&path);
        if let Some(folder) = path.parent().filter(|folder| !others.contains_key(*folder)) {
            after.remove(folder);
        }
        prop_assert_eq!(after, others);
    }
}
