//! The MPTable (Intel MultiProcessor Specification 1.4): processors, the IOAPIC and its wiring, for kernels that boot without ACPI.
//!
//! Every pin of the IOAPIC is an interrupt of the ISA bus with the pin's own number, edge-triggered and active high. So Linux gives a pin
//! the number that `virtio_mmio.device=` names, also above 15 (`arch/x86/kernel/apic/io_apic.c`, `mp_map_pin_to_irq`), and programs it
//! for the edge of a pulse.

use crate::layout::MmioDevice;
use crate::machine_layout::MachineLayout;
use crate::{Structure, layout};

const SPECIFICATION: u8 = 4;
// MP 1.4 §4.1: the floating pointer is one 16-byte paragraph.
const POINTER_SIZE: u64 = 16;
// MP 1.4 §4.2.
const HEADER_SIZE: usize = 44;

// Entry types (MP 1.4 table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Processor entry (MP 1.4 table 4-4).
const LAPIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1 << 0;
const CPU_BOOT: u8 = 1 << 1;
/// Family 6, with which every processor that KVM runs on is compatible. The guest reads the real family from CPUID.
const CPU_SIGNATURE: u32 = 0x600;
/// There is an FPU (bit 0) and a local APIC (bit 9).
const CPU_FEATURES: u32 = 1 << 0 | 1 << 9;

/// IOAPIC entry (MP 1.4 table 4-8). KVM's IOAPIC says version 0x11.
const IOAPIC_VERSION: u8 = 0x11;
const IOAPIC_ENABLED: u8 = 1;

const ISA_BUS: u8 = 0;

/// Interrupt types and flags (MP 1.4 tables 4-10 and 4-11).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ACTIVE_HIGH: u16 = 0b01;
const EDGE: u16 = 0b01 << 2;
const AS_THE_BUS: u16 = 0;
const EVERY_LAPIC: u8 = 0xff;

/// The words on the kernel command line that tell what no MPTable can.
pub(super) fn words(layout: &MachineLayout) -> Vec<String> {
    let mut words: Vec<_> = [
        // Says what is so; without it the kernel looks for tables and complains.
        "acpi=off",
        // The only way left to reset that needs no guessing: the i8042.
        "reboot=k",
        // With an MPTable the kernel tries the 8254's interrupt for ten ticks, and gives up (panics) where the host is
        // too busy to deliver them in time. Kernels with KVM_GUEST skip this by themselves. With ACPI there is no 8254.
        "no_timer_check",
        // There is no clock chip, and only ACPI can say so. Without this Linux makes a device for one, and its driver
        // waits for the chip for seconds (`arch/x86/kernel/rtc.c`; `drivers/rtc/rtc-mc146818-lib.c`).
        "initcall_blacklist=add_rtc_cmos",
    ]
    .map(str::to_owned)
    .into();
    // Documentation/admin-guide/kernel-parameters.txt: <size>@<baseaddr>:<irq>
    words.extend(layout.disks.iter().map(|MmioDevice { base, size, gsi }| {
        format!("virtio_mmio.device={}K@{:#x}:{gsi}", size / 1024, base.0)
    }));
    words
}

/// The floating pointer and the table for `cpus` processors (1 to 255).
pub(super) fn table(cpus: u32) -> Structure {
    let address = layout::MPTABLE.0 + POINTER_SIZE;
    let bytes = [&floating_pointer(address as u32)[..], &configuration(cpus)].concat();
    Structure { name: "MPTable", address: layout::MPTABLE, bytes }
}

fn floating_pointer(table: u32) -> [u8; POINTER_SIZE as usize] {
    let [a, b, c, d] = table.to_le_bytes();
    // Length 1 paragraph; feature bytes 0: there is a configuration table, and no mode switch (IMCR).
    let mut pointer = [b'_', b'M', b'P', b'_', a, b, c, d, 1, SPECIFICATION, 0, 0, 0, 0, 0, 0];
    pointer[10] = checksum(&pointer);
    pointer
}

/// The configuration table: header, then entries in ascending order of type.
fn configuration(cpus: u32) -> Vec<u8> {
    let mut entries = Vec::new();
    // APIC ids are bytes, so 255 processors at most: id 255 is everyone.
    let processors = 0..u8::try_from(cpus).unwrap_or(EVERY_LAPIC);
    let count = processors.len() + 1 + 1 + usize::from(layout::IOAPIC_PINS) + 2;
    for id in processors {
        let boot = if id == 0 { CPU_BOOT } else { 0 };
        entries.extend([PROCESSOR, id, LAPIC_VERSION, CPU_ENABLED | boot]);
        entries.extend(CPU_SIGNATURE.to_le_bytes());
        entries.extend(CPU_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([IOAPIC, layout::IOAPIC_ID, IOAPIC_VERSION, IOAPIC_ENABLED]);
    entries.extend((layout::IOAPIC.0 as u32).to_le_bytes());
    for pin in 0..layout::IOAPIC_PINS {
        entries.extend(interrupt(
            IO_INTERRUPT,
            VECTORED,
            ACTIVE_HIGH | EDGE,
            pin,
            layout::IOAPIC_ID,
            pin,
        ));
    }
    // The 8259 on the boot processor's LINT0, NMI on everyone's LINT1 (MP 1.4 §3.6.2.2).
    entries.extend(interrupt(LOCAL_INTERRUPT, EXTINT, AS_THE_BUS, 0, 0, 0));
    entries.extend(interrupt(LOCAL_INTERRUPT, NMI, AS_THE_BUS, 0, EVERY_LAPIC, 1));

    let mut table = Vec::with_capacity(HEADER_SIZE + entries.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"MINIVMM virtual     ");
    // No OEM table: its address and size.
    table.extend([0; 6]);
    table.extend((count as u16).to_le_bytes());
    table.extend((layout::LAPIC.0 as u32).to_le_bytes());
    // No extended entries: their length and checksum; reserved.
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes `bytes` sum to 0, as both parts of the table want.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// An interrupt entry: from `source` on the ISA bus to `pin` of the APIC `to`.
fn interrupt(entry: u8, kind: u8, flags: u16, source: u8, to: u8, pin: u8) -> [u8; 8] {
    let [flags_low, flags_high] = flags.to_le_bytes();
    [entry, kind, flags_low, flags_high, ISA_BUS, source, to, pin]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cpus: u32) -> (Vec<u8>, Vec<u8>) {
        let Structure { address, bytes, .. } = table(cpus);
        assert!(bytes.len() <= layout::MPTABLE_SIZE);
        let (pointer, table) = bytes.split_at(16);
        let pointed_to = u32::from_le_bytes(*pointer[4..].first_chunk().unwrap());
        assert_eq!(u64::from(pointed_to), address.0 + 16);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        (pointer.to_vec(), table.to_vec())
    }

    /// Splits the entries as MP 1.4 table 4-3 sizes them.
    fn entries(mut table: &[u8]) -> Vec<&[u8]> {
        let mut entries = Vec::new();
        while !table.is_empty() {
            let (entry, rest) = table.split_at(if table[0] == PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            table = rest;
        }
        entries
    }

    #[test]
    fn signatures_lengths_and_checksums_hold() {
        for cpus in [1, 2, 16, 255] {
            let (pointer, table) = written(cpus);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(checksum(&pointer), 0);
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(checksum(&table), 0);
            let entries = entries(&table[HEADER_SIZE..]);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]) as usize, entries.len());
            assert_eq!(entries.iter().filter(|entry| entry[0] == PROCESSOR).count(), cpus as usize);
            assert!(entries.is_sorted_by_key(|entry| entry[0]));
            assert_eq!(table[36..40], 0xfee0_0000u32.to_le_bytes());
        }
    }

    #[test]
    fn one_processor_boots_and_ids_count_up() {
        let (_, table) = written(3);
        let processors: Vec<_> = entries(&table[HEADER_SIZE..])
            .into_iter()
            .filter(|entry| entry[0] == PROCESSOR)
            .collect();
        let ids_and_flags: Vec<_> = processors.iter().map(|entry| (entry[1], entry[3])).collect();
        assert_eq!(ids_and_flags, [(0, 3), (1, 1), (2, 1)]);
    }

    #[test]
    fn every_pin_is_an_edge_triggered_isa_interrupt_of_its_own_number() {
        let (_, table) = written(1);
        let pins: Vec<_> = entries(&table[HEADER_SIZE..])
            .into_iter()
            .filter(|entry| entry[0] == IO_INTERRUPT)
            .collect();
        assert_eq!(pins.len(), 24);
        for (number, entry) in (0u8..).zip(pins) {
            assert_eq!(
                entry,
                [IO_INTERRUPT, 0, 0b0101, 0, ISA_BUS, number, layout::IOAPIC_ID, number]
            );
        }
    }
}
