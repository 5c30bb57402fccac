//! What happens when a thread makes a system call that its filter forbids: the kernel sends SIGSYS instead of making the call, and the
//! handler in this file prints one line. The thread does nothing more. The main loop ends the machine as after any failure of the host:
//! disks are flushed if they answer, and the exit status is 1.
//!
//! The thread may hold a lock for which the main loop waits, so the process ends after [`END_TIMEOUT`] in any case. If the main thread
//! made the call, the process ends at once, without a flush. The handler makes only async-signal-safe calls, which every filter allows.

#![expect(unsafe_code, reason = "a signal handler and its siginfo_t")]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::filters::{self, Kind};
use crate::error::Error;
use crate::machine::Machine;
use crate::sources::{Poller, Source};

/// How long the main loop has to end the machine, in milliseconds.
const END_TIMEOUT: libc::c_int = 2000;
/// The `si_code` of a SIGSYS by a filter.
const SYS_SECCOMP: libc::c_int = 1;

/// The main loop's eventfd.
static WAKE: AtomicI32 = AtomicI32::new(-1);
static RESTORE: OnceLock<fn()> = OnceLock::new();

thread_local! {
    static KIND: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// Sets the function that restores the user's terminal. A signal handler calls it, so it may make only async-signal-safe calls.
pub fn on_violation(restore: fn()) {
    let _ = RESTORE.set(restore);
}

/// Sets the kind of the calling thread, for messages.
pub(super) fn name_thread(kind: Kind) {
    KIND.set(Some(kind));
}

#[derive(Debug, thiserror::Error)]
#[error("a thread broke out of what the sandbox allows; see the line before")]
struct Violation;

/// Confines the main thread, and ends the machine after a violation, as a source of the main loop.
pub(super) struct Violations {
    wake: EventFd,
    confine: Box<dyn Fn()>,
}

impl Violations {
    pub(super) fn new(confine: Box<dyn Fn()>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        WAKE.store(wake.as_raw_fd(), Ordering::Release);
        Ok(Self { wake, confine })
    }
}

impl Source for Violations {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        (self.confine)();
        poller.add(self.wake.as_raw_fd(), 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, machine: &mut Machine) {
        let _ = self.wake.read();
        machine.end(Err(Error::Capability(Box::new(Violation))));
    }
}

/// Installs the handler, for the whole process.
pub(super) fn install_handler() {
    // SAFETY: all-zero bytes are a valid sigaction, and the handler makes async-signal-safe calls only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t. For a SIGSYS by a filter the system call's number is an int after the
    // three ints, their padding and a pointer (sigaction(2), `si_syscall`).
    let (code, number) = unsafe { ((*info).si_code, *info.cast::<libc::c_int>().add(6)) };
    let kind = KIND.get();
    if code == SYS_SECCOMP {
        report(kind, number);
    }
    if code == SYS_SECCOMP && kind != Some(Kind::Main) {
        wake(WAKE.load(Ordering::Acquire));
        // SAFETY: no descriptor is looked at; the call only waits.
        unsafe { libc::poll(std::ptr::null_mut(), 0, END_TIMEOUT) };
    }
    if let Some(restore) = RESTORE.get() {
        restore();
    }
    // SAFETY: ends the process, by the signal if a user sent it.
    unsafe {
        if code != SYS_SECCOMP {
            libc::signal(libc::SIGSYS, libc::SIG_DFL);
            libc::raise(libc::SIGSYS);
            return;
        }
        libc::_exit(1)
    }
}

/// Writes one line, without allocating.
fn report(kind: Option<Kind>, number: libc::c_int) {
    let mut digits = [0_u8; 10];
    let (mut rest, mut at) = (number.unsigned_abs(), digits.len());
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 || at == 0 {
            break;
        }
    }
    let kind = kind.map_or("a thread", Kind::name);
    let parts: [&[u8]; 7] = [
        b"minivmm: sandbox: thread ",
        kind.as_bytes(),
        b" made the system call ",
        &digits[at..],
        b" (",
        filters::name(number.into()).as_bytes(),
        b"), which its filter forbids; the VM ends. If this guest is trusted, report it, and use --sandbox off\n",
    ];
    let mut line = [0_u8; 256];
    let mut length = 0;
    for byte in parts.into_iter().flatten() {
        if let Some(place) = line.get_mut(length) {
            *place = *byte;
            length += 1;
        }
    }
    // SAFETY: `length` bytes of the line are initialized.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length) };
}

fn wake(eventfd: RawFd) {
    let one = 1_u64;
    // SAFETY: eight bytes are read.
    unsafe { libc::write(eventfd, (&raw const one).cast(), size_of::<u64>()) };
}
