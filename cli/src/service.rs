//! Tells a service manager that the machine is ready (sd_notify(3)): `Type=notify` of systemd waits for it.
//!
//! A capability: `main` calls [`ready`] when the machine is built, just before the guest runs. Without `NOTIFY_SOCKET` in the
//! environment nothing happens.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `READY=1`. A manager that does not listen is no error.
pub(crate) fn ready() {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&path, b"READY=1")
    {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

fn send(path: &OsStr, message: &[u8]) -> std::io::Result<()> {
    // A name that begins with @ is abstract.
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message, &address).map(|_| ())
}
