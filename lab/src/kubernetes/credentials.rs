//! Who is who: an authority, certificates of the server and its administrator, and the key that signs tokens of service accounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};

/// Who issues tokens, and whom they are for.
pub(super) const ISSUER: &str = "https://kubernetes.default.svc";

/// Clients' sides of TLS, and the key of service accounts. Its files are in the folder that it was made in: `ca.crt`,
/// `server.*`, `admin.*`, `accounts.*`.
#[derive(Debug)]
pub(super) struct Credentials {
    admin: Arc<ClientConfig>,
    nobody: Arc<ClientConfig>,
    accounts: EcdsaKeyPair,
    authority: String,
}

/// What a token says of the account that it is for.
pub(super) struct Account<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) uid: &'a str,
}

impl Credentials {
    /// `names`: those of the server, addresses among them.
    pub(super) fn make(folder: &Path, names: &[String]) -> Result<Self> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "kubernetes");
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?;
        let issuer = Issuer::new(authority, key);
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone())?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        let sign = |name: &str, mut params: CertificateParams, common_name: &str, purpose| {
            params.distinguished_name.push(DnType::CommonName, common_name);
            params.extended_key_usages = vec![purpose];
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &issuer)?;
            write(&format!("{name}.crt"), &certificate.pem())?;
            write(&format!("{name}.key"), &key.serialize_pem())?;
            Ok::<_, anyhow::Error>((certificate, key))
        };
        sign(
            "server",
            CertificateParams::new(names.to_vec())?,
            "kube-apiserver",
            ExtendedKeyUsagePurpose::ServerAuth,
        )?;
        let mut admin = CertificateParams::new(Vec::new())?;
        // Whoever is of this group may do everything, and no role takes that away.
        admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
        let (admin, admin_key) = sign("admin", admin, "admin", ExtendedKeyUsagePurpose::ClientAuth)?;
        let accounts = KeyPair::generate()?;
        write("ca.crt", &certificate.pem())?;
        write("accounts.key", &accounts.serialize_pem())?;
        write("accounts.pub", &accounts.public_key_pem())?;
        let accounts = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, accounts.serialized_der())
            .context("the key of service accounts")?;
        let client = || {
            let client = ClientConfig::builder_with_provider(Arc::new(default_provider()));
            let client = client.with_safe_default_protocol_versions()?;
            Ok::<_, rustls::Error>(client.with_root_certificates(roots.clone()))
        };
        let admin_key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(admin_key.serialize_der()));
        let admin = client()?.with_client_auth_cert(vec![admin.der().clone()], admin_key)?;
        let nobody = client()?.with_no_client_auth();
        let authority = certificate.pem();
        Ok(Self { admin: Arc::new(admin), nobody: Arc::new(nobody), accounts, authority })
    }

    /// The administrator.
    pub(super) fn admin(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.admin)
    }

    /// Without a certificate.
    pub(super) fn nobody(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.nobody)
    }

    /// A token as TokenRequest makes them, bound to the account's UID, that ends at `until`.
    pub(super) fn token(&self, account: &Account<'_>, until: SystemTime) -> Result<String> {
        let Account { namespace, name, uid } = account;
        // Issued before its end, also where that is long over, and a little before now, for clocks of whole seconds.
        let issued = until.min(SystemTime::now()) - Duration::from_secs(2);
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map(|time| time.as_secs());
        let claims = json!({
            "aud": [ISSUER],
            "exp": seconds(until)?,
            "iat": seconds(issued)?,
            "nbf": seconds(issued)?,
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": name, "uid": uid}},
        });
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(&json!({"alg": "ES256", "typ": "JWT"})), encode(&claims));
        let signature = self.accounts.sign(&SystemRandom::new(), signed.as_bytes());
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.context("cannot sign")?)))
    }

    /// Lays out `token`, `ca.crt` and `namespace` as kubelet does in a projected volume: links into a folder that a link leads
    /// to, which is replaced at once.
    pub(super) fn write_volume(&self, folder: &Path, token: &str, namespace: &str) -> Result<()> {
        fs::create_dir_all(folder)?;
        let old = fs::read_link(folder.join("..data")).ok();
        let number = (0..).map(|number| format!("..{number}")).find(|name| !folder.join(name).exists());
        let data = PathBuf::from(number.context("there is always a next one")?);
        fs::create_dir(folder.join(&data))?;
        for (name, text) in [("token", token), ("ca.crt", &self.authority), ("namespace", namespace)] {
            fs::write(folder.join(&data).join(name), text)?;
            let link = folder.join(name);
            if link.symlink_metadata().is_err() {
                std::os::unix::fs::symlink(Path::new("..data").join(name), link)?;
            }
        }
        std::os::unix::fs::symlink(&data, folder.join("..data_tmp"))?;
        fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
        old.map_or(Ok(()), |old| fs::remove_dir_all(folder.join(old))).context("cannot remove the old ones")
    }
}
