//! The runtime of this node: whether containerd answers, and whether pulls come to Peili and leave something behind.

use super::super::Verdict;
use super::super::code::{Code, Confidence};
use super::super::facts::{Facts, Runtime, Silence, Unseen};
use super::super::place::Inside;
use super::Found;
use crate::configure;

pub(super) fn judge(facts: &Facts, found: &mut Found) {
    let Some(runtime) = &facts.runtime else {
        return found.note("containerd: not looked at, since `store.source` is another");
    };
    let answers = socket(runtime, found);
    match &runtime.report {
        Ok(report) => registry(runtime, report, is_forgotten(facts, runtime), found),
        Err(Unseen::NoRuntime) if answers => {
            let fix = "mount the host's files and name them: `peili doctor --root /host`";
            found.say(Verdict::new(Code::RuntimeUnseen, Confidence::High, fix));
        }
        // That there is none is said already.
        Err(Unseen::NoRuntime) => {}
        Err(Unseen::Owned(text)) => found.say(with(Code::RegistryOwned, text)),
        Err(Unseen::Unreadable(text)) => found.say(with(Code::RegistryUnreadable, text)),
    }
}

/// An error of `configure`, whose last line says what to do.
fn with(code: Code, text: &str) -> Verdict {
    let (text, fix) = text.split_once("\nhint: ").unwrap_or((text, "see `peili configure --check`"));
    Verdict::new(code, Confidence::High, fix).seen(text)
}

/// Returns whether it answers.
fn socket(runtime: &Runtime, found: &mut Found) -> bool {
    let socket = &runtime.socket;
    let silence = match &runtime.version {
        Ok(version) => {
            found.note(format!("containerd: {version} answers at {socket}"));
            return true;
        }
        Err(silence) => silence,
    };
    let verdict = match silence {
        Silence::Absent => {
            let fix = "in a pod mount containerd's socket; on a node see that it runs, and name its socket in `store.socket` (k3s and RKE2: \
                       /run/k3s/containerd/containerd.sock)";
            Verdict::new(Code::ContainerdAbsent, Confidence::High, fix)
                .or("it is not mounted into this pod")
                .or("containerd does not run, or has its socket elsewhere")
        }
        Silence::Denied(words) => {
            let fix = "run as root; where SELinux enforces, with a type that may open it (`seLinuxOptions.type: spc_t`; Bottlerocket: \
                       control_t or super_t)";
            Verdict::new(Code::ContainerdDenied, Confidence::High, fix).seen(words.as_str())
        }
        Silence::Down => {
            let fix = "see why containerd does not run: `systemctl status containerd`. In a pod, mount the socket's folder and not the \
                       socket, which is another file after each start";
            Verdict::new(Code::ContainerdDown, Confidence::High, fix)
                .or("containerd has ended")
                .or("the socket that is mounted is that of an earlier containerd")
        }
        Silence::Silent => {
            let fix = "see what containerd waits for: its log, its disk, its shims";
            Verdict::new(Code::ContainerdSilent, Confidence::High, fix).or("its disk hangs")
        }
        Silence::Other(words) => {
            let fix = "see what listens there, and containerd's log";
            Verdict::new(Code::ContainerdSilent, Confidence::Medium, fix)
                .seen(words.as_str())
                .or("something else than containerd listens there")
        }
    };
    found.say(verdict.seen(socket.as_str()));
    false
}

/// Whether nobody here knows for which registries the node was set up: a mirror that runs had a data folder once, and a pod sees of the node's
/// folders what is mounted. A node without both was never set up.
fn is_forgotten(facts: &Facts, runtime: &Runtime) -> bool {
    runtime.unrecorded && (facts.mirror.is_ok() || facts.place.inside == Inside::Pod)
}

fn registry(runtime: &Runtime, report: &configure::Report, is_forgotten: bool, found: &mut Found) {
    if let Some(node) = &report.node {
        found.note(format!("runtime: {} by {}", node.distribution.name(), node.config.display()));
    }
    if !runtime.missing.is_empty() {
        let fix = "make it and set this node up: `peili configure` does both";
        let verdict = Verdict::new(Code::HostsFolderMissing, Confidence::High, fix);
        found.say(
            verdict.seen(runtime.missing.join(", ")).or("the distribution wiped it, or it is not mounted"),
        );
    }
    let is_owned = report.findings.iter().any(|finding| finding.code == configure::Code::Owned);
    for finding in &report.findings {
        let code = match finding.code {
            // Follows from the folder that is not there, or has to be asked of the distribution.
            configure::Code::NotSetUp if is_owned || !runtime.missing.is_empty() => continue,
            configure::Code::NotSetUp if is_forgotten => {
                let why = "the data folder with the records of that is not seen from here";
                found.note(format!("runtime: for which registries it was set up is not known: {why}"));
                continue;
            }
            configure::Code::NotSetUp => Code::RegistryNotSetUp,
            configure::Code::Owned => Code::RegistryOwned,
            configure::Code::ConfigPath
            | configure::Code::ConfigPathList
            | configure::Code::Mirrors
            | configure::Code::CriDisabled => Code::RegistryIgnored,
            configure::Code::MissingFile => Code::RegistryFile,
            configure::Code::Discard => Code::LayersDiscarded,
            configure::Code::Shadowed
            | configure::Code::EmbeddedMirror
            | configure::Code::Imports
            | configure::Code::Ipv6
            | configure::Code::Only
            | configure::Code::Advisory
            | configure::Code::Ignored
            | configure::Code::Settings => {
                found.note(format!("runtime: {}", finding.text));
                continue;
            }
        };
        let fix = finding.fix.clone().unwrap_or_else(|| "see `peili configure --check`".to_owned());
        found.say(Verdict::new(code, Confidence::High, fix).seen(finding.text.as_str()));
    }
    if report.ready {
        let is_shadowed = |finding: &configure::Finding| finding.code == configure::Code::Shadowed;
        let but = if report.findings.iter().any(is_shadowed) { ", but for those registries" } else { "" };
        found.note(format!("runtime: pulls come to Peili{but}"));
    }
}
