//! The user's terminal: raw while the guest has it, and as it was before on every way out.
//!
//! `main` enters [`RawMode`] when the machine is built. The settings come back when it is dropped, before a panic prints its message, and
//! before a fatal signal ends the process. Only SIGKILL leaves the terminal raw. A shell takes the terminal while the process is stopped
//! (SIGSTOP, SIGTSTP), so SIGCONT makes it raw again.
//!
//! In the background (`minivmm &`, `timeout 1m minivmm`, `bg`) minivmm leaves the terminal and its settings alone. The kernel would stop
//! a process that touches them (SIGTTOU) or reads (SIGTTIN) again and again, so that SIGTERM would never end the VM. With these signals
//! ignored a read fails, until the terminal is minivmm's (`fg`).

use std::sync::OnceLock;

use rustix::process::{Pid, getpgrp};
use rustix::stdio;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use vmm::{ConsoleConfig, VmConfig};

static SETTINGS: OnceLock<Settings> = OnceLock::new();

struct Settings {
    original: Termios,
    raw: Termios,
    /// The process group of minivmm, which the shell that started it has chosen.
    group: Pid,
}

/// Signals whose default action ends the process with a core dump (signal(7)), but for SIGQUIT and SIGXCPU. The main loop reads those,
/// and the others that would end the process.
const FATAL: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
];

pub(crate) struct RawMode(());

impl RawMode {
    /// Makes standard input raw, if it is a terminal and the console uses it.
    pub(crate) fn enter(config: &VmConfig) -> Option<Self> {
        let stdin = stdio::stdin();
        if !config.consoles.contains(&ConsoleConfig::Stdio) || !isatty(stdin) {
            return None;
        }
        let original = tcgetattr(stdin).ok()?;
        let mut raw = original.clone();
        raw.make_raw();
        // minivmm's own messages end in a bare newline.
        raw.output_modes |= original.output_modes & OutputModes::OPOST;
        vmm::on_violation(restore);
        let settings = SETTINGS.get_or_init(|| Settings { original, raw, group: getpgrp() });
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            report(info);
        }));
        FATAL.into_iter().for_each(|signal| handle(signal, restore_and_die, libc::SA_RESETHAND));
        handle(libc::SIGCONT, make_raw_again, libc::SA_RESTART);
        [libc::SIGTTIN, libc::SIGTTOU].into_iter().for_each(ignore);
        settings.apply(&settings.raw).then_some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        handle(libc::SIGCONT, do_nothing, libc::SA_RESTART);
        restore();
    }
}

impl Settings {
    /// Returns false if the terminal refuses. In its background nothing is to be done.
    fn apply(&self, wanted: &Termios) -> bool {
        !self.in_foreground() || tcsetattr(stdio::stdin(), OptionalActions::Now, wanted).is_ok()
    }

    /// A terminal that does not control the session has no foreground, and is anyone's.
    fn in_foreground(&self) -> bool {
        tcgetpgrp(stdio::stdin()).map_or(true, |group| group == self.group)
    }
}

fn restore() {
    if let Some(settings) = SETTINGS.get() {
        settings.apply(&settings.original);
    }
}

extern "C" fn make_raw_again(_: libc::c_int) {
    if let Some(settings) = SETTINGS.get() {
        settings.apply(&settings.raw);
    }
}

#[expect(unsafe_code, reason = "signal has no safe wrapper")]
fn ignore(signal: libc::c_int) {
    // SAFETY: SIG_IGN is a valid disposition of any signal but SIGKILL and SIGSTOP.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

extern "C" fn do_nothing(_: libc::c_int) {}

#[expect(unsafe_code, reason = "raise has no safe wrapper")]
extern "C" fn restore_and_die(signal: libc::c_int) {
    restore();
    // SAFETY: raise(3) is async-signal-safe; SA_RESETHAND has put the default action back, so this ends the process.
    unsafe { libc::raise(signal) };
}

/// Installs a handler, which may only make async-signal-safe calls; tcsetattr is one.
#[expect(unsafe_code, reason = "sigaction has no safe wrapper")]
fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int), flags: libc::c_int) {
    // SAFETY: all-zero bytes are a valid sigaction, and the handlers of this file make async-signal-safe calls only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = flags;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}
