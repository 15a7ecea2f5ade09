//! Binding, with errors that say what to do.

use std::io;
use std::net::SocketAddr;

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Connections that the kernel holds until they are accepted: what a burst of pulls of one node can bring.
const BACKLOG: i32 = 1024;

/// Bound addresses, not yet served.
#[derive(Debug)]
pub struct Sockets(Vec<(SocketAddr, TcpListener)>);

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The configuration names no address.
    #[error("`{setting}` names no address")]
    None {
        /// The setting.
        setting: &'static str,
    },
    /// An address cannot be bound.
    #[error("cannot listen at {address} (`{setting}`): {source}\nhint: {hint}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// The setting that names it.
        setting: &'static str,
        /// What to do.
        hint: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// An address that others than this node's own processes reach, without leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{setting}`: {address} is not a loopback address: {risk}\nhint: use 127.0.0.1 or [::1], or set `{clients}`: `node` in a pod with a network of its own, `all` to take the risk"
)]
pub struct NotLoopback {
    /// The address.
    pub address: SocketAddr,
    /// The setting that names it.
    pub setting: &'static str,
    /// The setting that says who may connect.
    pub clients: &'static str,
    /// What it would mean.
    pub risk: &'static str,
}

impl Sockets {
    /// Binds `addresses`, which `setting` names; port 0 takes a free one. On a machine without IPv6 its addresses are
    /// left out if another address can be bound. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// No address, or one that cannot be bound; none stays bound then.
    pub fn bind(setting: &'static str, addresses: &[SocketAddr]) -> Result<Self, BindError> {
        Self::bind_by(bind, setting, addresses)
    }

    fn bind_by(
        bind: impl Fn(SocketAddr) -> io::Result<TcpListener>,
        setting: &'static str,
        addresses: &[SocketAddr],
    ) -> Result<Self, BindError> {
        let mut bound = Vec::new();
        let mut missing = Vec::new();
        for &address in addresses {
            match bind(address).and_then(|listener| Ok((listener.local_addr()?, listener))) {
                Ok(listener) => bound.push(listener),
                Err(source) => {
                    let error = BindError::Address {
                        address,
                        setting,
                        hint: hint(address, setting, &source),
                        source,
                    };
                    if !is_missing_ipv6(&error) {
                        return Err(error);
                    }
                    missing.push(error);
                }
            }
        }
        if bound.is_empty() {
            return Err(missing.pop().unwrap_or(BindError::None { setting }));
        }
        for error in missing {
            if let BindError::Address { address, source, .. } = error {
                tracing::info!(%address, setting, error = %source, "this machine has no IPv6, going on without it");
            }
        }
        Ok(Self(bound))
    }

    /// The addresses that are bound, with their real ports.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.0.iter().map(|(address, _)| *address).collect()
    }

    /// The sockets, for a server of another kind.
    pub fn into_listeners(self) -> impl Iterator<Item = TcpListener> {
        self.0.into_iter().map(|(_, listener)| listener)
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the connections of the process before.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// No IPv6 at all (`ipv6.disable=1`), or none on loopback (`disable_ipv6`). Another address that is missing is the
/// operator's mistake.
fn is_missing_ipv6(error: &BindError) -> bool {
    let BindError::Address { address, source, .. } = error else { return false };
    match Errno::from_io_error(source) {
        Some(Errno::AFNOSUPPORT) => address.is_ipv6(),
        Some(Errno::ADDRNOTAVAIL) => address.is_ipv6() && address.ip().is_loopback(),
        _ => false,
    }
}

fn hint(address: SocketAddr, setting: &str, error: &io::Error) -> String {
    let port = address.port();
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => format!(
            "another program listens there, perhaps a second peili: `ss -ltnp 'sport = :{port}'` names it; stop it or change `{setting}`"
        ),
        Some(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT) => {
            format!("this machine has no such address (`ip address` lists them); change `{setting}`")
        }
        Some(Errno::ACCESS) => {
            format!(
                "ports below 1024 need the capability NET_BIND_SERVICE; choose another port in `{setting}`"
            )
        }
        Some(Errno::MFILE | Errno::NFILE) => "too many open files; raise the limit (`ulimit -n`)".into(),
        _ => format!("change `{setting}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine where sockets of IPv6 fail with `errno`.
    fn without_ipv6(addresses: &[&str], errno: Errno) -> Result<Vec<SocketAddr>, BindError> {
        let addresses: Vec<SocketAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let bind = |address: SocketAddr| if address.is_ipv6() { Err(errno.into()) } else { bind(address) };
        Sockets::bind_by(bind, "x.listen", &addresses).map(|sockets| sockets.addresses())
    }

    /// Guards the start with the default configuration under `ipv6.disable=1`.
    #[tokio::test]
    async fn a_machine_without_ipv6_goes_on_with_ipv4() {
        for other in ["[::]:0", "[::1]:0", "[2001:db8::1]:0"] {
            let bound = without_ipv6(&["127.0.0.1:0", other], Errno::AFNOSUPPORT).unwrap();
            assert!(matches!(bound[..], [address] if address.is_ipv4()), "{other}: {bound:?}");
            assert!(without_ipv6(&[other], Errno::AFNOSUPPORT).is_err(), "{other} alone");
        }
        assert!(without_ipv6(&["127.0.0.1:0", "[::1]:0"], Errno::ADDRNOTAVAIL).is_ok());
        // An address that is not this machine's.
        assert!(without_ipv6(&["127.0.0.1:0", "[2001:db8::1]:0"], Errno::ADDRNOTAVAIL).is_err());
        assert!(without_ipv6(&["127.0.0.1:0", "[::]:0"], Errno::ADDRINUSE).is_err());
    }
}
