//! `--hugepages`: guest RAM of 2 MiB pages from the host's pool, all taken at the start. The guest never waits for one, and the host
//! cannot run out of them later.
//!
//! A capability: the builder calls [`allocate`] instead of the one in [`crate::memory`].

use std::fs;

use arch::machine_layout::MachineLayout;

use crate::GuestMemory;
use crate::error::Error;
use crate::memory;

const HUGE_PAGE: u64 = 2 << 20;
/// The host's pool (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Why guest RAM cannot be huge pages.
#[derive(Debug, thiserror::Error)]
enum HugePagesError {
    #[error("--memory {} with --hugepages: give a multiple of 2M", size(*.0))]
    Memory(u64),
    #[error(
        "--hugepages: {wanted} pages of 2M are needed and {free} are free; make more: \
         echo {enough} >/proc/sys/vm/nr_hugepages"
    )]
    TooFew { wanted: u64, free: u64, enough: u64 },
}

/// A size of memory, in M if it is a whole number of them.
fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) {
        format!("{}M", bytes >> 20)
    } else {
        format!("{}K", bytes >> 10)
    }
}

/// Maps the RAM of `layout`, and takes all of its pages.
///
/// # Errors
/// It is no whole number of pages, more than the pool has, or the host refuses the mapping.
pub(crate) fn allocate(layout: &MachineLayout) -> Result<GuestMemory, Error> {
    memory::check_size(layout)?;
    let bytes = layout.spec.memory;
    if !bytes.is_multiple_of(HUGE_PAGE) {
        return Err(Error::Refused(HugePagesError::Memory(bytes).into()));
    }
    let pool = |name| fs::read_to_string(format!("{POOL}/{name}")).ok()?.trim().parse::<u64>().ok();
    let count = |name| pool(name).unwrap_or(0);
    // What others were promised counts as free until they touch it.
    let free = count("free_hugepages").saturating_sub(count("resv_hugepages"));
    let wanted = bytes / HUGE_PAGE;
    if free < wanted {
        let enough = count("nr_hugepages") + wanted - free;
        return Err(Error::Capability(HugePagesError::TooFew { wanted, free, enough }.into()));
    }
    memory::map(layout, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_POPULATE)
}
