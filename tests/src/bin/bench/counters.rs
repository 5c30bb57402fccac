//! How often a process passes through the kernel's tracepoints: system calls, exits of its guest.
#![expect(unsafe_code, reason = "perf_event_open(2) has no safe wrapper")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;

/// The first 64 bytes of `struct perf_event_attr`, PERF_ATTR_SIZE_VER0 (`include/uapi/linux/perf_event.h`).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    address: u64,
}

const TRACEPOINT: u32 = 2;
/// New threads are counted too.
const INHERIT: u64 = 1 << 1;
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;

/// What is counted: its name in the results, its tracepoint, and a filter on that one's fields. Exits for port I/O are left
/// out: they are the console's, on which the guest tells when a job begins and ends. (Exit reasons: SDM 3D C "VMX basic exit
/// reasons" 30, APM 2 C "SVM intercept exit codes" 0x7b; `Documentation/virt/kvm/api.rst` KVM_EXIT_IO 2.)
pub(crate) const EVENTS: [(&str, &str, &str); 3] = [
    (
        "KVM exits a request",
        "kvm/kvm_exit",
        "(isa == 1 && exit_reason != 30) || (isa == 2 && exit_reason != 0x7b)",
    ),
    ("exits to user space a request", "kvm/kvm_userspace_exit", "reason != 2"),
    ("system calls a request", "raw_syscalls/sys_enter", ""),
];

/// `_IOW('$', 6, char *)` (`include/uapi/linux/perf_event.h`).
const SET_FILTER: libc::c_ulong = 0x4008_2406;

/// Counters of each event, one for each thread.
pub(crate) struct Counters([Vec<File>; EVENTS.len()]);

impl Counters {
    /// Counts from now on in these threads and those that they start. An event that cannot be counted here stays NaN.
    pub(crate) fn open(threads: &[(u32, String)]) -> Self {
        Self(EVENTS.map(|(_, event, filter)| {
            let Some(id) = tracepoint(event) else { return Vec::new() };
            threads.iter().filter_map(|(thread, _)| open(id, filter, *thread)).collect()
        }))
    }

    pub(crate) fn read(&self) -> [f64; EVENTS.len()] {
        self.0.each_ref().map(|files| {
            let counts = files.iter().map(|mut file| {
                let mut count = [0; 8];
                file.read_exact(&mut count).map_or(f64::NAN, |()| u64::from_ne_bytes(count) as f64)
            });
            if files.is_empty() { f64::NAN } else { counts.sum() }
        })
    }
}

fn tracepoint(event: &str) -> Option<u64> {
    let file = format!("/sys/kernel/tracing/events/{event}/id");
    let id = fs::read_to_string(&file).or_else(|why| {
        // Where it is not mounted yet. Fails without root; then nothing is counted.
        let _ = Command::new("mount")
            .args(["-t", "tracefs", "tracefs", "/sys/kernel/tracing"])
            .output();
        fs::read_to_string(&file).map_err(|_| why)
    });
    id.ok()?.trim().parse().ok()
}

fn open(tracepoint: u64, filter: &str, thread: u32) -> Option<File> {
    let size = size_of::<Attributes>() as u32;
    let attributes = Attributes {
        kind: TRACEPOINT,
        size,
        config: tracepoint,
        flags: INHERIT,
        ..Default::default()
    };
    // SAFETY: the kernel reads `size` bytes of `attributes`, which live until the call returns.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread as libc::pid_t,
            -1,
            -1,
            CLOSE_ON_EXEC,
        )
    };
    // SAFETY: a new descriptor, which nothing else owns.
    let file = (fd >= 0).then(|| unsafe { File::from_raw_fd(fd as i32) })?;
    if !filter.is_empty() {
        let filter = CString::new(filter).ok()?;
        // SAFETY: the kernel reads a string that lives until the call returns.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), SET_FILTER, filter.as_ptr()) };
        assert_eq!(set, 0, "{filter:?}: {}", std::io::Error::last_os_error());
    }
    Some(file)
}
