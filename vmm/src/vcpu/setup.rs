//! Makes a vCPU, and sets the registers with which it boots: the first vCPU starts at the kernel's entry point.
//!
//! `arch::cpu` decides the values of all registers; this file hands them to KVM, for a new vCPU and again at a reset.
//! [`super::state`] puts back what else a guest can change.

use std::sync::Arc;

use arch::boot::Entry;
use arch::cpu;
use devices::bus::{Bus, Unfinished};
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::exits::Exits;
use crate::error::Error;
use crate::events::EventSender;

/// A vCPU: KVM's file descriptor, and the buses that its exits go to. While the guest runs, its thread owns this value. While it is
/// paused, the machine can use it.
pub(crate) struct Vcpu {
    /// Its number, APIC id, and index in the guest's tables.
    pub index: u32,
    /// Its CPUID leaves.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) fd: VcpuFd,
    /// What a save has to read ([`super::state`]): the MSRs that the guest can change, and whether it can have guests of its own.
    pub(super) changeable_msrs: Vec<u32>,
    pub(super) has_nested_state: bool,
    legacy_pic: bool,
    pub(super) port_io: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) events: Arc<EventSender>,
    pub(super) exits: Arc<Exits>,
    pub(super) has_run: bool,
    /// A debugger is attached: if KVM cannot emulate an instruction, the machine stops for the debugger and does not end.
    pub(crate) debugged: bool,
    /// KVM_RUNs in a row that returned EAGAIN.
    pub(super) refusals: u32,
    /// The last register write waits for its device: a reset by the driver while requests are with the host.
    pub(crate) unfinished: Option<Unfinished>,
}

/// What all vCPUs of a VM are made from. The builder fills it in once and calls [`VcpuSetup::create`] for each index
/// from 0; the boot vCPU is 0.
pub(crate) struct VcpuSetup<'a> {
    pub kvm: &'a Kvm,
    /// The CPUID leaves that KVM supports on this host.
    pub supported: &'a CpuId,
    pub vm: &'a VmFd,
    pub count: u32,
    /// The guest uses the 8259s: without ACPI.
    pub legacy_pic: bool,
    /// The guest may run guests of its own.
    pub nested: bool,
    pub hints: u32,
    pub port_io: Arc<Bus>,
    pub mmio: Arc<Bus>,
    /// Where exits that end the VM are reported.
    pub events: Arc<EventSender>,
}

/// How the vCPUs of a machine begin.
pub(crate) enum VcpuStart {
    /// As at power-on. The boot vCPU then goes to the kernel's entry point ([`Vcpu::set_boot_registers`]).
    Boot(Entry),
    /// With the saved CPUID leaves of each vCPU. The saved state is written later. The leaves come first, because KVM refuses to
    /// change them when a vCPU has run.
    Restore(Vec<Vec<kvm_cpuid_entry2>>),
}

impl VcpuSetup<'_> {
    /// Makes vCPU `index`, with the CPUID leaves that `start` says.
    ///
    /// # Errors
    /// When KVM refuses an image.
    pub(crate) fn create(&self, index: u32, start: &VcpuStart) -> Result<Vcpu, Error> {
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(Error::kvm("create a vCPU"))?;
        let leaves = match start {
            VcpuStart::Boot(_) => self.cpuid(&fd, index),
            VcpuStart::Restore(cpuid) => cpuid.get(index as usize).cloned().unwrap_or_default(),
        };
        set_cpuid(&fd, &leaves)?;
        Ok(Vcpu {
            index,
            cpuid: leaves,
            changeable_msrs: Vec::new(),
            has_nested_state: false,
            legacy_pic: self.legacy_pic,
            fd,
            port_io: Arc::clone(&self.port_io),
            mmio: Arc::clone(&self.mmio),
            events: Arc::clone(&self.events),
            exits: Arc::default(),
            has_run: false,
            debugged: false,
            refusals: 0,
            unfinished: None,
        })
    }

    fn cpuid(&self, fd: &VcpuFd, index: u32) -> Vec<kvm_cpuid_entry2> {
        // An error means that KVM does not know the TSC frequency. The guest then measures it.
        let tsc_khz = fd.get_tsc_khz().ok().filter(|&khz| khz != 0);
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let vcpu = cpu::cpuid::Vcpu {
            id: index,
            count: self.count,
            tsc_khz,
            tsc_deadline,
            nested: self.nested,
            hints: self.hints,
        };
        cpu::cpuid::for_vcpu(self.supported.as_slice(), &vcpu)
    }
}

fn set_cpuid(fd: &VcpuFd, leaves: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let cpuid = CpuId::from_entries(leaves).map_err(|_| Error::TooMany("CPUID leaves"))?;
    fd.set_cpuid2(&cpuid).map_err(Error::kvm("set the CPUID"))
}

/// Writes `entries` in this order.
///
/// # Errors
/// When KVM refuses one.
pub(super) fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let msrs = Msrs::from_entries(entries).map_err(|_| Error::TooMany("MSRs"))?;
    let set = fd.set_msrs(&msrs).map_err(Error::kvm("set the MSRs"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Msr(refused.index)),
    }
}

impl Vcpu {
    /// Sets the registers of a vCPU that is in its state at power-on. The boot vCPU (0) starts at `entry`. The others wait for the
    /// guest's INIT-SIPI-SIPI, for which KVM itself resets them (SDM 3A 9.4).
    ///
    /// # Errors
    /// When KVM refuses an image.
    pub(crate) fn set_boot_registers(&self, entry: &Entry) -> Result<(), Error> {
        let fd = &self.fd;
        write_msrs(fd, &cpu::msrs::boot())?;
        if self.index != 0 {
            return Ok(());
        }
        let sregs = fd.get_sregs().map_err(Error::kvm("read the special registers"))?;
        let (regs, sregs) = cpu::regs::boot(entry, sregs);
        fd.set_sregs(&sregs).map_err(Error::kvm("set the special registers"))?;
        fd.set_regs(&regs).map_err(Error::kvm("set the registers"))?;
        fd.set_fpu(&cpu::regs::fpu()).map_err(Error::kvm("set the FPU"))?;
        let lapic = fd.get_lapic().map_err(Error::kvm("read the local APIC"))?;
        let lapic = cpu::lapic::boot(lapic, self.legacy_pic);
        fd.set_lapic(&lapic).map_err(Error::kvm("set the local APIC"))
    }
}
