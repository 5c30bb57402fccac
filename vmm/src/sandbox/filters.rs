//! Which system calls each kind of thread may make, and the seccomp filters that enforce it.
//!
//! A filter sees a call's number and arguments, but not the memory to which an argument points. So few calls that take a path are
//! allowed, and Landlock (`privileges`) refuses their paths. [`allowed`] is the only list: the filters are compiled from it, and a test
//! compares it with `vmm/docs/sandbox.md`.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::inputs::Needs;
use super::ioctls;

/// What a thread is for. Threads of one kind make the same system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The main loop: signals, control clients, console input.
    Main,
    /// Runs the guest.
    Vcpu,
    /// A disk's worker: rings, io_uring.
    Disk,
    /// Waits for the host's disk.
    DiskIo,
    /// Writes the guest's console output.
    Console,
    /// Maps the disks' registers for the guest, and ends.
    Registers,
    /// Starts the child process of a background save, with the same filter, and waits for it.
    Save,
}

impl Kind {
    pub(super) const ALL: [Self; 7] = [
        Self::Main,
        Self::Vcpu,
        Self::Disk,
        Self::DiskIo,
        Self::Console,
        Self::Registers,
        Self::Save,
    ];

    /// The kind's name in documents and messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Disk => "disk",
            Self::DiskIo => "disk-io",
            Self::Console => "console",
            Self::Registers => "registers",
            Self::Save => "save",
        }
    }
}

/// A condition on an argument.
#[derive(Clone, Copy, Debug)]
pub(super) enum Test {
    Is(u64),
    /// These bits are clear.
    Clear(u64),
    /// These bits are set.
    Set(u64),
}

/// A system call that is allowed if all conditions in one of the lists in `when` hold, or if `when` is empty. A condition is the index of
/// an argument, and a test of it.
#[derive(Clone, Debug)]
pub(super) struct Allowed {
    pub(super) number: libc::c_long,
    pub(super) name: &'static str,
    /// The conditions as documents show them.
    pub(super) condition: &'static str,
    when: Vec<Vec<(u8, Test)>>,
}

#[cfg(test)]
impl Allowed {
    /// Whether it allows the call with these arguments. A filter compares only their low 32 bits.
    pub(super) fn allows(&self, arguments: [u64; 6]) -> bool {
        let holds = |(index, test): &(u8, Test)| {
            let argument = arguments[usize::from(*index)] & u64::from(u32::MAX);
            match *test {
                Test::Is(value) => argument == value & u64::from(u32::MAX),
                Test::Clear(bits) => argument & bits == 0,
                Test::Set(bits) => argument & bits == bits,
            }
        };
        self.when.is_empty() || self.when.iter().any(|rule| rule.iter().all(holds))
    }

    /// The values that its conditions name.
    pub(super) fn values(&self) -> Vec<u64> {
        let value = |(_, test): &(u8, Test)| match *test {
            Test::Is(value) | Test::Clear(value) | Test::Set(value) => value,
        };
        self.when.iter().flatten().map(value).collect()
    }
}

/// `SYS_name` as a number and a name.
macro_rules! call {
    ($name:ident) => {
        (libc::$name, stringify!($name))
    };
}

type Call = (libc::c_long, &'static str);

fn always(calls: &[Call]) -> impl Iterator<Item = Allowed> {
    calls.iter().map(|call| when(*call, "", []))
}

fn when(
    (number, name): Call,
    condition: &'static str,
    when: impl IntoIterator<Item = Vec<(u8, Test)>>,
) -> Allowed {
    let name = name.strip_prefix("SYS_").unwrap_or(name);
    Allowed { number, name, condition, when: when.into_iter().collect() }
}

fn ioctl(condition: &'static str, requests: impl IntoIterator<Item = u64>) -> Allowed {
    when(
        call!(SYS_ioctl),
        condition,
        requests.into_iter().map(|request| vec![(1, Test::Is(request))]),
    )
}

/// With `--save-directory`, calls of the main thread that make the file of a save.
const SAVE_OPENS: &[Call] = &[call!(SYS_openat), call!(SYS_fchmod), call!(SYS_flock)];
/// With `--save-directory`, calls that give that file its name or remove it.
const SAVE_ENDS: &[Call] = &[call!(SYS_renameat), call!(SYS_renameat2), call!(SYS_unlinkat)];

/// What every thread may do: wait for and wake others, use memory that is not executable, read and write open files, handle signals,
/// and end. `process` is this process's ID.
fn common(process: u32) -> Vec<Allowed> {
    const NO_CODE: (u8, Test) = (2, Test::Clear(libc::PROT_EXEC as u64));
    let mut calls: Vec<_> = always(&[
        call!(SYS_brk),
        call!(SYS_clock_gettime),
        call!(SYS_close),
        call!(SYS_exit),
        call!(SYS_exit_group),
        call!(SYS_futex),
        call!(SYS_getpid),
        call!(SYS_getrandom),
        call!(SYS_gettid),
        call!(SYS_mremap),
        call!(SYS_munmap),
        call!(SYS_poll),
        call!(SYS_ppoll),
        call!(SYS_read),
        // The kernel has the thread make it after SIGSTOP and SIGCONT in a wait with a timeout.
        call!(SYS_restart_syscall),
        call!(SYS_rt_sigprocmask),
        call!(SYS_rt_sigreturn),
        call!(SYS_sched_yield),
        call!(SYS_sigaltstack),
        call!(SYS_write),
    ])
    .collect();
    let terminal = |request| vec![(0, Test::Is(0)), (1, Test::Is(request))];
    calls.extend([
        // Debug builds of std check each descriptor before they close it.
        when(call!(SYS_fcntl), "F_GETFD", [vec![(1, Test::Is(libc::F_GETFD as u64))]]),
        // A handler of a fatal signal restores the terminal, unless minivmm is in the background.
        when(
            call!(SYS_ioctl),
            "TCSETS and TIOCGPGRP of standard input",
            [libc::TCSETS, libc::TCSETS2, libc::TIOCGPGRP].map(terminal),
        ),
        when(call!(SYS_mprotect), "not executable", [vec![NO_CODE]]),
        // The C library names its memory if the parent process has asked for that (`glibc.mem.decorate_maps` in GLIBC_TUNABLES).
        when(
            call!(SYS_prctl),
            "PR_SET_VMA_ANON_NAME",
            [vec![
                (0, Test::Is(libc::PR_SET_VMA as u64)),
                (1, Test::Is(libc::PR_SET_VMA_ANON_NAME as u64)),
            ]],
        ),
        when(call!(SYS_tgkill), "this process", [vec![(0, Test::Is(process.into()))]]),
    ]);
    calls
}

/// Memory for the C library, which wants huge pages if the parent process has asked for them (`glibc.malloc.hugetlb` in GLIBC_TUNABLES).
fn anonymous_memory() -> [Allowed; 2] {
    let advice = |advice: libc::c_int| vec![(2, Test::Is(advice as u64))];
    let anonymous = (3, Test::Set(libc::MAP_ANONYMOUS as u64));
    [
        when(
            call!(SYS_mmap),
            "anonymous, not executable",
            [vec![(2, Test::Clear(libc::PROT_EXEC as u64)), anonymous]],
        ),
        when(
            call!(SYS_madvise),
            "MADV_DONTNEED, MADV_HUGEPAGE",
            [libc::MADV_DONTNEED, libc::MADV_HUGEPAGE].map(advice),
        ),
    ]
}

/// Reads and writes of images, by threads that may wait for them. `scsi`: a disk of the machine takes SCSI commands.
fn disk_io(scsi: bool) -> Vec<Allowed> {
    let mut calls: Vec<_> = always(&[
        call!(SYS_fallocate),
        call!(SYS_fdatasync),
        call!(SYS_fsync),
        call!(SYS_ftruncate),
        call!(SYS_lseek),
        call!(SYS_pread64),
        call!(SYS_preadv),
        call!(SYS_preadv2),
        call!(SYS_pwrite64),
        call!(SYS_pwritev),
        call!(SYS_pwritev2),
    ])
    .collect();
    if scsi {
        calls.extend(always(&[call!(SYS_capget), call!(SYS_capset)]));
    }
    calls
}

/// The calls of `disk_io`, and those that only threads make which may wait for an image.
fn waiting_disk_io(scsi: bool) -> Vec<Allowed> {
    let mut calls = disk_io(scsi);
    // A save reads each image's size and time of modification, by its path.
    calls.extend(always(&[call!(SYS_statx)]));
    let (note, requests) = match scsi {
        false => ("BLKDISCARD, BLKSECDISCARD; with scsi=on also SG_IO", ioctls::DISCARD.to_vec()),
        true => {
            ("BLKDISCARD, BLKSECDISCARD, SG_IO", [&ioctls::DISCARD[..], &[ioctls::SG_IO]].concat())
        }
    };
    calls.push(ioctl(note, requests));
    calls
}

/// All that a thread of this kind may do, by name.
pub(super) fn allowed(kind: Kind, needs: Needs) -> Vec<Allowed> {
    let Needs { process, scsi, saves, debugs } = needs;
    let mut calls = common(process);
    match kind {
        Kind::Main => {
            calls.extend(main());
            if debugs {
                calls.push(ioctl("KVM_SET_GUEST_DEBUG, KVM_TRANSLATE", ioctls::DEBUG));
            }
            calls.extend(always(SAVE_OPENS).filter(|_| saves));
            calls.extend(always(SAVE_ENDS).filter(|_| saves));
        }
        Kind::Vcpu => {
            calls.extend(anonymous_memory());
            calls.push(ioctl(
                "KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_IRQ_LINE, KVM_GET_REGS, KVM_GET_SREGS",
                ioctls::VCPU,
            ));
        }
        Kind::Disk => {
            calls.extend(anonymous_memory());
            calls.extend(disk_io(false));
            calls.extend(always(&[
                call!(SYS_epoll_ctl),
                call!(SYS_epoll_pwait),
                call!(SYS_epoll_wait),
                call!(SYS_io_uring_enter),
                call!(SYS_timerfd_settime),
            ]));
            let enable = (1, Test::Is(ioctls::IORING_REGISTER_ENABLE_RINGS));
            calls.push(when(call!(SYS_io_uring_register), "ENABLE_RINGS", [vec![enable]]));
            let requests = ioctls::DISCARD.into_iter().chain([ioctls::KVM_IRQ_LINE]);
            calls.push(ioctl("KVM_IRQ_LINE, BLKDISCARD, BLKSECDISCARD", requests));
        }
        Kind::DiskIo => {
            calls.extend(anonymous_memory());
            calls.extend(waiting_disk_io(scsi));
            calls.extend(always(SAVE_ENDS).filter(|_| saves));
        }
        Kind::Console => calls.extend(anonymous_memory()),
        Kind::Registers => {
            calls.extend(anonymous_memory());
            calls.push(ioctl("KVM_SET_USER_MEMORY_REGION", [ioctls::KVM_SET_USER_MEMORY_REGION]));
        }
        Kind::Save => {
            calls.extend(anonymous_memory());
            calls.extend(save());
            calls.extend(always(SAVE_ENDS).filter(|_| saves));
        }
    }
    calls.sort_by_key(|call| call.name);
    calls
}

fn main() -> Vec<Allowed> {
    let mut calls: Vec<_> = always(&[
        call!(SYS_accept4),
        call!(SYS_clock_nanosleep),
        call!(SYS_epoll_ctl),
        call!(SYS_epoll_pwait),
        call!(SYS_epoll_wait),
        call!(SYS_fstat),
        call!(SYS_getcwd),
        call!(SYS_lseek),
        call!(SYS_madvise),
        call!(SYS_newfstatat),
        call!(SYS_pread64),
        call!(SYS_recvmsg),
        call!(SYS_rt_sigaction),
        call!(SYS_sendto),
        call!(SYS_statx),
        call!(SYS_timerfd_settime),
        // Of the sockets' own files: Landlock refuses it elsewhere.
        call!(SYS_unlink),
    ])
    .collect();
    calls.extend([
        when(
            call!(SYS_fcntl),
            "F_DUPFD_CLOEXEC",
            [vec![(1, Test::Is(libc::F_DUPFD_CLOEXEC as u64))]],
        ),
        when(call!(SYS_mmap), "not executable", [vec![(2, Test::Clear(libc::PROT_EXEC as u64))]]),
        ioctl("KVM's for the state of vCPUs, chips and clock; FIONBIO", ioctls::main()),
    ]);
    calls
}

fn save() -> Vec<Allowed> {
    let mut calls: Vec<_> = always(&[
        // The child closes all descriptors but the file and a pipe.
        call!(SYS_close_range),
        call!(SYS_fsync),
        call!(SYS_ftruncate),
        call!(SYS_pipe2),
        call!(SYS_pread64),
        call!(SYS_pwrite64),
        call!(SYS_statx),
        call!(SYS_wait4),
    ])
    .collect();
    // The arguments of fork(2), and a descriptor of the child: no flag that makes a thread or a namespace, and no stack.
    let flags = libc::SIGCHLD | libc::CLONE_PIDFD;
    let fork = vec![(0, Test::Is(flags as u64)), (1, Test::Is(0))];
    let dies_with_parent =
        vec![(0, Test::Is(libc::PR_SET_PDEATHSIG as u64)), (1, Test::Is(libc::SIGKILL as u64))];
    calls.extend([
        when(call!(SYS_clone), "as fork(2)", [fork]),
        // The thread has pidfds of its own children only.
        when(call!(SYS_pidfd_send_signal), "SIGKILL", [vec![(1, Test::Is(libc::SIGKILL as u64))]]),
        when(call!(SYS_prctl), "PR_SET_PDEATHSIG", [dies_with_parent]),
    ]);
    calls
}

/// Compiles the filter of `kind`. `otherwise` is its action for calls that are not allowed.
///
/// # Errors
/// A mistake in the list.
pub(super) fn compile(
    kind: Kind,
    needs: Needs,
    otherwise: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in allowed(kind, needs) {
        let of_call = rules.entry(call.number).or_default();
        for conditions in call.when {
            let conditions = conditions.into_iter().map(|(index, test)| {
                let (operator, value) = match test {
                    Test::Is(value) => (SeccompCmpOp::Eq, value),
                    Test::Clear(bits) => (SeccompCmpOp::MaskedEq(bits), 0),
                    Test::Set(bits) => (SeccompCmpOp::MaskedEq(bits), bits),
                };
                SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
            });
            of_call.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    let filter = |rules| {
        let allow = SeccompAction::Allow;
        let filter = SeccompFilter::new(rules, otherwise.clone(), allow, TargetArch::x86_64)?;
        BpfProgram::try_from(filter)
    };
    // A filter without rules checks the architecture and then returns an action. The action is removed here.
    let mut program = filter(BTreeMap::new())?;
    program.pop();
    // The system call's number (`struct seccomp_data`, include/uapi/linux/seccomp.h).
    program.push(instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), 0));
    let (mut parts, mut chain) = (Vec::new(), Vec::new());
    for (number, conditions) in rules {
        if chain.len() == CHAIN || !conditions.is_empty() {
            parts.extend(part(&std::mem::take(&mut chain), &otherwise));
        }
        if conditions.is_empty() {
            chain.push(number as u32);
        } else {
            let whole = filter(BTreeMap::from([(number, conditions)]))?;
            parts.push((number as u32, whole[program.len()..].to_vec()));
        }
    }
    parts.extend(part(&chain, &otherwise));
    program.extend(search(&parts));
    Ok(program)
}

/// Most system calls that a filter compares one after the other.
///
/// Seccompiler's own filters have one chain of all calls. The kernel compiles each new filter, and runs it once for every system call
/// number to find those that are always allowed. With 40 calls this cost 0.2 ms for each thread; a binary search between short chains
/// halves it.
const CHAIN: usize = 4;

/// The lowest system call number that a part of a filter decides on, and the part.
type Part = (u32, BpfProgram);

/// `jumps`: how many instructions are skipped if a comparison holds, and if it does not.
fn instruction(code: u32, jumps: (u8, u8), k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: jumps.0, jf: jumps.1, k }
}

/// The part of a filter that allows these system calls. `None` if there are none.
fn part(numbers: &[u32], otherwise: &SeccompAction) -> Option<Part> {
    let is = |(number, over): (&u32, u8)| {
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, (over, 0), *number)
    };
    let answer =
        |action: SeccompAction| instruction(libc::BPF_RET | libc::BPF_K, (0, 0), action.into());
    let comparisons = numbers.iter().zip((1..=numbers.len() as u8).rev()).map(is);
    let answers = [otherwise.clone(), SeccompAction::Allow].map(answer);
    Some((*numbers.first()?, comparisons.chain(answers).collect()))
}

/// Joins parts by a binary search. They are in ascending order of their numbers.
fn search(parts: &[Part]) -> BpfProgram {
    let (low, high) = match parts {
        [] => return BpfProgram::new(),
        [(_, only)] => return only.clone(),
        several => several.split_at(several.len() / 2),
    };
    let (first, low, high) = (high[0].0, search(low), search(high));
    let is_low = instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, (0, 1), first);
    // The distance of a conditional jump has 8 bits, and that of this jump 32.
    let over = instruction(libc::BPF_JMP | libc::BPF_JA, (0, 0), low.len() as u32);
    [vec![is_low, over], low, high].concat()
}

/// The name of a system call that a filter is likely to refuse. Allocates nothing, because a signal handler calls it.
pub(super) fn name(number: libc::c_long) -> &'static str {
    const LIKELY: [Call; 30] = [
        call!(SYS_openat),
        call!(SYS_open),
        call!(SYS_execve),
        call!(SYS_execveat),
        call!(SYS_socket),
        call!(SYS_connect),
        call!(SYS_bind),
        call!(SYS_clone),
        call!(SYS_clone3),
        call!(SYS_fork),
        call!(SYS_vfork),
        call!(SYS_ptrace),
        call!(SYS_process_vm_writev),
        call!(SYS_mmap),
        call!(SYS_mprotect),
        call!(SYS_mremap),
        call!(SYS_madvise),
        call!(SYS_ioctl),
        call!(SYS_fcntl),
        call!(SYS_io_uring_setup),
        call!(SYS_io_uring_register),
        call!(SYS_kill),
        call!(SYS_tgkill),
        call!(SYS_unlink),
        call!(SYS_rename),
        call!(SYS_readlink),
        call!(SYS_sched_getaffinity),
        call!(SYS_prctl),
        call!(SYS_close),
        call!(SYS_eventfd2),
    ];
    let found = LIKELY.iter().find(|(likely, _)| *likely == number);
    found.and_then(|(_, name)| name.strip_prefix("SYS_")).unwrap_or("see ausyscall(8)")
}
