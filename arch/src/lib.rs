//! What an x86-64 machine looks like before its first instruction.
//!
//! Everything here is a *value*: register images, CPUID leaves, tables for guest memory. Nothing holds a KVM file
//! descriptor, so all of it is tested without `/dev/kvm`; the `vmm` crate applies what this crate computes.
//!
//! The order of a boot, and where to read about each step:
//! 1. [`memory::ram_ranges`] says where guest RAM lies around the hole of [`layout`].
//! 2. [`tables::acpi::write`] (or [`tables::mptable::write`]) describes the hardware.
//! 3. [`cmdline::build`] joins the defaults and the user's words.
//! 4. [`boot::load`] puts the kernel, its initrd and its start structures into memory and returns an [`boot::Entry`].
//! 5. [`cpu`] turns that entry into the first vCPU's registers; the others wait for the guest's INIT-SIPI.

pub mod boot;
pub mod cmdline;
pub mod cpu;
pub mod layout;
pub mod memory;
pub mod tables;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Guest RAM as the whole crate sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

/// A structure that did not fit into guest RAM: every one of them lies below 1 MiB, so the guest has next to no memory.
#[derive(Debug, thiserror::Error)]
#[error("no guest memory at {address:#x}, the place of the {what}; give the guest more memory")]
pub struct WriteError {
    what: &'static str,
    address: u64,
    #[source]
    source: GuestMemoryError,
}

/// Writes one boot structure, named for the error message.
fn write(memory: &GuestMemory, what: &'static str, address: GuestAddress, bytes: &[u8]) -> Result<(), WriteError> {
    memory.write_slice(bytes, address).map_err(|source| WriteError { what, address: address.0, source })
}
