//! Where everything is in one machine: the constants of [`crate::layout`] applied to its amount of memory and its devices.

use vm_memory::GuestAddress;

use crate::layout::{ACPI_TABLES, MmioDevice, virtio_mmio_device};
use crate::memory;

/// The hardware of a machine, as far as its layout and its tables depend on it: `memory` bytes of RAM, 1 to
/// [`CPUS_MAX`](crate::layout::CPUS_MAX) `cpus`, those of the [`SERIAL_PORTS`](crate::layout::SERIAL_PORTS) that `serial` names, and up
/// to [`VIRTIO_MMIO_MAX`](crate::layout::VIRTIO_MMIO_MAX) `disks`. ACPI tables describe it or, without `acpi`, an MPTable and words on
/// the kernel command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct MachineSpec {
    pub memory: u64,
    pub cpus: u32,
    pub serial: [bool; 2],
    pub acpi: bool,
    pub disks: usize,
}

/// Where everything is in one machine. It is computed once, before anything is made, and passed to all that need an address: RAM, the
/// kernel's placement, tables, command line and devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineLayout {
    /// The hardware that this is the layout of.
    pub spec: MachineSpec,
    /// Start and bytes of each range of RAM, in ascending order.
    pub ram: Vec<(GuestAddress, usize)>,
    /// The memory map that the guest is given (e820).
    pub memory_map: Vec<memory::Range>,
    /// Registers and interrupt line of each disk, `/dev/vda` first.
    pub disks: Vec<MmioDevice>,
}

impl MachineLayout {
    /// Lays out a machine. Disks beyond [`VIRTIO_MMIO_MAX`](crate::layout::VIRTIO_MMIO_MAX) have no place: the caller refuses them.
    pub fn new(spec: MachineSpec) -> Self {
        let ram = memory::ram_ranges(spec.memory);
        let memory_map = memory::e820(&ram);
        let disks = (0..spec.disks).map_while(virtio_mmio_device).collect();
        Self { spec, ram, memory_map, disks }
    }

    /// The address of the ACPI root pointer, or `None` without ACPI.
    pub fn rsdp(&self) -> Option<GuestAddress> {
        self.spec.acpi.then_some(ACPI_TABLES)
    }
}
