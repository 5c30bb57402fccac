//! Corrects what minivmm inherits from its parent process: signals, the umask, and the limits on open files, on the stack and on CPU time.
//!
//! `main` calls [`reset`] before anything else. Rust's runtime opens /dev/null for closed standard descriptors. Signals that the parent
//! ignores stay ignored, as nohup(1) wants it, except for SIGTERM, SIGINT and SIGQUIT, by which users end a VM, and SIGCHLD.

/// Resets signals: one kicks a vCPU out of the guest, and SIGCONT restores the terminal's raw mode. Makes new files and sockets
/// private. Raises the limit on open files as far as the parent allows, since the usual 1024 are too few for many vCPUs with many disks,
/// and nothing here uses select(2). Raises a limit on the stack that is too low.
///
/// # Errors
/// What is wrong with the parent's limits.
pub(crate) fn reset() -> Result<(), &'static str> {
    vmm::reset_signals();
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

/// Lowers the soft limit on CPU time below the hard one, which `ulimit -t` sets to the same: at the soft one a signal ends the VM, and at the
/// hard one the kernel kills it. Does so, too, for the limit on the time that a thread of real-time priority runs without a pause
/// (systemd's LimitRTTIME, rtkit). The end of a VM takes a fraction of the time between the two.
///
/// # Errors
/// The hard limit on CPU time is a second, and a soft one below it would end the VM at once.
pub(crate) fn keep_time_for_the_end() -> Result<(), &'static str> {
    let lowered = |limit: libc::rlimit, most: u64| match limit.rlim_max {
        libc::RLIM_INFINITY => limit.rlim_cur,
        hard => limit.rlim_cur.min(hard - (hard / 2).min(most)),
    };
    // In microseconds.
    change_limit(libc::RLIMIT_RTTIME, |limit| lowered(limit, 1_000_000));
    // In seconds.
    let mut is_too_low = false;
    change_limit(libc::RLIMIT_CPU, |limit| {
        is_too_low = limit.rlim_max < 2;
        lowered(limit, 10)
    });
    if is_too_low {
        return Err("the limit on CPU time is too low; set it (`ulimit -t`) to 2 seconds or more");
    }
    Ok(())
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
