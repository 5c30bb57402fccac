//! What a running process has of the host: descriptors, threads, memory.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::BOUND;

/// Most that resident memory and the address space may grow by: what allocators and a guest's own 32 MiB of memory touch late.
const GROWTH_KIB: u64 = 4096;

/// All of it can be read by an ordinary user, to whom `/proc/PID/fd` and `maps` of a confined process are closed: it is not
/// dumpable.
#[derive(Clone, Copy, Debug)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: usize,
    /// Resident memory.
    pub resident_kib: u64,
    /// Mapped memory.
    pub address_space_kib: u64,
}

impl Holdings {
    /// Those of the process `id`.
    pub fn of(id: u32) -> Self {
        let process = Path::new("/proc").join(id.to_string());
        let status = fs::read_to_string(process.join("status")).unwrap();
        let kib = |field| {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Self {
            // The size of this directory is the number of descriptors (Linux 6.2).
            descriptors: fs::metadata(process.join("fd")).unwrap().len(),
            threads: fs::read_dir(process.join("task")).unwrap().count(),
            resident_kib: kib("VmRSS:"),
            address_space_kib: kib("VmSize:"),
        }
    }

    /// Compares with what the process `id` has now.
    #[track_caller]
    pub fn assert_same(&self, id: u32, what: &str) {
        let now = Self::of(id);
        assert_eq!((now.descriptors, now.threads), (self.descriptors, self.threads), "{what}");
        for (now, before) in
            [(now.resident_kib, self.resident_kib), (now.address_space_kib, self.address_space_kib)]
        {
            let grown = now.saturating_sub(before);
            assert!(grown < GROWTH_KIB, "{what}: grown by {grown} KiB");
        }
    }

    /// The same, once the process has noticed that clients are gone.
    #[track_caller]
    pub fn assert_same_soon(&self, id: u32, what: &str) {
        let deadline = Instant::now() + BOUND;
        while Self::of(id).descriptors != self.descriptors && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.assert_same(id, what);
    }
}
