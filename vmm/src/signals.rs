//! The signals that we are told something by, as a file descriptor of the main loop.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::error::Error;

/// SIGTERM and SIGINT end the VM cleanly; SIGHUP (the terminal went away) and SIGQUIT do, too.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Somebody wants to write the kernel's file, whose pages the guest may be using (`Kernel::let_go`).
pub(crate) const KERNEL_FILE_WANTED: libc::c_int = libc::SIGIO;

/// These signals, blocked in this thread and every thread made after, readable here instead.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// To be called before any other thread exists.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    #[expect(unsafe_code, reason = "signalfd has no safe wrapper")]
    pub fn block() -> Result<Self, Error> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: `set` is initialised by sigemptyset before any other use; all calls get valid pointers.
        let fd = unsafe {
            // A write beyond RLIMIT_FSIZE becomes an error of that write (EFBIG) instead of our end.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING.into_iter().chain([KERNEL_FILE_WANTED]) {
                if signal != libc::SIGHUP || !is_ignored(signal) {
                    libc::sigaddset(set.as_mut_ptr(), signal);
                }
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(Error::host("watch for signals")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of a signal that arrived, if one did.
    pub fn read(&self) -> Option<i32> {
        // struct signalfd_siginfo is 128 bytes and begins with the signal's number (signalfd(2)).
        let mut info = [0; 128];
        match rustix::io::read(&self.0, &mut info) {
            Ok(count) if count == info.len() => info.first_chunk().map(|number| i32::from_ne_bytes(*number)),
            _ => None,
        }
    }
}

/// `nohup` ignores SIGHUP for us, which a blocked signal would undo.
#[expect(unsafe_code, reason = "sigaction has no safe wrapper")]
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only reads the present action into a structure of the right type, which all-zero bytes initialise.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
