use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn is_made_once_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("a/b");
    let first = Identity::load_or_create(&state).unwrap();
    let second = Identity::load_or_create(&state).unwrap();
    assert_eq!(first.peer_id(), second.peer_id());
    assert_eq!((mode(&state), mode(&state.join(FILE))), (0o700, 0o600));
    let names: Vec<_> = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [FILE]);
}

#[test]
fn narrows_the_mode() {
    let folder = tempfile::tempdir().unwrap();
    let first = Identity::load_or_create(folder.path()).unwrap();
    let path = folder.path().join(FILE);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(Identity::load_or_create(folder.path()).unwrap().peer_id(), first.peer_id());
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_corrupt_file_is_never_overwritten() {
    let good = {
        let folder = tempfile::tempdir().unwrap();
        Identity::load_or_create(folder.path()).unwrap();
        fs::read(folder.path().join(FILE)).unwrap()
    };
    let mut flipped = good.clone();
    flipped[HEADER.len() + 10] ^= 1;
    let newer = [b"peili-identity 2\n", &good[HEADER.len()..]].concat();
    let check = |content: &[u8], reason: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        fs::write(&path, content).unwrap();
        let text = Identity::load_or_create(folder.path()).unwrap_err().to_string();
        assert!(text.contains(reason) && text.contains(path.to_str().unwrap()), "{text}");
        assert!(text.contains("restore it"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), content);

        let (identity, aside) = Identity::recover(folder.path()).unwrap();
        assert_eq!(fs::read(aside.unwrap()).unwrap(), content);
        let (again, aside) = Identity::recover(folder.path()).unwrap();
        assert_eq!((again.peer_id(), aside), (identity.peer_id(), None));
    };
    check(b"", "empty");
    check(&good[..8], "cut short");
    check(&good[..good.len() - 5], "cut short");
    check(&flipped, "damaged");
    check(&newer, "another version");
    check(b"-----BEGIN PRIVATE KEY-----", "does not begin");
    check(&vec![b'x'; 1 << 20], "too large");
}

#[test]
fn a_pipe_does_not_block() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let text = Identity::load_or_create(folder.path()).unwrap_err().to_string();
    assert!(text.contains("regular file"), "{text}");
}

#[test]
fn certificates_prove_the_peer() {
    let identity = Identity::generate();
    let (certificate, _) = identity.certificate().unwrap();
    assert_eq!(&peer_of_certificate(&certificate).unwrap(), identity.peer_id());

    let mut damaged = certificate.to_vec();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    assert!(peer_of_certificate(&damaged.into()).is_err());
    assert!(peer_of_certificate(&vec![0u8; 10].into()).is_err());
}

#[test]
fn handshakes_are_signed_by_the_certificates_key() {
    let (certificate, key) = Identity::generate().certificate().unwrap();
    let (other, _) = Identity::generate().certificate().unwrap();
    let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
    let scheme = SignatureScheme::ECDSA_NISTP256_SHA256;
    let signature = key.choose_scheme(&[scheme]).unwrap().sign(b"transcript").unwrap();
    assert!(verify_handshake(&certificate, scheme, b"transcript", &signature).is_ok());
    assert!(verify_handshake(&certificate, scheme, b"other", &signature).is_err());
    assert!(verify_handshake(&other, scheme, b"transcript", &signature).is_err());
}
