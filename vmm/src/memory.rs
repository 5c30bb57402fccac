//! Guest RAM: private memory of the host, which is populated when the guest first touches it; or, on request, huge pages.

use std::fs;

use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::GuestMemory;
use crate::error::Error;

const MIB: u64 = 1 << 20;
const HUGE_PAGE: u64 = 2 * MIB;
/// The host's pool of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Maps `bytes` of RAM around the MMIO hole.
///
/// # Errors
/// More than the host has, or the host refuses the mapping.
pub(crate) fn allocate(bytes: u64, hugepages: bool) -> Result<GuestMemory, Error> {
    let info = rustix::system::sysinfo();
    // Both fields are C `unsigned long`s counted in `mem_unit` bytes (sysinfo(2)).
    let host = info.totalram.saturating_mul(u64::from(info.mem_unit));
    if bytes > host {
        return Err(Error::TooMuchMemory { wanted_mib: bytes / MIB, host_mib: host / MIB });
    }
    let ranges = arch::memory::ram_ranges(bytes);
    if hugepages {
        return allocate_huge(bytes, &ranges);
    }
    GuestMemoryMmap::from_ranges(&ranges).map_err(refused(bytes))
}

/// Takes all pages now: the guest never waits for one, and the host cannot run out of them later.
fn allocate_huge(bytes: u64, ranges: &[(GuestAddress, usize)]) -> Result<GuestMemory, Error> {
    if !bytes.is_multiple_of(HUGE_PAGE) {
        return Err(Error::HugePageMemory(bytes));
    }
    let pool = |name| fs::read_to_string(format!("{POOL}/{name}")).ok()?.trim().parse::<u64>().ok();
    let count = |name| pool(name).unwrap_or(0);
    // What others were promised counts as free until they touch it.
    let free = count("free_hugepages").saturating_sub(count("resv_hugepages"));
    let wanted = bytes / HUGE_PAGE;
    if free < wanted {
        return Err(Error::HugePages { wanted, free, enough: count("nr_hugepages") + wanted - free });
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_POPULATE;
    let region = |&(start, size): &(GuestAddress, usize)| {
        let mapping =
            MmapRegion::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags).map_err(refused(bytes))?;
        GuestRegionMmap::new(mapping, start).ok_or_else(|| refused(bytes)("it wraps around"))
    };
    let regions = ranges.iter().map(region).collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(refused(bytes))
}

fn refused<E: ToString>(bytes: u64) -> impl FnOnce(E) -> Error {
    move |error| Error::Memory { mib: bytes / MIB, reason: error.to_string() }
}
