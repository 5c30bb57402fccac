//! The VM generation ID (Microsoft, "Virtual Machine Generation ID"): it tells a guest that its memory is no longer the only one
//! of its kind. A restored guest, which may be one of many clones, finds another ID and is interrupted; Linux then draws new
//! random numbers before user space runs.
//!
//! The builder draws an ID for each machine that it makes, and the boot image has it among its structures, so that a reset brings back the
//! same. A restored machine gets it instead of the saved one. `arch/src/tables/generation_id.rs` describes the device to the
//! guest. The ID is not part of the saved description: nothing needs the old one.

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

/// An ID that no other machine has, in its place. `None`: without ACPI a guest cannot find it.
///
/// # Errors
/// The host has no random numbers.
pub(crate) fn draw(acpi: bool) -> Result<Option<Structure>, Error> {
    if !acpi {
        return Ok(None);
    }
    let mut bytes = vec![0; SIZE];
    // As few as these come whole (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|error| Error::host("draw the VM generation ID")(error.into()))?;
    Ok(Some(Structure { name: NAME, address: layout::GENERATION_ID, bytes }))
}

/// Puts `id` in the place of the one that guest memory has.
pub(super) fn replace(memory: &GuestMemory, id: Option<&Structure>) -> Result<(), Error> {
    let write = |id: &Structure| memory.write_slice(&id.bytes, id.address).map_err(into_io);
    id.map_or(Ok(()), write).map_err(Error::host(NAME))
}

/// Tells the guest that its ID has changed. It hears of that once its vCPUs run, whose state is in place.
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
