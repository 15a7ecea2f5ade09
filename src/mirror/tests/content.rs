//! What is answered, from where, when nothing is wrong.

use super::*;
use crate::store::memory::Stored;

#[tokio::test]
async fn local_content_asks_nobody() {
    let lab = Lab::new(1);
    let (artifact, layer, bytes) = image("library/app", 5 * MIB);
    lab.hold(0, &artifact);
    lab.store.put(&artifact);
    let answer = lab.open(&layer, None).await.unwrap();
    assert_eq!(answer.source, Source::Local);
    assert_eq!(answer.descriptor.size, bytes.len() as u64);
    assert!(read(answer).await.unwrap() == bytes);
    let answer = lab.manifest("library/app", artifact.target.digest).await.unwrap();
    assert_eq!((answer.source, &answer.descriptor), (Source::Local, &artifact.target));
    assert_eq!(Digest::sha256(&read(answer).await.unwrap()), artifact.target.digest);
    assert_eq!(lab.asked(0), 0);
}

#[tokio::test]
async fn peers_give_what_is_not_here() {
    let lab = Lab::new(2);
    for size in [0, 1, MIB - 1, MIB, 4 * MIB, 4 * MIB + 1, 9 * MIB + 7] {
        let (artifact, layer, bytes) = image(&format!("library/size{size}"), size);
        lab.hold(size % 2, &artifact);
        let answer = lab.open(&layer, None).await.unwrap();
        assert_eq!((answer.source, answer.range), (Source::Peers, ByteRange::whole(size as u64)));
        assert!(read(answer).await.unwrap() == bytes, "{size}");
        let answer = lab.manifest(&format!("library/size{size}"), artifact.target.digest).await.unwrap();
        assert_eq!((answer.source, &answer.descriptor), (Source::Peers, &artifact.target));
        assert_eq!(Digest::sha256(&read(answer).await.unwrap()), artifact.target.digest);
    }
    assert_eq!(lab.conduct(0).failures + lab.conduct(1).failures, 0);
}

#[tokio::test]
async fn nobody_has_it() {
    let lab = Lab::new(2);
    let (artifact, _, _) = image("library/app", 10);
    lab.hold(0, &artifact);
    let unknown = Digest::sha256(b"unknown");
    let (cause, elapsed) = lab.refused(&unknown).await;
    assert_eq!(cause, NotHere::Unknown);
    within("unknown content", elapsed, 20);
    let refusal = lab.manifest("library/app", unknown).await.map(drop).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::Unknown));
    assert_eq!(lab.asked(0) + lab.asked(1), 0);
}

#[tokio::test]
async fn ranges_are_the_same_from_here_and_from_peers() {
    let size = 5 * MIB;
    let (artifact, layer, bytes) = image("library/app", size);
    let (here, there) = (Lab::new(1), Lab::new(1));
    here.store.put(&artifact);
    there.hold(0, &artifact);
    for lab in [here, there] {
        let check = async |header: &str, start: usize, end: usize| {
            let answer = lab.open(&layer, Some(header)).await.unwrap();
            assert_eq!(answer.range, ByteRange { start: start as u64, end: end as u64 }, "{header}");
            assert_eq!(answer.descriptor.size, size as u64);
            assert!(read(answer).await.unwrap() == bytes[start..end], "{header}");
        };
        check("bytes=0-", 0, size).await;
        check("bytes=0-0", 0, 1).await;
        check(&format!("bytes={}-{}", MIB - 3, 3 * MIB + 5), MIB - 3, 3 * MIB + 6).await;
        check(&format!("bytes={}-", size - 7), size - 7, size).await;
        check(&format!("bytes=3-{}", size * 2), 3, size).await;
        check("bytes=-100", size - 100, size).await;
        check(&format!("bytes=-{}", size * 2), 0, size).await;
        for header in
            [format!("bytes={size}-"), format!("bytes={}-{}", size * 2, size * 3), "bytes=-0".into()]
        {
            let refusal = lab.open(&layer, Some(&header)).await.map(drop).unwrap_err();
            assert_eq!(refusal, Refusal::Range(RangeError { size: size as u64 }), "{header}");
        }
    }
}

#[tokio::test]
async fn head_has_the_header_and_no_body() {
    let (artifact, layer, bytes) = image("library/app", 5 * MIB);
    let (here, there) = (Lab::new(1), Lab::new(1));
    here.store.put(&artifact);
    there.hold(0, &artifact);
    for lab in [here, there] {
        let request = BlobRequest { name: name("library/app"), digest: layer, range: None, head: true };
        let answer = lab.mirror.blob(request, LIMIT).await.unwrap();
        assert_eq!(answer.descriptor.size, bytes.len() as u64);
        assert!(read(answer).await.unwrap().is_empty());
        let target = Target::Digest(artifact.target.digest);
        let answer = lab.mirror.manifest(&name("library/app"), &target, true, LIMIT).await.unwrap();
        assert_eq!(answer.descriptor, artifact.target);
        assert!(read(answer).await.unwrap().is_empty());
        // The GET that follows a HEAD asks no peer again.
        let asked = lab.asked(0);
        let answer = lab.mirror.manifest(&name("library/app"), &target, false, LIMIT).await.unwrap();
        assert_eq!(Digest::sha256(&read(answer).await.unwrap()), artifact.target.digest);
        assert_eq!(lab.asked(0), asked);
    }
}

#[tokio::test]
async fn peers_stand_in_for_a_store_that_fails() {
    let lab = Lab::new(1);
    let (artifact, layer, bytes) = image("library/app", 10);
    lab.store.put(&artifact);
    lab.store.fail(Some("the disk is gone"));
    assert_eq!(lab.refused(&layer).await.0, NotHere::StoreFailed);
    lab.hold(0, &artifact);
    assert_eq!(lab.blob(&layer).await.unwrap().0, bytes);
    assert!(lab.manifest("library/app", artifact.target.digest).await.is_ok());
}

/// Guards the moment in which a manifest is held and nothing says yet that it is one: it is kept back where manifests are, and nobody is told that
/// it is mere bytes.
#[tokio::test]
async fn what_nobody_has_named_yet_is_taken_for_a_manifest() {
    let config = Config { private: vec!["registry.test/team/**".into()], ..Config::default() };
    let lab = Lab::with(1, &config);
    let (mut carrier, _, _) = image("library/carrier", 10);
    let unnamed = |text: &str, repository: &str| {
        Stored::new(OCTET_STREAM, text.as_bytes().to_vec()).labelled("registry.test", repository)
    };
    let (secret, open) = (unnamed("secret", "team/secret"), unnamed("open", "library/carrier"));
    carrier.blobs.extend([secret.clone(), open.clone()]);
    lab.hold(0, &carrier);
    assert_eq!(lab.refused(&secret.descriptor.digest).await.0, NotHere::PeersFailed);
    assert_eq!(lab.blob(&open.descriptor.digest).await.unwrap().0, open.bytes);

    let lab = Lab::with(0, &config);
    lab.store.put(&carrier);
    assert_eq!(lab.refused(&secret.descriptor.digest).await.0, NotHere::Private);
    let answer = lab.manifest("library/carrier", open.descriptor.digest).await;
    assert_eq!(answer.err(), Some(Refusal::NotHere(NotHere::Unknown)));
    assert!(lab.manifest("library/carrier", carrier.target.digest).await.is_ok());
}

#[tokio::test]
async fn manifests_of_private_repositories_are_never_served_and_their_layers_are() {
    let config = Config { private: vec!["registry.test/team/**".into()], ..Config::default() };
    let lab = Lab::with(1, &config);
    let (secret, secret_layer, bytes) = image("team/secret", 10);
    let (shared, _, _) = image("library/shared", 10);
    lab.hold(0, &secret);
    lab.hold(0, &shared);
    let check = async |repository: &str, target: Target, expected: Option<NotHere>| {
        let answer = lab.manifest(repository, target).await.map(drop);
        assert_eq!(answer.err(), expected.map(Refusal::NotHere), "{repository}");
    };
    // From peers: by the name in the request, and because the holder knows whose it is.
    check("team/secret", "v1".into(), Some(NotHere::Private)).await;
    check("team/secret", secret.target.digest.into(), Some(NotHere::Private)).await;
    check("library/other", secret.target.digest.into(), Some(NotHere::PeersFailed)).await;
    check("library/shared", shared.target.digest.into(), None).await;
    assert_eq!(lab.blob(&secret_layer).await.unwrap().0, bytes);
    // From here: by name, and by what this node knows of the content.
    lab.store.put(&secret);
    check("team/secret", "v1".into(), Some(NotHere::Private)).await;
    check("team/secret", secret.target.digest.into(), Some(NotHere::Private)).await;
    check("library/other", secret.target.digest.into(), Some(NotHere::Private)).await;
    assert!(lab.mirror.tags(&name("team/secret")).is_empty());
    lab.store.put(&shared);
    // An empty list would say that there are none, and the runtime would not ask elsewhere.
    for (image, repository, told) in
        [(&secret, "team/secret", Err(NotHere::Private)), (&shared, "library/shared", Ok(1))]
    {
        lab.store.put(&Artifact::cosign(&format!("registry.test/{repository}:signature"), &image.target));
        let referrers = lab.mirror.referrers(&name(repository), &image.target.digest).await;
        assert_eq!(referrers.map(|referrers| referrers.len()), told, "{repository}");
    }
    assert_eq!(lab.blob(&secret_layer).await.unwrap().0, bytes);
}

/// A client that reads nothing keeps whole contents in memory, and not more than there is a budget for.
#[tokio::test]
async fn small_content_in_memory_is_bounded() {
    let lab = Lab::new(1);
    let (artifact, layer, bytes) = image("library/app", 4 * MIB);
    lab.hold(0, &artifact);
    let mut answers = Vec::new();
    let refusal = loop {
        match lab.open(&layer, None).await {
            Ok(answer) => answers.push(answer),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((refusal, answers.len()), (Refusal::NotHere(NotHere::PeersBusy), COLLECTED / 4096));
    assert!(read(answers.pop().unwrap()).await.unwrap() == bytes);
    assert!(lab.open(&layer, None).await.is_ok());
}
