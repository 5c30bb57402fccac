//! The socket to which a debugger connects: a Unix socket that only this user can open, or a TCP port of a loopback address.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::LazyLock;

use devices::log_limit::LogLimit;
use rustix::net::{SocketFlags, accept_with, sockopt};

use crate::config::GdbConfig;
use crate::error::Error;
use crate::listener::Listener;

pub(super) enum DebugListener {
    Unix(Listener),
    Tcp(TcpListener),
}

impl DebugListener {
    /// # Errors
    /// The path or the port is in use, or the host refuses it.
    pub(super) fn bind(config: &GdbConfig) -> Result<Self, Error> {
        let bound = match config {
            GdbConfig::Unix(path) => Listener::bind(path).map(Self::Unix),
            GdbConfig::Tcp(address) => TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                // Accepted sockets inherit this. Each side sends a small packet and waits for the other, which Nagle's algorithm delays.
                sockopt::set_tcp_nodelay(&listener, true)?;
                Ok(Self::Tcp(listener))
            }),
        };
        bound.map_err(|source| Error::Argument {
            option: "--gdb",
            value: config.to_string(),
            source,
        })
    }

    /// The next client, whose socket does not block; `None` if there is none.
    pub(super) fn accept(&self) -> Option<OwnedFd> {
        match self {
            Self::Unix(listener) => listener.accept().map(OwnedFd::from),
            Self::Tcp(listener) => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                match accept_with(listener, flags).map_err(io::Error::from) {
                    Ok(client) => Some(client),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                    Err(error) => {
                        static REFUSED: LazyLock<LogLimit> = LazyLock::new(LogLimit::default);
                        REFUSED.warn(format_args!("--gdb: a debugger cannot be served: {error}"));
                        None
                    }
                }
            }
        }
    }
}

/// As it was written on the command line.
impl fmt::Display for GdbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl AsRawFd for DebugListener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(listener) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}
