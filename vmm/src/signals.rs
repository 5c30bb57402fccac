//! The signals that ask minivmm for something, as a file descriptor of the main loop. They are blocked in every thread.
//!
//! A capability: a guest that ends itself needs none. `cli` blocks them first of all, and the builder adds the descriptor as a
//! [`Source`].

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use vmm_sys_util::signal::create_sigset;

use crate::error::Error;
use crate::machine::{Machine, Outcome};
use crate::sources::{Poller, Source};

/// The signals by which users end a VM. They end it even if the parent process ignores them, as a shell does for a background job.
pub(crate) const ALWAYS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// The other signals whose default action ends a process, without those of a crash. They end the VM unless the parent process ignores them,
/// as nohup(1) does with SIGHUP, or a preloaded library handles them. So a limit or a timer that the parent has set (`ulimit -t`, alarm(2))
/// costs the disks nothing. The signals from SIGRTMIN to SIGRTMAX, whose numbers are not constants, are treated the same.
const UNLESS_HANDLED: [libc::c_int; 9] = [
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// The host's kernel asks for the lease on a mapped file: another process wants to write to it, and the guest may be using its pages.
const MAPPED_FILE_WANTED: libc::c_int = libc::SIGIO;

/// What minivmm ignores from its start on: SIGXFSZ, so that a write beyond RLIMIT_FSIZE becomes an error of that write (EFBIG), and the two
/// signals that glibc keeps for itself (SIGCANCEL and SIGSETXID), whose default action ends a process. glibc installs a handler of its own
/// when it needs one.
const IGNORED: [libc::c_int; 3] = [libc::SIGXFSZ, 32, 33];

/// These signals, blocked in this thread and every thread made after, readable here instead. A signal handler could
/// interrupt the main loop anywhere; a descriptor lets it act on a signal between two events.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// To be called before any other thread exists. Threads inherit the mask; in a thread without it, SIGTERM would
    /// kill the process.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    #[expect(unsafe_code, reason = "pthread_sigmask and signalfd have no safe wrappers")]
    pub fn block() -> Result<Self, Error> {
        let failed = |error| Error::host("watch for signals")(error);
        // A signal that is blocked would be read here even if it is ignored.
        let others = UNLESS_HANDLED.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        let others = others.filter(|signal| action(*signal) == libc::SIG_DFL);
        let signals: Vec<_> =
            ALWAYS.into_iter().chain([MAPPED_FILE_WANTED]).chain(others).collect();
        let set = create_sigset(&signals).map_err(|error| failed(error.into()))?;
        // SAFETY: both calls read `set` alone. The first one has no error for a valid set.
        let fd = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new, and nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of a signal that arrived, if one did, and asks for the end.
    pub fn ending(&self) -> Option<i32> {
        self.read().filter(|signal| *signal != MAPPED_FILE_WANTED)
    }

    /// The number of a signal that arrived, if one did.
    fn read(&self) -> Option<i32> {
        // struct signalfd_siginfo is 128 bytes and begins with the signal's number (signalfd(2)).
        let mut info = [0; 128];
        match rustix::io::read(&self.0, &mut info) {
            Ok(count) if count == info.len() => {
                info.first_chunk().map(|number| i32::from_ne_bytes(*number))
            }
            _ => None,
        }
    }
}

/// Makes the mask and some dispositions what minivmm needs, whatever the parent process left. To be called before any other thread exists.
pub fn reset_signals() {
    IGNORED.into_iter().for_each(|signal| set_action(signal, libc::SIG_IGN));
    // If it is ignored, the kernel keeps no exit status of a process that was started.
    set_action(libc::SIGCHLD, libc::SIG_DFL);
    unblock_all();
}

/// Lets the program that `command` starts receive every signal. A new program inherits what the thread that starts it has blocked, and what
/// minivmm ignores. What the user had this process ignore stays ignored, as by nohup(1).
#[expect(unsafe_code, reason = "the call happens between fork and exec")]
pub fn with_default_signals(command: &mut Command) -> &mut Command {
    let reset = || {
        IGNORED.into_iter().for_each(|signal| set_action(signal, libc::SIG_DFL));
        unblock_all();
        Ok(())
    };
    // SAFETY: the closure makes system calls only: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(reset) }
}

#[expect(unsafe_code, reason = "sigprocmask has no safe wrapper")]
fn unblock_all() {
    // SAFETY: all-zero bytes are a valid sigset_t, which sigemptyset initializes.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Ignores a signal (SIG_IGN) or gives it its default action (SIG_DFL). By a direct system call: the C library refuses its own signals.
#[expect(unsafe_code, reason = "rt_sigaction is called directly")]
fn set_action(signal: libc::c_int, action: libc::sighandler_t) {
    // The kernel's `struct sigaction` (include/linux/signal_types.h): action, flags, restorer, and a mask of 8 bytes.
    let action: [u64; 4] = [action as u64, 0, 0, 0];
    // SAFETY: the call reads a structure that lives across it, and writes nothing. No handler is replaced: Rust's library has none for these.
    unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, action.as_ptr(), 0_usize, size_of::<u64>());
    }
}

/// Whether this process ignores `signal`.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    action(signal) == libc::SIG_IGN
}

/// What this process does on `signal`.
#[expect(unsafe_code, reason = "sigaction has no safe wrapper")]
fn action(signal: libc::c_int) -> libc::sighandler_t {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only reads the present action into a structure of the right type, which all-zero bytes initialize.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Source for Signals {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add(self.as_raw_fd(), 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, machine: &mut Machine) {
        match self.read() {
            Some(MAPPED_FILE_WANTED) => machine.release_files(),
            Some(signal) => machine.end_by_user(Outcome::Signal(signal)),
            None => {}
        }
    }
}
