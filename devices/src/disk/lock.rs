//! Image locks that are compatible with QEMU's: an image has any number of readers or one writer, of both programs together.
//!
//! The scheme is QEMU's (block/file-posix.c). A program takes shared open-file-description locks on single bytes of the image: byte 100 +
//! n for each permission n that it *uses*, and byte 200 + n for each that it *forbids to others*. Then it checks for conflicts. On byte
//! 200 + n of each permission that it uses, and on byte 100 + n of each that it forbids, no other lock may prevent an exclusive one. The
//! kernel releases the locks when the last descriptor of the open file is closed, also if the process is killed.

#![expect(unsafe_code, reason = "fcntl(2) with struct flock")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The byte of permission 0 in use. Those of the other permissions follow.
const USED: i64 = 100;
/// The byte of permission 0 forbidden to others. Those of the other permissions follow.
const FORBIDDEN: i64 = 200;

/// The numbers of the two QEMU permissions that a guest's disk uses (BLK_PERM_* in include/block/block-common.h).
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;

#[derive(Debug)]
pub(super) enum LockError {
    /// Another program has a lock that conflicts with this one.
    Held,
    /// The file system does not support these locks, or has none left.
    Host(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            // A lock of another kind, such as lockf(3)'s of the whole file, is in the way (fcntl(2), F_OFD_SETLK).
            Some(libc::EAGAIN | libc::EACCES) => Self::Held,
            _ => Self::Host(error),
        }
    }
}

/// Locks an open image until its open file description is closed: shared with other readers or, if `writable`, alone.
///
/// # Errors
/// After an error some of the bytes may be locked until the description is closed.
pub(super) fn lock(image: impl AsFd, writable: bool) -> Result<(), LockError> {
    let used: &[i64] = if writable { &[CONSISTENT_READ, WRITE] } else { &[CONSISTENT_READ] };
    // The locks are taken before the check, so that of two programs that start at once, at least one sees the other.
    for byte in used.iter().map(|n| USED + n).chain([FORBIDDEN + WRITE]) {
        fcntl(&image, libc::F_OFD_SETLK, libc::F_RDLCK, byte)?;
    }
    for byte in used.iter().map(|n| FORBIDDEN + n).chain([USED + WRITE]) {
        if fcntl(&image, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? != libc::F_UNLCK {
            return Err(LockError::Held);
        }
    }
    Ok(())
}

/// Calls fcntl for the lock of one byte. Returns the lock type in `struct flock` afterwards.
fn fcntl(image: impl AsFd, command: i32, lock_type: i32, byte: i64) -> io::Result<i32> {
    // SAFETY: all-zero is a valid `flock`; an OFD lock wants l_pid 0.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = lock_type as libc::c_short;
    flock.l_whence = libc::SEEK_SET as libc::c_short;
    flock.l_start = byte;
    flock.l_len = 1;
    // SAFETY: the descriptor is open and `flock` lives through the call, which may write to it.
    match unsafe { libc::fcntl(image.as_fd().as_raw_fd(), command, &raw mut flock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(i32::from(flock.l_type)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::disk::tests::rig::without_forks;

    #[test]
    fn two_readers_or_one_writer() {
        let _turn = without_forks();
        let image = tempfile::NamedTempFile::new().unwrap();
        // Two open file descriptions exclude each other within one process, too.
        let open = || File::options().read(true).write(true).open(image.path()).unwrap();
        let held = |file: &File, writable| matches!(lock(file, writable), Err(LockError::Held));

        let (first, second) = (open(), open());
        assert!(!held(&first, false) && !held(&second, false));
        let third = open();
        assert!(held(&third, true), "a writer beside two readers");
        // A refused attempt leaves its bytes locked until its file is closed.
        drop((first, second, third));

        let writer = open();
        assert!(!held(&writer, true));
        assert!(held(&open(), true), "a second writer");
        assert!(held(&open(), false), "a reader beside a writer");
        drop(writer);
        assert!(!held(&open(), true));
    }

    /// As lockf(3) makes it, by another program. To ignore it would be bad advice.
    #[test]
    fn a_lock_of_the_whole_file_is_held() {
        let _turn = without_forks();
        let image = tempfile::NamedTempFile::new().unwrap();
        let lockf = || {
            let file = File::options().read(true).write(true).open(image.path()).unwrap();
            let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            rustix::fs::fcntl_lock(&file, exclusive).unwrap();
            file
        };
        for writable in [false, true] {
            // Its own process gives this kind of lock back when it closes any descriptor of the file.
            let holder = lockf();
            let file = File::options().read(true).write(true).open(image.path()).unwrap();
            assert!(matches!(lock(&file, writable), Err(LockError::Held)));
            drop((holder, file));
        }
    }

    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;
    use std::process::{Child, Command, Output, Stdio};

    /// Opens the image for reading as QEMU's own tools do that want it to stand still.
    fn qemu_reads(image: &Path) -> Option<Output> {
        let copy = image.with_extension("copy");
        let output = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "raw"])
            .args([image, &copy])
            .output()
            .ok();
        let _ = std::fs::remove_file(copy);
        output
    }

    fn qemu_writes(image: &Path) -> Option<Output> {
        Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(image).output().ok()
    }

    /// A qemu-io that has opened the image and keeps it open until its input ends.
    fn qemu_holds(image: &Path, arguments: &[&str]) -> Child {
        let mut qemu = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(arguments)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        while !line.contains("KiB") {
            line.clear();
            assert_ne!(
                BufReader::new(qemu.stdout.as_mut().unwrap()).read_line(&mut line).unwrap(),
                0
            );
        }
        qemu
    }

    #[test]
    fn qemu_and_we_refuse_each_others_images() {
        let _turn = without_forks();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(65536).unwrap();
        let open = || File::options().read(true).write(true).open(image.path()).unwrap();
        let (Some(_), Some(_)) = (qemu_reads(image.path()), qemu_writes(image.path())) else {
            eprintln!(
                "qemu-img and qemu-io are not installed (Debian: qemu-utils): QEMU's side of the locks is not tested"
            );
            return;
        };
        let refused = |qemu: fn(&Path) -> Option<Output>| {
            let output = qemu(image.path()).unwrap();
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() || message.contains("lock"), "{output:?}");
            !output.status.success()
        };
        assert!(!refused(qemu_reads) && !refused(qemu_writes));

        let ours = open();
        lock(&ours, true).unwrap();
        assert!(refused(qemu_reads) && refused(qemu_writes));
        drop(ours);
        let ours = open();
        lock(&ours, false).unwrap();
        assert!(!refused(qemu_reads) && refused(qemu_writes));
        drop(ours);

        // A reading qemu-io forbids nothing, so only the writer is asked to stand in our way.
        for (arguments, writes) in [(&[][..], true), (&["-r"], false)] {
            let mut qemu = qemu_holds(image.path(), arguments);
            assert_eq!(matches!(lock(open(), true), Err(LockError::Held)), writes);
            assert_eq!(matches!(lock(open(), false), Err(LockError::Held)), writes);
            drop(qemu.stdin.take());
            qemu.wait().unwrap();
        }
        lock(open(), true).unwrap();
    }
}
