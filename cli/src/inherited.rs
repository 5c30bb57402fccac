//! Corrects what minivmm inherits from its parent process: the signal mask, the umask, and the limits on open files and on the stack.
//!
//! `main` calls [`reset`] before anything else. Rust's runtime opens /dev/null for closed standard descriptors. Signals that the parent
//! ignores stay ignored, as nohup(1) wants it, except for SIGTERM, SIGINT and SIGQUIT, by which users end a VM.

/// Unblocks all signals: one kicks a vCPU out of the guest, and SIGCONT restores the terminal's raw mode. Makes new files and sockets
/// private. Raises the limit on open files as far as the parent allows, since the usual 1024 are too few for many vCPUs with many disks,
/// and nothing here uses select(2). Raises a limit on the stack that is too low.
///
/// # Errors
/// What is wrong with the parent's limits.
pub(crate) fn reset() -> Result<(), &'static str> {
    set_signals();
    hide_new_files_from_others();
    raise_limit(libc::RLIMIT_NOFILE, u64::MAX);
    if raise_limit(libc::RLIMIT_STACK, STACK) < STACK {
        return Err("the stack is too small; set the limit on it (`ulimit -s`) to 256 KiB or more");
    }
    Ok(())
}

/// Bytes of stack that the main thread gets at least: it uses about 90 KiB, most of it to parse arguments. Linux compares the stack with
/// the limit when it grows, so a raised limit counts at once.
const STACK: u64 = 256 << 10;

/// Not by rustix, which panics where a seccomp filter refuses the call.
#[expect(unsafe_code, reason = "rustix's umask has no error")]
fn hide_new_files_from_others() {
    // SAFETY: a number of this process, for which no other thread exists yet.
    unsafe { libc::umask(libc::S_IRWXG | libc::S_IRWXO) };
}

/// Raises a soft limit that is lower than `wanted` as far as the hard limit allows, as any process may. Returns what it is then.
fn raise_limit(resource: libc::__rlimit_resource_t, wanted: u64) -> u64 {
    change_limit(resource, |limit| limit.rlim_cur.max(wanted.min(limit.rlim_max)))
}

/// Lowers the soft limit on CPU time to some seconds below the hard one, which `ulimit -t` sets to the same: at the soft one a signal ends the
/// VM, and at the hard one the kernel kills it. The end of a VM takes a fraction of these seconds.
pub(crate) fn keep_cpu_time_for_the_end() {
    change_limit(libc::RLIMIT_CPU, |limit| match limit.rlim_max {
        libc::RLIM_INFINITY => limit.rlim_cur,
        hard => limit.rlim_cur.min(hard - (hard / 2).min(10)),
    });
}

/// Makes a soft limit what `wanted` says, and returns what it is then. Not by rustix, which panics where a seccomp filter refuses the call.
#[expect(unsafe_code, reason = "rustix's getrlimit has no error")]
fn change_limit(
    resource: libc::__rlimit_resource_t,
    wanted: impl FnOnce(libc::rlimit) -> u64,
) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: u64::MAX, rlim_max: u64::MAX };
    // SAFETY: the call writes a structure of this type, which lives across it.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } == 0 {
        let changed = libc::rlimit { rlim_cur: wanted(limit), ..limit };
        // SAFETY: the call reads a structure of this type, which lives across it.
        let set = || unsafe { libc::setrlimit(resource, &raw const changed) } == 0;
        if changed.rlim_cur != limit.rlim_cur && set() {
            return changed.rlim_cur;
        }
    }
    limit.rlim_cur
}

/// Unblocks all. A write beyond RLIMIT_FSIZE becomes an error of that write (EFBIG) instead of the end of minivmm.
#[expect(unsafe_code, reason = "sigprocmask and signal have no safe wrappers")]
fn set_signals() {
    // SAFETY: all-zero bytes are a valid sigset_t, which sigemptyset initializes; no other thread exists yet, and no handler is set.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
