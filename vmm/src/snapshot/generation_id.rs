//! The VM generation ID (Microsoft, "Virtual Machine Generation ID"). By it a guest notices that it was restored, and may be one of
//! several clones. A restored guest finds another ID and gets an interrupt. Linux then reseeds its random number generator.
//!
//! The builder draws an ID for each machine. It is one of the structures of the boot image, so a reset restores it. The saved description
//! has none: a restored machine gets its new ID in place of the saved one. `arch/src/tables/generation_id.rs` describes the device to the
//! guest.

use std::sync::Arc;

use arch::{Structure, layout};
use kvm_ioctls::VmFd;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::Bytes;

use crate::GuestMemory;
use crate::attach;
use crate::error::Error;
use crate::memory::into_io;

/// Bytes of an ID.
const SIZE: usize = 16;
const NAME: &str = "VM generation ID";

/// Draws a random ID. `None`: without ACPI a guest cannot find it.
///
/// # Errors
/// The host has no random numbers.
pub(crate) fn draw(acpi: bool) -> Result<Option<Structure>, Error> {
    if !acpi {
        return Ok(None);
    }
    let mut bytes = vec![0; SIZE];
    // getrandom(2) returns so few bytes in one call.
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|error| Error::host("draw the VM generation ID")(error.into()))?;
    Ok(Some(Structure { name: NAME, address: layout::GENERATION_ID, bytes }))
}

/// Writes `id` over the one in guest memory.
pub(super) fn replace(memory: &GuestMemory, id: Option<&Structure>) -> Result<(), Error> {
    let write = |id: &Structure| memory.write_slice(&id.bytes, id.address).map_err(into_io);
    id.map_or(Ok(()), write).map_err(Error::host("write the VM generation ID"))
}

/// Raises the interrupt that tells the guest of its new ID. The state of vCPUs and interrupt controllers has been restored before.
pub(super) fn notify(vm: &Arc<VmFd>) -> Result<(), Error> {
    attach::line(vm, layout::GENERATION_ID_GSI)
        .pulse()
        .map_err(Error::host("tell the guest of its generation ID"))
}

/// The ID that the guest reads, as GUIDs are written: the first three fields are little-endian in memory.
///
/// # Errors
/// The guest has no such memory.
pub(crate) fn read(memory: &GuestMemory) -> std::io::Result<String> {
    let id: [u8; SIZE] = memory.read_obj(layout::GENERATION_ID).map_err(into_io)?;
    let [a, b, c, d, e, f, g, h, rest @ ..] = id;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let fields = [&[d, c, b, a][..], &[f, e], &[h, g], &rest[..2], &rest[2..]];
    Ok(fields.map(hex).join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn memory() -> GuestMemory {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn an_id_is_shown_as_a_guid() {
        let bytes = (0x10..0x20).collect();
        let id = Structure { name: NAME, address: layout::GENERATION_ID, bytes };
        let memory = memory();
        replace(&memory, Some(&id)).unwrap();
        assert_eq!(read(&memory).unwrap(), "13121110-1514-1716-1819-1a1b1c1d1e1f");
    }

    #[test]
    fn each_machine_with_acpi_has_its_own_id() {
        let [one, other] = [true; 2].map(|acpi| draw(acpi).unwrap().unwrap());
        assert_eq!((one.bytes.len(), one.address), (SIZE, layout::GENERATION_ID));
        assert_ne!(one, other);
        assert_eq!(draw(false).unwrap(), None);
    }
}
