//! Guest RAM: anonymous memory of the host, populated when the guest first touches it.

use vm_memory::GuestMemoryMmap;

use crate::GuestMemory;
use crate::error::Error;

const MIB: u64 = 1 << 20;

/// Maps `bytes` of RAM around the MMIO hole.
///
/// # Errors
/// More than the host has, or the host refuses the mapping.
pub(crate) fn allocate(bytes: u64) -> Result<GuestMemory, Error> {
    let info = rustix::system::sysinfo();
    // Both fields are C `unsigned long`s counted in `mem_unit` bytes (sysinfo(2)).
    let host = info.totalram.saturating_mul(u64::from(info.mem_unit));
    if bytes > host {
        return Err(Error::TooMuchMemory { wanted_mib: bytes / MIB, host_mib: host / MIB });
    }
    GuestMemoryMmap::from_ranges(&arch::memory::ram_ranges(bytes))
        .map_err(|error| Error::Memory { mib: bytes / MIB, reason: error.to_string() })
}
