//! System calls without which there is no VM, tried before anything else. The seccomp filter of a container or a service manager may
//! refuse one. Without this check, Rust's library would panic (a clock), or the C library abort (a futex). Or the VM would never end: its
//! threads could not be woken (eventfd, epoll) or taken out of the guest (tgkill).
//!
//! `main` calls [`check`]. The refusal of any other call is handled where the call is made (`vmm/docs/refused-system-calls.md`).
#![expect(unsafe_code, reason = "system calls are made without wrappers, which would panic")]

use std::io;

/// The call that the host refuses, and its answer.
pub(crate) type Refusal = (&'static str, io::Error);

/// Makes each call once, so that it has no effect.
///
/// # Errors
/// The first one that the host refuses. A limit on open files is no refusal: where the VM meets it, a line names it.
pub(crate) fn check() -> Result<(), Refusal> {
    match try_each() {
        Err((_, error)) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            Ok(())
        }
        tried => tried,
    }
}

fn try_each() -> Result<(), Refusal> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (futex, one) = (0_u32, 1_u64);
    // SAFETY: every pointer leads to a local variable of the type that its call takes. No thread waits for the futex, signal 0
    // is never sent, and the eventfd is closed here.
    unsafe {
        for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_PROCESS_CPUTIME_ID] {
            let clock = libc::c_long::from(clock);
            answer("clock_gettime", libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time))?;
        }
        let wake = libc::c_long::from(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG);
        answer("futex", libc::syscall(libc::SYS_futex, &raw const futex, wake, 1_usize))?;
        let thread = answer("gettid", libc::syscall(libc::SYS_gettid))?;
        let process = answer("getpid", libc::syscall(libc::SYS_getpid))?;
        answer("tgkill", libc::syscall(libc::SYS_tgkill, process, thread, 0_usize))?;
        let flags = libc::c_long::from(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let event = answer("eventfd2", libc::syscall(libc::SYS_eventfd2, 0_usize, flags))?;
        let written = libc::syscall(libc::SYS_write, event, &raw const one, size_of_val(&one));
        let written = answer("write", written);
        let polled = written.and_then(|_| poll(event));
        libc::syscall(libc::SYS_close, event);
        polled?;
        // The C library aborts without it when threads end. An empty range is invalid, which is an answer, too.
        let unmapped = answer("munmap", libc::syscall(libc::SYS_munmap, 0_usize, 0_usize));
        unmapped.or_else(|refusal| match refusal.1.kind() {
            io::ErrorKind::InvalidInput => Ok(0),
            _ => Err(refusal),
        })?;
        // rustix panics without it.
        let mut info: libc::sysinfo = std::mem::zeroed();
        answer("sysinfo", libc::syscall(libc::SYS_sysinfo, &raw mut info)).map(drop)
    }
}

/// Waits for `event`, which is readable.
fn poll(event: libc::c_long) -> Result<(), Refusal> {
    let mut ready = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    // SAFETY: the events are a local variable, and the epoll instance is closed here.
    unsafe {
        let flags = libc::c_long::from(libc::EPOLL_CLOEXEC);
        let set = answer("epoll_create1", libc::syscall(libc::SYS_epoll_create1, flags))?;
        let add = libc::c_long::from(libc::EPOLL_CTL_ADD);
        let added = libc::syscall(libc::SYS_epoll_ctl, set, add, event, &raw mut ready);
        let waited = answer("epoll_ctl", added).and_then(|_| {
            let waited = libc::syscall(libc::SYS_epoll_wait, set, &raw mut ready, 1_usize, 0_usize);
            answer("epoll_wait", waited)
        });
        libc::syscall(libc::SYS_close, set);
        waited.map(drop)
    }
}

fn answer(call: &'static str, result: libc::c_long) -> Result<libc::c_long, Refusal> {
    match result {
        0.. => Ok(result),
        _ => Err((call, io::Error::last_os_error())),
    }
}
