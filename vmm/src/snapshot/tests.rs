//! The state of a vCPU and of interrupt controllers is written into another VM. Each test finds what another order of writing loses.

use std::io::sink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::cpu::cpuid;
use arch::layout::{POWER_BUTTON_GSI, SERIAL_PORTS};
use arch::machine_layout::{MachineLayout, MachineSpec};
use devices::bus::{Bus, BusDevice};
use devices::legacy::SerialDevice;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VmFd};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::core_file::{CoreFile, CoreLayout, RamSegment};
use super::page_map::{self, PageMap};
use super::page_set::PageSet;
use super::pages::{self, RamProgress, RamSave};
use super::saved::SavedMachine;
use super::vcpu::{SavedVcpu, TscShift};
use crate::GuestMemory;
use crate::attach::{line, new_eventfd};
use crate::events::event_channel;
use crate::irq_chips::IrqChips;
use crate::kvm::{self, EmptyVm};
use crate::memory;
use crate::vcpu::{Vcpu, VcpuSetup, VcpuStart, VcpuState, read_msrs};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The local APIC's registers of the timer and of spurious interrupts.
const LVT_TIMER: usize = 0x320;
const SPURIOUS: usize = 0xf0;

/// A VM with one vCPU that has not run.
fn machine() -> Option<(Kvm, Arc<VmFd>, Vcpu)> {
    let Ok(EmptyVm { kvm, vm, cpuid: supported }) = EmptyVm::new() else {
        eprintln!("skipped: there is no /dev/kvm");
        return None;
    };
    kvm::create_irq_chips(&vm).unwrap();
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let leaves =
        cpuid::Vcpu { id: 0, count: 1, tsc_khz: None, tsc_deadline, nested: false, hints: 0 };
    let leaves = cpuid::for_vcpu(supported.as_slice(), &leaves);
    let (events, _) = event_channel().unwrap();
    let (port_io, mmio) = <(Arc<Bus>, Arc<Bus>)>::default();
    let (count, legacy_pic, nested) = (1, false, false);
    let setup = VcpuSetup {
        kvm: &kvm,
        supported: &supported,
        vm: &vm,
        count,
        legacy_pic,
        nested,
        hints: 0,
        port_io,
        mmio,
        events,
    };
    let mut vcpu = setup.create(0, &VcpuStart::Restore(vec![leaves])).unwrap();
    VcpuState::at_power_on(&mut vcpu, &kvm, nested).unwrap();
    Some((kvm, vm, vcpu))
}

fn msr(vcpu: &Vcpu, index: u32) -> u64 {
    read_msrs(&vcpu.fd, &[index]).unwrap()[0].data
}

fn set_msr(vcpu: &Vcpu, index: u32, data: u64) {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(vcpu.fd.set_msrs(&msrs).unwrap(), 1);
}

/// Sets registers of the local APIC.
fn set_lapic(vcpu: &Vcpu, registers: &[(usize, u32)]) {
    let mut lapic = vcpu.fd.get_lapic().unwrap();
    for &(at, value) in registers {
        for (byte, value) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    vcpu.fd.set_lapic(&lapic).unwrap();
}

/// Converts the state to JSON and back, as a file does.
fn travelled(saved: &SavedVcpu) -> SavedVcpu {
    serde_json::from_slice(&serde_json::to_vec(saved).unwrap()).unwrap()
}

#[test]
fn an_armed_deadline_timer_stays_armed() {
    let (Some((_, _source_vm, mut source)), Some((_, _vm, mut target))) = (machine(), machine())
    else {
        return;
    };
    set_lapic(&source, &[(SPURIOUS, 0x1ff), (LVT_TIMER, 2 << 17 | 0x20)]);
    let deadline = msr(&source, IA32_TSC) + (1 << 42);
    set_msr(&source, IA32_TSC_DEADLINE, deadline);
    assert_eq!(msr(&source, IA32_TSC_DEADLINE), deadline);

    let saved = travelled(&SavedVcpu::read(&mut source).unwrap());
    let shift = saved.shift(&mut target, 0).unwrap();
    saved.write(&mut target, shift).unwrap();
    assert_eq!(msr(&target, IA32_TSC_DEADLINE), deadline);
    // A second generation differs only in the time, which goes on.
    let again = SavedVcpu::read(&mut target).unwrap();
    assert_eq!(differences(&saved, &again), Vec::<String>::new());
}

/// The parts of the state that differ, except for the TSC.
fn differences(one: &SavedVcpu, other: &SavedVcpu) -> Vec<String> {
    let state = |saved: &SavedVcpu| serde_json::to_value(saved).unwrap()["state"].clone();
    let (one, other) = (state(one), state(other));
    let names = one.as_object().unwrap().keys();
    names.filter(|name| one[*name] != other[*name]).cloned().collect()
}

#[test]
fn registers_come_back_as_they_were() {
    let (Some((_, _source_vm, mut source)), Some((_, _vm, mut target))) = (machine(), machine())
    else {
        return;
    };
    let mut regs = source.fd.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip) = (0x1234_5678_9abc_def0, 7, 0x10_0000);
    source.fd.set_regs(&regs).unwrap();
    // XMM15, and the bit that says that the SSE registers are in use (SDM 1, 13.4).
    let mut xsave = source.fd.get_xsave().unwrap();
    xsave.region[100..104].fill(0xa5a5_a5a5);
    xsave.region[128] |= 2;
    // SAFETY: the area is as large as KVM's own was.
    #[expect(unsafe_code, reason = "KVM reads as much extended state as the vCPU has")]
    unsafe { source.fd.set_xsave(&xsave) }.unwrap();
    set_msr(&source, 0xc000_0102, 0xdead_0000);
    let saved = travelled(&SavedVcpu::read(&mut source).unwrap());
    saved.write(&mut target, TscShift::default()).unwrap();
    assert_eq!(target.fd.get_regs().unwrap(), regs);
    assert_eq!(target.fd.get_xsave().unwrap().region[100..104], [0xa5a5_a5a5; 4]);
    assert_eq!(msr(&target, 0xc000_0102), 0xdead_0000);
}

/// The IOAPIC's pending pins.
fn pending(vm: &VmFd) -> u32 {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: KVM has filled in the IOAPIC's member.
    #[expect(unsafe_code, reason = "a union of KVM's")]
    unsafe {
        chip.chip.ioapic.irr
    }
}

#[test]
fn a_masked_pin_stays_pending() {
    let (Some((_, source, _)), Some((_, target, mut vcpu))) = (machine(), machine()) else {
        return;
    };
    // All pins are masked at power-on. A level that stays up is pending until it is served.
    source.set_irq_line(17, true).unwrap();
    let before = pending(&source);
    let chips = serde_json::to_vec(&IrqChips::read(&source).unwrap()).unwrap();
    let chips: IrqChips = serde_json::from_slice(&chips).unwrap();
    let saved = SavedVcpu::read(&mut vcpu).unwrap();
    saved.write(&mut vcpu, TscShift::default()).unwrap();
    chips.write(&target).unwrap();
    assert_eq!(pending(&target), before);
}

#[test]
fn a_description_of_the_first_format_is_read_for_ever() {
    let text = include_str!("fixture-1.0.json");
    let saved: SavedMachine = serde_json::from_str(text).unwrap();
    assert_eq!((saved.format.major, saved.config.cpus), (1, 1));
    let shown = saved.describe(0);
    assert!(shown.contains(" in format 1.0 at 20") && shown.contains("disk vda: "), "{shown}");
}

/// AVX and the three parts of AVX-512, in XCR0 (SDM 1, 13.3).
const VECTOR_STATE: [u32; 4] = [2, 5, 6, 7];

#[test]
fn vector_registers_come_back_as_they_were() {
    let (Some((_, _source_vm, mut source)), Some((_, _vm, mut target))) = (machine(), machine())
    else {
        return;
    };
    let leaf = |index: u32| {
        source.cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (0xd, index)).copied()
    };
    let offered = leaf(0).map_or(0, |leaf| leaf.eax);
    let parts: Vec<_> = VECTOR_STATE.into_iter().filter(|part| offered >> part & 1 != 0).collect();
    let mut xcrs = source.fd.get_xcrs().unwrap();
    xcrs.xcrs[0].value = parts.iter().fold(3, |value, part| value | 1 << part);
    if xcrs.nr_xcrs > 0 {
        source.fd.set_xcrs(&xcrs).unwrap();
    }
    let mut xsave = source.fd.get_xsave().unwrap();
    let places: Vec<_> = parts
        .iter()
        .map(|part| {
            let leaf = leaf(*part).unwrap();
            xsave.region[128] |= 1 << part;
            leaf.ebx as usize / 4..(leaf.ebx + leaf.eax) as usize / 4
        })
        .collect();
    for place in &places {
        for word in place.clone() {
            xsave.region[word] = 0x5a00_0000 + word as u32;
        }
    }
    // SAFETY: the area is as large as KVM's own was.
    #[expect(unsafe_code, reason = "KVM reads as much extended state as the vCPU has")]
    unsafe { source.fd.set_xsave(&xsave) }.unwrap();
    let saved = travelled(&SavedVcpu::read(&mut source).unwrap());
    saved.write(&mut target, TscShift::default()).unwrap();
    let restored = target.fd.get_xsave().unwrap();
    for (part, place) in parts.iter().zip(places) {
        assert!(restored.region[place.clone()] == xsave.region[place], "part {part} of XCR0");
    }
    assert_eq!(target.fd.get_xcrs().unwrap().xcrs[0].value, xcrs.xcrs[0].value);
}

/// The interrupt does not wait in a kernel thread: the state that is read next has it.
#[test]
fn an_interrupt_is_in_the_state_as_soon_as_its_line_was_pulsed() {
    let Some((_, vm, mut vcpu)) = machine() else { return };
    let (com1, button) = (SERIAL_PORTS[0].1, POWER_BUTTON_GSI);
    let vector = |gsi: u32| 0x40 + gsi;
    let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut ioapic).unwrap();
    for gsi in [com1, button] {
        // SAFETY: KVM has filled in the IOAPIC's member. Edges, not masked, to the first vCPU.
        #[expect(unsafe_code, reason = "a union of KVM's")]
        unsafe {
            ioapic.chip.ioapic.redirtbl[gsi as usize].bits = vector(gsi).into();
        }
    }
    vm.set_irqchip(&ioapic).unwrap();
    let mut serial = SerialDevice::new(line(&vm, com1), Box::new(sink()), new_eventfd().unwrap());
    serial.write(1, &[1]);
    let power_button = line(&vm, button);
    // The vectors' bits in the third of the eight registers of pending interrupts.
    let requests = 0x200 + 0x10 * 2;
    let wanted = [com1, button].map(|gsi| 1 << (vector(gsi) % 32)).iter().sum::<u32>();
    for round in 0..1000 {
        set_lapic(&vcpu, &[(SPURIOUS, 0x1ff), (requests, 0)]);
        serial.enqueue(b"x");
        power_button.pulse().unwrap();
        let state = SavedVcpu::read(&mut vcpu).unwrap().state;
        let pending = [0, 1, 2, 3].map(|byte| state.lapic.regs[requests + byte] as u8);
        assert_eq!(u32::from_le_bytes(pending), wanted, "round {round}");
        serial.read(0, &mut [0]);
    }
}

/// Guest memory of this size, and its segments in a file.
fn ram(bytes: u64) -> (GuestMemory, Vec<RamSegment>) {
    let spec = MachineSpec { memory: bytes, cpus: 1, serial: [true, false], acpi: true, disks: 0 };
    let memory = memory::map(&MachineLayout::new(spec), libc::MAP_NORESERVE).unwrap();
    let ranges: Vec<_> =
        memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
    (memory, CoreLayout::new(b"{}", &[], &ranges, None).segments)
}

#[test]
fn memory_on_both_sides_of_the_hole_keeps_its_place() {
    page_map::open_page_map();
    let page = 4096;
    for bytes in [page, 3 << 30, (3 << 30) + page, (5 << 30) + 3 * page] {
        let (memory, segments) = ram(bytes);
        // The ends of each range, and both sides of the end of a block.
        let places: Vec<_> = segments
            .iter()
            .flat_map(|segment| {
                let end = segment.length - page;
                let inside =
                    [0, (2 << 20) - page, 2 << 20, end].map(|at| segment.address + at.min(end));
                inside.map(GuestAddress)
            })
            .collect();
        for place in &places {
            memory.write_obj(place.0 + 1, *place).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let end = segments.last().map_or(0, |last| last.offset + last.length);
        file.set_len(end).unwrap();
        let progress = RamProgress::default();
        let map = PageMap::read();
        let never = AtomicBool::new(false);
        let checksums = RamSave {
            memory: &memory,
            map: map.as_ref(),
            changed: None,
            file: &file,
            segments: &segments,
            progress: &progress,
            cancel: &never,
        }
        .write()
        .unwrap();
        let [written, zero] =
            [&progress.written, &progress.zero].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(written + zero, bytes);
        let assert_same = |memory: &GuestMemory, how: &str| {
            for place in &places {
                let found: u64 = memory.read_obj(*place).unwrap();
                assert_eq!(found, place.0 + 1, "{how}, {bytes} bytes");
            }
        };
        let (copy, _) = ram(bytes);
        let core = CoreFile {
            file,
            machine: Vec::new(),
            segments,
            ram_checksums: checksums,
            pages: None,
            identity: (0, 0),
        };
        pages::read(Some(&copy), &core, &PageSet::default()).unwrap();
        assert_same(&copy, "copied");
        let (mapped, _) = ram(bytes);
        let parts = pages::parts([&core].into_iter()).unwrap().unwrap();
        assert!(pages::map(&mapped, &core.file, &parts[0]).unwrap());
        assert_same(&mapped, "mapped");
    }
}
