//! Seccomp filters that refuse one system call to a program, as a container's or a service manager's do.
#![expect(unsafe_code, reason = "a seccomp filter is installed between fork and exec")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A system call, or one request of an ioctl(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// Its number (`libc::SYS_*`).
    pub number: u32,
    /// Refused only with this second argument: an ioctl's request.
    pub request: Option<u32>,
}

/// A filter that answers `call` by `action`, and allows all else.
fn filter(call: Call, action: u32) -> Vec<libc::sock_filter> {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let unless = |k, skip| libc::sock_filter { code: 0x15, jt: 0, jf: skip, k };
    // Loads words of `struct seccomp_data`: the number at 0, the second argument's low half at 24 (seccomp(2)).
    let mut filter = vec![statement(0x20, 0), unless(call.number, 1)];
    if let Some(request) = call.request {
        filter[1].jf = 3;
        filter.extend([statement(0x20, 24), unless(request, 1)]);
    }
    filter.extend([statement(0x06, action), statement(0x06, libc::SECCOMP_RET_ALLOW)]);
    filter
}

fn program(filter: &[libc::sock_filter]) -> libc::sock_fprog {
    libc::sock_fprog { len: filter.len() as libc::c_ushort, filter: filter.as_ptr().cast_mut() }
}

/// Makes `call` fail with `errno` in the program that `command` starts, from its first instruction on.
pub fn refuse(command: &mut Command, call: Call, errno: i32) -> &mut Command {
    let filter = filter(call, libc::SECCOMP_RET_ERRNO | errno as u32);
    let install = move || {
        let program = program(&filter);
        // SAFETY: both calls take plain numbers and a filter that lives across them.
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
        };
        if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: `install` allocates nothing and takes no lock.
    unsafe { command.pre_exec(install) }
}

/// The number under which the supervised program has its own filter's descriptor, for the supervisor to take.
const LISTENER: libc::c_int = 200;

/// Makes the program that `command` starts ask [`supervise`] about each `call`.
pub fn ask(command: &mut Command, call: Call) -> &mut Command {
    let filter = filter(call, libc::SECCOMP_RET_USER_NOTIF);
    let install = move || {
        let program = program(&filter);
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let mode = libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER);
        // SAFETY: the calls take plain numbers and a filter that lives across them. The copy of the listener survives exec.
        let is_installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && {
                let listener = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
                listener >= 0 && libc::dup2(listener as libc::c_int, LISTENER) == LISTENER
            }
        };
        if is_installed { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: `install` allocates nothing and takes no lock.
    unsafe { command.pre_exec(install) }
}

/// Answers the calls of process `id`, which was started by [`ask`]: the first `count` with `errno`, the others as the kernel does.
/// Returns when the process has ended.
pub fn supervise(id: u32, errno: i32, count: u32) {
    let pid = Pid::from_raw(id as i32).expect("a process has a number");
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let listener = pidfd_getfd(&process, LISTENER, PidfdGetfdFlags::empty()).unwrap();
    let fd = listener.as_raw_fd();
    let mut left = count;
    loop {
        let mut ready = [PollFd::new(&listener, PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        if !ready[0].revents().contains(PollFlags::IN) {
            return;
        }
        // SAFETY: both structures are valid as zeroes, and live across the calls, which take structures of these types.
        unsafe {
            let mut asked: libc::seccomp_notif = std::mem::zeroed();
            if libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) != 0 {
                // A signal took the thread out of the call.
                continue;
            }
            let mut answer: libc::seccomp_notif_resp = std::mem::zeroed();
            answer.id = asked.id;
            match left {
                0 => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
                _ => answer.error = -errno,
            }
            left = left.saturating_sub(1);
            libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer);
        }
    }
}
