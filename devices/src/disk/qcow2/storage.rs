//! The host file of a layer as imago sees it: imago's own file, with the alignment that the host requires for direct I/O.
//!
//! imago 0.2.6 tests the alignment by reading single bytes. In a hole of the file such reads succeed, and imago would then send requests
//! that the host refuses elsewhere.

#![expect(unsafe_code, reason = "imago's own file is called as imago calls this one")]

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use crate::disk::OpenReason;
use crate::disk::error::is_refusal;
use crate::disk::host_file::HostFile;
use crate::disk::observer::FileChange;
use crate::disk::positioned_io::{Direction, READ, WRITE};

/// imago's view of a host file, with the alignment of its transfers.
#[derive(Debug)]
pub(super) struct HostStorage {
    /// For messages.
    path: PathBuf,
    file: File,
    host: Arc<HostFile>,
}

impl HostStorage {
    /// A view of `host`, whose name in messages is `path`.
    pub(super) fn new(path: &Path, host: &Arc<HostFile>, writable: bool) -> io::Result<Self> {
        let direct = host.direct.is_some();
        // Without `write`, imago does not test the alignment by writing.
        let options = StorageOpenOptions::new().direct(direct).write(writable && !direct);
        let file = File::from_open_file(host.file.try_clone()?, options)?;
        Ok(Self { path: path.to_owned(), file, host: Arc::clone(host) })
    }

    /// Checks that the host allows preadv(2) and, if `writable`, pwritev(2). imago has no other calls to fall back to, so the guest would
    /// see I/O errors.
    ///
    /// # Errors
    /// The call that is refused.
    pub(super) fn check_calls(host: &HostFile, writable: bool) -> Result<(), OpenReason> {
        let (fd, none) = (host.file.as_raw_fd(), ptr::null::<libc::iovec>());
        let check = |name, [_, call, _]: Direction| {
            // SAFETY: there is no buffer, so nothing is read or written.
            match unsafe { libc::syscall(call, fd, none, 0_usize, 0_u64, 0_u64) } {
                0.. => Ok(()),
                _ => Err(OpenReason::Refused(name, io::Error::last_os_error())),
            }
        };
        check("preadv", READ)?;
        if writable { check("pwritev", WRITE) } else { Ok(()) }
    }

    /// The alignment of transfers, zeroes and discards: `own` is that of imago's file.
    fn unit(&self, own: usize) -> usize {
        own.max(self.host.unit() as usize)
    }
}

impl fmt::Display for HostStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.path)
    }
}

impl Storage for HostStorage {
    fn mem_align(&self) -> usize {
        self.file.mem_align().max(self.host.direct.map_or(1, |alignment| alignment.memory as usize))
    }

    fn req_align(&self) -> usize {
        self.unit(self.file.req_align())
    }

    fn zero_align(&self) -> usize {
        self.unit(self.file.zero_align())
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: here and below: the caller keeps to our alignments, which are multiples of the file's, and to all else.
        unsafe { self.file.pure_readv(buffers, offset) }
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, offset: u64) -> io::Result<()> {
        let change = self.host.observer.as_ref().and_then(|_| {
            let mut data = vec![0; buffers.len() as usize];
            buffers.copy_into_slice(&mut data);
            self.host.begin(FileChange::WriteBytes { offset, data })
        });
        // SAFETY: as in `pure_readv`.
        let result = unsafe { self.file.pure_writev(buffers, offset) };
        self.host.end(change, result.is_ok());
        result
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let change = FileChange::Zero { offset, length };
        // SAFETY: as in `pure_readv`.
        let zeroed =
            self.host.observe(change, || unsafe { self.file.pure_write_zeroes(offset, length) });
        zeroed.map_err(unsupported)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let change = FileChange::Zero { offset, length };
        // SAFETY: as in `pure_readv`.
        let zeroed = self
            .host
            .observe(change, || unsafe { self.file.pure_write_allocated_zeroes(offset, length) });
        zeroed.map_err(unsupported)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.host.flush()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}

/// If the host or its seccomp filter does not allow to zero a range, reports that as unsupported: imago then writes zeroes.
fn unsupported(error: io::Error) -> io::Error {
    if is_refusal(&error) { io::ErrorKind::Unsupported.into() } else { error }
}
