//! The machine's address map: every guest-physical address, I/O port and interrupt, with its size, who reads it, and
//! why it sits there.
//!
//! ```text
//! guest-physical                                     ports                      GSIs (= IOAPIC pins)
//! 0x0000_0472  warm-reset flag                       0x060,0x064 i8042 (reset)    3, 4  COM2, COM1
//! 0x0000_1000  GDT                                   0x0f4       debug exit       9     power button
//! 0x0000_2000  PVH start info, module list, map      0x3f8-0x3ff COM1             13    VM generation ID
//! 0x0000_7000  zero page (Linux boot_params)         0x2f8-0x2ff COM2             16-23, 5-7, 10-12, 14, 15  disks (from the 17th, two and more to a line)
//! 0x0000_9000  page tables (6 pages)                 0x505       pvpanic
//! 0x0002_0000  command line                          0x600,0x601 sleep
//! 0x0009_fc00  end of conventional memory            0xcf9       reset
//! 0x000e_0000  ACPI: RSDP first, then its tables
//! 0x000f_0000  MPTable (only without ACPI)
//! 0x000f_f000  VM generation ID (only with ACPI)
//! 0x000f_fff0  reset vector
//! 0x0010_0000  RAM: kernel, initrd
//! 0xc000_0000  hole: no RAM up to 4 GiB
//! 0xd000_0000    virtio-mmio windows, 4 KiB each
//! 0xfec0_0000    IOAPIC
//! 0xfee0_0000    local APICs
//! 0xfffb_c000    KVM's identity map and TSS
//! 0x1_0000_0000  RAM again
//! ```

use vm_memory::GuestAddress;

/// A page of the processor, and of the host's memory: the unit of mappings, of memory slots, and of what a guest can free.
pub const PAGE_SIZE: u64 = 0x1000;

// ---- Low memory: written before the first instruction, the guest's own once its kernel runs ----

/// The BIOS's word (2 bytes) that says how the machine was reset. Linux writes it just before it pulls the reset line
/// (`arch/x86/kernel/reboot.c`, `native_machine_emergency_restart`); see [`crate::cmdline`] for what minivmm makes of it.
pub const WARM_RESET_FLAG: GuestAddress = GuestAddress(0x472);
/// What [`WARM_RESET_FLAG`] holds for a warm reset; an ordinary Linux reboot writes 0 there.
pub const WARM_RESET_MAGIC: u16 = 0x1234;
/// What [`WARM_RESET_FLAG`] holds when the guest starts. While it does, the guest has not begun to restart, so a triple fault
/// is a crash and not a way to reboot (`reboot=t`).
pub const WARM_RESET_UNTOUCHED: u16 = 0xffff;

/// The boot GDT, one page. Read by a guest that reloads a segment register before it has a GDT of its own.
pub const GDT: GuestAddress = GuestAddress(0x1000);
/// `hvm_start_info`, the start structure of a PVH kernel, whose `ebx` points here.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x2000);
/// The PVH module list. `hvm_start_info` points here if there is an initrd, which is the only entry.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x2100);
/// The PVH memory map, 24 bytes an entry. `hvm_start_info` points here.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x2200);
/// Linux's `boot_params`, one page, where the 64-bit protocol's `rsi` points.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The page tables of the 64-bit entry: PML4, PDPT and four page directories, 4 KiB each, up to 0xf000.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel command line, NUL-terminated. Both protocols take its address from their start structure.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Bytes set aside at [`CMDLINE`], the NUL included. Linux keeps 2047; another kernel may keep more.
pub const CMDLINE_SIZE: usize = 0x1_0000;
/// Where conventional memory ends: by PC tradition the last KiB below 640 KiB is the BIOS's (EBDA).
pub const EBDA: GuestAddress = GuestAddress(0x9_fc00);
/// Where the VGA window starts. Nothing is there; nothing is in the memory map up to [`ACPI_TABLES`].
pub const VGA_WINDOW: GuestAddress = GuestAddress(0xa_0000);
/// ACPI tables. The RSDP comes first: ACPI 6.5 §5.2.5.1 has it found by a scan of 0xe0000-0xfffff, so a kernel that
/// gets no address finds it too.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Bytes set aside at [`ACPI_TABLES`]: 255 processors and 64 disks take about 17 KiB.
pub const ACPI_TABLES_SIZE: usize = 0x1_0000;
/// The MPTable's floating pointer, then the table. MP 1.4 §4 has it found by a scan of 0xf0000-0xfffff.
pub const MPTABLE: GuestAddress = GuestAddress(0xf_0000);
/// Bytes set aside at [`MPTABLE`]: 255 processors take 5.4 KiB.
pub const MPTABLE_SIZE: usize = 0xf000;
/// The VM generation ID, 16 bytes. Its specification wants reserved memory, used for nothing else, at a multiple of 8. The ACPI device
/// `VGEN` has the address. Saved machines keep it: it must not move.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// The last 16 bytes below 1 MiB, where a processor in real mode finds the BIOS's code for a restart. Linux jumps there for
/// `reboot=b`, and when other ways to reset the machine have failed.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// High memory. Kernels load from here up; nothing of the monitor's lies above.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

// ---- The hole below 4 GiB ----

/// Where RAM stops below 4 GiB. The devices need less than 1 GiB of addresses, but PCs have that size.
pub const HOLE_START: GuestAddress = GuestAddress(0xc000_0000);
/// Where RAM continues above 4 GiB, if there is more than fits below [`HOLE_START`].
pub const HOLE_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// The first virtio-mmio register window. The others follow it without a gap, in the order of the disks.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// Bytes in one virtio-mmio window: a page of its own, so that KVM can map one behind a memory slot.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE_SIZE;
/// The IOAPIC's registers. KVM's in-kernel IOAPIC is always here (`IOAPIC_DEFAULT_BASE_ADDRESS`).
pub const IOAPIC: GuestAddress = GuestAddress(0xfec0_0000);
/// The IOAPIC's id in the MADT and the MPTable. IOAPIC ids are apart from processor ids since the xAPIC.
pub const IOAPIC_ID: u8 = 0;
/// How many pins KVM's IOAPIC has. GSI n is pin n, so GSIs are 0 to 23.
pub const IOAPIC_PINS: u8 = 24;
/// The local APICs' registers: each processor finds its own there (SDM 3A §11.4.1).
pub const LAPIC: GuestAddress = GuestAddress(0xfee0_0000);
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`: Intel processors without "unrestricted guest" run real mode through it.
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Three pages for `KVM_SET_TSS_ADDR`, which the same processors use for a task state segment in real mode.
pub const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);

// ---- I/O ports ----

/// i8042 data port. Present for one thing only: see [`I8042_COMMAND`].
pub const I8042_DATA: u16 = 0x60;
/// i8042 status and command port: 0xfe written here resets the machine (Linux's `reboot=k`, and its fallback).
pub const I8042_COMMAND: u16 = 0x64;
/// The code at [`RESET_VECTOR`]: `mov $0xfe, %al; out %al, $0x64; hlt; jmp .-1`. It resets the machine through the i8042, and it
/// is the same in 16, 32 and 64-bit mode.
pub const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, I8042_COMMAND as u8, 0xf4, 0xeb, 0xfd];
/// A byte written here ends the monitor with that exit status, when the user opened the port.
pub const DEBUG_EXIT: u16 = 0xf4;
/// COM1, a 16550 UART: the serial console. It is absent with `--console none`.
pub const COM1: u16 = 0x3f8;
/// How many ports a UART has (16550A data sheet: DR/DLL to SCR).
pub const UART_SIZE: u16 = 8;
/// I/O port and interrupt line of each serial port, ttyS0 first. The second port is absent unless something uses it. The lines are
/// edge-triggered and have the numbers that ISA gave them.
pub const SERIAL_PORTS: [(u16, u32); 2] = [(COM1, 4), (0x2f8, 3)];
/// pvpanic (QEMU's `docs/specs/pvpanic`), one byte: reads give the events it takes, a write reports one.
pub const PVPANIC: u16 = 0x505;
/// ACPI's SLEEP_CONTROL_REG, one byte (ACPI 6.5 §4.8.3.7): the guest powers off by a write here.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI's SLEEP_STATUS_REG, one byte; reads 0 and ignores writes.
pub const SLEEP_STATUS: u16 = 0x601;
/// What the guest writes to [`SLEEP_CONTROL`] to power off: SLP_EN (bit 5) and the S5 type 5 in SLP_TYP (bits 4:2).
pub const SLEEP_CONTROL_S5: u8 = 1 << 5 | SLEEP_TYPE_S5 << 2;
/// The sleep type that the DSDT's `\_S5` package gives the guest for "soft off".
pub const SLEEP_TYPE_S5: u8 = 5;
/// The reset control register, one byte, where chipsets have it. It serves as ACPI's RESET_REG, and for a kernel that resets by "CF9"
/// without asking ACPI (`reboot=p`).
pub const RESET: u16 = 0xcf9;
/// What ACPI tells the guest to write to [`RESET`]: hard reset (bit 1), now (bit 2).
pub const RESET_VALUE: u8 = 0x06;

/// Processors that the tables can describe: local APIC ids are one byte, and 255 is the broadcast (SDM 3A §11.6.2.1).
pub const CPUS_MAX: u32 = 255;

// ---- Interrupts: global system interrupt n is IOAPIC pin n ----

/// The power button's event, raised to the Generic Event Device. It is the pin that PCs give to ACPI.
pub const POWER_BUTTON_GSI: u32 = 9;
/// Raised when the VM generation ID has changed. PCs give the pin to the FPU, whose errors need none since the 486.
pub const GENERATION_ID_GSI: u32 = 13;
/// Edge-triggered interrupts of the first disks, which they never share: the pins that no PC device ever had.
const VIRTIO_MMIO_GSIS: [u32; 8] = [16, 17, 18, 19, 20, 21, 22, 23];
/// Those of all others: the pins of ISA cards that this machine lacks. Left out: 0 (timer), 1 (keyboard), 2 (cascade), 3 (COM2), 4, 8
/// (clock), 9, 13 (VM generation ID). 16 disks have an interrupt each. With more, disks 8, 16, 24 ... share the first of these, disks 9,
/// 17, 25 ... the second, and so on.
const VIRTIO_MMIO_SHARED_GSIS: [u32; 8] = [5, 6, 7, 10, 11, 12, 14, 15];
/// How many virtio-mmio devices the machine has room for. Interrupts cost more the more disks share a line, seven at most.
pub const VIRTIO_MMIO_MAX: usize = 64;

/// The place of one virtio-mmio device: `size` bytes of registers at the guest-physical address `base`, and the interrupt
/// line `gsi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct MmioDevice {
    pub base: GuestAddress,
    pub size: u64,
    pub gsi: u32,
}

/// The place of the virtio-mmio device `index` (from 0); `None` from [`VIRTIO_MMIO_MAX`] on.
pub(crate) fn virtio_mmio_device(index: usize) -> Option<MmioDevice> {
    let gsis = VIRTIO_MMIO_GSIS.iter().chain(VIRTIO_MMIO_SHARED_GSIS.iter().cycle());
    let gsi = *gsis.take(VIRTIO_MMIO_MAX).nth(index)?;
    let base = GuestAddress(VIRTIO_MMIO.0 + index as u64 * VIRTIO_MMIO_SIZE);
    Some(MmioDevice { base, size: VIRTIO_MMIO_SIZE, gsi })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn areas_follow_each_other_without_overlap() {
        let areas: &[(u64, u64)] = &[
            (WARM_RESET_FLAG.0, 2),
            (GDT.0, 0x1000),
            (PVH_START_INFO.0, PVH_MODULES.0 - PVH_START_INFO.0),
            (PVH_MODULES.0, PVH_MEMORY_MAP.0 - PVH_MODULES.0),
            (PVH_MEMORY_MAP.0, ZERO_PAGE.0 - PVH_MEMORY_MAP.0),
            (ZERO_PAGE.0, 0x1000),
            (PAGE_TABLES.0, 6 * 0x1000),
            (CMDLINE.0, CMDLINE_SIZE as u64),
            (EBDA.0, VGA_WINDOW.0 - EBDA.0),
            (ACPI_TABLES.0, ACPI_TABLES_SIZE as u64),
            (MPTABLE.0, MPTABLE_SIZE as u64),
            (GENERATION_ID.0, 16),
            (RESET_VECTOR.0, RESET_CODE.len() as u64),
            (HIGH_MEMORY.0, HOLE_START.0 - HIGH_MEMORY.0),
            (VIRTIO_MMIO.0, VIRTIO_MMIO_SIZE * VIRTIO_MMIO_MAX as u64),
            (IOAPIC.0, 0x1000),
            (LAPIC.0, 0x1000),
            (KVM_IDENTITY_MAP.0, 0x1000),
            (KVM_TSS.0, 0x3000),
            (HOLE_END.0, 1),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:#x?}");
        }
    }

    #[test]
    fn every_disk_has_its_own_window_and_sixteen_an_interrupt_of_their_own() {
        let devices: Vec<_> = (0..).map_while(virtio_mmio_device).collect();
        assert_eq!(devices.len(), VIRTIO_MMIO_MAX);
        let gsis: BTreeSet<u32> = devices[..16].iter().map(|device| device.gsi).collect();
        assert_eq!(gsis.len(), 16);
        for gsi in &gsis {
            let sharers = devices.iter().filter(|device| device.gsi == *gsi).count();
            assert_eq!(sharers, if VIRTIO_MMIO_GSIS.contains(gsi) { 1 } else { 7 }, "{gsi}");
        }
        assert!(gsis.iter().all(|gsi| *gsi < u32::from(IOAPIC_PINS)));
        assert!(
            [0, 1, 2, 3, 4, 8, POWER_BUTTON_GSI, GENERATION_ID_GSI]
                .iter()
                .all(|gsi| !gsis.contains(gsi))
        );
        for pair in devices.windows(2) {
            assert_eq!(pair[0].base.0 + pair[0].size, pair[1].base.0);
        }
        assert_eq!(virtio_mmio_device(VIRTIO_MMIO_MAX), None);
        assert_eq!(virtio_mmio_device(usize::MAX), None);
    }

    #[test]
    fn sleep_value_follows_acpi() {
        assert_eq!(SLEEP_CONTROL_S5, 0x34);
    }
}
