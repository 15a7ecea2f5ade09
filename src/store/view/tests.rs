//! What the view derives and tells.

use super::*;
use crate::oci::{MANIFEST_MEDIA_TYPES, OCTET_STREAM};

const INDEX: &str = MANIFEST_MEDIA_TYPES[0];
const MANIFEST: &str = MANIFEST_MEDIA_TYPES[1];
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn descriptor(text: &str, media_type: &str) -> Descriptor {
    Descriptor::new(Digest::sha256(text.as_bytes()), text.len() as u64, media_type)
}

fn held(text: &str, sources: &[(&str, &str)]) -> Held {
    Held {
        digest: Digest::sha256(text.as_bytes()),
        size: text.len() as u64,
        sources: sources
            .iter()
            .flat_map(|(host, value)| Source::parse_label(&format!("{SOURCE_LABEL}{host}"), value))
            .collect(),
    }
}

fn image(name: &str, target: &Descriptor) -> Image {
    Image { name: Reference::parse_full(name).ok(), target: target.clone() }
}

fn manifest(children: &[&Descriptor], subject: Option<&Descriptor>) -> Arc<Manifest> {
    let children = children.iter().map(|child| (*child).clone()).collect();
    Arc::new(Manifest { media_type: None, children, subject: subject.cloned() })
}

fn view(images: Vec<Image>, held: Vec<Held>, manifests: &[(&Descriptor, &Arc<Manifest>)]) -> View {
    let manifests = manifests.iter().map(|(at, manifest)| (at.digest, Arc::clone(manifest))).collect();
    let view = View::new();
    view.replace(Snapshot { images, held, manifests });
    view
}

fn owners(view: &View, text: &str) -> Vec<String> {
    let blob = view.describe(&Digest::sha256(text.as_bytes())).expect(text);
    blob.repositories.iter().map(ToString::to_string).collect()
}

fn media_type(view: &View, text: &str) -> String {
    view.describe(&Digest::sha256(text.as_bytes())).expect(text).descriptor.media_type.to_string()
}

#[test]
fn trees_give_types_and_repositories() {
    let (index, one, other) =
        (descriptor("index", INDEX), descriptor("one", MANIFEST), descriptor("other", MANIFEST));
    let layer = descriptor("layer", LAYER);
    let view = view(
        vec![
            image("a.io:5000/app:1", &index),
            image("b.io/copy:1", &one),
            image("sha256:0000", &index),
            image("import-2024@sha256:00", &index),
        ],
        vec![held("index", &[]), held("one", &[]), held("layer", &[("c.io", "label")]), held("stray", &[])],
        &[(&index, &manifest(&[&one, &other], None)), (&one, &manifest(&[&layer], None))],
    );
    assert_eq!(owners(&view, "index"), ["a.io:5000/app"]);
    assert_eq!(owners(&view, "layer"), ["a.io:5000/app", "b.io/copy"], "labels are second");
    assert_eq!(media_type(&view, "index"), INDEX);
    assert_eq!(media_type(&view, "one"), MANIFEST);
    assert_eq!(media_type(&view, "layer"), LAYER);
    assert_eq!((owners(&view, "stray"), media_type(&view, "stray")), (vec![], OCTET_STREAM.to_owned()));
    assert_eq!(view.describe(&other.digest), None, "missing children are normal");

    let resolve = |text: &str| view.resolve(&Reference::parse_full(text).unwrap());
    assert_eq!(resolve("a.io:5000/app:1"), Some(index.clone()));
    assert_eq!(resolve("a.io:5000/app:2"), None);
    assert_eq!(resolve(&format!("a.io:5000/app@{}", layer.digest)), Some(layer.clone()));
    assert_eq!(resolve(&format!("a.io/app@{}", layer.digest)), None);
    assert_eq!(resolve(&format!("c.io/label@{}", layer.digest)), None);
}

#[test]
fn labels_where_no_tree_reaches() {
    let check = |names: &[&str], label: (&str, &str), expected: &[&str]| {
        let target = descriptor("manifest", MANIFEST);
        let view =
            view(names.iter().map(|name| image(name, &target)).collect(), vec![held("layer", &[label])], &[]);
        assert_eq!(owners(&view, "layer"), expected, "{names:?} {label:?}");
        let blob = view.describe(&Digest::sha256(b"layer")).unwrap();
        let is_host_known = names.iter().any(|name| name.starts_with(&format!("{}:", label.0)));
        let is_portless = !is_host_known && !names.iter().any(|name| name.starts_with("[::1]"));
        assert_eq!(
            blob.portless,
            if is_portless { &blob.repositories[..] } else { &[] },
            "{names:?} {label:?}"
        );
    };
    check(&[], ("a.io", "app"), &["a.io/app"]);
    check(
        &[],
        ("docker.io", "library/app,grafana/loki"),
        &["docker.io/grafana/loki", "docker.io/library/app"],
    );
    check(&["a.io:5000/x:1"], ("a.io", "app"), &["a.io:5000/app"]);
    check(&["[::1]:5000/x:1"], ("::1", "app"), &["[::1]:5000/app"]);
    check(&["b.io:5000/x:1"], ("a.io", "app"), &["a.io/app"]);
    // Several registries of one host: a label alone cannot tell.
    check(&["a.io:5000/x:1", "a.io:5001/y:1"], ("a.io", "y"), &["a.io:5001/y"]);
    check(&["a.io:5000/x:1", "a.io:5001/y:1"], ("a.io", "z"), &[]);
    check(&["a.io:5000/x:1", "a.io:5001/x:1"], ("a.io", "x"), &[]);
    // Malformed.
    check(&[], ("a.io", ",UPPER,,a//b,good"), &["a.io/good"]);
    check(&[], ("a b", "app"), &[]);
    check(&[], ("", "app"), &[]);
}

#[test]
fn referrers_belong_to_their_subject() {
    let (image_manifest, signature) = (descriptor("manifest", MANIFEST), descriptor("signature", MANIFEST));
    let payload = descriptor("payload", "application/vnd.dev.cosign.simplesigning.v1+json");
    let mut about = Manifest::clone(&manifest(&[&payload], Some(&image_manifest)));
    about.media_type = Some(MANIFEST.into());
    let view = view(
        vec![image("a.io/app:1", &image_manifest)],
        vec![held("signature", &[]), held("payload", &[])],
        &[(&image_manifest, &manifest(&[], None)), (&signature, &Arc::new(about))],
    );
    assert_eq!(
        (owners(&view, "signature"), media_type(&view, "signature")),
        (vec!["a.io/app".into()], MANIFEST.into())
    );
    assert_eq!(owners(&view, "payload"), ["a.io/app"]);
}

#[test]
fn cycles_and_chains_end() {
    let (one, two) = (descriptor("one", INDEX), descriptor("two", INDEX));
    let chain: Vec<_> = (0..20).map(|level| descriptor(&format!("chain{level}"), INDEX)).collect();
    let next: Vec<_> = chain.windows(2).map(|pair| manifest(&[&pair[1]], None)).collect();
    let (forth, back) = (manifest(&[&two], None), manifest(&[&one, &two], Some(&one)));
    let mut manifests: Vec<_> = chain.iter().zip(&next).collect();
    manifests.extend([(&one, &forth), (&two, &back)]);
    let view = view(
        vec![image("a.io/app:1", &one), image("b.io/deep:1", &chain[0])],
        vec![held("one", &[]), held("two", &[]), held("chain7", &[]), held("chain8", &[])],
        &manifests,
    );
    assert_eq!(owners(&view, "two"), ["a.io/app"]);
    assert_eq!(owners(&view, "chain7"), ["b.io/deep"]);
    assert_eq!(owners(&view, "chain8"), [""; 0], "deeper than any image");
}

#[test]
fn a_crafted_parent_does_not_change_what_a_manifest_is() {
    let (target, crafted) = (descriptor("manifest", MANIFEST), descriptor("crafted", INDEX));
    let (layer, config) = (descriptor("layer", LAYER), descriptor("config", CONFIG));
    let check = |text: &str, parsed: Arc<Manifest>, honest: &Descriptor, lie: &str, expected: &str| {
        let lie = descriptor(text, lie);
        let view = view(
            vec![image("a.io/app:1", honest), image("evil.io/x:1", &crafted)],
            vec![held(text, &[])],
            &[(honest, &parsed), (&crafted, &manifest(&[&lie], None))],
        );
        assert_eq!(media_type(&view, text), expected);
    };
    check("manifest", manifest(&[&layer], None), &target, "a/a", MANIFEST);
    check("manifest", manifest(&[], Some(&layer)), &target, "a/a", MANIFEST);
    // Before anybody says what it is.
    let view = view(vec![], vec![held("manifest", &[])], &[(&target, &manifest(&[&config, &layer], None))]);
    assert_eq!(media_type(&view, "manifest"), MANIFEST);
    // The other way round: any object reads as a manifest without children, and is none for that.
    check("config", manifest(&[], None), &config, MANIFEST, CONFIG);
}

#[test]
fn a_wrong_size_is_damage_unless_another_parent_is_right() {
    let target = descriptor("manifest", MANIFEST);
    let wrong = Descriptor::new(Digest::sha256(b"layer"), 4, "x/wrong");
    let view = view(
        vec![image("evil.io/x:1", &target)],
        vec![held("layer", &[])],
        &[(&target, &manifest(&[&wrong], None))],
    );
    assert_eq!(view.describe(&wrong.digest), None);
    match view.check_open(&wrong.digest, 0) {
        Err(Error::Corrupt { reason, .. }) => assert_eq!(reason, "it has 5 bytes, its descriptor says 4"),
        other => panic!("{other:?}"),
    }

    let (good, layer) = (descriptor("good", MANIFEST), descriptor("layer", LAYER));
    view.replace(Snapshot {
        images: vec![image("evil.io/x:1", &target), image("a.io/app:1", &good)],
        held: vec![held("layer", &[])],
        manifests: [(target.digest, manifest(&[&wrong], None)), (good.digest, manifest(&[&layer], None))]
            .into(),
    });
    assert_eq!(owners(&view, "layer"), ["a.io/app"]);
    assert_eq!(media_type(&view, "layer"), LAYER);
    assert!(view.check_open(&wrong.digest, 5).is_ok());
    assert!(matches!(view.check_open(&wrong.digest, 6), Err(Error::Offset { size: 5, .. })));
}

#[test]
fn expected_sizes_are_those_that_parents_name() {
    let (target, index) = (descriptor("manifest", MANIFEST), descriptor("index", INDEX));
    let layer = descriptor("layer", LAYER);
    let wrong = Descriptor::new(layer.digest, 4, "x/wrong");
    let sizes: Vec<_> = (0..17).map(|size| Descriptor::new(Digest::sha256(b"many"), size, LAYER)).collect();
    let many = |count: usize| manifest(&sizes[..count].iter().collect::<Vec<_>>(), None);
    let check = |images: Vec<Image>,
                 held: Vec<Held>,
                 manifests: &[(&Descriptor, &Arc<Manifest>)],
                 text: &str,
                 expected: Option<&[u64]>| {
        let view = view(images, held, manifests);
        let sizes = view.expected_sizes(&Digest::sha256(text.as_bytes()));
        assert_eq!(sizes.as_deref(), expected, "{text}");
    };
    let named = || vec![image("a.io/app:1", &target)];
    check(vec![], vec![held("layer", &[])], &[], "layer", Some(&[]));
    check(named(), vec![], &[], "manifest", Some(&[8]));
    // By a tree, and by manifests that no record leads to.
    check(named(), vec![], &[(&target, &manifest(&[&layer, &layer], None))], "layer", Some(&[5]));
    check(vec![], vec![], &[(&target, &manifest(&[&layer], None))], "layer", Some(&[5]));
    let contradiction = [(&target, &manifest(&[&layer], None)), (&index, &manifest(&[&wrong], None))];
    check(named(), vec![held("layer", &[])], &contradiction, "layer", Some(&[4, 5]));
    check(named(), vec![], &[(&target, &many(16))], "many", Some(&(0..16).collect::<Vec<_>>()));
    check(named(), vec![], &[(&target, &many(17))], "many", None);
}

#[test]
fn a_tag_needs_its_manifest() {
    let target = descriptor("manifest", MANIFEST);
    let view = view(vec![image("a.io/app:1", &target)], vec![], &[]);
    let name = Reference::parse_full("a.io/app:1").unwrap();
    assert_eq!((view.resolve(&name), view.tags(&name.name)), (None, vec![]));
    view.add(&held("manifest", &[]));
    assert_eq!(view.resolve(&name), Some(target));
    assert_eq!(view.tags(&name.name), ["1".parse::<Tag>().unwrap()]);
}

#[test]
fn changes_follow_the_snapshot_without_a_gap() {
    let layer = descriptor("a", LAYER);
    let target = descriptor("manifest", MANIFEST);
    let view = view(
        vec![image("a.io/app:1", &target)],
        vec![held("b", &[])],
        &[(&target, &manifest(&[&layer], None))],
    );
    let mut watch = view.watch();
    assert_eq!(watch.held, [Digest::sha256(b"b")]);
    view.add(&held("a", &[]));
    view.add(&held("a", &[("x.io", "late")]));
    assert_eq!(media_type(&view, "a"), LAYER);
    view.remove(&Digest::sha256(b"b"));
    view.remove(&Digest::sha256(b"b"));
    view.replace(Snapshot { held: vec![held("b", &[])], ..Snapshot::default() });
    let mut changes = Vec::new();
    while let Ok(change) = watch.changes.try_recv() {
        changes.push(change);
    }
    let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
    assert_eq!(changes, [Change::Added(a), Change::Removed(b), Change::Removed(a), Change::Added(b)]);
}

#[test]
fn watches_that_begin_while_content_is_added_miss_nothing() {
    let view = View::new();
    let all: HashSet<_> = (0..2000).map(|i: u32| Digest::sha256(&i.to_be_bytes())).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for digest in &all {
                view.add(&Held { digest: *digest, size: 1, sources: Vec::new() });
            }
        });
        for _ in 0..50 {
            let mut watch = view.watch();
            let mut seen: HashSet<_> = watch.held.drain(..).collect();
            while seen.len() < all.len() {
                match watch.changes.try_recv() {
                    Ok(Change::Added(digest)) => assert!(seen.insert(digest), "told twice"),
                    Ok(change) => panic!("{change:?}"),
                    Err(_) => std::thread::yield_now(),
                }
            }
        }
    });
}

#[test]
fn health_changes_once() {
    let view = View::new();
    assert_eq!(*view.health().borrow(), Health::Starting);
    let check = |health: Health, changes: bool, was_read: bool| {
        assert_eq!((view.set_health(health.clone()), view.was_read()), (changes, was_read), "{health:?}");
    };
    check(Health::Degraded("absent at the start".into()), true, false);
    check(Health::Ready, true, true);
    check(Health::Ready, false, true);
    check(Health::Degraded("gone".into()), true, true);
}
