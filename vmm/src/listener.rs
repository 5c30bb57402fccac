//! A listening Unix socket that only this user can connect to: the control socket, and the console's.
//!
//! A socket file that no process uses any more is replaced. Anything else at the path is an error. The file is removed when the VM ends.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use devices::log_limit::LogLimit;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

/// unix(7): `sun_path` has 108 bytes.
const TOO_LONG: &str = "the path of a socket has at most 108 bytes; give a shorter one";

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 8;

/// The socket, removed from the file system when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    file: Option<FileId>,
}

/// Device and inode of the socket's file. While the socket is open, no other file gets this inode number.
type FileId = (u64, u64);

fn file_id(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Listener {
    /// Listens at `path`, mode 0600, without waiting for any other process.
    ///
    /// # Errors
    /// When the path is in use or cannot be made.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path).map_err(|_| io::Error::other(TOO_LONG))?;
        remove_stale(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Before it has a name: bind(2) gives the file the socket's own mode, so that it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &address)?;
        listen(&socket, BACKLOG).inspect_err(|_| {
            let _ = fs::remove_file(path);
        })?;
        Ok(Self { socket: socket.into(), path: path.to_owned(), file: file_id(path) })
    }

    /// Accepts the next client, with a non-blocking socket. `None`: there is none. Poll the listener for edges, and call this until it
    /// returns `None`. A client that the host cannot accept now waits in the backlog until another one connects.
    pub(crate) fn accept(&self) -> Option<UnixStream> {
        static REFUSED: LazyLock<LogLimit> = LazyLock::new(LogLimit::default);
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(client) => return Some(client.into()),
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => {}
            Err(error) => {
                let path = self.path.display();
                REFUSED
                    .warn(format_args!("a client of the socket {path} cannot be served: {error}"));
            }
        }
        None
    }
}

/// Removes a socket file that no process uses. It is renamed first and then checked again, because a process that started at the same time
/// may have put its own socket there.
fn remove_stale(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::other("it exists and is no socket; give another path"));
    }
    if !is_stale(path)? {
        return Ok(());
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".stale-{}", std::process::id()));
    let aside = PathBuf::from(aside);
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) if is_stale(&aside)? => fs::remove_file(&aside),
        Ok(()) => fs::rename(&aside, path),
    }
}

/// Whether no socket is bound to the file. Tests that by connecting a datagram socket, which never waits: a socket of another type gives
/// EPROTOTYPE, and only a file without a socket refuses the connection.
fn is_stale(path: &Path) -> io::Result<bool> {
    let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(connect(&probe, &SocketAddrUnix::new(path)?) == Err(Errno::CONNREFUSED))
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another VM's socket may be there since, if the file was removed.
        if file_id(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_no_process_uses_is_replaced() {
        let _turn = crate::sandbox::tests::without_forks();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = SocketAddrUnix::new(&path).unwrap();
        let bound = |kind| {
            let socket =
                socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
            bind(&socket, &address).unwrap();
            socket
        };
        for kind in [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET] {
            let socket = bound(kind);
            let error = Listener::bind(&path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{kind:?}");
            if kind != SocketType::DGRAM {
                listen(&socket, 0).unwrap();
                assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
            }
            drop(socket);
            drop(Listener::bind(&path).unwrap());
            assert!(!path.exists());
        }
        fs::write(&path, "a file").unwrap();
        assert!(Listener::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn a_socket_that_another_vm_put_at_the_path_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let old = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let new = Listener::bind(&path).unwrap();
        drop(old);
        UnixStream::connect(&path).unwrap();
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn a_listener_with_a_full_backlog_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
