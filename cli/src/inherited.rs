//! What the parent process left behind, and minivmm does not trust: the signal mask, the umask, the limit on open files.
//!
//! `main` calls [`reset`] before anything else. Closed standard descriptors are no concern: Rust's runtime opens /dev/null in
//! their place. Signals that the parent ignores are left alone but for those that the machine reads from a descriptor:
//! ignoring the others is what nohup or a shell's background job is for.

/// Unblocks all signals: a vCPU is kicked out of the guest by one, and SIGCONT restores the terminal's raw mode. Makes new
/// files and sockets private. Raises the limit on open files as far as the parent allows: the usual 1024 are too few for many
/// vCPUs with many disks, and nothing here uses select(2), which could not take more.
pub(crate) fn reset() {
    unblock_signals();
    hide_new_files_from_others();
    raise_limit_on_files();
}

/// Not by rustix, which panics where a seccomp filter refuses the call.
#[expect(unsafe_code, reason = "rustix's umask has no error")]
fn hide_new_files_from_others() {
    // SAFETY: a number of this process, for which no other thread exists yet.
    unsafe { libc::umask(libc::S_IRWXG | libc::S_IRWXO) };
}

/// Any process may raise its soft limit to the hard one. Not by rustix, for the same reason.
#[expect(unsafe_code, reason = "rustix's getrlimit has no error")]
fn raise_limit_on_files() {
    let mut files = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls take a structure of this type, which lives across them.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut files) == 0 {
            files.rlim_cur = files.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files);
        }
    }
}

#[expect(unsafe_code, reason = "sigprocmask has no safe wrapper")]
fn unblock_signals() {
    // SAFETY: all-zero bytes are a valid sigset_t, which sigemptyset initializes; no other thread exists yet.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
