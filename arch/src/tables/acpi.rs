//! ACPI: hardware-reduced (ACPI 6.5 §4.1), with no legacy power management to emulate. There are a reset register, two sleep registers,
//! and a power button that is an ordinary interrupt.
//!
//! A capability, as the MPTable is: `tables` chooses one of the two, and all other code sees a [`Structure`].
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT    reset, sleep; then the devices, in AML
//!              -> MADT            processors and the IOAPIC
//! ```

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};

use crate::Structure;
use crate::layout::{self, MmioDevice};
use crate::machine_layout::MachineLayout;

const OEM: [u8; 6] = *b"MINIVM";
const OEM_TABLE: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;
/// DSDT revision: 2 and above make AML integers 64 bits wide (ACPI 6.5 §20.2.1).
const DSDT_REVISION: u8 = 2;
// The size of an SDT header (ACPI 6.5 table 5.4).
const SDT_HEADER: u32 = 36;
/// Tables start at multiples of this; ACPI asks it of the RSDP alone.
const ALIGNMENT: usize = 16;

/// FADT IAPC_BOOT_ARCH (ACPI 6.5 table 5.10). Bit 1, "8042", stays clear: the i8042 port only resets, and Linux must not wait for a
/// keyboard's answers. With no PS/2 device in the DSDT either, i8042.ko does not touch the port.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The tables for the machine of `layout`, the RSDP first. `add_last` adds the devices that come after the disks.
pub(super) fn tables(layout: &MachineLayout, add_last: fn(&mut dyn AmlSink)) -> Structure {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.push(&dsdt(layout, add_last));
    let fadt = area.push(&fadt(dsdt));
    let madt = area.push(&madt(layout.spec.cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.push(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Structure { name: "ACPI tables", address: layout::ACPI_TABLES, bytes: area.bytes }
}

/// The tables' place, filled from its start; the RSDP's comes first and is filled last.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends `table` behind the others, aligned, and returns the guest-physical address that it has there.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_TABLES.0 + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

/// The Fixed ACPI Description Table (ACPI 6.5 §5.2.9): reduced hardware, the reset and sleep registers, and what a PC has that
/// this machine lacks.
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // Set means that the button is not a fixed one: it is a device in the DSDT, or (sleep) there is none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(layout::RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"minivmm\0").into();
    fadt.finalize()
}

/// Processors and the IOAPIC (ACPI 6.5 §5.2.12). No flag says that there is an 8259, and no override: ISA interrupt n
/// is pin n.
fn madt(cpus: u32) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC.0 as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    // One byte holds an id, and 255 is everyone's.
    for id in 0..u8::try_from(cpus).unwrap_or(u8::MAX) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(layout::IOAPIC_ID, layout::IOAPIC.0 as u32, 0));
    madt
}

/// The Differentiated System Description Table (ACPI 6.5 §5.2.11.1): the devices in AML, in the order in which Linux numbers
/// them, so `VR00` is `/dev/vda`.
fn dsdt(layout: &MachineLayout, add_last: fn(&mut dyn AmlSink)) -> Sdt {
    let mut devices = Vec::new();
    (0..layout.spec.cpus).for_each(|id| processor(&mut devices, id));
    let uarts = (0..).zip(layout::SERIAL_PORTS).zip(layout.spec.serial);
    for ((index, (port, gsi)), _) in uarts.filter(|(_, present)| *present) {
        uart(&mut devices, index, port, gsi);
    }
    (0..).zip(&layout.disks).for_each(|(index, disk)| virtio_mmio(&mut devices, index, disk));
    add_last(&mut devices);
    let mut aml = Scope::raw("\\_SB_".into(), devices);
    // The sleep type of "soft off"; the reserved elements are for the registers that reduced hardware lacks (§7.4.2).
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut aml);

    let mut sdt = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(&aml);
    sdt
}

/// Edge-triggered, active high: how every interrupt of this machine arrives.
pub(super) fn edge(gsi: u32, shared: bool) -> Interrupt {
    Interrupt::new(true, true, false, shared, gsi)
}

/// A device: its name, what kind it is (`_HID`), which of that kind (`_UID`), and its other objects.
pub(super) fn device(
    sink: &mut dyn AmlSink,
    name: &str,
    hid: &dyn Aml,
    uid: u32,
    objects: &[&dyn Aml],
) {
    let (hid, uid) = (Name::new("_HID".into(), hid), Name::new("_UID".into(), &uid));
    let objects = [&[&hid as &dyn Aml, &uid], objects].concat();
    Device::new(name.into(), objects).to_aml_bytes(sink);
}

/// A processor, found by the `_UID` that its MADT entry has (ACPI 6.5 §8.4).
fn processor(sink: &mut dyn AmlSink, id: u32) {
    device(sink, &format!("C{:03X}", id & 0xfff), &"ACPI0007", id, &[]);
}

/// The serial port with this index in [`layout::SERIAL_PORTS`].
fn uart(sink: &mut dyn AmlSink, index: u32, port: u16, gsi: u32) {
    let (ports, interrupt) = (IO::new(port, port, 1, layout::UART_SIZE as u8), edge(gsi, false));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let (name, crs) = (format!("COM{}", index + 1), Name::new("_CRS".into(), &resources));
    device(sink, &name, &EISAName::new("PNP0501"), index, &[&crs]);
}

/// A virtio-mmio device, by the id that Linux's virtio_mmio driver takes from ARM's tables.
fn virtio_mmio(sink: &mut dyn AmlSink, index: u32, disk: &MmioDevice) {
    // The windows lie in the hole below 4 GiB.
    let registers = Memory32Fixed::new(true, disk.base.0 as u32, disk.size as u32);
    let interrupt = edge(disk.gsi, true);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    let crs = Name::new("_CRS".into(), &resources);
    device(sink, &format!("VR{index:02X}"), &"LNRO0005", index, &[&coherent, &crs]);
}

#[cfg(test)]
mod tests {
    use super::super::add_last;
    use super::super::mptable::checksum;
    use super::*;
    use crate::machine_layout::MachineSpec;

    fn written(cpus: u32, serial: bool, disks: usize) -> Vec<u8> {
        let spec = MachineSpec { memory: 1 << 30, cpus, serial: [serial; 2], acpi: true, disks };
        let tables = tables(&MachineLayout::new(spec), add_last);
        assert!(tables.bytes.len() <= layout::ACPI_TABLES_SIZE);
        tables.bytes
    }

    fn read(tables: &[u8], address: u64, length: usize) -> Vec<u8> {
        tables[(address - layout::ACPI_TABLES.0) as usize..][..length].to_vec()
    }

    /// The table at `address`, its length and checksum verified.
    fn table(memory: &[u8], address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length = u32::from_le_bytes(*read(memory, address + 4, 4).first_chunk().unwrap());
        let bytes = read(memory, address, length as usize);
        assert_eq!(&bytes[..4], signature);
        assert_eq!(checksum(&bytes), 0, "{}", String::from_utf8_lossy(signature));
        bytes
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// FADT, MADT and DSDT, found as a kernel finds them.
    fn walk(memory: &[u8]) -> [Vec<u8>; 3] {
        let rsdp = read(memory, layout::ACPI_TABLES.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((checksum(&rsdp[..20]), checksum(&rsdp), rsdp[15]), (0, 0, 2));
        let xsdt = table(memory, u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(memory, u64_at(&xsdt, 36), b"FACP");
        let madt = table(memory, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table(memory, u64_at(&fadt, 140), b"DSDT");
        [fadt, madt, dsdt]
    }

    fn contains(bytes: &[u8], needle: &[u8]) -> bool {
        bytes.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn tables_of_every_size_verify() {
        for cpus in [1, 2, 16, 255] {
            for disks in [0, 1, layout::VIRTIO_MMIO_MAX] {
                walk(&written(cpus, true, disks));
            }
        }
    }

    #[test]
    fn fadt_says_reduced_hardware_with_reset_and_sleep() {
        let [fadt, ..] = walk(&written(1, true, 0));
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        // Offsets of ACPI 6.5 table 5.9.
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
        let port = |number: u16| {
            [[1, 8, 0, 1, number as u8, (number >> 8) as u8].as_slice(), &[0; 6]].concat()
        };
        assert_eq!(fadt[109..111], [0x24, 0]);
        assert_eq!(
            (&fadt[116..128], fadt[128]),
            (port(layout::RESET).as_slice(), layout::RESET_VALUE)
        );
        assert_eq!(fadt[244..256], port(layout::SLEEP_CONTROL));
        assert_eq!(fadt[256..268], port(layout::SLEEP_STATUS));
    }

    #[test]
    fn madt_lists_processors_and_the_ioapic() {
        for cpus in [1u8, 4, 255] {
            let [_, madt, _] = walk(&written(cpus.into(), true, 0));
            assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
            let (processors, ioapic) = madt[44..].split_at(usize::from(cpus) * 8);
            for (id, processor) in (0..cpus).zip(processors.chunks(8)) {
                assert_eq!(processor, [0, 8, id, id, 1, 0, 0, 0]);
            }
            assert_eq!(ioapic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn dsdt_names_the_devices_in_order() {
        let devices: Vec<_> = (0..).map_while(layout::virtio_mmio_device).collect();
        let [.., dsdt] = walk(&written(2, true, devices.len()));
        for name in [
            b"C000", b"C001", b"COM1", b"COM2", b"VR00", b"VR3F", b"PEVT", b"PWRB", b"GED_",
            b"_EVT", b"VGEN", b"_S5_",
        ] {
            assert!(contains(&dsdt, name), "{}", String::from_utf8_lossy(name));
        }
        assert!(!contains(&dsdt, b"C002"));
        let place = |name: &[u8]| dsdt.windows(4).position(|window| window == name);
        assert!(place(b"VR00") < place(b"VR01") && place(b"VR01") < place(b"VR3F"));
        for device in &devices {
            // Memory32Fixed, writable; then an edge-triggered, active-high, shared interrupt.
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((device.base.0 as u32).to_le_bytes());
            resources.extend((device.size as u32).to_le_bytes());
            resources.extend([0x89, 6, 0, 0b1011, 1]);
            resources.extend(device.gsi.to_le_bytes());
            assert!(contains(&dsdt, &resources), "{device:?}");
        }
        for gsi in [layout::POWER_BUTTON_GSI, layout::GENERATION_ID_GSI] {
            // An interrupt as above, but exclusive, and the end tag.
            let resources = [&[0x89, 6, 0, 0b0011, 1], &gsi.to_le_bytes()[..], &[0x79]].concat();
            assert!(contains(&dsdt, &resources), "{gsi}");
        }
        let [.., bare] = walk(&written(1, false, 0));
        assert!(
            !contains(&bare, b"COM1") && !contains(&bare, b"COM2") && !contains(&bare, b"LNRO0005")
        );
    }
}
