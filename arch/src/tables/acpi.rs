//! ACPI: hardware-reduced (ACPI 6.5 §4.1), so there is no legacy power management to emulate, only a reset register,
//! two sleep registers, and a power button that arrives as an ordinary interrupt.
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT    reset, sleep; then the devices, in AML
//!              -> MADT            processors and the IOAPIC
//! ```

use acpi_tables::aml::{
    Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::GuestAddress;

use super::Error;
use crate::GuestMemory;
use crate::layout::{self, MmioDevice};

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Processors, 1 to 255.
    pub cpus: u32,
    /// There is a COM1.
    pub serial: bool,
    /// The virtio-mmio devices, in the order in which the guest shall number them. [`layout::VIRTIO_MMIO_MAX`] at most.
    pub virtio_mmio: &'a [MmioDevice],
}

const OEM: [u8; 6] = *b"MINIVM";
const OEM_TABLE: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;
/// DSDT revision: 2 and above make AML integers 64 bits wide (ACPI 6.5 §20.2.1).
const DSDT_REVISION: u8 = 2;
/// An SDT header's bytes (ACPI 6.5 table 5.4).
const SDT_HEADER: u32 = 36;
/// Tables start at multiples of this; ACPI asks it of the RSDP alone.
const ALIGNMENT: usize = 16;

/// FADT IAPC_BOOT_ARCH (ACPI 6.5 table 5.10). Bit 1, "8042", stays clear: the i8042 port only resets, and Linux must
/// not wait for a keyboard's answers (with it clear and no PS/2 device in the DSDT, i8042.ko does not touch the port).
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// Notification value: the power button was pressed (ACPI 6.5 table 5.163).
const BUTTON_PRESSED: u8 = 0x80;

/// Writes the tables to [`layout::ACPI_TABLES`] and returns the RSDP's address.
///
/// # Errors
/// The tables do not fit there (too many processors), or guest memory does not reach that far.
pub fn write(memory: &GuestMemory, machine: &Machine<'_>) -> Result<GuestAddress, Error> {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.push(&dsdt(machine));
    let fadt = area.push(&fadt(dsdt));
    let madt = area.push(&madt(machine.cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.push(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let (size, room) = (area.bytes.len(), layout::ACPI_TABLES_SIZE);
    if size > room {
        return Err(Error::TooLarge { what: "ACPI tables", size, room });
    }
    crate::write(memory, "ACPI tables", layout::ACPI_TABLES, &area.bytes)?;
    Ok(layout::ACPI_TABLES)
}

/// The tables' place, filled from its start; the RSDP's comes first and is filled last.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends `table` and returns its guest-physical address.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_TABLES.0 + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// An 8-bit I/O port as a generic address.
fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

/// The fixed description (ACPI 6.5 §5.2.9).
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

/// The devices (ACPI 6.5 §5.2.11.1).
fn dsdt(machine: &Machine<'_>) -> Sdt {
    let mut aml = Vec::new();
    let processors: Vec<Processor> = (0..machine.cpus).map(Processor).collect();
    let disks: Vec<VirtioMmio> = (0..).zip(machine.virtio_mmio).map(|(n, device)| VirtioMmio(n, *device)).collect();
    let mut devices: Vec<&dyn Aml> = Vec::new();
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));
    if machine.serial {
        devices.push(&Com1);
    }
    devices.extend(disks.iter().map(|disk| disk as &dyn Aml));
    devices.extend([&Pvpanic as &dyn Aml, &PowerButton]);
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(&mut aml);
    // The sleep type of "soft off"; the reserved elements are for the registers that reduced hardware lacks (§7.4.2).
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut aml);

    let mut sdt = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(&aml);
    sdt
}

/// Edge-triggered, active high, not shared: how every interrupt of this machine arrives.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A processor, found by the `_UID` that its MADT entry has (ACPI 6.5 §8.4).
struct Processor(u32);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let name = Path::new(&format!("C{:03X}", self.0 & 0xfff));
        let hid = Name::new("_HID".into(), &"ACPI0007");
        Device::new(name, vec![&hid, &Name::new("_UID".into(), &self.0)]).to_aml_bytes(sink);
    }
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let ports = IO::new(layout::COM1, layout::COM1, 1, layout::COM1_SIZE as u8);
        let interrupt = edge(layout::COM1_GSI);
        let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
        let uid = Name::new("_UID".into(), &aml::ZERO);
        Device::new("COM1".into(), vec![&hid, &uid, &Name::new("_CRS".into(), &resources)]).to_aml_bytes(sink);
    }
}

/// A virtio-mmio device, by the id that Linux's virtio_mmio driver takes from ARM's tables.
struct VirtioMmio(u8, MmioDevice);

impl Aml for VirtioMmio {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let Self(number, device) = self;
        // The windows lie in the hole below 4 GiB.
        let registers = Memory32Fixed::new(true, device.base.0 as u32, device.size as u32);
        let interrupt = edge(device.gsi);
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        let hid = Name::new("_HID".into(), &"LNRO0005");
        let uid = Name::new("_UID".into(), number);
        let coherent = Name::new("_CCA".into(), &aml::ONE);
        let children: Vec<&dyn Aml> = vec![&hid, &uid, &coherent];
        let crs = Name::new("_CRS".into(), &resources);
        let name = Path::new(&format!("VR{number:02X}"));
        Device::new(name, [children, vec![&crs]].concat()).to_aml_bytes(sink);
    }
}

/// The panic port, as QEMU announces its own (docs/specs/pvpanic).
struct Pvpanic;

impl Aml for Pvpanic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
        let resources = ResourceTemplate::new(vec![&port]);
        let hid = Name::new("_HID".into(), &"QEMU0001");
        // Present, enabled, shown, functioning.
        let status = Name::new("_STA".into(), &0xfu8);
        Device::new("PEVT".into(), vec![&hid, &Name::new("_CRS".into(), &resources), &status]).to_aml_bytes(sink);
    }
}

/// The power button, and the Generic Event Device (ACPI 6.5 §5.6.9) that tells of it: its interrupt runs `_EVT`, which
/// notifies the button's driver.
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
        let uid = Name::new("_UID".into(), &aml::ZERO);
        Device::new("PWRB".into(), vec![&hid, &uid]).to_aml_bytes(sink);

        let interrupt = edge(layout::POWER_BUTTON_GSI);
        let resources = ResourceTemplate::new(vec![&interrupt]);
        let button = Path::new("PWRB");
        let notify = Notify::new(&button, &BUTTON_PRESSED);
        let is_button = Equal::new(&aml::Arg(0), &layout::POWER_BUTTON_GSI);
        let on_button = If::new(&is_button, vec![&notify]);
        let event = Method::new("_EVT".into(), 1, true, vec![&on_button]);
        let hid = Name::new("_HID".into(), &"ACPI0013");
        let uid = Name::new("_UID".into(), &aml::ZERO);
        let crs = Name::new("_CRS".into(), &resources);
        Device::new("GED_".into(), vec![&hid, &uid, &crs, &event]).to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::super::checksum;
    use super::*;
    use vm_memory::Bytes;

    /// All 16 virtio-mmio windows.
    fn every_device() -> Vec<MmioDevice> {
        (0..).map_while(layout::virtio_mmio).collect()
    }

    fn written(machine: &Machine<'_>) -> GuestMemory {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        assert_eq!(write(&memory, machine).unwrap(), layout::ACPI_TABLES);
        memory
    }

    fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The table at `address`, its length and checksum verified.
    fn table(memory: &GuestMemory, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let bytes = read(memory, address, length as usize);
        assert_eq!(&bytes[..4], signature);
        assert_eq!(checksum(&bytes), 0, "{}", String::from_utf8_lossy(signature));
        assert!(address + u64::from(length) <= layout::ACPI_TABLES.0 + layout::ACPI_TABLES_SIZE as u64);
        bytes
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// FADT, MADT and DSDT, found as a kernel finds them.
    fn walk(memory: &GuestMemory) -> [Vec<u8>; 3] {
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
        let devices = every_device();
        for cpus in [1, 2, 16, 255] {
            for virtio_mmio in [&[][..], &devices[..1], &devices] {
                walk(&written(&Machine { cpus, serial: true, virtio_mmio }));
            }
        }
    }

    #[test]
    fn fadt_says_reduced_hardware_with_reset_and_sleep() {
        let [fadt, ..] = walk(&written(&Machine { cpus: 1, serial: true, virtio_mmio: &[] }));
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        // Offsets of ACPI 6.5 table 5.9.
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
        let port = |number: u16| [[1, 8, 0, 1, number as u8, (number >> 8) as u8].as_slice(), &[0; 6]].concat();
        assert_eq!(fadt[109..111], [0x24, 0]);
        assert_eq!((&fadt[116..128], fadt[128]), (port(layout::RESET).as_slice(), layout::RESET_VALUE));
        assert_eq!(fadt[244..256], port(layout::SLEEP_CONTROL));
        assert_eq!(fadt[256..268], port(layout::SLEEP_STATUS));
    }

    #[test]
    fn madt_lists_processors_and_the_ioapic() {
        for cpus in [1u8, 4, 255] {
            let [_, madt, _] = walk(&written(&Machine { cpus: cpus.into(), serial: true, virtio_mmio: &[] }));
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
        let devices = every_device();
        let [.., dsdt] = walk(&written(&Machine { cpus: 2, serial: true, virtio_mmio: &devices }));
        for name in [b"C000", b"C001", b"COM1", b"VR00", b"VR0F", b"PEVT", b"PWRB", b"GED_", b"_EVT", b"_S5_"] {
            assert!(contains(&dsdt, name), "{}", String::from_utf8_lossy(name));
        }
        assert!(!contains(&dsdt, b"C002"));
        let place = |name: &[u8]| dsdt.windows(4).position(|window| window == name);
        assert!(place(b"VR00") < place(b"VR01") && place(b"VR01") < place(b"VR0F"));
        for device in &devices {
            // Memory32Fixed, writable; then an edge-triggered, active-high, exclusive interrupt.
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((device.base.0 as u32).to_le_bytes());
            resources.extend((device.size as u32).to_le_bytes());
            resources.extend([0x89, 6, 0, 0b0011, 1]);
            resources.extend(device.gsi.to_le_bytes());
            assert!(contains(&dsdt, &resources), "{device:?}");
        }
        let [.., bare] = walk(&written(&Machine { cpus: 1, serial: false, virtio_mmio: &[] }));
        assert!(!contains(&bare, b"COM1") && !contains(&bare, b"LNRO0005"));
    }

    #[test]
    fn too_many_processors_are_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let machine = Machine { cpus: 4096, serial: true, virtio_mmio: &[] };
        assert!(matches!(write(&memory, &machine), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn a_tiny_guest_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let error = write(&memory, &Machine { cpus: 1, serial: true, virtio_mmio: &[] }).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no guest memory at 0xe0000, the place of the ACPI tables; give the guest more memory"
        );
    }
}
