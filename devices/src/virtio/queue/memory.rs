//! Small accesses to guest memory: one look-up of the region and one volatile access.
//!
//! The general functions of `vm_memory` handle ranges over several regions, which costs several times as much. This file
//! uses them only for a value that straddles two regions. The region checks the bounds of every access. `None` means that
//! the address is not guest memory: the driver's fault, and never a panic.

use std::sync::atomic::Ordering;

use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use crate::GuestMemory;

/// Reads a value once. `None`: part of it is outside guest memory.
pub(crate) fn load<T: ByteValued>(memory: &GuestMemory, address: GuestAddress) -> Option<T> {
    waypoint!();
    match slice(memory, address, size_of::<T>()) {
        Some(slice) => load_from(&slice, 0),
        None => load_parts(memory, address),
    }
}

/// Writes a value. `None`: part of it is outside guest memory; the rest may have been written.
pub(crate) fn store<T: ByteValued>(
    memory: &GuestMemory,
    address: GuestAddress,
    value: T,
) -> Option<()> {
    match slice(memory, address, size_of::<T>()) {
        Some(slice) => slice.get_ref::<T>(0).ok().map(|place| place.store(value)),
        None => store_parts(memory, address, value),
    }
}

/// Reads an aligned value that the driver may write at the same time.
pub(crate) fn load_atomic<T: AtomicAccess>(
    memory: &GuestMemory,
    address: GuestAddress,
    order: Ordering,
) -> Option<T> {
    let (region, offset) = find(memory, address)?;
    region.load(offset, order).ok()
}

/// Writes an aligned value that the driver may read at the same time.
pub(crate) fn store_atomic<T: AtomicAccess>(
    memory: &GuestMemory,
    address: GuestAddress,
    value: T,
    order: Ordering,
) -> Option<()> {
    let (region, offset) = find(memory, address)?;
    region.store(value, offset, order).ok()
}

/// Whether the `length` bytes from `address` on are guest memory.
pub(super) fn contains(memory: &GuestMemory, address: GuestAddress, length: u32) -> bool {
    slice(memory, address, length as usize).is_some()
        || GuestMemoryBackend::check_range(memory, address, length as usize)
}

/// The `length` bytes from `address` on. `None`: they are not all in one region.
fn slice(memory: &GuestMemory, address: GuestAddress, length: usize) -> Option<VolatileSlice<'_>> {
    let (region, offset) = find(memory, address)?;
    region.get_slice(offset, length).ok()
}

/// Reads the value at `offset` of `slice` once. `None`: the slice ends before.
pub(super) fn load_from<T: ByteValued>(slice: &VolatileSlice<'_>, offset: usize) -> Option<T> {
    Some(slice.get_ref::<T>(offset).ok()?.load())
}

// For a value that is in no region or in several. Kept out of line, so that the code for the usual case stays short.

#[cold]
pub(super) fn load_parts<T: ByteValued>(memory: &GuestMemory, address: GuestAddress) -> Option<T> {
    memory.read_obj(address).ok()
}

#[cold]
fn store_parts<T: ByteValued>(memory: &GuestMemory, address: GuestAddress, value: T) -> Option<()> {
    memory.write_obj(value, address).ok()
}

/// The region of `address`, and the offset in it. RAM has one region, or two around the device memory below 4 GiB. A linear
/// search through them takes a third of the instructions of the binary search in `to_region_addr`.
#[inline]
pub(super) fn find(
    memory: &GuestMemory,
    address: GuestAddress,
) -> Option<(&GuestRegionMmap, MemoryRegionAddress)> {
    memory.iter().find_map(|region| Some((region, region.to_region_addr(address)?)))
}
