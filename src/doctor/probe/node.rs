//! The runtime of this node: whether containerd answers, and what its registry configuration says to a mirror.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use tokio::net::UnixStream;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::super::Subject;
use super::super::facts::{Runtime, Silence, Unseen};
use super::super::place::in_pod;
use super::LIMIT;
use crate::configure::{self, Error, Options, Report};
use crate::store::containerd;

/// Looks at it; `None`: the store is no containerd, or it is not to be looked at.
pub(super) async fn runtime(subject: &Subject) -> Option<Runtime> {
    let options = subject.configure.clone().filter(|_| subject.store.source == "containerd")?;
    let socket = &subject.store.socket;
    let files = timeout(LIMIT, spawn_blocking(move || files(&options)));
    let (version, files) = tokio::join!(version(socket), files);
    let unread = |text| (Err(Unseen::Unreadable(text)), Vec::new(), false);
    let (report, missing, unrecorded) = match files {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => unread(error.to_string()),
        Err(_) => unread(format!("its files were not read within {LIMIT:?}")),
    };
    Some(Runtime { socket: socket.display().to_string(), version, report, missing, unrecorded })
}

async fn version(socket: &Path) -> Result<String, Silence> {
    // What is mounted from a node that has no such file is made: a folder.
    let is_socket = |metadata: std::fs::Metadata| metadata.file_type().is_socket();
    if tokio::fs::metadata(socket).await.is_ok_and(|metadata| !is_socket(metadata)) {
        return Err(Silence::Absent);
    }
    // The kernel's own word first: the client's error is a text.
    match timeout(LIMIT, UnixStream::connect(socket)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound => Silence::Absent,
                io::ErrorKind::PermissionDenied => Silence::Denied(error.to_string()),
                io::ErrorKind::ConnectionRefused => Silence::Down,
                _ => Silence::Other(error.to_string()),
            });
        }
        Err(_) => return Err(Silence::Silent),
    }
    // Less than the client's own limit, whose end is only a text.
    match timeout(LIMIT * 3 / 4, containerd::version(socket)).await {
        Ok(Ok(version)) => Ok(version),
        Ok(Err(text)) => Err(Silence::Other(text)),
        Err(_) => Err(Silence::Silent),
    }
}

fn files(options: &Options) -> (Result<Box<Report>, Unseen>, Vec<String>, bool) {
    let report = configure::check(options).map_err(|error| match error {
        Error::NoRuntime(_) => Unseen::NoRuntime,
        Error::Owned(..) => Unseen::Owned(error.to_string()),
        error => Unseen::Unreadable(error.to_string()),
    });
    let here = |path: &Path| options.root.join(path.strip_prefix("/").unwrap_or(path));
    // A pod sees of the node what is mounted: that there is no file of containerd says nothing there.
    let is_absent = |node: &configure::Node| !here(&node.config).exists();
    let is_unseen = |report: &Report| in_pod() && report.node.as_ref().is_some_and(is_absent);
    let report =
        report.and_then(|report| if is_unseen(&report) { Err(Unseen::NoRuntime) } else { Ok(report) });
    let folders = report.as_ref().ok().and_then(|report| report.node.as_ref());
    let folders = folders.map(|node| node.config_path.as_slice()).unwrap_or_default();
    let is_missing = |folder: &&std::path::PathBuf| matches!(std::fs::metadata(here(folder)), Err(error) if error.kind() == io::ErrorKind::NotFound);
    let missing: Vec<_> =
        folders.iter().filter(is_missing).map(|folder| folder.display().to_string()).collect();
    // containerd passes over those of a list that are not there.
    let missing = if missing.len() < folders.len() { Vec::new() } else { missing };
    let unrecorded = options.state.parent().is_some_and(|folder| !folder.exists());
    (report.map(Box::new), missing, unrecorded)
}
