//! Small accesses to guest memory, quickly: one look-up of the region and one volatile access. The general ones of
//! `vm_memory` are ready for ranges over several regions, which costs them several times as much; they serve here where
//! a value straddles two regions.

use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use crate::GuestMemory;

/// Reads a value once. `None`: it is not all in guest memory.
pub(super) fn load<T: ByteValued>(memory: &GuestMemory, address: GuestAddress) -> Option<T> {
    let (region, offset) = memory.to_region_addr(address)?;
    match region.get_slice(offset, size_of::<T>()) {
        Ok(slice) => Some(slice.get_ref::<T>(0).ok()?.load()),
        Err(_) => memory.read_obj(address).ok(),
    }
}

/// Writes a value. `None`: it is not all in guest memory, and nothing is written of it outside.
pub(super) fn store<T: ByteValued>(memory: &GuestMemory, address: GuestAddress, value: T) -> Option<()> {
    let (region, offset) = memory.to_region_addr(address)?;
    match region.get_slice(offset, size_of::<T>()) {
        Ok(slice) => slice.get_ref::<T>(0).ok().map(|place| place.store(value)),
        Err(_) => memory.write_obj(value, address).ok(),
    }
}

/// Reads an aligned value that the driver writes meanwhile.
pub(super) fn load_atomic<T: AtomicAccess>(memory: &GuestMemory, address: GuestAddress, order: Ordering) -> Option<T> {
    let (region, offset) = memory.to_region_addr(address)?;
    region.load(offset, order).ok()
}

/// Writes an aligned value that the driver reads meanwhile.
pub(super) fn store_atomic<T: AtomicAccess>(
    memory: &GuestMemory,
    address: GuestAddress,
    value: T,
    order: Ordering,
) -> Option<()> {
    let (region, offset) = memory.to_region_addr(address)?;
    region.store(value, offset, order).ok()
}

/// Whether `length` bytes, at least one, from `address` on are guest memory.
pub(super) fn contains(memory: &GuestMemory, address: GuestAddress, length: u32) -> bool {
    let Some((region, offset)) = memory.to_region_addr(address) else { return false };
    u64::from(length) <= region.len() - offset.0 || GuestMemoryBackend::check_range(memory, address, length as usize)
}
