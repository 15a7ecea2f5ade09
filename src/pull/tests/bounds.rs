//! What a pull never does: send what is not for a host, follow links, grow without end, fetch more at once than
//! containerd.

use tokio_util::task::AbortOnDropHandle;

use super::*;

/// Configured headers are for their host: its own token server gets them, another one does not.
#[tokio::test]
async fn what_a_host_is_sent_does_not_go_to_a_token_server_elsewhere() {
    let image = Image::plain(&[1000]);
    let elsewhere = Registry::start(&image, Fault { token: Some("abc"), ..Fault::default() }).await;
    for realm in [None, Some(elsewhere.url.clone())] {
        let is_own = realm.is_none();
        let fault = Fault { token: Some("abc"), realm, ..Fault::default() };
        let registry = Registry::start(&image, fault).await;
        let configured = crate::upstream::hosts::Host {
            headers: vec![("x-api-key".into(), "secret".into())],
            ..crate::upstream::hosts::Host::new(&registry.url)
        };
        let folder = tempfile::tempdir().unwrap();
        pull(options(folder.path(), vec![Host::new(&configured).unwrap()]), &Silent).await.unwrap();
        let keys = |registry: &Registry, token: bool| {
            let seen = registry.state.seen.lock().unwrap();
            let seen = seen.iter().filter(|seen| seen.line.ends_with("token") == token);
            seen.map(|seen| seen.key.clone()).collect::<Vec<_>>()
        };
        assert!(keys(&registry, false).iter().all(|key| key.as_deref() == Some("secret")));
        let (own, other) = (keys(&registry, true), keys(&elsewhere, true));
        if is_own {
            assert_eq!((own, other), (vec![Some("secret".to_owned())], vec![]));
        } else {
            assert_eq!((own, other), (vec![], vec![None]));
        }
    }
}

/// A link in the place of an unfinished blob, or of a blob, leads a pull to no file outside.
#[tokio::test]
async fn links_are_not_followed() {
    let image = Image::plain(&[100_000]);
    let registry = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap();
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, vec![7; 200_000]).unwrap();
    let blob = folder.path().join("blobs/sha256").join(image.layers[0].hex());
    std::fs::remove_file(&blob).unwrap();
    let partial = folder.path().join(format!("ingest/sha256-{}.partial", image.layers[0].hex()));
    std::os::unix::fs::symlink(&victim, &partial).unwrap();
    let error = pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == partial), "{error}");
    assert_eq!(std::fs::read(&victim).unwrap(), vec![7; 200_000]);

    std::fs::remove_file(&partial).unwrap();
    std::os::unix::fs::symlink(&victim, &blob).unwrap();
    pull(options(folder.path(), vec![registry.host()]), &Silent).await.unwrap();
    check_layout(folder.path(), 3);
    assert!(std::fs::symlink_metadata(&blob).unwrap().is_file() && victim.exists());
}

/// Guards `CHILDREN_LIMIT`: what one pull keeps in memory is bounded over all manifests together.
#[tokio::test]
async fn too_many_parts_are_refused() {
    let mut image = Image::default();
    let part = |i: usize| {
        let digest = Digest::sha256(&i.to_be_bytes()).to_string();
        json!({ "mediaType": "application/octet-stream", "digest": digest, "size": 1 })
    };
    let entries: Vec<Value> = (0..6)
        .map(|n| {
            let layers: Vec<Value> = (n * 19_000..(n + 1) * 19_000).map(part).collect();
            let manifest = json!({ "schemaVersion": 2, "config": part(1_000_000), "layers": layers });
            image.manifest(MANIFEST_MEDIA_TYPES[1], &manifest, None)
        })
        .collect();
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    image.manifest(MANIFEST_MEDIA_TYPES[0], &index, Some("v1"));
    let registry = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), vec![registry.host()]);
    options.platforms = Platforms::All;
    (options.header_limit, options.stall_limit) = (Duration::from_secs(20), Duration::from_secs(20));
    let error = pull(options, &Silent).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(registry.lines().iter().all(|line| !line.contains("blobs/")), "nothing is fetched of it");
}

/// containerd fetches three layers at once: a pull that fetches one shows another mirror than runtimes see.
#[tokio::test]
async fn three_blobs_are_fetched_at_once() {
    let image = Image::plain(&[10; 8]);
    let registry = Registry::start(&image, Fault::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let hosts = vec![registry.host()];
    *registry.state.fault.lock().unwrap() = Fault { hold_blobs: true, ..Fault::default() };
    let running = AbortOnDropHandle::new(tokio::spawn({
        let mut options = options(folder.path(), hosts);
        options.header_limit = Duration::from_secs(60);
        async move { pull(options, &Silent).await }
    }));
    let blobs = || registry.lines().iter().filter(|line| line.contains("blobs/")).count();
    let three = async {
        while blobs() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    tokio::time::timeout(Duration::from_secs(20), three).await.unwrap();
    assert_eq!(blobs(), 3);
    drop(running);
}
