//! Pages of minivmm's binary, which are given back when the start does not need them any more: the code that reads arguments, kernels and
//! tables is most of the binary, and runs once. The host maps a page again when its code runs.
//!
//! A capability: the builder calls [`release`], and adds [`source`] to the main loop.

use std::ffi::{c_int, c_void};
use std::ptr;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::Machine;
use crate::sources::{Poller, Source};

/// Bytes of a page (x86).
const PAGE: usize = 4096;

/// A row of the main loop's table, which calls [`release`] in the first turn. By then the guest runs, and does not wait for it. `None`:
/// the host refuses an eventfd, and the pages stay.
pub(crate) fn source() -> Option<Box<dyn Source>> {
    let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
    ready.write(1).ok()?;
    Some(Box::new(ReleaseOnce(ready)))
}

struct ReleaseOnce(EventFd);

impl Source for ReleaseOnce {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add_edges(&self.0, 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, _: &mut Machine) {
        release();
    }
}

/// Takes the pages of the binary's code and constants out of this process. They stay in the host's page cache. A debug build keeps them.
/// Breakpoints of a debugger and uprobes are private copies of these pages: a release build loses those that were set before.
pub(crate) fn release() {
    if !cfg!(debug_assertions) {
        release_segments();
    }
}

#[expect(unsafe_code, reason = "dl_iterate_phdr calls back")]
fn release_segments() {
    // SAFETY: `release_of` has the type that dl_iterate_phdr calls, and uses no data.
    unsafe { libc::dl_iterate_phdr(Some(release_of), ptr::null_mut()) };
}

/// Called with the first object, which is the program. Ends the iteration: other objects are shared with other programs.
#[expect(unsafe_code, reason = "the program's headers are behind pointers, and madvise takes one")]
unsafe extern "C" fn release_of(
    object: *mut libc::dl_phdr_info,
    _: usize,
    _: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr(3) passes a valid object with this many headers, which are constant.
    let (base, headers) = unsafe {
        let object = &*object;
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr as usize, headers)
    };
    let is_constant = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(is_constant) {
        let start = base + header.p_vaddr as usize;
        let end = start + header.p_memsz as usize;
        let (first, end) = (start & !(PAGE - 1), end & !(PAGE - 1));
        // SAFETY: these pages are mapped from the program's file and never written to, so that each comes back as it was.
        // The host may refuse: then they stay.
        unsafe { libc::madvise(first as *mut c_void, end - first, libc::MADV_DONTNEED) };
    }
    1
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    const ALONE: &str = "MINIVMM_TEST_ALONE";

    /// KiB of this program that are mapped, code and constants.
    fn resident() -> u64 {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let program = fs::read_link("/proc/self/exe").unwrap();
        let mut counted = false;
        let mut sum = 0;
        for line in maps.lines() {
            if let Some(size) = line.strip_prefix("Rss:").filter(|_| counted) {
                sum += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            } else if line.contains("r-xp") || line.contains("r--p") || line.contains("rw-p") {
                counted = line.ends_with(program.to_str().unwrap()) && !line.contains("rw-p");
            }
        }
        sum
    }

    /// Runs in a process of its own: the tests beside it in this one would bring pages back.
    #[test]
    fn the_pages_of_the_binary_are_released_and_come_back() {
        const NAME: &str =
            "binary_pages::tests::the_pages_of_the_binary_are_released_and_come_back";
        if std::env::var_os(ALONE).is_none() {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let output = child.args(["--exact", NAME]).env(ALONE, "1").output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
            return;
        }
        let before = resident();
        release_segments();
        let after = resident();
        assert!(after < before, "{after} of {before} KiB");
        assert_eq!(format!("{:x}", after.pow(0)), "1", "code that was released does not run");
    }
}
