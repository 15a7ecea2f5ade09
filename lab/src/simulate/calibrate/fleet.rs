//! The processes of the calibration in a network namespace of their own, whose loopback is the wire: what goes over it is
//! counted there. Dropped, all are gone, those that stand still too.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use peili_lab::netns::{self, Addresses, Network};
use peili_lab::scratch::Scratch;
use peili_lab::{Requirement, require};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;

use super::member::{Order, Word};

/// Port of the control plane.
const PORT: u16 = 5001;
/// Bytes of an Ethernet header.
const ETHERNET: u64 = 14;
/// Of a packet on Ethernet; loopback would pass on 64 KiB as one.
const MTU: &str = "1500";

/// All processes.
pub(super) struct Fleet {
    processes: BTreeMap<usize, Process>,
    next: usize,
    sender: mpsc::UnboundedSender<(usize, Word)>,
    /// What they say.
    pub(super) words: mpsc::UnboundedReceiver<(usize, Word)>,
    key: Scratch,
    network: Network,
}

struct Process {
    child: Child,
    input: ChildStdin,
    address: SocketAddr,
}

/// What went over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Of IP packets.
    pub(super) bytes: u64,
    pub(super) packets: u64,
}

impl Fleet {
    /// None yet.
    pub(super) fn new() -> Result<Self> {
        if let Err(reason) = require(&[Requirement::Root, Requirement::Iproute2]) {
            bail!("a calibration {reason}: its processes get a network of their own");
        }
        let network = Network::new(1, Addresses::V4)?;
        // As on Ethernet: each packet by itself, and none larger.
        let ip = || {
            std::process::Command::new("ip")
                .args(["link", "set", "lo", "mtu", MTU, "gso_max_segs", "1"])
                .output()
        };
        let output = network.nodes[0].namespace.run(ip)??;
        ensure!(output.status.success(), "ip: {}", String::from_utf8_lossy(&output.stderr).trim());
        let key = Scratch::new()?;
        std::fs::write(key.path().join("key"), "the key of a cluster that lasts for some minutes")?;
        let (sender, words) = mpsc::unbounded_channel();
        Ok(Self { processes: BTreeMap::new(), next: 0, sender, words, key, network })
    }

    /// Starts one that knows `peer`, a number and its ID; numbers are not given again.
    pub(super) fn start(&mut self, peer: Option<(usize, &str)>) -> Result<usize> {
        let number = self.next;
        self.next += 1;
        let address = address(number);
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("calibrate-node").arg("--listen").arg(address.to_string());
        command.arg("--key").arg(self.key.path().join("key"));
        if let Some((other, id)) = peer {
            let other = self.processes.get(&other).context("no such process")?;
            command.arg("--peer").arg(format!("{id}@{}", other.address));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let runtime = tokio::runtime::Handle::current();
        let mut child = self.network.nodes[0].namespace.run(move || {
            let _runtime = runtime.enter();
            command.spawn()
        })??;
        let input = child.stdin.take().context("no standard input")?;
        let mut lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        let sender = self.sender.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                // What is no word is a fault of this very program.
                let Ok(word) = line.parse() else { return };
                if sender.send((number, word)).is_err() {
                    return;
                }
            }
        });
        self.processes.insert(number, Process { child, input, address });
        Ok(number)
    }

    /// Tells one what to do.
    pub(super) async fn order(&mut self, number: usize, order: &Order) -> Result<()> {
        let process = self.processes.get_mut(&number).context("no such process")?;
        process.input.write_all(format!("{order}\n").as_bytes()).await.context("a process has ended")?;
        // Else it waits in a buffer of tokio's.
        Ok(process.input.flush().await?)
    }

    /// It stands still, as when its machine has lost its power: no connection is closed.
    pub(super) fn freeze(&self, number: usize) -> Result<()> {
        let id = self.processes.get(&number).and_then(|process| process.child.id());
        let pid = id.and_then(|id| Pid::from_raw(id.cast_signed())).context("a process has ended")?;
        Ok(kill_process(pid, Signal::STOP)?)
    }

    /// Ends it.
    pub(super) async fn kill(&mut self, number: usize) -> Result<()> {
        let mut process = self.processes.remove(&number).context("no such process")?;
        Ok(process.child.kill().await?)
    }

    /// Fails if one that should run does not.
    pub(super) fn check(&mut self) -> Result<()> {
        for (number, process) in &mut self.processes {
            if let Some(status) = process.child.try_wait()? {
                bail!("process {number} has ended: {status}");
            }
        }
        Ok(())
    }

    /// What has gone over the wire so far; each packet once.
    pub(super) fn traffic(&self) -> Result<Traffic> {
        self.network.nodes[0].namespace.traffic("lo").map(Traffic::of)
    }
}

impl Traffic {
    fn of(lo: netns::Traffic) -> Self {
        Self { bytes: lo.received.saturating_sub(ETHERNET * lo.packets), packets: lo.packets }
    }
}

/// Loopback has 16 million addresses.
fn address(number: usize) -> SocketAddr {
    let number = u32::try_from(number).unwrap_or_default() % (1 << 23);
    (Ipv4Addr::from((127 << 24) + (1 << 8) + number + 1), PORT).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_without_ethernet() {
        let lo = netns::Traffic { received: 1280, packets: 20, sent: 1280 };
        assert_eq!(Traffic::of(lo), Traffic { bytes: 1000, packets: 20 });
    }

    #[test]
    fn each_process_has_an_address() {
        assert_eq!(address(0).to_string(), "127.0.1.1:5001");
        assert_eq!(address(300).to_string(), "127.0.2.45:5001");
    }
}
