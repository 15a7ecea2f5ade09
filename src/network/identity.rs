//! The node's identity: an ed25519 key on disk, the certificates made from it, and the proof in those of others.
//!
//! The file `identity.key` holds [`HEADER`] and then the key in libp2p's protobuf encoding of private keys. It is
//! written once, whole, and never overwritten: a file that cannot be read as a key is an error, and only
//! [`Identity::recover`], which the configuration asks for, moves it aside. Blocks on the disk: call it before serving.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libp2p::identity::Keypair;
use rustls::SignatureScheme;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::oci::PeerId;

/// Name of the file within the state folder.
pub const FILE: &str = "identity.key";
/// Begins the file; the number is the version of the format.
const HEADER: &[u8] = b"peili-identity 1\n";
/// Far above the 85 bytes of a header and an ed25519 key.
const SIZE_LIMIT: u64 = 4096;
/// How many corrupt files are kept beside the good one.
const ASIDE_LIMIT: u32 = 1000;

/// A key pair, and the peer ID that stands for it.
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
    peer_id: PeerId,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is there and holds no key that can be read. Nothing was changed.
    #[error(
        "{} holds no identity: {reason}; restore it from a backup, or move it away and restart to get a new peer ID \
         (which the other nodes must then be told)", path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file or its folder cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why a certificate proves no peer ID, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Not in the format of libp2p-tls, expired, or its signatures do not hold.
    #[error("the certificate proves no peer ID: {0}")]
    Invalid(String),
    /// The signature over the handshake was not made with the certificate's key.
    #[error("the handshake was not signed with the certificate's key: {0}")]
    Signature(String),
    /// The key made no certificate.
    #[error("cannot make a certificate: {0}")]
    Generate(String),
}

impl Identity {
    /// A new identity that is nowhere on disk.
    pub fn generate() -> Self {
        Self::from_keypair(Keypair::generate_ed25519())
    }

    /// The identity in `folder`, made at the first call. Makes the folder (0700) and narrows the file's mode to 0600.
    pub fn load_or_create(folder: &Path) -> Result<Self, IdentityError> {
        let path = folder.join(FILE);
        if let Some(identity) = Self::load(&path)? {
            return Ok(identity);
        }
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        make.map_err(|source| IdentityError::Io { action: "create", path: folder.to_owned(), source })?;
        let identity = Self::generate();
        if identity.store(folder).map_err(|source| IdentityError::Io {
            action: "write",
            path: path.clone(),
            source,
        })? {
            return Ok(identity);
        }
        // Another process was faster; its key counts.
        let corrupt = || IdentityError::Corrupt { path: path.clone(), reason: "it comes and goes" };
        Self::load(&path)?.ok_or_else(corrupt)
    }

    /// Moves a corrupt file aside as `identity.key.corrupt-<n>`, makes a new identity, and says where the old file is.
    /// A file that is not corrupt is left alone and loaded.
    pub fn recover(folder: &Path) -> Result<(Self, Option<PathBuf>), IdentityError> {
        match Self::load_or_create(folder) {
            Ok(identity) => return Ok((identity, None)),
            Err(IdentityError::Corrupt { .. }) => {}
            Err(error) => return Err(error),
        }
        let path = folder.join(FILE);
        let aside = (1..=ASIDE_LIMIT)
            .map(|n| folder.join(format!("{FILE}.corrupt-{n}")))
            .find(|aside| fs::symlink_metadata(aside).is_err())
            .ok_or_else(|| IdentityError::Corrupt {
                path: path.clone(),
                reason: "too many corrupt files lie beside it",
            })?;
        fs::rename(&path, &aside).map_err(|source| IdentityError::Io {
            action: "move aside",
            path: path.clone(),
            source,
        })?;
        Self::load_or_create(folder).map(|identity| (identity, Some(aside)))
    }

    /// The peer ID.
    pub fn peer_id(&self) -> &PeerId {
        &self.peer_id
    }

    /// A fresh self-signed certificate in the format of libp2p-tls, and its private key (which is not the identity's).
    pub fn certificate(&self) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), CertificateError> {
        libp2p_tls::certificate::generate(&self.keypair)
            .map_err(|error| CertificateError::Generate(error.to_string()))
    }

    pub(super) fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    fn from_keypair(keypair: Keypair) -> Self {
        let peer_id = peer_id(&keypair.public().to_peer_id());
        Self { peer_id: peer_id.expect("an ed25519 peer ID is 52 base58 characters"), keypair }
    }

    /// `None`: there is no file.
    fn load(path: &Path) -> Result<Option<Self>, IdentityError> {
        let failed = |action, source| IdentityError::Io { action, path: path.to_owned(), source };
        let corrupt = |reason| IdentityError::Corrupt { path: path.to_owned(), reason };
        let file = match open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", error)),
        };
        let metadata = file.metadata().map_err(|error| failed("read", error))?;
        if !metadata.is_file() {
            return Err(corrupt("it is not a regular file"));
        }
        let mut content = Vec::new();
        (&file).take(SIZE_LIMIT + 1).read_to_end(&mut content).map_err(|error| failed("read", error))?;
        let identity = Self::parse(&content).map_err(corrupt)?;
        if metadata.permissions().mode() & 0o077 != 0 {
            // A mounted Secret is read-only: the warning is all that can be done there.
            let narrowed = file.set_permissions(fs::Permissions::from_mode(0o600)).is_ok();
            tracing::warn!(path = %path.display(), narrowed, "others could read the node's private key");
        }
        Ok(Some(identity))
    }

    fn parse(content: &[u8]) -> Result<Self, &'static str> {
        if content.is_empty() {
            return Err("it is empty");
        }
        if content.len() as u64 > SIZE_LIMIT {
            return Err("it is too large");
        }
        let Some(key) = content.strip_prefix(HEADER) else {
            return Err(if content.starts_with(b"peili-identity ") {
                "its format is of another version of Peili"
            } else if HEADER.starts_with(content) {
                "it is cut short"
            } else {
                "it does not begin as an identity file does"
            });
        };
        // The decoder accepts any key type that is compiled in; that is ed25519 only.
        Keypair::from_protobuf_encoding(key)
            .map(Self::from_keypair)
            .map_err(|_| "its key is damaged or cut short")
    }

    /// Writes the file, whole or not at all; `false`: there is one already.
    fn store(&self, folder: &Path) -> io::Result<bool> {
        let mut content = HEADER.to_vec();
        content.extend(self.keypair.to_protobuf_encoding().map_err(io::Error::other)?);
        let temporary = folder.join(format!(".{FILE}.{}", std::process::id()));
        let written = (|| {
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&content)?;
            file.sync_all()?;
            rename_new(&temporary, &folder.join(FILE))
        })();
        if !matches!(written, Ok(true)) {
            // The error that matters is the first one; a temporary file that stays is replaced by the next attempt.
            let _ = fs::remove_file(&temporary);
        }
        let written = written?;
        if written && let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
            // The key is there and counts. A crash of the machine may lose it, and then a new one is made.
            tracing::warn!(folder = %folder.display(), %error, "the new identity may not survive a crash");
        }
        Ok(written)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer_id", &self.peer_id).finish_non_exhaustive()
    }
}

/// The peer ID that `certificate` proves: in the format of libp2p-tls, in its time, with valid signatures. That the
/// other end holds the certificate's key is proved by [`verify_handshake`] only.
pub fn peer_of_certificate(certificate: &CertificateDer<'_>) -> Result<PeerId, CertificateError> {
    let parsed = libp2p_tls::certificate::parse(certificate)
        .map_err(|error| CertificateError::Invalid(error.to_string()))?;
    peer_id(&parsed.peer_id())
        .ok_or_else(|| CertificateError::Invalid("its peer ID is of an unknown form".into()))
}

/// Checks a TLS 1.3 handshake signature (`CertificateVerify`) over `message` with the key in `certificate`.
pub fn verify_handshake(
    certificate: &CertificateDer<'_>,
    scheme: SignatureScheme,
    message: &[u8],
    signature: &[u8],
) -> Result<(), CertificateError> {
    libp2p_tls::certificate::parse(certificate)
        .map_err(|error| CertificateError::Invalid(error.to_string()))?
        .verify_signature(scheme, message, signature)
        .map_err(|error| CertificateError::Signature(error.to_string()))
}

/// The text form of a libp2p peer ID; `None` for forms that Peili does not use.
pub(super) fn peer_id(id: &libp2p::PeerId) -> Option<PeerId> {
    id.to_base58().parse().ok()
}

/// Opens a file for reading. Without O_NONBLOCK a pipe in its place would block for ever.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(nonblock).open(path)
}

/// Renames without replacing; `false`: the target is there.
fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        // File systems without the flag (NFS, some FUSE).
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if fs::symlink_metadata(to).is_err() => {
            fs::rename(from, to).map(|()| true)
        }
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
