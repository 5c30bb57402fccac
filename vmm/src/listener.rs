//! A listening Unix socket that only our own user can connect to.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// The socket, removed from the file system when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, mode 0600. A socket that a dead process left there is replaced; anything else there is left alone.
    ///
    /// # Errors
    /// When the path is taken or cannot be made.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
        if is_socket && UnixStream::connect(path).is_err() {
            fs::remove_file(path)?;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        // Nobody can connect before `listen`, so that nobody gets in while the mode is still the umask's.
        fs::set_permissions(path, Permissions::from_mode(0o600)).and_then(|()| Ok(listen(&socket, 8)?)).inspect_err(
            |_| {
                let _ = fs::remove_file(path);
            },
        )?;
        Ok(Self { socket: socket.into(), path: path.to_owned() })
    }

    /// Takes a waiting client, or `None`.
    pub(crate) fn accept(&self) -> Option<UnixStream> {
        self.socket.accept().ok().map(|(client, _)| client)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
