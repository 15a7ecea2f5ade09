//! A registry behind TLS that wants a client's certificate.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::super::hosts;
use super::*;

struct Secure {
    address: String,
    /// The heads of requests that got through the handshake.
    heads: mpsc::UnboundedReceiver<String>,
    _task: AbortOnDropHandle<()>,
}

/// Makes `server.pem`, `client.pem` and `client.key` in `dir`, and serves with them.
async fn serve(dir: &Path) -> Secure {
    let made = || rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let (server, client) = (made(), made());
    fs::write(dir.join("server.pem"), server.cert.pem()).unwrap();
    fs::write(dir.join("client.pem"), client.cert.pem()).unwrap();
    fs::write(dir.join("client.key"), client.signing_key.serialize_pem()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(client.cert.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let key = PrivateKeyDer::try_from(server.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![server.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, heads) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut buffer = vec![0; 4096];
            match acceptor.accept(stream).into_fallible().await {
                Ok(mut stream) => {
                    let read = stream.read(&mut buffer).await.unwrap_or(0);
                    sender.send(String::from_utf8_lossy(&buffer[..read]).to_lowercase()).unwrap();
                    let answer = b"HTTP/1.1 200 x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    stream.write_all(answer).await.unwrap();
                    let _ = stream.shutdown().await;
                }
                // Closed with bytes unread, the alert could be lost to a reset.
                Err((_, mut stream)) => while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {},
            }
        }
    });
    Secure { address, heads, _task: AbortOnDropHandle::new(task) }
}

#[tokio::test]
async fn hosts_are_reached_as_configured_and_probes_show_no_certificate() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a.test")).unwrap();
    let mut server = serve(&dir.path().join("a.test")).await;
    let text = format!(
        "server = \"https://{}\"\nca = \"server.pem\"\nclient = [[\"client.pem\", \"client.key\"]]\n\
         [header]\nx-api-key = \"secret\"\n",
        server.address
    );
    write(dir.path(), "a.test", &text);
    let hosts = hosts::load(&[dir.path().to_owned()], &registry("a.test")).unwrap();
    let [host] = hosts.as_slice() else { panic!("{hosts:?}") };
    let answer = host.client().unwrap().get(format!("{}/", host.url)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let head = server.heads.recv().await.unwrap();
    assert!(head.contains("x-api-key: secret"), "{head}");

    // Its refusal of a probe without a certificate is an answer: the runtime has one.
    let config = Config {
        hosts_dirs: vec![dir.path().to_owned()],
        cache: Duration::from_secs(60),
        limit: Duration::from_secs(10),
    };
    assert!(Prober::new(config.clone(), Vec::new()).answers(&registry("a.test")).await);
    assert!(server.heads.try_recv().is_err(), "no request got through");

    // A server that is not the configured one is no answer.
    fs::copy(dir.path().join("a.test/client.pem"), dir.path().join("a.test/server.pem")).unwrap();
    assert!(!Prober::new(config, Vec::new()).answers(&registry("a.test")).await);
}
