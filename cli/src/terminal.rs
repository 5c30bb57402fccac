//! The user's terminal: raw while the guest has it, and as it was before on every way out.

use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcsetattr,
};
use vmm::{ConsoleConfig, VmConfig};

/// The settings to restore, for the guard, the panic hook and the handler of fatal signals.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();

/// Signals that end a process that does nothing about them (signal(7)), but for those of the main loop: crashes, limits on the
/// processor's time, and those that only a person sends.
const FATAL: [libc::c_int; 15] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGXCPU,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// Raw mode; dropping it restores the terminal.
pub(crate) struct RawMode(());

impl RawMode {
    /// Makes standard input raw, if it is a terminal and the console is there.
    pub(crate) fn enter(config: &VmConfig) -> Option<Self> {
        let stdin = io::stdin();
        if config.console != ConsoleConfig::Stdio || !isatty(stdin.as_fd()) {
            return None;
        }
        let original = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = original.clone();
        // As cfmakeraw(3), but output processing stays: our own lines end in a bare newline.
        raw.input_modes.remove(
            InputModes::IGNBRK
                | InputModes::BRKINT
                | InputModes::PARMRK
                | InputModes::ISTRIP
                | InputModes::INLCR
                | InputModes::IGNCR
                | InputModes::ICRNL
                | InputModes::IXON,
        );
        raw.local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        ORIGINAL.set(original).ok()?;
        restore_on_crash();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).ok()?;
        Some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(original) = ORIGINAL.get() {
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, original);
    }
}

/// A panic prints its message on a sane terminal, and a fatal signal dies on one. Signals that ask us to end come
/// through the main loop instead and end in `drop`; SIGKILL alone cannot be helped.
fn restore_on_crash() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        report(info);
    }));
    FATAL.into_iter().for_each(handle_fatal);
}

#[expect(unsafe_code, reason = "sigaction has no safe wrapper")]
fn handle_fatal(signal: libc::c_int) {
    extern "C" fn fatal(signal: libc::c_int) {
        restore();
        // SAFETY: raise(3) is async-signal-safe; SA_RESETHAND has put the default action back, so this ends the process.
        unsafe { libc::raise(signal) };
    }
    // SAFETY: all-zero bytes are a valid sigaction; the handler only makes async-signal-safe calls (tcsetattr is one).
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = fatal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}
