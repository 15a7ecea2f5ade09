use std::fs;

use insta::assert_snapshot;

use super::*;

const PEER: &str = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";

fn load(text: &str, set: &[&str], environment: &[(&str, &str)]) -> Result<Loaded, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.yaml");
    fs::write(&path, text).unwrap();
    let mut pairs: Vec<_> = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    pairs.push(("NODE_NAME".into(), "n1".into()));
    let inputs = Inputs {
        path: Some(path),
        set: set.iter().map(|text| (*text).to_owned()).collect(),
        environment: pairs,
    };
    inputs.load().map_err(|error| error.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

fn error(text: &str) -> String {
    load(text, &[], &[]).unwrap_err()
}

#[test]
fn an_empty_file_is_all_defaults() {
    for text in ["", "# nothing\n", "mirror:\n", "---\n"] {
        let mut expected = Config::default();
        expected.node.name = "n1".into();
        assert_eq!(load(text, &[], &[]).unwrap().config, expected, "{text:?}");
    }
    let absent = Inputs { path: Some("/nonexistent/c.yaml".into()), ..Inputs::default() };
    assert!(matches!(absent.load(), Err(Error::Read { .. })));
}

#[test]
fn errors_show_the_place() {
    assert_snapshot!(error("mirror:\n  segmnt: 8MiB\n"), @r#"
    c.yaml:2:3: mirror: unknown key `segmnt`
      |
    2 |   segmnt: 8MiB
      |   ^^^^^^
    hint: did you mean `segment`?
    "#);
    assert_snapshot!(error("node:\n  name: 12\n"), @r#"
    c.yaml:2:9: node.name: expected a text, found the number 12
      |
    2 |   name: 12
      |         ^^
    hint: quote it
    "#);
    assert_snapshot!(error("mirror:\n  verify: maybe\n"), @r#"
    c.yaml:2:11: mirror.verify: expected true or false, found `maybe`
      |
    2 |   verify: maybe
      |           ^^^^^
    "#);
    assert_snapshot!(error("registry:\n  lists: heldd\n"), @r#"
    c.yaml:2:10: registry.lists: `heldd` is not possible here
      |
    2 |   lists: heldd
      |          ^^^^^
    hint: did you mean `held`?
    "#);
    assert_snapshot!(error("mirror:\n  segment: 1KiB\nregistry:\n  listen: [\"0.0.0.0:5000\"]\n"), @r#"
    c.yaml:2:12: mirror.segment: must be 64KiB to 64MiB
      |
    2 |   segment: 1KiB
      |            ^^^^

    c.yaml:4:12: registry.listen[0]: 0.0.0.0:5000 is not loopback
      |
    4 |   listen: ["0.0.0.0:5000"]
      |            ^^^^^^^^^^^^^^
    hint: whoever reaches the address reads every image of this node and its peers; in a pod with a network of its own set registry.clients: node; if you want that, set registry.clients: all
    "#);
    assert_snapshot!(error("mirror:\n  verify: true\n  verify: false\n"), @r#"
    c.yaml:3:3: the key `verify` is there twice
      |
    3 |   verify: false
      |   ^^^^^^
    "#);
    assert_snapshot!(error("mirror: [\n"), @r#"
    c.yaml:1:9: unclosed bracket '['
      |
    1 | mirror: [
      |         ^
    "#);
}

#[test]
fn environment_and_flags_are_on_top_and_named() {
    let text = "mirror:\n  stall: 2s\n  segment: 4MiB\n";
    let loaded = load(
        text,
        &["mirror.segment=2MiB", "store.namespaces=a,b"],
        &[
            ("PEILI_MIRROR__SEGMENT", "1MiB"),
            ("PEILI_MIRROR__TAGS_PEERS_FIRST", "[\"a.io/**\"]"),
            ("PEILI_REGISTRY__LISTEN", "[::1]:5000"),
            ("PEILI_PEERS_SERVICE_HOST", "10.0.0.1"),
        ],
    );
    let loaded = loaded.unwrap();
    let mirror = &loaded.config.mirror;
    assert_eq!(mirror.stall, Duration::from_secs(2));
    assert_eq!(mirror.segment.as_u64(), 2 << 20);
    assert_eq!(mirror.tags_peers_first, ["a.io/**"]);
    assert_eq!(loaded.config.store.namespaces, ["a", "b"]);
    assert_eq!(loaded.config.registry.listen, ["[::1]:5000".parse().unwrap()]);
    let shown = loaded.show();
    for (key, source) in [
        ("stall:", "c.yaml:2"),
        ("segment:", "--set mirror.segment"),
        ("name:", "NODE_NAME"),
        ("tags-peers-first:", "PEILI_MIRROR__TAGS_PEERS_FIRST"),
        ("drain:", "default"),
    ] {
        let line = shown.lines().find(|line| line.trim_start().starts_with(key)).unwrap();
        assert!(line.contains(" # ") && line.ends_with(source), "{line}");
    }
    let error = load("", &[], &[("PEILI_MIRROR__SEGMENTS", "1MiB")]).unwrap_err();
    assert_snapshot!(error, @r#"
    environment variable PEILI_MIRROR__SEGMENTS: mirror: unknown key `segments`
    hint: did you mean `segment`?
    "#);
    let error = load("", &["mirror.segment=1"], &[]).unwrap_err();
    assert_snapshot!(error, @"--set mirror.segment=1: mirror.segment: must be 64KiB to 64MiB");
}

#[test]
fn semantic_checks() {
    let check = |text: &str, expected: &str| {
        let error = error(text);
        assert!(error.contains(expected), "{text}\n{error}");
    };
    check(
        &format!("network:\n  peers:\n    - id: {PEER}\n    - id: {PEER}\n"),
        "network.peers[1].id: this peer is there twice",
    );
    check("network:\n  peers:\n    - id: abc\n", "c.yaml:3:11: network.peers[0].id: a peer ID is");
    check("network:\n  cluster-key: [a, b, c]\n", "c.yaml:2:16: network.cluster-key: at most two files");
    check("network:\n  cluster-key: [\"\"]\n", "network.cluster-key[0]: must not be empty");
    check("network:\n  cluster: a b\n", "network.cluster: must be 1 to 63 letters");
    check("network:\n  deny: [x]\n", "network.deny[0]: a peer ID is");
    check("network:\n  dns: [\"a b:1\"]\n", "network.dns[0]: `a b:1` is not host:port");
    check("trust:\n  deny: [\"[\"]\n", "trust.deny[0]: `[` is not a pattern");
    check(
        "admin:\n  listen: [\"127.0.0.1:5000\"]\n",
        "admin.listen[0]: 127.0.0.1:5000 is taken by registry.listen[0]",
    );
    check("store:\n  source: docker\n", "store.source: `docker` is not of the form layout:PATH");
    // What the stores refuse or leave out.
    check("store:\n  source: \"layout:/a,b\"\n", "store.source: `b` after the comma");
    check("store:\n  source: layout:/x.tar.gz\n", "store.source: `/x.tar.gz` is compressed");
    check("store:\n  source: \"layout:/a,name=team/app\"\n", "store.source: name=`team/app` must begin");
    for namespace in ["-a", "a..b", "a-", "a/b"] {
        check(
            &format!("store:\n  namespaces: [\"{namespace}\"]\n"),
            &format!("store.namespaces[0]: `{namespace}` is not a namespace"),
        );
    }
    check("admin:\n  listen: [\"0.0.0.0:5003\"]\n", "admin.listen[0]: 0.0.0.0:5003 is not loopback");
    check("log:\n  level: \"a=b=c\"\n", "log.level");
    check("registry:\n  blob-deadline: 1h\n", "registry.blob-deadline: must be 10ms to 1m");
    check("node:\n  drain: x\n", "c.yaml:2:10: node.drain");
}

/// What is legal and should be known: an open network, and key files that are no keys.
#[test]
fn warnings() {
    let warnings = |text: &str| load(text, &[], &[]).unwrap().warnings().join("\n");
    assert!(warnings("").starts_with("the network is open"), "{}", warnings(""));
    assert_eq!(warnings(&format!("network:\n  peers:\n    - id: {PEER}\n")), "");
    let text = warnings("network:\n  cluster-key: [/no/such/key]\n");
    assert!(text.starts_with("cluster key /no/such/key: it cannot be read: No such file"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    fs::write(&path, [1; 32]).unwrap();
    assert_eq!(warnings(&format!("network:\n  cluster-key: [{}]\n", path.display())), "");
}

#[test]
fn hostile_files_are_bounded() {
    let large = format!("#{}\n", "x".repeat(1 << 20));
    assert!(error(&large).ends_with("is larger than 1 MiB"));
    assert!(load(&format!("a: {}{}", "[".repeat(5000), "]".repeat(5000)), &[], &[]).is_err());
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for i in 1..10 {
        let refs = vec![format!("*a{}", i - 1); 10].join(",");
        bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    assert!(load(&bomb, &[], &[]).is_err());
}

#[test]
fn live_and_restart() {
    let old = Config::default();
    let mut new = old.clone();
    new.mirror.verify = false;
    new.network.dns = vec!["a:1".into()];
    new.network.listen.clear();
    new.log.level = "debug".into();
    new.trust.unowned = true;
    new.registry.listen.clear();
    let reload = diff(&old, &new);
    assert_eq!(reload.live, ["log.level", "mirror.verify", "network.dns", "trust.unowned"]);
    assert_eq!(reload.restart, ["network.listen", "registry.listen"]);
    assert_eq!(diff(&old, &old), Reload::default());
}

#[test]
fn the_schema_documents_each_key_and_default() {
    let schema = schema();
    let defaults = serde_json::to_value(Config::default()).unwrap();
    for (section, reference) in schema["properties"].as_object().unwrap() {
        if let Some(item) = reference["items"]["$ref"].as_str() {
            let item = &schema["$defs"][item.rsplit('/').next().unwrap()];
            for (key, property) in item["properties"].as_object().unwrap() {
                assert!(property["description"].is_string(), "{section}[].{key} has no description");
            }
            continue;
        }
        let name = reference["$ref"].as_str().and_then(|text| text.rsplit('/').next()).unwrap();
        let definition = &schema["$defs"][name];
        for (key, property) in definition["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{section}.{key} has no description");
            assert_eq!(property["default"], defaults[section][key], "{section}.{key}");
        }
    }
}

/// What the documents show as a configuration is one.
#[test]
fn the_documents_show_valid_configurations() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (document, least) in [("README.md", 1), ("docs/policies.md", 3), ("docs/without-kubernetes.md", 1)] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let mut count = 0;
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            let indent = block.len() - block.trim_start_matches(' ').len();
            let lines = block.lines().map(|line| line.get(indent..).unwrap_or_default());
            let block = lines.collect::<Vec<_>>().join("\n");
            let parsed = Inputs::default().parse(Some(&block));
            parsed.unwrap_or_else(|error| panic!("{document}:\n{block}\n{error}"));
            count += 1;
        }
        assert!(count >= least, "{document} has {count}");
    }
}

#[test]
fn the_examples_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let inputs = Inputs { path: Some(path), ..Inputs::default() };
            inputs.load().unwrap_or_else(|error| panic!("{error}"));
            count += 1;
        }
    }
    assert!(count >= 4);
}

#[tokio::test]
async fn the_watch_follows_swapped_links_and_keeps_on_after_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.yaml");
    let put = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(name, &link).unwrap();
        fs::rename(link, &path).unwrap();
    };
    put("one", "log: {level: info}\n");
    let loaded = Inputs { path: Some(path.clone()), ..Inputs::default() }.load().unwrap();
    let mut watch = watch::watch(&loaded).unwrap();
    let limit = Duration::from_secs(20);
    put("two", "log: {levl: info}\n");
    let next = tokio::time::timeout(limit, watch.next()).await.unwrap().unwrap();
    assert!(matches!(next, Err(Error::Invalid(_))));
    put("three", "log: {level: debug}\n");
    let next = tokio::time::timeout(limit, watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(next.config.log.level, "debug");
    fs::remove_file(&path).unwrap();
    let next = tokio::time::timeout(limit, watch.next()).await.unwrap().unwrap();
    assert!(matches!(next, Err(Error::Read { .. })));
}

/// Guards that a password does not go over plain HTTP, and that each slip in a list at the top is named by its place.
#[test]
fn upstreams_are_checked() {
    let faults = |text: &str| match Inputs::default().parse(Some(text)) {
        Ok(_) => Vec::new(),
        Err(Error::Invalid(faults)) => faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
        Err(error) => panic!("{error}"),
    };
    let of = |rest: &str| faults(&format!("upstreams:\n  - {{name: corp, {rest}}}\n"));
    assert!(of("address: 'https://r.test/a', credentials: /x, repositories: [a/b, /]").is_empty());
    assert!(of("address: 'http://127.0.0.1:5', credentials: /x, repositories: [a]").is_empty());
    for (rest, part) in [
        ("address: 'http://r.test', credentials: /x, repositories: [a]", "plain http"),
        ("address: 'https://me:secret@r.test', repositories: [a]", "is not an address"),
        ("address: r.test, repositories: [a]", "is not an address"),
        ("address: 'https://r.test', repositories: []", "at least one"),
        ("address: 'https://r.test', repositories: ['a/*']", "is no prefix"),
        ("address: 'https://r.test', repositories: [a], ca: x", "absolute path"),
    ] {
        let found = of(rest);
        assert!(matches!(&found[..], [one] if one.contains(part) && one.contains(":2")), "{rest}: {found:?}");
    }
}

#[test]
fn the_kubernetes_section_is_checked() {
    let parse = |text: &str, environment: &[(&str, &str)]| {
        let environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        match (Inputs { environment, ..Inputs::default() }).parse(Some(text)) {
            Ok(loaded) => Ok(loaded.config.kubernetes.service),
            Err(Error::Invalid(faults)) => Err(faults.iter().map(ToString::to_string).collect::<String>()),
            Err(error) => panic!("{error}"),
        }
    };
    let pod = [("KUBERNETES_SERVICE_HOST", "fd00::1"), ("KUBERNETES_SERVICE_PORT", "443")];
    assert_eq!(parse("{}", &pod), Ok("[fd00::1]:443".into()));
    assert_eq!(parse("{}", &pod[..1]), Ok(String::new()), "a host without a port is no Service");
    assert_eq!(parse("kubernetes: {service: 'a:1'}", &pod), Ok("a:1".into()), "the file counts more");
    assert!(parse("election: {backend: lease}", &pod).is_ok());
    assert!(parse("election: {backend: configmap, configmap: {name: old, hold: both}}", &pod).is_ok());
    for (wrong, part) in [
        ("election: {backend: lease}", "none is known"),
        ("election: {backend: configmap}", "`configmap` needs a Kubernetes API"),
        ("election: {configmap: {name: ../x}}", "no name of an object"),
        ("election: {configmap: {name: peili-fleet}}", "the coordinator's summary"),
        ("election: {configmap: {hold: none}}", "none"),
        ("election: {lease: {name: ../x}}", "no name of an object"),
        // Of each of these only one is wrong: the name, and that of the ConfigMap that is called after it.
        ("election: {lease: {name: a-}}", "no name of an object"),
        (&format!("election: {{lease: {{name: {}}}}}", "a".repeat(253)), "no name of an object"),
        ("election: {lease: {times: slow}}", "slow"),
        ("kubernetes: {endpoints: ['http://a']}", "no address of an API server"),
        ("kubernetes: {service: 'a'}", "kubernetes.service"),
        ("kubernetes: {namespace: A/b}", "no name of a namespace"),
    ] {
        let faults = parse(wrong, &[]).unwrap_err();
        assert!(faults.contains(part), "{wrong}: {faults}");
    }
}

#[test]
fn elections_are_checked() {
    let faults = |rest: &str| match Inputs::default().parse(Some(&format!("election:\n  {rest}\n"))) {
        Ok(_) => Vec::new(),
        Err(Error::Invalid(faults)) => faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
        Err(error) => panic!("{error}"),
    };
    let many = |count: usize, length: usize| {
        let labels: Vec<String> = (0..count).map(|n| format!("k{n}: {}", "v".repeat(length))).collect();
        format!("labels: {{{}}}", labels.join(", "))
    };
    for right in ["backend: gossip", "introducers: 16", "labels: {pool: large, empty: ''}", &many(8, 20)] {
        assert!(faults(right).is_empty(), "{right}: {:?}", faults(right));
    }
    assert!(faults("backend: static\n  nodes: [a, b]").is_empty());
    for (wrong, part) in [
        ("backend: king", "king"),
        ("introducers: 0", "must be 1 to 16"),
        ("introducers: 17", "must be 1 to 16"),
        ("backend: static", "must name a node"),
        ("nodes: [a]", "of use with `backend: static` only"),
        ("backend: static\n  nodes: [a, a]", "named twice"),
        ("backend: static\n  nodes: ['a b']", "no name of a node"),
        (&many(9, 1), "more than 8 labels"),
        (&many(8, 40), "than 192 bytes"),
        (&many(1, 64), "at most 63 bytes"),
    ] {
        let found = faults(wrong);
        assert!(matches!(&found[..], [one] if one.contains(part)), "{wrong}: {found:?}");
    }
}

/// Guards that each world's policies are looked at.
#[test]
fn policies_of_all_worlds_are_checked() {
    for world in ["registry", "trust", "election"] {
        let text = format!(
            "policies:\n  roots: [/etc/peili/policies]\n  {world}:\n    - {{name: 'a b', path: /etc/peili/policies/../x.wasm, sha256: abc, settings: 5}}\n"
        );
        let Err(Error::Invalid(faults)) = Inputs::default().parse(Some(&text)) else { panic!("{world}") };
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        for part in ["is not a name", "without `..`", "64 hexadecimal digits", "keys and values"] {
            assert!(faults.iter().any(|fault| fault.contains(part)), "{world}: {part} is not in {faults:?}");
        }
        let text = format!("policies:\n  {world}: [{{name: a, path: /x/a, failure: deny}}]\n");
        assert_eq!(Inputs::default().parse(Some(&text)).is_ok(), world == "registry", "{world}");
    }
}

/// Guards that no limit of a policy is beyond the host's, that its files are checked as components are, and that the line is named.
#[test]
fn limits_and_data_of_policies_are_checked() {
    let parse = |world: &str, rest: &str| {
        let text = format!("policies:\n  {world}:\n    - name: a\n      path: /x/a\n{rest}");
        match Inputs::default().parse(Some(&text)) {
            Ok(_) => Vec::new(),
            Err(Error::Invalid(faults)) => faults,
            Err(error) => panic!("{error}"),
        }
    };
    let most = "      limits:\n        time: 10ms\n        memory: 64MiB\n        verdict: 64KiB\n        log: 100\n";
    let longer = most.replace("10ms", "20ms");
    for (world, is_longer) in [("registry", false), ("trust", false), ("election", true)] {
        assert!(parse(world, most).is_empty(), "{world}");
        let faults = parse(world, &longer);
        assert_eq!(faults.is_empty(), is_longer, "{world}: {faults:?}");
        for (limit, line, words) in [
            ("time: 21ms", 6, "must be 1ms to "),
            ("time: 500us", 6, "must be 1ms to "),
            ("memory: 65MiB", 6, "must be 1MiB to 64MiB"),
            ("memory: 1000KiB", 6, "must be 1MiB to 64MiB"),
            ("verdict: 65KiB", 6, "must be 1KiB to 64KiB"),
            ("log: 101", 6, "must be at most 100"),
        ] {
            let faults = parse(world, &format!("      limits:\n        {limit}\n"));
            let [fault] = &faults[..] else { panic!("{world}: {limit}: {faults:?}") };
            assert_eq!(fault.origin.line(), Some(line), "{fault:?}");
            assert!(fault.message.contains(words) && fault.hint.is_some(), "{fault:?}");
        }
        let wrong = "      data:\n        - {name: 'a b', path: x/y, sha256: abc}\n        - {name: c, path: /x/c}\n        - {name: c, path: /x/c}\n";
        let faults: Vec<_> =
            parse(world, wrong).iter().map(|fault| (fault.origin.line(), fault.to_string())).collect();
        for (line, part) in
            [(6, "is not a name"), (6, "absolute path"), (6, "64 hexadecimal"), (8, "there twice")]
        {
            assert!(
                faults.iter().any(|(at, fault)| *at == Some(line) && fault.contains(part)),
                "{part}: {faults:?}"
            );
        }
        let many: String =
            (0..9).map(|number| format!("        - {{name: n{number}, path: /x/c}}\n")).collect();
        let faults = parse(world, &format!("      data:\n{many}"));
        assert!(faults.len() == 1 && faults[0].message.contains("more than 8 files"), "{faults:?}");
        assert!(!parse(world, "      limits: {table: 1}\n").is_empty());
    }
    let text =
        "policies:\n  roots: [/x]\n  registry: [{name: a, path: /x/a, data: [{name: b, path: /y/b}]}]\n";
    let Err(Error::Invalid(faults)) = Inputs::default().parse(Some(text)) else { panic!() };
    assert!(faults[0].message.contains("none of policies.roots") && faults.len() == 1, "{faults:?}");
}

/// What a policy refuses is named by the line of the file; what a flag says has none.
#[test]
fn settings_of_policies_know_their_lines() {
    let text = "policies:\n  registry:\n    - name: a\n      path: /x/a\n      settings:\n        allow:\n          - a/b\n          - c/d\n        \"a/b\": 1\n";
    let config = Inputs::default().parse(Some(text)).unwrap().config;
    let line = |pointer: &str, line: u64| (pointer.to_owned(), line);
    let expected =
        [line("", 6), line("/allow", 6), line("/allow/0", 7), line("/allow/1", 8), line("/a~1b", 9)];
    assert_eq!(config.policies.registry[0].lines, policy::Lines::new(expected));
    let set = vec!["policies.registry=[{name: a, path: /x/a, settings: {allow: []}}]".to_owned()];
    let config = Inputs { set, ..Inputs::default() }.parse(None).unwrap().config;
    assert_eq!(config.policies.registry[0].lines, policy::Lines::default());
}
